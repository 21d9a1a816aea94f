"""Static integers: the weight stays int8 behind a DequantizeLinear, which ONNX Runtime merges with the operator that reads it.

That makes QLinearConv, QGemm, QLinearMatMul or MatMulIntegerToFloat of Conv, Gemm and MatMul, provided that the activations around the
operator pass through pairs of QuantizeLinear and DequantizeLinear too. Another pass places those: the arithmetic is coupled.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto

from ..emit import Array, Emitter, Spec
from ..families import Use
from ..storage import IntegerWeight, Storage, requantize
from .base import Operand
from .weight import SINGLE, gemm_reason, integer_weight, operator_reason, zero_points

CHANNEL_OPSET = 13
"""The opset from which DequantizeLinear takes one scale per channel."""


@dataclass(frozen=True)
class Integer:
    """int8 weights and 8-bit activations of fixed scale, accumulated in int32."""

    name: str = "integer"
    coupled: bool = True
    product_reason: str | None = None

    def domains(self, use: Use) -> tuple[str, ...]:
        """Standard operators."""
        return ()

    def partners(self, use: Use) -> tuple[int, ...]:
        """None: an operator has one weight."""
        return ()

    def declines(self, use: Use, opset: int) -> str | None:
        """Conv, and plain Gemm and MatMul with the weight on the right, from opset 13 on."""
        if opset < CHANNEL_OPSET:
            return f"one scale per channel needs opset {CHANNEL_OPSET}, the model has {opset}"
        return operator_reason(use, ("Conv", "Gemm", "MatMul")) or gemm_reason(use.node)

    def accepts(self, storage: Storage, spec: Spec, axis: int) -> str | None:
        """float32 weights in any storage; kernels with one scale per output."""
        if spec.dtype != SINGLE:
            return f"a weight of {spec.dtype}: integers are dequantized to float32"
        return "a kernel whose scales do not lie along its outputs" if len(spec.shape) > 2 and axis != 0 else None

    def operand(
        self, emitter: Emitter, suffix: str, storage: Storage, packed: tuple[Array, ...], spec: Spec, axis: int, output: str | None = None
    ) -> Operand:
        """The storage's own codes where it has some, else rounded ones."""
        return _dequantized(emitter, integer_weight(emitter, suffix, storage, packed, spec, axis), spec, output)

    def from_value(self, emitter: Emitter, value: str, spec: Spec, axis: int, output: str | None = None) -> Operand | None:
        """Rounded codes."""
        return _dequantized(emitter, requantize(emitter, value, spec, axis), spec, output)

    def lower(self, emitter: Emitter, node: NodeProto, index: int, operand: Operand) -> None:
        """The node itself: it reads a float weight as before."""
        emitter.copy(node, {index: operand.name})


def _dequantized(emitter: Emitter, weight: IntegerWeight, spec: Spec, output: str | None) -> Operand:
    """codes · scale by DequantizeLinear."""
    zero = zero_points(emitter, weight.scale)  # without explicit ones ONNX Runtime merges a Conv but no Gemm and no MatMul
    values = (weight.codes, weight.scale, zero)
    output = output or emitter.name("dequantized")
    return Operand(emitter.node("DequantizeLinear", values, output, attributes={"axis": weight.axis}), values, spec, weight.axis)


INTEGER = Integer()
