"""A whole weight in few bits beside a thin product in more: W ≈ B + L·R, multiplied out and added when the model is loaded.

L·R takes up what rounding B loses in the directions that matter to the input metric (LQER, arXiv 2402.02446; QERA, arXiv 2410.06040), or
it takes the large directions of W first and leaves B less to hold (SVDQuant, arXiv 2411.05007). Both are points of one family, between
which `ops.rounding.corrected` alternates (CALDERA, arXiv 2405.18886).

In the words of every decomposition the last factor is (I, L) and the prefix is B on top of R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..emit import Emitter
from ..families import FAMILIES, Use
from ..moment import Moment
from ..view import MatrixView
from .base import RIDGE, Ranks, Shape
from .linalg import Float64
from .lowrank import LowRank, factorize

CORRECTION_STORAGE = "int8"
"""Storage of L and R: they are a few percent of the entries, and what they cannot hold is lost."""

_WIDE = ("float", "fp16")
"""Storages with hardly any rounding error: nothing to correct, so L and R lie as the rest does."""

_SHARE = 1 / 80
"""Entries of the correction, as a share of the weight's: 0.1 bits per weight; more of them gain less than a finer base does."""

_PRODUCT = LowRank("residual", "dense")


@dataclass(frozen=True)
class _BesideIdentity(MatrixView):
    """Reads L (groups, m, r) as (I, L)."""

    def matrix(self, stored: NDArray[np.generic]) -> Float64:
        """(groups, m, m + r)."""
        last = super().matrix(stored)
        return np.concatenate([np.broadcast_to(np.eye(self.m), (self.groups, self.m, self.m)), last], axis=2)

    def stored(self, matrix: Float64) -> Float64:
        """(groups, m, m + r) → L."""
        return super().stored(matrix[:, :, self.m :])


@dataclass(frozen=True)
class Residual:
    """Three arrays: the base B, shaped like the weight, then R and L as `LowRank` stores them."""

    name: str = "residual"
    execution: str = "dense"

    def declines(self, use: Use) -> str | None:
        """Vectors have no rank."""
        rank = min(use.view.m, use.view.n)
        return f"its rank is at most {rank}" if rank < 2 else None

    def grid(self, use: Use) -> list[Ranks]:
        """One rank, so that the price of rounding, which is measured at one rank, holds; bits are traded by the base's storage."""
        m, n = use.view.m, use.view.n
        rank = int(_SHARE * m * n / (m + n))  # multiplied out at load, so hardware has no say in it
        return [(rank,)] if rank else []

    def full(self, use: Use) -> Ranks:
        """min(m, n); any rank is exact where nothing is rounded."""
        return _PRODUCT.full(use)

    def errors(self, weight: Float64, moment: Moment, use: Use, ranks: Sequence[Ranks]) -> list[float]:
        """Zeros: nothing is left out, all error is rounding."""
        return [0.0] * len(ranks)

    def shapes(self, use: Use, ranks: Ranks) -> tuple[Shape, ...]:
        """Of B, R and L."""
        return (use.view.shape, *_PRODUCT.shapes(use, ranks))

    def axes(self, use: Use) -> tuple[int, ...]:
        """Of B as of the whole weight; one scale per component of R and per output of L."""
        return (FAMILIES[use.key].channel_axis(use), *_PRODUCT.axes(use))

    def storages(self, storage: str, count: int) -> tuple[str, ...]:
        """The form's for B, `CORRECTION_STORAGE` for R and L."""
        return (storage,) + (storage if storage in _WIDE else CORRECTION_STORAGE,) * (count - 1)

    def fit(self, weight: Float64, moment: Moment, use: Use, ranks: Ranks) -> tuple[Float64, ...]:
        """The large directions of W in L·R, the rest in B: exact."""
        first, last = factorize(weight, moment.regularized(RIDGE), ranks[0])
        first_view, last_view = self.product_views(use, ranks)
        return use.view.stored(weight - last @ first), first_view.stored(first), last_view.stored(last)

    def product_views(self, use: Use, ranks: Ranks) -> tuple[MatrixView, MatrixView]:
        """How R (groups, r, n) and L (groups, m, r) are stored."""
        return _PRODUCT.views(use, ranks[0])

    def prefix(self, use: Use, factors: Sequence[Float64]) -> Float64:
        """B on top of R, (groups, m + r, n)."""
        base, first = factors
        return np.concatenate([use.view.matrix(base), _PRODUCT.prefix(use, [first])], axis=1)

    def last_view(self, use: Use, ranks: Ranks) -> MatrixView:
        """(I, L)."""
        view = self.product_views(use, ranks)[1]
        return _BesideIdentity(view.shape, view.groups, view.m, view.n, view.outputs_first)

    def whole(self, use: Use, ranks: Ranks, factors: Sequence[Float64]) -> Float64:
        """B + L·R, (groups, m, n): what `rebuild` yields, without the product with an identity."""
        first, last = (view.matrix(factor) for view, factor in zip(self.product_views(use, ranks), factors[1:], strict=True))
        return np.asarray(use.view.matrix(factors[0]) + last @ first)

    def emit(self, emitter: Emitter, use: Use, factors: Sequence[str], output: str) -> None:
        """The product of R and L over initializers, and an Add."""
        product = emitter.name("correction")
        _PRODUCT.emit(emitter, use, factors[1:], product)
        emitter.node("Add", [factors[0], product], output)


RESIDUAL = Residual()
