"""The whole path: load → canonicalize → sites → calibrate → propose → price → solve → fit → rewrite → verify.

`analyse` does everything that is expensive and independent of a budget; its menu of priced candidates goes into the plan, so another budget
needs no second look at the model. `solve` chooses, `build` fits and rewrites, `compress` runs all of it and holds the promise: budgets are
checked on the serialized model, divergence on samples that took no part in any choice.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from intaglio.ops.form import UNCHANGED, Form
from intaglio.ops.moment import Moment
from intaglio.solver import Budget, Cost

from .budget import Request, resolve
from .cache import Cache
from .calibrate import Shapes, calibrate, observe, sampled_positions
from .canonicalize import canonicalize
from .data import Dataset, Splits, input_specs, open_dataset, split
from .divergence import Kind, output_kinds
from .errors import InfeasibleError, InputError, VerificationError
from .fit import pack
from .graph import all_names
from .latency import MicroBench, PairedLatency, compare_models
from .load import load
from .model import Model
from .options import Progress, Runtime, silent
from .plan import Candidate, Correction, Menu, Plan, choose
from .price import LatencyPricer, SizePricer, declines
from .propose import Allowed, Proposal, propose
from .rewrite import Fragment, fragment, rewrite
from .save import save
from .sensitivity import Curve, Probe, Sensitivity
from .session import open_session
from .sites import Site, Sites, Skip, find_sites
from .targets import TARGETS
from .verify import Comparison, compare

FIT_ROUNDS = 6
"""Most stages of the sequential fit: each recalibrates on the compressed prefix."""

RESOLVES = 4
"""Most rounds of fit, measure and solve again."""

SLACK = 0.97
"""Share of an error or latency budget that the choose split may use, so that the verify split keeps it."""

PROBE_SAMPLES = 48
"""Fit samples on which trial forms are measured."""

TRIAL_ERRORS = (0.02, 0.15)
"""Relative truncation errors near which each site's curve is measured."""


@dataclass(frozen=True)
class Settings:
    """Everything but the budget.

    Attributes:
        target: name of a target.
        runtime: how latency is measured and promised.
        labels: array of the data that holds labels.
        metric: name of the metric that labels are scored by.
        kind: what the first output holds ("auto" reads it off the graph).
        include: regular expressions; only sites that match one are touched.
        exclude: regular expressions; sites that match one are left alone.
        decompositions: names of the forms that may be used; empty for all.
        storages: names of the storages that may be used; empty for all.
        samples: most samples used; None for all.
        seed: of every random choice.
        cache: folder of the cache; None for none.
    """

    target: str = "cpu"
    runtime: Runtime = field(default_factory=Runtime)
    labels: str | None = None
    metric: str = "accuracy"
    kind: str = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    decompositions: tuple[str, ...] = ()
    storages: tuple[str, ...] = ()
    samples: int | None = None
    seed: int = 0
    cache: Path | None = None


