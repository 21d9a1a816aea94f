"""Rescale channels so that one scale fits all channels of an activation, without changing what the model computes.

Before: a value whose channels differ in range loses the small ones when it is quantized with one scale. After: what writes channel c is
divided by s_c, and all that reads channel c is multiplied by s_c. This is cross-layer equalization (Nagel et al., "Data-free quantization
through weight equalization and bias correction", 2019, arXiv 1906.04721, section 4.1) where convolutions and matrix products write, and
SmoothQuant (Xiao et al., 2022, arXiv 2211.10438, equation 4) where a normalization or a product with a constant does. Both use

    s_c = max(r_c)^α / max|w_c|^(1−α),

with r_c the root mean square of channel c where a site reads it, from the site's second moment, and w_c what that site multiplies it with.
Factors are centred on 1 within a stream, rounded to powers of two and kept within [1/16, 16]. Products and sums of floats scale exactly
by powers of two, so every value outside the rescaled streams keeps its bits, as long as no activation overflows or becomes subnormal;
that weights do neither is checked.

How it is found. Every value gets *labels*: integers of the value's rank, each axis full or 1, that say which factor its entries carry.
Operators hand labels on (`Relu`, pools, `Reshape`, `Concat`, ...), tie labels to each other (`Add` of two values, and so residual
streams; a weight with two uses), start new ones (whatever has constants that can take a factor), or freeze them at 1. Labels that are tied
share one factor. A *stream* is all values that share factors with each other.

Must not fire on: graph inputs and outputs; values that reach an operator which is not positively homogeneous, a nested graph, a function
or another domain; constants that callers may override, that something else reads too, that are computed, or that are not float32 or
float64 (others have too few exponents); streams without measured statistics, or whose ranges would not become more equal; anything in
models with training information or quantization annotations. Each stream that stays is listed with its reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from intaglio.ops.moment import Moment

from .graph import MAIN, ValueIndex, output_names, reads, topological
from .model import Model
from .sites import Site
from .weights import WeightStore, is_external

ALPHA = 0.5
"""Share of the imbalance that moves from activations into weights: SmoothQuant's default."""

MAX_EXPONENT = 4
"""Factors lie in [2⁻⁴, 2⁴]: beyond, a weight's own scale would have to cover too wide a range."""

_STANDARD = ("", "ai.onnx")
_EXACT = (TensorProto.FLOAT, TensorProto.DOUBLE)
_SHAPE_ELEMENTS = 1 << 10
"""Constants up to this size may be shapes, so shape inference sees their values."""

Labels = NDArray[np.int64]
Shape = tuple[int, ...]
Dims = tuple[int | None, ...]


@dataclass(frozen=True)
class Equalization:
    """What became of one stream.

    Attributes:
        value: its first value.
        tensors: the constants that were rescaled for it; none where it was declined.
        channels: number of independent factors.
        rescaled: how many of them are not 1.
        bits_before: log₂ of the largest range over the geometric mean of all: bits that a common scale costs the mean channel.
        bits_after: the same after rescaling, predicted; both are 0 where no ranges are known.
        reason: why it was declined, or why some of its channels could not take a factor; empty where nothing stood in the way.
    """

    value: str
    tensors: tuple[str, ...]
    channels: int
    rescaled: int
    bits_before: float
    bits_after: float
    reason: str


