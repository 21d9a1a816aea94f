"""The schema of `report.json`: what a run did, as data.

A number that was not measured is null. Paths are those that the user gave.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from intaglio.ops.form import Form

from .canonicalize import Report as CanonicalReport
from .latency import PairedLatency
from .loading import Loading
from .margins import Margin
from .model import Model
from .rounds import Round
from .task import Change, TaskOutcome
from .tune import TuneResult
from .verify import Comparison


@dataclass(frozen=True)
class FileFacts:
    """A file: its path as the user gave it (None for a model in memory) and its SHA-256 (None while nothing is written)."""

    path: str | None
    sha256: str | None

    @staticmethod
    def of(model: Model) -> FileFacts:
        """Of a loaded model."""
        return FileFacts(None if model.path is None else str(model.path), model.sha256)


@dataclass(frozen=True)
class SizeFacts:
    """Bytes of the model file and its external data, and after / before."""

    reference_bytes: int
    bytes: int
    ratio: float

    @staticmethod
    def of(reference_bytes: int, size_bytes: int) -> SizeFacts:
        """With the ratio of the two."""
        return SizeFacts(reference_bytes, size_bytes, size_bytes / reference_bytes)


@dataclass(frozen=True)
class LatencyFacts:
    """End-to-end latency of one run, measured in alternation; the ratio's quartiles are those of single pairs.

    Where a late result was measured once more, `ratio` is the geometric mean of the measurements' own `ratios`, by their pairs.
    """

    reference_s: float
    candidate_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    ratios: tuple[float, ...]
    pairs: int
    providers: tuple[str, ...]
    threads: int

    @staticmethod
    def of(latency: PairedLatency, providers: tuple[str, ...], threads: int) -> LatencyFacts:
        """With the conditions under which it was measured."""
        return LatencyFacts(
            latency.reference_s,
            latency.candidate_s,
            latency.ratio,
            latency.ratio_low,
            latency.ratio_high,
            latency.ratios,
            latency.pairs,
            providers,
            threads,
        )


@dataclass(frozen=True)
class LoadingFacts:
    """Seconds to create a session, and the most memory a fresh process takes for it, before and after."""

    reference_s: float
    candidate_s: float
    reference_peak_bytes: int
    candidate_peak_bytes: int

    @staticmethod
    def of(loading: tuple[Loading, Loading]) -> LoadingFacts:
        """Of the original and of the result."""
        reference, candidate = loading
        return LoadingFacts(reference.seconds, candidate.seconds, reference.peak_bytes, candidate.peak_bytes)


@dataclass(frozen=True)
class DivergenceFacts:
    """Divergence of the outputs: "kl_nats" or "relative_mse"; predicted is None where a form was written in by hand."""

    unit: str
    predicted: float | None
    measured: float
    samples: int


@dataclass(frozen=True)
class MetricFacts:
    """The task's metric, before and after."""

    name: str
    reference: float
    candidate: float

    @staticmethod
    def of(comparison: Comparison) -> MetricFacts | None:
        """None without labels."""
        reference, candidate = comparison.reference_metric, comparison.candidate_metric
        if comparison.metric is None or reference is None or candidate is None:
            return None
        return MetricFacts(comparison.metric, reference, candidate)


@dataclass(frozen=True)
class ChangeFacts:
    """A mean difference against the original over held-out samples, and its standard error from paired samples."""

    mean: float
    error: float
    samples: int

    @staticmethod
    def of(change: Change) -> ChangeFacts:
        """Of a measured change."""
        return ChangeFacts(change.mean, change.error, change.samples)


@dataclass(frozen=True)
class StepFacts:
    """A plan that a preset tried; `loss` and `metric` were measured on the choose split, the metric's gain is positive where better."""

    size_bytes: int
    gradients: str
    predicted_linear: float
    predicted_quadratic: float
    loss: ChangeFacts
    metric: ChangeFacts
    kept: bool


