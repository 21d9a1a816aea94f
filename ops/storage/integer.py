"""Symmetric integers with one scale per channel: int8 as they are, int4 two to a byte.

The decode programs use only `Cast`, `Mul`, `Sub`, `Floor` and `Concat`, which every opset since 7 has and which ONNX Runtime folds when
the session is created (`DequantizeLinear` on constants would be kept). Four-bit values are packed in planes: one byte holds entry i of
the first half and entry i of the second half of an axis, so unpacking is a concatenation and needs no reshape.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..emit import Array, Emitter, Program, Spec, onnx_type

_GRID = np.linspace(1.0, 0.5, 21)
"""Clipping ratios that are tried when scales are searched, as shares of the largest magnitude."""

_DECODE_INT8 = Program(
    "DecodeInt8",
    """<to> (q, scale) => (w) {
        f = Cast <to = 1> (q)
        v = Mul (f, scale)
        w = Cast <to: int = @to> (v)
    }""",
)

_DECODE_INT4 = Program(
    "DecodeInt4",
    """<to, axis> (q, scale) => (w) {
        sixteenth = Constant <value = float {0.0625}> ()
        sixteen = Constant <value = float {16.0}> ()
        offset = Constant <value = float {8.0}> ()
        f = Cast <to = 1> (q)
        shifted = Mul (f, sixteenth)
        high = Floor (shifted)
        weight = Mul (high, sixteen)
        low = Sub (f, weight)
        u = Concat <axis: int = @axis> (low, high)
        s = Sub (u, offset)
        v = Mul (s, scale)
        w = Cast <to: int = @to> (v)
    }""",
)


def _scale_shape(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return tuple(size if i == axis else 1 for i, size in enumerate(shape))


def search_scales(array: NDArray[np.float64], axis: int, largest: int, importance: NDArray[np.float64] | None) -> NDArray[np.float32]:
    """Per-channel scales that minimise the (weighted) squared rounding error over a grid of clipping ratios.

    Args:
        array: any shape.
        axis: the axis with one scale per entry.
        largest: the largest integer of the symmetric grid (127, 7).
        importance: weights of squared errors, broadcastable to `array`; None for ones.

    Returns:
        float32, the shape of `array` with every other axis 1; 1 where a channel is all zero.
    """
    others = tuple(i for i in range(array.ndim) if i != axis)
    peak = np.abs(array).max(axis=others, keepdims=True)
    best = np.full(peak.shape, np.inf)
    scales = np.where(peak > 0, peak / largest, 1.0).astype(np.float32)
    weights = 1.0 if importance is None else importance
    for ratio in _GRID:
        scale = np.where(peak > 0, peak * ratio / largest, 1.0).astype(np.float32)
        rounded = np.clip(np.rint(array / scale), -largest, largest) * scale
        error = (weights * (array - rounded) ** 2).sum(axis=others, keepdims=True)
        better = error < best
        best, scales = np.where(better, error, best), np.where(better, scale, scales)
    return scales


@dataclass(frozen=True)
class Int8:
    """Integers −127…127 and a float32 scale per channel: the weight is q·scale."""

    name: str = "int8"
    largest: int = 127

    def accepts(self, array: Spec) -> str | None:
        """Arrays with at least one axis."""
        return None if array.shape else "a scalar has no channels"

    def layout(self, array: Spec, axis: int) -> tuple[Spec, ...]:
        """int8 of the same shape, and the scales."""
        return (Spec(array.shape, np.dtype(np.int8)), Spec(_scale_shape(array.shape, axis), np.dtype(np.float32)))

    def encode(self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None = None) -> tuple[NDArray[np.generic], ...]:
        """Round to nearest under searched scales."""
        values = np.asarray(array, np.float64)
        scale = search_scales(values, axis, self.largest, importance)
        return np.clip(np.rint(values / scale), -self.largest, self.largest).astype(np.int8), scale

    def decode(self, packed: tuple[NDArray[np.generic], ...], spec: Spec) -> NDArray[np.generic]:
        """q·scale in float32, then the model's type."""
        q, scale = packed
        return (q.astype(np.float32) * scale).astype(spec.dtype)

    def emit(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, output: str | None = None) -> str:
        """Two initializers and one program call."""
        inputs = [emitter.constant(f"{suffix}.q", packed[0]), emitter.constant(f"{suffix}.s", packed[1])]
        return emitter.call(_DECODE_INT8, inputs, output, {"to": onnx_type(spec.dtype)})


def _plane_axis(shape: tuple[int, ...]) -> int | None:
    """The first axis of even length: the one that is split into two planes."""
    return next((axis for axis, size in enumerate(shape) if size % 2 == 0 and size > 0), None)


@dataclass(frozen=True)
class Int4:
    """Integers −7…7, offset by 8 and packed two to a byte, and a float32 scale per channel."""

    name: str = "int4"
    largest: int = 7

    def accepts(self, array: Spec) -> str | None:
        """Arrays with an axis of even length."""
        return None if _plane_axis(array.shape) is not None else f"no axis of even length in shape {array.shape}"

    def layout(self, array: Spec, axis: int) -> tuple[Spec, ...]:
        """uint8 with the plane axis halved, and the scales."""
        plane = _plane_axis(array.shape)
        packed = tuple(size // 2 if i == plane else size for i, size in enumerate(array.shape))
        return (Spec(packed, np.dtype(np.uint8)), Spec(_scale_shape(array.shape, axis), np.dtype(np.float32)))

    def encode(self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None = None) -> tuple[NDArray[np.generic], ...]:
        """Round to nearest under searched scales, then pack."""
        values = np.asarray(array, np.float64)
        scale = search_scales(values, axis, self.largest, importance)
        return self.pack(np.clip(np.rint(values / scale), -self.largest, self.largest)), scale

    def pack(self, integers: NDArray[np.float64]) -> NDArray[np.uint8]:
        """Integers −8…7 → bytes."""
        plane = _plane_axis(integers.shape)
        if plane is None:
            raise ValueError(f"int4 needs an axis of even length, got shape {integers.shape}")
        low, high = np.split((integers + 8).astype(np.uint8), 2, axis=plane)
        return (low | (high << 4)).astype(np.uint8)

    def decode(self, packed: tuple[NDArray[np.generic], ...], spec: Spec) -> NDArray[np.generic]:
        """(q − 8)·scale in float32, then the model's type."""
        q, scale = packed
        u = np.concatenate([q.astype(np.int16) & 15, q.astype(np.int16) >> 4], axis=_plane_axis(spec.shape) or 0)
        return ((u - 8).astype(np.float32) * scale).astype(spec.dtype)

    def emit(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, output: str | None = None) -> str:
        """Two initializers and one program call."""
        inputs = [emitter.constant(f"{suffix}.q", packed[0]), emitter.constant(f"{suffix}.s", packed[1])]
        return emitter.call(_DECODE_INT4, inputs, output, {"to": onnx_type(spec.dtype), "axis": _plane_axis(spec.shape) or 0})


INT8 = Int8()
INT4 = Int4()
