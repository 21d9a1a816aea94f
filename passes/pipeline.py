"""The whole path: load → canonicalize → sites → calibrate → propose → price → solve → fit → rewrite → verify.

`analyse` does everything that is expensive and independent of a budget; its menu of priced candidates goes into the plan, so another budget
needs no second look at the model. This module closes the loop: predictions are compared with what was measured and the problem is solved
again, until the budgets hold with little slack. The verdict falls on the serialized model and on samples that took no part in any choice.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import SubprocessError

from intaglio.ops.storage import STORAGES, readers
from intaglio.solver import Budget

from .analyse import analyse
from .budget import Request, resolve
from .build import Fitted, finish, fit_forms, mock
from .cache import Cache
from .errors import InfeasibleError, InputError, VerificationError
from .job import Job, Settings
from .latency import PairedLatency, compare_models
from .load import load
from .loading import Loading, measure_loading
from .model import Model
from .options import Progress, silent
from .plan import Correction, Menu, Plan, choose
from .prepare import equalized
from .price import SizePricer
from .save import save
from .session import open_session
from .task import TaskOutcome
from .tune import TuneResult
from .tuning import asked_steps, tuned
from .verify import Comparison, compare

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

_TUNINGS = 3
"""Most rounds of choosing and tuning for an error budget: what tuning gains is known only afterwards."""

_PAIRS = 25
"""Pairs of runs of one comparison of two models."""

FARTHEST_OFF = 1e6
"""Most that a prediction is corrected by in a round; outputs that are not finite are infinitely far off."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """A compressed model with what was predicted and what was measured.

    Attributes:
        job: what was asked.
        plan: what was chosen.
        model: the result.
        size_bytes: of the serialized result.
        predicted_bytes: before anything was fitted.
        choose_divergence: on the choose split.
        comparison: on the verify split.
        latency: end to end, against the original; None where the model is too large to hold twice.
        loading: what it takes to load the original and the result; None where latency is.
        meets: whether every budget holds.
        task: what labels say, where a preset asked for it.
        tuning: what tuning reached, where it was asked for.
    """

    job: Job
    plan: Plan
    model: Model
    size_bytes: int
    predicted_bytes: int
    choose_divergence: float
    comparison: Comparison
    latency: PairedLatency | None
    loading: tuple[Loading, Loading] | None
    meets: bool
    task: TaskOutcome | None = None
    tuning: TuneResult | None = None


def compress_job(job: Job, request: Request, *, progress: Progress = silent) -> Outcome:
    """Solve, fit, check, solve again with corrected predictions, and verify.

    Raises:
        InfeasibleError: no plan meets the budgets.
        VerificationError: the best plan found does not keep them on held-out data.
    """
    timed = request.latency is not None or request.minimize == "latency" or asks_for_arithmetic(job.settings)
    if timed:
        job = equalized(job)
    menu = analyse(job, Cache(job.settings.cache), latency=timed, progress=progress)
    return solve_and_build(job, menu, request, progress=progress)


def asks_for_arithmetic(settings: Settings) -> bool:
    """Whether the user's choice of forms makes little sense in floats, so that every arithmetic takes part without a latency budget too."""
    native = any(readers(STORAGES[name]) is not None for name in settings.storages)
    return native or not settings.expand or any(name != "float" for name in settings.arithmetics)


def solve_and_build(job: Job, menu: Menu, request: Request, *, progress: Progress = silent) -> Outcome:
    """The part of `compress_job` that depends on the budget."""
    budget = resolve(request, job.original.size_bytes, menu.base)
    sizes = job.sizes()
    best: _Attempt | None = None
    tuning: TuneResult | None = None
    relief = 1.0  # how many times less an attempt diverges once it is tuned
    for _ in range(_TUNINGS):
        try:
            attempt = _searched(job, menu, _relieved(budget, relief), sizes, progress)
        except InfeasibleError:
            if best is None:
                raise
            break  # latency is measured anew in every round
        better, result = _taught(job, attempt, progress)
        if best is None or better.better_than(best, budget):
            best, tuning = better, result
        gain = min(attempt.measured / better.measured, FARTHEST_OFF) if 0 < better.measured < float("inf") else 1.0
        settled = abs(gain / relief - 1) < 1 - LOOSE
        if result is None or result.interrupted or budget.divergence is None or budget.minimize == "error" or settled:
            break
        relief = gain
    assert best is not None  # the first round ends in an attempt or in an InfeasibleError
    plan = replace(best.plan, budget=budget)
    outcome = verified(job, plan, budget, best.model, best.measured, sizes.total(plan.forms), timed=job.times(budget))
    return replace(outcome, tuning=tuning)


def _searched(job: Job, menu: Menu, budget: Budget, sizes: SizePricer, progress: Progress) -> _Attempt:
    """The best of a few rounds of solving, fitting and measuring.

    Raises:
        InfeasibleError: no plan meets the budget.
    """
    correction = Correction()
    best: _Attempt | None = None
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
        measured = _divergence(job, model)
        expected = _doubted(measured, len(job.splits.choose))
        excess = _excess_latency(job, menu, budget, model)
        attempt = _Attempt(plan, fitted, model, measured, expected, excess <= 1)
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


