"""Run a model over data and fetch any of its values, in pieces when its weights do not fit in memory.

The main graph is cut to what the fetched values need. When the weights it reads would fill more than a limit, it is cut
once more, into segments that run one after another, each over all feeds and in a session of its own; values that cross a
cut wait in memory until no later segment reads them. Peak memory is then one segment's weights plus those values.

A cut never falls between a weight and the nodes that compute it from initializers alone (a decode program): those nodes
run in every segment that reads their result. Nodes that draw random numbers count as data, so that they run once.
A single node whose weights exceed the limit is a segment of its own: nodes and nested graphs are never divided.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, shape_inference

from .errors import InputError
from .graph import live, nested_graphs, reads, topological
from .model import Model
from .options import Runtime
from .session import CPU, Session, Value, array_bytes, open_session, read_tensor, to_array, to_value
from .weights import WeightStore, is_external

_UNKNOWN_EXPANSION = 16
"""A computed weight of unknown shape counts as this many times the initializers behind it: 2-bit codes as float32."""

_SHAPE_DATA_BYTES = 1024
"""Initializers up to this size may hold shapes, so that shape inference gets to see their contents."""

_RANDOM_OPS = frozenset(("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"))

_IR_OF_OPTIONAL_INPUTS = 4
"""Before this IR version an initializer had to be listed as an input too, and could not be fed."""

_State: TypeAlias = dict[str, Value]
"""What is in memory for one feed: value name → value."""


class Executor:
    """Runs a model on feeds and returns the values asked for.

    Nothing is kept between runs except, for a model that runs in one piece, its session.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        weights: WeightStore | None,
        fetches: Sequence[str],
        *,
        threads: int = 1,
        providers: Sequence[str] = (CPU,),
        memory_limit_bytes: int = 1 << 29,
    ) -> None:
        """Plan the segments, and load the model when there is only one.

        Args:
            proto: the model; it is read, never changed, and must not change while the executor lives.
            weights: resolves external tensors of `proto`; None when all are embedded.
            fetches: names of values of the main graph: outputs, inputs, initializers or anything in between.
            threads: intra-op threads.
            providers: execution providers in order of preference.
            memory_limit_bytes: most bytes of expanded weights that one segment may read.

        Raises:
            InputError: a fetched value does not exist, or ONNX Runtime cannot load the model.
        """
        self._weights = weights
        self._fetches = tuple(fetches)
        self._threads = threads
        self._providers = tuple(providers)
        self._graph = _Graph(proto, self._fetches)
        self._segments = _plan(self._graph, memory_limit_bytes)
        self._session = self._open(self._segments[0]) if len(self._segments) == 1 else None

    @staticmethod
    def of(model: Model, fetches: Sequence[str], runtime: Runtime) -> Executor:
        """An executor of a model under a job's settings; see `__init__`."""
        return Executor(
            model.proto,
            model.weights,
            fetches,
            threads=runtime.threads,
            providers=runtime.providers,
            memory_limit_bytes=runtime.memory_limit_bytes,
        )

    @property
    def segment_count(self) -> int:
        """How many sessions one run takes; 0 when every fetched value is an input or an initializer."""
        return len(self._segments)

    def run(self, feeds: Iterable[Mapping[str, NDArray[Any]]]) -> Iterator[list[NDArray[Any]]]:
        """Yield the fetched values of each feed, in the order of the feeds and of `fetches`.

        A model in one piece streams; one in several reads all feeds before it yields the first result. A fed array
        must not change until its results are out.

        Args:
            feeds: input name → array; names that the model does not know are ignored.

        Raises:
            InputError: a feed lacks an input, or the model refuses its type or shape.
        """
        states: Iterable[_State] = map(self._start, feeds)
        kinds: dict[str, str] = {}
        for segment in self._segments[:-1]:
            states = list(states)
            kinds |= self._advance(segment, states, kinds)
        session = self._session
        if len(self._segments) > 1:
            states = list(states)
            session = self._open(self._segments[-1], states, kinds)
        for state in states:
            if session is not None:
                _step(session, self._segments[-1], state)
            yield [self._fetch(name, state) for name in self._fetches]
            state.clear()

    def run_feed(self, feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Return the fetched values of one feed; see `run`."""
        return next(self.run([feed]))

    def _start(self, feed: Mapping[str, NDArray[Any]]) -> _State:
        return {name: to_value(array) for name, array in feed.items() if name in self._graph.inputs}

    def _advance(self, segment: _Segment, states: Sequence[_State], kinds: Mapping[str, str]) -> dict[str, str]:
        """Run a segment on every state, and return the types of the values it adds."""
        session = self._open(segment, states, kinds)
        for state in states:
            _step(session, segment, state)
        return dict(zip(session.outputs, session.output_types, strict=True))

    def _fetch(self, name: str, state: _State) -> NDArray[Any]:
        if name in state:
            return to_array(state[name])
        if name in self._graph.initializers:
            return read_tensor(self._graph.initializers[name], self._weights)
        raise InputError(f"input {name!r} is asked for, but the data lacks it; add an array of that name")

    def _open(self, segment: _Segment, states: Sequence[_State] = (), kinds: Mapping[str, str] | None = None) -> Session:
        """Load a segment; `states` and `kinds` give the shapes and types of what earlier segments computed."""
        source = self._graph
        model = onnx.ModelProto(
            ir_version=source.proto.ir_version, opset_import=source.proto.opset_import, functions=source.proto.functions
        )
        model.graph.name = source.proto.graph.name
        model.graph.node.extend(source.nodes[index] for index in segment.nodes)
        for name in segment.inputs:
            declared = source.inputs.get(name)
            model.graph.input.append(declared or _boundary(name, (kinds or {})[name], [state[name] for state in states]))
        model.graph.output.extend(source.declared.get(name, onnx.ValueInfoProto(name=name)) for name in segment.outputs)
        used = {name for index in segment.nodes for name in source.reads[index]}
        model.graph.sparse_initializer.extend(tensor for tensor in source.proto.graph.sparse_initializer if tensor.values.name in used)
        return open_session(
            model,
            weights=self._weights,
            initializers=[tensor for name, tensor in source.initializers.items() if name in used],
            threads=self._threads,
            providers=self._providers,
            repack=len(self._segments) == 1,
        )


@dataclass(frozen=True)
class _Segment:
    """A part of the main graph that runs in one session.

    Attributes:
        nodes: indices of nodes in running order, with those that compute the segment's weights from initializers.
        inputs: the values it reads that are fed or come from earlier segments.
        outputs: the values it computes that later segments or the caller read.
        spent: the values in memory that nobody reads after it.
    """

    nodes: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    spent: tuple[str, ...]


class _Graph:
    """The part of a main graph that fetched values need, indexed.

    Attributes:
        proto: the whole model.
        fetches: the names of the fetched values.
        nodes: the nodes needed, each after those it reads from.
        reads: for each node, the values of the main graph that it and its nested graphs read, sorted.
        producer: value name → index of the node that computes it.
        inputs: what can be fed; from IR version 4 on, that includes initializers that are listed as inputs.
        initializers: dense initializers by name.
        constants: names of the initializers, dense and sparse, that cannot be fed.
        declared: what the graph says about the types of its inputs, outputs and other values.
    """

    def __init__(self, proto: onnx.ModelProto, fetches: Sequence[str]) -> None:
        graph = proto.graph
        positions, _ = live(graph, fetches)
        self.proto = proto
        self.fetches = frozenset(fetches)
        self.nodes = topological([graph.node[position] for position in sorted(positions)])
        self.reads = [sorted(reads(node)) for node in self.nodes]
        self.producer = {name: index for index, node in enumerate(self.nodes) for name in node.output if name}
        self.initializers: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        sparse = {tensor.values.name for tensor in graph.sparse_initializer}
        fixed = sparse | (self.initializers.keys() if proto.ir_version < _IR_OF_OPTIONAL_INPUTS else set())
        self.inputs: dict[str, onnx.ValueInfoProto] = {value.name: value for value in graph.input if value.name not in fixed}
        self.constants = (self.initializers.keys() | sparse) - self.inputs.keys()
        self.declared: dict[str, onnx.ValueInfoProto] = {value.name: value for value in (*graph.value_info, *graph.output, *graph.input)}
        for name in fetches:
            if name not in self.producer and name not in self.inputs and name not in self.initializers:
                raise InputError(
                    f"value {name!r} is not in the main graph of model {graph.name!r}; "
                    f"expected one of its inputs, initializers or node outputs"
                )

    def weight_nodes(self) -> list[int]:
        """The nodes whose results depend on initializers alone, in running order; those of fetched values are left out."""
        fixed = set(self.constants)
        found = []
        for index, node in enumerate(self.nodes):
            if fixed.issuperset(self.reads[index]) and self.fetches.isdisjoint(node.output) and not _is_random(node):
                fixed.update(node.output)
                found.append(index)
        return found


def _plan(graph: _Graph, limit_bytes: int) -> tuple[_Segment, ...]:
    """Cut the graph, greedily in running order, into segments whose expanded weights fit the limit."""
    weight_nodes = graph.weight_nodes()
    sizes = _weight_sizes(graph, weight_nodes)
    groups: list[list[int]] = []
    held: set[str] = set()
    for index in sorted(set(range(len(graph.nodes))) - set(weight_nodes)):
        weights = {name for name in graph.reads[index] if name in sizes}
        if not groups or (held and weights - held and sum(sizes[name] for name in held | weights) > limit_bytes):
            groups.append([])
            held = set()
        groups[-1].append(index)
        held |= weights

    last_reader = {name: position for position, group in enumerate(groups) for index in group for name in graph.reads[index]}
    made = [{name for index in group for name in graph.nodes[index].output if name} for group in groups]
    segments = []
    for position, group in enumerate(groups):
        read = dict.fromkeys(name for index in group for name in graph.reads[index])
        support = _closure(graph, read, weight_nodes)
        supported = {name for index in support for name in graph.nodes[index].output}
        segments.append(
            _Segment(
                nodes=(*support, *group),
                inputs=tuple(name for name in read if name not in made[position] | supported and name not in graph.constants),
                outputs=tuple(
                    name
                    for index in group
                    for name in graph.nodes[index].output
                    if name and (name in graph.fetches or last_reader.get(name, position) > position)
                ),
                spent=tuple(name for name in last_reader if last_reader[name] == position and name not in graph.fetches),
            )
        )
    return tuple(segments)


def _step(session: Session, segment: _Segment, state: _State) -> None:
    """Run a segment on a state: add what it computes and drop what nobody reads any more."""
    state |= zip(segment.outputs, session.run(segment.outputs, state), strict=True)
    for name in segment.spent:
        state.pop(name, None)


def _closure(graph: _Graph, names: Iterable[str], weight_nodes: Iterable[int]) -> tuple[int, ...]:
    """The weight nodes behind the named values, in running order."""
    needed: set[int] = set()
    pending = [graph.producer[name] for name in names if name in graph.producer]
    allowed = set(weight_nodes)
    while pending:
        index = pending.pop()
        if index in allowed and index not in needed:
            needed.add(index)
            pending.extend(graph.producer[name] for name in graph.reads[index] if name in graph.producer)
    return tuple(index for index in weight_nodes if index in needed)


def _is_random(node: onnx.NodeProto) -> bool:
    return node.op_type in _RANDOM_OPS or any(_is_random(inner) for _, graph in nested_graphs(node) for inner in graph.node)


def _weight_sizes(graph: _Graph, weight_nodes: Iterable[int]) -> dict[str, int]:
    """Bytes of every initializer and of every value that the weight nodes compute: value name → bytes.

    Computed values are sized by shape inference; where that fails, by `_UNKNOWN_EXPANSION` times what they are made from.
    """
    sizes = {name: array_bytes(tensor.data_type, tensor.dims) for name, tensor in graph.initializers.items()}
    for sparse in graph.proto.graph.sparse_initializer:
        sizes[sparse.values.name] = array_bytes(sparse.values.data_type, sparse.dims)
    inferred = _inferred_sizes(graph, weight_nodes)
    for index in weight_nodes:
        made_from = sum(sizes[name] for name in graph.reads[index])
        for name in filter(None, graph.nodes[index].output):
            sizes[name] = inferred.get(name, _UNKNOWN_EXPANSION * made_from)
    return sizes


def _inferred_sizes(graph: _Graph, weight_nodes: Iterable[int]) -> dict[str, int]:
    """Bytes of the values that the weight nodes compute, as far as shape inference knows them: value name → bytes."""
    skeleton = onnx.ModelProto(ir_version=graph.proto.ir_version, opset_import=graph.proto.opset_import, functions=graph.proto.functions)
    skeleton.graph.node.extend(graph.nodes[index] for index in weight_nodes)
    for name in dict.fromkeys(name for index in weight_nodes for name in graph.reads[index] if name in graph.initializers):
        tensor = graph.initializers[name]
        skeleton.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
        small = array_bytes(tensor.data_type, tensor.dims) <= _SHAPE_DATA_BYTES
        if small and not is_external(tensor):
            skeleton.graph.initializer.append(tensor)
    sizes = {}
    for value in shape_inference.infer_shapes(skeleton).graph.value_info:
        tensor_type = value.type.tensor_type
        dims = [dim.dim_value for dim in tensor_type.shape.dim if dim.HasField("dim_value")]
        if tensor_type.elem_type and tensor_type.HasField("shape") and len(dims) == len(tensor_type.shape.dim):
            sizes[value.name] = array_bytes(tensor_type.elem_type, dims)
    return sizes


def _boundary(name: str, kind: str, values: Sequence[Value]) -> onnx.ValueInfoProto:
    """Declare a value that crosses a cut: its type, and for a tensor its rank and the axes on which all feeds agree."""
    declared = onnx.ValueInfoProto(name=name, type=_type_of(kind))
    if not declared.type.HasField("tensor_type"):
        return declared
    shapes = {tuple(value.shape if isinstance(value, np.ndarray) else value.shape()) for value in values}
    if len({len(shape) for shape in shapes}) == 1:
        declared.type.tensor_type.shape.SetInParent()
        for lengths in zip(*shapes, strict=True):
            dim = declared.type.tensor_type.shape.dim.add()
            if len(set(lengths)) == 1:
                dim.dim_value = lengths[0]
    return declared


def _type_of(kind: str) -> onnx.TypeProto:
    """Read a type in ONNX Runtime's notation, such as "tensor(float)" or "seq(tensor(int64))"."""
    outer, _, inner = kind.removesuffix(")").partition("(")
    if outer == "tensor":
        return helper.make_tensor_type_proto(TensorProto.DataType.Value(inner.upper()), shape=None)
    if outer == "seq":
        return helper.make_sequence_type_proto(_type_of(inner))
    if outer == "optional":
        return helper.make_optional_type_proto(_type_of(inner))
    raise InputError(f"a value of type {kind} cannot cross from one segment of a model to the next; raise the memory limit")
