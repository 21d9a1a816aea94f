"""Vector quantization: runs of consecutive entries are replaced by the nearest of a few centroids (Gray, "Vector quantization", 1984)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..emit import Array, Emitter, Program, Spec, byte_attribute, onnx_type
from .base import Expandable, IntegerWeight, refusal
from .codebook import channel_scales, largest_level, safe_scales
from .grid import largest_of, single
from .packing import MODERN_OPSET, Bits
from .scaling import BFLOAT16, Blocks
from .table import Table

_SAMPLE = 1 << 16
"""Vectors that centroids are fitted on."""

_ITERATIONS = 15
"""Lloyd iterations."""

_CHUNK = 1 << 14
"""Vectors whose nearest centroids are found at once."""

_CENTROIDS = Program(
    "Centroids",
    """<to> (q, table, scale) => (w) {
        wide = Cast <to = 6> (q)
        centroids = Cast <to = 1> (table)
        runs = Gather (centroids, wide)
        f = Transpose <perm = [0, 1, 3, 2]> (runs)
        s = Cast <to = 1> (scale)
        v = Mul (f, s)
        w = Cast <to: int = @to> (v)
    }""",
)

_INDICES = Program(
    "Indices",
    """<down> (u) => (q) {
        places = Constant <value: tensor = @down> ()
        q = BitShift <direction = "RIGHT"> (u, places)
    }""",
)


def nearest(vectors: NDArray[np.float32], weights: NDArray[np.float32], centroids: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The centroid of least weighted squared distance, for each vector.

    Args:
        vectors: (count, entries).
        weights: of the squared differences, the same shape.
        centroids: (at most 256, entries).
    """
    found = np.empty(len(vectors), np.uint8)
    terms = np.concatenate([np.square(centroids), -2 * centroids], axis=1).T  # |w½(x − c)|² less what does not depend on c
    for start in range(0, len(vectors), _CHUNK):
        part = slice(start, start + _CHUNK)
        found[part] = (np.concatenate([weights[part], weights[part] * vectors[part]], axis=1) @ terms).argmin(axis=1)
    return found


