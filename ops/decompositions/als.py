"""Alternating least squares for W ≈ U·(V ⊗ I), which Tucker-2 and the separable form are both instances of.

The n inputs of a kernel fall into (inner, position) pairs. V (r, inner) mixes the inner index and leaves the positions
alone, so the prefix is P = V ⊗ I of shape (r·positions, n). For Tucker-2 inner is the channel; for the separable form it is
(channel, row), and the positions are the columns. In a metric A neither has a closed form, but given V the best U is linear
least squares (`regress`), and given U the best V is approached by conjugate gradients whose normal equations are never
formed (`update_factor`). Neither step can raise the error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..moment import Moment
from .base import SOLVE_RIDGE
from .linalg import Float64, lower_root, solve_lower
from .lowrank import factorize

SWEEPS = 4
"""Rounds of alternating least squares: later ones gain ever less, and four of them on a 512×512×3×3 kernel take seconds."""

STEPS = 4
"""Conjugate gradient steps in a round; more rounds of few steps beat few rounds of more steps."""

NEGLIGIBLE = 1e-3
"""A step that lowers the squared error by less than this share is the last one of its round."""


def metric_of(moment: Moment) -> Float64:
    """The full matrix A (n, n) of a moment with one group."""
    return np.diag(moment.matrix[0]) if moment.diagonal else moment.matrix[0]


def lift(factor: Float64, right: Float64) -> Float64:
    """P·right without forming P: (r, inner) and (inner·positions, k) → (r·positions, k)."""
    return np.asarray((factor @ right.reshape(factor.shape[1], -1)).reshape(-1, right.shape[1]))


def compose(outputs: Float64, factor: Float64) -> Float64:
    """U·P as (m, n), for outputs U (m, r·positions) and factor V (r, inner)."""
    m = len(outputs)
    folded = outputs.reshape(m, len(factor), -1).transpose(0, 2, 1)
    return np.asarray((folded @ factor).transpose(0, 2, 1).reshape(m, -1))


def pull(outputs: Float64, image: Float64, rank: int) -> Float64:
    """The adjoint of `compose` in V: (m, n) → (r, inner)."""
    m = len(outputs)
    folded = outputs.reshape(m, rank, -1)
    return np.asarray(np.tensordot(folded, image.reshape(m, -1, folded.shape[2]), axes=((0, 2), (0, 2))), np.float64)


def start(weight: Float64, metric: Float64, inner: int, rank: int) -> Float64:
    """V (rank, inner) with orthonormal rows: the best low-rank factor in the mean metric when each position is an output.

    The first r rows are the start for rank r.

    Args:
        weight: W, (m, n).
        metric: A, (n, n).
        inner: size of the inner index.
        rank: at most min(inner, m·positions).
    """
    positions = weight.shape[1] // inner
    mean = np.einsum("ikjk->ij", metric.reshape(inner, positions, inner, positions)) / positions
    unfolded = weight.reshape(-1, inner, positions).transpose(0, 2, 1).reshape(1, -1, inner)
    first, _ = factorize(unfolded, Moment(mean[None], 0), rank)
    return orthonormal(first[0])


def orthonormal(factor: Float64) -> Float64:
    """Orthonormal rows of the same span: a change of basis that the outputs take up."""
    return np.asarray(np.linalg.qr(factor.T)[0].T)


@dataclass(frozen=True)
class Regression:
    """Least squares of W on a prefix P in the metric A.

    Attributes:
        root: L with L·Lᵀ = P·A·Pᵀ, lower triangular (q, q).
        explained: Y = L⁻¹·P·A·Wᵀ, (q, m). The first r·positions rows belong to the first r rows of V; their Yᵀ·Y is the
            output second moment that the best U keeps, and its trace the energy.
    """

    root: Float64
    explained: Float64

    def outputs(self) -> Float64:
        """U, (m, q)."""
        return solve_lower(self.root, self.explained, transposed=True).T


def regress(factor: Float64, weight: Float64, metric: Float64) -> Regression:
    """Least squares of W (m, n) on P = V ⊗ I in the metric A (n, n)."""
    image = lift(factor, metric)
    root = lower_root(lift(factor, image.T), SOLVE_RIDGE)
    return Regression(root, solve_lower(root, image @ weight.T))


def update_factor(factor: Float64, outputs: Float64, weight: Float64, metric: Float64) -> Float64:
    """Conjugate gradients on ‖(W − U·P)A½‖² over V, from the given V.

    What a step does to the gradient is the adjoint of U·P·A. UᵀU and P·A tell it too, which costs less than U·P times A where V has fewer
    rows than U. The gradient itself is that of the difference: differences of products would leave noise where that is nearly zero.

    Args:
        factor: V, (r, inner).
        outputs: U, (m, r·positions).
        weight: W, (m, n).
        metric: A, (n, n).
    """
    rank, (m, mixed), n = len(factor), outputs.shape, len(metric)
    gram = outputs.T @ outputs if rank * (n + mixed) < m * (n + 2 * rank) else None

    def curved(direction: Float64) -> Float64:
        if gram is None:
            return pull(outputs, compose(outputs, direction) @ metric, rank)
        return pull(gram, lift(direction, metric), rank)

    difference = weight - compose(outputs, factor)
    image = difference @ metric
    error = float(np.vdot(image, difference))
    residual = pull(outputs, image, rank)
    direction, energy = residual, float(np.vdot(residual, residual))
    for _ in range(STEPS):
        image = curved(direction)
        curvature = float(np.vdot(direction, image))
        if curvature <= 0:
            break
        step = energy / curvature
        factor, residual = factor + step * direction, residual - step * image
        if step * energy <= NEGLIGIBLE * error:
            break
        previous, energy = energy, float(np.vdot(residual, residual))
        direction = residual + (energy / previous) * direction
    return factor
