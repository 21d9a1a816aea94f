"""The task as labels define it: the loss that a model is judged and differentiated by, and every sample's loss and score.

Losses are `cross-entropy` (of class scores, in nats), `mse` (mean square error of the first output), or the name of an output that holds a
loss already. A loss is a mean over samples; a named one is the mean of its output over a feed, the same for every sample of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from .data import Feed
from .divergence import Kind, log_probabilities
from .errors import InputError
from .execute import Executor
from .job import Job
from .loss import CrossEntropy, Named, SquaredError, WithLoss, with_loss
from .metric import METRICS
from .model import Model

CROSS_ENTROPY, MSE = "cross-entropy", "mse"
LOSSES = (CROSS_ENTROPY, MSE)
"""Names of losses; any other name is that of an output."""

_TARGETS = "intaglio.labels"
"""The input of a differentiated model that takes labels."""

HIGHER_IS_BETTER = {"accuracy": True, "mse": False}
"""By name of a metric."""


def check_task(job: Job) -> None:
    """Raise unless the labels fit the loss and the model.

    Raises:
        InputError: there are no labels, the loss is no output of the model, or the first output holds no class scores.
    """
    loss, outputs = job.settings.loss, [value.name for value in job.original.proto.graph.output]
    if job.data.label_values is None:
        raise InputError("--preset and --drop need labels; name the array of the data that holds them with --labels")
    if loss == CROSS_ENTROPY and job.kinds[0] == Kind.VALUES:
        raise InputError(
            f"--loss {loss}: output {outputs[0]!r} is not known to hold class scores; "
            f"say --output-kind logits (or probabilities), or --loss {MSE}"
        )
    if loss not in (*LOSSES, *outputs):
        raise InputError(f"--loss {loss}: expected one of {', '.join(LOSSES)}, or an output of the model: {', '.join(outputs)}")


def task_model(job: Job, proto: ModelProto, model: Model) -> WithLoss:
    """A model with the job's loss as a further output, and perhaps an input for labels.

    Args:
        job: names the loss.
        proto: the model.
        model: whose weights the model refers to.

    Raises:
        InputError: the loss cannot be built on the first output.
    """
    first = proto.graph.output[0].name
    if job.settings.loss == CROSS_ENTROPY:
        return with_loss(proto, [CrossEntropy(first, _TARGETS, kind=job.kinds[0])], weights=model.weights)
    if job.settings.loss == MSE:
        return with_loss(proto, [SquaredError(first, _TARGETS, relative=False)], weights=model.weights)
    return with_loss(proto, [Named(job.settings.loss)], weights=model.weights)


def fed_with_labels(job: Job, built: WithLoss, feed: Feed, labels: NDArray[Any]) -> Mapping[str, NDArray[Any]]:
    """A feed with the labels of its samples, in the type and rank that the loss takes.

    Args:
        job: names the loss.
        built: from `task_model`.
        feed: the inputs.
        labels: (samples, ...), or (1, samples, ...) where a feed is whole.
    """
    if not built.inputs:
        return feed
    declared = next(value.type.tensor_type for value in built.proto.graph.input if value.name == built.inputs[0])
    lengths = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in declared.shape.dim]
    dtype = np.int64 if job.settings.loss == CROSS_ENTROPY else np.float32 if declared.elem_type == 1 else np.float64
    array = np.asarray(labels).astype(dtype)
    if array.ndim != len(lengths):
        shape = (-1, *lengths[1:]) if lengths.count(-1) <= 1 else (len(array), *array.shape[1:], *(1,) * len(lengths))[: len(lengths)]
        array = array.reshape(shape)
    return {**feed, built.inputs[0]: array}


@dataclass(frozen=True, eq=False)
class Standing:
    """How a model does on some labelled samples.

    Attributes:
        losses: of each sample, (n,) float64, in the order of `rows`.
        scores: by the task's metric, (n,) float64.
        rows: which samples, (n,) int64.
    """

    losses: NDArray[np.float64]
    scores: NDArray[np.float64]
    rows: NDArray[np.int64]

    @property
    def loss(self) -> float:
        """The mean."""
        return float(self.losses.mean())

    @property
    def score(self) -> float:
        """The mean."""
        return float(self.scores.mean())


@dataclass(frozen=True)
class Change:
    """A mean difference of two models over the same samples.

    Attributes:
        mean: candidate − reference.
        error: its standard error, from the differences of single samples; 0 for a single one.
        samples: how many.
    """

    mean: float
    error: float
    samples: int

    @staticmethod
    def of(reference: NDArray[np.float64], candidate: NDArray[np.float64]) -> Change:
        """Of paired values, (n,)."""
        difference = candidate - reference
        count = len(difference)
        spread = float(difference.std(ddof=1)) if count > 1 and np.isfinite(difference).all() else 0.0
        return Change(float(difference.mean()), spread / count**0.5, count)


@dataclass(frozen=True)
class Step:
    """One plan that a preset tried.

    Attributes:
        size_bytes: of the file, as predicted.
        gradients: where gradients were taken: "none", "original", or "previous" for those at the last plan that was kept.
        linear: predicted change of the loss to first order, in the loss's own unit.
        quadratic: predicted change by the divergence, in the same unit.
        loss: measured change of the loss on the choose split, against the original.
        metric: measured gain of the metric there, positive where better.
        kept: whether the next step started from it.
    """

    size_bytes: int
    gradients: str
    linear: float
    quadratic: float
    loss: Change
    metric: Change
    kept: bool


@dataclass(frozen=True)
class TaskOutcome:
    """What labels say of a model that a preset made.

    Attributes:
        preset: "lossless" or "compact".
        loss_name: which loss.
        drop: points that the metric may fall by; None where that is not limited.
        linear: predicted change of the loss to first order, in the loss's own unit.
        quadratic: predicted change by the divergence, in the same unit.
        unit_loss: what a unit of divergence adds to the loss.
        loss: measured change of the loss on the verify split.
        metric: measured gain of the metric there, positive where better.
        steps: every plan that was tried, with what it measured on the choose split.
        agreement: by site name, how far folds of samples agree about its gradient, from 0 to 1.
        declined: by site name, why it has no linear term.
    """

    preset: str
    loss_name: str
    drop: float | None
    linear: float
    quadratic: float
    unit_loss: float
    loss: Change
    metric: Change
    steps: tuple[Step, ...]
    agreement: Mapping[str, float]
    declined: Mapping[str, str]


def loss_change(reference: Standing, candidate: Standing) -> Change:
    """Of the loss."""
    return Change.of(reference.losses, candidate.losses)


def gain(job: Job, reference: Standing, candidate: Standing) -> Change:
    """Of the metric, positive where the candidate is better."""
    sign = 1.0 if HIGHER_IS_BETTER[job.settings.metric] else -1.0
    return Change.of(sign * reference.scores, sign * candidate.scores)


def stand(job: Job, model: Model, indices: NDArray[Any]) -> Standing:
    """Measure a model on labelled samples.

    Raises:
        InputError: the labels do not fit the outputs.
    """
    names = [value.name for value in model.proto.graph.output]
    executor = Executor.of(model, names, job.calibration)
    chunks = list(job.data.feeds(indices, job.calibration.batch))
    losses, scores, rows = [], [], []
    for (_, chunk), outputs in zip(chunks, executor.run(feed for feed, _ in chunks), strict=True):
        labels = job.data.labels(chunk)
        assert labels is not None  # `check_task` saw them
        losses.append(_losses(job, dict(zip(names, outputs, strict=True)), outputs[0], labels))
        scores.append(_scores(job, outputs[0], labels))
        rows.append(chunk)
    return Standing(np.concatenate(losses), np.concatenate(scores), np.concatenate(rows))


def _scores(job: Job, output: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.float64]:
    """The metric of each sample."""
    if len(output) != len(labels):
        raise InputError(f"metric {job.settings.metric}: {len(labels)} labels for {len(output)} rows of output; give one label per row")
    return METRICS[job.settings.metric](output, labels)


def _losses(job: Job, outputs: Mapping[str, NDArray[Any]], first: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.float64]:
    """The loss of each sample."""
    if job.settings.loss == MSE:
        return METRICS["mse"](first, labels)
    if job.settings.loss != CROSS_ENTROPY:
        return np.full(len(labels), float(np.mean(np.asarray(outputs[job.settings.loss], np.float64))))
    logs = log_probabilities(job.kinds[0], first)
    flat = np.asarray(labels).reshape(-1).astype(np.int64)
    if len(flat) != len(logs):
        raise InputError(f"--loss {CROSS_ENTROPY}: {len(flat)} labels for {len(logs)} rows of class scores; give one label per row")
    if len(flat) and not 0 <= flat.min() <= flat.max() < logs.shape[1]:
        raise InputError(
            f"--loss {CROSS_ENTROPY}: labels from {flat.min()} to {flat.max()} for {logs.shape[1]} classes; number classes from 0"
        )
    return np.asarray(-logs[np.arange(len(flat)), flat].reshape(len(labels), -1).mean(1))


def unit_loss(job: Job, indices: NDArray[Any]) -> float:
    """What a unit of divergence adds to the loss, apart from first-order terms: 1 for a cross-entropy and nats.

    A mean square error grows by ‖Δy‖² over the number of entries, and the relative one is ‖Δy‖²∕‖y‖². For the model's own loss nothing is
    known, and 1 is taken.

    Args:
        job: names the loss.
        indices: samples on which outputs are measured.
    """
    if job.settings.loss != MSE or Kind.VALUES not in job.kinds:
        return 1.0
    name = job.original.proto.graph.output[0].name
    executor = Executor.of(job.original, [name], job.calibration)
    squares = [np.square(np.asarray(output, np.float64)) for (output,) in executor.run(f for f, _ in job.data.feeds(indices, 16))]
    mean = float(sum(each.sum() for each in squares) / max(1, sum(each.size for each in squares)))
    return mean * len(job.kinds) if mean > 0 else 1.0
