"""Operators whose constants take factors, so that their input and their output can be rescaled, each by factors of its own.

Each handler labels the outputs of a node, or returns a reason for which no label that the node reads may take a factor (`trace.Handler`).
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import NodeProto

from .graph import int_attribute
from .trace import Handler, Labels, Operand, Shape, Trace


def _aligned(trace: Trace, node: NodeProto) -> tuple[list[Labels | None], list[Shape | None]] | str:
    """Labels of both inputs of a broadcasting operator, and the shapes of those that are constants, at the output's rank."""
    ranks = [trace.rank(name) for name in node.input]
    if any(rank is None for rank in ranks):
        return f"{node.op_type} with a value whose shape is not known"
    rank = max(rank for rank in ranks if rank is not None)
    labels = [trace.layouts.get(name) for name in node.input]
    shapes = [tuple(trace.constants[name].dims) if name in trace.constants else None for name in node.input]
    return (
        [None if each is None else each.reshape((1,) * (rank - each.ndim) + each.shape) for each in labels],
        [None if each is None else (1,) * (rank - len(each)) + each for each in shapes],
    )


def _covers(shape: Shape, labels: Labels) -> bool:
    """Whether a constant has an entry of its own for each label."""
    return all(size in (1, extent) for size, extent in zip(labels.shape, shape, strict=True))


def _sum(trace: Trace, node: NodeProto) -> str | None:
    """Add and Sub: a constant is divided as its partner is; two values share their factors."""
    aligned = _aligned(trace, node)
    if isinstance(aligned, str):
        return aligned
    labels, shapes = aligned
    for side, (own, name) in enumerate(zip(labels, node.input, strict=True)):
        other = labels[1 - side]
        if own is not None or other is None:
            continue
        shape = shapes[side]
        reason = trace.refusal(name)
        if shape is None or reason:
            return f"{node.op_type} with '{name}', which takes no factor" if shape is None else reason
        if not _covers(shape, other):
            return f"'{name}' has not one entry per channel"
        trace.operands.append(Operand(name, node, side, shape, None, other))
        trace.layouts[node.output[0]] = other
        return None
    first, second = labels
    if first is None or second is None:
        return None
    if first.shape != second.shape:
        return f"{node.op_type} of values whose channels differ"
    trace.ties.append((first, second))
    trace.layouts[node.output[0]] = first
    return None


def _scale(trace: Trace, node: NodeProto) -> str | None:
    """Mul and Div: a constant with channels takes the factors of both ends; of two values, the one with labels carries its own on."""
    aligned = _aligned(trace, node)
    if isinstance(aligned, str):
        return aligned
    labels, shapes = aligned
    side = next((i for i, shape in enumerate(shapes) if shape is not None), None)
    if side is not None:
        return _scale_constant(trace, node, side, labels[1 - side], shapes[side] or ())
    first, second = labels
    if first is None and second is None:
        return None
    if (first is not None and second is not None) or (first is None and node.op_type == "Div"):
        return f"read by {node.op_type}"
    trace.layouts[node.output[0]] = next(each for each in labels if each is not None)
    return None


def _scale_constant(trace: Trace, node: NodeProto, side: int, labels: Labels | None, shape: Shape) -> str | None:
    """A product with, or a quotient by, a constant."""
    if node.op_type == "Div" and side == 0:
        return "read by Div"
    if labels is not None and all(1 in sizes for sizes in zip(labels.shape, shape, strict=True)):
        trace.layouts[node.output[0]] = labels
        return None
    name = node.input[side]
    reason = trace.refusal(name)
    if labels is None and (reason or sum(size > 1 for size in shape) != 1):
        return None  # no channels to speak of: the output has no labels
    if reason:
        return reason
    if labels is not None and not _covers(shape, labels):
        return f"'{name}' has not one entry per channel"
    entering = labels if labels is not None else trace.stuck(f"shares '{name}' with a value that takes no factor", *shape)
    leaving = trace.fresh(*entering.shape)
    times, over = (leaving, entering) if node.op_type == "Div" else (entering, leaving)
    trace.operands.append(Operand(name, node, side, shape, times, over))
    trace.layouts[node.output[0]] = leaving
    return None


