"""Second moments of a layer's input, and of the loss's gradient at its output: the metric in which every weight error is measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

_BLOCK_ENTRIES = 1 << 22
"""Entries of a weight that are worked on at a time."""

_FLOOR = 1e-10
"""Least share of the mean of its diagonal that is added to an output metric until it has a root."""


@dataclass(frozen=True, eq=False)
class OutputMetric:
    """G = E[g gᵀ] per group, g the gradient of the loss at a layer's output, or its diagonal where the layer has too many outputs.

    To second order an error Δ costs ½ tr(G Δ A Δᵀ) (Kronecker-factored curvature, Martens and Grosse 2015, arXiv 1503.05671). With
    G = R·Rᵀ that is ½ ‖(Rᵀ Δ) A½‖², so what is optimal for Rᵀ·W in the metric A is so for W in both. The scale of G does not matter here.

    Attributes:
        matrix: (groups, m, m) float64, positive semidefinite, or (groups, m) for a diagonal.
    """

    matrix: Float64

    @property
    def diagonal(self) -> bool:
        """Whether only the diagonal is held."""
        return self.matrix.ndim == 2

    @property
    def diag(self) -> Float64:
        """What a squared error of each output costs, (groups, m): a view."""
        return self.matrix if self.diagonal else np.diagonal(self.matrix, axis1=1, axis2=2)

    @cached_property
    def root(self) -> Float64:
        """R, lower triangular (groups, m, m), or the root of the diagonal, (groups, m); made positive definite where G is not."""
        if self.diagonal:
            return np.asarray(np.sqrt(np.maximum(self.matrix, _FLOOR * self.matrix.mean() + np.finfo(np.float64).tiny)))
        share = 0.0
        while True:
            shift = share * (self.diag.mean() or 1.0) * np.eye(self.matrix.shape[1])
            try:
                return np.asarray(np.linalg.cholesky(self.matrix + shift))
            except np.linalg.LinAlgError:
                share = max(_FLOOR, 100 * share)

    def times(self, weight: Float64) -> Float64:
        """G·W for W (groups, m, k)."""
        return np.asarray(self.matrix[:, :, None] * weight if self.diagonal else self.matrix @ weight)

    def whiten(self, weight: Float64) -> Float64:
        """Rᵀ·W for W (groups, m, k)."""
        return np.asarray(self.root[:, :, None] * weight if self.diagonal else self.root.transpose(0, 2, 1) @ weight)

    def unwhiten(self, weight: Float64) -> Float64:
        """R⁻ᵀ·W for W (groups, m, k)."""
        if self.diagonal:
            return np.asarray(weight / self.root[:, :, None])
        solved = (scipy.linalg.solve_triangular(root, each, lower=True, trans=1) for root, each in zip(self.root, weight, strict=True))
        return np.stack(list(solved))

    def part(self, outputs: slice) -> OutputMetric:
        """Of some of the outputs of every group."""
        return OutputMetric(self.matrix[:, outputs] if self.diagonal else self.matrix[:, outputs, outputs])


@dataclass(frozen=True)
class Moment:
    """A = E[x xᵀ] per group, or its diagonal where the input is one-hot (embeddings) or unknown; with or without a metric of outputs.

    Attributes:
        matrix: (groups, n, n) float64, or (groups, n) for a diagonal.
        rows: number of input rows behind the mean; 0 where the moment is a prior, not a measurement.
        mean: E[x], (groups, n) float64; None where it is not known.
        outputs: what errors cost by the output that they are made in; None where all outputs count alike.
        slope: (groups, m, n) float64, what a change of the weight gains or costs to first order, in units of the relative error: a change
            Δ costs ‖ΔA½‖²/‖WA½‖² + ⟨slope, Δ⟩ in all. None where only the size of an error counts. It says which components of a low rank
            are kept and nothing else.
    """

    matrix: Float64
    rows: int
    mean: Float64 | None = None
    outputs: OutputMetric | None = None
    slope: Float64 | None = None

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
        return replace(self, matrix=matrix)

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
        return replace(self, matrix=matrix)

    def with_outputs(self, outputs: OutputMetric | None) -> Moment:
        """The same moment with another metric of outputs, or with none."""
        return replace(self, outputs=outputs)

    def with_slope(self, slope: Float64 | None) -> Moment:
        """The same moment with another first-order term, or with none."""
        return replace(self, slope=slope)

    def of_outputs(self, outputs: slice) -> Moment:
        """The metric of some of the outputs of every group."""
        return self if self.outputs is None else replace(self, outputs=self.outputs.part(outputs))

    def whiten(self, weight: Float64) -> Float64:
        """Rᵀ·W for W (groups, m, k) and G = R·Rᵀ: its error in A alone is that of W in both metrics. W itself where outputs count alike."""
        return weight if self.outputs is None else self.outputs.whiten(weight)

    def unwhiten(self, weight: Float64) -> Float64:
        """R⁻ᵀ·W, the inverse of `whiten`: of a whitened weight, or of its last factor (groups, m, k)."""
        return weight if self.outputs is None else self.outputs.unwhiten(weight)

    def times(self, weight: Float64) -> Float64:
        """W·A for W of shape (groups, k, n)."""
        return np.asarray(weight * self.matrix[:, None, :] if self.diagonal else weight @ self.matrix)

    def energy(self, weight: Float64, other: Float64 | None = None) -> float:
        """tr(G W A Wᵀ), summed over groups: the mean square of the layer's output, weighed by what it costs; with `other`, of W − other.

        Where outputs count alike, rows are taken a block at a time, so that nothing as large as the weight is allocated.
        """
        if self.outputs is not None:
            weight = weight if other is None else weight - other
            return float(np.vdot(self.outputs.times(weight), self.times(weight)))
        step = max(1, _BLOCK_ENTRIES // (weight.shape[0] * weight.shape[2]))
        total = 0.0
        for start in range(0, weight.shape[1], step):
            rows = weight[:, start : start + step]
            rows = rows if other is None else rows - other[:, start : start + step]
            total += float(np.einsum("gmn,gmn->", self.times(rows), rows))
        return total

    def separate_energy(self, weight: Float64) -> float:
        """Σ G_ii·A_jj·W_ij², summed over groups: `energy` were inputs unrelated, and outputs too."""
        scaled = weight if self.outputs is None else np.sqrt(self.outputs.diag)[:, :, None] * weight
        return Moment(self.diag, self.rows).energy(scaled)

    def output_gram(self, weight: Float64) -> Float64:
        """W A Wᵀ, (groups, m, m), whatever outputs cost."""
        gram = self.times(weight) @ weight.transpose(0, 2, 1)
        return np.asarray(0.5 * (gram + gram.transpose(0, 2, 1)))


def relative_error(weight: Float64, approximation: Float64, moment: Moment) -> float:
    """‖(W − Ŵ)A½‖² / ‖W A½‖², in the metric of outputs too where the moment has one; 0 for a weight whose output is zero and unchanged."""
    energy = moment.energy(weight)
    error = moment.energy(weight, approximation)
    return error / energy if energy > 0 else float(error > 0)
