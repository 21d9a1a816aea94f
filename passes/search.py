"""Search: solve, fit, measure, and solve again with what was learnt, until the budgets hold with little slack.

Bytes and latency need no fitted weights, so every plan keeps them to begin with (`within.py`). Divergence does: every plan is built and
compared with the original, and corrects what is predicted of the next one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from intaglio.solver import Budget

from .build import Fitted, finish, fit_forms
from .errors import InfeasibleError
from .interrupts import deferred
from .job import Job
from .model import Model
from .options import Progress
from .plan import Correction, Menu, Plan
from .price import SizePricer
from .tune import TuneResult, untouched
from .tuning import asked_steps, lessons_of, tuned
from .unrounded import UNROUNDED_SHARE, taught_unrounded
from .verify import compare
from .within import LOOSE, SLACK, choose_within, latency_of, plan_within

RESOLVES = 4
"""Most rounds of fit, measure and solve again."""

_LEAST_DRAG = 0.8
"""Built models are taken to be this much faster than the mocks that plans are timed on, at most."""

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
        if best is not None and best.in_time and plan.forms == best.plan.forms:
            break  # fitted already
        fitted = fit_forms(job, plan.forms, keep=asked_steps(job.settings.tune) is not None, progress=progress)
        model = finish(job, plan.forms, fitted)
        measured = divergence_of(job, model)
        expected = _doubted(measured, len(job.splits.choose))
        excess = _excess_latency(job, menu, budget, model)
        attempt = Attempt(job, plan, fitted, model, measured, expected, excess <= 1)
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

    It is not quite what the mock's was: what weights and activations hold matters a little, and machines are noisy.
    """
    if budget.latency_s is None:
        return 0.0
    limit = budget.latency_s / menu.base.latency_s
    with job.clock.phase("verify"):
        return latency_of(job, model, limit).ratio / limit


def taught(job: Job, attempt: Attempt, progress: Progress) -> tuple[Attempt, TuneResult | None]:
    """The attempt, tuned if the settings ask for it and if the written model is better for it on the samples that judge tuning.

    An interrupt keeps what is whole by then: the attempt, what was taught in floats once it is rounded, or the best of tuning.
    """
    if asked_steps(job.settings.tune) is None:
        return attempt, None
    try:
        learnt = taught_unrounded(job, attempt.plan.forms, progress)
        start = attempt if learnt is None or learnt.job is None else _rounded(attempt, learnt.job, progress)
    except KeyboardInterrupt:
        return attempt, untouched(attempt.fitted, interrupted=True)
    kept = start is not attempt
    before = None if learnt is None else replace(learnt.result, improved=kept)
    if before is not None and before.interrupted:
        result = untouched(start.fitted, interrupted=True)
        return start, replace(result, improved=kept, before=attempt.measured, after=start.measured, unrounded=before)
    share = 1 - UNROUNDED_SHARE if kept else 1.0
    result = tuned(start.job, start.plan.forms, start.fitted, share=share, again=kept, progress=progress) or untouched(start.fitted)
    result = replace(result, unrounded=before)
    judged = start, result
    if result.improved:
        try:
            with deferred():  # an interrupt now would lose all that was learnt
                judged = _judged(start, result)
        except KeyboardInterrupt:
            judged = judged[0], replace(judged[1], interrupted=True)
    return judged


def _rounded(attempt: Attempt, job: Job, progress: Progress) -> Attempt:
    """The attempt's forms fitted to a model that was taught in floats, if the written model is better for it; else the attempt."""
    forms = attempt.plan.forms
    fitted = fit_forms(job, forms, keep=True, progress=progress)
    return _better(attempt, replace(attempt, job=job, fitted=fitted, model=finish(job, forms, fitted)))


def _judged(attempt: Attempt, result: TuneResult) -> tuple[Attempt, TuneResult]:
    """The attempt with what was learnt, if the written model is better for it; else as it was."""
    model = finish(attempt.job, attempt.plan.forms, result.fitted)
    better = _better(attempt, replace(attempt, fitted=result.fitted, model=model))
    if better is attempt:
        return attempt, replace(result, improved=False, fitted=attempt.fitted, after=result.before)
    return better, result


def _better(attempt: Attempt, other: Attempt) -> Attempt:
    """Whichever model diverges less on the samples that judge tuning."""
    judges = lessons_of(attempt.job)
    before, after = (divergence_of(judges, each.model) for each in (attempt, other))
    if after >= before:
        return attempt
    measured = divergence_of(attempt.job, other.model)
    return replace(other, measured=measured, expected=_doubted(measured, len(attempt.job.splits.choose)))


def divergence_of(job: Job, model: Model) -> float:
    """On the choose split."""
    with job.clock.phase("verify"):
        return compare(job.original, model, job.data, job.splits.choose, job.calibration, kind=job.settings.kind).divergence


def _doubted(divergence: float, samples: int) -> float:
    """A mean divergence and its standard error, if it spreads as wide as it is large: other samples have to keep a budget too."""
    return float(divergence * (1 + samples**-0.5))


@dataclass(frozen=True, eq=False)
class Attempt:
    """One round: a plan, the model it made, its divergence on the choose split and as expected on others, and whether it is fast enough.

    `job` is the one whose model the plan was fitted to.
    """

    job: Job
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
