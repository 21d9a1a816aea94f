"""Give products of bytes that yield floats their bias: ONNX Runtime's kernel adds it while it scales, a separate Add reads all again.

Before: an Add of a vector behind a MatMul between DequantizeLinear nodes that was put into integers. After: one com.microsoft
MatMulIntegerToFloat, the kernel that ONNX Runtime puts in the product's place anyway, but without the bias.

Must not fire on: products that the model came with, biases that became int32 (ONNX Runtime joins those in a QGemm), products that
something else reads or that are outputs, weights that are not two-dimensional or have a scale per row, biases that are broadcast or may
be overridden, and types that the kernel lacks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from onnx import ModelProto, NodeProto, TensorProto, helper

from .canonicalize import remove_dead
from .graph import STANDARD, ValueIndex
from .model import Model
from .regions import added_bias, only_reader, value_types

DOMAIN = "com.microsoft"
KERNEL = "MatMulIntegerToFloat"

_KERNELS = frozenset(((TensorProto.UINT8, TensorProto.INT8), (TensorProto.UINT8, TensorProto.UINT8), (TensorProto.INT8, TensorProto.INT8)))
"""Types of activations and weights that ONNX Runtime multiplies."""


@dataclass(frozen=True)
class _Codes:
    """What a DequantizeLinear reads: names of bytes, scale and zero point, the last of which may be empty, and the axis of the scales."""

    values: str
    scale: str
    zero_point: str
    axis: int


@dataclass(frozen=True)
class _Value:
    """Type and shape of a value."""

    kind: int
    shape: tuple[int, ...]

    @property
    def entries(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def with_biases(model: Model, operators: Collection[str]) -> Model:
    """The model with products that add their biases themselves: a copy, or the model itself where there is none.

    Args:
        model: a model with operators in integers, from `integer.place`.
        operators: those that were placed, by first output or name.
    """
    index, values = ValueIndex(model.proto), _values(model.proto)
    joined: dict[int, NodeProto] = {}  # by the Add that the product takes in
    for node in model.proto.graph.node:
        placed = node.domain in STANDARD and node.op_type == "MatMul" and (node.output[0] in operators or node.name in operators)
        add = only_reader(index, node.output[0]) if placed else None
        kernel = None if add is None else _joined(index, values, node, add)
        if add is not None and kernel is not None:
            joined[id(add)] = kernel
    if not joined:
        return model
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    for before, node in zip(model.proto.graph.node, proto.graph.node, strict=True):
        if id(before) in joined:
            node.CopyFrom(joined[id(before)])
    if all(entry.domain != DOMAIN for entry in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return Model(remove_dead(proto), model.weights, model.path, model.size_bytes, model.sha256)


def _joined(index: ValueIndex, values: Mapping[str, _Value], product: NodeProto, add: NodeProto) -> NodeProto | None:
    """The kernel in place of a product and the Add behind it; None where it does not apply."""
    bias = added_bias(index, add)
    left, right = (_codes(index, name) for name in product.input)
    if bias is None or left is None or right is None:
        return None
    names = (left.values, right.values, left.scale, right.scale, product.input[1], bias)
    if not all(name in values for name in names):
        return None
    x, w, x_scale, w_scale, weight, vector = (values[name] for name in names)
    if (x.kind, w.kind) not in _KERNELS or {x_scale.kind, w_scale.kind} != {TensorProto.FLOAT}:
        return None
    if len(weight.shape) != 2 or vector.shape != weight.shape[1:] or x_scale.entries != 1:
        return None
    if w_scale.entries != 1 and (w_scale.shape != weight.shape[1:] or right.axis not in (1, -1)):
        return None
    inputs = [left.values, right.values, left.scale, right.scale, left.zero_point, right.zero_point, bias]
    return helper.make_node(KERNEL, inputs, add.output, add.name, domain=DOMAIN)


def _codes(index: ValueIndex, name: str) -> _Codes | None:
    """What a value is dequantized from, if it is, by a scale for all or for each entry of one axis."""
    producer = index.producer(name)
    if producer is None or producer.node.domain not in STANDARD or producer.node.op_type != "DequantizeLinear":
        return None
    given = {attribute.name: attribute.i for attribute in producer.node.attribute}
    values, scale, zero_point = [*producer.node.input, ""][:3]
    return None if given.get("block_size") else _Codes(values, scale, zero_point, given.get("axis", 1))


def _values(proto: ModelProto) -> dict[str, _Value]:
    """Values and initializers of the main graph; of activations the type alone may be known, and their shape is then empty."""
    found = {tensor.name: _Value(tensor.data_type, tuple(tensor.dims)) for tensor in proto.graph.initializer}
    for name, kind in value_types(proto).items():
        known = kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim)
        found.setdefault(name, _Value(kind.elem_type, tuple(dim.dim_value for dim in kind.shape.dim) if known else ()))
    return found
