"""Operators that treat each channel by itself, and so hand channels on.

Each handler notes the layout of a node's output, and the constants that lose entries with the channels, or returns a reason for which the
channels of the node's inputs must stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from onnx import NodeProto

from .graph import int_attribute
from .groups import Grouping, Layout


def _elementwise(groups: Grouping, node: NodeProto) -> str | None:
    """One operand; other inputs are parameters that all channels share."""
    layout = _operand(groups, node)
    if layout is None or any(node.output[1:]):
        return f"{node.op_type} with channels as its parameters or with several outputs"
    shared = (groups.constants.get(name) for name in node.input[1:] if name)
    if any(tensor is None or math.prod(tensor.dims) != 1 for tensor in shared):
        return f"{node.op_type} with parameters that are no constant numbers"
    groups.hold(node.output[0], layout)
    return None


def _broadcasting(groups: Grouping, node: NodeProto) -> str | None:
    """Several operands, aligned from the last axis: values of the same channels, and constants."""
    layouts = [groups.layouts[name] for name in node.input if name in groups.layouts]
    lead = max(layouts, key=lambda layout: groups.draft(layout).size)
    rank = lead.rank
    for name in node.input:
        if name in groups.layouts:
            reason, other = _meet(groups, lead, groups.layouts[name]), groups.layouts[name].rank
        elif name in groups.constants:
            dims = groups.constants[name].dims
            own = len(dims) >= lead.axis and dims[-lead.axis] != 1
            reason, other = groups.slice(groups.draft(lead), name, len(dims) - lead.axis, flat=lead.flat) if own else None, len(dims)
        else:
            return f"{node.op_type} meets {name!r}, whose channels are not known"
        if reason:
            return reason
        rank = None if rank is None or other is None else max(rank, other)
    groups.hold(node.output[0], replace(lead, rank=rank))
    return None


def _meet(groups: Grouping, lead: Layout, other: Layout) -> str | None:
    """Two values meet: their groups become one, unless the other has a single channel for all."""
    if lead.axis != other.axis:
        return "its channels meet others on another axis"
    if groups.draft(lead).size == groups.draft(other).size:
        if lead.flat != other.flat:
            return "its channels meet others in blocks"
        groups.join(lead, other)
        return None
    return None if groups.draft(other).size == 1 and not other.flat else "its channels meet another number of channels"


def _normalization(groups: Grouping, node: NodeProto) -> str | None:
    """Stored statistics, or those of each channel alone; every parameter has one entry per channel."""
    layout = _operand(groups, node)
    stored = not int_attribute(node, "training_mode", 0) and int_attribute(node, "spatial", 1) and not any(node.output[1:])
    if layout is None or not layout.second or not stored:
        return f"{node.op_type} along another axis or by statistics of the batch"
    for name in node.input[1:]:
        reason = groups.slice(groups.draft(layout), name, 0, flat=layout.flat)
        if reason:
            return reason
    groups.hold(node.output[0], layout)
    return None


def _pooling(groups: Grouping, node: NodeProto) -> str | None:
    """Windows of one channel."""
    layout = _operand(groups, node)
    if layout is None or not layout.second or any(node.output[1:]):
        return f"{node.op_type} along another axis or with indices"
    groups.hold(node.output[0], layout)
    return None


def _depthwise(groups: Grouping, node: NodeProto) -> str | None:
    """A Conv with one kernel per channel; any other Conv that comes here mixes channels."""
    layout, weight = _operand(groups, node), groups.initializers.get(node.input[1])
    if conv_groups(node) == 1:
        return f"{node.op_type} whose weight is no site"
    if layout is None or any(node.input[3:]):
        return f"{node.op_type} with its operands turned round"
    draft = groups.draft(layout)
    if weight is None or weight.dims[0] != draft.size or conv_groups(node) != draft.size:
        return f"a grouped {node.op_type}"
    site = groups.sites.get(id(node))
    draft.depthwise += [] if site is None else [site[0].name]
    draft.grouped.append(node.output[0])
    for name in filter(None, node.input[1:3]):
        reason = groups.slice(draft, name, 0, flat=False)
        if reason:
            return reason
    groups.hold(node.output[0], layout)
    return None


def _reduction(groups: Grouping, node: NodeProto) -> str | None:
    """Over other axes than the channels'."""
    layout, axes = _operand(groups, node), _axes(groups, node)
    if layout is None or layout.rank is None or not axes:
        return f"{node.op_type} over axes that are not known"
    gone = {axis % layout.rank for axis in axes}
    if layout.front in gone:
        return f"{node.op_type} over the channels"
    if node.op_type != "Squeeze" and int_attribute(node, "keepdims", 1):
        groups.hold(node.output[0], layout)
        return None
    behind = sum(axis > layout.rank - layout.axis for axis in gone)
    groups.hold(node.output[0], replace(layout, axis=layout.axis - behind, rank=layout.rank - len(gone)))
    return None


