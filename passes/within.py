"""Plans that keep their budgets as measured: exact bytes, and the latency of models with noise in place of weights.

Neither needs fitted factors: bytes are known from shapes, and what weights hold hardly matters to latency, unless it is zeros. What single
operators take is measured one at a time, though, and their sum is not what a whole model takes. So the predicted changes of latency get a
common factor, which is moved until a plan that uses most of the budget also keeps it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from intaglio.ops.form import Form
from intaglio.solver import Budget

from .build import mock
from .errors import InfeasibleError
from .job import Job
from .latency import PairedLatency, compare_models
from .model import Model
from .plan import Correction, Menu, Plan, choose
from .price import SizePricer
from .session import Session, open_session

SLACK = 0.97
"""Share of an error or latency budget that a plan may use, so that the verdict keeps it."""

LOOSE = 0.85
"""A plan that uses less of an error budget than this, or a built model that uses less of a latency budget, is worth another round."""

_CLOSE = 0.93
"""A plan that uses less of a latency budget than this is worth another round: rounds without fitting are cheap."""

_ROUNDS = 12
"""Most plans that are solved for."""

_SHARES = (1.0, 0.98, 0.7, 0.5, 0.35, 0.25)
"""Shares of a size budget whose fastest plans are tried where no plan looks fast enough: different ones are made of different operators."""

_NARROW = 1.005
"""Corrections that are nearer to each other than this factor are not told apart."""

_PAIRS = 25
"""Pairs of runs of one comparison of two models."""

_MORE_PAIRS = 100
"""Pairs of runs where a comparison is to hold against a limit that a shorter one broke."""

_PAUSE_S = 2.0
"""Seconds before a late model is measured once more: longer than most of what disturbs a machine for a moment."""


def plan_within(job: Job, menu: Menu, budget: Budget, correction: Correction, sizes: SizePricer, *, joint: bool = False) -> Plan:
    """A plan whose exact bytes keep the size budget and whose measured latency keeps the latency budget with little slack.

    Raises:
        InfeasibleError: no plan keeps them.
    """
    best: Plan | None = None
    bracket = Bracket()
    stopwatch = _Stopwatch(job, float("inf") if budget.latency_s is None else SLACK * budget.latency_s / menu.base.latency_s)
    for _ in range(_ROUNDS):
        try:
            with job.clock.phase("solve"):
                plan = choose_within(menu, budget, correction, joint=joint)
        except InfeasibleError:
            bracket.add(correction.latency, fast=True)
            wanted = bracket.middle
            if best is None:
                best = _fastest_within(job, menu, budget, correction, sizes, stopwatch)
                if best is None:
                    raise
                wanted = _latency_factor(best, stopwatch.ratio(best.forms))
        else:
            excess = 0 if budget.size_bytes is None else sizes.total(plan.forms) - int(budget.size_bytes)
            if excess > 0:
                correction = replace(correction, spare_bytes=int(budget.size_bytes or 0) - (plan.size_bytes - excess - 16))
                continue
            if budget.latency_s is None:
                return plan
            ratio = stopwatch.ratio(plan.forms)
            keeps = ratio <= stopwatch.limit
            if keeps and (best is None or _objective(plan) < _objective(best)):
                best = plan
            bracket.add(plan.correction.latency, fast=keeps)
            wanted = _latency_factor(plan, ratio)
            if wanted < float("inf"):
                wanted = bracket.inside(wanted)
            if _CLOSE / SLACK * stopwatch.limit <= ratio <= stopwatch.limit or (keeps and wanted <= plan.correction.latency):
                break  # little is left of the budget, or another limit binds
        if bracket.closed or wanted == float("inf"):
            break
        correction = replace(correction, latency=wanted)
    if best is None:
        fastest = min((ratio for _, ratio in stopwatch.timed), default=None)
        nearest = "relax --size by a percent" if fastest is None else f"nearest measured: --latency {fastest / SLACK:.2f}"
        raise InfeasibleError(f"no plan that was tried keeps the budgets as measured; {nearest}")
    return best


@dataclass
class Bracket:
    """Factors on predicted savings, around the one whose plan just keeps the latency budget: the larger the factor, the slower the plan.

    Attributes:
        fast: the largest that asked for more than is possible, or led to a plan that keeps the budget.
        slow: the least that led to a plan that does not.
    """

    fast: float = 0.0
    slow: float = float("inf")

    def add(self, factor: float, *, fast: bool) -> None:
        """Note what a factor led to."""
        if fast:
            self.fast = max(self.fast, factor)
        else:
            self.slow = min(self.slow, factor)

    @property
    def closed(self) -> bool:
        """Whether nothing worth trying is left between."""
        return self.slow <= self.fast * _NARROW

    @property
    def middle(self) -> float:
        """Geometric mean of both; infinite as long as nothing was too slow."""
        return math.sqrt(self.fast * self.slow)

    def inside(self, wanted: float) -> float:
        """The wanted factor, or the middle where both sides are known and it lies outside."""
        known = self.fast > 0 and self.slow < float("inf")
        return self.middle if known and not self.fast < wanted < self.slow else wanted


class _Stopwatch:
    """What plans take relative to the original, as models with noise for weights. Nothing is measured again until it suits.

    Attributes:
        limit: that plans have to keep; what comes out above it is measured for longer.
        timed: forms and their ratios.
    """

    def __init__(self, job: Job, limit: float) -> None:
        self._job = job
        self.limit = limit
        self.timed: list[tuple[Mapping[str, Form], float]] = []

    def ratio(self, forms: Mapping[str, Form]) -> float:
        for known, ratio in self.timed:
            if known == forms:
                return ratio
        measured = _ratio(self._job, forms, self.limit)
        self.timed.append((forms, measured))
        return measured


def _fastest_within(
    job: Job,
    menu: Menu,
    budget: Budget,
    correction: Correction,
    sizes: SizePricer,
    stopwatch: _Stopwatch,
) -> Plan | None:
    """A plan for a latency budget that looks out of reach: the first of a few fast ones that keeps it.

    Operators that are measured one at a time pay for what a whole model does only once, so that the sum may be far too high. The fastest
    plan of a smaller size is a plan for a larger one too, and where predictions mislead it may be the faster of the two. How far it is from
    the best is certified by the best of all plans that need not be fast.
    """
    if budget.latency_s is None:
        return None
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
        if stopwatch.ratio(plan.forms) <= stopwatch.limit:
            with job.clock.phase("solve"):
                ideal = choose(menu, replace(budget, latency_s=None), correction, usable=SLACK)
            return _certified(plan, budget, ideal)
    return None


def _certified(plan: Plan, budget: Budget, ideal: Plan) -> Plan:
    """A plan that was found for another objective, as one for a budget whose objective cannot be less than that of an ideal plan."""
    assert plan.solution is not None  # it was solved for
    assert plan.solution.cost is not None
    assert ideal.solution is not None
    size_bytes, latency_s, divergence = plan.solution.cost.values()
    objective = {"size": size_bytes, "latency": latency_s, "error": divergence}[budget.minimize]
    bound = min(ideal.solution.bound, objective)
    gap = (objective - bound) / abs(objective) if objective else 0.0
    solution = replace(plan.solution, status="feasible", objective=objective, bound=bound, gap=gap)
    return replace(plan, budget=budget, solution=solution)


def _objective(plan: Plan) -> float:
    return float("inf") if plan.solution is None else plan.solution.objective


def _latency_factor(plan: Plan, ratio: float) -> float:
    """The factor under which a plan's predicted latency is the measured one; infinite if it is predicted to save nothing."""
    saved = 1 - plan.latency_s / plan.menu.base.latency_s
    return max(0.05, plan.correction.latency * (1 - ratio) / saved) if saved > 0 else float("inf")


