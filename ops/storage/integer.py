"""Symmetric integers with one scale per channel: int8 as they are, int4 two to a byte.

The decode programs use only `Cast`, `Mul`, `Sub`, `Floor` and `Concat`, which every opset since 7 has and which ONNX Runtime
folds when the session is created (`DequantizeLinear` on constants would be kept). Four-bit values are packed in planes: one
byte holds entry i of the first half and entry i of the second half of an axis, so unpacking is a concatenation and needs no
reshape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..emit import Array, Emitter, Program, Spec, onnx_type

_GRID = np.linspace(1.0, 0.5, 21)
"""Clipping ratios that are tried when scales are searched, as shares of the largest magnitude."""

_CHUNK = 1 << 17
"""Entries that are worked on at once: small enough for a processor's cache, large enough that NumPy's overhead is lost."""

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


def _chunks(shape: tuple[int, ...], axis: int) -> Iterator[slice]:
    """Stretches of channels of about `_CHUNK` entries."""
    step = max(1, _CHUNK * shape[axis] // int(np.prod(shape)))
    return (slice(start, start + step) for start in range(0, shape[axis], step))


def _working(array: NDArray[np.generic]) -> NDArray[np.floating[Any]]:
    """float32, which is exact for the half types, or float64 for double."""
    return array.astype(np.float64 if array.dtype == np.float64 else np.float32)


def search_scales(array: NDArray[np.generic], axis: int, largest: int, importance: NDArray[np.float64] | None) -> NDArray[np.float32]:
    """Per-channel scales that minimise the (weighted) squared rounding error over a grid of clipping ratios.

    Args:
        array: finite values of any float type, any shape.
        axis: the axis with one scale per entry.
        largest: the largest integer of the symmetric grid (127, 7).
        importance: weights of squared errors, broadcastable to `array`; None for ones.

    Returns:
        float32, the shape of `array` with every other axis 1; 1 where a channel is all zero, and never so large that
        `largest` times the scale overflows.
    """
    channels = np.moveaxis(array, axis, 0)
    weights = None if importance is None else np.moveaxis(np.broadcast_to(importance, array.shape), axis, 0)
    scales = np.empty(array.shape[axis], np.float32)
    for part in _chunks(array.shape, axis):
        rows = _working(channels[part]).reshape(len(channels[part]), -1)
        peak = np.abs(rows).max(axis=1)
        ratio = _best_ratios(rows, peak, largest, None if weights is None else weights[part].reshape(rows.shape))
        scale = np.clip(peak * ratio / largest, np.finfo(np.float32).tiny, np.finfo(np.float32).max * (1 - 1e-6) / largest)
        scales[part] = np.where(peak > 0, scale, 1)
    return scales.reshape(_scale_shape(array.shape, axis))


def _best_ratios(
    rows: NDArray[np.floating[Any]], peak: NDArray[np.floating[Any]], largest: int, weights: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """The best of `_GRID` for each row of (k, n), found in float32 on values and weights that are scaled to at most 1."""
    unit = (rows / np.where(peak > 0, peak, 1)[:, None]).astype(np.float32)
    share = None if weights is None else (weights / max(weights.max(), np.finfo(np.float64).tiny)).astype(np.float32)
    errors, rounded = np.empty((len(_GRID), len(rows)), np.float32), np.empty_like(unit)
    for error, ratio in zip(errors, _GRID, strict=True):
        step = np.float32(ratio / largest)
        np.multiply(unit, 1 / step, out=rounded)
        np.rint(rounded, out=rounded)
        np.clip(rounded, -largest, largest, out=rounded)
        rounded *= step
        rounded -= unit
        if share is None:
            np.einsum("ij,ij->i", rounded, rounded, out=error)
        else:
            np.einsum("ij,ij,ij->i", rounded, rounded, share, out=error)
    return np.asarray(_GRID[errors.argmin(axis=0)])


def quantize(
    array: NDArray[np.generic], axis: int, largest: int, importance: NDArray[np.float64] | None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Integers −largest…largest, nearest under searched scales, and those scales. Arguments as in `search_scales`."""
    scales = search_scales(array, axis, largest, importance)
    integers = np.empty(array.shape, np.int8)
    source, target, divisor = np.moveaxis(array, axis, 0), np.moveaxis(integers, axis, 0), np.moveaxis(scales, axis, 0)
    for part in _chunks(array.shape, axis):
        target[part] = np.clip(np.rint(_working(source[part]) / divisor[part]), -largest, largest)
    return integers, scales


