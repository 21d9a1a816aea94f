"""Keep masked scores where exponentials are ordinary numbers: a Softmax over them is several times as fast.

A mask adds a huge negative number to scores. Softmax takes e to the power of what is left below each row's maximum; between e^-87 and
e^-104, where kernels stop, float32 numbers are denormal, and processors take a hundred cycles for each. A Clip in front of the Softmax
lifts such scores to where their exponential is an ordinary number, but still nothing beside 1.

Before: Softmax(s). After: Softmax(Clip(s, floor)), with a floor so far below everything seen that no output changes in its last bit on
such samples. A row whose entries all lie below the floor (nothing but masked) becomes uniform, as it is anyway where the mask is so low
that it swallows the scores.

Must not fire on: scores of which a row's maximum, on any sample, comes within `NEAR` of the floor; scores above `REACH`, below which a
floor would be positive; rows of nothing but minus infinity; models before opset 11; values that are not float32, or that a Softmax over
another than the last axis reads; a Softmax, or a model, that is not faster for it, as measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .calibrate import value_shapes
from .execute import Executor
from .floors import REACH, is_softmax, with_floors
from .graph import ValueIndex
from .job import Job
from .latency import compare_models, measure
from .prepare import reopened
from .regions import value_types
from .rewrite import FUNCTION_IR
from .session import open_session
from .sites import opset
from .units import activation_values

MIN_OPSET = 11
"""The opset from which Clip takes its bounds as inputs."""

NEAR = 30.0
"""How far above the floor the maximum of every row has to be: e^-30 is 1e-13, a millionth of what float32 tells from 1."""

SAMPLES = 32
"""Fit samples on which scores are looked at."""

FASTER = 0.8
"""What Clip and Softmax take, relative to the Softmax alone, at most: the effect that is looked for makes it a quarter or less."""


def floored(job: Job) -> Job:
    """The job with a floor below the scores of every Softmax that gets clearly faster by it; the job itself where there is none."""
    if not job.small or opset(job.model.proto) < MIN_OPSET:
        return job
    with job.clock.phase("canonicalize"):
        floors = find_floors(job)
        twin = with_known_floors(job, floors) if floors else job
        return twin if floors and _faster(job, twin) else job


def with_known_floors(job: Job, floors: Mapping[str, float]) -> Job:
    """The job with these floors, by value, as `find_floors` gave them."""
    twin = reopened(job, with_floors(job.model, floors))
    values = activation_values(twin.model, twin.sites.sites, twin.carriers)
    shapes = value_shapes(twin.model, values, job.data.first(1), job.calibration)
    return replace(twin, floors=dict(floors), value_shapes=shapes)


def find_floors(job: Job) -> dict[str, float]:
    """Floors of the scores that a Softmax of the main graph reads, by value."""
    values = list(dict.fromkeys(node.input[0] for node in _softmaxes(job.model.proto)))
    if not values:
        return {}
    executor = Executor.of(job.model, values, job.calibration)
    seen = {name: _Scores() for name in values}
    padded = replace(job.data, trims=())  # as models are run and timed; elsewhere padding is left out
    for feed, _ in padded.feeds(job.splits.fit[: job.data.enough(SAMPLES)], 1):
        for name, scores in zip(values, executor.run_feed(feed), strict=True):
            seen[name].look(scores)
    floors = {name: floor for name, scores in seen.items() if (floor := scores.floor()) is not None}
    return {name: floor for name, floor in floors.items() if _pays(job, seen[name].lowest, floor)}


@dataclass
class _Scores:
    """What is known of the scores that a Softmax reads.

    Attributes:
        highest: of all.
        least_maximum: least maximum of a row.
        lowest: the array with the lowest score.
    """

    highest: float = -np.inf
    least_maximum: float = np.inf
    lowest: NDArray[np.float32] | None = None

    def look(self, scores: NDArray[np.float32]) -> None:
        """Take the scores of a sample in."""
        if scores.size == 0:
            return
        maxima = scores.max(-1)
        maxima = maxima[(maxima > scores.min(-1)) | np.isinf(maxima)]  # rows of one number stay uniform
        self.highest = max(self.highest, float(maxima.max(initial=-np.inf)))
        self.least_maximum = min(self.least_maximum, float(maxima.min(initial=np.inf)))
        if self.lowest is None or scores.min() < self.lowest.min():
            self.lowest = scores

    def floor(self) -> float | None:
        """The floor; None where nothing lies below it or something comes near it."""
        floor = float(np.floor(self.highest - REACH)) if np.isfinite([self.highest, self.least_maximum]).all() else np.nan
        if self.lowest is None or not (floor <= 0 and self.lowest.min() < floor and self.least_maximum >= floor + NEAR):
            return None
        return floor


def _pays(job: Job, scores: NDArray[np.float32] | None, floor: float) -> bool:
    """Whether Clip and Softmax together are clearly faster on some scores than the Softmax."""
    if scores is None:
        return False
    runtime = job.settings.runtime
    runs = []
    for clipped in (False, True):
        session = open_session(_micro(job.model.proto, scores.ndim, floor, clipped), threads=runtime.threads, providers=runtime.providers)
        runs.append(session.bind({"x": scores}))
    before, after = measure(runs, budget_s=0.1)
    return after.median_s <= FASTER * before.median_s


def _faster(job: Job, twin: Job) -> bool:
    """Whether the whole model is faster: a Clip might keep ONNX Runtime from fusing what is around it."""
    runtime = job.settings.runtime
    sessions = [
        open_session(each.model.proto, weights=each.model.weights, threads=runtime.threads, providers=runtime.providers)
        for each in (job, twin)
    ]
    return compare_models(sessions[0], sessions[1], job.data.first(1)).ratio < 1


def _micro(proto: ModelProto, rank: int, floor: float, clipped: bool) -> ModelProto:
    """A Softmax by itself, perhaps with a Clip in front."""
    nodes = [helper.make_node("Clip", ["x", "low"], ["c"])] if clipped else []
    nodes.append(helper.make_node("Softmax", ["c" if clipped else "x"], ["y"], axis=rank - 1))
    low = [numpy_helper.from_array(np.asarray(floor, np.float32), "low")] if clipped else []
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name in "xy"]
    graph = helper.make_graph(nodes, "scores", ends[:1], ends[1:], low)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset(proto))], ir_version=FUNCTION_IR)


def _softmaxes(proto: ModelProto) -> list[NodeProto]:
    """The Softmax nodes of the main graph over the last axis of a computed float32 value that is not read along another axis."""
    types, index = value_types(proto), ValueIndex(proto)
    found, others = [], set[str]()
    for node in proto.graph.node:
        if not is_softmax(node) or index.producer(node.input[0]) is None or node.input[0] not in types:
            continue
        kind = types[node.input[0]]
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), -1 if opset(proto) >= 13 else 1)
        if kind.elem_type == TensorProto.FLOAT and kind.HasField("shape") and axis in (-1, len(kind.shape.dim) - 1):
            found.append(node)
        else:
            others.add(node.input[0])
    return [node for node in found if node.input[0] not in others]