def _convolution(trace: Trace, node: NodeProto) -> str | None:
    """Conv and ConvTranspose with any groups: weight (m, n/groups, *kernel) or (n, m/groups, *kernel)."""
    reason = _refusals(trace, node, node.input[1:])
    if reason:
        return reason
    shape = tuple(trace.constants[node.input[1]].dims)
    groups, ones = int_attribute(node, "group", 1), (1,) * len(shape[2:])
    view = (groups, shape[0] // groups, *shape[1:])
    outputs, inputs = (2, 1) if node.op_type == "ConvTranspose" else (1, 2)
    entering = trace.entering(node.input[0], 1, groups * view[inputs])
    leaving = trace.fresh(groups * view[outputs])
    times, over = (
        labels.reshape(groups, *(view[axis] if axis == own else 1 for axis in (1, 2)), *ones)
        for labels, own in ((entering, inputs), (leaving, outputs))
    )
    trace.operands.append(Operand(node.input[1], node, 1, view, times, over))
    if len(node.input) > 2 and node.input[2]:
        trace.operands.append(Operand(node.input[2], node, 2, leaving.shape, None, leaving))
    trace.layouts[node.output[0]] = leaving.reshape(1, -1, *ones)
    return None


def _refusals(trace: Trace, node: NodeProto, names: Sequence[str]) -> str | None:
    """Why one of a node's parameters takes no factor."""
    reasons = (trace.refusal(name) for name in names if name)
    return next((f"{node.op_type}: {reason}" for reason in reasons if reason), None)


def _gemm(trace: Trace, node: NodeProto) -> str | None:
    """A·W or A·Wᵀ, with a constant C."""
    reason = _refusals(trace, node, node.input[1:])
    if reason or int_attribute(node, "transA", 0):
        return reason or "Gemm reads it transposed"
    shape, turned = tuple(trace.constants[node.input[1]].dims), int_attribute(node, "transB", 0)
    n, m = reversed(shape) if turned else shape
    bias = node.input[2] if len(node.input) > 2 else ""
    bias_shape = tuple(trace.constants[bias].dims) if bias else (m,)
    if bias_shape[-1:] != (m,):
        return f"'{bias}' has not one entry per channel"
    entering, leaving = trace.entering(node.input[0], 1, n), trace.fresh(m)
    rows, columns = ((1, n), (m, 1)) if turned else ((n, 1), (1, m))
    trace.operands.append(Operand(node.input[1], node, 1, shape, entering.reshape(rows), leaving.reshape(columns)))
    if bias:
        trace.operands.append(Operand(bias, node, 2, bias_shape, None, leaving.reshape((1,) * (len(bias_shape) - 1) + (m,))))
    trace.layouts[node.output[0]] = leaving.reshape(1, m)
    return None


def _matmul(trace: Trace, node: NodeProto) -> str | None:
    """X·W with a constant matrix; P·V of two values hands the labels of V on, if they do not change along the axis that is summed."""
    left, right = node.input
    if right in trace.constants:
        return _matmul_constant(trace, node)
    labels, rank = trace.layouts.get(right), trace.rank(left)
    if labels is None or rank is None or left in trace.layouts or labels.ndim < 2 or rank < 2:
        return "read by MatMul with a value"
    if labels.shape[-2] > 1:
        return "MatMul mixes its channels"
    trace.layouts[node.output[0]] = labels.reshape((1,) * (rank - labels.ndim) + labels.shape)
    return None


def _matmul_constant(trace: Trace, node: NodeProto) -> str | None:
    left, right = node.input
    reason, rank = trace.refusal(right), trace.rank(left)
    shape = tuple(trace.constants[right].dims)
    if reason or len(shape) != 2 or rank is None:
        return f"MatMul: {reason}" if reason else "a batched MatMul" if len(shape) != 2 else "MatMul of a value whose shape is not known"
    entering, leaving = trace.entering(left, rank - 1, shape[0]), trace.fresh(shape[1])
    trace.operands.append(Operand(right, node, 1, shape, entering[:, None], leaving[None]))
    trace.layouts[node.output[0]] = leaving.reshape((1,) * (rank - 1) + leaving.shape)
    return None


def _batch_norm(trace: Trace, node: NodeProto) -> str | None:
    """γ·(x − μ) / √(σ² + ε) + β with constants: the mean takes the input's factor, γ both, β the output's; σ² and ε stay."""
    names = node.input[1:4]
    reason = _refusals(trace, node, names)
    rank = trace.rank(node.input[0])
    if reason or rank is None or int_attribute(node, "training_mode", 0) or any(node.output[1:]):
        return reason or "BatchNormalization in training, or of a value whose shape is not known"
    (count,) = trace.constants[names[0]].dims
    entering, leaving = trace.entering(node.input[0], 1, count), trace.fresh(count)
    for index, times, over in ((1, entering, leaving), (2, None, leaving), (3, None, entering)):
        trace.operands.append(Operand(node.input[index], node, index, (count,), times, over))
    trace.layouts[node.output[0]] = leaving.reshape(1, count, *(1,) * (rank - 2))
    return None


def _norm(trace: Trace, node: NodeProto) -> str | None:
    """Normalizations with a scale and a bias per channel: their input is frozen, their output is free."""
    trace.freeze(node.input[0], f"read by {node.op_type}")
    names, rank = [name for name in node.input[1:] if name], trace.rank(node.input[0])
    channel = 1 if node.op_type == "InstanceNormalization" else -1
    whole = channel == 1 or (rank is not None and int_attribute(node, "axis", -1) in (-1, rank - 1))
    if rank is None or not whole or any(trace.refusal(name) or len(trace.constants[name].dims) != 1 for name in names):
        return None
    (count,) = trace.constants[names[0]].dims
    leaving = trace.fresh(count)
    for index, name in enumerate(node.input):
        if index and name:
            trace.operands.append(Operand(name, node, index, (count,), None, leaving))
    shape = [1] * rank
    shape[channel] = count
    trace.layouts[node.output[0]] = leaving.reshape(shape)
    return None


RESCALABLE: dict[str, Handler] = {
    **dict.fromkeys(("Conv", "ConvTranspose"), _convolution),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "InstanceNormalization"), _norm),
    **dict.fromkeys(("Add", "Sub"), _sum),
    **dict.fromkeys(("Mul", "Div"), _scale),
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batch_norm,
}
"""Operator type of the default domain → its handler."""
