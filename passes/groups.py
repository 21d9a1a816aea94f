"""Channel groups, and what is known of them while a model's channels are followed.

A *channel group* is a set of channels that are kept or dropped together. It begins with what a layer writes, goes on through the operators
that hand channels on (`passes.channelwise`), takes in what meets it, and ends with the layers that read it (`passes.channels`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from intaglio.ops.emit import Spec

from .graph import ValueIndex, constant_tensors, output_names
from .model import Model
from .rewrite import ghost_tensor
from .sites import Site

_SMALL_ELEMENTS = 1 << 10
"""Larger initializers are shown to shape inference without their values."""


@dataclass(frozen=True)
class Reader:
    """A site that reads the channels.

    Attributes:
        site: its name.
        block: inputs of its matrix view per channel: the size of a Conv's kernel, or of the image behind a Flatten.
    """

    site: str
    block: int


@dataclass(frozen=True)
class Slice:
    """An initializer that holds `block` entries per channel along one axis.

    Attributes:
        initializer: its name.
        axis: counted from the front.
        block: consecutive entries per channel.
    """

    initializer: str
    axis: int
    block: int


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are kept or dropped together.

    Attributes:
        name: unique: the first value that holds them.
        size: number of channels.
        producers: names of the sites whose outputs they are; their weights lose rows.
        consumers: the sites that read them; a site may be both.
        slices: constants that lose entries, among them the producers' biases and depthwise weights.
        biases: initializers among `slices` that are a producer's own bias.
        depthwise: names of the sites whose weights are among `slices`.
        grouped: first outputs of the depthwise operators, whose attribute `group` is the number of channels.
        reshapes: shape initializers that spell out the number of channels → what they have to be instead, however many stay.
        values: names of all values that hold the channels; what is written about their shapes becomes wrong.
        reason: why the channels cannot be cut; None where they can.
    """

    name: str
    size: int
    producers: tuple[str, ...]
    consumers: tuple[Reader, ...]
    slices: tuple[Slice, ...]
    biases: tuple[str, ...]
    depthwise: tuple[str, ...]
    grouped: tuple[str, ...]
    reshapes: Mapping[str, tuple[int, int]]
    values: tuple[str, ...]
    reason: str | None

    @property
    def prunable(self) -> bool:
        """Whether channels can be cut."""
        return self.reason is None


@dataclass(frozen=True)
class Layout:
    """Where a value holds the channels of a group.

    Attributes:
        group: number of the group when the value was met; `Grouping.draft` says what it has become part of.
        axis: counted from the end, 1 for the last: what broadcasting goes by.
        rank: number of axes; None where it is not known.
        flat: whether each channel has a block of entries along the axis instead of one.
    """

    group: int
    axis: int
    rank: int | None
    flat: bool = False

    @property
    def front(self) -> int | None:
        """The axis counted from the front."""
        return None if self.rank is None else self.rank - self.axis

    @property
    def second(self) -> bool:
        """Whether it is known that channels lie along the second axis, as images have them."""
        return self.front == 1


@dataclass(eq=False)
class Draft:
    """A group while it is found: the fields of `ChannelGroup`, with every single use of a constant."""

    name: str
    size: int
    producers: list[str] = field(default_factory=list)
    consumers: list[Reader] = field(default_factory=list)
    slices: list[Slice] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    depthwise: list[str] = field(default_factory=list)
    grouped: list[str] = field(default_factory=list)
    reshapes: list[tuple[str, tuple[int, int]]] = field(default_factory=list)
    values: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def absorb(self, other: Draft) -> None:
        """Take over everything that another group has."""
        self.producers += other.producers
        self.consumers += other.consumers
        self.slices += other.slices
        self.biases += other.biases
        self.depthwise += other.depthwise
        self.grouped += other.grouped
        self.reshapes += other.reshapes
        self.values += other.values
        self.reasons += other.reasons


