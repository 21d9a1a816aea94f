"""Presets: choose by the labelled loss. `lossless` is the best model of a size, `compact` the smallest one that keeps the metric.

Both are the two algorithms of joint low-rank factorization (arXiv 2412.06867; with storages as well, arXiv 2412.06868): the change of the
loss is taken as a linear term plus the divergence, ⟨g, Δ⟩ + ½ Δᵀ H Δ summed over weights, and minimised over forms.

- *lossless*: begin with the plan of least divergence. Then, in rounds, take gradients (first at the original's weights, then at those of
  the last plan that was kept), solve again, build, and keep the step only if the loss on the choose split does not rise.
- *compact*: bisect the size. A size passes if the metric on the choose split, less two standard errors, falls by no more than it may;
  where it may not fall at all, the loss must not rise noticeably either.

The linear terms come from the fit split, every decision from the choose split, the verdict from the verify split. With `samples` set, the
samples that are left over are no use to statistics but are to judgement: they are dealt to choose and verify.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from intaglio.ops.form import PRUNED, UNCHANGED
from intaglio.ops.moment import Moment
from intaglio.solver import Budget

from .analyse import Linear, analyse, measured_sites
from .budget import Request, resolve
from .build import Fitted, finish, fit_forms
from .cache import Cache
from .curvature import output_metrics
from .decoded import decoded_model, decoded_weight
from .errors import InfeasibleError, InputError, VerificationError
from .gradients import Gradients, measure_gradients
from .job import Job
from .linear import JointFinding, joint_finding
from .model import Model
from .options import Progress, silent
from .parallel import in_parallel, workers
from .pipeline import Outcome, compress_job, verified
from .plan import Correction, Menu, Plan
from .price import SizePricer
from .recall import Finding
from .search import FARTHEST_OFF
from .sites import Site
from .task import Standing, Step, TaskOutcome, check_task, gain, loss_change, stand, unit_loss
from .verify import compare
from .within import plan_within

PRESETS = ("lossless", "compact")

ROUNDS = 3
"""Most plans that `lossless` makes from gradients, each at the weights that the last one left."""

BISECTIONS = 6
"""Sizes that `compact` tries: enough to find the smallest to within a few percent."""

DOUBT = 2.0
"""Standard errors by which the metric on the choose split has to keep its limit, so that other samples keep it too.

Bisection ends where the limit is just kept, so with one standard error every few verdicts fail.
"""

SIGNIFICANT = 2.0
"""Standard errors by which a loss has to rise to count as risen."""

NOTICEABLE = 0.01
"""Share of the original's loss by which it has to rise as well: paired samples make out rises that matter to nobody."""

_FINEST = 0.02
"""Relative step of sizes below which nothing is tried any more."""


@dataclass(frozen=True)
class Goal:
    """What a preset is asked for.

    Attributes:
        preset: "lossless" or "compact".
        size: of "lossless", as in `Request`.
        drop: of "compact", points of the metric, at least 0.
    """

    preset: str
    size: float | str | None
    drop: float


def goal_of(request: Request) -> Goal | None:
    """The preset that a request asks for; None where it asks for none.

    Raises:
        InputError: the preset is unknown, or does not go with the other budgets.
    """
    if request.preset is None and request.drop is None:
        return None
    preset = request.preset or "compact"
    if preset not in PRESETS:
        raise InputError(f"--preset {preset}: unknown; expected {' or '.join(PRESETS)}")
    if request.latency is not None or request.error is not None or request.minimize is not None:
        raise InputError(f"--preset {preset}: it does not go with --latency, --error or --minimize; leave them out")
    if preset == "lossless":
        if request.drop is not None:
            raise InputError("--drop: it belongs to --preset compact; give --size to --preset lossless")
        if request.size is None:
            raise InputError("--preset lossless: it needs a size; give for example --size 0.3")
        return Goal(preset, request.size, 0.0)
    if request.size is not None:
        raise InputError(f"--preset {preset}: it finds the size itself; leave --size out, or use --preset lossless")
    return Goal(preset, None, _points(request.drop))


