"""Find the channels that can be cut out of a model.

A *channel group* is a set of channels that layers (Conv, ConvTranspose, Gemm, MatMul) write and layers read, with nothing between but
operators that treat each channel by itself: activations, arithmetic with scalars and per-channel constants, normalization by stored
statistics, pooling, depthwise Conv, Flatten. Values that meet in an Add or a Mul (residual streams, gates) hold the same channels, so their
groups are one. Here channels are followed through the layers that write and read them; `passes.channelwise` follows them through what lies
between, and `passes.cuts` cuts them.

Must not fire on: channels that a graph output, a nested graph or any other operator sees (Concat, Transpose, Softmax, LayerNormalization,
shape arithmetic, grouped Conv, ...); that meet a value whose channels are not known; whose layers have a tied or transposed weight, or one
stored as integers, or are too small to be sites; constants that callers may override or that something else reads too. Such a group is
listed with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable

from onnx import NodeProto

from .channelwise import CHANNELWISE, conv_groups
from .graph import MAIN, reads
from .groups import ChannelGroup, Draft, Grouping, Layout, Reader
from .model import Model
from .rewrite import channel_axes
from .sites import Site, SiteUse

_IMAGES = ("Conv", "FusedConv", "ConvTranspose")
_VECTORS = ("Gemm", "FusedGemm")
_ROWS = ("MatMul", "FusedMatMul")
_TURNS = ("transA", "transBatchA", "transBatchB")


def find_channel_groups(model: Model, sites: Iterable[Site]) -> tuple[ChannelGroup, ...]:
    """Every channel group of the main graph, in the order in which the graph runs; those that cannot be cut have a reason.

    Args:
        model: the model.
        sites: all of its sites.
    """
    groups = Grouping(model, sites)
    for node in model.proto.graph.node:
        _visit(groups, node)
    return tuple(groups.finished())


def _visit(groups: Grouping, node: NodeProto) -> None:
    """Hand the channels of a node's inputs on to its outputs, or note why that cannot be."""
    for name in reads(node).difference(node.input):
        groups.block(name, "read inside a nested graph")
    found = groups.sites.get(id(node))
    if found is not None and conv_groups(node) == 1 and node.op_type in (*_IMAGES, *_VECTORS, *_ROWS):
        _layer(groups, node, *found)
        return
    carried = [name for name in node.input if name in groups.layouts]
    if carried:
        handler = CHANNELWISE.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type))
        reason = f"read by {node.op_type}" if handler is None else handler(groups, node)
        for name in carried if reason else ():
            groups.block(name, str(reason))


def _layer(groups: Grouping, node: NodeProto, site: Site, site_use: SiteUse) -> None:
    """A site: it reads the channels of its activation and writes channels of its own."""
    reason = _layer_reason(groups, node, site, site_use)
    for position, name in enumerate(node.input):
        if name in groups.layouts:
            against = reason or (_read(groups, groups.layouts[name], site, node) if position == 0 else f"a parameter of {node.op_type}")
            if against:
                groups.block(name, against)
    columns = site_use.use.index == 0 and node.op_type in (*_VECTORS, *_ROWS)
    if not columns and site.order is None and node.output[0]:
        _write(groups, node, site, reason)


def _layer_reason(groups: Grouping, node: NodeProto, site: Site, site_use: SiteUse) -> str | None:
    """Why a site's weight cannot lose channels."""
    if len(site.uses) > 1:
        return f"tied weight {site.name!r}"
    if site.widening is not None:
        return f"weight {site.name!r} is stored in another type"
    if site.order is not None or node.input[site_use.use.index] != site.anchor:
        return f"weight {site.name!r} is turned round before it is used"
    if site.scope != MAIN or site.anchor not in groups.initializers:
        return f"weight {site.name!r} is no initializer of the main graph"
    if site_use.use.index != 1 or any(site_use.use.int(name, 0) for name in _TURNS):
        return f"{node.op_type} with its operands turned round"
    if any(node.input[3:]):
        return f"{node.op_type} adds another value"
    return None


def _read(groups: Grouping, layout: Layout, site: Site, node: NodeProto) -> str | None:
    """Note a consumer; a reason if the channels do not lie where it reads them."""
    draft = groups.draft(layout)
    expected = len(site.shape) - 1 if node.op_type in _IMAGES else 1
    entries, rest = divmod(site.shape[channel_axes(site)[0]], draft.size)
    if layout.axis != expected or rest or (entries != 1 and not layout.flat):
        return f"{node.op_type} reads it along another axis"
    draft.consumers.append(Reader(site.name, site.use.view.n // draft.size))
    return None


def _write(groups: Grouping, node: NodeProto, site: Site, reason: str | None) -> None:
    """Begin a group with what a layer writes."""
    axis, rank = _output_layout(groups, node, site)
    draft = Draft(node.output[0], site.shape[channel_axes(site)[1]], [site.name])
    groups.begin(draft, axis, rank)
    reason = reason or (_bias(groups, draft, node) if len(node.input) > 2 and node.input[2] else None)
    if reason:
        draft.reasons.append(reason)


def _output_layout(groups: Grouping, node: NodeProto, site: Site) -> tuple[int, int | None]:
    """Channel axis from the end, and rank, of what a layer writes."""
    if node.op_type in _IMAGES:
        return len(site.shape) - 1, len(site.shape)
    if node.op_type in _VECTORS:
        return 1, 2
    before = groups.layouts.get(node.input[0])
    if before is not None and before.rank is not None:
        return 1, before.rank
    known = groups.shapes.get(node.output[0])
    return 1, None if known is None else len(known)


def _bias(groups: Grouping, draft: Draft, node: NodeProto) -> str | None:
    """The third input of a layer; a Gemm's may be the same for all channels."""
    name = node.input[2]
    if name not in groups.constants:
        return f"{node.op_type} adds another value"
    dims = groups.constants[name].dims
    if not dims or (dims[-1] == 1 and draft.size > 1):
        return None
    draft.biases.append(name)
    return groups.slice(draft, name, len(dims) - 1, flat=False)
