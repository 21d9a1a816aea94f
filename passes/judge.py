"""Judge finished models: how far one diverges from another on given data, and how fast models are in alternation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from intaglio import __version__

from .data import Source, input_specs, open_dataset
from .errors import InputError
from .facts import DivergenceFacts, FileFacts, LatencyFacts, MetricFacts, SizeFacts
from .job import Settings
from .latency import compare_models, measure
from .load import load
from .options import Progress, Runtime, silent
from .session import open_session
from .verify import compare


@dataclass(frozen=True)
class Verdict:
    """What `verify` prints.

    Attributes:
        intaglio: version of this program.
        status: "met" or "missed" where a limit on the divergence was given, else "measured".
        reference: the original.
        model: the model that is judged.
        size: of both.
        divergence: over all samples.
        agreement: share of samples with the same top class; None where outputs are not class scores.
        metric: None without labels.
        synthetic: the data was random, so no accuracy is claimed.
    """

    intaglio: str
    status: str
    reference: FileFacts
    model: FileFacts
    size: SizeFacts
    divergence: DivergenceFacts
    agreement: float | None
    metric: MetricFacts | None
    synthetic: bool


@dataclass(frozen=True)
class Contestant:
    """A model that was timed against the first one."""

    model: FileFacts
    bytes: int
    latency: LatencyFacts


@dataclass(frozen=True)
class Benchmark:
    """What `bench` prints.

    Attributes:
        intaglio: version of this program.
        reference: the first model.
        bytes: of the first model.
        latency_s: median of one run of the first model.
        candidates: the other models, each with its own measurement against the first.
    """

    intaglio: str
    reference: FileFacts
    bytes: int
    latency_s: float
    candidates: tuple[Contestant, ...]


def verify_models(
    reference: str | Path | onnx.ModelProto,
    model: str | Path | onnx.ModelProto,
    data: Source,
    settings: Settings,
    *,
    error: float | None = None,
    progress: Progress = silent,
) -> Verdict:
    """Compare two models on all samples, or on the first `settings.samples`.

    Args:
        reference: the original.
        model: the model to judge.
        data: the samples.
        settings: labels, metric, kind of the output, runtime and number of samples are used.
        error: most divergence, in the unit of the output's kind.
        progress: shows how far the comparison is.

    Raises:
        InputError: a model or the data is bad, or the models' interfaces differ.
    """
    original, candidate = load(reference), load(model)
    dataset = open_dataset(data, input_specs(original.proto), labels=settings.labels, seed=settings.seed)
    count = len(dataset) if settings.samples is None else min(len(dataset), settings.samples)
    metric = settings.metric if settings.labels else None
    found = compare(
        original,
        candidate,
        dataset,
        np.arange(count),
        settings.runtime,
        kind=settings.kind,
        metric=metric,
        progress=progress,
    )
    return Verdict(
        intaglio=__version__,
        status="measured" if error is None else "met" if found.divergence <= error else "missed",
        reference=FileFacts.of(original),
        model=FileFacts.of(candidate),
        size=SizeFacts.of(original.size_bytes, candidate.size_bytes),
        divergence=DivergenceFacts(found.unit, None, found.divergence, found.samples),
        agreement=found.agreement,
        metric=MetricFacts.of(found),
        synthetic=dataset.synthetic,
    )


def bench_models(
    models: Sequence[str | Path | onnx.ModelProto],
    data: Source,
    runtime: Runtime,
    *,
    pairs: int = 25,
    progress: Progress = silent,
) -> Benchmark:
    """Time every model after the first against the first, on the first sample, in fresh sessions.

    Args:
        models: at least one.
        data: holds inputs of the first model; the others get the same feed.
        runtime: providers and threads.
        pairs: how many times each two are measured after one another.
        progress: shows how far the measurement is.

    Raises:
        InputError: a model or the data is bad, or a model does not take the first one's inputs.
    """
    if pairs < 1:
        raise InputError(f"--pairs {pairs}: expected at least 1; 25 give a stable median")
    loaded = [load(model) for model in models]
    feed = open_dataset(data, input_specs(loaded[0].proto)).first(1)
    sessions = [open_session(model.proto, weights=model.weights, threads=runtime.threads, providers=runtime.providers) for model in loaded]
    candidates = []
    for model, session in progress(list(zip(loaded, sessions, strict=True))[1:], "Timing", len(loaded) - 1):
        latency = compare_models(sessions[0], session, feed, pairs=pairs)
        facts = LatencyFacts.of(latency, runtime.providers, runtime.threads)
        candidates.append(Contestant(FileFacts.of(model), model.size_bytes, facts))
    alone = candidates[0].latency.reference_s if candidates else measure([sessions[0].bind(feed)], rounds=pairs)[0].median_s
    return Benchmark(__version__, FileFacts.of(loaded[0]), loaded[0].size_bytes, alone, tuple(candidates))