def _relieved(budget: Budget, relief: float) -> Budget:
    """The budget with the error that a model may have before it is tuned."""
    return budget if budget.divergence is None else replace(budget, divergence=budget.divergence * relief)


def _taught(job: Job, attempt: _Attempt, progress: Progress) -> tuple[_Attempt, TuneResult | None]:
    """The attempt, tuned if the settings ask for it and if the written model is better for it on the choose split."""
    result = tuned(job, attempt.plan.forms, attempt.fitted, progress=progress)
    if result is None or not result.improved:
        return attempt, result
    model = finish(job, attempt.plan.forms, result.fitted)
    measured = _divergence(job, model)
    if measured >= attempt.measured:
        return attempt, replace(result, improved=False, fitted=attempt.fitted, after=result.before)
    expected = _doubted(measured, len(job.splits.choose))
    return replace(attempt, fitted=result.fitted, model=model, measured=measured, expected=expected), result


def _divergence(job: Job, model: Model) -> float:
    """On the choose split."""
    with job.clock.phase("verify"):
        return compare(job.original, model, job.data, job.splits.choose, job.calibration, kind=job.settings.kind).divergence


def _doubted(divergence: float, samples: int) -> float:
    """A mean divergence and half its standard error, if it spreads as wide as it is large: other samples have to keep a budget too."""
    return float(divergence * (1 + 0.5 * samples**-0.5))


@dataclass(frozen=True, eq=False)
class _Attempt:
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

    def better_than(self, other: _Attempt, budget: Budget) -> bool:
        """Keeping the budgets comes first, then the objective."""
        if self.keeps(budget) != other.keeps(budget):
            return self.keeps(budget)
        if not self.keeps(budget) or budget.minimize == "error":
            return self.measured < other.measured
        ours, theirs = self.plan.solution, other.plan.solution
        return ours is not None and theirs is not None and ours.objective < theirs.objective


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
        return _latency(job, model, limit).ratio / limit


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
            ratio = _latency(job, mock(job, plan.forms), limit * SLACK).ratio
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
    ratio = _latency(job, mock(job, fastest.forms)).ratio
    return replace(correction, latency=correction.latency * (1 - ratio) / (1 - predicted)) if predicted < 1 and ratio < 1 else None


def choose_within(menu: Menu, budget: Budget, correction: Correction, *, joint: bool = False) -> Plan:
    """Solve for a budget, a little below its latency and divergence.

    Raises:
        InfeasibleError: no choice meets it; the message names the nearest feasible values.
    """
    return choose(menu, budget, correction, usable=SLACK, joint=joint)


def _latency(job: Job, model: Model, limit: float | None = None) -> PairedLatency:
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


def _loading(job: Job, path: Path, folder: Path) -> tuple[Loading, Loading] | None:
    """Of the original and of a file; an original in memory is written into a folder first. None where no process can be started for it."""
    reference = job.original.path
    if reference is None:
        reference = folder / "original.onnx"
        save(job.original, reference, source=None)
    runtime = job.settings.runtime
    try:
        first, second = (measure_loading(each, threads=runtime.threads, providers=runtime.providers) for each in (reference, path))
    except (OSError, SubprocessError, InputError):
        return None  # a fact for the report, not a promise
    return first, second


def verified(
    job: Job, plan: Plan, budget: Budget, model: Model, measured: float, predicted: int, *, timed: bool, enforce: bool = True
) -> Outcome:
    """Serialize, load again, and measure everything on the verify split.

    Args:
        job: where the model came from.
        plan: what was chosen.
        budget: what the plan may use at most.
        model: the result.
        measured: its divergence on the choose split.
        predicted: its bytes, as predicted.
        timed: whether to measure its latency.
        enforce: whether a broken budget is an error; otherwise the outcome says so.

    Raises:
        VerificationError: a budget is broken.
    """
    with tempfile.TemporaryDirectory() as folder, job.clock.phase("verify"):
        path = Path(folder) / job.settings.output_name
        size = save(model, path, source=job.original.path, external=job.external or None)
        written = load(path)
        metric = job.settings.metric if job.settings.labels else None
        comparison = compare(job.original, written, job.data, job.splits.verify, job.calibration, kind=job.settings.kind, metric=metric)
        limit = None if budget.latency_s is None else budget.latency_s / plan.menu.base.latency_s
        latency = _latency(job, written, limit) if timed else None
        loading = _loading(job, path, Path(folder)) if timed else None
    broken = []
    if budget.size_bytes is not None and size > budget.size_bytes:
        broken.append(f"size {size} B is over the budget of {budget.size_bytes:.0f} B")
    if budget.divergence is not None and comparison.divergence > budget.divergence and not job.data.synthetic:
        broken.append(
            f"divergence {comparison.divergence:.4g} is over the budget of {budget.divergence:.4g}; "
            f"nearest: --error {comparison.divergence:.3g}"
        )
    if limit is not None and latency is not None and latency.ratio > limit:
        broken.append(f"latency ratio {latency.ratio:.3f} is over the budget of {limit:.3f}; nearest: --latency {latency.ratio * 1.03:.2f}")
    if broken and enforce:
        raise VerificationError("verification failed on held-out data: " + "; ".join(broken) + "; nothing was written")
    return Outcome(job, plan, model, size, predicted, measured, comparison, latency, loading, not broken)
