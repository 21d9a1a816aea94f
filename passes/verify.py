"""Compare two models on held-out data: divergence of the outputs, agreement, and the task's metric where there are labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from .data import Dataset, input_specs
from .divergence import Divergence, output_kinds
from .errors import InputError
from .execute import Executor
from .metric import Metric
from .model import Model
from .options import Progress, Runtime, silent


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured.

    Attributes:
        unit: "kl_nats" or "relative_mse".
        divergence: of the candidate's outputs from the reference's.
        agreement: share of samples with the same top class; None where outputs are not class scores.
        metric: name of the metric; None without labels.
        reference_metric: of the reference.
        candidate_metric: of the candidate.
        samples: how many samples were compared.
    """

    unit: str
    divergence: float
    agreement: float | None
    metric: str | None
    reference_metric: float | None
    candidate_metric: float | None
    samples: int


def check_interface(reference: Model, candidate: Model) -> None:
    """Raise unless two models have the same inputs and outputs.

    Raises:
        InputError: names, types or shapes differ.
    """
    ours, theirs = input_specs(reference.proto), input_specs(candidate.proto)
    if ours != theirs:
        named = [str(spec.name) for spec in ours], [str(spec.name) for spec in theirs]
        raise InputError(f"models: inputs {named[1]} differ from the reference's {named[0]} in name, type or shape; compare like models")
    outputs = [[value.name for value in model.proto.graph.output] for model in (reference, candidate)]
    if outputs[0] != outputs[1]:
        raise InputError(f"models: outputs {outputs[1]} differ from the reference's {outputs[0]}; compare like models")


def compare(
    reference: Model,
    candidate: Model,
    data: Dataset,
    indices: NDArray[Any],
    runtime: Runtime,
    *,
    kind: str = "auto",
    metric: str | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Run both models on the same feeds.

    Args:
        reference: the original.
        candidate: the model to judge.
        data: the samples.
        indices: which of them.
        runtime: how to run.
        kind: what the first output holds; see `output_kinds`.
        metric: the task's metric; needs labels in `data`.
        progress: shows how far the comparison is.

    Raises:
        InputError: the models' interfaces differ, or the metric does not fit.
    """
    check_interface(reference, candidate)
    names = [value.name for value in reference.proto.graph.output]
    executors = [Executor.of(model, names, runtime) for model in (reference, candidate)]
    total = Divergence(output_kinds(reference.proto, kind))
    scores = [Metric(metric), Metric(metric)] if metric is not None else []
    chunks = list(data.feeds(indices, runtime.batch))
    whole = any(executor.segment_count > 1 for executor in executors)
    groups = [chunks] if whole else [[chunk] for chunk in chunks]
    for group in progress(groups, "Verifying", len(groups)):
        feeds = [feed for feed, _ in group]
        results = [list(executor.run(feeds)) for executor in executors]
        for number, (_, rows) in enumerate(group):
            total.add(results[0][number], results[1][number])
            labels = data.labels(rows)
            if labels is not None:
                for score, outputs in zip(scores, results, strict=False):
                    score.add(outputs[number], labels)
    return Comparison(
        total.unit,
        total.value,
        total.agreement,
        metric if scores else None,
        scores[0].value if scores else None,
        scores[1].value if scores else None,
        total.samples,
    )
