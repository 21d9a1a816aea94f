"""What a run did: the facts of an outcome, gathered for `report.json`.

Everything is taken from the outcome, or solved for; nothing is measured again except the latency of single sites, which comes from the
cache where the plan was priced with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import onnx

from intaglio import __version__
from intaglio.ops.form import CARRIED, PRUNED, UNCHANGED, Form

from .cache import Cache
from .calibrate import sampled_positions
from .facts import (
    DataFacts,
    DivergenceFacts,
    FileFacts,
    LatencyFacts,
    LoadingFacts,
    MetricFacts,
    Report,
    RoundFacts,
    SampledFacts,
    SiteFacts,
    SizeFacts,
    SkipFacts,
    SolverFacts,
    TaskFacts,
    TuningFacts,
    parameters,
)
from .job import Job
from .latency import MicroBench
from .load import load
from .margins import margins
from .partners import partners_of
from .pipeline import Outcome
from .plan import Candidate, Plan
from .price import SizePricer
from .renormalize import find_normalizations
from .rewrite import channel_axes
from .save import save
from .sites import Site, Skip
from .timing import LatencyPricer, changes_latency


@dataclass(frozen=True, eq=False)
class Result:
    """A compressed model that has not been written yet."""

    outcome: Outcome

    @property
    def meets_budget(self) -> bool:
        """Whether every budget holds on held-out data."""
        return self.outcome.meets

    @property
    def plan(self) -> Plan:
        """What was chosen, and what from."""
        return self.outcome.plan

    @property
    def model(self) -> onnx.ModelProto:
        """The compressed model; weights that lie in external files are still references to them."""
        return self.outcome.model.proto

    @cached_property
    def report(self) -> Report:
        """What was done and measured."""
        return report(self.outcome)

    def save(self, path: str | Path) -> Report:
        """Write the model, atomically, and return the report with the file in it.

        Args:
            path: the `.onnx` file; large weights go beside it where the original keeps them in external data.

        Raises:
            InputError: the file is the original, or cannot be written.
        """
        job, measured = self.outcome.job, self.report
        size_bytes = save(self.outcome.model, path, source=job.original.path, external=job.external or None)
        size = SizeFacts.of(job.original.size_bytes, size_bytes)  # external data is referred to by the file's name
        return replace(measured, output=FileFacts(str(path), load(path).sha256), size=size)


def report(outcome: Outcome) -> Report:
    """The report of an outcome whose model is not written yet."""
    job, plan, comparison = outcome.job, outcome.plan, outcome.comparison
    runtime = job.settings.runtime
    solution = plan.solution
    by_hand = any(plan.candidate(name) is None for name in plan.forms)
    return Report(
        intaglio=__version__,
        status="met" if outcome.meets else "missed",
        model=FileFacts.of(job.original),
        output=FileFacts(None, None),
        size=SizeFacts.of(job.original.size_bytes, outcome.size_bytes),
        latency=None if outcome.latency is None else LatencyFacts.of(outcome.latency, runtime.providers, runtime.threads),
        loading=None if outcome.loading is None else LoadingFacts.of(outcome.loading),
        divergence=DivergenceFacts(comparison.unit, None if by_hand else plan.divergence, comparison.divergence, comparison.samples),
        agreement=comparison.agreement,
        metric=MetricFacts.of(comparison),
        task=None if outcome.task is None else TaskFacts.of(outcome.task),
        tuning=None if outcome.tuning is None else TuningFacts.of(outcome.tuning),
        rounds=tuple(RoundFacts.of(each) for each in outcome.rounds),
        solver=None
        if solution is None
        else SolverFacts(solution.status, solution.objective, solution.bound, solution.gap, solution.seconds, solution.candidates),
        margins=margins(plan),
        data=DataFacts(job.settings.seed, len(job.splits.fit), len(job.splits.choose), len(job.splits.verify), job.data.synthetic),
        statistics=sampled_sites(job),
        canonicalization=job.canonicalization,
        sites=_sites(outcome),
        integers=job.settings.integers,
        carriers=tuple(name for name, form in plan.forms.items() if form == CARRIED),
        floors=dict(job.floors),
        normalizations=skip_facts(find_normalizations(job.model)[1]),
        skipped=skip_facts((*job.sites.skipped, *job.excluded)),
        seconds=dict(job.clock.seconds),
    )


def sampled_sites(job: Job) -> tuple[SampledFacts, ...]:
    """The convolutions whose statistics come from some of their positions only."""
    found = []
    for site in job.sites:
        if site.name in job.shapes:
            sampled = sampled_positions(site, job.shapes[site.name], len(job.splits.fit))
            if sampled is not None:
                found.append(SampledFacts(site.name, *sampled))
    return tuple(found)


def skip_facts(skipped: tuple[Skip, ...]) -> tuple[SkipFacts, ...]:
    """Names and reasons."""
    return tuple(SkipFacts(skip.name, skip.reason) for skip in skipped)


def latency_pricer(job: Job) -> LatencyPricer:
    """Measures single sites as the job's settings say."""
    settings = job.settings
    bench = MicroBench(Cache(settings.cache), settings.runtime.providers, settings.runtime.threads, budget_s=0.04)
    return LatencyPricer(job.model, job.shapes, bench, job.value_shapes, partners_of(job), job.integers)


