"""Find the channels that can be cut out of a model, and cut them out.

A *channel group* is a set of channels that layers (Conv, ConvTranspose, Gemm, MatMul) write and layers read, with nothing between but
operators that treat each channel by itself: activations, arithmetic with scalars and per-channel constants, normalization by stored
statistics, pooling, depthwise Conv, Flatten. Values that meet in an Add or a Mul (residual streams, gates) hold the same channels, so their
groups are one. Cutting a group to k channels takes rows from its producers, inputs from its consumers, which are refitted
(`intaglio.ops.pruning`), and entries from every constant between.

Before: a float model. After: the same graph with fewer channels; nodes keep their names, and no value outside the group changes its shape.

Must not fire on: channels that a graph output, a nested graph or any other operator sees (Concat, Transpose, Softmax, LayerNormalization,
shape arithmetic, grouped Conv, ...); that meet a value whose channels are not known; whose layers have a tied or transposed weight, or one
stored as integers, or are too small to be sites; constants that callers may override or that something else reads too. Such a group is
listed with its reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto

from intaglio.ops.emit import Spec
from intaglio.ops.moment import Moment
from intaglio.ops.pruning import block_indices, check_kept, refit
from intaglio.ops.view import MatrixView

from .graph import MAIN, ValueIndex, output_names, reads
from .model import Model
from .rewrite import channel_axes, ghost_tensor
from .sites import Site, SiteUse

Int64 = NDArray[np.int64]

_IMAGES = ("Conv", "FusedConv", "ConvTranspose")
_VECTORS = ("Gemm", "FusedGemm")
_ROWS = ("MatMul", "FusedMatMul")
_TURNS = ("transA", "transBatchA", "transBatchB")
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


def find_channel_groups(model: Model, sites: Iterable[Site]) -> tuple[ChannelGroup, ...]:
    """Every channel group of the main graph, in the order in which the graph runs; those that cannot be cut have a reason.

    Args:
        model: the model.
        sites: all of its sites.
    """
    tracer = _Tracer(model, sites)
    for node in model.proto.graph.node:
        tracer.visit(node)
    return tuple(tracer.groups())


def pruned_shape(site: Site, block: int, count_in: int | None, count_out: int | None) -> tuple[int, ...]:
    """Shape of a site's weight with fewer channels.

    Args:
        site: a producer or consumer.
        block: inputs per channel, from its `Reader`; any number where `count_in` is None.
        count_in: channels that it reads; None where its inputs stay.
        count_out: channels that it writes; None where its outputs stay.
    """
    shape = list(site.shape)
    in_axis, out_axis = channel_axes(site)
    if count_in is not None:
        shape[in_axis] = shape[in_axis] * block * count_in // site.use.view.n
    if count_out is not None:
        shape[out_axis] = count_out
    return tuple(shape)


def pruned_weight(
    site: Site, value: NDArray[np.generic], moment: Moment, block: int, kept_in: Int64 | None, kept_out: Int64 | None
) -> NDArray[np.generic]:
    """A site's weight with fewer channels, refitted to the inputs that stay.

    Args:
        site: a producer or consumer, or both.
        value: its weight, or an array of the same shape in its place.
        moment: of its input.
        block: inputs per channel, from its `Reader`; any number where `kept_in` is None.
        kept_in: channels that it reads, ascending; None where its inputs stay.
        kept_out: channels that it writes, ascending; None where its outputs stay.

    Returns:
        An array of `pruned_shape` and the site's type.

    Raises:
        ValueError: channels that are not ascending or not there.
    """
    matrix, view = site.matrix(value), site.use.view
    outputs = site.shape[channel_axes(site)[1]]
    if kept_in is not None:
        matrix = refit(matrix, moment, block, kept_in)
    if kept_out is not None:
        check_kept(kept_out, outputs)
        matrix = matrix[:, block_indices(kept_out, view.m // outputs)]
    counts = (None if kept is None else len(kept) for kept in (kept_in, kept_out))
    shape = pruned_shape(site, block, *counts)
    return MatrixView(shape, 1, matrix.shape[1], matrix.shape[2], view.outputs_first).stored(matrix).astype(site.dtype)


def pruned_constants(model: Model, group: ChannelGroup, kept: Int64) -> dict[str, NDArray[np.generic]]:
    """New contents of every initializer between a group's layers, by name: sliced constants, and shapes without numbers of channels.

    Args:
        model: the model in which the group was found.
        group: the group.
        kept: its channels that stay, ascending.
    """
    tensors = {tensor.name: tensor for tensor in model.proto.graph.initializer}
    changes: dict[str, NDArray[np.generic]] = {name: np.array(shape, np.int64) for name, shape in group.reshapes.items()}
    for part in group.slices:
        changes[part.initializer] = np.take(model.weights.read(tensors[part.initializer]), block_indices(kept, part.block), part.axis)
    return changes


def pruned_attributes(group: ChannelGroup, count: int) -> dict[str, int]:
    """First output of each depthwise operator of a group → its attribute `group` when `count` channels stay."""
    return dict.fromkeys(group.grouped, count)


def prune(
    model: Model, sites: Iterable[Site], groups: Sequence[ChannelGroup], kept: Mapping[str, Int64], moments: Mapping[str, Moment]
) -> Model:
    """A copy of a float model with fewer channels; the model given is not changed.

    Args:
        model: the model.
        sites: its sites.
        groups: from `find_channel_groups`.
        kept: group name → channels that stay, ascending int64; groups without an entry stay whole.
        moments: site name → second moment of its input; a consumer without one is cut, not refitted.

    Raises:
        ValueError: a group that is unknown or cannot be pruned, or channels that are not ascending or not there.
    """
    known = {group.name: group for group in groups}
    kept_in: dict[str, tuple[int, Int64]] = {}
    kept_out: dict[str, Int64] = {}
    changes: dict[str, NDArray[np.generic]] = {}
    attributes: dict[str, int] = {}
    values: set[str] = set()
    for name, channels in kept.items():
        if name not in known or not known[name].prunable:
            raise ValueError(f"channels of {name!r}: {known[name].reason if name in known else 'no such group'}")
        group = known[name]
        check_kept(channels, group.size)
        kept_in |= {reader.site: (reader.block, channels) for reader in group.consumers}
        kept_out |= dict.fromkeys(group.producers, channels)
        changes |= pruned_constants(model, group, channels)
        attributes |= pruned_attributes(group, len(channels))
        values.update(group.values)
    for site in sites:
        if site.name in kept_in or site.name in kept_out:
            block, inputs = kept_in.get(site.name, (1, None))
            moment = moments.get(site.name) or Moment.isotropic(1, site.use.view.n)
            changes[site.anchor] = pruned_weight(site, site.value(model), moment, block, inputs, kept_out.get(site.name))
    return _changed(model, changes, attributes, values)


@dataclass(frozen=True, eq=False)
class Cut:
    """A group that is cut.

    Attributes:
        group: the group.
        kept: its channels that stay, ascending int64.
    """

    group: ChannelGroup
    kept: Int64


def cut_between(model: Model, cuts: Iterable[Cut]) -> Model:
    """A copy of a model whose layers have lost channels already, in which what lies between them loses the same ones.

    Changed are constants, the attribute `group` of depthwise operators and what is written about shapes; the weights of sites are not,
    depthwise ones included. A constant is cut as it is in this model, so biases may have been corrected before.
    """
    changes: dict[str, NDArray[np.generic]] = {}
    attributes: dict[str, int] = {}
    values: set[str] = set()
    for cut in cuts:
        slices = tuple(part for part in cut.group.slices if part.initializer not in cut.group.depthwise)
        changes |= pruned_constants(model, replace(cut.group, slices=slices), cut.kept)
        attributes |= pruned_attributes(cut.group, len(cut.kept))
        values.update(cut.group.values)
    return _changed(model, changes, attributes, values)


def _changed(model: Model, changes: Mapping[str, NDArray[np.generic]], attributes: Mapping[str, int], values: set[str]) -> Model:
    """A copy with other initializers and `group` attributes, and without what was written about the shapes of `values`."""
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    for tensor in proto.graph.initializer:
        if tensor.name in changes:
            tensor.CopyFrom(model.weights.spool(tensor.name, changes[tensor.name]))
    for value in proto.graph.input:  # where initializers are listed as inputs
        if value.name in changes:
            for dim, size in zip(value.type.tensor_type.shape.dim, changes[value.name].shape, strict=True):
                dim.dim_value = size
    for node in proto.graph.node:
        if node.output and node.output[0] in attributes:
            next(a for a in node.attribute if a.name == "group").i = attributes[node.output[0]]
    described = [value for value in proto.graph.value_info if value.name not in values]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(described)
    return replace(model, proto=proto)


@dataclass(frozen=True)
class _Layout:
    """Where a value holds the channels of a group.

    Attributes:
        group: number of the group when the value was met; `_Tracer.root` says what it has become part of.
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
class _Draft:
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

    def absorb(self, other: _Draft) -> None:
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


