"""What arithmetics share: int8 weights from any storage, and reasons why an operator cannot compute with them."""

from __future__ import annotations

import numpy as np

from ..emit import Array, Emitter, Spec
from ..families import Use
from ..storage import IntegerWeight, Storage, requantize

SINGLE: np.dtype[np.generic] = np.dtype(np.float32)
"""The only type that ONNX Runtime's integer operators turn into integers and back."""


def integer_weight(
    emitter: Emitter, suffix: str, storage: Storage, packed: tuple[Array, ...], spec: Spec, axis: int
) -> IntegerWeight:
    """A weight as int8 codes: as the storage holds them, or rounded from what it decodes to.

    Args:
        emitter: collects initializers and programs.
        suffix: of the initializers' names.
        storage: how the arrays are packed.
        packed: the arrays, or their specs.
        spec: shape and dtype of the float weight.
        axis: the axis with one scale per entry.
    """
    weight = storage.emit_integer(emitter, suffix, packed, spec, axis)
    return weight or requantize(emitter, storage.emit(emitter, suffix, packed, spec), spec, axis)


def operator_reason(use: Use, op_types: tuple[str, ...]) -> str | None:
    """None when a node is one of the given operators of the default domain with its weight as second input, else the reason."""
    domain, op_type = use.key
    if domain or op_type not in op_types:
        return f"{op_type} does not compute so: only {', '.join(op_types)} do"
    return None if use.index == 1 else f"the weight is the left factor of a {op_type}"


def gemm_reason(use: Use) -> str | None:
    """None when a node is no Gemm, or one that is a plain product and a sum, else the reason."""
    if use.node.op_type != "Gemm":
        return None
    if use.int("transA", 0):
        return "the activation is transposed"
    scaled = has_addend(use) and use.float("beta", 1.0) != 1
    return "alpha or beta is not 1" if use.float("alpha", 1.0) != 1 or scaled else None


def has_addend(use: Use) -> bool:
    """Whether a Gemm has its third input."""
    return len(use.node.input) > 2 and bool(use.node.input[2])
