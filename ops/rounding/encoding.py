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
from ..storage import Grid, ScalarStorage, Storage, is_scalar
from .gptq import Feedback, Levels, feedback, round_compensated

_STEPS = (0.9, 1.0, 1.1)
"""Steps that are tried for each output, relative to the one that suits rounding to nearest."""

_COARSER = 16
"""Grids that are tried before codes of variable width are given up; compensated codes are a little wider than nearest ones."""

Packed = tuple[NDArray[np.generic], ...]


@dataclass(frozen=True)
class Rounding:
    """How integers are chosen.

    Attributes:
        compensate: whether errors may cancel each other where the metric is known; otherwise each value goes to the nearest level.
        thorough: whether a few steps are tried for each output, and a base and its correction are fitted to each other in turns; without,
            an error is a bound that takes a fraction of the time.
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

    Where the storage has no uniform grid, or the moment is a diagonal (the errors of different inputs are unrelated then, and the nearest
    level is the best), this is the storage's own `encode`.

    Args:
        storage: accepts the array.
        problem: the array and the metric.
        rounding: how integers are chosen.
        parts: `feedback` of the moment, where it is known already.
    """
    if not rounding.compensate or problem.moment.diagonal or not is_scalar(storage):
        return storage.encode(problem.array, problem.axis, problem.importance)
    grid = storage.grid(problem.array, problem.axis, problem.importance)
    plain = storage.pack(grid.nearest(problem.array), grid)
    if plain is None:
        plain = storage.encode(problem.array, problem.axis, problem.importance)
    known = feedback(problem.moment) if parts is None else parts
    if grid.next_coarser is not None:
        found = _fitting(storage, problem, grid, known)
    else:
        costs = _costs(problem, known) if grid.support is None else _keeping_costs(problem, known)
        found = _tuned(storage, problem, known, costs, rounding.thorough)
    if found is None:
        return plain
    weight, spec = problem.reading.matrix(problem.array), Spec(problem.array.shape, problem.array.dtype)
    lost = [problem.moment.energy(weight, problem.reading.matrix(storage.decode(packed, spec))) for packed in (plain, found)]
    return plain if lost[0] <= lost[1] else found


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


def _costs(problem: Problem, parts: tuple[Feedback, ...]) -> Float64:
    """What a squared error at each entry costs once later inputs have taken up what they can; shaped like the array."""
    matrix = problem.reading.matrix(problem.array)
    costs = np.empty((matrix.shape[0], matrix.shape[2]))
    for part in parts:
        np.put_along_axis(costs, part.order, part.costs, 1)
    return problem.reading.stored(np.broadcast_to(costs[:, None, :], matrix.shape))


def _keeping_costs(problem: Problem, parts: tuple[Feedback, ...]) -> Float64:
    """What decides which entries stay: the geometric mean of what errors cost if later inputs take up what they can, and if they do not.

    By the first alone hardly any of the last inputs would stay, and none could take up anything. It measures better than either.
    """
    costs = _costs(problem, parts)
    if problem.moment.outputs is not None:
        every = problem.moment.outputs.diag[:, :, None]
        costs = costs * problem.reading.stored(np.broadcast_to(every, (*every.shape[:2], problem.moment.diag.shape[1])))
    return np.asarray(np.sqrt(costs * problem.importance))