@dataclass(frozen=True)
class Int8:
    """Integers −127…127 and a float32 scale per channel: the weight is q·scale."""

    name: str = "int8"
    largest: int = 127

    def accepts(self, array: Spec) -> str | None:
        """Arrays with at least one axis and one entry."""
        if 0 in array.shape:
            return "an empty array"
        return None if array.shape else "a scalar has no channels"

    def layout(self, array: Spec, axis: int) -> tuple[Spec, ...]:
        """int8 of the same shape, and the scales."""
        return (Spec(array.shape, np.dtype(np.int8)), Spec(_scale_shape(array.shape, axis), np.dtype(np.float32)))

    def encode(
        self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None = None
    ) -> tuple[NDArray[np.generic], ...]:
        """Round to nearest under searched scales."""
        return quantize(array, axis, self.largest, importance)

    def decode(self, packed: tuple[NDArray[np.generic], ...], spec: Spec) -> NDArray[np.generic]:
        """q·scale in float32, then the model's type."""
        q, scale = (np.asarray(part, np.float32) for part in packed)
        return (q * scale).astype(spec.dtype)

    def emit(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, output: str | None = None) -> str:
        """Two initializers and one program call."""
        inputs = [emitter.constant(f"{suffix}.q", packed[0]), emitter.constant(f"{suffix}.s", packed[1])]
        return emitter.call(_DECODE_INT8, inputs, output, {"to": onnx_type(spec.dtype)})


def _plane_axis(shape: tuple[int, ...]) -> int | None:
    """The first axis of even length: the one that is split into two planes."""
    return next((axis for axis, size in enumerate(shape) if size % 2 == 0), None)


@dataclass(frozen=True)
class Int4:
    """Integers −7…7, offset by 8 and packed two to a byte, and a float32 scale per channel."""

    name: str = "int4"
    largest: int = 7

    def accepts(self, array: Spec) -> str | None:
        """Arrays with an axis of even length, and no empty ones."""
        if 0 in array.shape:
            return "an empty array"
        return None if _plane_axis(array.shape) is not None else f"no axis of even length in shape {array.shape}"

    def layout(self, array: Spec, axis: int) -> tuple[Spec, ...]:
        """uint8 with the plane axis halved, and the scales."""
        plane = _plane_axis(array.shape)
        packed = tuple(size // 2 if i == plane else size for i, size in enumerate(array.shape))
        return (Spec(packed, np.dtype(np.uint8)), Spec(_scale_shape(array.shape, axis), np.dtype(np.float32)))

    def encode(
        self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None = None
    ) -> tuple[NDArray[np.generic], ...]:
        """Round to nearest under searched scales, then pack."""
        integers, scale = quantize(array, axis, self.largest, importance)
        return self.pack(integers), scale

    def pack(self, integers: NDArray[np.int8]) -> NDArray[np.uint8]:
        """Integers −8…7 → bytes."""
        plane = _plane_axis(integers.shape)
        if plane is None:
            raise ValueError(f"int4 needs an axis of even length, got shape {integers.shape}")
        low, high = np.split((integers + 8).astype(np.uint8), 2, axis=plane)
        return np.asarray(low | (high << 4))

    def decode(self, packed: tuple[NDArray[np.generic], ...], spec: Spec) -> NDArray[np.generic]:
        """(q − 8)·scale in float32, then the model's type."""
        q, scale = np.asarray(packed[0], np.uint8), np.asarray(packed[1], np.float32)
        u = np.concatenate([q & 15, q >> 4], axis=_plane_axis(spec.shape) or 0)
        return np.asarray((u.astype(np.float32) - 8) * scale, spec.dtype)

    def emit(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, output: str | None = None) -> str:
        """Two initializers and one program call."""
        inputs = [emitter.constant(f"{suffix}.q", packed[0]), emitter.constant(f"{suffix}.s", packed[1])]
        return emitter.call(_DECODE_INT4, inputs, output, {"to": onnx_type(spec.dtype), "axis": _plane_axis(spec.shape) or 0})


INT8 = Int8()
INT4 = Int4()