def equalize(
    model: Model, sites: Iterable[Site], statistics: Mapping[str, Moment], *, alpha: float = ALPHA
) -> tuple[Model, tuple[Equalization, ...]]:
    """Rescale the channels of every stream that allows it. No data is run; large weights are read one at a time.

    Sites and moments of the result differ from those of `model` and have to be found again.

    Args:
        model: the model; it is not changed, and returned itself where nothing is rescaled.
        sites: found in `model`.
        statistics: second moments of the sites' inputs, by site name; a prior (no rows) says nothing about ranges.
        alpha: share of the imbalance, from 0 to 1, that moves from activations into weights.

    Returns:
        The model, and one record per stream in the order of the graph.

    Raises:
        ValueError: `alpha` lies outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, expected a number from 0 to 1")
    trace = _traced(model)
    measured = _measured(trace, sites, statistics)
    while True:
        streams = _solve(trace, model.weights, measured, alpha)
        tensors, inexact = _rescaled(trace, model.weights, streams)
        if not inexact:
            break
        trace.frozen += inexact
    records = tuple(_record(stream, trace, streams) for stream in streams.all)
    if not tensors:
        return model, records
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    for name, tensor in _constants(proto).items():
        if name in tensors:
            tensor.CopyFrom(tensors[name])
    return replace(model, proto=proto), records


# ---- tracing: which factor each entry of each value carries


@dataclass(frozen=True, eq=False)
class _Operand:
    """A constant that takes factors where one node reads it: entries times s[times] over s[over].

    Attributes:
        tensor: the constant's name.
        node: the node.
        index: which of its inputs.
        view: shape in which the factors broadcast against the constant's entries.
        times: labels to multiply with, broadcasting to `view`; None for none.
        over: labels to divide by, likewise.
    """

    tensor: str
    node: NodeProto
    index: int
    view: Shape
    times: Labels | None
    over: Labels | None

    @property
    def sides(self) -> tuple[Labels | None, Labels | None]:
        """Both labels."""
        return self.times, self.over


@dataclass
class _Trace:
    """Everything that is known of labels. Handlers of operators read and extend it.

    Attributes:
        constants: constants of the main graph, by name.
        overridable: those among them that callers may override.
        embedded: those that lie in a node, and stay there.
        shapes: of values, as far as inferred.
        layouts: labels of values, in the order of the graph.
        operands: constants that take factors.
        ties: pairs of equally shaped labels that share factors.
        frozen: labels whose factor is 1, with the reason.
        count: of labels so far.
    """

    constants: Mapping[str, TensorProto]
    overridable: frozenset[str]
    embedded: frozenset[str]
    shapes: Mapping[str, Dims]
    index: ValueIndex
    layouts: dict[str, Labels] = field(default_factory=dict)
    operands: list[_Operand] = field(default_factory=list)
    ties: list[tuple[Labels, Labels]] = field(default_factory=list)
    frozen: list[tuple[Labels, str]] = field(default_factory=list)
    count: int = 0

    def fresh(self, *shape: int) -> Labels:
        """New labels."""
        size = int(np.prod(shape, dtype=np.int64))
        self.count += size
        return np.arange(self.count - size, self.count).reshape(shape)

    def stuck(self, reason: str, *shape: int) -> Labels:
        """New labels that are frozen."""
        labels = self.fresh(*shape)
        self.frozen.append((labels, reason))
        return labels

    def freeze(self, name: str, reason: str) -> None:
        """Freeze a value's labels, if it has any."""
        if name in self.layouts:
            self.frozen.append((self.layouts[name], reason))

    def rank(self, name: str) -> int | None:
        """Number of a value's axes."""
        if name in self.layouts:
            return self.layouts[name].ndim
        if name in self.constants:
            return len(self.constants[name].dims)
        return len(self.shapes[name]) if name in self.shapes else None

    def refusal(self, name: str) -> str | None:
        """None for a constant that could take factors, else why it cannot."""
        if name not in self.constants:
            return f"'{name}' is not a constant"
        if name in self.overridable:
            return f"callers may override '{name}'"
        tensor = self.constants[name]
        if tensor.data_type not in _EXACT:
            return f"'{name}' is {TensorProto.DataType.Name(tensor.data_type)}, which has too few exponents"
        return None

    def entering(self, name: str, axis: int, count: int) -> Labels:
        """(count,) labels of what a node reads along one axis; a value that cannot give them is frozen, and so are its stand-ins."""
        labels = self.layouts.get(name)
        if labels is not None and labels.shape[axis] == labels.size == count:
            return labels.reshape(count)
        self.freeze(name, "its channels are not those that its reader multiplies")
        return self.stuck(f"shares a weight with '{name}', which takes no factor", count)


Handler = Callable[[_Trace, NodeProto], str | None]
"""Labels a node's outputs; a reason instead freezes all labels that the node reads."""


def _traced(model: Model) -> _Trace:
    """Label all values of the main graph."""
    graph = model.proto.graph
    overridable = frozenset(value.name for value in graph.input) if model.proto.ir_version >= 4 else frozenset[str]()
    constants = _constants(model.proto)
    embedded = frozenset(constants) - {tensor.name for tensor in graph.initializer}
    trace = _Trace(constants, overridable, embedded, _shapes(model.proto), ValueIndex(model.proto))
    local = {(function.domain, function.name) for function in model.proto.functions}
    for node in topological(graph.node):
        standard = node.domain in _STANDARD and (node.domain, node.op_type) not in local
        reason = _HANDLERS.get(node.op_type if standard else "", _refuse)(trace, node)
        if reason is not None:
            for name in sorted(reads(node)):
                trace.freeze(name, reason)
    for name in output_names(graph):
        trace.freeze(name, f"'{name}' is an output of the graph")
    if model.proto.training_info or graph.quantization_annotation:
        for name in trace.layouts:
            trace.freeze(name, "training information or quantization annotations refer to values by name")
    _tie_shared(trace, set(output_names(graph)))
    return trace