@dataclass(frozen=True)
class TaskFacts:
    """What labels say of a model that a preset made.

    Attributes:
        preset: "lossless" or "compact".
        loss_name: "cross-entropy", "mse", or the name of an output.
        drop: points that the metric might fall by; None where that was not limited.
        predicted_linear: predicted change of the loss to first order.
        predicted_quadratic: predicted change by the divergence.
        loss: measured change on the verify split.
        metric: measured gain there.
        steps: every plan that was tried.
        declined: weights without a linear term, with the reason.
    """

    preset: str
    loss_name: str
    drop: float | None
    predicted_linear: float
    predicted_quadratic: float
    loss: ChangeFacts
    metric: ChangeFacts
    steps: tuple[StepFacts, ...]
    declined: tuple[SkipFacts, ...]

    @staticmethod
    def of(task: TaskOutcome) -> TaskFacts:
        """Of a preset's outcome."""
        steps = tuple(
            StepFacts(s.size_bytes, s.gradients, s.linear, s.quadratic, ChangeFacts.of(s.loss), ChangeFacts.of(s.metric), s.kept)
            for s in task.steps
        )
        return TaskFacts(
            task.preset,
            task.loss_name,
            task.drop,
            task.linear,
            task.quadratic,
            ChangeFacts.of(task.loss),
            ChangeFacts.of(task.metric),
            steps,
            tuple(SkipFacts(name, reason) for name, reason in task.declined.items()),
        )


@dataclass(frozen=True)
class SolverFacts:
    """The certificate of the choice; see `intaglio.solver.Solution`."""

    status: str
    objective: float
    bound: float
    gap: float
    seconds: float
    candidates: int


@dataclass(frozen=True)
class SiteFacts:
    """What became of one weight.

    Attributes:
        name: of the site.
        op_type: operator that reads it.
        shape: of the weight.
        form: decomposition.
        parameters: of the decomposition: {"rank": r}, {"ranks": [...]}, or nothing.
        storage: of the arrays.
        execution: "dense" or "contract".
        arithmetic: "float", or what the layer computes in.
        reference_bytes: payload before.
        bytes: payload after.
        predicted_divergence: if only this site changed; None for a form that was written in by hand.
        predicted_linear: change of the labelled loss to first order, in the divergence's unit; None where no labels took part.
        reference_latency_s: of the operator before; None where it was not measured.
        latency_s: of what replaces it.
        reason: why this form.
    """

    name: str
    op_type: str
    shape: tuple[int, ...]
    form: str
    parameters: Mapping[str, int | list[int]]
    storage: str
    execution: str
    arithmetic: str
    reference_bytes: int
    bytes: int
    predicted_divergence: float | None
    predicted_linear: float | None
    reference_latency_s: float | None
    latency_s: float | None
    reason: str

    @property
    def chosen(self) -> Form:
        """The form."""
        ranks = self.parameters.get("ranks", [self.parameters["rank"]] if "rank" in self.parameters else [])
        return Form(self.form, tuple(cast(list[int], ranks)), self.storage, self.execution, self.arithmetic)


