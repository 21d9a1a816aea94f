"""The matrix inside a weight tensor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class MatrixView:
    """How a stored tensor reads as `groups` matrices of shape (m, n): m outputs, n inputs each.

    Attributes:
        shape: shape of the stored tensor.
        groups: number of independent matrices (Conv groups, directions of a recurrent weight).
        m: outputs per group.
        n: inputs per group (for a Conv: input channels per group times the kernel's size).
        outputs_first: stored as (groups, m, n) when true, as (n, m) with one group when false.
    """

    shape: tuple[int, ...]
    groups: int
    m: int
    n: int
    outputs_first: bool

    def __post_init__(self) -> None:
        if self.groups * self.m * self.n != int(np.prod(self.shape, dtype=np.int64)):
            raise ValueError(f"{self.groups} x {self.m} x {self.n} matrices do not fill a tensor of shape {self.shape}")
        if not self.outputs_first and self.groups != 1:
            raise ValueError("a view with inputs first has one group")

    def matrix(self, stored: NDArray[np.generic]) -> NDArray[np.float64]:
        """Stored tensor → (groups, m, n), float64."""
        if self.outputs_first:
            return np.asarray(stored, np.float64).reshape(self.groups, self.m, self.n)
        return np.asarray(stored, np.float64).reshape(1, self.n, self.m).transpose(0, 2, 1)

    def stored(self, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
        """(groups, m, n) → stored tensor; the inverse of `matrix`."""
        if self.outputs_first:
            return matrix.reshape(self.shape)
        return np.asarray(matrix[0].T.reshape(self.shape))
