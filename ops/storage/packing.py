"""How codes lie in bytes, and the programs that take them apart.

Packed codes are a flat uint8 array with a few bits of padding at its end. Its bytes hold fields in planes: with k fields to a byte,
field f of byte j belongs to code f·m + j, m being the number of bytes. So one broadcast `BitShift` unpacks all of them.

A program yields each code in the *top* bits of a byte, as code · 2^(8−bits) modulo 256. Read as int8 this is a signed code, in two's
complement, times a power of two that the scale makes up for. So codes stay one byte wide until they become floats, and no
offset need be subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from ..emit import Emitter, Program, Spec, ints_attribute

MODERN_OPSET = 13
"""The opset from which `Slice` and `ReduceProd` take the inputs that programs give them, and `Cast` reads bfloat16."""


class Packing(Protocol):
    """Signed codes of a fixed width in bytes."""

    @property
    def lowest(self) -> int:
        """The smallest code."""
        ...

    @property
    def highest(self) -> int:
        """The largest code."""
        ...

    @property
    def unit(self) -> int:
        """What emitted values are multiples of: int8(value) = code · unit."""
        ...

    def min_opset(self, shape: tuple[int, ...]) -> int:
        """The lowest opset in which codes of this shape can be taken apart."""
        ...

    def layout(self, shape: tuple[int, ...]) -> Spec:
        """The packed array of codes of this shape."""
        ...

    def pack(self, codes: NDArray[np.int16]) -> NDArray[np.generic]:
        """Codes within lowest…highest → the packed array."""
        ...

    def unpack(self, packed: NDArray[np.generic], shape: tuple[int, ...]) -> NDArray[np.int8]:
        """int8 values of the given shape, code · unit: the NumPy reference of the program."""
        ...

    def emit(self, emitter: Emitter, packed: str, shape: tuple[int, ...]) -> str:
        """The name of an int8 or uint8 value of the given shape whose bytes are those of `unpack`."""
        ...


@dataclass(frozen=True)
class Bytes:
    """int8 as it is."""

    lowest: int = -127
    highest: int = 127
    unit: int = 1

    def min_opset(self, shape: tuple[int, ...]) -> int:
        """Any: there is no program."""
        return 7

    def layout(self, shape: tuple[int, ...]) -> Spec:
        """int8 of the same shape."""
        return Spec(shape, np.dtype(np.int8))

    def pack(self, codes: NDArray[np.int16]) -> NDArray[np.generic]:
        """The codes in one byte each."""
        return codes.astype(np.int8)

    def unpack(self, packed: NDArray[np.generic], shape: tuple[int, ...]) -> NDArray[np.int8]:
        """The array itself."""
        return np.asarray(packed, np.int8)

    def emit(self, emitter: Emitter, packed: str, shape: tuple[int, ...]) -> str:
        """The initializer itself."""
        return packed


def _field_lines(width: int, source: str, result: str, down: str) -> str:
    """Text of the nodes that turn rows of bytes (1, m) into fields (8/width, m), each at the top of its byte and then `down` bits lower."""
    count = 8 // width
    shifts = ", ".join(str(width * field) for field in range(count))
    return f"""
        {result}_shifts = Constant <value = uint8[{count}, 1] {{{shifts}}}> ()
        {result}_clear = Constant <value = uint8 {{{8 - width}}}> ()
        {result}_back = Constant <value = uint8 {{{down}}}> ()
        {result}_moved = BitShift <direction = "LEFT"> ({source}, {result}_shifts)
        {result}_low = BitShift <direction = "RIGHT"> ({result}_moved, {result}_clear)
        {result} = BitShift <direction = "LEFT"> ({result}_low, {result}_back)"""


_CROP = """
        start = Constant <value = int64[1] {0}> ()
        flat = Constant <value = int64[1] {-1}> ()
        dims = Constant <value: tensor = @shape> ()
        count = ReduceProd <keepdims = 1> (dims)
        line = Reshape (all, flat)
        kept = Slice (line, start, count)
        u = Reshape (kept, dims)
    }"""
"""The end of every program: drop the padding and give the codes their shape."""


def _one_plane(width: int) -> Program:
    """The program for a width that divides 8."""
    return Program(f"Unpack{width}", "<shape> (q) => (u) {" + _field_lines(width, "q", "all", str(8 - width)) + _CROP)


def _two_planes(high: int, low: int) -> Program:
    """The program for high + low bits: a plane of rows of `high` bits before one of `low` bits, joined in float32."""
    width = high + low
    tops = ", ".join(map(str, range(high)))
    rests = ", ".join(map(str, range(high, width)))
    return Program(
        f"Unpack{width}",
        f"""<shape> (q) => (u) {{
        grid = Constant <value = int64[2] {{{width}, -1}}> ()
        row = Constant <value = int64[2] {{1, -1}}> ()
        high_rows = Constant <value = int64[{high}] {{{tops}}}> ()
        low_rows = Constant <value = int64[{low}] {{{rests}}}> ()
        rows = Reshape (q, grid)
        high_part = Gather <axis = 0> (rows, high_rows)
        low_part = Gather <axis = 0> (rows, low_rows)
        high_line = Reshape (high_part, row)
        low_line = Reshape (low_part, row)"""
        + _field_lines(high, "high_line", "h", str(8 - high))
        + _field_lines(low, "low_line", "l", str(8 - width))
        + """
        h_flat = Reshape (h, row)
        l_flat = Reshape (l, row)
        h_float = Cast <to = 1> (h_flat)
        l_float = Cast <to = 1> (l_flat)
        sum = Add (h_float, l_float)
        all = Cast <to = 2> (sum)"""
        + _CROP,
    )


_UNPACK = {1: _one_plane(1), 2: _one_plane(2), 4: _one_plane(4), 3: _two_planes(2, 1), 5: _two_planes(4, 1), 6: _two_planes(4, 2)}

_UNPACK4_ARITHMETIC = Program(
    "Unpack4ByFloor",
    """<shape> (q) => (u) {
        sixteenth = Constant <value = float {0.0625}> ()
        sixteen = Constant <value = float {16.0}> ()
        sizes = Constant <value: tensor = @shape> ()
        dims = Cast <to = 7> (sizes)
        f = Cast <to = 1> (q)
        shifted = Mul (f, sixteenth)
        whole = Floor (shifted)
        high = Mul (whole, sixteen)
        rest = Sub (f, high)
        low = Mul (rest, sixteen)
        all = Concat <axis = 0> (high, low)
        byte = Cast <to = 2> (all)
        u = Reshape (byte, dims)
    }""",
)
"""Four-bit codes in opsets older than `MODERN_OPSET`; their number is even. The shape is double, since old constants are no integers."""


@dataclass(frozen=True)
class Bits:
    """Two's-complement codes of 1 to 6 bits; widths that do not divide 8 are two planes, the high bits (4 or 2 of them) first.

    Attributes:
        width: bits per code.
    """

    width: int

    @property
    def lowest(self) -> int:
        """−2^(width−1)."""
        return -(1 << (self.width - 1))

    @property
    def highest(self) -> int:
        """2^(width−1) − 1."""
        return (1 << (self.width - 1)) - 1

    @property
    def unit(self) -> int:
        """The codes lie in the top bits of a byte."""
        return 1 << (8 - self.width)

    @property
    def planes(self) -> tuple[int, ...]:
        """Widths of the planes, each a divisor of 8."""
        high = 1 << (self.width.bit_length() - 1)
        return (high,) if high == self.width else (high, self.width - high)

    def min_opset(self, shape: tuple[int, ...]) -> int:
        """Even numbers of four-bit codes can be taken apart by arithmetic, all else needs modern operators."""
        return 7 if self.width == 4 and int(np.prod(shape)) % 2 == 0 else MODERN_OPSET

    def layout(self, shape: tuple[int, ...]) -> Spec:
        """A flat uint8 array; two planes hold a multiple of 8 codes each."""
        count, per_byte = int(np.prod(shape)), 8 // self.planes[0]
        size = -(-count // per_byte) if len(self.planes) == 1 else self.width * -(-count // 8)
        return Spec((size,), np.dtype(np.uint8))

    def pack(self, codes: NDArray[np.int16]) -> NDArray[np.generic]:
        """Fields of each plane, one plane after the other."""
        rest = np.left_shift(codes.astype(np.uint8).reshape(-1), np.uint8(8 - self.width))
        multiple = 8 // self.planes[0] if len(self.planes) == 1 else 8
        rest = np.pad(rest, (0, -len(rest) % multiple))
        parts = []
        for width in self.planes:
            fields = (rest >> (8 - width)).reshape(8 // width, -1)
            packed = np.zeros(fields.shape[1], np.uint8)
            for number, field in enumerate(fields):
                packed |= field << (8 - width - width * number)
            parts.append(packed)
            rest = np.left_shift(rest, np.uint8(width))
        return np.concatenate(parts)

    def unpack(self, packed: NDArray[np.generic], shape: tuple[int, ...]) -> NDArray[np.int8]:
        """The fields of each plane, put together."""
        stream, count = np.asarray(packed, np.uint8), int(np.prod(shape))
        rows = len(stream) // self.width if len(self.planes) == 2 else 0
        parts = (stream[: rows * self.planes[0]], stream[rows * self.planes[0] :]) if rows else (stream,)
        total: NDArray[np.uint8] = np.zeros(1, np.uint8)
        used = 0
        for width, part in zip(self.planes, parts, strict=True):
            shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
            fields = ((((part << shifts) >> (8 - width)) << (8 - width)) >> used).astype(np.uint8)
            total = total | fields.reshape(-1)
            used += width
        return total[:count].reshape(shape).view(np.int8)

    def emit(self, emitter: Emitter, packed: str, shape: tuple[int, ...]) -> str:
        """One call."""
        if emitter.target.opset < MODERN_OPSET:
            dims = TensorProto(dims=[len(shape)], data_type=TensorProto.DOUBLE, double_data=shape)
            return emitter.call(_UNPACK4_ARITHMETIC, [packed], emitter.name("u"), {"shape": dims})
        return emitter.call(_UNPACK[self.width], [packed], emitter.name("u"), {"shape": ints_attribute(shape)})


_TRITS = 5
"""Base-3 digits to a byte: 3⁵ = 243."""

_UNPACK_TRITS = Program(
    "UnpackTrits",
    """<shape> (q) => (u) {
        powers = Constant <value = float[5, 1] {1.0, 3.0, 9.0, 27.0, 81.0}> ()
        three = Constant <value = float {3.0}> ()
        one = Constant <value = float {1.0}> ()
        f = Cast <to = 1> (q)
        shifted = Div (f, powers)
        whole = Floor (shifted)
        digit = Mod <fmod = 1> (whole, three)
        signed = Sub (digit, one)
        all = Cast <to = 3> (signed)"""
    + _CROP,
)


@dataclass(frozen=True)
class Trits:
    """Codes −1, 0, 1, five to a byte in base 3: 1.6 bits each."""

    lowest: int = -1
    highest: int = 1
    unit: int = 1

    def min_opset(self, shape: tuple[int, ...]) -> int:
        """Modern operators."""
        return MODERN_OPSET

    def layout(self, shape: tuple[int, ...]) -> Spec:
        """A flat uint8 array."""
        return Spec((-(-int(np.prod(shape)) // _TRITS),), np.dtype(np.uint8))

    def pack(self, codes: NDArray[np.int16]) -> NDArray[np.generic]:
        """Digit f of byte j is the code f·m + j, plus 1."""
        flat = (codes.reshape(-1) + 1).astype(np.uint8)
        digits = np.pad(flat, (0, -len(flat) % _TRITS)).reshape(_TRITS, -1)
        powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]
        return np.asarray((digits * powers).sum(axis=0), np.uint8)

    def unpack(self, packed: NDArray[np.generic], shape: tuple[int, ...]) -> NDArray[np.int8]:
        """The digits, less 1."""
        powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]
        digits = np.asarray(packed, np.uint8) // powers % 3
        return (digits.reshape(-1)[: int(np.prod(shape))].astype(np.int8) - np.int8(1)).reshape(shape)

    def emit(self, emitter: Emitter, packed: str, shape: tuple[int, ...]) -> str:
        """One call."""
        return emitter.call(_UNPACK_TRITS, [packed], emitter.name("u"), {"shape": ints_attribute(shape)})
