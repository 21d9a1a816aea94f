"""Margins: what a little more of each budget is predicted to buy.

What is minimised falls in steps as a budget grows, not evenly: where a whole kind of form just does not fit any more, a few percent of time
may be worth most of a divergence. The solver knows that, so the user can know it too.

Before: a plan that was solved for. After: for every budget that was given, what would be left of its objective if it took a tenth more of
that one, and of the others what it takes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from intaglio.solver import QUANTITIES, Budget, Quantity

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
    minimized, taken = plan.budget.minimize, _taken(plan)
    if plan.solution is None or plan.solution.status != "optimal" or plan.joint or not taken[minimized] > 0:
        return ()
    given = [
        name
        for name, limit in zip(QUANTITIES, plan.budget.limits(), strict=True)
        if limit is not None and name != minimized and taken[name] > 0
    ]
    found = {name: _relaxed(plan, name) for name in given}
    return tuple(
        Margin(name, MORE, minimized, min(1.0, _taken(better)[minimized] / taken[minimized]))
        for name, better in found.items()
        if better is not None
    )


def _relaxed(plan: Plan, more_of: Quantity) -> Plan | None:
    """The best plan that takes more of one budget and no more of the others than this one; None if none is found in time."""
    size_bytes, latency_s, divergence = (
        None if limit is None or name == plan.budget.minimize else _taken(plan)[name] * (MORE if name == more_of else _ROUNDING)
        for name, limit in zip(QUANTITIES, plan.budget.limits(), strict=True)
    )
    budget = Budget(size_bytes, latency_s, divergence, plan.budget.minimize)
    try:
        return choose(plan.menu, budget, replace(plan.correction, spare_bytes=0))
    except InfeasibleError:  # it is not: this plan keeps these limits
        return None


def _taken(plan: Plan) -> dict[Quantity, float]:
    """What a plan is predicted to take."""
    return {"size": plan.size_bytes, "latency": plan.latency_s, "error": plan.divergence}
