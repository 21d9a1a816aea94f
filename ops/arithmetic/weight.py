"""What arithmetics share: int8 weights from any storage, and reasons why an operator cannot compute with them."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from ..emit import Array, Emitter, Program, Spec
from ..families import Use
from ..storage import IntegerWeight, Storage, limited, requantize

SINGLE: np.dtype[np.generic] = np.dtype(np.float32)
"""The only type that ONNX Runtime's integer operators turn into integers and back."""

_ZERO_POINTS = Program(
    "ZeroPoints",
    """(s) => (z) {
        d = Sub (s, s)
        z = Cast <to = 3> (d)
    }""",
)


def zero_points(emitter: Emitter, scale: str) -> str:
    """int8 zeros, one for each scale, made when the model is loaded."""
    return emitter.call(_ZERO_POINTS, [scale], emitter.name("z"), {})


def integer_weight(emitter: Emitter, suffix: str, storage: Storage, packed: tuple[Array, ...], spec: Spec, axis: int) -> IntegerWeight:
    """A weight as int8 codes within what the emitter's target admits: as the storage holds them, or rounded to them.

    Args:
        emitter: collects initializers and programs.
        suffix: of the initializers' names.
        storage: how the arrays are packed.
        packed: the arrays, as `limited` storages pack them, or their specs.
        spec: shape and dtype of the float weight.
        axis: the axis with one scale per entry.

    Raises:
        ValueError: a code is larger than the target admits.
    """
    largest = emitter.target.largest_code
    admitted = limited(storage, largest)
    codes = packed[0]
    if admitted is not storage and isinstance(codes, np.ndarray) and max(-int(codes.min()), int(codes.max())) > largest:
        raise ValueError(f"a weight in {storage.name} has codes beyond ±{largest}; expected what the limited storage packs")
    weight = admitted.emit_integer(emitter, suffix, packed, spec, axis)
    return requantize(emitter, storage.emit(emitter, suffix, packed, spec), spec, axis) if weight is None else weight


def operator_reason(use: Use, op_types: tuple[str, ...]) -> str | None:
    """None when a node is one of the given operators of the default domain with its weight as second input, else the reason."""
    domain, op_type = use.key
    if domain or op_type not in op_types:
        return f"{op_type} does not compute so: only {', '.join(op_types)} do"
    return None if use.index == 1 else f"the weight is the left factor of a {op_type}"


def gemm_reason(node: NodeProto) -> str | None:
    """None when a node is no Gemm, or one that is a plain product and a sum, else the reason."""
    if node.op_type != "Gemm":
        return None
    given = {attribute.name: attribute for attribute in node.attribute}
    if "transA" in given and given["transA"].i:
        return "the activation is transposed"
    factors = ("alpha", "beta") if addend(node) else ("alpha",)
    scaled = [name for name in factors if name in given and given[name].f != 1]
    return f"{scaled[0]} is not 1" if scaled else None


def addend(node: NodeProto) -> str:
    """The third input of a Gemm; empty where a node has none."""
    return node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""


def add_bias(emitter: Emitter, node: NodeProto, product: str) -> None:
    """Give a product the name and output of the node that it stands for, with the node's third input added where it has one.

    Args:
        emitter: its last node yields the product.
        node: a MatMul or a Gemm for which `gemm_reason` is None.
        product: that the last node yields.
    """
    if addend(node):
        emitter.node("Add", [product, addend(node)], node.output[0])
    else:
        emitter.nodes[-1].output[0] = node.output[0]
    emitter.nodes[-1].name = node.name
