"""Few weights in few bits: which ones are not zero, and a code for each of those.

A uniform grid spends a code on zero for every weight that goes there. Here zeros have no code. Where the others lie is written in the
smaller of two ways, both of a size that depends on their number alone:

- a *mask*: one bit per weight. A code's place among the codes is the number of ones before its weight;
- *places* (Elias, "Efficient storage and retrieval by content and address of static files", 1974; Fano, 1971): of k ascending places
  below n, the low bits of each, and the rest in unary: bit ⌊place / 2ˡ⌋ + i is set for the i-th one. That takes less than l + 2 bits for
  each, about half a bit more than the entropy.

Which weights stay is decided over all channels at once, by how much of the weighted squared error each takes away. Error-compensated
rounding then decides once more and pushes what is dropped into the inputs that follow, as SparseGPT does (Frantar and Alistarh 2023, arXiv
2301.00774); see `ops/rounding/gptq.py`. Levels are whole multiples of a channel's step, from `least` of them on: where few weights stay,
those are all far from zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from ..emit import Array, Emitter, Program, Spec, byte_attribute, float_attribute, ints_attribute
from .base import INTEGER_CODES, Expandable, IntegerWeight, refusal
from .grid import Grid, largest_of, single
from .packing import MODERN_OPSET, Bits
from .scaling import BFLOAT16, BRAIN_FLOAT, Channels, emit_flat_scale, emit_scaled

_LEASTS = (1, 2, 3, 4, 6)
"""Smallest magnitudes to try, in steps."""

_RATIOS = (1.0, 0.85, 0.72, 0.61, 0.52, 0.44, 0.37, 0.3, 0.24, 0.18, 0.12, 0.08)
"""Largest magnitudes to try, as shares of a channel's largest value."""

_SAMPLE = 1 << 18
"""About how many entries the smallest magnitude and steps are searched on."""

_REFINED = 2
"""How often steps and codes are fitted to each other in the end."""

_LOW_BITS = range(1, 6)
"""Low bits of a place that can be written by themselves."""

_VALUES = """
        down_by = Constant <value: tensor = @down> ()
        field = BitShift <direction = "RIGHT"> (q, down_by)
        index = Cast <to = 6> (field)
        some = Gather (levels, index)"""
"""Codes of what is not zero: fields at the top of their bytes, looked up in the levels."""

_MASKED = Program(
    "MaskedCodes",
    "<down, shape> (mask, q, levels) => (u) {"
    + _VALUES
    + """
        axis = Constant <value = int32 {0}> ()
        zero = Constant <value = uint8[1] {0}> ()
        dims = Constant <value: tensor = @shape> ()
        bits = Cast <to = 9> (mask)
        one = Cast <to = 6> (bits)
        ones = CumSum <exclusive = 1> (one, axis)
        beyond = Concat <axis = 0> (some, zero)
        found = Gather (beyond, ones)
        line = Where (bits, found, zero)
        u = Reshape (line, dims)
    }""",
)

_PLACED = Program(
    "PlacedCodes",
    "<down, low_down, part, count, cells, shape> (unary, low, q, levels) => (u) {"
    + _VALUES
    + """
        axis = Constant <value = int32 {0}> ()
        start = Constant <value = int64[1] {0}> ()
        next = Constant <value = int64[1] {1}> ()
        k = Constant <value: tensor = @count> ()
        beyond = Add (k, next)
        n = Constant <value: tensor = @cells> ()
        room = Add (n, next)
        width = Constant <value: tensor = @part> ()
        low_by = Constant <value: tensor = @low_down> ()
        dims = Constant <value: tensor = @shape> ()
        bits = Cast <to = 9> (unary)
        one = Cast <to = 6> (bits)
        ones = CumSum <exclusive = 1> (one, axis)
        nowhere = Cast <to = 6> (k)
        target = Where (bits, ones, nowhere)
        not_bits = Not (bits)
        no = Cast <to = 6> (not_bits)
        zeros = CumSum <exclusive = 1> (no, axis)
        blank = ConstantOfShape <value = int32[1] {0}> (beyond)
        highs = ScatterElements (blank, target, zeros)
        high = Slice (highs, start, k)
        high_part = Mul (high, width)
        low_field = BitShift <direction = "RIGHT"> (low, low_by)
        low_part = Cast <to = 6> (low_field)
        place = Add (high_part, low_part)
        empty = ConstantOfShape <value = uint8[1] {0}> (room)
        cells_filled = ScatterElements (empty, place, some)
        line = Slice (cells_filled, start, n)
        u = Reshape (line, dims)
    }""",
)
"""The i-th one of the unary bits has as many zeros before it as the high part of the i-th place says. Places that are not needed point
behind the last weight, to a cell that is dropped."""

