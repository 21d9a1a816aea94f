"""Weights that stay packed: com.microsoft MatMulNBits and GatherBlockQuantized, of ONNX Runtime's own domain.

MatMulNBits unpacks blocks while it multiplies. At accuracy level 4 it also rounds activations to int8, block by block, and accumulates in
integers where the processor can; GatherBlockQuantized unpacks the rows that are looked up.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto

from ..emit import Array, Emitter, Spec
from ..families import Use
from ..storage import Storage
from ..storage.nbits import NBits
from .base import Operand
from .weight import add_bias, gemm_reason, operator_reason

DOMAIN = "com.microsoft"

MIN_OPSET = 10
"""The opset from which Slice takes inputs, which padded rows need."""

_ACCURACY = 4
"""Activations may be rounded to int8."""


@dataclass(frozen=True)
class PackedBlocks:
    """MatMul, Gemm and Gather on codes of 2, 4 or 8 bits with one scale per block."""

    name: str = "nbits"
    coupled: bool = False
    product_reason: str | None = "a product of factors is not packed when the model is loaded"

    def domains(self, use: Use) -> tuple[str, ...]:
        """MatMulNBits and GatherBlockQuantized."""
        return (DOMAIN,)

    def partners(self, use: Use) -> tuple[int, ...]:
        """None: an operator has one weight."""
        return ()

    def declines(self, use: Use, opset: int) -> str | None:
        """Gather, and plain Gemm and MatMul with the weight on the right."""
        if opset < MIN_OPSET:
            return f"packed blocks need opset {MIN_OPSET}, the model has {opset}"
        if use.key == ("", "Gather"):
            return None
        return operator_reason(use, ("Gather", "Gemm", "MatMul")) or gemm_reason(use.node)

    def accepts(self, storage: Storage, spec: Spec, axis: int) -> str | None:
        """Only the storages that are packed for these operators."""
        return storage.accepts(spec) if isinstance(storage, NBits) else f"storage {storage.name} is not packed for MatMulNBits"

    def operand(
        self, emitter: Emitter, suffix: str, storage: Storage, packed: tuple[Array, ...], spec: Spec, axis: int, output: str | None = None
    ) -> Operand:
        """Codes, scales and zeros.

        Raises:
            TypeError: the storage is not packed for these operators.
        """
        if not isinstance(storage, NBits):
            raise TypeError(f"storage {storage.name} is not packed for MatMulNBits")
        values = storage.emit_blocks(emitter, suffix, packed)
        return Operand(output or emitter.name("operand"), values, spec, axis, storage)

    def from_value(self, emitter: Emitter, value: str, spec: Spec, axis: int, output: str | None = None) -> Operand | None:
        """None: nothing packs at load."""
        return None

    def lower(self, emitter: Emitter, node: NodeProto, index: int, operand: Operand) -> None:
        """One operator; then a sum for a Gemm with a third input, or a crop of rows that are padded.

        Raises:
            ValueError: the node is no look-up in the weight and no product with the weight on its right.
        """
        storage = operand.storage
        if not isinstance(storage, NBits) or (node.op_type, index) not in (("Gather", 0), ("Gemm", 1), ("MatMul", 1)):
            raise ValueError(f"{node.op_type} with its weight as input {index} does not read packed blocks")
        if node.op_type == "Gather":
            _gather(emitter, node, operand, storage)
        else:
            _multiply(emitter, node, operand, storage)


def _multiply(emitter: Emitter, node: NodeProto, operand: Operand, storage: NBits) -> None:
    """x·W [+ C]."""
    sizes = {"N": operand.spec.shape[operand.axis], "K": operand.spec.shape[1 - operand.axis]}
    attributes = {**sizes, "bits": storage.bits, "block_size": storage.block, "accuracy_level": _ACCURACY}
    product = emitter.node("MatMulNBits", [node.input[0], *operand.values], domain=DOMAIN, attributes=attributes)
    add_bias(emitter, node, product)


def _gather(emitter: Emitter, node: NodeProto, operand: Operand, storage: NBits) -> None:
    """Rows by index; their codes lie in one line where MatMulNBits has an axis of blocks."""
    codes, *others = operand.values
    rows, width = operand.spec.shape
    line = emitter.node("Reshape", [codes, emitter.ints("line", [rows, -1])])
    attributes = {"bits": storage.bits, "block_size": storage.block, "gather_axis": 0, "quantize_axis": 1}
    inputs = [line, node.input[1], *others]
    found = emitter.node("GatherBlockQuantized", inputs, domain=DOMAIN, attributes=attributes)
    if width % storage.block:
        span = [emitter.ints(suffix, [value]) for suffix, value in (("start", 0), ("end", width), ("last", -1))]
        emitter.node("Slice", [found, *span])
    emitter.nodes[-1].output[0] = node.output[0]
    emitter.nodes[-1].name = node.name


NBITS = PackedBlocks()
