"""Questions every pass asks of a model's graph: which scopes it has, who defines and who reads a value, what computing one takes.

Nothing here changes the model it is given. A *scope* is a list of nodes with its own names: the main graph, a graph nested in a
node's attributes (the bodies of If, Loop and Scan), or the body of a model-local function. A nested graph sees the names of the
graphs around it, and graphs side by side may use the same name for different values; a function sees only its own names.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from .errors import InputError

Body: TypeAlias = GraphProto | FunctionProto

MAIN = "main"

STANDARD = ("", "ai.onnx")
"""Ways to write the default domain."""


@dataclass(frozen=True, eq=False)
class Scope:
    """One list of nodes with its own names.

    Attributes:
        path: unique label, such as "main", "main/If_3.then_branch" (3 is the node's position) or "function my.domain::Block".
        body: the graph or function itself, not a copy.
        parent: the scope whose names this one also sees; None for the main graph and for functions.
        defines: names of the inputs, initializers and node outputs of `body`.
    """

    path: str
    body: Body
    parent: Scope | None
    defines: frozenset[str]


@dataclass(frozen=True, eq=False)
class Use:
    """`node.input[index]` of a node in `scope` reads the value."""

    node: NodeProto
    index: int
    scope: Scope


@dataclass(frozen=True, eq=False)
class Producer:
    """`node.output[index]` of a node in `scope` is the value."""

    node: NodeProto
    index: int
    scope: Scope


def nested_graphs(node: NodeProto) -> Iterator[tuple[str, GraphProto]]:
    """The graphs in a node's attributes, each with a label: the attribute's name, and a position if it holds several."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.name, attribute.g
        for position, graph in enumerate(attribute.graphs):
            yield f"{attribute.name}[{position}]", graph


def defined_names(body: Body) -> set[str]:
    """Names of the inputs, initializers and node outputs of one scope; nested graphs not included."""
    names = {name for node in body.node for name in node.output}
    if isinstance(body, FunctionProto):
        names.update(body.input)
    else:
        names.update(value.name for value in body.input)
        names.update(initializer_names(body))
    names.discard("")
    return names


def initializer_names(graph: GraphProto) -> set[str]:
    """Names of the dense and sparse initializers of a graph."""
    return {tensor.name for tensor in graph.initializer} | {tensor.values.name for tensor in graph.sparse_initializer}


def output_names(body: Body) -> list[str]:
    """Names of the outputs of a graph or function, in order."""
    return list(body.output) if isinstance(body, FunctionProto) else [value.name for value in body.output]


def reads(node: NodeProto) -> set[str]:
    """Names that a node reads from its scope: its inputs, and what its nested graphs capture."""
    names = set(node.input)
    for _, graph in nested_graphs(node):
        names |= captures(graph)
    names.discard("")
    return names


def captures(graph: GraphProto) -> set[str]:
    """Names that a nested graph takes from the scopes around it."""
    names = set(output_names(graph)).union(*(reads(node) for node in graph.node))
    return names - defined_names(graph)


def scopes(proto: ModelProto) -> Iterator[Scope]:
    """Every scope of a model, a parent before its children: the main graph first, the functions last."""
    yield from _scopes(MAIN, proto.graph, None)
    for function in proto.functions:
        overload = f":{function.overload}" if function.overload else ""
        yield from _scopes(f"function {function.domain}::{function.name}{overload}", function, None)


def _scopes(path: str, body: Body, parent: Scope | None) -> Iterator[Scope]:
    scope = Scope(path, body, parent, frozenset(defined_names(body)))
    yield scope
    for position, node in enumerate(body.node):
        for label, graph in nested_graphs(node):
            yield from _scopes(f"{path}/{node.op_type}_{position}.{label}", graph, scope)


class ValueIndex:
    """Who defines and who reads each value, at the time of construction; a later change to the model is not seen.

    Every question is a name and the scope where it is written (the main graph by default), because graphs side by
    side may use the same name. Being an output of a graph is not a use: see `output_names`.
    """

    def __init__(self, proto: ModelProto) -> None:
        self._scopes = {scope.path: scope for scope in scopes(proto)}
        self._uses: defaultdict[tuple[str, str], list[Use]] = defaultdict(list)
        self._producers: dict[tuple[str, str], Producer] = {}
        for scope in self._scopes.values():
            for node in scope.body.node:
                for index, name in enumerate(node.input):
                    if name:
                        self._uses[self.home(name, scope).path, name].append(Use(node, index, scope))
                for index, name in enumerate(node.output):
                    if name:
                        self._producers[scope.path, name] = Producer(node, index, scope)

    def home(self, name: str, scope: Scope | None = None) -> Scope:
        """The scope that defines `name` as seen from `scope`; the outermost one around it if none does."""
        scope = scope or self._scopes[MAIN]
        while name not in scope.defines and scope.parent is not None:
            scope = scope.parent
        return scope

    def uses(self, name: str, scope: Scope | None = None) -> tuple[Use, ...]:
        """Every node input that reads the value called `name` in `scope`, those of nested graphs included."""
        return tuple(self._uses.get((self.home(name, scope).path, name), ()))

    def producer(self, name: str, scope: Scope | None = None) -> Producer | None:
        """The node output that is the value called `name` in `scope`; None for inputs, initializers and unknown names."""
        return self._producers.get((self.home(name, scope).path, name))


def live(body: Body, names: Iterable[str]) -> tuple[set[int], set[str]]:
    """What computing `names` takes.

    Returns:
        The positions in `body.node` of the nodes needed, and every name read on the way, `names` included.
    """
    producers = {name: position for position, node in enumerate(body.node) for name in node.output if name}
    positions: set[int] = set()
    needed: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name in needed:
            continue
        needed.add(name)
        position = producers.get(name)
        if position is not None and position not in positions:
            positions.add(position)
            pending.extend(reads(body.node[position]))
    return positions, needed


def downstream(proto: ModelProto, names: Iterable[str]) -> set[str]:
    """The given values of the main graph and all that are computed from them; everything else is as it was once they change."""
    found = set(names)
    for node in proto.graph.node:  # in running order
        if not found.isdisjoint(reads(node)):
            found.update(node.output)
    found.discard("")
    return found


def topological(nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """The nodes, each after those it reads from, otherwise as near to the given order as that allows.

    Raises:
        InputError: the nodes form a cycle.
    """
    producers = {name: position for position, node in enumerate(nodes) for name in node.output if name}
    readers: defaultdict[int, list[int]] = defaultdict(list)
    missing: list[int] = []
    for position, node in enumerate(nodes):
        sources = {producers[name] for name in reads(node) if name in producers}
        missing.append(len(sources))
        for source in sources:
            readers[source].append(position)
    ready = [position for position, count in enumerate(missing) if count == 0]
    order: list[NodeProto] = []
    while ready:
        position = heapq.heappop(ready)
        order.append(nodes[position])
        for reader in readers[position]:
            missing[reader] -= 1
            if missing[reader] == 0:
                heapq.heappush(ready, reader)
    if len(order) < len(nodes):
        stuck = next(node for position, node in enumerate(nodes) if missing[position])
        what = f"node '{stuck.name}' ({stuck.op_type})"
        raise InputError(f"{what} needs its own output, expected a graph without cycles; export the model again")
    return order


def field_size(message: NodeProto | TensorProto | ValueInfoProto) -> int:
    """Exact bytes that `message` costs as one more element of a repeated field numbered below 16 (node, initializer, …)."""
    payload_bytes: int = message.ByteSize()
    length_bytes = max(1, -(-payload_bytes.bit_length() // 7))
    return 1 + length_bytes + payload_bytes


def all_names(proto: ModelProto) -> set[str]:
    """Every value and node name in every scope: what a new name must avoid."""
    names: set[str] = set()
    for scope in scopes(proto):
        names |= scope.defines
        for node in scope.body.node:
            names.add(node.name)
            names.update(node.input)
        names.update(output_names(scope.body))
    names.discard("")
    return names


def constant_tensors(proto: ModelProto) -> dict[str, TensorProto]:
    """Initializers and the tensors of Constant nodes in the main graph, by the names of their values."""
    found = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.domain in STANDARD and node.attribute and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return found


def int_attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((a.i for a in node.attribute if a.name == name), default)
