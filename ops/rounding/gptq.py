"""Error-compensated rounding: GPTQ (Frantar et al. 2022, arXiv 2210.17323), as successive cancellation on a triangular root.

The error of integers that stand for W is ‖D·A½‖² with D = W − Ŵ. Let A = R·Rᵀ with an upper-triangular R. Then entry k of a row of D·R
is R_kk·(D_k + Σ_{j<k} D_j·R_jk/R_kk), which no later column changes. So columns are rounded in order, each to the level nearest to
W_k + Σ_{j<k} D_j·R_jk/R_kk: what is left of it after it has cancelled what the columns before have lost. This yields the integers of
GPTQ, whose Cholesky root of A⁻¹ is R⁻¹, without an inverse, and is Babai's nearest plane on the lattice of R. Inputs with large mean
squares come first, as they have the most columns left to cancel their errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..decompositions.linalg import Float64, lower_root
from ..moment import Moment
from ..storage.grid import Grid

RIDGE = 0.01
"""Share of mean(diag A) added to A, as the paper does: keeps errors from being pushed into inputs that were hardly ever seen."""

LARGEST_BLOCK = 6144
"""Most inputs that are compensated together; more would take too much time and memory, so they fall into blocks."""

_BLOCK = 64
"""Columns between two matrix products; within them errors are passed on one column at a time."""

_ENTRIES = 1 << 20
"""Entries of a weight that are worked on at once: outputs do not depend on each other."""


@dataclass(frozen=True, eq=False)
class Feedback:
    """How errors of some inputs are passed on to others.

    Attributes:
        order: the inputs, in the order in which they are rounded, (groups, k) int64.
        shares: R_jk/R_kk for j < k in that order, (groups, k, k) float64; below the diagonal without meaning.
    """

    order: NDArray[np.int64]
    shares: Float64


def feedback(moment: Moment) -> tuple[Feedback, ...]:
    """Feedback for each block of inputs; one block unless there are more than `LARGEST_BLOCK` inputs.

    Args:
        moment: of the layer's input, not a diagonal one.
    """
    n = moment.matrix.shape[1]
    count = -(-n // LARGEST_BLOCK)
    return tuple(_feedback(moment, part) for part in np.array_split(np.arange(n), count))


def _feedback(moment: Moment, inputs: NDArray[np.int64]) -> Feedback:
    first, last = int(inputs[0]), int(inputs[-1]) + 1
    part = Moment(moment.matrix[:, first:last, first:last], moment.rows).regularized(RIDGE).matrix
    order = np.argsort(-np.diagonal(part, axis1=1, axis2=2), axis=1, kind="stable")
    for matrix, perm in zip(part, order, strict=True):
        backward = perm[::-1]
        root = lower_root(matrix[np.ix_(backward, backward)])[::-1, ::-1]
        np.divide(root, np.diagonal(root), out=matrix)
    return Feedback(order + first, part)


def round_compensated(weight: Float64, grid: Grid, parts: tuple[Feedback, ...]) -> NDArray[np.int16]:
    """Codes of a weight on a grid whose errors cancel each other as far as the metric lets them.

    Args:
        weight: (groups, m, n) float64.
        grid: scale and zero broadcast to (groups, m, n).
        parts: from `feedback`.

    Returns:
        (groups, m, n) int16, within the grid's lowest…highest.
    """
    codes = np.empty(weight.shape, np.int16)
    scale, zero = (np.broadcast_to(each, weight.shape) for each in (grid.scale, grid.zero))
    for part in parts:
        index = part.order[:, :, None]
        for rows in _row_chunks(weight.shape):
            target, steps, zeros = (
                np.take_along_axis(each[:, rows].transpose(0, 2, 1), index, 1).astype(np.float64, copy=False)
                for each in (weight, scale, zero)
            )
            found = _round_columns(target, steps, zeros, part.shares, (grid.lowest, grid.highest))
            np.put_along_axis(codes[:, rows].transpose(0, 2, 1), index, found, 1)
    return codes


def _row_chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    groups, m, n = shape
    step = max(1, _ENTRIES // (groups * n))
    return (slice(start, start + step) for start in range(0, m, step))


def _round_columns(weight: Float64, scale: Float64, zero: Float64, shares: Float64, bounds: tuple[int, int]) -> NDArray[np.int16]:
    """Codes (groups, k, rows) of inputs in order; scale and zero have the weight's shape (groups, k, rows), shares is (groups, k, k)."""
    codes, lost = np.empty(weight.shape, np.int16), np.empty_like(weight)
    for start in range(0, weight.shape[1], _BLOCK):
        stop = min(start + _BLOCK, weight.shape[1])
        target = weight[:, start:stop] + shares[:, :start, start:stop].transpose(0, 2, 1) @ lost[:, :start]
        for k in range(start, stop):
            code = np.clip(np.rint(target[:, k - start] / scale[:, k]) + zero[:, k], *bounds)
            codes[:, k] = code
            lost[:, k] = weight[:, k] - (code - zero[:, k]) * scale[:, k]
            target[:, k + 1 - start :] += shares[:, k, k + 1 : stop, None] * lost[:, k, None, :]
    return codes