def _unsqueeze(groups: Grouping, node: NodeProto) -> str | None:
    """New axes of one entry."""
    layout, axes = _operand(groups, node), _axes(groups, node)
    if layout is None or layout.rank is None or layout.front is None or not axes:
        return f"{node.op_type} at axes that are not known"
    rank = layout.rank + len(axes)
    new = {axis % rank for axis in axes}
    old = [axis for axis in range(rank) if axis not in new]
    groups.hold(node.output[0], replace(layout, axis=rank - old[layout.front], rank=rank))
    return None


def _flatten(groups: Grouping, node: NodeProto) -> str | None:
    """(N, C, ...) to (N, C·...): each channel becomes a block."""
    layout = _operand(groups, node)
    if layout is None or not layout.second or layout.rank is None or int_attribute(node, "axis", 1) not in (1, 1 - layout.rank):
        return f"{node.op_type} that mixes channels with rows"
    groups.hold(node.output[0], replace(layout, axis=1, rank=2, flat=layout.flat or layout.rank > 2))
    return None


def _reshape(groups: Grouping, node: NodeProto) -> str | None:
    """As Flatten, where that is what the shape says; its second entry becomes −1 where it is a number."""
    layout, target = _operand(groups, node), groups.ints(node, 1)
    if layout is None or not layout.second or target is None or len(target) != 2 or int_attribute(node, "allowzero", 0):
        return f"{node.op_type} other than from images to rows"
    batch, *rest = groups.shapes.get(node.input[0], [None])
    length = math.prod(size for size in rest if size is not None) if rest and None not in rest else None
    if target[0] not in (0, batch) and (target[0] != -1 or target[1] != length):
        return f"{node.op_type} to {target}, which may mix channels with rows"
    if target[1] != -1:
        name = node.input[1]
        if name not in groups.initializers or name in groups.fixed:
            return f"{name!r} is no initializer of its own"
        groups.draft(layout).reshapes.append((name, (0 if target[0] == -1 else target[0], -1)))
    groups.hold(node.output[0], replace(layout, axis=1, rank=2, flat=layout.flat or layout.rank != 2))
    return None


def _operand(groups: Grouping, node: NodeProto) -> Layout | None:
    """Layout of the first input; None where other inputs hold channels, too or instead."""
    return None if any(name in groups.layouts for name in node.input[1:]) else groups.layouts.get(node.input[0])


def _axes(groups: Grouping, node: NodeProto) -> list[int] | None:
    """The axes of a Reduce, Squeeze or Unsqueeze, an attribute in old opsets; None where they are not given or not constant."""
    attribute = next((list(a.ints) for a in node.attribute if a.name == "axes"), None)
    return groups.ints(node, 1) if attribute is None else attribute


def conv_groups(node: NodeProto) -> int:
    """How many groups of channels a Conv keeps apart; 1 for other operators."""
    return int_attribute(node, "group", 1)


_Handler = Callable[[Grouping, NodeProto], str | None]


def _table(handler: _Handler, *op_types: str, domain: str = "") -> dict[tuple[str, str], _Handler]:
    return {(domain, op_type): handler for op_type in op_types}


CHANNELWISE: dict[tuple[str, str], _Handler] = {
    **_table(_elementwise, "Identity", "Dropout", "Cast", "Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Clip", "Sigmoid", "Tanh"),
    **_table(_elementwise, "HardSigmoid", "HardSwish", "Softplus", "Softsign", "ThresholdedRelu", "Mish", "Gelu", "Swish", "Erf"),
    **_table(_elementwise, "Exp", "Log", "Sqrt", "Reciprocal", "Abs", "Neg", "Sin", "Cos"),
    **_table(_elementwise, "Gelu", "QuickGelu", domain="com.microsoft"),
    **_table(_broadcasting, "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sum", "Mean", "PRelu"),
    **_table(_normalization, "BatchNormalization", "InstanceNormalization"),
    **_table(_pooling, "MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"),
    **_table(_depthwise, "Conv"),
    **_table(_depthwise, "FusedConv", domain="com.microsoft"),
    **_table(_reduction, "ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceL2", "Squeeze"),
    **_table(_unsqueeze, "Unsqueeze"),
    **_table(_flatten, "Flatten"),
    **_table(_reshape, "Reshape"),
}
"""(domain, op_type) → how channels pass; every other operator ends them."""