def _ratio(job: Job, forms: Mapping[str, Form], limit: float) -> float:
    """Latency relative to the original's of a plan's model, with noise for weights."""
    with job.clock.phase("price"):
        return latency_of(job, mock(job, forms), limit).ratio


def choose_within(menu: Menu, budget: Budget, correction: Correction, *, joint: bool = False) -> Plan:
    """Solve for a budget, a little below its latency and divergence.

    Raises:
        InfeasibleError: no choice meets it; the message names the nearest feasible values.
    """
    return choose(menu, budget, correction, usable=SLACK, joint=joint)


def latency_of(job: Job, model: Model, limit: float | None = None) -> PairedLatency:
    """Latency against the original's; where it comes out above a limit, that of a second, longer measurement."""
    reference, candidate = _sessions(job, model)
    found = compare_models(reference, candidate, job.data.first(1), pairs=_PAIRS)
    if limit is None or found.ratio <= limit:
        return found
    return compare_models(reference, candidate, job.data.first(1), pairs=_MORE_PAIRS, seed=1)


def latency_verdict(job: Job, model: Model, limit: float | None) -> PairedLatency:
    """The same for a model that is given up where it is late: it is then measured once more after a pause, and both measurements count.

    Whoever disturbed the first may be gone by the second. There is no third: a model that is measured until it suits is as late as before.
    """
    found = latency_of(job, model, limit)
    if limit is None or found.ratio <= limit:
        return found
    time.sleep(_PAUSE_S)
    reference, candidate = _sessions(job, model)
    return found + compare_models(reference, candidate, job.data.first(1), pairs=_MORE_PAIRS, seed=2)


def _sessions(job: Job, model: Model) -> tuple[Session, Session]:
    """The original and a model, loaded as latency is promised for."""
    runtime = job.settings.runtime
    reference, candidate = (
        open_session(each.proto, weights=each.weights, threads=runtime.threads, providers=runtime.providers)
        for each in (job.original, model)
    )
    return reference, candidate
