"""Calibrate the ranges of activations: histograms of values over data, and the range that each method reads off them.

A range is what QuantizeLinear needs: q = saturate(round(x / scale) + zero_point). Zero is always a value that bytes represent exactly, so
that padding and Relu are exact. Methods:

- ``minmax``: everything that was seen;
- ``percentile``: without the rarest entries, half of them on either side;
- ``mse``: where rounding and clipping together cost the least mean square error;
- ``entropy``: where the rounded distribution has the least Kullback-Leibler divergence from the original (Migacz, "8-bit inference with
  TensorRT", 2017), with bytes that need not be symmetric.

``auto`` is ``mse``. Histograms have bins of a power of two, on a grid that holds zero, so they grow exactly and do not depend on the order
of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .calibrate import value_shapes
from .data import Dataset
from .execute import Executor
from .model import Model
from .options import Runtime

BINS = 2048
"""Most bins of a histogram; at least half of them lie between the extremes."""

PERCENTILE = 99.99
"""Percent of entries that ``percentile`` keeps, unless told otherwise."""

FETCH_LIMIT_BYTES = 1 << 28
"""Most bytes of activations fetched at once, unless a single value is larger."""

UNSIGNED: np.dtype[Any] = np.dtype(np.uint8)
"""The bytes that activations are, unless told otherwise."""

_TINY = float(np.finfo(np.float32).tiny)
_HUGE = float(np.finfo(np.float32).max)
_CHUNK = 1 << 18
"""Entries that are counted at once."""
_LEVELS = 256
_ENTROPY_STEPS = 128
"""Candidates between nothing and everything that was seen."""
_SHARES = np.geomspace(2**-8, 1, 33)
"""Candidates for a limit, as shares of an extreme."""
_NEARBY = np.geomspace(_SHARES[0] / _SHARES[1], _SHARES[1] / _SHARES[0], 17)
"""Candidates around the best of these, as factors."""

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Range:
    """How one activation value is written in bytes.

    Attributes:
        scale: of one step.
        zero_point: the byte that stands for zero.
        dtype: uint8 or int8.
    """

    scale: np.float32
    zero_point: int
    dtype: np.dtype[Any] = UNSIGNED

    @staticmethod
    def spanning(low: float, high: float, dtype: np.dtype[Any] = UNSIGNED, bits: int = 8) -> Range:
        """The range from `low` to `high`, and zero.

        Args:
            low: least value to represent.
            high: largest value to represent.
            dtype: uint8 or int8.
            bits: 8, or 7 for processors without VNNI: their sums of two products of bytes saturate at 16 bits (larger values than `high`
                still are represented then, up to twice as far).
        """
        low, high = min(low, 0.0), max(high, 0.0)
        first = int(np.iinfo(dtype).min) >> (8 - bits)
        levels = (1 << bits) - 1
        if low == high:
            return Range(np.float32(1), 0, dtype)
        scale = np.float32(min(max((high - low) / levels, _TINY), _HUGE))
        zero_point = round(first - low / float(scale))
        return Range(scale, min(max(zero_point, first), first + levels), dtype)

    @property
    def lowest(self) -> float:
        """The least value that a byte represents."""
        return (int(np.iinfo(self.dtype).min) - self.zero_point) * float(self.scale)

    @property
    def highest(self) -> float:
        """The largest value that a byte represents."""
        return (int(np.iinfo(self.dtype).max) - self.zero_point) * float(self.scale)

    def within(self, low: float, high: float) -> Range:
        """The range itself where it leaves the given bounds, which zero lies between, by half a step at most; else one that stops there."""
        half, width = float(self.scale) / 2, self.highest - self.lowest
        if self.lowest >= low - half and self.highest <= high + half:
            return self
        first, last = max(self.lowest, low), min(self.highest, high)
        if first == last:  # on the wrong side of zero altogether
            first, last = max(low, -width), min(high, width)
        return Range.spanning(first, last, self.dtype)

    def rounded(self, values: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """What QuantizeLinear and DequantizeLinear make of float32 values."""
        limits = np.iinfo(self.dtype)
        codes = np.rint(np.asarray(values, np.float32) / self.scale) + np.float32(self.zero_point)
        return np.asarray((np.clip(codes, limits.min, limits.max) - np.float32(self.zero_point)) * self.scale, np.float32)


@dataclass(frozen=True, eq=False)
class Histogram:
    """How the entries of a value are distributed.

    Attributes:
        counts: (bins,) int64, entries of [(first + i)·width, (first + i + 1)·width), without those that are exactly zero.
        first: number of the first bin, at most 0; the last one holds zero or lies above it.
        width: of a bin, a power of two.
        low: least entry.
        high: largest entry.
        zeros: entries that are exactly zero.
        broken: entries that are NaN or infinite; they are in no bin.
        total: entries, all of them.
    """

    counts: NDArray[np.int64]
    first: int
    width: float
    low: float
    high: float
    zeros: int
    broken: int
    total: int

    @property
    def reason(self) -> str | None:
        """Why the value has no range; None if it has one."""
        if self.broken:
            return f"{self.broken} of its {self.total} entries are NaN or infinite"
        return None if self.total else "it has no entries"

    @property
    def edges(self) -> Float64:
        """Limits of the bins: (bins + 1,)."""
        return (self.first + np.arange(len(self.counts) + 1, dtype=np.float64)) * self.width

    def minmax(self) -> tuple[float, float]:
        """Least and largest entry."""
        return self.low, self.high

    def percentile(self, percent: float = PERCENTILE) -> tuple[float, float]:
        """The limits outside of which (100 − percent)/2 percent of the entries lie on either side; exact to a bin's width."""
        outside = (1 - percent / 100) / 2 * self.total
        counts = self.counts.copy()
        counts[-self.first] += self.zeros
        before = np.concatenate([[0], np.cumsum(counts)])
        edges = self.edges
        low = edges[np.searchsorted(before, outside, side="right") - 1] if outside < before[-1] else self.low
        high = edges[np.searchsorted(before, before[-1] - outside, side="left")]
        return max(float(low), self.low), min(float(high), self.high)

    def mse(self) -> tuple[float, float]:
        """The limits for which the squared error of rounding is least: both shrunk together, then each by itself."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        best = self._least_error([(low * share, high * share) for share in _SHARES])
        if low < 0 < high:
            best = self._least_error([best, *((best[0], high * share) for share in _SHARES)])
            best = self._least_error([best, *((low * share, best[1]) for share in _SHARES)])
        best = self._least_error([best, *((best[0], min(best[1] * factor, high)) for factor in _NEARBY)])
        return self._least_error([best, *((max(best[0] * factor, low), best[1]) for factor in _NEARBY)])

    def _squared_errors(self, limits: Sequence[tuple[float, float]]) -> Float64:
        """Summed squared error of rounding to the range between each of several limits, if entries are spread evenly within their bins.

        The integral over a bin is taken exactly: within the range, the squared error of the nearest multiple of the step s integrates to
        s³/12 a step; beyond its ends it grows with the distance.
        """
        grids = [Range.spanning(low, high) for low, high in limits]
        columns = np.array([(float(grid.scale), grid.lowest, grid.highest) for grid in grids]).T[:, :, None]
        return np.asarray(np.diff(_error_integral(self.edges, *columns)) @ self.counts / self.width)

    def _least_error(self, limits: Sequence[tuple[float, float]]) -> tuple[float, float]:
        """Those of several limits with the least squared error."""
        return limits[int(np.argmin(self._squared_errors(limits)))]

    def entropy(self) -> tuple[float, float]:
        """The limits whose 256 levels lose the least information about the entries that are not zero.

        Candidates hold all entries up to some magnitude, and at least as many bins as there are levels.
        """
        counts = self.counts.astype(np.float64)
        filled = np.flatnonzero(counts)
        best, least = (self.low, self.high), math.inf
        for reach in np.ceil(np.arange(1, _ENTROPY_STEPS + 1) / _ENTROPY_STEPS * max(-self.first, len(counts) + self.first)).astype(int):
            kept = filled[(filled >= -self.first - reach) & (filled < -self.first + reach)]
            if not len(kept) or kept[-1] + 1 - kept[0] < _LEVELS:
                continue
            lost = _information_lost(counts, int(kept[0]), int(kept[-1]) + 1)
            if lost < least:
                best, least = (float(self.edges[kept[0]]), float(self.edges[kept[-1] + 1])), lost
        return max(best[0], self.low), min(best[1], self.high)


METHODS: Mapping[str, Callable[[Histogram], tuple[float, float]]] = {
    "minmax": Histogram.minmax,
    "percentile": Histogram.percentile,
    "mse": Histogram.mse,
    "entropy": Histogram.entropy,
}
"""Ways to choose the limits of a range, by the name that users give."""

AUTO = "mse"
"""The method that "auto" stands for."""


def calibrated(
    model: Model,
    values: Sequence[str],
    data: Dataset,
    indices: NDArray[Any],
    runtime: Runtime,
    method: str = AUTO,
    *,
    dtype: np.dtype[Any] = UNSIGNED,
    bits: int = 8,
) -> dict[str, Range]:
    """Ranges of values of the main graph; values with a `Histogram.reason` against one are left out.

    Args:
        model: the model.
        values: names of float32 values.
        data: the samples.
        indices: which of them, (n,) integer.
        runtime: how to run.
        method: one of `METHODS`, or "auto".
        dtype: uint8 or int8.
        bits: 8, or 7; see `Range.spanning`.
    """
    limits = METHODS[AUTO if method == "auto" else method]
    histograms = collect(model, values, data, indices, runtime)
    return {name: Range.spanning(*limits(each), dtype, bits) for name, each in histograms.items() if each.reason is None}


def collect(model: Model, values: Sequence[str], data: Dataset, indices: NDArray[Any], runtime: Runtime) -> dict[str, Histogram]:
    """Histograms of values of the main graph over some samples, by name; memory does not depend on the number of samples.

    Args:
        model: the model; one that runs in segments keeps the fetched values of all feeds in memory.
        values: names of float32 values.
        data: the samples.
        indices: which of them, (n,) integer.
        runtime: how to run.
    """
    growing = {name: _Growing() for name in values}
    for part in _parts(model, list(growing), data, runtime):
        executor = Executor.of(model, part, runtime)
        for arrays in executor.run(feed for feed, _ in data.feeds(indices, runtime.batch)):
            for name, array in zip(part, arrays, strict=True):
                growing[name].add(array)
    return {name: each.histogram() for name, each in growing.items()}


def _parts(model: Model, values: Sequence[str], data: Dataset, runtime: Runtime) -> Iterator[list[str]]:
    """The values in groups that are small enough to be fetched together."""
    shapes = value_shapes(model, values, data.first(runtime.batch), runtime)
    part: list[str] = []
    part_bytes = 0
    for name in values:
        size_bytes = 4 * math.prod(shapes[name])
        if part and part_bytes + size_bytes > FETCH_LIMIT_BYTES:
            yield part
            part, part_bytes = [], 0
        part.append(name)
        part_bytes += size_bytes
    if part:
        yield part


@dataclass
class _Growing:
    """A histogram whose bins are joined in pairs whenever it gets too wide."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    first: int = 0
    exponent: int = -149
    low: float = math.inf
    high: float = -math.inf
    zeros: int = 0
    broken: int = 0
    total: int = 0

    def add(self, array: NDArray[Any]) -> None:
        """Count the entries of an array."""
        entries = np.asarray(array).reshape(-1)
        self.total += entries.size
        if entries.size and not (np.isfinite(entries.min()) and np.isfinite(entries.max())):
            finite = np.isfinite(entries)
            self.broken += int(entries.size - finite.sum())
            entries = entries[finite]
        if not entries.size:
            return
        self.low, self.high = min(self.low, float(entries.min())), max(self.high, float(entries.max()))
        self._widen()
        for start in range(0, entries.size, _CHUNK):
            self._count(np.asarray(entries[start : start + _CHUNK], np.float64))

    def _count(self, entries: Float64) -> None:
        """Count finite entries that the bins have room for."""
        bins = np.floor(entries * math.ldexp(1.0, -self.exponent)).astype(np.int64) - self.first
        self.counts += np.bincount(bins, minlength=len(self.counts))
        zeros = int(entries.size - np.count_nonzero(entries))
        self.counts[-self.first] -= zeros
        self.zeros += zeros

    def _widen(self) -> None:
        """Make the bins wide enough, and their number large enough, for everything between the extremes and for zero."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        while _bin(high, self.exponent) - _bin(low, self.exponent) >= BINS:
            span = math.frexp(high / 2 - low / 2)[1] + 1 - int(math.log2(BINS))
            self._coarsen(max(1, span - 1 - self.exponent))
        first, last = _bin(low, self.exponent), _bin(high, self.exponent)
        before, after = self.first - first, last + 1 - self.first - len(self.counts)
        self.counts = np.pad(self.counts, (max(0, before), max(0, after)))
        self.first = min(self.first, first)

    def _coarsen(self, times: int) -> None:
        """Join bins until they are 2^times as wide."""
        self.exponent += times
        numbers = (
            (self.first + np.arange(len(self.counts))) >> times
            if times < 63
            else np.where(np.arange(len(self.counts)) < -self.first, -1, 0)
        )
        self.first = int(numbers[0])
        joined = np.zeros(int(numbers[-1]) - self.first + 1, np.int64)
        np.add.at(joined, numbers - self.first, self.counts)
        self.counts = joined

    def histogram(self) -> Histogram:
        """What was counted."""
        low, high = (self.low, self.high) if self.low <= self.high else (0.0, 0.0)
        width = math.ldexp(1.0, self.exponent)
        return Histogram(self.counts, self.first, width, low, high, self.zeros, self.broken, self.total)


def _bin(value: float, exponent: int) -> int:
    """The number of the bin of width 2^exponent that holds a value."""
    return math.floor(math.ldexp(value, -exponent))


def _error_integral(points: Float64, step: Float64, low: Float64, high: Float64) -> Float64:
    """∫ (t − Q(t))² dt from 0 to each point, Q rounding to multiples of `step` from `low` to `high`, which are multiples too.

    Args:
        points: (p,).
        step, low, high: (ranges, 1).

    Returns:
        (ranges, p).
    """
    inside = np.clip(points, low, high)
    steps = np.rint(inside / step)
    return np.asarray(steps * step**3 / 12 + (inside - steps * step) ** 3 / 3 + (points - inside) ** 3 / 3)


def _information_lost(counts: Float64, start: int, stop: int) -> float:
    """Kullback-Leibler divergence of a histogram, cut to the bins from `start` to `stop`, from itself at 256 levels.

    What is cut off counts as part of the outermost bins, which are not empty by themselves; a level spreads its entries evenly over those
    of its bins that are not empty.
    """
    kept = counts[start:stop]
    clipped = kept.copy()
    clipped[0] += counts[:start].sum()
    clipped[-1] += counts[stop:].sum()
    levels = np.arange(len(kept)) * _LEVELS // max(_LEVELS, len(kept))
    filled = np.bincount(levels, kept > 0)
    spread = np.where(kept > 0, (np.bincount(levels, kept) / np.maximum(filled, 1))[levels], 0.0)
    some = clipped > 0
    p, q = clipped[some] / clipped.sum(), spread[some] / spread.sum()
    return float((p * np.log(p / q)).sum())
