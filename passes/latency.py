"""How long things take: interleaved, repeated, and compared pair by pair.

A machine's speed drifts by more than the differences that matter here, so nothing is timed on its own: all contestants run
in every round, in random order, each for long enough that the clock and the call cost nothing. Medians are reported.

Micro-models are measured once per *structure*: operators, attributes, types and shapes, but neither names nor the values
of weights. Latencies that depend on values (denormal or mostly zero activations) are not seen.
"""

from __future__ import annotations

import functools
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from .cache import Cache, Json, digest
from .errors import InputError
from .graph import initializer_names, nested_graphs
from .session import CPU, RUNTIME_VERSION, Session, open_session
from .weights import is_external

_NAMESPACE = "latency-3"
_SAMPLE_S = 2e-3  # one sample repeats a run until it lasts this long: the clock's and scheduler's noise is some 10 µs
_MIN_ROUNDS = 5
_MAX_ROUNDS = 101
_WARM_UP_RUNS = 2
_SHAPE_ELEMENTS = 64
"""Integer tensors up to this many elements hold shapes, axes and the like: their values are part of the structure."""


@dataclass(frozen=True)
class Timing:
    """What one contestant took.

    Attributes:
        median_s: median seconds of one run.
        minimum_s: least seconds of one run.
        samples_s: (rounds,), float64: seconds of one run, averaged over each round's repetitions; index i of every
            contestant was taken in the same round.
    """

    median_s: float
    minimum_s: float
    samples_s: NDArray[Any]


@dataclass(frozen=True, eq=False)
class PairedLatency:
    """Two models' latency, measured in alternation, once or more often.

    Attributes:
        measurements: (pairs, 2) float64 each: seconds of one run of the reference and of the candidate, averaged over the repetitions of
            each pair.
    """

    measurements: tuple[NDArray[np.float64], ...]

    def __add__(self, other: PairedLatency) -> PairedLatency:
        return PairedLatency((*self.measurements, *other.measurements))

    @property
    def pairs(self) -> int:
        """How many pairs were measured."""
        return sum(map(len, self.measurements))

    @property
    def reference_s(self) -> float:
        """Median seconds of one run of the reference."""
        return float(np.median(np.concatenate(self.measurements)[:, 0]))

    @property
    def candidate_s(self) -> float:
        """Median seconds of one run of the candidate."""
        return float(np.median(np.concatenate(self.measurements)[:, 1]))

    @property
    def ratios(self) -> tuple[float, ...]:
        """Of each measurement, the ratio of the two medians. A machine may be faster in one than in another, but both models were in it."""
        return tuple(float(second / first) for first, second in (np.median(each, 0) for each in self.measurements))

    @property
    def ratio(self) -> float:
        """Geometric mean of the measurements' ratios, by their pairs: candidate_s / reference_s of a single one."""
        if len(self.ratios) == 1:
            return self.ratios[0]
        return float(np.exp(np.average(np.log(self.ratios), weights=[len(each) for each in self.measurements])))

    @property
    def ratio_low(self) -> float:
        """Lower quartile of the ratio within a pair."""
        return self._quantile(0.25)

    @property
    def ratio_high(self) -> float:
        """Upper quartile of the ratio within a pair."""
        return self._quantile(0.75)

    def _quantile(self, share: float) -> float:
        first, second = np.concatenate(self.measurements).T
        return float(np.quantile(second / first, share))


def measure(
    contestants: Sequence[Callable[[], object]],
    *,
    budget_s: float = 0.2,
    rounds: int | None = None,
    sample_s: float = _SAMPLE_S,
    seed: int = 0,
) -> list[Timing]:
    """Time functions against each other.

    Args:
        contestants: what to time; each runs in every round, and rounds differ in order.
        budget_s: about how many seconds to spend after warming up; at least 5 rounds are made.
        rounds: how many rounds to make instead.
        sample_s: how long one contestant runs per round, at least.
        seed: of the orders.
    """
    repetitions = []
    round_s = 0.0
    for run in contestants:
        for _ in range(_WARM_UP_RUNS):
            run()
        once_s = max(min(_seconds(run, 1) for _ in range(_WARM_UP_RUNS)), 1e-9)
        repetitions.append(max(1, math.ceil(sample_s / once_s)))
        round_s += repetitions[-1] * once_s
    rounds = rounds or min(max(math.ceil(budget_s / round_s), _MIN_ROUNDS), _MAX_ROUNDS)
    samples_s = np.empty((rounds, len(contestants)))
    generator = np.random.default_rng(seed)
    for row in samples_s:
        for index in generator.permutation(len(contestants)):
            row[index] = _seconds(contestants[index], repetitions[index])
    return [Timing(float(np.median(column)), float(column.min()), column) for column in samples_s.T]


