"""How scales lie over an array and in the file, and the programs that multiply by them.

A *partition* says which entries share a scale, a *scale format* how the scales are written. Neither knows how codes are packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..emit import Array, Emitter, Program, Spec, float_attribute, ints_attribute, onnx_type
from .packing import MODERN_OPSET

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)

SMALLEST = 2.0**-110
"""Scales are no smaller, so that no product of the decoder is subnormal."""

LARGEST = float(np.finfo(np.float32).max)
"""Values are no larger."""

SCALE = Program(
    "Scale",
    """<to> (q, scale) => (w) {
        code = Cast <to = 3> (q)
        f = Cast <to = 1> (code)
        s = Cast <to = 1> (scale)
        v = Mul (f, s)
        w = Cast <to: int = @to> (v)
    }""",
)
"""int8 codes, or bytes that are read as such, times scales."""

SCALE_SHIFTED = Program(
    "ScaleShifted",
    """<to> (q, zero, scale) => (w) {
        code = Cast <to = 3> (q)
        origin = Cast <to = 3> (zero)
        f = Cast <to = 1> (code)
        z = Cast <to = 1> (origin)
        d = Sub (f, z)
        s = Cast <to = 1> (scale)
        v = Mul (d, s)
        w = Cast <to: int = @to> (v)
    }""",
)

_RESHAPED = Program(
    "Reshaped",
    """<shape> (v) => (w) {
        dims = Constant <value: tensor = @shape> ()
        w = Reshape (v, dims)
    }""",
)

_CROPPED = Program(
    "Cropped",
    """<view, length, shape> (v) => (w) {
        padded = Constant <value: tensor = @view> ()
        end = Constant <value: tensor = @length> ()
        dims = Constant <value: tensor = @shape> ()
        start = Constant <value = int64[1] {0}> ()
        axis = Constant <value = int64[1] {1}> ()
        line = Reshape (v, padded)
        kept = Slice (line, start, end, axis)
        w = Reshape (kept, dims)
    }""",
)


class Partition(Protocol):
    """Which entries of an array share a scale."""

    @property
    def layout(self) -> tuple[int, ...]:
        """Shape in which codes are packed."""
        ...

    @property
    def scales(self) -> tuple[int, ...]:
        """Shape of the scales, which broadcasts against `layout`."""
        ...

    def split(self, array: NDArray[Any]) -> NDArray[Any]:
        """The array's shape → `layout`; padding is zero."""
        ...

    def join(self, array: NDArray[Any]) -> NDArray[Any]:
        """`layout` → the array's shape."""
        ...

    def spread(self, scale: NDArray[Any]) -> NDArray[Any]:
        """`scales` → something that broadcasts against the array."""
        ...

    def groups(self, array: NDArray[Any]) -> tuple[NDArray[Any], int]:
        """The array's shape → a view whose first axes (their number) count scales in order, and whose others run over what shares one."""
        ...

    def emit(self, emitter: Emitter, value: str, output: str | None) -> str:
        """`layout` → the array's shape; the result's name is `output` unless nothing is to be done."""
        ...

    @property
    def is_plain(self) -> bool:
        """Whether `layout` is the array's shape, so that `emit` adds nothing."""
        ...


@dataclass(frozen=True)
class Channels:
    """One scale for each entry of an axis.

    Attributes:
        shape: of the array.
        axis: that carries the scales.
    """

    shape: tuple[int, ...]
    axis: int

    @classmethod
    def read(cls, shape: tuple[int, ...], scales: tuple[int, ...]) -> Channels:
        """The partition of an array of the given shape whose scales have the shape `scales`."""
        carrying = (axis for axis, size in enumerate(scales) if size > 1)
        return cls(shape, next(carrying, shape.index(1) if 1 in shape else 0))  # a single scale lies on an axis of length 1

    @property
    def layout(self) -> tuple[int, ...]:
        """The array's own shape."""
        return self.shape

    @property
    def scales(self) -> tuple[int, ...]:
        """1 on every other axis."""
        return tuple(size if i == self.axis else 1 for i, size in enumerate(self.shape))

    @property
    def is_plain(self) -> bool:
        """Always."""
        return True

    def split(self, array: NDArray[Any]) -> NDArray[Any]:
        """The same."""
        return array

    def join(self, array: NDArray[Any]) -> NDArray[Any]:
        """The same."""
        return array

    def spread(self, scale: NDArray[Any]) -> NDArray[Any]:
        """The same."""
        return scale

    def groups(self, array: NDArray[Any]) -> tuple[NDArray[Any], int]:
        """Channels first."""
        return np.moveaxis(array, self.axis, 0), 1

    def emit(self, emitter: Emitter, value: str, output: str | None) -> str:
        """Nothing to do."""
        return value