@dataclass
class Clock:
    """Wall seconds spent per phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a block to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True, eq=False)
class Job:
    """A model with data, opened, checked and searched for sites.

    Attributes:
        original: the model as given.
        model: the canonical model that plans start from.
        sites: its weights.
        excluded: sites that the user's expressions leave out.
        data: the samples.
        splits: which samples fit, choose and verify.
        kinds: what the outputs hold.
        shapes: around each site at the latency batch.
        settings: the settings.
        calibration: how models are run while statistics are gathered.
    """

    original: Model
    model: Model
    sites: Sites
    excluded: tuple[Skip, ...]
    data: Dataset
    splits: Splits
    kinds: tuple[Kind, ...]
    shapes: Mapping[str, Shapes]
    settings: Settings
    calibration: Runtime
    clock: Clock

    @property
    def external(self) -> bool:
        """Whether the result keeps its weights beside the model file, as the original does."""
        return bool(self.original.weights.files)


def open_job(source: str | Path | onnx.ModelProto, data: object, settings: Settings, *, clock: Clock | None = None) -> Job:
    """Load a model and its data and find the sites.

    Raises:
        InputError: the model, the data or a setting is bad.
    """
    clock = clock or Clock()
    if settings.target not in TARGETS:
        raise InputError(f"--target {settings.target}: unknown; expected one of {', '.join(TARGETS)}")
    with clock.phase("load"):
        original = load(source)
        dataset = open_dataset(data, input_specs(original.proto), labels=settings.labels, seed=settings.seed)  # type: ignore[arg-type]
        splits = split(len(dataset), seed=settings.seed, samples=settings.samples)
    with clock.phase("canonicalize"):
        model, _ = canonicalize(original)
        if original.weights.files:
            original.weights.enable_spooling(Path(tempfile.gettempdir()))
    kinds = output_kinds(original.proto, settings.kind)
    found = find_sites(model)
    sites, excluded = TARGETS[settings.target].select(found, settings.include, settings.exclude)
    calibration = replace(settings.runtime, threads=max(settings.runtime.threads, os.cpu_count() or 1))
    with clock.phase("calibrate"):
        shapes = observe(model, sites.sites, dataset.first(1), calibration)
    return Job(original, model, sites, excluded, dataset, splits, kinds, shapes, settings, calibration, clock)


def analyse(job: Job, cache: Cache, *, latency: bool, progress: Progress[Site] = silent) -> Menu:
    """Price every form of every site.

    Args:
        job: from `open_job`.
        cache: of latencies.
        latency: whether forms are timed; without, only those that no other form beats in size and divergence are.
        progress: shows how far the analysis is.
    """
    settings = job.settings
    sizes = SizePricer(job.model, external=job.external)
    target = TARGETS[settings.target]
    allowed = target.allowed(settings.decompositions, settings.storages)
    rng = np.random.default_rng(settings.seed)
    count = min(PROBE_SAMPLES, len(job.splits.fit))
    probe = Probe(job.model, job.kinds, job.data, np.sort(rng.choice(job.splits.fit, count, replace=False)), job.calibration)
    proposals: dict[str, tuple[Proposal, ...]] = {}
    curves: dict[str, Sensitivity] = {}
    for part in progress(_parts(job.sites.sites), "Analysing", len(job.sites)):  # type: ignore[arg-type]
        sites: Sequence[Site] = part  # type: ignore[assignment]
        with job.clock.phase("calibrate"):
            moments = calibrate(job.model, sites, job.shapes, job.data, job.splits.fit, job.calibration, seed=settings.seed)
        for site in sites:
            value = site.value(job.model)
            with job.clock.phase("propose"):
                proposals[site.name], _ = propose(site, value, moments[site.name], allowed)
            with job.clock.phase("price"):
                curves[site.name] = _sensitivity(site, value, moments[site.name], proposals[site.name], probe)
    with job.clock.phase("price"):
        feed = job.data.first(1)
        session = open_session(job.model.proto, weights=job.model.weights, threads=settings.runtime.threads, providers=settings.runtime.providers)
        base_s = compare_models(session, session, feed, pairs=9).reference_s
        bench = MicroBench(cache, settings.runtime.providers, settings.runtime.threads, budget_s=0.04)
        timer = LatencyPricer(job.model, job.shapes, bench)
        candidates = {
            site.name: _priced(site, proposals[site.name], curves[site.name], sizes, timer, latency)
            for site in progress(job.sites.sites, "Timing", len(job.sites))
        }
    unit = "relative_mse" if Kind.VALUES in job.kinds else "kl_nats"
    return Menu(job.original.sha256, candidates, Cost(sizes.base_bytes, base_s, 0.0), sizes.shared, unit)


def _parts(sites: Sequence[Site], limit_bytes: int = 1 << 28) -> list[list[Site]]:
    """Consecutive sites whose moments fit into memory together."""
    parts: list[list[Site]] = []
    size = 0
    for site in sites:
        view = site.use.view
        own = 8 * view.groups * view.n * (1 if site.op_type == "Gather" else view.n)
        if not parts or size + own > limit_bytes:
            parts.append([])
            size = 0
        parts[-1].append(site)
        size += own
    return parts


def _sensitivity(site: Site, value: np.ndarray, moment: Moment, proposals: Sequence[Proposal], probe: Probe) -> Sensitivity:
    """Measure a site's curves on a few trial forms."""
    rounding: list[tuple[float, float]] = []
    dense = [p for p in proposals if p.form.decomposition == "dense" and p.rounding > 1e-6]
    for proposal in sorted(dense, key=lambda p: -p.rounding)[:1]:
        _, weight = pack(site, proposal.form, value, moment)
        rounding.append((proposal.rounding, probe.replaced(site, site.stored(weight))))
    truncation: list[tuple[float, float]] = []
    lowrank = [p for p in proposals if p.form.storage == "float" and p.form.execution == "dense" and p.form.ranks and p.truncation > 0]
    trials = {min(lowrank, key=lambda p: abs(np.log(p.truncation / error))).form: None for error in TRIAL_ERRORS if lowrank}
    for form in trials:
        error = next(p.truncation for p in lowrank if p.form == form)
        _, weight = pack(site, form, value, moment)
        truncation.append((error, probe.replaced(site, site.stored(weight))))
    return Sensitivity(Curve.through(rounding or truncation), Curve.through(truncation or rounding))


