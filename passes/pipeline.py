"""The whole path: load → canonicalize → sites → calibrate → propose → price → solve → fit → rewrite → verify.

`analyse` does everything that is expensive and independent of a budget; its menu of priced candidates goes into the plan, so another budget
needs no second look at the model. `search` closes the loop: predictions are compared with what was measured and the problem is solved
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
from .cache import Cache
from .errors import InfeasibleError, InputError, LateError, VerificationError
from .job import Job, Settings
from .latency import PairedLatency
from .load import load
from .loading import Loading, measure_loading
from .model import Model
from .options import Progress, silent
from .plan import Menu, Plan
from .prepare import equalized
from .rounds import Round, approached
from .save import save
from .scores import floored
from .search import FARTHEST_OFF, Attempt, searched, taught
from .task import TaskOutcome
from .tune import TuneResult
from .tuning import check_tuning
from .verify import Comparison, compare
from .within import LOOSE, SLACK, latency_verdict

_TUNINGS = 3
"""Most rounds of choosing and tuning for an error budget: what tuning gains is known only afterwards."""


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
        rounds: those before the last.
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
    rounds: tuple[Round, ...] = ()


def compress_job(job: Job, request: Request, *, progress: Progress = silent) -> Outcome:
    """Solve, fit, check, solve again with corrected predictions, and verify.

    Raises:
        InputError: a setting does not fit the model or its data.
        InfeasibleError: no plan meets the budgets.
        VerificationError: the best plan found does not keep them on held-out data.
    """
    check_tuning(job)
    timed = request.latency is not None or request.minimize == "latency" or asks_for_arithmetic(job.settings)
    if timed:
        job = equalized(floored(job))
    cache = Cache(job.settings.cache)
    job, rounds = approached(job, request, cache, timed=timed, progress=progress)
    menu = analyse(job, cache, latency=timed, progress=progress)
    return replace(solve_and_build(job, menu, request, progress=progress), rounds=rounds)


def asks_for_arithmetic(settings: Settings) -> bool:
    """Whether the user's choice of forms makes little sense in floats, so that every arithmetic takes part without a latency budget too."""
    native = any(readers(STORAGES[name]) is not None for name in settings.storages)
    return native or not settings.expand or any(name != "float" for name in settings.arithmetics)


def solve_and_build(job: Job, menu: Menu, request: Request, *, progress: Progress = silent) -> Outcome:
    """The part of `compress_job` that depends on the budget."""
    budget = resolve(request, job.original.size_bytes, menu.base)
    best, tuning = _taught_within(job, menu, budget, progress)
    try:
        outcome = _verified(job, best, budget)
    except LateError as error:  # a few percent: what was measured while choosing was measured on a machine that others use too
        hurried = replace(budget, latency_s=(budget.latency_s or 0.0) * SLACK / error.excess)
        if tuning is not None and tuning.interrupted:
            job = replace(job, settings=replace(job.settings, tune=None))
        best, tuning = _taught_within(job, menu, hurried, progress)
        outcome = _verified(job, best, budget)
    return replace(outcome, tuning=tuning)


def _taught_within(job: Job, menu: Menu, budget: Budget, progress: Progress) -> tuple[Attempt, TuneResult | None]:
    """The best attempt within a budget, tuned if the settings ask for it; with an error budget what tuning gains buys a smaller model.

    Raises:
        InfeasibleError: no plan meets the budget.
    """
    sizes = job.sizes()
    best: Attempt | None = None
    tuning: TuneResult | None = None
    relief = 1.0  # how many times less an attempt diverges once it is tuned
    for _ in range(_TUNINGS):
        try:
            attempt = searched(job, menu, _relieved(budget, relief), sizes, progress)
        except InfeasibleError:
            if best is None:
                raise
            break  # latency is measured anew in every round
        better, result = taught(job, attempt, progress)
        if best is None or better.better_than(best, budget):
            best, tuning = better, result
        gain = min(attempt.measured / better.measured, FARTHEST_OFF) if 0 < better.measured < float("inf") else 1.0
        settled = abs(gain / relief - 1) < 1 - LOOSE
        if result is None or result.interrupted or budget.divergence is None or budget.minimize == "error" or settled:
            break
        relief = gain
    assert best is not None  # the first round ends in an attempt or in an InfeasibleError
    return best, tuning


def _verified(job: Job, best: Attempt, budget: Budget) -> Outcome:
    plan = replace(best.plan, budget=budget)
    return verified(job, plan, budget, best.model, best.measured, job.sizes().total(plan.forms), timed=job.times(budget))


def _relieved(budget: Budget, relief: float) -> Budget:
    """The budget with the error that a model may have before it is tuned."""
    return budget if budget.divergence is None else replace(budget, divergence=budget.divergence * relief)


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
        LateError: the latency budget is broken, and no other.
        VerificationError: a budget is broken.
    """
    with tempfile.TemporaryDirectory() as folder, job.clock.phase("verify"):
        path = Path(folder) / job.settings.output_name
        size = save(model, path, source=job.original.path, external=job.external or None)
        written = load(path)
        metric = job.settings.metric if job.settings.labels else None
        comparison = compare(job.original, written, job.data, job.splits.verify, job.calibration, kind=job.settings.kind, metric=metric)
        limit = None if budget.latency_s is None else budget.latency_s / plan.menu.base.latency_s
        latency = latency_verdict(job, written, limit) if timed else None
        loading = _loading(job, path, Path(folder)) if timed else None
    broken = []
    if budget.size_bytes is not None and size > budget.size_bytes:
        broken.append(f"size {size} B is over the budget of {budget.size_bytes:.0f} B")
    if budget.divergence is not None and comparison.divergence > budget.divergence and not job.data.synthetic:
        broken.append(
            f"divergence {comparison.divergence:.4g} is over the budget of {budget.divergence:.4g}; "
            f"nearest: --error {comparison.divergence:.3g}"
        )
    late = 0.0 if limit is None or latency is None else latency.ratio / limit
    if limit is not None and latency is not None and late > 1:
        twice = " and ".join(f"{ratio:.3f}" for ratio in latency.ratios)
        broken.append(
            f"latency ratio {latency.ratio:.3f} (measured: {twice}) is over the budget of {limit:.3f}; "
            f"nearest: --latency {latency.ratio * 1.03:.2f}"
        )
    if broken and enforce:
        message = "verification failed on held-out data: " + "; ".join(broken) + "; nothing was written"
        if late > 1 and len(broken) == 1:
            raise LateError(message, late)
        raise VerificationError(message)
    return Outcome(job, plan, model, size, predicted, measured, comparison, latency, loading, not broken)