_BIT = Bits(1)
"""How bits lie in bytes."""


@dataclass(frozen=True)
class Sparse(Expandable):
    """Codes for some weights of an array and zeros for the others, with one step per channel.

    Packed arrays: a mask of one bit per weight, or the unary and the low bits of places, whatever is smaller; codes, sign before magnitude;
    the levels that codes stand for, as bytes in two's complement; bfloat16 scales, 1 on every axis but the channels'.

    Attributes:
        sparsity: percent of the weights that are zero.
        width: bits per code.
    """

    sparsity: int
    width: int

    @property
    def name(self) -> str:
        """As in `sparse75-int2`."""
        return f"sparse{self.sparsity}-int{self.width}"

    def min_opset(self, array: Spec) -> int:
        """Modern operators."""
        return MODERN_OPSET

    def accepts(self, array: Spec) -> str | None:
        """Arrays with at least one axis and one entry."""
        return refusal(array)

    def count(self, shape: tuple[int, ...]) -> int:
        """The most entries that are not zero; one at least."""
        return max(1, round(int(np.prod(shape)) * (100 - self.sparsity) / 100))

    def highest(self, least: int) -> int:
        """The largest magnitude, in steps, where `least` is the smallest."""
        return least + (1 << (self.width - 1)) - 1

    def low_bits(self, shape: tuple[int, ...]) -> int | None:
        """Low bits of the places that are written by themselves; None where a mask is no larger."""
        size, count = int(np.prod(shape)), self.count(shape)
        sizes = {low: _unary(size, count, low).nbytes + Bits(low).layout((count,)).nbytes for low in _LOW_BITS}
        best = min(sizes, key=lambda low: sizes[low])
        return best if sizes[best] < _BIT.layout((size,)).nbytes else None

    def layout(self, array: Spec, axis: int) -> tuple[Spec, ...]:
        """Mask or places, codes, levels, scales."""
        size, count, low = int(np.prod(array.shape)), self.count(array.shape), self.low_bits(array.shape)
        where = (_BIT.layout((size,)),) if low is None else (_unary(size, count, low), Bits(low).layout((count,)))
        levels = Spec((1 << self.width,), np.dtype(np.uint8))
        return (*where, Bits(self.width).layout((count,)), levels, Spec(Channels(array.shape, axis).scales, BFLOAT16))

    def grid(self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None = None) -> Grid:
        """The entries that stay, and steps and magnitudes for them; then what stays is chosen once more, for these levels."""
        partition = Channels(array.shape, axis)
        exact = np.abs(single(np.moveaxis(array, axis, 0)).reshape(array.shape[axis], -1))
        peak = float(exact.max()) or 1.0
        exact /= np.float32(peak)
        costs = np.ones(exact.shape, np.float32)
        if importance is not None:
            largest = max(float(importance.max()), np.finfo(np.float64).tiny)
            costs[...] = np.moveaxis(np.broadcast_to(importance, array.shape), axis, 0).reshape(exact.shape) / largest
        count = self.count(array.shape)
        kept = _largest(costs * np.square(exact), count)
        least = self._least(exact, costs, kept)
        most = self.highest(least)
        kept = _largest(costs * _taken_away(exact, least, most, self._steps(exact, costs, kept, least)), count)
        steps = self._steps(exact, costs, kept, least)
        ideal = (steps.astype(np.float64) * peak).reshape(partition.scales)
        (stored,) = BRAIN_FLOAT.encode(np.minimum(ideal, np.finfo(np.float32).max).astype(np.float32), largest_of(array.dtype) / most)
        rows = np.moveaxis(array, axis, 0).shape
        support = np.ascontiguousarray(np.moveaxis(kept.reshape(rows), 0, axis))
        scale, zero = stored.astype(np.float32), np.zeros((1,) * array.ndim, np.float32)
        return Grid(scale, zero, -most, most, axis, (self._table(least), stored), support=support, least=least)

    def _least(self, exact: NDArray[np.float32], costs: NDArray[np.float32], kept: NDArray[np.bool_]) -> int:
        """The smallest magnitude that suits channels (c, entries) best, judged by some of the channels."""
        if self.width == 1:
            return 1
        some = slice(None, None, max(1, exact.size // _SAMPLE))
        chosen = _Entries.of(exact[some], costs[some], kept[some])
        return min(_LEASTS, key=lambda least: float(self._search(chosen, least)[1].sum()))

    def _steps(self, exact: NDArray[np.float32], costs: NDArray[np.float32], kept: NDArray[np.bool_], least: int) -> NDArray[np.float32]:
        """Steps (c,) for channels (c, entries), 0 where nothing is kept: the best by some entries, then refined for all."""
        some = slice(None, None, max(1, exact.size // _SAMPLE))
        steps = self._search(_Entries.of(exact[:, some], costs[:, some], kept[:, some]), least)[0]
        every = _Entries.of(exact, costs, kept)
        start = np.where(steps > 0, steps, every.peak / np.float32(self.highest(least)))
        for _ in range(_REFINED):
            start = every.refined(start, least, self.highest(least))[0]
        return start

    def _search(self, entries: _Entries, least: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Steps (c,) of magnitudes that start at `least`, the best of `_RATIOS`, and the error of each channel, less a constant."""
        most = self.highest(least)
        tried = [
            entries.refined(entries.peak * np.float32(ratio / most), least, most) for ratio in (_RATIOS if self.width > 1 else _RATIOS[:1])
        ]
        errors = np.stack([error for _, error in tried])
        best, rank = errors.argmin(0), np.arange(errors.shape[1])
        return np.stack([steps for steps, _ in tried])[best, rank], errors[best, rank]

    def _table(self, least: int) -> NDArray[np.uint8]:
        """The level of each code: positive ones from the smallest magnitude on, then negative ones."""
        ahead = np.arange(least, self.highest(least) + 1)
        return np.concatenate([ahead, -ahead]).astype(np.int8).view(np.uint8)

    def pack(self, codes: NDArray[np.int16], grid: Grid) -> tuple[NDArray[np.generic], ...] | None:
        """Where codes are not zero, and what they are there; None where there are more than `count`."""
        size, count, low = codes.size, self.count(codes.shape), self.low_bits(codes.shape)
        line = codes.reshape(-1)
        places = np.flatnonzero(line)
        if len(places) > count:
            return None
        some = line[places]
        fields = np.zeros(count, np.int16)
        fields[: len(places)] = np.abs(some) - grid.least + np.where(some < 0, 1 << (self.width - 1), 0)
        if low is None:
            where: tuple[NDArray[np.generic], ...] = (_BIT.pack((line != 0).astype(np.int16)),)
        else:
            every = np.append(places, np.full(count - len(places), size))
            unary = np.zeros(count + (size >> low) + 1, np.int16)
            unary[(every >> low) + np.arange(count)] = 1
            where = (_BIT.pack(unary), Bits(low).pack((every & ((1 << low) - 1)).astype(np.int16)))
        return (*where, Bits(self.width).pack(fields), *grid.stored)

    def encode(
        self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None = None
    ) -> tuple[NDArray[np.generic], ...]:
        """The nearest levels of what stays."""
        grid = self.grid(array, axis, importance)
        packed = self.pack(grid.nearest(array), grid)
        assert packed is not None  # the grid's support is no larger than `count`
        return packed

    def codes(self, packed: tuple[NDArray[np.generic], ...], shape: tuple[int, ...]) -> NDArray[np.int8]:
        """The codes of packed arrays, zeros included: the NumPy reference of the programs."""
        size, count, low = int(np.prod(shape)), self.count(shape), self.low_bits(shape)
        fields = _fields(packed[-3], self.width, count)
        some = np.asarray(packed[-2], np.uint8).view(np.int8)[fields]
        if low is None:
            found = np.zeros(size, np.int8)
            places = np.flatnonzero(_fields(packed[0], 1, size))
            found[places] = some[: len(places)]
            return found.reshape(shape)
        unary = np.flatnonzero(_fields(packed[0], 1, count + (size >> low) + 1))
        found = np.zeros(size + 1, np.int8)
        found[((unary - np.arange(count)) << low) + _fields(packed[1], low, count)] = some
        return found[:size].reshape(shape)

    def decode(self, packed: tuple[NDArray[np.generic], ...], spec: Spec) -> NDArray[np.generic]:
        """code · scale in float32, then the model's type."""
        return np.asarray((self.codes(packed, spec.shape).astype(np.float32) * packed[-1].astype(np.float32)).astype(spec.dtype))

    def emit(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, output: str | None = None) -> str:
        """Four initializers and four calls, or five of each."""
        codes = self._emit_codes(emitter, suffix, packed, spec)
        scale = emitter.constant(f"{suffix}.s", packed[-1])
        return emit_scaled(emitter, codes, None, scale, Channels.read(spec.shape, packed[-1].shape), spec.dtype, output)

    def emit_integer(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, axis: int) -> IntegerWeight | None:
        """The codes as they are."""
        codes = self._emit_codes(emitter, suffix, packed, spec)
        codes = emitter.call(INTEGER_CODES, [codes], emitter.name("c"), {"unit": float_attribute(1.0)})
        scale = emitter.constant(f"{suffix}.s", packed[-1])
        return IntegerWeight(codes, emit_flat_scale(emitter, scale, 1), axis)

    def _emit_codes(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec) -> str:
        """The name of codes as bytes, of the weight's shape."""
        size, count, low = int(np.prod(spec.shape)), self.count(spec.shape), self.low_bits(spec.shape)
        bits = size if low is None else count + (size >> low) + 1
        where = [_BIT.emit(emitter, emitter.constant(f"{suffix}.m", packed[0]), (bits,))]
        if low is not None:
            where.append(Bits(low).emit(emitter, emitter.constant(f"{suffix}.p", packed[1]), (count,)))
        fields = Bits(self.width).emit(emitter, emitter.constant(f"{suffix}.q", packed[-3]), (count,))
        inputs = [*where, fields, emitter.constant(f"{suffix}.l", packed[-2])]
        shape = {"down": byte_attribute(8 - self.width), "shape": ints_attribute(spec.shape)}
        if low is None:
            return emitter.call(_MASKED, inputs, emitter.name("u"), shape)
        part = TensorProto(data_type=TensorProto.INT32, int32_data=[1 << low])
        sizes = {"count": ints_attribute([count]), "cells": ints_attribute([size])}
        return emitter.call(_PLACED, inputs, emitter.name("u"), {"low_down": byte_attribute(8 - low), "part": part, **sizes, **shape})


@dataclass(frozen=True, eq=False)
class _Entries:
    """The entries that stay of channels.

    Attributes:
        rows: the channel of each entry, ascending.
        values: magnitudes.
        costs: of squared errors.
        peak: the largest magnitude of each channel, 0 where nothing stays.
    """

    rows: NDArray[np.int64]
    values: NDArray[np.float32]
    costs: NDArray[np.float32]
    peak: NDArray[np.float32]

    @staticmethod
    def of(exact: NDArray[np.float32], costs: NDArray[np.float32], kept: NDArray[np.bool_]) -> _Entries:
        """Of channels (c, entries)."""
        rows = np.repeat(np.arange(len(kept)), np.count_nonzero(kept, axis=1))
        return _Entries(rows, exact[kept], costs[kept], np.asarray(exact.max(axis=1, initial=0, where=kept), np.float32))

    def refined(self, steps: NDArray[np.float32], least: int, most: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """The best steps (c,) for the codes that given steps yield, and minus what those take away from each channel's squared error.

        Entries that lose less as zeros count as such: what stays is chosen once more when steps are known.
        """
        exact = self.values / np.maximum(steps, np.finfo(np.float32).tiny)[self.rows]
        codes = np.clip(np.rint(exact), least, most) * (exact > least / 2)
        weighted = self.costs * codes
        along, square = (np.bincount(self.rows, weighted * each, len(steps)) for each in (self.values, codes))
        found = np.where(square > 0, along / np.where(square > 0, square, 1), 0)
        return found.astype(np.float32), np.asarray(-along * found, np.float64)


def _unary(size: int, count: int, low: int) -> Spec:
    """The unary bits of `count` places up to `size`, without their `low` low bits."""
    return _BIT.layout((count + (size >> low) + 1,))


def _fields(packed: NDArray[np.generic], width: int, count: int) -> NDArray[np.uint8]:
    """Fields as they were packed, without a sign."""
    return np.asarray(Bits(width).unpack(packed, (count,)).view(np.uint8) >> (8 - width), np.uint8)


def _largest(scores: NDArray[np.float32], count: int) -> NDArray[np.bool_]:
    """Where the `count` largest positive scores are; fewer where fewer are positive."""
    line = scores.reshape(-1)
    kept = np.zeros(line.shape, np.bool_)
    kept[np.argpartition(line, len(line) - count)[len(line) - count :] if count < len(line) else slice(None)] = True
    return (kept & (line > 0)).reshape(scores.shape)


def _taken_away(exact: NDArray[np.float32], least: int, most: int, steps: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the nearest level takes away from the squared error of magnitudes (c, entries), if they are not to be zero."""
    step = np.maximum(steps, np.finfo(np.float32).tiny)[:, None]
    value = np.clip(np.rint(exact / step), least, most) * steps[:, None]
    return np.asarray(value * (2 * exact - value), np.float32)


SPARSE: tuple[Sparse, ...] = tuple(
    Sparse(sparsity, width) for sparsity, widths in ((50, (4, 3, 2, 1)), (75, (2, 1)), (90, (4, 2))) for width in widths
)
"""Every pair that has a name; of others, one of these is more accurate in no more bytes."""