class Grouping:
    """Groups while they are found: which values hold which channels, and every use of a constant.

    Attributes:
        sites: node → its site and its use there, by the node's identity.
        shapes: sizes of values, as far as they are known.
        initializers: of the main graph, by name.
        constants: these and the tensors of Constant nodes.
        fixed: initializers that nobody may change: callers may override them, or they are outputs.
        layouts: values that hold channels.
    """

    def __init__(self, model: Model, sites: Iterable[Site]) -> None:
        self.sites = {id(use.use.node): (site, use) for site in sites for use in site.uses}
        self.shapes = _known_shapes(model)
        self.initializers = {tensor.name: tensor for tensor in model.proto.graph.initializer}
        self.constants = constant_tensors(model.proto)
        self.fixed = set(output_names(model.proto.graph))
        if model.proto.ir_version >= 4:
            self.fixed |= {value.name for value in model.proto.graph.input}
        self.layouts: dict[str, Layout] = {}
        self._model = model
        self._index = ValueIndex(model.proto)
        self._drafts: list[Draft] = []
        self._parents: list[int] = []

    def begin(self, draft: Draft, axis: int, rank: int | None) -> None:
        """Begin a group with the value that gives it its name."""
        layout = Layout(len(self._drafts), axis, rank)
        self._drafts.append(draft)
        self._parents.append(layout.group)
        self.hold(draft.name, layout)

    def draft(self, layout: Layout) -> Draft:
        """The group whose channels lie so."""
        return self._drafts[self._root(layout.group)]

    def join(self, one: Layout, other: Layout) -> None:
        """Make two groups one."""
        first, second = sorted((self._root(one.group), self._root(other.group)))
        if first != second:
            self._parents[second] = first
            self._drafts[first].absorb(self._drafts[second])

    def block(self, name: str, reason: str) -> None:
        """Note why the channels that a value holds, if any, must stay."""
        if name in self.layouts:
            self.draft(self.layouts[name]).reasons.append(reason)

    def hold(self, name: str, layout: Layout) -> None:
        """Note that a value holds channels."""
        self.layouts[name] = layout
        self.draft(layout).values.append(name)

    def ints(self, node: NodeProto, index: int) -> list[int] | None:
        """A constant integer input, unless callers may override it."""
        name = node.input[index] if index < len(node.input) else ""
        tensor = None if name in self.fixed else self.constants.get(name)
        return None if tensor is None else [int(entry) for entry in self._model.weights.read(tensor).reshape(-1)]

    def slice(self, draft: Draft, name: str, axis: int, *, flat: bool) -> str | None:
        """Note that an initializer has entries per channel along an axis; a reason if that cannot be."""
        tensor = self.initializers.get(name)
        if tensor is None or name in self.fixed:
            return f"{name!r} is no initializer of its own"
        block, rest = divmod(tensor.dims[axis], draft.size)
        if rest or (block != 1 and not flat):
            return f"{name!r} has {tensor.dims[axis]} entries for {draft.size} channels"
        draft.slices.append(Slice(name, axis, block))
        return None

    def finished(self) -> Iterator[ChannelGroup]:
        """What has been found, when all nodes have been visited."""
        for name in output_names(self._model.proto.graph):
            self.block(name, "an output of the graph")
        roots = [draft for number, draft in enumerate(self._drafts) if self._root(number) == number]
        uses = Counter(name for draft in roots for name, _ in draft.reshapes)
        for draft in roots:
            self._check_shared(draft, uses)
            if draft.size < 2:
                draft.reasons.append("a single channel")
            if not draft.consumers:
                draft.reasons.append("no layer reads it")
            yield ChannelGroup(
                draft.name,
                draft.size,
                tuple(draft.producers),
                tuple(dict.fromkeys(draft.consumers)),
                tuple(dict.fromkeys(draft.slices)),
                tuple(dict.fromkeys(draft.biases)),
                tuple(draft.depthwise),
                tuple(draft.grouped),
                dict(draft.reshapes),
                tuple(draft.values),
                "; ".join(dict.fromkeys(draft.reasons)) or None,
            )

    def _check_shared(self, draft: Draft, reshapes: Counter[str]) -> None:
        """Block a group that would change a constant under somebody else."""
        for part, count in Counter(draft.slices).items():
            if len(self._index.uses(part.initializer)) != count:
                draft.reasons.append(f"constant {part.initializer!r} is read elsewhere too")
        for name, _ in draft.reshapes:
            if len(self._index.uses(name)) != reshapes[name]:
                draft.reasons.append(f"shape {name!r} is read elsewhere too")

    def _root(self, number: int) -> int:
        """What a group has become part of."""
        while self._parents[number] != number:
            number = self._parents[number]
        return number


def _known_shapes(model: Model) -> dict[str, list[int | None]]:
    """Sizes of the main graph's values as far as shape inference knows them; it sees no weights, so nothing large is copied."""
    source = model.proto.graph
    light = ModelProto(ir_version=model.proto.ir_version)
    light.opset_import.extend(model.proto.opset_import)
    light.functions.extend(model.proto.functions)
    graph: Any = light.graph
    graph.name = source.name
    graph.node.extend(source.node)
    graph.input.extend(source.input)
    graph.output.extend(source.output)
    graph.value_info.extend(source.value_info)
    graph.initializer.extend(_light(tensor) for tensor in source.initializer)
    inferred = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    described = (*inferred.input, *inferred.value_info, *inferred.output)
    return {value.name: _sizes(value) for value in described if value.type.tensor_type.HasField("shape")}


def _light(tensor: TensorProto) -> TensorProto:
    """The tensor, or one of its shape and type where it is large."""
    if math.prod(tensor.dims) <= _SMALL_ELEMENTS:
        return tensor
    return ghost_tensor(tensor.name, Spec(tuple(tensor.dims), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)))


def _sizes(value: onnx.ValueInfoProto) -> list[int | None]:
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim]