def _tie_shared(trace: _Trace, outputs: set[str]) -> None:
    """Tie the labels of all uses of a constant, or freeze them where some use cannot take the same factors."""
    shared: defaultdict[str, list[_Operand]] = defaultdict(list)
    for operand in trace.operands:
        shared[operand.tensor].append(operand)
    for name, operands in shared.items():
        known = {(*operand.node.output, operand.index) for operand in operands}
        unknown = [use for use in trace.index.uses(name) if use.scope.path != MAIN or (*use.node.output, use.index) not in known]
        signatures = {(operand.view, *(None if side is None else side.shape for side in operand.sides)) for operand in operands}
        if name in outputs or unknown or len(signatures) > 1:
            what = "an output of the graph" if name in outputs else f"read by {unknown[0].node.op_type}" if unknown else "read in two ways"
            trace.frozen += [(side, f"'{name}' is also {what}") for operand in operands for side in operand.sides if side is not None]
            continue
        for operand in operands[1:]:
            pairs = zip(operands[0].sides, operand.sides, strict=True)
            trace.ties += [(one, other) for one, other in pairs if one is not None and other is not None]


def _constants(proto: ModelProto) -> dict[str, TensorProto]:
    """Initializers and the tensors of Constant nodes in the main graph, by the names of their values."""
    found = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.domain in _STANDARD and node.attribute and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return found


def _shapes(proto: ModelProto) -> dict[str, Dims]:
    """Shapes of values, None for an axis that is not known; inferred from the graph's inputs alone, on a copy without large weights."""
    skeleton = ModelProto(ir_version=max(4, proto.ir_version), opset_import=proto.opset_import, functions=proto.functions)
    skeleton.graph.node.extend(node for node in proto.graph.node if not _holds_large(node))
    constants = _constants(proto)
    skeleton.graph.input.extend(value for value in proto.graph.input if value.name not in constants)
    for name, tensor in constants.items():
        if _is_small(tensor):
            if all(name not in node.output for node in skeleton.graph.node):
                skeleton.graph.initializer.append(tensor)
        else:
            skeleton.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    graph = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    return {value.name: _dims(value) for value in (*graph.input, *graph.value_info) if value.type.tensor_type.HasField("shape")}


def _is_small(tensor: TensorProto) -> bool:
    return not is_external(tensor) and int(np.prod(tensor.dims, dtype=np.int64)) <= _SHAPE_ELEMENTS


def _holds_large(node: NodeProto) -> bool:
    return node.op_type == "Constant" and any(a.name == "value" and not _is_small(a.t) for a in node.attribute)


def _dims(value: onnx.ValueInfoProto) -> Dims:
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim)


# ---- operators


