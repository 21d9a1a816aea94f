"""What is known of every value of a model before it runs: element type, lengths, and the elements of small constants.

onnx's shape inference does the most. Operators of ONNX Runtime that it does not know are shown to it as standard operators of the same
result type. Constants are what initializers, `Constant` nodes and static shapes amount to through small deterministic operators,
evaluated by onnx's reference evaluator; each round of constants can make more shapes static, so the two alternate until nothing is new.

Reads no weights: a weight is known by type and shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from intaglio.ops.vjp import Value

from .errors import InputError
from .graph import STANDARD, topological
from .modernize import SMALL_BYTES
from .sites import opset
from .weights import is_external

_ROUNDS = 8  # of inference and constants; a round that finds nothing ends it sooner
_MESSAGE_LIMIT = 300  # characters of onnx's own words in an error

_MOVES = frozenset({"Gather", "Slice", "Concat", "Unsqueeze", "Squeeze", "Identity", "Reshape", "Flatten"})
"""Operators that only move elements, so that they act on what is known as on the elements. Their data is input 0, for Concat all."""

_EVALUATED = _MOVES | {
    "Abs",
    "Add",
    "And",
    "Cast",
    "Ceil",
    "ConstantOfShape",
    "Div",
    "Equal",
    "Expand",
    "Floor",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Max",
    "Min",
    "Mod",
    "Mul",
    "Neg",
    "Not",
    "Or",
    "Pow",
    "Range",
    "ReduceMax",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "Round",
    "Sqrt",
    "Sub",
    "Tile",
    "Transpose",
    "Where",
}
"""Operators with one output that constants are followed through."""


def infer(model: ModelProto, variable: Iterable[str] = (), shapes: Mapping[str, Sequence[int]] | None = None) -> dict[str, Value]:
    """Everything that is known of the values of the main graph, by name.

    Args:
        model: without large weights (`modernize`); its inputs get the lengths in `shapes`, nothing else is changed.
        variable: names of values whose elements must not be taken as constant, since they will be changed.
        shapes: lengths of inputs that the model leaves open.

    Returns:
        Values whose element type is known; a value that is missing has none that onnx can infer.

    Raises:
        InputError: `shapes` names no input or contradicts it, or the model's declared types contradict each other.
    """
    _declare(model.graph, shapes or {})
    shadow = ModelProto()
    shadow.CopyFrom(model)
    _stand_in(shadow.graph)
    fixed = set(variable)
    nodes = topological(model.graph.node)
    constants = _initial(model.graph, fixed)
    partial: dict[str, tuple[NDArray[Any], NDArray[np.bool_]]] = {}
    for _ in range(_ROUNDS):
        values = _inferred(shadow)
        fresh = _propagate(nodes, values, constants, partial, opset(model), fixed)
        lengths = _reshaped(nodes, values, partial)
        if not fresh and not lengths:
            break
        _pin(shadow.graph, fresh)
        _refine(shadow.graph, lengths)
    return {name: replace(value, constant=constants[name]) if name in constants else value for name, value in values.items()}


def typed(value: Value) -> onnx.ValueInfoProto:
    """The declaration of a value."""
    shape = None if value.shape is None else value.lengths
    return helper.make_tensor_value_info(value.name, helper.np_dtype_to_tensor_dtype(value.dtype), shape)


def nbytes(value: Value) -> int:
    """Bytes of a value; a length that only a run tells counts as one, an unknown rank as one element."""
    lengths = [1 if length is None else length for length in value.shape or ()]
    return int(np.prod(lengths, dtype=np.int64)) * value.dtype.itemsize


# --- types and shapes


def _declare(graph: GraphProto, shapes: Mapping[str, Sequence[int]]) -> None:
    inputs = {value.name: value for value in graph.input}
    for name, lengths in shapes.items():
        if name not in inputs:
            raise InputError(f"shapes: '{name}' is no input of the model, which has {', '.join(inputs)}; name one of these")
        tensor = inputs[name].type.tensor_type
        known = _lengths(tensor)
        if known is not None and (len(known) != len(lengths) or any(a is not None and a != b for a, b in zip(known, lengths, strict=True))):
            raise InputError(f"shapes: input '{name}' has shape {list(known)}, which {list(lengths)} contradicts; give lengths that fit")
        tensor.shape.CopyFrom(helper.make_tensor_type_proto(1, list(lengths)).tensor_type.shape)


def _inferred(shadow: ModelProto) -> dict[str, Value]:
    try:
        graph = shape_inference.infer_shapes(shadow, data_prop=True).graph
    except shape_inference.InferenceError as error:
        words = " ".join(str(error).split())[:_MESSAGE_LIMIT]
        raise InputError(f"the model's types contradict each other: {words}; export the model again") from error
    values: dict[str, Value] = {}
    for info in (*graph.input, *graph.value_info, *graph.output):
        if info.type.HasField("tensor_type") and info.type.tensor_type.elem_type not in (0, TensorProto.STRING):
            tensor_type = info.type.tensor_type
            values[info.name] = Value(info.name, _dtype(tensor_type.elem_type), _lengths(tensor_type), symbols=_symbols(tensor_type))
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.STRING:
            values[tensor.name] = Value(tensor.name, _dtype(tensor.data_type), tuple(tensor.dims))
    return values


def _dtype(data_type: int) -> np.dtype[Any]:
    return np.dtype(helper.tensor_dtype_to_np_dtype(data_type))


def _lengths(tensor: Any) -> tuple[int | None, ...] | None:
    """Lengths of a tensor type; None for one that is open, and for a rank that is."""
    if not tensor.HasField("shape"):
        return None
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)


def _symbols(tensor: Any) -> tuple[str | None, ...] | None:
    """Names of lengths, as `Value.symbols`."""
    return tuple(d.dim_param or None for d in tensor.shape.dim) if tensor.HasField("shape") else None


# --- operators that onnx does not know


def _stand_in(graph: GraphProto) -> None:
    """Replace operators of ONNX Runtime by standard ones whose outputs have the same types."""
    nodes: list[NodeProto] = []
    for node in graph.node:
        key = node.op_type if node.domain in STANDARD else f"{node.domain}::{node.op_type}"
        nodes.extend(_STAND_INS[key](node) if key in _STAND_INS else [node])
    del graph.node[:]
    graph.node.extend(nodes)


def _like_first(node: NodeProto) -> list[NodeProto]:
    return [helper.make_node("Relu", [node.input[0]], [node.output[0]])]


def _like_sum(node: NodeProto) -> list[NodeProto]:
    return [helper.make_node("Add", list(node.input[:2]), [node.output[0]])]


def _like_residual(node: NodeProto) -> list[NodeProto]:
    """Outputs 0 and 3 (the sum before the normalization) are like the input; what lies between is seldom given."""
    outputs = [name for index, name in enumerate(node.output) if name and index in (0, 3)]
    return [helper.make_node("Relu", [node.input[0]], [name]) for name in outputs]


def _standard(inputs: int, *attributes: str) -> Callable[[NodeProto], list[NodeProto]]:
    """The operator of the same name in the default domain, with its first inputs and some of its attributes."""

    def convert(node: NodeProto) -> list[NodeProto]:
        copy = helper.make_node(node.op_type.removeprefix("Fused"), list(node.input[:inputs]), [node.output[0]])
        copy.attribute.extend(attribute for attribute in node.attribute if attribute.name in attributes)
        return [copy]

    return convert


def _fused_matmul(node: NodeProto) -> list[NodeProto]:
    given = {attribute.name: attribute.i for attribute in node.attribute}
    if given.get("transBatchA") or given.get("transBatchB"):
        return [node]
    if not given.get("transA") and not given.get("transB"):
        return [helper.make_node("MatMul", list(node.input[:2]), [node.output[0]])]
    left, right = ("ba" if given.get("transA") else "ab"), ("cb" if given.get("transB") else "bc")
    return [helper.make_node("Einsum", list(node.input[:2]), [node.output[0]], equation=f"...{left},...{right}->...ac")]


def _dequantized_matmul(node: NodeProto) -> list[NodeProto]:
    left, right = (f"{node.output[0]}/{side}" for side in ("left", "right"))
    return [
        helper.make_node("Cast", [node.input[0]], [left], to=TensorProto.FLOAT),
        helper.make_node("Cast", [node.input[1]], [right], to=TensorProto.FLOAT),
        helper.make_node("MatMul", [left, right], [node.output[0]]),
    ]


_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")

_STAND_INS: Mapping[str, Callable[[NodeProto], list[NodeProto]]] = {
    "GroupNormalization": _like_first,
    "SimplifiedLayerNormalization": _like_first,
    "com.microsoft::BiasGelu": _like_sum,
    "com.microsoft::DequantizeLinear": _standard(3, "axis"),
    "com.microsoft::FastGelu": _like_first,
    "com.microsoft::FusedConv": _standard(3, *_CONV),
    "com.microsoft::FusedGemm": _standard(3, "alpha", "beta", "transA", "transB"),
    "com.microsoft::FusedMatMul": _fused_matmul,
    "com.microsoft::MatMulIntegerToFloat": _dequantized_matmul,
    "com.microsoft::Gelu": _like_first,
    "com.microsoft::QuantizeLinear": _standard(3, "axis"),
    "com.microsoft::QuickGelu": _like_first,
    "com.microsoft::SimplifiedLayerNormalization": _like_first,
    "com.microsoft::SkipLayerNormalization": _like_residual,
    "com.microsoft::SkipSimplifiedLayerNormalization": _like_residual,
}
"""Operator → nodes that give its outputs their types, by "domain::type" outside the default domain."""


# --- constants


def _initial(graph: GraphProto, variable: set[str]) -> dict[str, NDArray[Any]]:
    """Small initializers that no caller overrides, and what `Constant` nodes hold."""
    open_names = {value.name for value in graph.input} | variable
    found = {}
    for tensor in graph.initializer:
        if tensor.name not in open_names and tensor.data_type != TensorProto.STRING and not is_external(tensor):
            array = numpy_helper.to_array(tensor)
            if array.nbytes <= SMALL_BYTES:
                found[tensor.name] = array
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in STANDARD and node.output[0] not in open_names:
            held = _held(node)
            if held is not None and held.nbytes <= SMALL_BYTES:
                found[node.output[0]] = held
    return found


def _held(node: NodeProto) -> NDArray[Any] | None:
    """What a `Constant` node holds; None for strings and sparse tensors."""
    attribute = node.attribute[0]
    found = helper.get_attribute_value(attribute)
    if isinstance(found, TensorProto):
        if found.data_type == TensorProto.STRING or is_external(found):
            return None
        array: NDArray[Any] = numpy_helper.to_array(found)
        return array
    if attribute.name.startswith("value_float"):
        return np.asarray(found, np.float32)
    return np.asarray(found, np.int64) if attribute.name.startswith("value_int") else None


def _propagate(
    nodes: Sequence[NodeProto],
    values: Mapping[str, Value],
    constants: dict[str, NDArray[Any]],
    partial: dict[str, tuple[NDArray[Any], NDArray[np.bool_]]],
    version: int,
    variable: set[str],
) -> dict[str, NDArray[Any]]:
    """Constants that are new: static shapes and what follows from constants. Adds them to `constants`.

    `partial` holds one-dimensional values of which only some elements are known, with a mask: shapes of an open batch.
    """
    fresh: dict[str, NDArray[Any]] = {}
    for node in nodes:
        if node.domain not in STANDARD or len(node.output) != 1 or node.output[0] in constants or node.output[0] in variable:
            continue
        found, mask = _evaluated(node, values, constants, partial, version)
        if found is None or found.nbytes > SMALL_BYTES:
            continue
        if mask is None or mask.all():
            constants[node.output[0]] = fresh[node.output[0]] = found
        else:
            partial[node.output[0]] = found, mask
    return fresh


def _evaluated(
    node: NodeProto,
    values: Mapping[str, Value],
    constants: Mapping[str, NDArray[Any]],
    partial: Mapping[str, tuple[NDArray[Any], NDArray[np.bool_]]],
    version: int,
) -> tuple[NDArray[Any] | None, NDArray[np.bool_] | None]:
    """A node's output, and which of its elements are known (None: all); (None, None) if nothing is."""
    if node.op_type in ("Shape", "Size"):
        return _shape(node, values.get(node.input[0]))
    if node.op_type not in _EVALUATED or any(name and name not in constants and name not in partial for name in node.input):
        return None, None
    open_inputs = [index for index, name in enumerate(node.input) if name in partial and name not in constants]
    feed = {name: constants[name] if name in constants else partial[name][0] for name in node.input if name}
    if not open_inputs:
        return (_run(node, feed, version), None) if _is_small(node, feed) else (None, None)
    if node.op_type not in _MOVES or (node.op_type != "Concat" and open_inputs != [0]):
        return None, None
    moved = {name: array.astype(np.int64) for name, array in feed.items()}
    for index in range(len(node.input)) if node.op_type == "Concat" else (0,):
        name = node.input[index]
        moved[name] = (partial[name][1] if index in open_inputs else np.ones_like(feed[name])).astype(np.int64)
    found, mask = _run(node, feed, version), _run(node, moved, version)
    return (found, mask.astype(bool)) if found is not None and mask is not None else (None, None)