@dataclass(frozen=True)
class SkipFacts:
    """A weight that no form may touch, or a normalization whose statistics stay, with the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class SampledFacts:
    """A convolution whose statistics come from some of its output positions.

    Attributes:
        site: its name.
        used: positions per sample that were used.
        positions: positions per sample that there are.
    """

    site: str
    used: int
    positions: int


@dataclass(frozen=True)
class DataFacts:
    """Which samples served what.

    Attributes:
        seed: of the split.
        fit: samples behind the statistics.
        choose: samples behind corrections of the choice.
        verify: samples behind the verdict.
        synthetic: the data was random, so no accuracy is claimed.
    """

    seed: int
    fit: int
    choose: int
    verify: int
    synthetic: bool


@dataclass(frozen=True)
class TuningFacts:
    """What tuning reached.

    Attributes:
        improved: whether tuned parameters were kept; otherwise the file holds the untuned ones.
        steps: made.
        rate: the highest rate.
        steps_per_s: training alone.
        before: divergence of the student on choose samples at the start; None where it was not measured.
        after: the same of the best parameters.
        history: (step, mean loss since the last one, divergence) of every measurement.
        interrupted: whether the user stopped it.
        skipped: site name → why its arrays were not tuned.
        reason: why nothing was tuned, or why tuning ended early; None where neither is so.
        blocks: (last value, error before, error after) of each block that was taught by itself.
        unrounded: what teaching in floats reached before, and whether that was kept (`improved`); None where it was not tried.
    """

    improved: bool
    steps: int
    rate: float
    steps_per_s: float
    before: float | None
    after: float | None
    history: tuple[tuple[int, float | None, float], ...]
    interrupted: bool
    skipped: Mapping[str, str]
    reason: str | None
    blocks: tuple[tuple[str, float, float], ...]
    unrounded: TuningFacts | None = None

    @staticmethod
    def of(result: TuneResult) -> TuningFacts:
        """The facts of a result."""
        return TuningFacts(
            result.improved,
            result.steps,
            result.rate,
            result.steps_per_s,
            _known(result.before),
            _known(result.after),
            tuple((point.step, _known(point.loss), point.divergence) for point in result.history),
            result.interrupted,
            dict(result.skipped),
            result.reason,
            tuple((point.exit, point.before, point.after) for point in result.blocks),
            None if result.unrounded is None else TuningFacts.of(result.unrounded),
        )


def _known(value: float) -> float | None:
    """A number, or None where it was not measured."""
    return None if math.isnan(value) else value


@dataclass(frozen=True)
class RoundFacts:
    """A round before the last.

    Attributes:
        size_bytes: of its plan.
        latency_s: that it was allowed; None where latency has no budget.
        before: divergence from the original on choose samples, untuned.
        after: the same, tuned.
        interrupted: whether the user stopped its tuning, and with it that of the last round.
    """

    size_bytes: int
    latency_s: float | None
    before: float
    after: float
    interrupted: bool

    @staticmethod
    def of(found: Round) -> RoundFacts:
        """The facts of a round."""
        return RoundFacts(found.size_bytes, found.budget.latency_s, found.divergence, found.tuned, found.interrupted)


@dataclass(frozen=True)
class Report:
    """`report.json`.

    Attributes:
        intaglio: version of this program.
        status: "met", or "missed" where a plan that was edited by hand breaks its own budget.
        model: the original.
        output: the written file.
        size: of the written file.
        latency: None where it was not measured.
        loading: None where it was not measured.
        divergence: on held-out data.
        agreement: share of held-out samples with the same top class; None where outputs are not class scores.
        metric: None without labels.
        task: what a preset found; None without one.
        tuning: None where it was not asked for.
        rounds: those before the last.
        solver: None for a plan that was edited by hand.
        margins: what a tenth more of what it takes of each budget is predicted to buy.
        data: which samples served what.
        statistics: convolutions whose statistics are sampled.
        canonicalization: what was simplified before.
        sites: every weight that could change.
        integers: which integers operators compute with: "full", "reduced" or "signed", as in `passes.kernels`.
        carriers: operators without weights that run in integers.
        floors: by value, below which a Clip lifts the scores that a Softmax reads.
        normalizations: those whose stored statistics must stay, with the reason; others may have been re-estimated.
        skipped: every weight that could not.
        seconds: wall time per phase.
    """

    intaglio: str
    status: str
    model: FileFacts
    output: FileFacts
    size: SizeFacts
    latency: LatencyFacts | None
    loading: LoadingFacts | None
    divergence: DivergenceFacts
    agreement: float | None
    metric: MetricFacts | None
    task: TaskFacts | None
    tuning: TuningFacts | None
    rounds: tuple[RoundFacts, ...]
    solver: SolverFacts | None
    margins: tuple[Margin, ...]
    data: DataFacts
    statistics: tuple[SampledFacts, ...]
    canonicalization: CanonicalReport
    sites: tuple[SiteFacts, ...]
    integers: str
    carriers: tuple[str, ...]
    floors: Mapping[str, float]
    normalizations: tuple[SkipFacts, ...]
    skipped: tuple[SkipFacts, ...]
    seconds: Mapping[str, float]


def parameters(form: Form) -> Mapping[str, int | list[int]]:
    """What a form's ranks are called in a report."""
    if not form.ranks:
        return {}
    return {"rank": form.ranks[0]} if len(form.ranks) == 1 else {"ranks": list(form.ranks)}


def to_json(document: object) -> str:
    """A frozen dataclass as indented JSON; numbers that JSON cannot hold (infinities, NaN) become null.

    Args:
        document: a dataclass instance of this package's reports.
    """
    return json.dumps(_plain(document), indent=1, ensure_ascii=False, allow_nan=False)


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
