"""Give products of bytes that yield floats their bias: ONNX Runtime's kernel adds it while it scales, a separate Add reads all again.

Before: an Add of a vector behind a MatMul between DequantizeLinear nodes. After: one com.microsoft MatMulIntegerToFloat, the kernel that
ONNX Runtime puts in the product's place anyway, but without the bias.

Must not fire on: biases that became int32 (ONNX Runtime joins those in a QGemm), products that something else reads or that are outputs,
weights that are not two-dimensional or have a scale per row, biases that are broadcast or may be overridden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from onnx import ModelProto, NodeProto, helper

from .canonicalize import remove_dead
from .graph import STANDARD, ValueIndex
from .model import Model
from .regions import added_bias, only_reader, value_types

DOMAIN = "com.microsoft"
KERNEL = "MatMulIntegerToFloat"


@dataclass(frozen=True)
class _Codes:
    """What a DequantizeLinear reads: names of bytes, scale and zero point, the last of which may be empty, and the axis of the scales."""

    values: str
    scale: str
    zero_point: str
    axis: int


def with_biases(model: Model) -> Model:
    """A copy of a model with quantized operators in which products add their biases themselves; the input model is not changed."""
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    index, shapes = ValueIndex(proto), _known_shapes(proto)
    joined: dict[int, NodeProto] = {}  # by the Add that the product takes in
    for node in proto.graph.node:
        add = only_reader(index, node.output[0]) if node.domain in STANDARD and node.op_type == "MatMul" else None
        kernel = None if add is None else _joined(index, shapes, node, add)
        if add is not None and kernel is not None:
            joined[id(add)] = kernel
    if not joined:
        return model
    for node in proto.graph.node:
        if id(node) in joined:
            node.CopyFrom(joined[id(node)])
    if all(entry.domain != DOMAIN for entry in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return Model(remove_dead(proto), model.weights, model.path, model.size_bytes, model.sha256)


def _joined(index: ValueIndex, shapes: Mapping[str, tuple[int, ...]], product: NodeProto, add: NodeProto) -> NodeProto | None:
    """The kernel in place of a product and the Add behind it; None where it does not apply."""
    bias = added_bias(index, add)
    left, right = (_codes(index, name) for name in product.input)
    weight = shapes.get(product.input[1], ())
    if bias is None or left is None or right is None or len(weight) != 2 or shapes.get(bias) != weight[1:]:
        return None
    if _entries(shapes, left.scale) != 1 or _entries(shapes, right.scale) not in (1, weight[1]):
        return None
    if _entries(shapes, right.scale) != 1 and right.axis not in (1, -1):
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


def _known_shapes(proto: ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes of values and initializers of the main graph, where all lengths are known."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    for name, kind in value_types(proto).items():
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim):
            shapes.setdefault(name, tuple(dim.dim_value for dim in kind.shape.dim))
    return shapes


def _entries(shapes: Mapping[str, tuple[int, ...]], name: str) -> int | None:
    """How many entries a value has, if that is known."""
    return math.prod(shapes[name]) if name in shapes else None