def _shape(node: NodeProto, value: Value | None) -> tuple[NDArray[Any] | None, NDArray[np.bool_] | None]:
    """What `Shape` or `Size` gives; lengths that are open come as 0."""
    if value is None or value.shape is None:
        return None, None
    if node.op_type == "Size":
        return (None, None) if value.static is None else (np.asarray(np.prod(value.static, dtype=np.int64)), None)
    bounds = {attribute.name: attribute.i for attribute in node.attribute}
    lengths = value.shape[bounds.get("start", 0) : bounds.get("end", len(value.shape))]
    return np.array([length or 0 for length in lengths], np.int64), np.array([length is not None for length in lengths], bool)


def _is_small(node: NodeProto, feed: Mapping[str, NDArray[Any]]) -> bool:
    """Whether an operator whose output's shape comes from elements stays within the limit; the others hardly outgrow their inputs."""
    if node.op_type in ("Expand", "ConstantOfShape"):
        return bool(np.prod(feed[node.input[-1]], dtype=np.float64) <= SMALL_BYTES)
    if node.op_type == "Tile":
        return bool(np.prod(feed[node.input[1]], dtype=np.float64) * feed[node.input[0]].size <= SMALL_BYTES)
    if node.op_type == "Range":
        start, limit, delta = (float(feed[name]) for name in node.input)
        return delta != 0 and (limit - start) / delta <= SMALL_BYTES
    return True