def _attribute(node: NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _integers(trace: _Trace, node: NodeProto, name: str, index: int) -> list[int] | None:
    """An integer list that is an attribute or, later, an input; None where it is neither, or not embedded."""
    attribute = next((a for a in node.attribute if a.name == name), None)
    if attribute is not None:
        return list(attribute.ints)
    name = node.input[index] if len(node.input) > index else ""
    tensor = trace.constants.get(name)
    if tensor is None or not _is_small(tensor) or name in trace.overridable:
        return None
    return [int(value) for value in numpy_helper.to_array(tensor).reshape(-1)]


def _refuse(trace: _Trace, node: NodeProto) -> str | None:
    """An operator that is not positively homogeneous, or not known to be."""
    return f"read by {node.op_type}"


def _ignore(trace: _Trace, node: NodeProto) -> str | None:
    """An operator that sees shapes only."""
    return None


def _elementwise(trace: _Trace, node: NodeProto) -> str | None:
    """f(x / s) = f(x) / s for s > 0."""
    if node.op_type == "PRelu" and node.input[1] in trace.layouts:
        return "a slope that is computed"
    if node.op_type == "Dropout" and len(node.input) > 2:
        return "read by Dropout in training"
    if node.input[0] in trace.layouts:
        trace.layouts[node.output[0]] = trace.layouts[node.input[0]]
    return None


def _pool(trace: _Trace, node: NodeProto) -> str | None:
    """Maxima and means over positions."""
    labels = trace.layouts.get(node.input[0])
    if labels is None:
        return None
    if any(size > 1 for size in labels.shape[2:]):
        return f"{node.op_type} mixes its channels"
    trace.layouts[node.output[0]] = labels
    return None


def _reduce(trace: _Trace, node: NodeProto) -> str | None:
    """Sums, means, norms and extrema over axes along which the factor is the same."""
    labels = trace.layouts.get(node.input[0])
    if labels is None:
        return None
    axes = _integers(trace, node, "axes", 1)
    if not axes:
        return f"{node.op_type} over axes that are not listed"
    if any(labels.shape[axis] > 1 for axis in axes):
        return f"{node.op_type} mixes its channels"
    trace.layouts[node.output[0]] = labels if _attribute(node, "keepdims", 1) else labels.squeeze(tuple(axes))
    return None


def _transpose(trace: _Trace, node: NodeProto) -> str | None:
    """Axes in another order."""
    labels = trace.layouts.get(node.input[0])
    if labels is not None:
        perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), list(range(labels.ndim))[::-1])
        trace.layouts[node.output[0]] = labels.transpose(perm)
    return None


def _reshape(trace: _Trace, node: NodeProto) -> str | None:
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


def _concat(trace: _Trace, node: NodeProto) -> str | None:
    """Labels side by side; values without labels take part as frozen ones. Along other axes than the channels, all share theirs."""
    known = [trace.layouts[name] for name in node.input if name in trace.layouts]
    if not known:
        return None
    axis = _attribute(node, "axis", 1) % known[0].ndim
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


def _split(trace: _Trace, node: NodeProto) -> str | None:
    """Each part has its own labels."""
    labels = trace.layouts.get(node.input[0])
    if labels is None:
        return None
    axis = _attribute(node, "axis", 0) % labels.ndim
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


def _resize(trace: _Trace, node: NodeProto) -> str | None:
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


def _aligned(trace: _Trace, node: NodeProto) -> tuple[list[Labels | None], list[Shape | None]] | str:
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


def _sum(trace: _Trace, node: NodeProto) -> str | None:
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
        trace.operands.append(_Operand(name, node, side, shape, None, other))
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


def _scale(trace: _Trace, node: NodeProto) -> str | None:
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


def _scale_constant(trace: _Trace, node: NodeProto, side: int, labels: Labels | None, shape: Shape) -> str | None:
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
    trace.operands.append(_Operand(name, node, side, shape, times, over))
    trace.layouts[node.output[0]] = leaving
    return None


