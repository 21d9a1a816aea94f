"""Bases in which Adam averages: along each axis of an array, the eigenvectors of the second moment of its gradients.

Adam measures every entry by its own gradients. Where a layer's inputs have much in common, as behind a ReLU, all gradients of a row are
mostly the same direction: every entry is measured by that one, in which the loss is steep, and moves too little in all the others. Along
eigenvectors steep and flat directions are apart, and each is measured by itself. That is SOAP (Vyas et al., "SOAP: improving and
stabilizing Shampoo using Adam", 2024, arXiv 2409.11321), with one basis for each axis of more than two as well; means lie in the basis
here, so they are turned only where it is renewed.

Must not fire on: arrays with one axis, axes too long to be worth a decomposition, and what would make a step slow (`MOST_WORK`); there
the basis is the array's own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

LONGEST = 1024
"""Longest axis that has a basis."""

MOST_WORK = 4e9
"""Multiplications that turning may take per step; the arrays that need least come first."""

_TURNS = 3
"""Products with an array's every basis in a step: for the moment, into the basis, and back."""

_EIGEN = 1.0
"""Multiplications for eigenvectors in a step, over the cube of an axis: nine, every tenth step."""


@dataclass(frozen=True)
class Block:
    """An array among the entries that are optimized.

    Attributes:
        part: where it lies.
        shape: of the array.
    """

    part: slice
    shape: tuple[int, ...]

    @property
    def axes(self) -> tuple[int, ...]:
        """Those that have a basis."""
        several = sum(length > 1 for length in self.shape) > 1
        return tuple(axis for axis, length in enumerate(self.shape) if several and 1 < length <= LONGEST)

    @property
    def work(self) -> int:
        """Multiplications per step."""
        lengths = [self.shape[axis] for axis in self.axes]
        return int(_TURNS * math.prod(self.shape) * sum(lengths) + _EIGEN * sum(length**3 for length in lengths))


@dataclass(frozen=True, eq=False)
class _Axis:
    """One axis of one array: an array of (before, length, after) entries at `part`, with views of its moment and its eigenvectors."""

    part: slice
    sizes: tuple[int, int, int]
    moment: Float32
    vectors: Float32

    def of(self, flat: Float32) -> Float32:
        """The array with this axis in the middle: a view."""
        return flat[self.part].reshape(self.sizes)


class Bases:
    """Orthogonal bases of arrays that lie in one flat array; entries outside of these arrays stay as they are.

    Attributes:
        moments: all (length, length) moving averages of second moments, flat.
        vectors: all (length, length) bases, flat, eigenvectors as columns.
    """

    moments: Float32
    vectors: Float32

    def __init__(self, blocks: Sequence[Block] = ()) -> None:
        """Start with the arrays' own bases.

        Args:
            blocks: the arrays; those whose turn would be too slow are left out.
        """
        taken = _affordable(blocks)
        sides = [(block, axis, block.shape[axis]) for block in taken for axis in block.axes]
        self.moments = np.zeros(sum(length**2 for _, _, length in sides), np.float32)
        self.vectors = np.zeros_like(self.moments)
        self._axes, start = [], 0
        for block, axis, length in sides:
            part = slice(start, start + length**2)
            moment, vectors = self.moments[part].reshape(length, length), self.vectors[part].reshape(length, length)
            vectors[...] = np.eye(length, dtype=np.float32)
            sizes = math.prod(block.shape[:axis]), length, math.prod(block.shape[axis + 1 :])
            self._axes.append(_Axis(block.part, sizes, moment, vectors))
            start = part.stop

    def __len__(self) -> int:
        """How many axes have one."""
        return len(self._axes)

    def observe(self, gradient: Float32, kept: float) -> None:
        """Take a gradient into the moments.

        Args:
            gradient: (n,), in the arrays' own bases.
            kept: share of the moments so far that is kept.
        """
        for axis in self._axes:
            array = axis.of(gradient)
            axis.moment[...] *= np.float32(kept)
            axis.moment[...] += np.float32(1 - kept) * np.tensordot(array, array, ((0, 2), (0, 2)))

    def renew(self, *turned: Float32) -> None:
        """Make the moments' eigenvectors the bases.

        Args:
            turned: (n,) arrays that lie in the bases, and lie in the new ones afterwards.
        """
        for each in turned:
            self.back(each)
        for axis in self._axes:
            if np.isfinite(axis.moment).all():
                with contextlib.suppress(np.linalg.LinAlgError):  # the last basis serves as well
                    axis.vectors[...] = scipy.linalg.eigh(axis.moment, driver="evd", check_finite=False)[1]
        for each in turned:
            self.turn(each)

    def turn(self, flat: Float32) -> None:
        """Into the bases, in place."""
        for axis in self._axes:
            _apply(axis.of(flat), axis.vectors)

    def back(self, flat: Float32) -> None:
        """Out of the bases, in place."""
        for axis in self._axes:
            _apply(axis.of(flat), axis.vectors.T)


def entries_of(blocks: Sequence[Block]) -> int:
    """Floats that bases of these arrays hold."""
    return 2 * sum(block.shape[axis] ** 2 for block in _affordable(blocks) for axis in block.axes)


def _affordable(blocks: Sequence[Block]) -> list[Block]:
    """The arrays that have bases, from little work to much."""
    taken, work = [], 0.0
    for block in sorted(blocks, key=lambda block: (block.work, block.part.start)):
        work += block.work
        if work > MOST_WORK:
            break
        if block.axes:
            taken.append(block)
    return taken


def _apply(array: Float32, matrix: Float32) -> None:
    """(before, length, after) ← Σ over the middle axis, in place."""
    array[...] = np.moveaxis(np.tensordot(array, matrix, (1, 0)), -1, 1)