def _priced(
    site: Site, proposals: Sequence[Proposal], curves: Sensitivity, sizes: SizePricer, timer: LatencyPricer, latency: bool
) -> tuple[Candidate, ...]:
    """Sizes and divergences of all forms, latencies of those that may matter."""
    rows = []
    for proposal in proposals:
        size = sizes.price(site, proposal.form)
        divergence = curves.truncation(proposal.truncation) + curves.rounding(proposal.rounding)
        rows.append(Candidate(proposal.form, size.size_bytes, 0.0, divergence, proposal.truncation + proposal.rounding, size.shared))
    kept = []
    for row in rows:
        contract = row.form.execution == "contract"
        beaten = any(
            other.size_bytes <= row.size_bytes and other.divergence <= row.divergence and other != row and other.form.execution == "dense"
            for other in rows
        )
        if contract and not timer.measurable(site):
            continue
        if contract and beaten and not latency:
            continue
        kept.append(replace(row, latency_s=timer.change(site, row.form)) if contract else row)
    return tuple(kept)


def build(job: Job, forms: Mapping[str, Form], *, progress: Progress[object] = silent) -> Model:
    """Fit the chosen forms, stage by stage on inputs from the compressed prefix, and rewrite the model.

    Raises:
        InputError: a form names an unknown site, or one that cannot take it.
    """
    sites = {site.name: site for site in job.sites}
    for name, form in forms.items():
        if name not in sites:
            raise InputError(f"plan: site {name!r} is not in the model; solve again for this model")
        reason = None if form == UNCHANGED else declines(sites[name], form)
        if reason:
            raise InputError(f"plan: site {name!r} cannot take {form}: {reason}; choose another form")
    chosen = [site for site in job.sites if forms.get(site.name, UNCHANGED) != UNCHANGED]
    taken = frozenset(all_names(job.model.proto))
    fragments: dict[str, Fragment] = {}
    current = job.model
    stages = _stages(chosen)
    for stage in progress(stages, "Fitting", len(stages)):
        part: Sequence[Site] = stage  # type: ignore[assignment]
        with job.clock.phase("fit"):
            moments = calibrate(current, part, job.shapes, job.data, job.splits.fit, job.calibration, seed=job.settings.seed)
            for site in part:
                arrays, _ = pack(site, forms[site.name], site.value(job.model), moments[site.name])
                fragments[site.name] = fragment(site, forms[site.name], arrays, job.model.proto, taken)
            current = rewrite(job.model, fragments, chosen)
    return current


