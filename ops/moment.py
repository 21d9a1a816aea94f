"""Second moments of a layer's input: the metric in which every weight error is measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

_BLOCK_ENTRIES = 1 << 22
"""Entries of a weight that are worked on at a time."""


@dataclass(frozen=True)
class Moment:
    """A = E[x xᵀ] per group, or its diagonal where the input is one-hot (embeddings) or unknown.

    Attributes:
        matrix: (groups, n, n) float64, or (groups, n) for a diagonal.
        rows: number of input rows behind the mean; 0 where the moment is a prior, not a measurement.
        mean: E[x], (groups, n) float64; None where it is not known.
    """

    matrix: Float64
    rows: int
    mean: Float64 | None = None

    @staticmethod
    def isotropic(groups: int, n: int) -> Moment:
        """The identity: plain Frobenius error, used where no data reaches a weight."""
        return Moment(np.ones((groups, n)), 0)

    @property
    def diagonal(self) -> bool:
        """Whether only the diagonal is held."""
        return self.matrix.ndim == 2

    @property
    def diag(self) -> Float64:
        """Mean square of each input, (groups, n): a view."""
        return self.matrix if self.diagonal else np.diagonal(self.matrix, axis1=1, axis2=2)

    def regularized(self, ridge: float = 0.01) -> Moment:
        """A + ridge·mean(diag A)·I: directions that the calibration data never showed are not free.

        Args:
            ridge: relative to the mean of the diagonal, or absolute for a group whose input was always zero.
        """
        mean = self.diag.mean(1, keepdims=True)
        shift = ridge * np.where(mean > 0, mean, 1.0)
        matrix = self.matrix.copy()
        if self.diagonal:
            matrix += shift
        else:
            index = np.arange(matrix.shape[1])
            matrix[:, index, index] += shift
        return Moment(matrix, self.rows, self.mean)

    def shrunk(self) -> Moment:
        """(1 − λ)·A + λ·mean(diag A)·I with λ = 0.1·n / (0.1·n + rows): as much of the identity as few rows leave in doubt.

        A moment of fewer rows than inputs has directions without any energy, in which errors would look free. Diagonals and priors stay.
        """
        if self.diagonal or self.rows == 0:
            return self
        n = self.matrix.shape[1]
        share = 0.1 * n / (0.1 * n + self.rows)
        matrix = (1 - share) * self.matrix
        index = np.arange(n)
        matrix[:, index, index] += share * self.diag.mean(1, keepdims=True)
        return Moment(matrix, self.rows, self.mean)

    def times(self, weight: Float64) -> Float64:
        """W·A for W of shape (groups, k, n)."""
        return np.asarray(weight * self.matrix[:, None, :] if self.diagonal else weight @ self.matrix)

    def energy(self, weight: Float64, other: Float64 | None = None) -> float:
        """tr(W A Wᵀ), summed over groups: the mean square of the layer's output; with `other`, of W − other.

        Rows are taken a block at a time, so that nothing as large as the weight is allocated.
        """
        step = max(1, _BLOCK_ENTRIES // (weight.shape[0] * weight.shape[2]))
        total = 0.0
        for start in range(0, weight.shape[1], step):
            rows = weight[:, start : start + step]
            rows = rows if other is None else rows - other[:, start : start + step]
            total += float(np.einsum("gmn,gmn->", self.times(rows), rows))
        return total

    def output_gram(self, weight: Float64) -> Float64:
        """W A Wᵀ, (groups, m, m)."""
        gram = self.times(weight) @ weight.transpose(0, 2, 1)
        return np.asarray(0.5 * (gram + gram.transpose(0, 2, 1)))


def relative_error(weight: Float64, approximation: Float64, moment: Moment) -> float:
    """‖(W − Ŵ)A½‖² / ‖W A½‖²; 0 for a weight whose output is zero and unchanged."""
    energy = moment.energy(weight)
    error = moment.energy(weight, approximation)
    return error / energy if energy > 0 else float(error > 0)