def compare_models(
    reference: Session | onnx.ModelProto | Path,
    candidate: Session | onnx.ModelProto | Path,
    feed: Mapping[str, NDArray[Any]],
    *,
    threads: int = 1,
    providers: Sequence[str] = (CPU,),
    pairs: int = 25,
    seed: int = 0,
) -> PairedLatency:
    """Measure two models end to end on the same feed.

    Args:
        reference: a session, a file, or a proto without external data.
        candidate: the same for the other model.
        feed: input name → array; inputs that only one of the models has may be in it.
        threads: intra-op threads of the sessions that are opened here.
        providers: execution providers of the sessions that are opened here.
        pairs: how many times to measure the two after one another.
        seed: of the order within the pairs.

    Raises:
        InputError: a model does not load, or the feed does not fit it.
    """
    sessions = [
        model if isinstance(model, Session) else open_session(model, threads=threads, providers=providers)
        for model in (reference, candidate)
    ]
    first, second = measure([session.bind(feed) for session in sessions], rounds=pairs, seed=seed)
    return PairedLatency((np.stack([first.samples_s, second.samples_s], axis=1),))


@dataclass(frozen=True)
class MicroBench:
    """Measures micro-models (one node or a short chain, at real shapes) on random inputs, each structure once.

    Attributes:
        cache: where results are kept; they are valid for this ONNX Runtime, machine, provider and number of threads.
        providers: execution providers in order of preference.
        threads: intra-op threads.
        budget_s: about how many seconds one measurement takes.
    """

    cache: Cache
    providers: tuple[str, ...] = (CPU,)
    threads: int = 1
    budget_s: float = 0.1

    def seconds(self, model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]], *, index_limit: int = 2) -> float:
        """Return the median seconds of one run; see `pair` for the arguments. For comparisons, `pair` is more exact."""
        (median_s,) = self._medians([model], shapes, index_limit)
        return median_s

    def pair(
        self,
        reference: onnx.ModelProto,
        candidate: onnx.ModelProto,
        shapes: Mapping[str, Sequence[int]],
        *,
        index_limit: int = 2,
    ) -> tuple[float, float]:
        """Return the median seconds of one run of two models with the same inputs, measured in alternation.

        Args:
            reference: the original node.
            candidate: what would replace it.
            shapes: input name → shape; types are those that the model declares.
            index_limit: integer inputs are drawn from 0 up to, not including, this: the number of rows of a table.

        Raises:
            InputError: a model does not load or does not run at these shapes.
        """
        reference_s, candidate_s = self._medians([reference, candidate], shapes, index_limit)
        return reference_s, candidate_s

    def runner(self, model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]], *, index_limit: int = 2) -> Callable[[], object]:
        """Return a function that runs a model once on random inputs, for `measure`; see `pair` for the arguments."""
        session = open_session(model, threads=self.threads, providers=self.providers)
        return session.bind(random_feed(model, shapes, index_limit=index_limit))

    def _medians(self, models: Sequence[onnx.ModelProto], shapes: Mapping[str, Sequence[int]], index_limit: int) -> list[float]:
        key = digest(
            [structure(model, shapes) for model in models],
            [index_limit, RUNTIME_VERSION, machine(), list(self.providers), self.threads],
        )
        known = self.cache.get_json(_NAMESPACE, key)
        if isinstance(known, list):
            return [float(value) for value in known]
        runs = [self.runner(model, shapes, index_limit=index_limit) for model in models]
        medians_s = [timing.median_s for timing in measure(runs, budget_s=self.budget_s)]
        self.cache.put_json(_NAMESPACE, key, list(medians_s))
        return medians_s


