"""Rounding to codes and back, straight through: the pair's derivative is that of a clip to the representable range.

Codes are integers, but between QuantizeLinear and DequantizeLinear a cotangent flows as if they were real numbers: shaped like the codes,
of the type of the floats around them, the gradient of the loss per unit of code. With v = x/scale and q = clip(round(v) + zero):

    QuantizeLinear: dx = g/scale, dscale = −Σ g v/scale, both where round(v) + zero is a code and 0 where it is clipped
    DequantizeLinear: dq = g scale, dscale = Σ g (q − zero)

A scale that both read so gets Σ g (round(v) − v) where nothing is clipped and Σ g (limit − zero) elsewhere: the learned step size of Esser
et al. 2020 (LSQ, equation 3). Codes that are constant leave the second line. Zero points get no gradient: they are integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Call, Gradients, Rules, Unsupported, Value

_NARROW = {"int4": (-8, 7), "uint4": (0, 15), "int2": (-2, 1), "uint2": (0, 3)}
"""Ranges of types that NumPy does not know."""


@dataclass(frozen=True)
class _Granularity:
    """How scales (and zero points) spread over a value.

    Attributes:
        call: the node.
        axis: along which scales differ; None for one scale of all.
        block: entries along the axis that share a scale; 0 if a scale is of a whole slice, and the only such axis is `axis`.
    """

    call: Call
    axis: int | None
    block: int

    def spread(self, name: str) -> str:
        """Scales or zero points, shaped to broadcast with the value."""
        if self.axis is None:
            return self.call.op("Reshape", name, self.call.ints()) if self.call.x(1).shape != () else name
        rank = self.call.x().rank
        if not self.block:
            return self.call.op("Reshape", name, self.call.ints(-1, *(1,) * (rank - 1 - self.axis)))
        positions = np.arange(self._length()) // self.block
        return self.call.op("Gather", name, self.call.ints(*positions.tolist()), axis=self.axis)

    def total(self, gradient: str) -> str:
        """A gradient shaped like the value, summed over what shares a scale; shaped like the scales."""
        call, rank = self.call, self.call.x().rank
        if self.axis is None:
            total = call.op("ReduceSum", gradient, keepdims=0)
            return call.reshape_like(total, call.x(1)) if call.x(1).shape != () else total
        if not self.block:
            others = [axis for axis in range(rank) if axis != self.axis]
            return call.op("ReduceSum", gradient, call.ints(*others), keepdims=0) if others else gradient
        missing = -self._length() % self.block
        if missing:
            ends = [0] * (2 * rank)
            ends[rank + self.axis] = missing
            gradient = call.op("Pad", gradient, call.ints(*ends))
        blocks = (0,) * self.axis + (-1, self.block) + tuple(self._lengths()[self.axis + 1 :])
        return call.op("ReduceSum", call.op("Reshape", gradient, call.ints(*blocks)), call.ints(self.axis + 1), keepdims=0)

    def _lengths(self) -> tuple[int, ...]:
        lengths = self.call.x().shape
        if lengths is None or self.axis is None or any(length is None for length in lengths[self.axis :]):
            raise Unsupported("blocks of a value whose lengths are unknown")
        return tuple(length or 0 for length in lengths)

    def _length(self) -> int:
        return self._lengths()[self.axis or 0]


def _granularity(call: Call) -> _Granularity:
    scale = call.x(1)
    if scale.rank == 0 or scale.shape == (1,):
        return _Granularity(call, None, 0)
    axis, block = call.attribute("axis", 1), call.attribute("block_size", 0)
    if call.x().rank == 1:  # the default axis does not exist there
        axis = 0
    return _Granularity(call, axis % call.x().rank, block)


def _as(call: Call, name: str, value: Value, dtype: np.dtype[Any]) -> str:
    return name if value.dtype == dtype else call.cast(name, dtype)


def _limits(codes: Value) -> tuple[int, int]:
    """The least and the greatest code."""
    if codes.dtype.name in _NARROW:
        return _NARROW[codes.dtype.name]
    if not np.issubdtype(codes.dtype, np.integer):
        raise Unsupported(f"codes of type {codes.dtype.name} are not integers")
    limits = np.iinfo(codes.dtype)
    return int(limits.min), int(limits.max)


def _quantize(call: Call) -> Gradients:
    low, high = _limits(call.y())
    spread, x, scale = _granularity(call), call.x(), call.x(1)
    step = spread.spread(_as(call, scale.name, scale, x.dtype))
    ratio = call.op("Div", x.name, step)
    centre: str = call.scalar((low + high) / 2)
    if call.has_input(2):
        centre = call.op("Sub", centre, spread.spread(call.cast(call.x(2).name, x.dtype)))
    reach = (high - low + 1) / 2  # half a step further than the codes, for what rounds to the last one is not clipped
    inside = call.op("LessOrEqual", call.op("Abs", call.op("Sub", ratio, centre)), call.scalar(reach))
    per_code = call.dy if scale.dtype == x.dtype else call.cast(call.dy, x.dtype)  # in the type of the scales, if they differ
    gradient = call.op("Where", inside, call.op("Div", per_code, step), call.scalar(0))
    gradients = {0: gradient} if 0 in call.wanted else {}
    if 1 in call.wanted:
        total = spread.total(call.op("Neg", call.op("Mul", gradient, ratio)))
        gradients[1] = total if scale.dtype == x.dtype else call.cast(total, scale.dtype)
    return gradients


def _dequantize(call: Call) -> Gradients:
    spread, codes, scale, y = _granularity(call), call.x(), call.x(1), call.y()
    gradients = {}
    if 0 in call.wanted:
        step = spread.spread(_as(call, scale.name, scale, y.dtype))
        gradients[0] = call.op("Mul", call.dy, step)
    if 1 in call.wanted:
        numbers = call.cast(codes.name, y.dtype)
        if call.has_input(2):
            numbers = call.op("Sub", numbers, spread.spread(call.cast(call.x(2).name, y.dtype)))
        total = spread.total(call.op("Mul", call.dy, numbers))
        gradients[1] = total if scale.dtype == y.dtype else call.cast(total, scale.dtype)
    return gradients


RULES: Rules = {
    "DequantizeLinear": _dequantize,
    "QuantizeLinear": _quantize,
    "com.microsoft::DequantizeLinear": _dequantize,
    "com.microsoft::QuantizeLinear": _quantize,
}
