"""Tables of levels: which values a storage can write whose entries, or runs of entries, point into a codebook."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .scaling import Blocks


@dataclass(frozen=True, eq=False)
class Table:
    """Centroids: each run of an array's entries is one of them, times a scale.

    Attributes:
        centroids: float16 (count, entries), as they are stored; entries is 1 for levels of single entries.
        scale: positive float32, broadcastable to the array and the same all along a run: exactly what the decoder will multiply by.
        blocks: how runs lie over the array.
        stored: the scales as they are packed.
        largest: the largest magnitude of a centroid that no scale carries beyond the array's type.
    """

    centroids: NDArray[np.float16]
    scale: NDArray[np.float32]
    blocks: Blocks
    stored: NDArray[np.generic]
    largest: float

    def moved(self, centroids: NDArray[np.floating]) -> Table:
        """The same scales with other centroids (count, entries), which are rounded to what can be stored."""
        limit = min(self.largest, float(np.finfo(np.float16).max))
        return replace(self, centroids=np.clip(centroids, -limit, limit).astype(np.float16))


def run_numbers(blocks: Blocks) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The number of every entry's run, counted through (outer, count, inner), and the entry's place in it; both of the array's shape."""
    outer, count, entries, inner = blocks.layout
    numbers = np.arange(outer * count * inner).reshape(outer, count, 1, inner)
    return blocks.spread(numbers), blocks.spread(np.arange(entries).reshape(1, 1, entries, 1))