def _sites(outcome: Outcome) -> tuple[SiteFacts, ...]:
    job, plan = outcome.job, outcome.plan
    sizes = job.sizes()
    timer, declined = latency_pricer(job), partners_of(job).reasons
    reasons = {site: f"; not {arithmetic}: {reason}" for (site, arithmetic), reason in declined.items()}
    return tuple(_site(site, plan, sizes, timer, reasons.get(site.name, "")) for site in job.sites)


def _site(site: Site, plan: Plan, sizes: SizePricer, timer: LatencyPricer, declined: str) -> SiteFacts:
    form = plan.forms.get(site.name, UNCHANGED)
    candidate = plan.candidate(site.name) if site.name in plan.forms else None
    before, after = sizes.weight_bytes(site, UNCHANGED), sizes.weight_bytes(site, form)
    reference_s = latency_s = None
    if changes_latency(form) and timer.measurable(site):  # other forms run the operator that was there before
        reference_s, latency_s = timer.pair(site, form)
    return SiteFacts(
        name=site.name,
        op_type=site.op_type,
        shape=site.shape,
        form=form.decomposition,
        parameters=parameters(form),
        storage=form.storage,
        execution=form.execution,
        arithmetic=form.arithmetic,
        reference_bytes=before,
        bytes=after,
        predicted_divergence=None if candidate is None else plan.correction.divergence * candidate.divergence,
        predicted_linear=candidate.linear if candidate is not None and plan.joint else None,
        reference_latency_s=reference_s,
        latency_s=latency_s,
        reason=_kept_channels(site, form)
        + _reason(form, candidate, len(plan.menu.candidates.get(site.name, ())), before, after)
        + declined,
    )


def _kept_channels(site: Site, form: Form) -> str:
    """What a pruned form keeps; nothing for others."""
    if form.decomposition != PRUNED:
        return ""
    inputs, outputs = (site.shape[axis] for axis in channel_axes(site))
    return f"keeps {form.ranks[0]} of {inputs} inputs and {form.ranks[1]} of {outputs} outputs; "


def _reason(form: Form, candidate: Candidate | None, candidates: int, before: int, after: int) -> str:
    if candidate is None:
        return "not in the plan" if candidates == 0 and form == UNCHANGED else "written into the plan by hand"
    if form == UNCHANGED:
        return "no other form fits it" if candidates == 1 else f"none of {candidates - 1} other forms pays at this budget"
    saved = f"saves {1 - after / before:.0%} of its bytes"
    return saved if not changes_latency(form) else f"{saved}, changes its latency by {1e6 * candidate.latency_s:+.0f} µs"
