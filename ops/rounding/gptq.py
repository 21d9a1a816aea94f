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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..decompositions.linalg import Float64, lower_root
from ..moment import Moment

RIDGE = 0.01
"""Share of mean(diag A) added to A, as the paper does: keeps errors from being pushed into inputs that were hardly ever seen."""

LARGEST_BLOCK = 6144
"""Most inputs that are compensated together; more would take too much time and memory, so they fall into blocks."""

BLOCK = 64
"""Columns between two matrix products; within them errors are passed on one column at a time."""

_DECIDED = 8
"""Columns of which the ones that stay are decided together: with more, errors that are passed on within them come too late; with fewer, as
many have to stay of each as before."""

_ENTRIES = 1 << 20
"""Entries of a weight that are worked on at once: outputs do not depend on each other."""

_LIMIT = 1e37
"""Doubles beyond it saturate, so that nothing overflows in float32."""

Float32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Feedback:
    """How errors of some inputs are passed on to others.

    Attributes:
        order: the inputs, in the order in which they are rounded, (groups, k) int64.
        shares: R_jk/R_kk for j < k in that order, (groups, k, k) float32; below the diagonal without meaning.
        costs: R_kk², what a squared error at input k costs once all others have taken up what they can, (groups, k) float64.
    """

    order: NDArray[np.int64]
    shares: Float32
    costs: Float64


@dataclass(frozen=True, eq=False)
class Levels:
    """A uniform grid for a weight (groups, m, n): value = (code − zero)·scale, with code in lowest…highest.

    With a support, codes of other entries are zero, and those within it are `least` or more in magnitude.

    Attributes:
        scale: broadcastable to the weight, any float type.
        zero: the same.
        lowest: the smallest code.
        highest: the largest code.
        support: (groups, m, n), which entries are not zero; None where any may be. Only where `zero` is 0.
        least: the smallest magnitude of a code in the support.
        outputs: (groups, m), what squared errors of outputs cost where a support is shared among them; None where all cost alike.
    """

    scale: NDArray[np.floating[Any]]
    zero: NDArray[np.floating[Any]]
    lowest: int
    highest: int
    support: NDArray[np.bool_] | None = None
    least: int = 0
    outputs: Float64 | None = None