def _convolution(trace: _Trace, node: NodeProto) -> str | None:
    """Conv and ConvTranspose with any groups: weight (m, n/groups, *kernel) or (n, m/groups, *kernel)."""
    reason = _refusals(trace, node, node.input[1:])
    if reason:
        return reason
    shape = tuple(trace.constants[node.input[1]].dims)
    groups, ones = _attribute(node, "group", 1), (1,) * len(shape[2:])
    view = (groups, shape[0] // groups, *shape[1:])
    outputs, inputs = (2, 1) if node.op_type == "ConvTranspose" else (1, 2)
    entering = trace.entering(node.input[0], 1, groups * view[inputs])
    leaving = trace.fresh(groups * view[outputs])
    times, over = (
        labels.reshape(groups, *(view[axis] if axis == own else 1 for axis in (1, 2)), *ones)
        for labels, own in ((entering, inputs), (leaving, outputs))
    )
    trace.operands.append(_Operand(node.input[1], node, 1, view, times, over))
    if len(node.input) > 2 and node.input[2]:
        trace.operands.append(_Operand(node.input[2], node, 2, leaving.shape, None, leaving))
    trace.layouts[node.output[0]] = leaving.reshape(1, -1, *ones)
    return None


def _refusals(trace: _Trace, node: NodeProto, names: Sequence[str]) -> str | None:
    """Why one of a node's parameters takes no factor."""
    reasons = (trace.refusal(name) for name in names if name)
    return next((f"{node.op_type}: {reason}" for reason in reasons if reason), None)


def _gemm(trace: _Trace, node: NodeProto) -> str | None:
    """A·W or A·Wᵀ, with a constant C."""
    reason = _refusals(trace, node, node.input[1:])
    if reason or _attribute(node, "transA", 0):
        return reason or "Gemm reads it transposed"
    shape, turned = tuple(trace.constants[node.input[1]].dims), _attribute(node, "transB", 0)
    n, m = reversed(shape) if turned else shape
    bias = node.input[2] if len(node.input) > 2 else ""
    bias_shape = tuple(trace.constants[bias].dims) if bias else (m,)
    if bias_shape[-1:] != (m,):
        return f"'{bias}' has not one entry per channel"
    entering, leaving = trace.entering(node.input[0], 1, n), trace.fresh(m)
    rows, columns = ((1, n), (m, 1)) if turned else ((n, 1), (1, m))
    trace.operands.append(_Operand(node.input[1], node, 1, shape, entering.reshape(rows), leaving.reshape(columns)))
    if bias:
        trace.operands.append(_Operand(bias, node, 2, bias_shape, None, leaving.reshape((1,) * (len(bias_shape) - 1) + (m,))))
    trace.layouts[node.output[0]] = leaving.reshape(1, m)
    return None


def _matmul(trace: _Trace, node: NodeProto) -> str | None:
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


def _matmul_constant(trace: _Trace, node: NodeProto) -> str | None:
    left, right = node.input
    reason, rank = trace.refusal(right), trace.rank(left)
    shape = tuple(trace.constants[right].dims)
    if reason or len(shape) != 2 or rank is None:
        return f"MatMul: {reason}" if reason else "a batched MatMul" if len(shape) != 2 else "MatMul of a value whose shape is not known"
    entering, leaving = trace.entering(left, rank - 1, shape[0]), trace.fresh(shape[1])
    trace.operands.append(_Operand(right, node, 1, shape, entering[:, None], leaving[None]))
    trace.layouts[node.output[0]] = leaving.reshape((1,) * (rank - 1) + leaving.shape)
    return None


def _batch_norm(trace: _Trace, node: NodeProto) -> str | None:
    """γ·(x − μ) / √(σ² + ε) + β with constants: the mean takes the input's factor, γ both, β the output's; σ² and ε stay."""
    names = node.input[1:4]
    reason = _refusals(trace, node, names)
    rank = trace.rank(node.input[0])
    if reason or rank is None or _attribute(node, "training_mode", 0) or any(node.output[1:]):
        return reason or "BatchNormalization in training, or of a value whose shape is not known"
    (count,) = trace.constants[names[0]].dims
    entering, leaving = trace.entering(node.input[0], 1, count), trace.fresh(count)
    for index, times, over in ((1, entering, leaving), (2, None, leaving), (3, None, entering)):
        trace.operands.append(_Operand(node.input[index], node, index, (count,), times, over))
    trace.layouts[node.output[0]] = leaving.reshape(1, count, *(1,) * (rank - 2))
    return None


def _norm(trace: _Trace, node: NodeProto) -> str | None:
    """Normalizations with a scale and a bias per channel: their input is frozen, their output is free."""
    trace.freeze(node.input[0], f"read by {node.op_type}")
    names, rank = [name for name in node.input[1:] if name], trace.rank(node.input[0])
    channel = 1 if node.op_type == "InstanceNormalization" else -1
    whole = channel == 1 or (rank is not None and _attribute(node, "axis", -1) in (-1, rank - 1))
    if rank is None or not whole or any(trace.refusal(name) or len(trace.constants[name].dims) != 1 for name in names):
        return None
    (count,) = trace.constants[names[0]].dims
    leaving = trace.fresh(count)
    for index, name in enumerate(node.input):
        if index and name:
            trace.operands.append(_Operand(name, node, index, (count,), None, leaving))
    shape = [1] * rank
    shape[channel] = count
    trace.layouts[node.output[0]] = leaving.reshape(shape)
    return None


_HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(("Relu", "LeakyRelu", "PRelu", "Identity", "Dropout", "Neg", "Abs"), _elementwise),
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), _pool),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2"), _reduce),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    **dict.fromkeys(("Conv", "ConvTranspose"), _convolution),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "InstanceNormalization"), _norm),
    **dict.fromkeys(("Add", "Sub"), _sum),
    **dict.fromkeys(("Mul", "Div"), _scale),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    **dict.fromkeys(("Shape", "Size"), _ignore),
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batch_norm,
}


