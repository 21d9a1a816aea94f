"""Encode an array so that the error of what it is multiplied with is small, and not only its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..moment import Float64, Moment
from ..storage import Storage
from ..storage.base import ScalarStorage, is_scalar
from ..storage.grid import Grid
from .gptq import Feedback, feedback, round_compensated

_STEPS = 16
"""Steps that are tried before codes of variable width are given up; compensated codes are a little wider than nearest ones."""

Packed = tuple[NDArray[np.generic], ...]


@dataclass(frozen=True)
class Rounding:
    """How integers are chosen.

    Attributes:
        compensate: whether errors may cancel each other where the metric is known; otherwise each value goes to the nearest level.
    """

    compensate: bool = True


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
        importance: cost of a squared error at each entry, broadcastable to the array.
    """

    array: NDArray[np.generic]
    axis: int
    reading: Reading
    moment: Moment
    importance: Float64


def encode(storage: Storage, problem: Problem, rounding: Rounding) -> Packed:
    """Pack an array: the better of nearest and compensated integers, in the metric of the moment.

    Where the storage has no uniform grid, or the moment is a diagonal (the errors of different inputs are unrelated then, and the nearest
    level is the best), this is the storage's own `encode`.
    """
    if not rounding.compensate or problem.moment.diagonal or not is_scalar(storage):
        return storage.encode(problem.array, problem.axis, problem.importance)
    grid = storage.grid(problem.array, problem.axis, problem.importance)
    codes = grid.nearest(problem.array)
    nearest = storage.pack(codes, grid)
    weight = problem.reading.matrix(problem.array)
    best, least = nearest, problem.moment.energy(weight, _values(problem, codes, grid)) if nearest is not None else np.inf
    packed, values = _compensated(storage, problem, weight, grid)
    if packed is not None and (best is None or problem.moment.energy(weight, values) < least):
        best = packed
    return storage.encode(problem.array, problem.axis, problem.importance) if best is None else best


def _compensated(storage: ScalarStorage, problem: Problem, weight: Float64, grid: Grid) -> tuple[Packed | None, Float64]:
    """Packed compensated codes on the finest grid on which they fit, and their values (groups, m, n); None where they fit on none."""
    parts = feedback(problem.moment)
    values = weight
    for each in islice(_coarser(grid), _STEPS):
        codes = _codes(problem, weight, each, parts)
        packed = storage.pack(codes, each)
        if packed is not None:
            return packed, _values(problem, codes, each)
    return None, values


def _coarser(grid: Grid) -> Iterator[Grid]:
    """The grid and all coarser ones."""
    yield grid
    while grid.next_coarser is not None:
        grid = grid.coarser()
        yield grid


def _codes(problem: Problem, weight: Float64, grid: Grid, parts: tuple[Feedback, ...]) -> NDArray[np.int16]:
    """Compensated codes in the array's own layout."""
    scale, zero = (
        problem.reading.matrix(np.broadcast_to(each.astype(np.float64), problem.array.shape)) for each in (grid.scale, grid.zero)
    )
    codes = round_compensated(weight, replace(grid, scale=scale, zero=zero), parts)
    return problem.reading.stored(codes.astype(np.float64)).astype(np.int16)


def _values(problem: Problem, codes: NDArray[np.int16], grid: Grid) -> Float64:
    """What codes in the array's layout decode to, (groups, m, n)."""
    return problem.reading.matrix(grid.values(codes).astype(problem.array.dtype))
