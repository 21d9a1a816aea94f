"""Margins: what a little more of each budget is predicted to buy.

What is minimised falls in steps as a budget grows, not evenly: where a whole kind of form just does not fit any more, a few percent of time
may be worth most of a divergence. The solver knows that, so the user can know it too.

Before: a plan that was solved for. After: for every budget that was given, what would be left of its objective if it took a tenth more of
that one, and of the others what it takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from intaglio.solver import QUANTITIES, Budget, Cost, Quantity

from .errors import InfeasibleError
from .plan import Plan, choose

MORE = 1.1
"""Factor on what a plan takes of a budget."""

_ROUNDING = 1 + 1e-9
"""Keeps a plan within the limits that it takes exactly, in whatever order its costs are added."""


@dataclass(frozen=True)
class Margin:
    """What more of one budget is predicted to buy.

    Attributes:
        budget: that is relaxed.
        factor: on what the plan takes of it; of the other budgets it may take what it takes.
        minimized: what the plan minimises.
        ratio: predicted objective with more of the budget, over the plan's.
    """

    budget: Quantity
    factor: float
    minimized: Quantity
    ratio: float


def margins(plan: Plan) -> tuple[Margin, ...]:
    """Of each given budget that the plan takes something of.

    Latencies are predicted with the correction that the plan was solved with. Nothing is said of a plan that was edited by hand, minimises
    a labelled loss, or is not proved to be the best that takes no more, or where nothing is left to gain.
    """
    minimized = plan.budget.minimize
    taken = Cost(plan.size_bytes, plan.latency_s, plan.divergence)
    objective = dict(zip(QUANTITIES, taken.values(), strict=True))[minimized]
    if plan.solution is None or plan.solution.status != "optimal" or plan.joint or not objective > 0:
        return ()
    return tuple(
        Margin(relaxed, MORE, minimized, min(1.0, _objective(found, minimized) / objective))
        for relaxed, found in _relaxed(plan, taken)
        if found is not None
    )


def _relaxed(plan: Plan, taken: Cost) -> Iterator[tuple[Quantity, Plan | None]]:
    """For each limited budget the best plan that takes more of that one and no more of the others than this one; None if none is found."""
    limited = {name for name, limit in zip(QUANTITIES, plan.budget.limits(), strict=True) if limit is not None} - {plan.budget.minimize}
    for relaxed, value_taken in zip(QUANTITIES, taken.values(), strict=True):
        if relaxed not in limited or not value_taken > 0:
            continue
        size_bytes, latency_s, divergence = (
            value * (MORE if name == relaxed else _ROUNDING) if name in limited else None
            for name, value in zip(QUANTITIES, taken.values(), strict=True)
        )
        budget = Budget(size_bytes, latency_s, divergence, plan.budget.minimize)
        try:
            yield relaxed, choose(plan.menu, budget, replace(plan.correction, spare_bytes=0))
        except InfeasibleError:  # the plan itself keeps these limits, so the solver's time was up
            yield relaxed, None


def _objective(plan: Plan, minimized: Quantity) -> float:
    return {"size": plan.size_bytes, "latency": plan.latency_s, "error": plan.divergence}[minimized]