def _stages(sites: Sequence[Site]) -> list[list[Site]]:
    """Consecutive sites, in about `FIT_ROUNDS` stages or as many as their moments' memory needs."""
    stages: list[list[Site]] = []
    share = -(-len(sites) // FIT_ROUNDS)
    for start in range(0, len(sites), max(1, share)):
        stages += _parts(sites[start : start + share])
    return stages


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
        meets: whether every budget holds.
    """

    job: Job
    plan: Plan
    model: Model
    size_bytes: int
    predicted_bytes: int
    choose_divergence: float
    comparison: Comparison
    latency: PairedLatency | None
    meets: bool


def compress_job(job: Job, request: Request, *, progress: Progress[object] = silent) -> Outcome:
    """Solve, fit, check, solve again with corrected predictions, and verify.

    Raises:
        InfeasibleError: no plan meets the budgets.
        VerificationError: the best plan found does not keep them on held-out data.
    """
    wants_latency = request.latency is not None or request.minimize == "latency"
    menu = analyse(job, Cache(job.settings.cache), latency=wants_latency, progress=progress)
    return solve_and_build(job, menu, request, progress=progress)


def solve_and_build(job: Job, menu: Menu, request: Request, *, progress: Progress[object] = silent) -> Outcome:
    """The part of `compress_job` that depends on the budget."""
    budget = resolve(request, job.original.size_bytes, menu.base)
    correction = Correction()
    best: tuple[Plan, Model, float, PairedLatency | None, int] | None = None
    timed = budget.latency_s is not None or job.original.size_bytes <= job.calibration.memory_limit_bytes
    for _ in range(RESOLVES):
        with job.clock.phase("solve"):
            plan = choose(menu, _tightened(budget), correction)
        predicted = SizePricer(job.model, external=job.external).total(plan.forms)
        if budget.size_bytes is not None and predicted > budget.size_bytes:
            correction = replace(correction, spare_bytes=correction.spare_bytes + int(predicted - budget.size_bytes) + 16)
            continue
        model = build(job, plan.forms, progress=progress)
        with job.clock.phase("verify"):
            measured = compare(job.original, model, job.data, job.splits.choose, job.calibration, kind=job.settings.kind).divergence
            latency = _latency(job, model) if timed else None
        best = (plan, model, measured, latency, predicted)
        following = _corrected(plan, budget, correction, measured, latency)
        if following is None:
            break
        correction = following
    if best is None:
        raise InfeasibleError(f"no plan of exactly {budget.size_bytes:,.0f} B was found in {RESOLVES} rounds; relax --size by 1 %")
    plan, model, measured, latency, predicted = best
    return _verified(job, plan, budget, model, measured, predicted, timed)


def _tightened(budget: Budget) -> Budget:
    return Budget(
        budget.size_bytes,
        None if budget.latency_s is None else budget.latency_s * SLACK,
        None if budget.divergence is None else budget.divergence * SLACK,
        budget.minimize,
    )


def _corrected(plan: Plan, budget: Budget, known: Correction, measured: float, latency: PairedLatency | None) -> Correction | None:
    """What to believe in the next round; None when the plan may stand."""
    divergence, speed = known.divergence, known.latency
    again = False
    if budget.divergence is not None and plan.divergence > 0:
        off = measured / plan.divergence
        if measured > budget.divergence * SLACK or (off < 0.7 and budget.minimize != "error"):
            divergence, again = known.divergence * off, True
    if budget.latency_s is not None and latency is not None:
        limit = budget.latency_s / plan.menu.base.latency_s
        predicted = plan.latency_s / plan.menu.base.latency_s
        if latency.ratio > limit * SLACK + 0.005 and predicted < 1:
            speed, again = max(0.05, known.latency * (1 - latency.ratio) / (1 - predicted)), True
    return Correction(divergence, speed, known.spare_bytes) if again else None


def _latency(job: Job, model: Model) -> PairedLatency:
    runtime = job.settings.runtime
    sessions = [
        open_session(each.proto, weights=each.weights, threads=runtime.threads, providers=runtime.providers) for each in (job.original, model)
    ]
    return compare_models(sessions[0], sessions[1], job.data.first(1), pairs=25)


def _verified(job: Job, plan: Plan, budget: Budget, model: Model, measured: float, predicted: int, timed: bool) -> Outcome:
    """Serialize, load again, and measure everything on the verify split."""
    with tempfile.TemporaryDirectory() as folder, job.clock.phase("verify"):
        path = Path(folder) / "model.onnx"
        size = save(model, path, source=job.original.path, external=job.external or None)
        written = load(path)
        metric = job.settings.metric if job.settings.labels else None
        comparison = compare(
            job.original, written, job.data, job.splits.verify, job.calibration, kind=job.settings.kind, metric=metric
        )
        latency = _latency(job, written) if timed else None
    broken = []
    if budget.size_bytes is not None and size > budget.size_bytes:
        broken.append(f"size {size} B is over the budget of {budget.size_bytes:.0f} B")
    if budget.divergence is not None and comparison.divergence > budget.divergence and not job.data.synthetic:
        broken.append(f"divergence {comparison.divergence:.4g} is over the budget of {budget.divergence:.4g}; nearest: --error {comparison.divergence:.3g}")
    if budget.latency_s is not None and latency is not None:
        limit = budget.latency_s / plan.menu.base.latency_s
        if latency.ratio > limit:
            broken.append(f"latency ratio {latency.ratio:.3f} is over the budget of {limit:.3f}; nearest: --latency {latency.ratio * 1.03:.2f}")
    if broken:
        raise VerificationError("verification failed on held-out data: " + "; ".join(broken) + "; nothing was written")
    return Outcome(job, plan, model, size, predicted, measured, comparison, latency, True)


__all__ = ["Clock", "Job", "Outcome", "Settings", "analyse", "build", "compress_job", "open_job", "sampled_positions", "solve_and_build"]
