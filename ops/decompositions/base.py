"""What a decomposition has to offer.

Every decomposition here writes W ≈ L·P: a last factor L (groups, m, q) and a prefix P (groups, q, n) that is composed of the
factors before it. Given the prefix, the best last factor in any input metric is a linear least-squares problem; `refit_last`
solves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..emit import Emitter
from ..families import Use
from ..moment import Moment
from ..view import MatrixView
from .linalg import Float64, lower_root, solve_lower

Shape = tuple[int, ...]
Ranks = tuple[int, ...]

RIDGE = 0.01
"""Share of mean(diag A) added to A when factors are fitted: directions that calibration never showed are not free."""

SOLVE_RIDGE = 1e-9
"""Relative ridge of a least-squares problem: makes a prefix that lost rank harmless, and changes nothing else visibly."""


class Decomposition(Protocol):
    """One way to factor a weight and to run the factors: propose, price, fit, emit, rebuild."""

    @property
    def name(self) -> str:
        """The name in plans and reports."""
        ...

    @property
    def execution(self) -> str:
        """ "contract": activations flow through the factors; "dense": the factors are multiplied out at load."""
        ...

    def declines(self, use: Use) -> str | None:
        """None when the weight can be decomposed this way, else the reason why not."""
        ...

    def grid(self, use: Use) -> list[Ranks]:
        """Hardware-aware ranks worth pricing, each with fewer entries than the weight."""
        ...

    def full(self, use: Use) -> Ranks:
        """The ranks at which the decomposition is exact."""
        ...

    def errors(self, weight: Float64, moment: Moment, use: Use, ranks: Sequence[Ranks]) -> list[float]:
        """Relative output error ‖(W − Ŵ)A½‖²/‖WA½‖² at each of the ranks, from as few spectra as possible."""
        ...

    def shapes(self, use: Use, ranks: Ranks) -> tuple[Shape, ...]:
        """Stored shapes of the factors, from the input to the output."""
        ...

    def axes(self, use: Use) -> tuple[int, ...]:
        """Scale axis of each stored factor."""
        ...

    def storages(self, storage: str, count: int) -> tuple[str, ...]:
        """Storage of each of `count` stored factors, for the storage that a form names; the same for all unless the factors differ."""
        ...

    def narrow(self, count: int) -> tuple[bool, ...]:
        """Which of `count` stored factors compute in the arithmetic that a form names; the others compute in floats."""
        ...

    def fit(self, weight: Float64, moment: Moment, use: Use, ranks: Ranks) -> tuple[Float64, ...]:
        """Stored factors that minimise ‖(W − Ŵ)A½‖² for weight (groups, m, n)."""
        ...

    def prefix(self, use: Use, factors: Sequence[Float64]) -> Float64:
        """All stored factors but the last, composed: (groups, q, n)."""
        ...

    def last_view(self, use: Use, ranks: Ranks) -> MatrixView:
        """How the last stored factor reads as a matrix (groups, m, q)."""
        ...

    def emit(self, emitter: Emitter, use: Use, factors: Sequence[str], output: str) -> None:
        """Add the nodes that run the factors.

        Args:
            emitter: collects the nodes.
            use: the node that reads the weight.
            factors: names of the factors' values, in stored layout.
            output: "dense": the name of the product, shaped like the weight; "contract": not used, as the node is replaced.
        """
        ...


class UniformFactors:
    """Every factor lies in the storage, and computes in the arithmetic, that the form names."""

    def storages(self, storage: str, count: int) -> tuple[str, ...]:
        """The same, `count` times."""
        return (storage,) * count

    def narrow(self, count: int) -> tuple[bool, ...]:
        """All of them."""
        return (True,) * count


def rebuild(decomposition: Decomposition, use: Use, ranks: Ranks, factors: Sequence[Float64]) -> Float64:
    """Ŵ, (groups, m, n): the reference that emitted graphs are tested against."""
    return decomposition.last_view(use, ranks).matrix(factors[-1]) @ decomposition.prefix(use, factors[:-1])


def refit_last(
    decomposition: Decomposition, weight: Float64, moment: Moment, use: Use, ranks: Ranks, factors: Sequence[Float64]
) -> Float64:
    """argmin over L of ‖(W − L·P)A½‖² for the prefix P of the given leading factors; in stored layout."""
    prefix = decomposition.prefix(use, factors)
    return decomposition.last_view(use, ranks).stored(least_squares(weight, moment.regularized(RIDGE), prefix))


def least_squares(weight: Float64, moment: Moment, prefix: Float64) -> Float64:
    """W A Pᵀ (P A Pᵀ)⁻¹, (groups, m, q), for weight (groups, m, n) and prefix (groups, q, n)."""
    result = []
    for target, row, image in zip(weight, prefix, moment.times(prefix), strict=True):
        root = lower_root(image @ row.T, SOLVE_RIDGE)
        result.append(solve_lower(root, solve_lower(root, image @ target.T), transposed=True).T)
    return np.stack(result)


def rank_grid(limit: float, full: int, count: int = 10) -> list[int]:
    """About `count` ranks up to `limit`, spread geometrically over multiples that hardware likes.

    They are multiples of 8, of 16 where the full rank is 128 or more, of 32 from 512 on; powers of two where no multiple fits.
    """
    step = 8 if full < 128 else 16 if full < 512 else 32
    top = int(min(limit, full - 1))
    multiples = list(range(step, top + 1, step)) or [r for r in (1, 2, 4) if r <= top]
    if not multiples:
        return []
    wanted = np.geomspace(multiples[0], multiples[-1], count)
    return sorted({min(multiples, key=lambda r: abs(r - w)) for w in wanted})
