"""Fit a `Residual`: rounding and correction in turns (CALDERA, arXiv 2405.18886, without its incoherence processing).

Given the correction, the base is what is left of the weight, rounded; given the base, the correction is the best one of its rank for what
rounding lost. One start has no correction, as LQER does, the other the weight's own large directions, as SVDQuant does: where the spectrum
has a few large values, that lets the base have finer steps. The best outcome of all turns is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..decompositions.base import RIDGE, least_squares
from ..decompositions.lowrank import factorize
from ..moment import Float64, Moment
from .encoding import Packed
from .factors import projected

TURNS = 2
"""Rounds of both steps from each start; more of them gain next to nothing."""

Write = Callable[[Float64, Moment], tuple[Packed, Float64]]
"""Rounds a matrix (groups, m, n) in the metric of its input: the packed arrays, and the matrix that they stand for."""


@dataclass(frozen=True, eq=False)
class Corrected:
    """A base B and a correction L·R.

    Attributes:
        packed: arrays of B, R and L.
        correction: L·R as stored, (groups, m, n).
        error: ‖(W − B − L·R)A½‖².
    """

    packed: tuple[Packed, Packed, Packed]
    correction: Float64
    error: float


def fit_corrected(
    weight: Float64, moment: Moment, rank: int, writers: tuple[Write, Write, Write], *, turns: int = TURNS
) -> tuple[Packed, Packed, Packed]:
    """Packed arrays of the best base and correction that were found.

    Args:
        weight: W, (groups, m, n) float64.
        moment: of its input.
        rank: of the correction.
        writers: of the base, of R and of L.
        turns: how often a base and a correction are fitted to each other, from either start; with 1, only from the base of no correction.
    """
    if turns == 1:
        return _turn(weight, moment, rank, writers, np.zeros_like(weight)).packed
    first, last = factorize(weight, moment.regularized(RIDGE), rank)
    found = []
    for correction in (np.zeros_like(weight), last @ first):
        for _ in range(turns):
            found.append(_turn(weight, moment, rank, writers, correction))
            correction = found[-1].correction
    return min(found, key=lambda each: each.error).packed


def _turn(weight: Float64, moment: Moment, rank: int, writers: tuple[Write, Write, Write], correction: Float64) -> Corrected:
    """A base for the given correction, then a correction for that base."""
    write_base, write_first, write_last = writers
    metric = moment.regularized(RIDGE)
    base, values = write_base(weight - correction, moment)
    lost = weight - values
    first, prefix = write_first(factorize(lost, metric, rank)[0], moment)
    last, outputs = write_last(least_squares(lost, metric, prefix), projected(moment, prefix))
    product = outputs @ prefix
    return Corrected((base, first, last), product, moment.energy(lost, product))
