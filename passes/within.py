"""Plans that keep their budgets as measured: exact bytes, and the latency of models with noise in place of weights.

Neither needs fitted factors: bytes are known from shapes, and latency does not depend on the values of weights. What single operators take
is measured one at a time, though, and their sum is not what a whole model takes. So the predicted changes of latency get a common factor,
which is moved until a plan that uses most of the budget also keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from intaglio.ops.form import Form
from intaglio.solver import Budget

from .build import mock
from .errors import InfeasibleError
from .job import Job
from .latency import PairedLatency, compare_models
from .model import Model
from .plan import Correction, Menu, Plan, choose
from .price import SizePricer
from .session import open_session

SLACK = 0.97
"""Share of an error or latency budget that a plan may use, so that the verdict keeps it."""

LOOSE = 0.85
"""A plan that uses less of an error budget than this, or a built model that uses less of a latency budget, is worth another round."""

_CLOSE = 0.93
"""A plan that uses less of a latency budget than this is worth another round: rounds without fitting are cheap."""

_ROUNDS = 12
"""Most plans that are solved for."""

_SHARES = (0.98, 0.7, 0.5, 0.35, 0.25)
"""Shares of a size budget whose fastest plans are tried where no plan looks fast enough: different ones are made of different operators."""

_NARROW = 1.005
"""Corrections that are nearer to each other than this factor are not told apart."""

_PAIRS = 25
"""Pairs of runs of one comparison of two models."""


def plan_within(job: Job, menu: Menu, budget: Budget, correction: Correction, sizes: SizePricer, *, joint: bool = False) -> Plan:
    """A plan whose exact bytes keep the size budget and whose measured latency keeps the latency budget with little slack.

    Raises:
        InfeasibleError: no plan keeps them.
    """
    best: Plan | None = None
    fast, slow = 0.0, float("inf")  # corrections under which plans kept the latency budget (or none seemed to), and did not
    fastest = float("inf")
    for _ in range(_ROUNDS):
        rung: float | None = None
        try:
            with job.clock.phase("solve"):
                plan = choose_within(menu, budget, correction, joint=joint)
        except InfeasibleError:
            if best is not None:
                fast = max(fast, correction.latency)  # pessimistic: under it even what keeps the budget looks too slow
                if slow <= fast * _NARROW or slow == float("inf"):
                    break
                correction = replace(correction, latency=(fast * slow) ** 0.5)
                continue
            found = _fastest_within(job, menu, budget, correction, sizes)
            if found is None:
                raise
            plan, rung = found
        excess = 0 if budget.size_bytes is None else sizes.total(plan.forms) - int(budget.size_bytes)
        if excess > 0:
            correction = replace(correction, spare_bytes=int(budget.size_bytes or 0) - (plan.size_bytes - excess - 16))
            continue
        if budget.latency_s is None:
            return plan
        limit = budget.latency_s / menu.base.latency_s
        ratio = _ratio(job, plan.forms, limit) if rung is None else rung
        fastest = min(fastest, ratio)
        predicted = plan.latency_s / menu.base.latency_s
        keeps, own = ratio <= limit * SLACK, plan.correction.latency
        if keeps and (best is None or plan.divergence < best.divergence):
            best = plan
        if (rung is None and limit * _CLOSE <= ratio <= limit * SLACK) or predicted >= 1:
            break
        fast, slow = (max(fast, own), slow) if keeps else (fast, min(slow, own))
        wanted = max(0.05, own * (1 - ratio) / (1 - predicted))
        if not fast < wanted < slow and fast > 0 and slow < float("inf"):
            wanted = (fast * slow) ** 0.5
        correction = replace(correction, latency=wanted)
    if best is None:
        nearest = f"nearest measured: --latency {fastest / SLACK:.2f}" if fastest < float("inf") else "relax --size by a percent"
        raise InfeasibleError(f"no plan keeps the budgets as measured in {_ROUNDS} rounds; {nearest}")
    return best


def _fastest_within(job: Job, menu: Menu, budget: Budget, correction: Correction, sizes: SizePricer) -> tuple[Plan, float] | None:
    """A plan for a latency budget that looks out of reach, and its ratio to the original: the first of a few fast ones that keeps it.

    Operators that are measured one at a time pay for what a whole model does only once, so that the sum may be far too high. The fastest
    plan of a smaller size is a plan for a larger one too, and where predictions mislead it may be the faster of the two.
    """
    if budget.latency_s is None:
        return None
    limit = budget.latency_s / menu.base.latency_s
    size_bytes = min(budget.size_bytes or menu.base.size_bytes, menu.base.size_bytes)
    seen: list[Mapping[str, Form]] = []
    for share in _SHARES:
        try:
            with job.clock.phase("solve"):
                plan = choose(menu, replace(budget.relaxed("latency"), size_bytes=size_bytes * share), correction, usable=SLACK)
        except InfeasibleError:
            return None
        if plan.forms in seen or sizes.total(plan.forms) > size_bytes:
            continue
        seen.append(plan.forms)
        ratio = _ratio(job, plan.forms, limit)
        if ratio <= limit * SLACK:
            return replace(plan, budget=budget), ratio
    return None


def _ratio(job: Job, forms: Mapping[str, Form], limit: float) -> float:
    """Latency relative to the original's of a plan's model, with noise for weights."""
    with job.clock.phase("price"):
        return latency_of(job, mock(job, forms), limit * SLACK).ratio


def choose_within(menu: Menu, budget: Budget, correction: Correction, *, joint: bool = False) -> Plan:
    """Solve for a budget, a little below its latency and divergence.

    Raises:
        InfeasibleError: no choice meets it; the message names the nearest feasible values.
    """
    return choose(menu, budget, correction, usable=SLACK, joint=joint)


def latency_of(job: Job, model: Model, limit: float | None = None) -> PairedLatency:
    """Latency against the original's; where it comes out above a limit, that of a second, longer measurement."""
    runtime = job.settings.runtime
    sessions = [
        open_session(each.proto, weights=each.weights, threads=runtime.threads, providers=runtime.providers)
        for each in (job.original, model)
    ]
    found = compare_models(sessions[0], sessions[1], job.data.first(1), pairs=_PAIRS)
    if limit is None or found.ratio <= limit:
        return found
    return compare_models(sessions[0], sessions[1], job.data.first(1), pairs=4 * _PAIRS, seed=1)
