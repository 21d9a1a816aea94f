"""Alternating least squares for W ≈ U·P(V), where the prefix P depends linearly on a factor V.

Both Tucker-2 and the separable form have no closed form in a metric A. Given V, U is linear least squares (`least_squares`); given U, the
normal equations for V are solved by conjugate gradients without ever being formed. Neither step can raise the error.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..moment import Moment
from .base import Float64


class Lift(Protocol):
    """The linear map V → P and its adjoint, for one group."""

    def times(self, factor: Float64, metric: Float64) -> Float64:
        """P(V)·A as (q, n), for A (n, n)."""
        ...

    def adjoint(self, gradient: Float64) -> Float64:
        """(q, n) → the shape of V."""
        ...


def update_factor(lift: Lift, factor: Float64, outputs: Float64, weight: Float64, moment: Moment, steps: int = 8) -> Float64:
    """Conjugate gradients on ‖(W − U·P(V))A½‖² over V, from the given V.

    Args:
        lift: V → P.
        factor: V, any shape.
        outputs: U, (m, q).
        weight: W, (m, n).
        moment: a full moment of one group.
        steps: most iterations.
    """
    metric = moment.matrix[0]
    gram = outputs.T @ outputs
    residual = lift.adjoint(outputs.T @ (weight @ metric) - gram @ lift.times(factor, metric))
    direction, energy = residual, float(np.vdot(residual, residual))
    start = energy
    for _ in range(steps):
        if energy <= 1e-12 * start or energy == 0:
            break
        image = lift.adjoint(gram @ lift.times(direction, metric))
        curvature = float(np.vdot(direction, image))
        if curvature <= 0:
            break
        step = energy / curvature
        factor = factor + step * direction
        residual = residual - step * image
        previous, energy = energy, float(np.vdot(residual, residual))
        direction = residual + (energy / previous) * direction
    return factor


def full(moment: Moment, n: int) -> Moment:
    """The moment as full matrices."""
    if not moment.diagonal:
        return moment
    return Moment(moment.matrix[:, :, None] * np.eye(n), moment.rows)