def _points(drop: float | str | None) -> float:
    """A number of points, 0 if it is not given."""
    try:
        points = 0.0 if drop is None else float(drop)
    except ValueError:
        points = -1.0
    if not 0 <= points < math.inf:
        raise InputError(f"--drop {drop}: expected points of the metric, a number from 0; for example --drop 0.5")
    return points


def compress(job: Job, request: Request, *, progress: Progress = silent) -> Outcome:
    """Compress a job by a preset, or within budgets where none is asked for.

    Raises:
        InputError: labels are missing or do not fit the loss.
        InfeasibleError: no plan meets the budgets, or no smaller model keeps the metric.
        VerificationError: the result does not keep its promise on held-out data.
    """
    goal = goal_of(request)
    if goal is None:
        return compress_job(job, request, progress=progress)
    check_task(job)
    search = Search.begin(job_with_more_judges(job), progress)
    return search.lossless(goal) if goal.preset == "lossless" else search.compact(goal)


def job_with_more_judges(job: Job) -> Job:
    """The job with the samples that `samples` leaves over dealt to its choose and verify splits, in turn."""
    used = np.concatenate([job.splits.fit, job.splits.choose, job.splits.verify])
    rest = np.random.default_rng(job.settings.seed).permutation(np.setdiff1d(np.arange(len(job.data)), used))
    choose, verify = (np.sort(np.concatenate(parts)) for parts in ((job.splits.choose, rest[::2]), (job.splits.verify, rest[1::2])))
    return replace(job, splits=replace(job.splits, choose=choose, verify=verify))


@dataclass(frozen=True, eq=False)
class Attempt:
    """A plan that was built and measured on the choose split.

    Attributes:
        job: with the slopes that it was fitted by.
        plan: the plan.
        fitted: its arrays.
        model: the result.
        divergence: measured.
        standing: measured.
        labels: the linear terms that it was chosen by.
        gradients: where they were taken, as in `Step`.
    """

    job: Job
    plan: Plan
    fitted: Fitted
    model: Model
    divergence: float
    standing: Standing
    labels: Labels
    gradients: str


