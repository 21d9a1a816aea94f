"""Search: solve, fit, measure, and solve again with what was learnt, until the budgets hold with little slack.

Bytes and latency need no fitted weights: `plan_within` closes in on them by exact sizes and by models with noise in place of weights.
Divergence does: `searched` builds every plan, compares it with the original, and corrects what is predicted of the next one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from intaglio.solver import Budget

from .build import Fitted, finish, fit_forms, mock
from .errors import InfeasibleError
from .interrupts import deferred
from .job import Job
from .latency import PairedLatency, compare_models
from .model import Model
from .options import Progress
from .plan import Correction, Menu, Plan, choose
from .price import SizePricer
from .session import open_session
from .tune import TuneResult
from .tuning import asked_steps, lessons_of, tuned
from .verify import compare

RESOLVES = 4
"""Most rounds of fit, measure and solve again."""

SLACK = 0.97
"""Share of an error or latency budget that a plan may use, so that the verdict keeps it."""

LOOSE = 0.85
"""A plan that uses less of an error budget than this, or a built model that uses less of a latency budget, is worth another round."""

_CLOSE = 0.93
"""A plan that uses less of a latency budget than this is worth another round: rounds without fitting are cheap."""

_LEAST_DRAG = 0.8
"""Built models are taken to be this much faster than the mocks that plans are timed on, at most."""

_PAIRS = 25
"""Pairs of runs of one comparison of two models."""

FARTHEST_OFF = 1e6
"""Most that a prediction is corrected by in a round; outputs that are not finite are infinitely far off."""


def searched(job: Job, menu: Menu, budget: Budget, sizes: SizePricer, progress: Progress) -> Attempt:
    """The best of a few rounds of solving, fitting and measuring.

    Raises:
        InfeasibleError: no plan meets the budget.
    """
    correction = Correction()
    best: Attempt | None = None
    drag = 1.0  # how much slower built models are than the mocks that plans are timed on
    for _ in range(RESOLVES):
        try:
            plan = replace(plan_within(job, menu, _hurried(budget, drag), correction, sizes), budget=budget)
        except InfeasibleError:
            if best is None or not best.keeps(budget):
                raise
            break
        fitted = fit_forms(job, plan.forms, keep=asked_steps(job.settings.tune) is not None, progress=progress)
        model = finish(job, plan.forms, fitted)
        measured = divergence_of(job, model)
        expected = _doubted(measured, len(job.splits.choose))
        excess = _excess_latency(job, menu, budget, model)
        attempt = Attempt(plan, fitted, model, measured, expected, excess <= 1)
        if best is None or attempt.better_than(best, budget):
            best = attempt
        if excess > 1:
            drag *= max(1.02, excess / SLACK)
            continue
        if 0 < excess < LOOSE and budget.minimize == "error" and drag > _LEAST_DRAG:
            drag = max(_LEAST_DRAG, drag * excess / SLACK)
            continue
        seen = measured if budget.divergence is None else expected
        off = min(seen / plan.divergence, FARTHEST_OFF) if plan.divergence > 0 else 1.0
        correction = replace(plan.correction, divergence=plan.correction.divergence * off)
        if budget.divergence is None or budget.divergence * LOOSE <= expected <= budget.divergence * SLACK:
            break
        if expected <= budget.divergence * SLACK and (
            budget.minimize == "error" or choose_within(menu, budget, correction).forms == plan.forms
        ):
            break
    assert best is not None  # the first round ends in an attempt or in an InfeasibleError
    return best


def _hurried(budget: Budget, drag: float) -> Budget:
    """The budget with less time."""
    return budget if budget.latency_s is None else replace(budget, latency_s=budget.latency_s / drag)


def _excess_latency(job: Job, menu: Menu, budget: Budget, model: Model) -> float:
    """Latency of a built model relative to the budget; 0 without one.

    The same operators run a little slower on weights that were expanded at load than on a mock's.
    """
    if budget.latency_s is None:
        return 0.0
    limit = budget.latency_s / menu.base.latency_s
    with job.clock.phase("verify"):
        return latency_of(job, model, limit).ratio / limit


def taught(job: Job, attempt: Attempt, progress: Progress) -> tuple[Attempt, TuneResult | None]:
    """The attempt, tuned if the settings ask for it and if the written model is better for it on the samples that judge tuning."""
    result = tuned(job, attempt.plan.forms, attempt.fitted, progress=progress)
    if result is None or not result.improved:
        return attempt, result
    judged = attempt, result
    try:
        with deferred():  # an interrupt now would lose all that was learnt
            judged = _judged(job, attempt, result)
    except KeyboardInterrupt:
        judged = judged[0], replace(judged[1], interrupted=True)
    return judged


def _judged(job: Job, attempt: Attempt, result: TuneResult) -> tuple[Attempt, TuneResult]:
    """The attempt with what was learnt, if the written model is better for it; else as it was."""
    judges = lessons_of(job)
    model = finish(job, attempt.plan.forms, result.fitted)
    before, after = (divergence_of(judges, each) for each in (attempt.model, model))
    if after >= before:
        return attempt, replace(result, improved=False, fitted=attempt.fitted, after=result.before)
    measured = divergence_of(job, model)
    expected = _doubted(measured, len(job.splits.choose))
    return replace(attempt, fitted=result.fitted, model=model, measured=measured, expected=expected), result


def divergence_of(job: Job, model: Model) -> float:
    """On the choose split."""
    with job.clock.phase("verify"):
        return compare(job.original, model, job.data, job.splits.choose, job.calibration, kind=job.settings.kind).divergence


def _doubted(divergence: float, samples: int) -> float:
    """A mean divergence and its standard error, if it spreads as wide as it is large: other samples have to keep a budget too."""
    return float(divergence * (1 + samples**-0.5))


@dataclass(frozen=True, eq=False)
class Attempt:
    """One round: a plan, the model it made, its divergence on the choose split and as expected on others, and whether it is fast enough."""

    plan: Plan
    fitted: Fitted
    model: Model
    measured: float
    expected: float
    in_time: bool

    def keeps(self, budget: Budget) -> bool:
        """Whether the latency budget holds, and the error budget on the choose split, with slack."""
        return self.in_time and (budget.divergence is None or self.expected <= budget.divergence * SLACK)

    def better_than(self, other: Attempt, budget: Budget) -> bool:
        """Keeping the budgets comes first, then the objective."""
        if self.keeps(budget) != other.keeps(budget):
            return self.keeps(budget)
        if not self.keeps(budget) or budget.minimize == "error":
            return self.measured < other.measured
        ours, theirs = self.plan.solution, other.plan.solution
        return ours is not None and theirs is not None and ours.objective < theirs.objective


def plan_within(job: Job, menu: Menu, budget: Budget, correction: Correction, sizes: SizePricer, *, joint: bool = False) -> Plan:
    """A plan whose exact bytes keep the size budget and whose measured latency keeps the latency budget with little slack.

    Neither needs fitted factors: bytes are known from shapes, and latency does not depend on the values of weights.

    Raises:
        InfeasibleError: no plan keeps them.
    """
    best: Plan | None = None
    fast, slow = 0.0, float("inf")  # corrections under which plans kept the latency budget, and did not
    fastest = float("inf")
    tried_fastest = False
    for _ in range(3 * RESOLVES):
        with job.clock.phase("solve"):
            try:
                plan = choose_within(menu, budget, correction, joint=joint)
            except InfeasibleError:
                if best is not None:
                    break
                hopeful = None if tried_fastest else _hopeful(job, menu, budget, correction)
                if hopeful is None or not correction.latency < hopeful.latency < slow:
                    raise
                correction, tried_fastest = hopeful, True
                continue
            excess = 0 if budget.size_bytes is None else sizes.total(plan.forms) - int(budget.size_bytes)
        if excess > 0:
            correction = replace(correction, spare_bytes=int(budget.size_bytes or 0) - (plan.size_bytes - excess - 16))
            continue
        if budget.latency_s is None:
            return plan
        limit = budget.latency_s / menu.base.latency_s
        with job.clock.phase("price"):
            ratio = latency_of(job, mock(job, plan.forms), limit * SLACK).ratio
        fastest = min(fastest, ratio)
        predicted = plan.latency_s / menu.base.latency_s
        keeps, own = ratio <= limit * SLACK, plan.correction.latency
        if keeps and (best is None or plan.divergence < best.divergence):
            best = plan
        if limit * _CLOSE <= ratio <= limit * SLACK or predicted >= 1:
            break
        fast, slow = (max(fast, own), slow) if keeps else (fast, min(slow, own))
        wanted = max(0.05, own * (1 - ratio) / (1 - predicted))
        if not fast < wanted < slow and fast > 0 and slow < float("inf"):
            wanted = (fast * slow) ** 0.5
        correction = replace(correction, latency=wanted)
    if best is None:
        nearest = f"nearest measured: --latency {fastest / SLACK:.2f}" if fastest < float("inf") else "relax --size by a percent"
        raise InfeasibleError(f"no plan keeps the budgets as measured in {3 * RESOLVES} rounds; {nearest}")
    return best


def _hopeful(job: Job, menu: Menu, budget: Budget, correction: Correction) -> Correction | None:
    """A correction for a latency budget that looks out of reach: what the fastest plan saves when it is measured as a whole.

    None where there is no latency budget, the other budgets cannot be kept either, or nothing can be saved.

    Operators that are measured one at a time pay for what a whole model does only once.
    """
    if budget.latency_s is None:
        return None
    try:
        fastest = choose(menu, budget.relaxed("latency"), correction)
    except InfeasibleError:
        return None
    predicted = fastest.latency_s / menu.base.latency_s
    ratio = latency_of(job, mock(job, fastest.forms)).ratio
    return replace(correction, latency=correction.latency * (1 - ratio) / (1 - predicted)) if predicted < 1 and ratio < 1 else None


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