# ---- solving: a factor for each set of tied labels


@dataclass(frozen=True, eq=False)
class _Measured:
    """An operand that is a site, with the mean square of what it multiplies.

    Attributes:
        operand: the operand; `times` are its input channels.
        squares: of each of them, in the order of `times`.
    """

    operand: _Operand
    squares: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Stream:
    """Values that share factors, and what was decided for them; the fields are those of `Equalization`."""

    value: str
    classes: NDArray[np.int64]
    rescaled: int
    bits_before: float
    bits_after: float
    reason: str


@dataclass(frozen=True, eq=False)
class _Streams:
    """A solution.

    Attributes:
        all: the streams, in the order of the graph.
        classes: class of each label: labels of one class share a factor.
        exponents: log₂ of each class's factor.
    """

    all: tuple[_Stream, ...]
    classes: NDArray[np.int64]
    exponents: NDArray[np.int64]

    def exponent(self, operand: _Operand) -> NDArray[np.int64]:
        """log₂ of what a constant's entries are multiplied with, broadcasting to the operand's view."""
        total = np.zeros((1,) * len(operand.view), np.int64)
        for labels, sign in ((operand.times, 1), (operand.over, -1)):
            if labels is not None:
                total = total + sign * self.exponents[self.classes[labels]]
        return total


def _measured(trace: _Trace, sites: Iterable[Site], statistics: Mapping[str, Moment]) -> list[_Measured]:
    """Which operands are sites with a measured input."""
    names = {(use.use.node.output[0], use.use.index): site.name for site in sites for use in site.uses if use.scope == MAIN}
    found = []
    for operand in trace.operands:
        moment = statistics.get(names.get((operand.node.output[0], operand.index), ""))
        if moment is not None and moment.rows > 0 and operand.times is not None:
            squares = moment.diag.reshape(operand.times.size, -1).mean(1)  # of a Conv: over the positions of the kernel
            found.append(_Measured(operand, squares))
    return found


def _solve(trace: _Trace, weights: WeightStore, measured: Sequence[_Measured], alpha: float) -> _Streams:
    """Classes, streams and factors."""
    ties = [(one.reshape(-1), other.reshape(-1)) for one, other in trace.ties]
    classes = _components(trace.count, ties)
    count = int(classes.max(initial=-1)) + 1
    reasons = _reasons(trace, classes)
    ranges, extents = np.zeros(count), np.zeros(count)
    for each in measured:
        labels = each.operand.times
        if labels is None or all(int(one) in reasons for one in classes[labels].reshape(-1)):
            continue
        np.maximum.at(ranges, classes[labels].reshape(-1), np.sqrt(each.squares))
        np.maximum.at(extents, classes[labels].reshape(-1), _extent(weights.read(trace.constants[each.operand.tensor]), each.operand))
    exponents = np.zeros(count, np.int64)
    streams = []
    for value, members in _members(trace, classes, count):
        frozen = np.array([int(one) in reasons for one in members])
        chosen, stream = _decide(value, members, frozen, (ranges[members], extents[members]), alpha)
        exponents[members] = chosen
        why = next((reasons[int(one)] for one in members if int(one) in reasons), "")
        streams.append(replace(stream, reason="; ".join(filter(None, (why, stream.reason)))))
    return _Streams(tuple(streams), classes, exponents)


def _reasons(trace: _Trace, classes: NDArray[np.int64]) -> dict[int, str]:
    """Frozen classes, each with the first reason."""
    reasons: dict[int, str] = {}
    for labels, reason in trace.frozen:
        for one in np.unique(classes[labels]):
            reasons.setdefault(int(one), reason)
    return reasons


