"""Operators that hand the labels of values on: what divides their input by a factor per channel divides their output by it.

Each handler labels the outputs of a node, or returns a reason for which no label that the node reads may take a factor (`trace.Handler`).
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from .graph import int_attribute
from .trace import Dims, Handler, Labels, Trace


def _ignore(trace: Trace, node: NodeProto) -> str | None:
    """An operator that sees shapes only."""
    return None


def _elementwise(trace: Trace, node: NodeProto) -> str | None:
    """f(x / s) = f(x) / s for s > 0."""
    if node.op_type == "PRelu" and node.input[1] in trace.layouts:
        return "a slope that is computed"
    if node.op_type == "Dropout" and len(node.input) > 2:
        return "read by Dropout in training"
    if node.input[0] in trace.layouts:
        trace.layouts[node.output[0]] = trace.layouts[node.input[0]]
    return None


def _pool(trace: Trace, node: NodeProto) -> str | None:
    """Maxima and means over positions."""
    labels = trace.layouts.get(node.input[0])
    if labels is None:
        return None
    if any(size > 1 for size in labels.shape[2:]):
        return f"{node.op_type} mixes its channels"
    trace.layouts[node.output[0]] = labels
    return None


def _reduce(trace: Trace, node: NodeProto) -> str | None:
    """Sums, means, norms and extrema over axes along which the factor is the same."""
    labels = trace.layouts.get(node.input[0])
    if labels is None:
        return None
    axes = trace.integers(node, "axes", 1)
    if not axes:
        return f"{node.op_type} over axes that are not listed"
    if any(labels.shape[axis] > 1 for axis in axes):
        return f"{node.op_type} mixes its channels"
    trace.layouts[node.output[0]] = labels if int_attribute(node, "keepdims", 1) else labels.squeeze(tuple(axes))
    return None


def _transpose(trace: Trace, node: NodeProto) -> str | None:
    """Axes in another order."""
    labels = trace.layouts.get(node.input[0])
    if labels is not None:
        perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), list(range(labels.ndim))[::-1])
        trace.layouts[node.output[0]] = labels.transpose(perm)
    return None


def _reshape(trace: Trace, node: NodeProto) -> str | None:
    """The same entries in other axes: from the first axis with channels on, both shapes must be known and hold as many entries."""
    labels = trace.layouts.get(node.input[0])
    if labels is None:
        return None
    before, after = trace.shapes.get(node.input[0]), trace.shapes.get(node.output[0])
    if before is None or after is None:
        return f"{node.op_type} between shapes that are not known"
    first = next((axis for axis, size in enumerate(labels.shape) if size > 1), labels.ndim)
    tail = [size for size in before[first:] if size is not None]
    start = next((i for i in range(len(after), -1, -1) if _product(after[i:]) == _product(before[first:])), None)
    if len(tail) < len(before) - first or start is None:
        return f"{node.op_type} does not keep its channels apart"
    moved = np.broadcast_to(labels.reshape(labels.shape[first:]), tail).reshape([size for size in after[start:] if size is not None])
    trace.layouts[node.output[0]] = _collapsed(moved).reshape((1,) * start + _collapsed(moved).shape)
    return None


def _product(dims: Dims) -> int | None:
    """Entries of a shape; None where an axis is not known."""
    known = [size for size in dims if size is not None]
    return int(np.prod(known, dtype=np.int64)) if len(known) == len(dims) else None


def _collapsed(labels: Labels) -> Labels:
    """Length 1 for each axis along which labels do not change."""
    for axis in range(labels.ndim):
        head = labels.take([0], axis) if labels.shape[axis] else labels
        labels = head if bool((labels == head).all()) else labels
    return labels


def _concat(trace: Trace, node: NodeProto) -> str | None:
    """Labels side by side; values without labels take part as frozen ones. Along other axes than the channels, all share theirs."""
    known = [trace.layouts[name] for name in node.input if name in trace.layouts]
    if not known:
        return None
    axis = int_attribute(node, "axis", 1) % known[0].ndim
    if len(known) == len(node.input) and all(part.shape[axis] == 1 and part.shape == known[0].shape for part in known):
        trace.ties += [(known[0], part) for part in known[1:]]
        trace.layouts[node.output[0]] = known[0]
        return None
    if any(size > 1 for part in known for i, size in enumerate(part.shape) if i != axis):
        return "Concat with values whose channels lie along another axis"
    parts = []
    for name in node.input:
        labels, dims = trace.layouts.get(name), trace.shapes.get(name)
        size = dims[axis] if dims is not None else None
        if size is None:
            return f"Concat with '{name}', whose size is not known"
        shape = [size if i == axis else 1 for i in range(known[0].ndim)]
        parts.append(trace.stuck(f"'{name}' takes no factor", *shape) if labels is None else np.broadcast_to(labels, shape))
    trace.layouts[node.output[0]] = np.concatenate(parts, axis)
    return None


def _split(trace: Trace, node: NodeProto) -> str | None:
    """Each part has its own labels."""
    labels = trace.layouts.get(node.input[0])
    if labels is None:
        return None
    axis = int_attribute(node, "axis", 0) % labels.ndim
    start = 0
    parts = []
    for name in node.output:
        size = trace.shapes[name][axis] if name in trace.shapes else None
        if size is None and labels.shape[axis] > 1:
            return "Split into sizes that are not known"
        stop = start + (size or 0)
        parts.append(labels if labels.shape[axis] == 1 else labels.take(np.arange(start, stop), axis))
        start = stop
    trace.layouts.update(zip(node.output, parts, strict=True))
    return None


def _resize(trace: Trace, node: NodeProto) -> str | None:
    """Interpolation within channels is linear; what lies outside the image is not."""
    labels, after = trace.layouts.get(node.input[0]), trace.shapes.get(node.output[0])
    if labels is None:
        return None
    if any(a.name == "coordinate_transformation_mode" and a.s == b"tf_crop_and_resize" for a in node.attribute):
        return f"{node.op_type} adds a constant outside the image"
    if after is None or any(size > 1 and size != new for size, new in zip(labels.shape, after, strict=True)):
        return f"{node.op_type} mixes its channels"
    trace.layouts[node.output[0]] = labels
    return None


HOMOGENEOUS: dict[str, Handler] = {
    **dict.fromkeys(("Relu", "LeakyRelu", "PRelu", "Identity", "Dropout", "Neg", "Abs"), _elementwise),
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), _pool),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2"), _reduce),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    **dict.fromkeys(("Shape", "Size"), _ignore),
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
}
"""Operator type of the default domain → its handler."""