def fit_centroids(vectors: NDArray[np.float32], weights: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Weighted k-means from a seeded k-means++ start (Arthur and Vassilvitskii, 2007), on at most `_SAMPLE` vectors.

    Args:
        vectors: (number, entries).
        weights: of squared errors, the same shape.
        count: number of centroids, 256 at most.
    """
    rng = np.random.default_rng(0)
    if len(vectors) > _SAMPLE:
        chosen = rng.choice(len(vectors), _SAMPLE, replace=False)
        vectors, weights = vectors[chosen], weights[chosen]
    centroids = _spread_out(vectors, weights, count, rng)
    for _ in range(_ITERATIONS):
        index = nearest(vectors, weights, centroids)
        for entry in range(vectors.shape[1]):
            share = np.bincount(index, weights[:, entry], count)
            total = np.bincount(index, weights[:, entry] * vectors[:, entry], count)
            centroids[:, entry] = np.where(share > 0, total / np.where(share > 0, share, 1), centroids[:, entry])
    return centroids


def _spread_out(vectors: NDArray[np.float32], weights: NDArray[np.float32], count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """The start: each next centroid is a vector drawn by its squared distance to those before."""
    chosen = [int(rng.integers(len(vectors)))]
    distance = np.full(len(vectors), np.inf)
    while len(chosen) < count:
        difference = vectors - vectors[chosen[-1]]
        distance = np.minimum(distance, np.einsum("ij,ij,ij->i", weights, difference, difference, dtype=np.float64))
        total = np.cumsum(distance)
        place = np.searchsorted(total, rng.random() * total[-1]) if total[-1] > 0 else rng.integers(len(vectors))
        chosen.append(min(int(place), len(vectors) - 1))
    return vectors[chosen].copy()


@dataclass(frozen=True)
class Vectors(Expandable):
    """One index for a run of entries of a channel, times a scale per channel: its root mean square.

    Runs lie like the blocks of `Blocks`. Packed arrays: indices of shape (outer, count, inner), or a flat array where two
    share a byte; float16 centroids (2^width, entries); bfloat16 scales (outer, 1, 1, inner).

    Attributes:
        entries: the most that one index stands for.
        width: bits of an index, 8 or 4.
    """

    entries: int
    width: int

    @property
    def name(self) -> str:
        """As in `vq4x8`."""
        return f"vq{self.entries}x{self.width}"

    def min_opset(self, array: Spec) -> int:
        """Modern operators."""
        return MODERN_OPSET

    def accepts(self, array: Spec) -> str | None:
        """Arrays with at least one axis and one entry."""
        return refusal(array)

    def layout(self, array: Spec, axis: int) -> tuple[Spec, ...]:
        """Indices, centroids, scales."""
        blocks = self.runs(array.shape, axis)
        places = (blocks.outer, blocks.count, blocks.inner)
        indices = Spec(places, np.dtype(np.uint8)) if self.width == 8 else Bits(self.width).layout(places)
        table = Spec((1 << self.width, blocks.layout[2]), np.dtype(np.float16))
        return (indices, table, Spec((blocks.outer, 1, 1, blocks.inner), BFLOAT16))

    def runs(self, shape: tuple[int, ...], axis: int) -> Blocks:
        """As even as can be, of at most `entries`."""
        return Blocks.of(shape, axis, self.entries)

    def table(self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None = None) -> Table:
        """Centroids by k-means on the channels divided by their scales, where an error counts by the square of its channel's scale."""
        return self._fitted(array, axis, importance)[0]

    def write(self, index: NDArray[np.int16], table: Table) -> tuple[NDArray[np.generic], ...]:
        """Packed arrays of the indices of all runs."""
        places = index.reshape(table.blocks.outer, table.blocks.count, table.blocks.inner)
        return (places.astype(np.uint8) if self.width == 8 else Bits(self.width).pack(places), table.centroids, table.stored)

    def encode(
        self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None = None
    ) -> tuple[NDArray[np.generic], ...]:
        """The nearest centroid of each run."""
        table, values, rows = self._fitted(array, axis, importance)
        scale = np.asarray(table.stored.astype(np.float32))
        vectors = self._vectors(np.asarray(values / scale, np.float32))
        return self.write(nearest(vectors, rows, table.centroids.astype(np.float32)).astype(np.int16), table)

    def _fitted(
        self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None
    ) -> tuple[Table, NDArray[np.float32], NDArray[np.float32]]:
        """The table; the array in the blocks' layout; weights of squared errors, one row for each run."""
        blocks = self.runs(array.shape, axis)
        values = blocks.split(single(array))
        channels = np.moveaxis(values, 3, 1).reshape(blocks.outer * blocks.inner, -1)
        scale = channel_scales(channels).reshape(blocks.outer, 1, 1, blocks.inner)
        rows = self._vectors(self._weights(scale, blocks, importance))
        centroids = fit_centroids(self._vectors(values / scale), rows, 1 << self.width).astype(np.float16)
        limit = largest_of(array.dtype)
        stored = safe_scales(scale, centroids, limit)
        known = stored.astype(np.float32)
        return Table(centroids, blocks.spread(known), blocks, stored, largest_level(known, limit)), values, rows

    @staticmethod
    def _weights(scale: NDArray[np.float32], blocks: Blocks, importance: NDArray[np.float64] | None) -> NDArray[np.float64]:
        """Weights of squared errors in units of the channels' scales, in the blocks' layout, at most 1."""
        weights = np.square(scale.astype(np.float64) / scale.max())
        if importance is not None:
            shares = importance / max(float(importance.max()), np.finfo(np.float64).tiny)
            weights = weights * blocks.split(np.broadcast_to(shares, blocks.shape))
        return np.broadcast_to(weights, blocks.layout)

    @staticmethod
    def _vectors(values: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """(outer, count, entries, inner) → float32 (vectors, entries)."""
        return np.ascontiguousarray(np.moveaxis(values, 2, 3), np.float32).reshape(-1, values.shape[2])

    def _blocks(self, packed: tuple[Array, ...], shape: tuple[int, ...]) -> Blocks:
        """The runs, read off the shapes of centroids and scales."""
        outer, _, _, inner = packed[2].shape
        return Blocks(shape, outer, -(-int(np.prod(shape)) // (outer * inner * packed[1].shape[1])), inner)

    def decode(self, packed: tuple[NDArray[np.generic], ...], spec: Spec) -> NDArray[np.generic]:
        """centroid · scale in float32, then the model's type."""
        blocks = self._blocks(packed, spec.shape)
        places = (blocks.outer, blocks.count, blocks.inner)
        index = packed[0] if self.width == 8 else Bits(self.width).unpack(packed[0], places).view(np.uint8) >> (8 - self.width)
        runs = np.moveaxis(packed[1].astype(np.float32)[np.asarray(index, np.int32)], 3, 2)
        return np.ascontiguousarray(blocks.join((runs * packed[2].astype(np.float32)).astype(spec.dtype)))

    def emit(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, output: str | None = None) -> str:
        """Three initializers and two calls or more."""
        blocks = self._blocks(packed, spec.shape)
        index = emitter.constant(f"{suffix}.q", packed[0])
        if self.width < 8:
            top = Bits(self.width).emit(emitter, index, (blocks.outer, blocks.count, blocks.inner))
            index = emitter.call(_INDICES, [top], emitter.name("i"), {"down": byte_attribute(8 - self.width)})
        inputs = [index, emitter.constant(f"{suffix}.l", packed[1]), emitter.constant(f"{suffix}.s", packed[2])]
        value = emitter.call(_CENTROIDS, inputs, emitter.name("v"), {"to": onnx_type(spec.dtype)})
        return blocks.emit(emitter, value, output)

    def emit_integer(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, axis: int) -> IntegerWeight | None:
        """None: centroids are no integers."""
        return None


VECTORS = tuple(Vectors(entries, width) for entries, width in ((2, 8), (4, 8), (2, 4), (4, 4)))
"""Every size that has a name: 4, 2, 2 and 1 bits per entry."""