def _components(count: int, pairs: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> NDArray[np.int64]:
    """Connected component of each of `count` vertices."""
    if not count:
        return np.empty(0, np.int64)
    ends = [np.concatenate([pair[side] for pair in pairs]) if pairs else np.empty(0, np.int64) for side in (0, 1)]
    graph = coo_array((np.ones(len(ends[0])), (ends[0], ends[1])), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def _members(trace: _Trace, classes: NDArray[np.int64], count: int) -> list[tuple[str, NDArray[np.int64]]]:
    """Streams as (first value, classes): values that share a class are in one stream."""
    owned = [np.unique(classes[labels]) for labels in trace.layouts.values()]
    pairs = [(np.full(len(own), count + number), own) for number, own in enumerate(owned)]
    parts = _components(count + len(owned), pairs)
    streams: dict[int, tuple[str, list[NDArray[np.int64]]]] = {}
    for number, (name, own) in enumerate(zip(trace.layouts, owned, strict=True)):
        streams.setdefault(int(parts[count + number]), (name, []))[1].append(own)
    return [(name, np.unique(np.concatenate(own))) for name, own in streams.values()]


def _extent(value: NDArray[np.generic], operand: _Operand) -> NDArray[np.float64]:
    """Largest magnitude of a weight for each of its input channels, in the order of `times`."""
    labels = operand.times
    assert labels is not None  # only measured operands come here
    axes = tuple(axis for axis, size in enumerate(labels.shape) if size == 1)
    view = np.asarray(value).reshape(operand.view)
    return np.asarray(np.maximum(view.max(axis=axes), -view.min(axis=axes)), np.float64).reshape(-1)


def _decide(
    value: str,
    members: NDArray[np.int64],
    frozen: NDArray[np.bool_],
    measured: tuple[NDArray[np.float64], NDArray[np.float64]],
    alpha: float,
) -> tuple[NDArray[np.int64], _Stream]:
    """log₂ of the factors of one stream's classes, and the stream.

    Args:
        value: the stream's first value.
        members: its classes.
        frozen: which of them keep the factor 1.
        measured: range of each class, and largest weight that reads it; 0 where not known.
        alpha: as in `equalize`.
    """
    ranges, extents = measured
    none = np.zeros(len(members), np.int64)
    known = (ranges > 0) & (extents > 0)
    if not (known & ~frozen).any():
        return none, _Stream(value, members, 0, 0.0, 0.0, "" if frozen.all() else "no statistics of what reads it")
    wanted = np.zeros(len(members))
    wanted[known] = alpha * np.log2(ranges[known]) - (1 - alpha) * np.log2(extents[known])
    centred = np.rint(wanted - wanted[known].mean())
    exponents = np.where(known & ~frozen, np.clip(centred, -MAX_EXPONENT, MAX_EXPONENT), 0).astype(np.int64)
    active = ranges > 0
    before, after = (_bits(np.log2(ranges[active]) - shift) for shift in (0, exponents[active]))
    if after >= before:
        reason = "its ranges would become less equal" if exponents.any() else "its channels are balanced already"
        return none, _Stream(value, members, 0, before, before, reason)
    return exponents, _Stream(value, members, int(np.count_nonzero(exponents)), before, after, "")


def _bits(logarithms: NDArray[np.float64]) -> float:
    return float(logarithms.max() - logarithms.mean())


# ---- applying


def _rescaled(trace: _Trace, weights: WeightStore, streams: _Streams) -> tuple[dict[str, TensorProto], list[tuple[Labels, str]]]:
    """The constants that change, and the labels that have to be frozen because a constant would lose digits."""
    tensors: dict[str, TensorProto] = {}
    inexact: list[tuple[Labels, str]] = []
    for operand in {operand.tensor: operand for operand in trace.operands}.values():
        exponent = streams.exponent(operand).astype(np.int32)
        if not exponent.any():
            continue
        stored = trace.constants[operand.tensor]
        value = weights.read(stored)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            scaled = np.ldexp(value.reshape(operand.view), exponent)
            lost = np.ldexp(scaled, -exponent) != value.reshape(operand.view)
        if lost.any():
            sides = (np.broadcast_to(side, operand.view)[lost] for side in operand.sides if side is not None)
            inexact += [(labels, f"'{operand.tensor}' would lose digits") for labels in sides]
            continue
        embed, scaled = operand.tensor in trace.embedded, scaled.reshape(value.shape)
        tensors[operand.tensor] = numpy_helper.from_array(scaled, stored.name) if embed else weights.spool(stored.name, scaled)
    return tensors, inexact


def _record(stream: _Stream, trace: _Trace, streams: _Streams) -> Equalization:
    """What is reported of a stream."""
    own = np.zeros(len(streams.exponents), np.bool_)
    own[stream.classes] = streams.exponents[stream.classes] != 0
    touched = (
        operand.tensor for operand in trace.operands if any(side is not None and own[streams.classes[side]].any() for side in operand.sides)
    )
    tensors = tuple(dict.fromkeys(touched))
    return Equalization(stream.value, tensors, len(stream.classes), stream.rescaled, stream.bits_before, stream.bits_after, stream.reason)