@dataclass(frozen=True, eq=False)
class Labels:
    """What labels say at some weights: the menu with linear terms, and the slopes to fit by.

    Attributes:
        menu: with linear terms in the unit of the divergence.
        slopes: by site name.
        agreement: by site name.
        declined: by site name.
    """

    menu: Menu
    slopes: Mapping[str, NDArray[np.float32]]
    agreement: Mapping[str, float]
    declined: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Search:
    """What both presets need.

    Attributes:
        job: the job.
        cache: of the analysis.
        sizes: prices of plans in bytes.
        unit: what a unit of divergence adds to the loss.
        original: how the original does on the choose split.
        progress: shows how far it is.
    """

    job: Job
    cache: Cache
    sizes: SizePricer
    unit: float
    original: Standing
    progress: Progress

    @staticmethod
    def begin(job: Job, progress: Progress) -> Search:
        """Measure the original."""
        with job.clock.phase("verify"):
            original = stand(job, job.original, job.splits.choose)
            unit = unit_loss(job, job.splits.choose)
        return Search(job, Cache(job.settings.cache), job.sizes(), unit, original, progress)

    # --- the two presets

    def lossless(self, goal: Goal) -> Outcome:
        """The best model of a size."""
        plain = self.labels(None)
        budget = resolve(Request(size=goal.size), self.job.original.size_bytes, plain.menu.base)
        best = self.attempt(plain, budget, Correction(), "none")
        steps = [self.step(best, kept=True)]
        for number in range(ROUNDS):
            fitted = None if number == 0 else best
            labels = self.labels(self.gradients(fitted), fitted)
            found = self.attempt(labels, budget, corrected(best), "original" if number == 0 else "previous")
            kept = found.standing.loss <= best.standing.loss
            steps.append(self.step(found, kept=kept))
            best = found if kept else best
            if number > 0 and not kept:
                break
        return self.verdict(goal, best, budget, steps)

    def compact(self, goal: Goal) -> Outcome:
        """The smallest model that keeps the metric."""
        labels = self.labels(self.gradients(None))
        reference = float(self.job.original.size_bytes)
        smallest = plan_within(self.job, labels.menu, Budget(minimize="size"), Correction(), self.sizes)
        low, high = float(self.sizes.total(smallest.forms)), reference
        best: Attempt | None = None
        steps: list[Step] = []
        correction = Correction()
        for _ in range(BISECTIONS):
            if high / low < 1 + _FINEST:
                break
            size = math.sqrt(low * high)
            try:
                found = self.attempt(labels, Budget(size_bytes=size), correction, "original")
            except InfeasibleError:
                low = size
                continue
            passes = self.keeps(found, goal.drop)
            steps.append(self.step(found, kept=passes))
            correction = corrected(found)
            if passes:
                best, high = found, float(min(size, self.sizes.total(found.plan.forms)))
            else:
                low = size
        if best is None:
            nearest = max((step.metric.mean for step in steps), default=0.0)
            raise InfeasibleError(
                f"no smaller model keeps the metric to within {goal.drop:g} points on {len(self.job.splits.choose)} samples; "
                f"nearest: --drop {max(0.0, -nearest) + 0.1:.2g}; allow a larger --drop, or give more samples"
            )
        return self.verdict(goal, best, best.plan.budget, steps)

    def keeps(self, found: Attempt, drop: float) -> bool:
        """Whether the metric falls by no more than `drop`, doubt included, and the loss does not rise where it may not fall."""
        better, worse = gain(self.job, self.original, found.standing), loss_change(self.original, found.standing)
        kept = better.mean - DOUBT * better.error >= -drop
        return kept and (drop > 0 or worse.mean <= max(SIGNIFICANT * worse.error, NOTICEABLE * abs(self.original.loss)))

    # --- steps

    def gradients(self, at: Attempt | None) -> Gradients:
        """Of the loss, at the original's weights or at those of an attempt."""
        with self.job.clock.phase("differentiate"):
            if at is None:
                return measure_gradients(self.job)
            return measure_gradients(self.job, decoded_model(self.job, at.plan.forms, at.fitted))

    def labels(self, gradients: Gradients | None, at: Attempt | None = None) -> Labels:
        """Price every form, with linear terms from gradients at the original's weights, or at those of an attempt."""
        if gradients is None:
            return Labels(analyse(self.job, self.cache, latency=False, progress=self.progress), {}, {}, {})
        terms = _Terms(self.job, gradients, self.unit, at)
        menu = analyse(self.job, self.cache, latency=False, progress=self.progress, joint=terms)
        return Labels(menu, terms.slopes, terms.agreement, gradients.declined)

    def attempt(self, labels: Labels, budget: Budget, correction: Correction, gradients: str) -> Attempt:
        """Solve, fit, and measure on the choose split.

        Raises:
            InfeasibleError: no plan meets the budget.
        """
        job = replace(self.job, slopes=labels.slopes)
        plan = plan_within(job, labels.menu, budget, replace(correction, spare_bytes=0), self.sizes, joint=gradients != "none")
        plan = replace(plan, budget=budget)
        fitted = fit_forms(job, plan.forms, keep=True, progress=self.progress)
        model = finish(job, plan.forms, fitted)
        with job.clock.phase("verify"):
            measured = compare(job.original, model, job.data, job.splits.choose, job.calibration, kind=job.settings.kind).divergence
            standing = stand(job, model, job.splits.choose)
        return Attempt(job, plan, fitted, model, measured, standing, labels, gradients)

    def step(self, found: Attempt, *, kept: bool) -> Step:
        """What an attempt predicted and measured."""
        return Step(
            self.sizes.total(found.plan.forms),
            found.gradients,
            self.unit * found.plan.linear,
            self.unit * found.plan.divergence,
            loss_change(self.original, found.standing),
            gain(self.job, self.original, found.standing),
            kept,
        )

    def verdict(self, goal: Goal, best: Attempt, budget: Budget, steps: Sequence[Step]) -> Outcome:
        """Verify on held-out samples.

        Raises:
            VerificationError: the size or the metric is not kept.
        """
        job = best.job
        total = self.sizes.total(best.plan.forms)
        outcome = verified(job, best.plan, budget, best.model, best.divergence, total, timed=job.times(budget))
        with job.clock.phase("verify"):
            standings = [stand(job, model, job.splits.verify) for model in (job.original, best.model)]
        loss, metric = loss_change(*standings), gain(job, *standings)
        drop = goal.drop if goal.preset == "compact" else None
        if drop is not None and metric.mean < -drop - 1e-9:
            raise VerificationError(
                f"verification failed on held-out data: {job.settings.metric} is {-metric.mean:.2f} ± {metric.error:.2f} points worse on "
                f"{metric.samples} samples, over --drop {drop:g}; nearest: --drop {-metric.mean + 0.01:.2f}; nothing was written"
            )
        predicted = (self.unit * best.plan.linear, self.unit * best.plan.divergence)
        labels = best.labels
        task = TaskOutcome(
            goal.preset, job.settings.loss, drop, *predicted, self.unit, loss, metric, tuple(steps), labels.agreement, labels.declined
        )
        return replace(outcome, task=task)


