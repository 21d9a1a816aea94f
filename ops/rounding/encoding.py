"""Encode an array so that the error of what it is multiplied with is small, and not only its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..emit import Spec
from ..moment import Float64, Moment
from ..storage import Grid, ScalarStorage, Storage, TableStorage, is_scalar, is_tabular
from ..storage.scaling import Blocks
from ..storage.table import run_numbers
from .gptq import RIDGE, Feedback, Levels, feedback, round_compensated
from .tabular import refit_centroids, round_runs

_STEPS = (0.9, 1.0, 1.1)
"""Steps that are tried for each output, relative to the one that suits rounding to nearest."""

_TURNS = 4
_ENOUGH = 0.98
"""Indices and centroids are chosen in turns, at most so often, while the error falls below that share of what it was."""

_COARSER = 16
"""Grids that are tried before codes of variable width are given up; compensated codes are a little wider than nearest ones."""

Packed = tuple[NDArray[np.generic], ...]


@dataclass(frozen=True)
class Rounding:
    """How integers are chosen.

    Attributes:
        compensate: whether errors may cancel each other where the metric is known; otherwise each value goes to the nearest level.
        thorough: whether a few steps are tried for each output, and centroids and indices, or a base and its correction, are fitted to each
            other in turns; without, an error is a bound that takes a fraction of the time.
    """

    compensate: bool = True
    thorough: bool = True


class Reading(Protocol):
    """How a stored array reads as matrices; `MatrixView` is one."""

    def matrix(self, stored: NDArray[np.generic]) -> Float64:
        """Stored array → (groups, m, n) float64."""
        ...

    def stored(self, matrix: Float64) -> Float64:
        """The inverse of `matrix`."""
        ...


@dataclass(frozen=True, eq=False)
class Problem:
    """An array that is to be stored, and what its errors cost.

    Attributes:
        array: of the type that it is decoded to.
        axis: its channel axis.
        reading: how it reads as matrices (groups, m, n).
        moment: second moment of what these are multiplied with.
        importance: positive cost of a squared error at each entry, broadcastable to the array.
    """

    array: NDArray[np.generic]
    axis: int
    reading: Reading
    moment: Moment
    importance: Float64


def encode(storage: Storage, problem: Problem, rounding: Rounding, parts: tuple[Feedback, ...] | None = None) -> Packed:
    """Pack an array: the better of nearest and compensated integers, in the metric of the moment.

    Where the storage lets nobody else choose its codes, or the moment is a diagonal (the errors of different inputs are unrelated then, and
    the nearest level is the best), this is the storage's own `encode`.

    Args:
        storage: accepts the array.
        problem: the array and the metric.
        rounding: how integers are chosen.
        parts: `feedback` of the moment, where it is known already.
    """
    if not rounding.compensate or problem.moment.diagonal:
        return storage.encode(problem.array, problem.axis, problem.importance)
    if is_tabular(storage):
        plain = storage.encode(problem.array, problem.axis, problem.importance)
        return _better(storage, problem, plain, _tabulated(storage, problem, rounding.thorough))
    if not is_scalar(storage):
        return storage.encode(problem.array, problem.axis, problem.importance)
    grid = storage.grid(problem.array, problem.axis, problem.importance)
    nearest = storage.pack(grid.nearest(problem.array), grid)
    plain = storage.encode(problem.array, problem.axis, problem.importance) if nearest is None else nearest
    known = feedback(problem.moment) if parts is None else parts
    if grid.next_coarser is not None:
        found = _fitting(storage, problem, grid, known)
    else:
        costs = _costs(problem, known, np.ones((1, 1))) if grid.support is None else _keeping_costs(problem, known)
        found = _tuned(storage, problem, known, costs, rounding.thorough)
    return _better(storage, problem, plain, found)


def compensates(storage: Storage, problem: Problem) -> bool:
    """Whether `encode` lets the errors of an array cancel each other, where the metric is known and the rounding allows it."""
    return is_scalar(storage) or (is_tabular(storage) and _numbers(problem, storage.runs(problem.array.shape, problem.axis)) is not None)


def _better(storage: Storage, problem: Problem, plain: Packed, found: Packed | None) -> Packed:
    """The one with the smaller error in the metric; what overflows has none."""
    if found is None:
        return plain
    weight, spec = problem.reading.matrix(problem.array), Spec(problem.array.shape, problem.array.dtype)
    lost = [problem.moment.energy(weight, problem.reading.matrix(storage.decode(packed, spec))) for packed in (plain, found)]
    return found if lost[1] < lost[0] else plain


def _tabulated(storage: TableStorage, problem: Problem, thorough: bool) -> Packed | None:
    """Compensated indices into a table that is refitted to them; None where runs are not consecutive inputs of one output each.

    They are where a channel is an output. Scales on another axis make runs of several outputs, which leave nothing to later inputs of one.
    """
    blocks = storage.runs(problem.array.shape, problem.axis)
    numbers = _numbers(problem, blocks)
    if numbers is None:
        return None
    metric, parts = problem.moment.regularized(RIDGE), feedback(problem.moment, blocks.layout[2])
    weight, worth = problem.reading.matrix(problem.array), _outputs(problem.moment)
    table = storage.table(problem.array, problem.axis, _costs(problem, parts, worth))
    scale = problem.reading.matrix(np.broadcast_to(table.scale, problem.array.shape))
    index, before = np.empty(numbers.size, np.int16), np.inf
    for _ in range(_TURNS if thorough else 1):
        found, errors = round_runs(weight, scale, table.centroids, parts)
        now = float((errors * worth).sum())
        if not now < before:
            break
        index[numbers], table = found, table.moved(refit_centroids(weight, scale, found, table.centroids, metric, errors))
        if now > _ENOUGH * before:
            break
        before = now
    rank = np.lexsort(table.centroids.T[::-1])  # levels ascend in the file
    return storage.write(np.argsort(rank).astype(np.int16)[index], table.moved(table.centroids[rank]))


def _outputs(moment: Moment) -> Float64:
    """What errors of each output cost, broadcastable to (groups, m)."""
    return np.ones((1, 1)) if moment.outputs is None else moment.outputs.diag


def _numbers(problem: Problem, blocks: Blocks) -> NDArray[np.int64] | None:
    """The number of each run, (groups, m, runs), where runs are consecutive inputs of one output, in order; None where they are not."""
    entries = blocks.layout[2]
    numbers, places = (problem.reading.matrix(each).astype(np.int64) for each in run_numbers(blocks))
    first = numbers[:, :, ::entries]
    along = np.arange(numbers.shape[2])
    apart = first.size == blocks.outer * blocks.count * blocks.inner
    return first if apart and (places == along % entries).all() and (numbers == first[:, :, along // entries]).all() else None


def _fitting(storage: ScalarStorage, problem: Problem, grid: Grid, parts: tuple[Feedback, ...]) -> Packed | None:
    """Compensated codes of variable width on the first grid on which they fit; None where they fit on none that is tried."""
    tried = (storage.pack(_round(problem, each, parts)[0], each) for each in islice(_coarser(grid), _COARSER))
    return next((packed for packed in tried if packed is not None), None)


def _coarser(grid: Grid) -> Iterator[Grid]:
    """The grid and all coarser ones."""
    yield grid
    while grid.next_coarser is not None:
        grid = grid.coarser()
        yield grid


def _tuned(storage: ScalarStorage, problem: Problem, parts: tuple[Feedback, ...], importance: Float64, thorough: bool) -> Packed | None:
    """Compensated codes with the best of `_STEPS` for each output; with the storage's own step where that has to do.

    Steps are searched with the costs that errors have under compensation, `importance`. The storage itself makes the grid of another step:
    the one for the array times a factor.
    """

    def rounded(factor: Float64 | float) -> tuple[Grid, NDArray[np.int16], Float64]:
        grid = storage.grid(np.asarray(problem.array, np.float64) * factor, problem.axis, importance)
        return grid, *_round(problem, grid, parts)

    if not thorough:
        grid, codes, _ = rounded(1.0)
        return storage.pack(codes, grid)
    tried = [rounded(factor) for factor in _STEPS]
    errors = np.stack([error for _, _, error in tried])
    best = np.take(_STEPS, errors.argmin(0))[:, :, None]
    tried.append(rounded(problem.reading.stored(np.broadcast_to(best, (*best.shape[:2], problem.moment.diag.shape[1])))))
    grid, codes, _ = min(tried, key=lambda each: float(each[2].sum()))
    return storage.pack(codes, grid)


def _round(problem: Problem, grid: Grid, parts: tuple[Feedback, ...]) -> tuple[NDArray[np.int16], Float64]:
    """Compensated codes in the array's own layout, and the squared error of each output, (groups, m)."""
    scale, zero = (
        problem.reading.matrix(np.broadcast_to(part.astype(np.float64), problem.array.shape)) for part in (grid.scale, grid.zero)
    )
    weight = problem.reading.matrix(problem.array)
    support = None if grid.support is None else problem.reading.matrix(grid.support.astype(np.float64)) > 0
    outputs = None if problem.moment.outputs is None else problem.moment.outputs.diag
    codes, errors = round_compensated(weight, Levels(scale, zero, grid.lowest, grid.highest, support, grid.least, outputs), parts)
    return problem.reading.stored(codes.astype(np.float64)).astype(np.int16), errors


def _costs(problem: Problem, parts: tuple[Feedback, ...], worth: Float64) -> Float64:
    """What a squared error at each entry costs once later inputs have taken up what they can; shaped like the array.

    `worth` is the cost of each output, broadcastable to (groups, m).
    """
    matrix = problem.reading.matrix(problem.array)
    costs = np.empty((matrix.shape[0], matrix.shape[2]))
    for part in parts:
        np.put_along_axis(costs, part.order, part.costs, 1)
    return problem.reading.stored(np.broadcast_to(costs[:, None, :] * worth[:, :, None], matrix.shape))


def _keeping_costs(problem: Problem, parts: tuple[Feedback, ...]) -> Float64:
    """What decides which entries stay: the geometric mean of what errors cost if later inputs take up what they can, and if they do not.

    By the first alone hardly any of the last inputs would stay, and none could take up anything. It measures better than either.
    """
    return np.asarray(np.sqrt(_costs(problem, parts, _outputs(problem.moment)) * problem.importance))
