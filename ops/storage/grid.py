"""Uniform grids: which values a scalar storage can write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 18
"""Entries that are rounded at once: small enough for a processor's cache, large enough that NumPy's overhead is lost."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Uniform levels: value = (code − zero) · scale, with code in lowest…highest.

    Where there is a support, codes outside of it are zero, and those within are `least` or more in magnitude.

    Attributes:
        scale: positive float32, broadcastable to the array: exactly what the decoder will multiply by.
        zero: float32 integers within lowest…highest, broadcastable to the array; zeros where the grid is symmetric.
        lowest: the smallest code.
        highest: the largest code.
        axis: the array's channel axis.
        stored: scales (and zeros) as they are packed. Only the storage that made the grid reads them, so a grid with another `scale`
            cannot be packed.
        next_coarser: makes the grid of the next larger step; None where codes of any grid fit.
        support: of the array's shape, which entries are not zero; None where any may be. Only for symmetric grids.
        least: the smallest magnitude of a code in the support.
    """

    scale: NDArray[np.float32]
    zero: NDArray[np.float32]
    lowest: int
    highest: int
    axis: int = 0
    stored: tuple[NDArray[np.generic], ...] = ()
    next_coarser: Callable[[], Grid] | None = None
    support: NDArray[np.bool_] | None = None
    least: int = 0

    def nearest(self, values: NDArray[np.generic]) -> NDArray[np.int16]:
        """Codes of the levels that are nearest to the values; beyond the ends, those of the outermost levels."""
        codes = np.empty(values.shape, np.int16)
        scale, zero = (np.broadcast_to(part, values.shape) for part in (self.scale, self.zero))
        step = max(1, _CHUNK * len(values) // max(values.size, 1)) if values.ndim else 1
        shifted = bool(self.zero.any())
        for start in range(0, len(values), step):
            part = slice(start, start + step)
            rounded = single(values[part])
            rounded /= scale[part]
            np.rint(rounded, out=rounded)
            if shifted:
                rounded += zero[part]
            if self.support is not None:
                rounded = np.copysign(np.maximum(np.abs(rounded), self.least), rounded) * self.support[part]
            codes[part] = np.clip(rounded, self.lowest, self.highest, out=rounded)
        return codes

    def values(self, codes: NDArray[np.int16]) -> NDArray[np.float32]:
        """float32 values of codes: what the decoder yields, before it is cast to the model's type."""
        return np.asarray((codes.astype(np.float32) - self.zero) * self.scale, np.float32)

    def coarser(self) -> Grid:
        """The next larger step, for storages whose codes may not fit.

        Raises:
            ValueError: codes of this grid always fit.
        """
        if self.next_coarser is None:
            raise ValueError("a grid of fixed width has no coarser one: its codes always fit")
        return self.next_coarser()


def largest_of(dtype: np.dtype[np.generic]) -> float:
    """The largest finite value that a decoder, which computes in float32, can give a float type."""
    if dtype == np.float16:
        return float(np.finfo(np.float16).max)
    largest = float(np.finfo(np.float32).max)
    return largest if dtype.kind == "f" else largest * (1 - 2.0**-8)  # bfloat16 lacks the lowest bits


def single(array: NDArray[np.generic]) -> NDArray[np.float32]:
    """A float32 copy in C order; doubles beyond its range saturate."""
    if array.dtype == np.float64:
        limit = float(np.finfo(np.float32).max)
        return np.ascontiguousarray(np.clip(array, -limit, limit), np.float32)
    return np.array(array, np.float32, order="C")
