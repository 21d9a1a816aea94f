"""Levels that follow the density of the weights: k-means in one dimension (Lloyd, "Least squares quantization in PCM", 1982)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..emit import Array, Emitter, Program, Spec, byte_attribute, onnx_type
from .base import Expandable, IntegerWeight, refusal
from .grid import largest_of, single
from .packing import MODERN_OPSET, Bits
from .scaling import BFLOAT16, LARGEST, SMALLEST, Blocks, Channels
from .table import Table

_BINS = 1 << 13
"""Bins of the histogram on which levels are fitted."""

_ITERATIONS = 60
"""Lloyd iterations at most."""

_CHUNK = 1 << 20
"""Entries whose nearest levels are found at once."""

_LOOK_UP = Program(
    "LookUp",
    """<to, down> (u, levels, scale) => (w) {
        places = Constant <value: tensor = @down> ()
        index = BitShift <direction = "RIGHT"> (u, places)
        wide = Cast <to = 6> (index)
        table = Cast <to = 1> (levels)
        f = Gather (table, wide)
        s = Cast <to = 1> (scale)
        v = Mul (f, s)
        w = Cast <to: int = @to> (v)
    }""",
)


def channel_scales(channels: NDArray[np.generic]) -> NDArray[np.float32]:
    """Root mean squares of channels (c, …) as bfloat16 can hold them; 1 for channels of zeros."""
    values = single(channels).reshape(len(channels), -1)
    peak = np.abs(values).max(axis=1)
    unit = values / np.where(peak > 0, peak, np.float32(1))[:, None]
    spread = np.sqrt(np.einsum("ij,ij->i", unit, unit) / values.shape[1]) * peak
    limited = np.clip(np.where(spread > 0, spread, 1), SMALLEST, LARGEST / 2)
    return np.asarray(limited.astype(BFLOAT16), np.float32)


def _divided(array: NDArray[np.generic], scale: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(single(array) / scale.astype(np.float32), np.float32)


def safe_scales(scales: NDArray[np.float32], levels: NDArray[np.float16], limit: float) -> NDArray[Any]:
    """bfloat16 scales that carry no level beyond a limit."""
    largest = limit / (1.01 * max(float(np.abs(levels.astype(np.float32)).max()), 1.0))  # 1.01: bfloat16 rounds by 2⁻⁸
    return np.minimum(scales, np.float32(largest)).astype(BFLOAT16)


def largest_level(scales: NDArray[np.float32], limit: float) -> float:
    """The largest level that no scale carries beyond a limit."""
    return limit / (1.01 * float(scales.max()))  # 1.01: levels are rounded to float16


def fit_levels(values: NDArray[np.float32], weights: NDArray[np.float64], count: int) -> NDArray[np.float16]:
    """Ascending levels that minimise the weighted squared error of values to their nearest one.

    Args:
        values: any shape.
        weights: of their squared errors, the same shape.
        count: number of levels.
    """
    low, high = float(values.min()), float(values.max())
    width = max(high - low, float(np.finfo(np.float32).tiny)) / _BINS
    places = np.minimum((values.reshape(-1) - np.float32(low)) / np.float32(width), _BINS - 1).astype(np.int64)
    mass = np.bincount(places, weights.reshape(-1), _BINS).astype(np.float64)
    middles = low + (np.arange(_BINS) + 0.5) * width
    density = np.cumsum(np.cbrt(mass))  # asymptotically optimal levels have a density of mass^(1/3): Panter and Dite, 1951
    levels = np.interp((np.arange(count) + 0.5) / count * density[-1], density, middles)
    total, moment = np.cumsum([0.0, *mass]), np.cumsum([0.0, *(mass * middles)])
    for _ in range(_ITERATIONS):
        edges = np.concatenate([[0], np.searchsorted(middles, (levels[1:] + levels[:-1]) / 2), [_BINS]])
        share, first = np.diff(total[edges]), np.diff(moment[edges])
        moved = np.where(share > 0, first / np.where(share > 0, share, 1), levels)
        if np.allclose(moved, levels, rtol=0, atol=width / 16):
            break
        levels = moved
    return np.sort(levels).astype(np.float16)


@dataclass(frozen=True)
class Codebook(Expandable):
    """Indices into levels that the whole array shares, times a scale per channel: its root mean square.

    Packed arrays: indices like codes of that width, float16 levels, bfloat16 scales.

    Attributes:
        width: bits of an index.
    """

    width: int

    @property
    def name(self) -> str:
        """As in `kmeans4`."""
        return f"kmeans{self.width}"

    @property
    def _packing(self) -> Bits:
        return Bits(self.width)

    def min_opset(self, array: Spec) -> int:
        """Modern operators."""
        return MODERN_OPSET

    def accepts(self, array: Spec) -> str | None:
        """Arrays with at least one axis and one entry."""
        return refusal(array)

    def layout(self, array: Spec, axis: int) -> tuple[Spec, ...]:
        """Indices, levels, scales."""
        levels = Spec((1 << self.width,), np.dtype(np.float16))
        return (self._packing.layout(array.shape), levels, Spec(Channels(array.shape, axis).scales, BFLOAT16))

    def runs(self, shape: tuple[int, ...], axis: int) -> Blocks:
        """Every entry by itself."""
        return Blocks(shape, int(np.prod(shape)), 1, 1)

    def table(self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None = None) -> Table:
        """Levels by k-means on the channels divided by their scales, where an error counts by the square of its channel's scale."""
        partition = Channels(array.shape, axis)
        scale = channel_scales(np.moveaxis(array, axis, 0)).reshape(partition.scales)
        weights: NDArray[np.float64] = np.square(scale.astype(np.float64) / float(scale.max()))
        if importance is not None:
            weights = weights * importance
        levels = fit_levels(_divided(array, scale), np.broadcast_to(weights, array.shape), 1 << self.width)
        limit = largest_of(array.dtype)
        stored = safe_scales(scale, levels, limit)
        known = stored.astype(np.float32)
        return Table(levels[:, None], known, self.runs(array.shape, axis), stored, largest_level(known, limit))

    def write(self, index: NDArray[np.int16], table: Table) -> tuple[NDArray[np.generic], ...]:
        """Packed arrays of the indices of all entries."""
        return (self._packing.pack(index.reshape(table.blocks.shape)), table.centroids[:, 0], table.stored)

    def encode(
        self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None = None
    ) -> tuple[NDArray[np.generic], ...]:
        """The nearest level of each entry."""
        table = self.table(array, axis, importance)
        return self.write(self._nearest(_divided(array, table.scale), table.centroids[:, 0]), table)

    @staticmethod
    def _nearest(values: NDArray[np.float32], levels: NDArray[np.float16]) -> NDArray[np.int16]:
        known = levels.astype(np.float32)
        between, flat = (known[1:] + known[:-1]) / 2, values.reshape(-1)
        found = np.empty(flat.shape, np.int16)
        for start in range(0, len(flat), _CHUNK):
            found[start : start + _CHUNK] = np.searchsorted(between, flat[start : start + _CHUNK])
        return found.reshape(values.shape)

    def decode(self, packed: tuple[NDArray[np.generic], ...], spec: Spec) -> NDArray[np.generic]:
        """level · scale in float32, then the model's type."""
        index = self._packing.unpack(packed[0], spec.shape).view(np.uint8) >> (8 - self.width)
        return np.asarray((packed[1].astype(np.float32)[index] * packed[2].astype(np.float32)).astype(spec.dtype))

    def emit(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, output: str | None = None) -> str:
        """Three initializers and two calls."""
        codes = self._packing.emit(emitter, emitter.constant(f"{suffix}.q", packed[0]), spec.shape)
        inputs = [codes, emitter.constant(f"{suffix}.l", packed[1]), emitter.constant(f"{suffix}.s", packed[2])]
        return emitter.call(_LOOK_UP, inputs, output, {"to": onnx_type(spec.dtype), "down": byte_attribute(8 - self.width)})

    def emit_integer(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, axis: int) -> IntegerWeight | None:
        """None: levels are no integers."""
        return None


CODEBOOKS = tuple(Codebook(width) for width in (4, 3, 2))
"""Every width that has a name."""