def random_feed(
    model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]], *, index_limit: int = 2, seed: int = 0
) -> dict[str, NDArray[Any]]:
    """Draw arrays for the inputs of a model.

    Args:
        model: declares the types: floats are drawn from N(0, 1), integers below `index_limit`, bools evenly.
        shapes: input name → shape.
        index_limit: bound of the integers, not included.
        seed: of the numbers.

    Raises:
        InputError: an input has no shape, or holds anything but numbers.
    """
    generator = np.random.default_rng(seed)
    feed = {}
    for value in _inputs(model):
        if value.name not in shapes:
            raise InputError(f"input {value.name!r} of model {model.graph.name!r} has no shape to draw; name one")
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = tuple(shapes[value.name])
        if dtype.kind in "iu":
            feed[value.name] = generator.integers(0, min(index_limit, np.iinfo(dtype).max), shape, dtype)
        elif dtype.kind in "bfV":
            numbers = generator.standard_normal(shape)
            feed[value.name] = np.asarray(numbers > 0 if dtype.kind == "b" else numbers).astype(dtype)
        else:
            raise InputError(f"input {value.name!r} of model {model.graph.name!r} holds {dtype}; expected numbers")
    return feed


def structure(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> str:
    """A digest of what a model's latency at given input shapes depends on; equal for models that differ in names and weights.

    Args:
        model: a micro-model.
        shapes: input name → shape.
    """
    names: dict[str, int] = {}
    return digest(
        sorted([opset.domain, opset.version] for opset in model.opset_import),
        [[_number(names, v.name), v.type.tensor_type.elem_type, _declared(v), list(shapes.get(v.name, ()))] for v in _inputs(model)],
        _graph_structure(model.graph, names),
        [
            [function.domain, function.name, _numbers(names, function.input), _numbers(names, function.output)]
            + [_node_structure(node, names) for node in function.node]
            for function in model.functions
        ],
    )


def _declared(value: onnx.ValueInfoProto) -> list[int] | None:
    """The lengths that a model declares for an input, -1 where one is open: what is known when it is loaded decides how it is optimized."""
    tensor = value.type.tensor_type
    return [d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim] if tensor.HasField("shape") else None


@functools.cache
def machine() -> str:
    """What latencies depend on besides software: the processor's model and how many cores there are."""
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            field, _, value = line.partition(":")
            if field.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _seconds(run: Callable[[], object], repetitions: int) -> float:
    start_s = time.perf_counter()
    for _ in range(repetitions):
        run()
    return (time.perf_counter() - start_s) / repetitions


def _inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    initialized = initializer_names(model.graph)
    return [value for value in model.graph.input if value.name not in initialized]


def _graph_structure(graph: onnx.GraphProto, names: dict[str, int]) -> Json:
    return [
        _numbers(names, (value.name for value in graph.input)),
        [[_number(names, tensor.name), _tensor_structure(tensor)] for tensor in graph.initializer],
        [[_number(names, tensor.values.name), list(tensor.dims), _tensor_structure(tensor.values)] for tensor in graph.sparse_initializer],
        [_node_structure(node, names) for node in graph.node],
        _numbers(names, (value.name for value in graph.output)),
    ]


def _node_structure(node: onnx.NodeProto, names: dict[str, int]) -> Json:
    attributes: list[Json] = []
    for attribute in sorted(node.attribute, key=lambda attribute: attribute.name):
        plain = onnx.AttributeProto()
        plain.CopyFrom(attribute)
        for field in ("t", "g", "tensors", "graphs", "doc_string"):
            plain.ClearField(field)
        tensors = (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors)
        attributes.append([plain.SerializeToString(deterministic=True).hex(), *map(_tensor_structure, tensors)])
    graphs = [_graph_structure(graph, names) for _, graph in nested_graphs(node)]
    return [node.domain, node.op_type, _numbers(names, node.input), _numbers(names, node.output), attributes, graphs]


def _tensor_structure(tensor: TensorProto) -> Json:
    shape_like = tensor.data_type in (TensorProto.INT32, TensorProto.INT64) and math.prod(tensor.dims) <= _SHAPE_ELEMENTS
    values: Json = numpy_helper.to_array(tensor).tolist() if shape_like and not is_external(tensor) else None
    return [tensor.data_type, list(tensor.dims), values]


def _number(names: dict[str, int], name: str) -> int:
    """The number that stands for a name: its position among the names seen so far; -1 for an omitted input."""
    return names.setdefault(name, len(names)) if name else -1


def _numbers(names: dict[str, int], several: Iterable[str]) -> list[Json]:
    return [_number(names, name) for name in several]