def corrected(found: Attempt) -> Correction:
    """The correction of divergences that an attempt's measurement asks for, by which they weigh against linear terms.

    Never below 1: gains are capped by the uncorrected divergence, and would otherwise come to outweigh it.
    """
    plan = found.plan
    off = min(found.divergence / plan.divergence, FARTHEST_OFF) if plan.divergence > 0 else 1.0
    return Correction(divergence=max(1.0, plan.correction.divergence * off))


# --- linear terms


class _Terms:
    """Adds linear terms to findings, one site after the other; keeps the slopes that they imply."""

    def __init__(self, job: Job, gradients: Gradients, unit: float, at: Attempt | None) -> None:
        self._job, self._gradients, self._unit, self._at = job, gradients, unit, at
        self.slopes: dict[str, NDArray[np.float32]] = {}
        self.agreement: dict[str, float] = {}

    def __call__(self, findings: Mapping[str, Finding]) -> tuple[dict[str, Finding], Linear]:
        """See `analyse.Joint`."""
        found, linear = dict(findings), {}
        metrics = output_metrics(self._job)
        sites = [site for site in self._job.sites if site.name in self._gradients.folds]

        def look(measured: tuple[Site, Moment]) -> tuple[Site, JointFinding]:
            site, moment = measured
            value = site.value(self._job.model)
            metric = metrics.weigh(site.name, moment.shrunk())
            folds = self._folds(site, value, metric, findings[site.name])
            return site, joint_finding(site, value, metric, findings[site.name], folds)

        for site, result in in_parallel(look, measured_sites(self._job, sites), workers(sites)):
            found[site.name], linear[site.name] = result.finding, result.linear
            self.agreement[site.name] = result.agreement
            if result.slope is not None:
                self.slopes[site.name] = result.slope
        return found, linear

    def _folds(self, site: Site, value: NDArray[np.generic], moment: Moment, finding: Finding) -> NDArray[np.float64]:
        """The gradients in the unit of the divergence; those at an attempt without what the site's own change explains.

        At weights Ŵ the gradient is g + Σ_k H_k Δ_k over all sites; a site's own H Δ is in its divergence already. By the curve it is the
        gradient of s·‖ΔA½‖²∕‖WA½‖², 2·s·(ΔA)∕‖WA½‖².
        """
        matrices = self._gradients.matrices(site)
        assert matrices is not None  # the site is among those that have one
        folds = matrices / self._unit
        form = UNCHANGED if self._at is None else self._at.plan.forms.get(site.name, UNCHANGED)
        if self._at is None or form == UNCHANGED or form.decomposition == PRUNED:
            return folds
        weight = site.matrix(value)
        change = decoded_weight(site, form, self._at.fitted) - weight
        energy = moment.energy(weight)
        relative = moment.energy(change) / energy if energy > 0 else 0.0
        if relative <= 0:
            return folds
        steepness = finding.curves.truncation(relative) / relative
        pulled = moment.times(change) if moment.outputs is None else moment.outputs.times(moment.times(change))
        return np.asarray(folds - 2 * steepness / energy * pulled)