def _run(node: NodeProto, feed: Mapping[str, NDArray[Any]], version: int) -> NDArray[Any] | None:
    """The node's output; None where the reference evaluator refuses."""
    with suppress(Exception), np.errstate(all="ignore"):  # a constant that cannot be had is none; the runtime says why when it loads
        (result,) = ReferenceEvaluator(node, opsets={"": version}).run(None, dict(feed))
        return np.asarray(result)
    return None


def _reshaped(
    nodes: Sequence[NodeProto], values: Mapping[str, Value], partial: Mapping[str, tuple[NDArray[Any], NDArray[np.bool_]]]
) -> list[Value]:
    """Results of `Reshape` of which lengths are known that inference did not find, because only a part of the shape is constant."""
    found = []
    for node in nodes:
        if node.op_type != "Reshape" or node.domain not in STANDARD or node.input[1] not in partial or node.output[0] not in values:
            continue
        target, mask = partial[node.input[1]]
        value = values[node.output[0]]
        known = [int(length) if sure and length > 0 else None for length, sure in zip(target, mask, strict=True)]
        old = value.shape if value.shape is not None else (None,) * len(known)
        lengths = tuple(b if a is None else a for a, b in zip(old, known, strict=True))
        if lengths != value.shape:
            found.append(replace(value, shape=lengths))
    return found


def _refine(graph: GraphProto, values: Iterable[Value]) -> None:
    """Declare values, so that inference starts from more than it finds."""
    declared = {value.name: typed(value) for value in values}
    for info in (*graph.value_info, *graph.output):
        if info.name in declared:
            info.CopyFrom(declared.pop(info.name))
    graph.value_info.extend(declared.values())


def _pin(graph: GraphProto, constants: Mapping[str, NDArray[Any]]) -> None:
    """Make values initializers, so that inference sees their elements."""
    outputs = {value.name for value in graph.output}
    kept = [node for node in graph.node if not (len(node.output) == 1 and node.output[0] in constants and node.output[0] not in outputs)]
    made = {name for node in graph.node for name in node.output} - {name for node in kept for name in node.output}
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(numpy_helper.from_array(constants[name], name) for name in sorted(made))