@dataclass(frozen=True)
class Blocks:
    """One scale for each block of a channel; the blocks of a channel are as equal as can be, and the last is padded.

    Blocks run along the axes behind the channel axis where that is the first one, else along the axes before it, where
    the axes behind count as channels. So neither case needs a transposition. Codes lie in the shape (outer, count, entries, inner):
    the channels are `outer` in the first case, `inner` in the second.

    Attributes:
        shape: of the array.
        outer: channels before the blocks.
        count: blocks to a channel.
        inner: channels behind the blocks.
    """

    shape: tuple[int, ...]
    outer: int
    count: int
    inner: int

    @classmethod
    def of(cls, shape: tuple[int, ...], axis: int, limit: int) -> Blocks:
        """Blocks of at most `limit` entries."""
        outer = shape[0] if axis == 0 else 1
        inner = 1 if axis == 0 else int(np.prod(shape[axis:]))
        return cls(shape, outer, -(-int(np.prod(shape)) // (outer * inner * limit)), inner)

    @classmethod
    def read(cls, shape: tuple[int, ...], scales: tuple[int, ...]) -> Blocks:
        """The partition of an array of the given shape whose scales have the shape `scales`."""
        return cls(shape, scales[0], scales[1], scales[3])

    @property
    def length(self) -> int:
        """Entries of a channel."""
        return int(np.prod(self.shape)) // (self.outer * self.inner)

    @property
    def layout(self) -> tuple[int, ...]:
        """(outer, count, entries, inner)."""
        return (self.outer, self.count, -(-self.length // self.count), self.inner)

    @property
    def scales(self) -> tuple[int, ...]:
        """(outer, count, 1, inner)."""
        return (self.outer, self.count, 1, self.inner)

    @property
    def is_plain(self) -> bool:
        """Never."""
        return False

    @property
    def _padded(self) -> tuple[int, int, int]:
        return (self.outer, self.count * self.layout[2], self.inner)

    def split(self, array: NDArray[Any]) -> NDArray[Any]:
        """Pads what the last block of a channel lacks."""
        line = array.reshape(self.outer, self.length, self.inner)
        lacking = self._padded[1] - self.length
        return (np.pad(line, ((0, 0), (0, lacking), (0, 0))) if lacking else line).reshape(self.layout)

    def join(self, array: NDArray[Any]) -> NDArray[Any]:
        """Drops the padding."""
        return array.reshape(self._padded)[:, : self.length].reshape(self.shape)

    def spread(self, scale: NDArray[Any]) -> NDArray[Any]:
        """Every entry's own scale."""
        return np.ascontiguousarray(self.join(np.broadcast_to(scale, self.layout)))

    def groups(self, array: NDArray[Any]) -> tuple[NDArray[Any], int]:
        """(outer, count, inner, entries), or (count, inner, entries) where there is one outer channel."""
        view = np.moveaxis(self.split(array), 2, 3)
        return (view[0], 2) if self.outer == 1 else (view, 3)

    def emit(self, emitter: Emitter, value: str, output: str | None) -> str:
        """One call."""
        shape = {"shape": ints_attribute(self.shape)}
        if self._padded[1] == self.length:
            return emitter.call(_RESHAPED, [value], output, shape)
        attributes = {"view": ints_attribute(self._padded), "length": ints_attribute([self.length]), **shape}
        return emitter.call(_CROPPED, [value], output, attributes)


class ScaleFormat(Protocol):
    """How scales are written."""

    @property
    def name(self) -> str:
        """Suffix of a storage's name; empty for the usual format."""
        ...

    @property
    def min_opset(self) -> int:
        """The lowest opset whose models can hold them."""
        ...

    def rounded(self, scale: NDArray[np.float32]) -> NDArray[np.float32]:
        """Candidates of a search as they would be written, as far as each can be judged by itself."""
        ...

    def layout(self, shape: tuple[int, ...]) -> tuple[Spec, ...]:
        """The arrays that hold scales of this shape."""
        ...

    def encode(self, scale: NDArray[np.float32], limit: float) -> tuple[NDArray[np.generic], ...]:
        """The arrays for scales, of which zeros stand for groups of zeros; decoded, none of them is larger than `limit`."""
        ...

    def decode(self, stored: tuple[NDArray[np.generic], ...]) -> NDArray[np.float32]:
        """Positive float32 scales: the NumPy reference."""
        ...

    def emit(self, emitter: Emitter, suffix: str, stored: tuple[Array, ...]) -> str:
        """The name of scales, of a type that `Cast` reads."""
        ...


def _floor_bfloat16(value: float) -> np.float32:
    """The largest bfloat16 that is no larger than a positive value."""
    bits = np.float32(value).view(np.uint32) & np.uint32(0xFFFF0000)
    return np.uint32(bits).view(np.float32)


@dataclass(frozen=True)
class BrainFloat:
    """bfloat16: half the size of float32 and its range, so that no weight's scale leaves it. Codes are rounded on the rounded scale,
    so that its eight bits cost no accuracy. Models of an opset that cannot cast bfloat16 get the same values in float32.
    """

    name: str = ""
    min_opset: int = 7

    def rounded(self, scale: NDArray[np.float32]) -> NDArray[np.float32]:
        """To nearest."""
        return np.maximum(scale, np.float32(SMALLEST)).astype(BFLOAT16).astype(np.float32)

    def layout(self, shape: tuple[int, ...]) -> tuple[Spec, ...]:
        """One array of the scales' shape."""
        return (Spec(shape, BFLOAT16),)

    def encode(self, scale: NDArray[np.float32], limit: float) -> tuple[NDArray[np.generic], ...]:
        """To nearest, within the range; 1 for groups of zeros."""
        limited = np.clip(np.where(scale > 0, scale, 1), SMALLEST, _floor_bfloat16(limit))
        return (limited.astype(BFLOAT16),)

    def decode(self, stored: tuple[NDArray[np.generic], ...]) -> NDArray[np.float32]:
        """Widen."""
        return stored[0].astype(np.float32)

    def emit(self, emitter: Emitter, suffix: str, stored: tuple[Array, ...]) -> str:
        """One initializer."""
        (scale,) = stored
        if emitter.target.opset < MODERN_OPSET:
            scale = Spec(scale.shape, np.dtype(np.float32)) if isinstance(scale, Spec) else scale.astype(np.float32)
        return emitter.constant(f"{suffix}.s", scale)


BRAIN_FLOAT = BrainFloat()

_POWER_SCALE = Program(
    "PowerScale",
    """(e) => (s) {
        two = Constant <value = float {2.0}> ()
        f = Cast <to = 1> (e)
        s = Pow (two, f)
    }""",
)


@dataclass(frozen=True)
class PowerOfTwo:
    """int8 exponents of powers of two."""

    name: str = "pow2"
    min_opset: int = MODERN_OPSET

    def rounded(self, scale: NDArray[np.float32]) -> NDArray[np.float32]:
        """To the nearest power, on a logarithmic scale."""
        return np.exp2(np.rint(np.log2(np.maximum(scale, np.float32(SMALLEST))))).astype(np.float32)

    def layout(self, shape: tuple[int, ...]) -> tuple[Spec, ...]:
        """One array of the scales' shape."""
        return (Spec(shape, np.dtype(np.int8)),)

    def encode(self, scale: NDArray[np.float32], limit: float) -> tuple[NDArray[np.generic], ...]:
        """Exponents within the range; 0 for groups of zeros."""
        exponents = np.rint(np.log2(np.where(scale > 0, np.maximum(scale, np.float32(SMALLEST)), 1)))
        return (np.minimum(exponents, np.floor(np.log2(limit))).astype(np.int8),)

    def decode(self, stored: tuple[NDArray[np.generic], ...]) -> NDArray[np.float32]:
        """2^e, exactly."""
        return np.ldexp(np.float32(1), stored[0].astype(np.int32)).astype(np.float32)

    def emit(self, emitter: Emitter, suffix: str, stored: tuple[Array, ...]) -> str:
        """One initializer and one call."""
        return emitter.call(_POWER_SCALE, [emitter.constant(f"{suffix}.e", stored[0])], emitter.name("p"), {})


_DOUBLE_SCALE = Program(
    "DoubleScale",
    """(part, unit) => (s) {
        f = Cast <to = 1> (part)
        u = Cast <to = 1> (unit)
        s = Mul (f, u)
    }""",
)


@dataclass(frozen=True)
class Double:
    """uint8 multiples of one bfloat16 unit per channel: the double quantization of QLoRA (arXiv 2305.14314, section 3).

    Scales have the shape (outer, blocks, 1, inner) of `Blocks`; a unit is shared by the blocks of a channel.
    """

    name: str = "dq"
    min_opset: int = MODERN_OPSET

    def rounded(self, scale: NDArray[np.float32]) -> NDArray[np.float32]:
        """As they are: the unit depends on the whole channel."""
        return np.maximum(scale, np.float32(SMALLEST))

    def layout(self, shape: tuple[int, ...]) -> tuple[Spec, ...]:
        """The multiples, and the units of shape (outer, 1, 1, inner)."""
        return (Spec(shape, np.dtype(np.uint8)), Spec((shape[0], 1, *shape[2:]), BFLOAT16))

    def encode(self, scale: NDArray[np.float32], limit: float) -> tuple[NDArray[np.generic], ...]:
        """Units by which the largest scale of a channel is 255 (a little more or less, by rounding); multiples from 1."""
        peak = scale.max(axis=1, keepdims=True)
        unit = np.clip(np.where(peak > 0, peak / 255, 1), SMALLEST, _floor_bfloat16(limit / 255)).astype(BFLOAT16)
        return (np.clip(np.rint(scale / unit.astype(np.float32)), 1, 255).astype(np.uint8), unit)

    def decode(self, stored: tuple[NDArray[np.generic], ...]) -> NDArray[np.float32]:
        """Their product in float32."""
        return stored[0].astype(np.float32) * stored[1].astype(np.float32)

    def emit(self, emitter: Emitter, suffix: str, stored: tuple[Array, ...]) -> str:
        """Two initializers and one call."""
        names = [emitter.constant(f"{suffix}.s", stored[0]), emitter.constant(f"{suffix}.t", stored[1])]
        return emitter.call(_DOUBLE_SCALE, names, emitter.name("p"), {})


def emit_scaled(
    emitter: Emitter, codes: str, zero: str | None, scale: str, partition: Partition, dtype: np.dtype[np.generic], output: str | None
) -> str:
    """The programs from codes in a partition's layout to the array itself.

    Args:
        emitter: collects them.
        codes: name of int8 codes, or of bytes that are read as such.
        zero: name of the same for zero points, in the partition's `scales` shape; None for none.
        scale: name of the scales.
        partition: how they lie.
        dtype: of the result.
        output: the result's name; None makes one up.
    """
    to = {"to": onnx_type(dtype)}
    target = output if partition.is_plain else emitter.name("v")
    if zero is None:
        value = emitter.call(SCALE, [codes, scale], target, to)
    else:
        value = emitter.call(SCALE_SHIFTED, [codes, zero, scale], target, to)
    return partition.emit(emitter, value, output)


_FLAT_SCALE = Program(
    "FlatScale",
    """<unit> (scale) => (s) {
        factor = Constant <value: tensor = @unit> ()
        flat = Constant <value = int64[1] {-1}> ()
        f = Cast <to = 1> (scale)
        v = Mul (f, factor)
        s = Reshape (v, flat)
    }""",
)


def emit_flat_scale(emitter: Emitter, scale: str, factor: float) -> str:
    """The name of scales as float32 of one dimension, times a factor."""
    return emitter.call(_FLAT_SCALE, [scale], emitter.name("f"), {"unit": float_attribute(factor)})