class _Tracer:
    """Follows channels through the main graph, one node after the other."""

    def __init__(self, model: Model, sites: Iterable[Site]) -> None:
        self._model = model
        self._index = ValueIndex(model.proto)
        self._shapes = _known_shapes(model)
        self._initializers = {tensor.name: tensor for tensor in model.proto.graph.initializer}
        self._constants = self._initializers | _constant_nodes(model.proto)
        self._fixed = set(output_names(model.proto.graph))
        if model.proto.ir_version >= 4:
            self._fixed |= {value.name for value in model.proto.graph.input}
        self._sites = {id(use.use.node): (site, use) for site in sites for use in site.uses}
        self._layouts: dict[str, _Layout] = {}
        self._drafts: list[_Draft] = []
        self._parents: list[int] = []

    def visit(self, node: NodeProto) -> None:
        """Hand the channels of a node's inputs on to its outputs, or note why that cannot be."""
        for name in reads(node).difference(node.input):
            self._block(name, "read inside a nested graph")
        found = self._sites.get(id(node))
        if found is not None and _group(node) == 1 and node.op_type in (*_IMAGES, *_VECTORS, *_ROWS):
            self._layer(node, *found)
            return
        carried = [name for name in node.input if name in self._layouts]
        if carried:
            handler = _HANDLERS.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type))
            reason = f"read by {node.op_type}" if handler is None else handler(self, node)
            for name in carried if reason else ():
                self._block(name, str(reason))

    def groups(self) -> Iterator[ChannelGroup]:
        """What has been found."""
        for name in output_names(self._model.proto.graph):
            self._block(name, "an output of the graph")
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

    def _check_shared(self, draft: _Draft, reshapes: Counter[str]) -> None:
        """Block a group that would change a constant under somebody else."""
        for part, count in Counter(draft.slices).items():
            if len(self._index.uses(part.initializer)) != count:
                draft.reasons.append(f"constant {part.initializer!r} is read elsewhere too")
        for name, _ in draft.reshapes:
            if len(self._index.uses(name)) != reshapes[name]:
                draft.reasons.append(f"shape {name!r} is read elsewhere too")

    # groups

    def _root(self, number: int) -> int:
        while self._parents[number] != number:
            number = self._parents[number]
        return number

    def _draft(self, layout: _Layout) -> _Draft:
        return self._drafts[self._root(layout.group)]

    def _join(self, one: _Layout, other: _Layout) -> None:
        first, second = sorted((self._root(one.group), self._root(other.group)))
        if first != second:
            self._parents[second] = first
            self._drafts[first].absorb(self._drafts[second])

    def _block(self, name: str, reason: str) -> None:
        if name in self._layouts:
            self._draft(self._layouts[name]).reasons.append(reason)

    def _hold(self, name: str, layout: _Layout) -> None:
        """Note that a value holds channels."""
        self._layouts[name] = layout
        self._draft(layout).values.append(name)

    # constants

    def _ints(self, node: NodeProto, index: int) -> list[int] | None:
        """A constant integer input, unless callers may override it."""
        name = node.input[index] if index < len(node.input) else ""
        tensor = None if name in self._fixed else self._constants.get(name)
        return None if tensor is None else [int(entry) for entry in self._model.weights.read(tensor).reshape(-1)]

    def _axes_of(self, node: NodeProto) -> list[int] | None:
        """The axes of a Reduce, Squeeze or Unsqueeze, an attribute in old opsets; None where they are not given or not constant."""
        attribute = next((list(a.ints) for a in node.attribute if a.name == "axes"), None)
        return self._ints(node, 1) if attribute is None else attribute

    def _slice(self, draft: _Draft, name: str, axis: int, *, flat: bool) -> str | None:
        """Note that an initializer has entries per channel along an axis; a reason if that cannot be."""
        tensor = self._initializers.get(name)
        if tensor is None or name in self._fixed:
            return f"{name!r} is no initializer of its own"
        block, rest = divmod(tensor.dims[axis], draft.size)
        if rest or (block != 1 and not flat):
            return f"{name!r} has {tensor.dims[axis]} entries for {draft.size} channels"
        draft.slices.append(Slice(name, axis, block))
        return None

    # layers

    def _layer(self, node: NodeProto, site: Site, site_use: SiteUse) -> None:
        """A site: it reads the channels of its activation and writes channels of its own."""
        reason = self._layer_reason(node, site, site_use)
        for position, name in enumerate(node.input):
            if name in self._layouts:
                against = reason or (self._read(self._layouts[name], site, node) if position == 0 else f"a parameter of {node.op_type}")
                if against:
                    self._block(name, against)
        columns = site_use.use.index == 0 and node.op_type in (*_VECTORS, *_ROWS)
        if not columns and site.order is None and node.output[0]:
            self._write(node, site, reason)

    def _layer_reason(self, node: NodeProto, site: Site, site_use: SiteUse) -> str | None:
        """Why a site's weight cannot lose channels."""
        if len(site.uses) > 1:
            return f"tied weight {site.name!r}"
        if site.widening is not None:
            return f"weight {site.name!r} is stored in another type"
        if site.order is not None or node.input[site_use.use.index] != site.anchor:
            return f"weight {site.name!r} is turned round before it is used"
        if site.scope != MAIN or site.anchor not in self._initializers:
            return f"weight {site.name!r} is no initializer of the main graph"
        if site_use.use.index != 1 or any(site_use.use.int(name, 0) for name in _TURNS):
            return f"{node.op_type} with its operands turned round"
        if any(node.input[3:]):
            return f"{node.op_type} adds another value"
        return None

    def _read(self, layout: _Layout, site: Site, node: NodeProto) -> str | None:
        """Note a consumer; a reason if the channels do not lie where it reads them."""
        draft = self._draft(layout)
        expected = len(site.shape) - 1 if node.op_type in _IMAGES else 1
        entries, rest = divmod(site.shape[channel_axes(site)[0]], draft.size)
        if layout.axis != expected or rest or (entries != 1 and not layout.flat):
            return f"{node.op_type} reads it along another axis"
        draft.consumers.append(Reader(site.name, site.use.view.n // draft.size))
        return None

    def _write(self, node: NodeProto, site: Site, reason: str | None) -> None:
        """Begin a group with what a layer writes."""
        axis, rank = self._output_layout(node, site)
        draft = _Draft(node.output[0], site.shape[channel_axes(site)[1]], [site.name])
        layout = _Layout(len(self._drafts), axis, rank)
        self._drafts.append(draft)
        self._parents.append(layout.group)
        self._hold(node.output[0], layout)
        reason = reason or (self._bias(draft, node) if len(node.input) > 2 and node.input[2] else None)
        if reason:
            draft.reasons.append(reason)

    def _output_layout(self, node: NodeProto, site: Site) -> tuple[int, int | None]:
        """Channel axis from the end, and rank, of what a layer writes."""
        if node.op_type in _IMAGES:
            return len(site.shape) - 1, len(site.shape)
        if node.op_type in _VECTORS:
            return 1, 2
        before = self._layouts.get(node.input[0])
        if before is not None and before.rank is not None:
            return 1, before.rank
        known = self._shapes.get(node.output[0])
        return 1, None if known is None else len(known)

    def _bias(self, draft: _Draft, node: NodeProto) -> str | None:
        """The third input of a layer; a Gemm's may be the same for all channels."""
        name = node.input[2]
        if name not in self._constants:
            return f"{node.op_type} adds another value"
        dims = self._constants[name].dims
        if not dims or (dims[-1] == 1 and draft.size > 1):
            return None
        draft.biases.append(name)
        return self._slice(draft, name, len(dims) - 1, flat=False)

    # operators that treat each channel by itself; each hands the layout on or returns a reason

    def elementwise(self, node: NodeProto) -> str | None:
        """One operand; other inputs are parameters that all channels share."""
        layout = self._operand(node)
        if layout is None or any(node.output[1:]):
            return f"{node.op_type} with channels as its parameters or with several outputs"
        shared = (self._constants.get(name) for name in node.input[1:] if name)
        if any(tensor is None or math.prod(tensor.dims) != 1 for tensor in shared):
            return f"{node.op_type} with parameters that are no constant numbers"
        self._hold(node.output[0], layout)
        return None

    def broadcasting(self, node: NodeProto) -> str | None:
        """Several operands, aligned from the last axis: values of the same channels, and constants."""
        layouts = [self._layouts[name] for name in node.input if name in self._layouts]
        lead = max(layouts, key=lambda layout: self._draft(layout).size)
        rank = lead.rank
        for name in node.input:
            if name in self._layouts:
                reason, other = self._meet(lead, self._layouts[name]), self._layouts[name].rank
            elif name in self._constants:
                dims = self._constants[name].dims
                own = len(dims) >= lead.axis and dims[-lead.axis] != 1
                reason, other = self._slice(self._draft(lead), name, len(dims) - lead.axis, flat=lead.flat) if own else None, len(dims)
            else:
                return f"{node.op_type} meets {name!r}, whose channels are not known"
            if reason:
                return reason
            rank = None if rank is None or other is None else max(rank, other)
        self._hold(node.output[0], replace(lead, rank=rank))
        return None

    def _meet(self, lead: _Layout, other: _Layout) -> str | None:
        """Two values meet: their groups become one, unless the other has a single channel for all."""
        if lead.axis != other.axis:
            return "its channels meet others on another axis"
        if self._draft(lead).size == self._draft(other).size:
            if lead.flat != other.flat:
                return "its channels meet others in blocks"
            self._join(lead, other)
            return None
        return None if self._draft(other).size == 1 and not other.flat else "its channels meet another number of channels"

    def normalization(self, node: NodeProto) -> str | None:
        """Stored statistics, or those of each channel alone; every parameter has one entry per channel."""
        layout = self._operand(node)
        stored = not _int(node, "training_mode", 0) and _int(node, "spatial", 1) and not any(node.output[1:])
        if layout is None or not layout.second or not stored:
            return f"{node.op_type} along another axis or by statistics of the batch"
        for name in node.input[1:]:
            reason = self._slice(self._draft(layout), name, 0, flat=layout.flat)
            if reason:
                return reason
        self._hold(node.output[0], layout)
        return None

    def pooling(self, node: NodeProto) -> str | None:
        """Windows of one channel."""
        layout = self._operand(node)
        if layout is None or not layout.second or any(node.output[1:]):
            return f"{node.op_type} along another axis or with indices"
        self._hold(node.output[0], layout)
        return None

    def depthwise(self, node: NodeProto) -> str | None:
        """A Conv with one kernel per channel; any other Conv that comes here mixes channels."""
        layout, weight = self._operand(node), self._initializers.get(node.input[1])
        if _group(node) == 1:
            return f"{node.op_type} whose weight is no site"
        if layout is None or any(node.input[3:]):
            return f"{node.op_type} with its operands turned round"
        draft = self._draft(layout)
        if weight is None or weight.dims[0] != draft.size or _group(node) != draft.size:
            return f"a grouped {node.op_type}"
        found = self._sites.get(id(node))
        draft.depthwise += [] if found is None else [found[0].name]
        draft.grouped.append(node.output[0])
        for name in filter(None, node.input[1:3]):
            reason = self._slice(draft, name, 0, flat=False)
            if reason:
                return reason
        self._hold(node.output[0], layout)
        return None

    def reduction(self, node: NodeProto) -> str | None:
        """Over other axes than the channels'."""
        layout, axes = self._operand(node), self._axes_of(node)
        if layout is None or layout.rank is None or not axes:
            return f"{node.op_type} over axes that are not known"
        gone = {axis % layout.rank for axis in axes}
        if layout.front in gone:
            return f"{node.op_type} over the channels"
        if node.op_type != "Squeeze" and _int(node, "keepdims", 1):
            self._hold(node.output[0], layout)
            return None
        behind = sum(axis > layout.rank - layout.axis for axis in gone)
        self._hold(node.output[0], replace(layout, axis=layout.axis - behind, rank=layout.rank - len(gone)))
        return None

    def unsqueeze(self, node: NodeProto) -> str | None:
        """New axes of one entry."""
        layout, axes = self._operand(node), self._axes_of(node)
        if layout is None or layout.rank is None or layout.front is None or not axes:
            return f"{node.op_type} at axes that are not known"
        rank = layout.rank + len(axes)
        new = {axis % rank for axis in axes}
        old = [axis for axis in range(rank) if axis not in new]
        self._hold(node.output[0], replace(layout, axis=rank - old[layout.front], rank=rank))
        return None

    def flatten(self, node: NodeProto) -> str | None:
        """(N, C, ...) to (N, C·...): each channel becomes a block."""
        layout = self._operand(node)
        if layout is None or not layout.second or layout.rank is None or _int(node, "axis", 1) not in (1, 1 - layout.rank):
            return f"{node.op_type} that mixes channels with rows"
        self._hold(node.output[0], replace(layout, axis=1, rank=2, flat=layout.flat or layout.rank > 2))
        return None

    def reshape(self, node: NodeProto) -> str | None:
        """As `flatten`, where that is what the shape says; its second entry becomes −1 where it is a number."""
        layout, target = self._operand(node), self._ints(node, 1)
        if layout is None or not layout.second or target is None or len(target) != 2 or _int(node, "allowzero", 0):
            return f"{node.op_type} other than from images to rows"
        batch, *rest = self._shapes.get(node.input[0], [None])
        length = math.prod(size for size in rest if size is not None) if rest and None not in rest else None
        if target[0] not in (0, batch) and (target[0] != -1 or target[1] != length):
            return f"{node.op_type} to {target}, which may mix channels with rows"
        if target[1] != -1:
            name = node.input[1]
            if name not in self._initializers or name in self._fixed:
                return f"{name!r} is no initializer of its own"
            self._draft(layout).reshapes.append((name, (0 if target[0] == -1 else target[0], -1)))
        self._hold(node.output[0], replace(layout, axis=1, rank=2, flat=layout.flat or layout.rank != 2))
        return None

    def _operand(self, node: NodeProto) -> _Layout | None:
        """Layout of the first input; None where other inputs hold channels, too or instead."""
        return None if any(name in self._layouts for name in node.input[1:]) else self._layouts.get(node.input[0])


_Handler = Callable[[_Tracer, NodeProto], str | None]


def _table(handler: _Handler, *op_types: str, domain: str = "") -> dict[tuple[str, str], _Handler]:
    return {(domain, op_type): handler for op_type in op_types}


_HANDLERS: dict[tuple[str, str], _Handler] = {
    **_table(_Tracer.elementwise, "Identity", "Dropout", "Cast", "Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Clip", "Sigmoid", "Tanh"),
    **_table(_Tracer.elementwise, "HardSigmoid", "HardSwish", "Softplus", "Softsign", "ThresholdedRelu", "Mish", "Gelu", "Swish", "Erf"),
    **_table(_Tracer.elementwise, "Exp", "Log", "Sqrt", "Reciprocal", "Abs", "Neg", "Sin", "Cos"),
    **_table(_Tracer.elementwise, "Gelu", "QuickGelu", domain="com.microsoft"),
    **_table(_Tracer.broadcasting, "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sum", "Mean", "PRelu"),
    **_table(_Tracer.normalization, "BatchNormalization", "InstanceNormalization"),
    **_table(_Tracer.pooling, "MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"),
    **_table(_Tracer.depthwise, "Conv"),
    **_table(_Tracer.depthwise, "FusedConv", domain="com.microsoft"),
    **_table(_Tracer.reduction, "ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceL2", "Squeeze"),
    **_table(_Tracer.unsqueeze, "Unsqueeze"),
    **_table(_Tracer.flatten, "Flatten"),
    **_table(_Tracer.reshape, "Reshape"),
}
"""(domain, op_type) → how channels pass; every other operator ends them."""


def _int(node: NodeProto, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def _group(node: NodeProto) -> int:
    return _int(node, "group", 1)


def _constant_nodes(proto: ModelProto) -> dict[str, TensorProto]:
    """Output → tensor of each Constant node of the main graph that holds one."""
    nodes = (node for node in proto.graph.node if node.op_type == "Constant")
    return {node.output[0]: node.attribute[0].t for node in nodes if node.attribute and node.attribute[0].name == "value"}


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