def feedback(moment: Moment, entries: int = 1) -> tuple[Feedback, ...]:
    """Feedback for each block of inputs; one block unless there are more than `LARGEST_BLOCK` inputs.

    Args:
        moment: of the layer's input, not a diagonal one.
        entries: that many consecutive inputs stay together in the order, those of large mean squares first; only the last ones, which are
            fewer where their number is no divisor, come last.
    """
    runs = -(-moment.matrix.shape[1] // entries)
    count = -(-moment.matrix.shape[1] // LARGEST_BLOCK)
    return tuple(_feedback(moment, int(part[0]) * entries, (int(part[-1]) + 1) * entries, entries) for part in _split(runs, count))


def _split(runs: int, count: int) -> list[NDArray[np.int64]]:
    return np.array_split(np.arange(runs), min(count, runs))


def _feedback(moment: Moment, first: int, last: int, entries: int) -> Feedback:
    part = Moment(moment.matrix[:, first:last, first:last], moment.rows).regularized(RIDGE).matrix
    order = _order(np.diagonal(part, axis1=1, axis2=2), entries)
    costs = np.empty(order.shape)
    for matrix, perm, cost in zip(part, order, costs, strict=True):
        backward = perm[::-1]
        root = lower_root(matrix[np.ix_(backward, backward)])[::-1, ::-1]
        np.square(np.diagonal(root), out=cost)
        np.divide(root, np.diagonal(root), out=matrix)
    return Feedback(order + first, part.astype(np.float32), costs)


def _order(squares: Float64, entries: int) -> NDArray[np.int64]:
    """Inputs (groups, k) by their mean squares, (groups, k): runs with large sums first, one that is not full last."""
    whole = squares.shape[1] // entries
    sums = squares[:, : whole * entries].reshape(len(squares), whole, entries).sum(2)
    starts = entries * np.argsort(-sums, axis=1, kind="stable")
    order = (starts[:, :, None] + np.arange(entries)).reshape(len(squares), -1)
    rest = np.arange(whole * entries, squares.shape[1])
    return np.concatenate([order, np.broadcast_to(rest, (len(squares), len(rest)))], axis=1)


def round_compensated(weight: Float64, levels: Levels, parts: tuple[Feedback, ...]) -> tuple[NDArray[np.int16], Float64]:
    """Codes of a weight whose errors cancel each other as far as the metric lets them.

    Args:
        weight: (groups, m, n) float64.
        levels: the grid.
        parts: from `feedback`.

    Returns:
        Codes (groups, m, n) int16 within the grid's lowest…highest, and the squared error of each output (groups, m), in the metric that
        `feedback` regularized and cut into blocks.
    """
    codes, errors = np.empty(weight.shape, np.int16), np.zeros(weight.shape[:2])
    for part in parts:
        index = part.order[:, :, None]
        for rows in row_chunks(weight.shape):
            target, scale, zero = (taken(each, weight.shape, rows, index) for each in (weight, levels.scale, levels.zero))
            support = _Support.of(levels, weight.shape, rows, part)
            found, error = _round_columns(target, scale, zero, (levels.lowest, levels.highest), support, part)
            np.put_along_axis(codes[:, rows].transpose(0, 2, 1), index, found, 1)
            errors[:, rows] += error
    return codes, errors


def row_chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the outputs of a weight (groups, m, n), so many at a time as are worked on at once."""
    groups, m, n = shape
    step = max(1, _ENTRIES // (groups * n))
    return (slice(start, start + step) for start in range(0, m, step))


def taken(array: NDArray[np.floating[Any]] | NDArray[np.bool_], shape: tuple[int, ...], rows: slice, index: NDArray[np.int64]) -> Float32:
    """Some outputs of an array that broadcasts to (groups, m, n), as (groups, k, rows): inputs in the order of `index` (groups, k, 1)."""
    part = np.broadcast_to(array, shape)[:, rows].transpose(0, 2, 1)
    return np.asarray(np.clip(np.take_along_axis(part, index, 1), -_LIMIT, _LIMIT), np.float32)


@dataclass(frozen=True, eq=False)
class _Support:
    """Which inputs may have codes, (groups, k, rows), in order, until it is decided once more.

    Attributes:
        entries: bool, the support as it was chosen.
        costs: of squared errors, (groups, k, 1) or (groups, k, rows).
        least: the smallest magnitude of a code.
        highest: the largest.
    """

    entries: NDArray[np.bool_]
    costs: Float64
    least: int
    highest: int

    @staticmethod
    def of(levels: Levels, shape: tuple[int, ...], rows: slice, part: Feedback) -> _Support | None:
        """Of some outputs of a weight of the given shape; None where any entry may have any code."""
        if levels.support is None:
            return None
        entries = taken(levels.support, shape, rows, part.order[:, :, None]) > 0
        costs = part.costs[:, :, None]
        return _Support(entries, costs if levels.outputs is None else costs * levels.outputs[:, None, rows], levels.least, levels.highest)

    def kept(self, target: Float32, scale: Float32, inputs: slice) -> NDArray[np.bool_]:
        """Which of some inputs stay: as many as the support has there, those that take away most of the error.

        What the inputs before them have lost has changed what is wanted since the support was chosen (SparseGPT, section 3.3).

        Args:
            target: what is wanted of them, (groups, k, rows).
            scale: of the same shape.
            inputs: which they are.
        """
        wanted, count = np.abs(target), np.count_nonzero(self.entries[:, inputs])
        value = np.clip(np.rint(wanted / scale), self.least, self.highest) * scale
        gained = (self.costs[:, inputs] * (value * (2 * wanted - value))).reshape(-1)
        kept = np.zeros(gained.shape, np.bool_)
        kept[np.argpartition(-gained, count)[:count] if count < len(gained) else slice(None)] = True
        return kept.reshape(target.shape)

    def away_from_zero(self, code: Float32, wanted: Float32) -> Float32:
        """Codes of what stays, none of them smaller than the least."""
        return np.copysign(np.maximum(np.abs(code), np.float32(self.least)), wanted)


def _round_columns(
    weight: Float32, scale: Float32, zero: Float32, bounds: tuple[int, int], support: _Support | None, part: Feedback
) -> tuple[NDArray[np.int16], Float64]:
    """Codes (groups, k, rows) and errors (groups, rows) of inputs in order; weight, scale and zero are (groups, k, rows), too."""
    codes, lost, errors = np.empty(weight.shape, np.int16), np.empty_like(weight), np.zeros(weight[:, 0].shape)
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        target = weight[:, start:stop] + part.shares[:, :start, start:stop].transpose(0, 2, 1) @ lost[:, :start]
        kept = np.ones(target.shape, np.bool_)
        for k in range(start, stop):
            wanted = target[:, k - start]
            code = np.rint(wanted / scale[:, k])
            if support is not None:
                if (k - start) % _DECIDED == 0:
                    few = slice(k, min(stop, k + _DECIDED))
                    here = slice(k - start, few.stop - start)
                    kept[:, here] = support.kept(target[:, here], scale[:, few], few)
                code = support.away_from_zero(code, wanted) * kept[:, k - start]
            code = (code + zero[:, k]).clip(*bounds)
            value = (code - zero[:, k]) * scale[:, k]
            codes[:, k], lost[:, k] = code, weight[:, k] - value
            errors += part.costs[:, k, None] * np.square(wanted - value, dtype=np.float64)
            target[:, k + 1 - start :] += part.shares[:, k, k + 1 : stop, None] * lost[:, k, None, :]
    return codes, errors


def compensation(weight: Float64, moment: Moment) -> float:
    """What compensated rounding leaves of the error of rounding to nearest, at most 1.

    Both errors grow with the square of the step alike, so one step stands for all of them: that of four bits per output.

    Args:
        weight: (groups, m, n) float64.
        moment: of its input.
    """
    if moment.diagonal:
        return 1.0
    largest = 7
    peak = np.abs(weight).max(2, keepdims=True)
    scale = np.where(peak > 0, peak, 1) / largest
    codes, _ = round_compensated(weight, Levels(scale, np.zeros_like(scale), -largest, largest), feedback(moment))
    nearest, found = (moment.energy(weight, each * scale) for each in (np.rint(weight / scale), codes))
    return min(1.0, found / nearest) if nearest > 0 else 1.0
