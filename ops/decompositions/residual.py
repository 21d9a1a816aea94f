"""A whole weight in few bits beside a thin product in more: W ≈ B + L·R.

L·R takes up what rounding B loses in the directions that matter to the input metric (LQER, arXiv 2402.02446; QERA, arXiv 2410.06040), or
it takes the large directions of W first and leaves B less to hold (SVDQuant, arXiv 2411.05007). Both are points of one family, between
which `ops.rounding.corrected` alternates (CALDERA, arXiv 2405.18886).

"dense" multiplies L·R out and adds it to B when the model is loaded. "contract" adds L·(R·x) to B·x in every run (SVDQuant, figure 4), so
that B can stay in the narrow kernel that the form's arithmetic has for it; R and L compute in floats.

In the words of every decomposition the last factor is (I, L) and the prefix is B on top of R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

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
"""Entries of a folded correction, as a share of the weight's: 0.1 bits per weight; more of them gain less than a finer base does."""

_BRANCH_RANKS = (8, 16, 32)
"""Ranks of a correction that runs: fewer components take as long."""

_BRANCH_SHARE = 1 / 8
"""Most entries of one, as a share of the weight's: one bit per weight. With that a base has finer steps."""

_BESIDE = ("Conv", "Gemm", "MatMul")
"""Operators of the default domain with whose output a branch can be summed: no activation follows inside them."""


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
    """Three arrays: the base B, shaped like the weight, then R and L as `LowRank` stores them.

    Attributes:
        execution: "dense" or "contract".
        name: "residual".
    """

    execution: str
    name: str = "residual"

    @property
    def _product(self) -> LowRank:
        """L·R as a decomposition of its own."""
        return LowRank(self.name, self.execution)

    def declines(self, use: Use) -> str | None:
        """Vectors have no rank; a branch runs beside plain operators, where two layers could stand for one."""
        rank = min(use.view.m, use.view.n)
        if rank < 2:
            return f"its rank is at most {rank}"
        if self.execution == "dense":
            return None
        domain, op_type = use.key
        if domain or op_type not in _BESIDE:
            return f"no branch runs beside {op_type}: only beside {', '.join(_BESIDE)}"
        return FAMILIES[use.key].contract_reason(use)

    def grid(self, use: Use) -> list[Ranks]:
        """One rank where it is folded, as bits are traded by the base's storage; a few that hardware likes where it runs."""
        m, n = use.view.m, use.view.n
        if self.execution == "contract":
            return [(rank,) for rank in _BRANCH_RANKS if rank * (m + n) <= _BRANCH_SHARE * m * n]
        rank = int(_SHARE * m * n / (m + n))
        return [(rank,)] if rank else []

    def full(self, use: Use) -> Ranks:
        """min(m, n); any rank is exact where nothing is rounded."""
        return self._product.full(use)

    def errors(self, weight: Float64, moment: Moment, use: Use, ranks: Sequence[Ranks]) -> list[float]:
        """Zeros: nothing is left out, all error is rounding."""
        return [0.0] * len(ranks)

    def shapes(self, use: Use, ranks: Ranks) -> tuple[Shape, ...]:
        """Of B, R and L."""
        return (use.view.shape, *self._product.shapes(use, ranks))

    def axes(self, use: Use) -> tuple[int, ...]:
        """Of B as of the whole weight; one scale per component of R and per output of L."""
        return (FAMILIES[use.key].channel_axis(use), *self._product.axes(use))

    def storages(self, storage: str, count: int) -> tuple[str, ...]:
        """The form's for B, `CORRECTION_STORAGE` for R and L."""
        return (storage,) + (storage if storage in _WIDE else CORRECTION_STORAGE,) * (count - 1)

    def narrow(self, count: int) -> tuple[bool, ...]:
        """B; what it cannot hold is lost if L and R are rounded with their inputs."""
        return (True,) + (False,) * (count - 1)

    def fit(self, weight: Float64, moment: Moment, use: Use, ranks: Ranks) -> tuple[Float64, ...]:
        """The large directions of W in L·R, the rest in B: exact."""
        first, last = factorize(weight, moment.regularized(RIDGE), ranks[0])
        first_view, last_view = self.product_views(use, ranks)
        return use.view.stored(weight - last @ first), first_view.stored(first), last_view.stored(last)

    def product_views(self, use: Use, ranks: Ranks) -> tuple[MatrixView, MatrixView]:
        """How R (groups, r, n) and L (groups, m, r) are stored."""
        return self._product.views(use, ranks[0])

    def prefix(self, use: Use, factors: Sequence[Float64]) -> Float64:
        """B on top of R, (groups, m + r, n)."""
        base, first = factors
        return np.concatenate([use.view.matrix(base), self._product.prefix(use, [first])], axis=1)

    def last_view(self, use: Use, ranks: Ranks) -> MatrixView:
        """(I, L)."""
        view = self.product_views(use, ranks)[1]
        return _BesideIdentity(view.shape, view.groups, view.m, view.n, view.outputs_first)

    def whole(self, use: Use, ranks: Ranks, factors: Sequence[Float64]) -> Float64:
        """B + L·R, (groups, m, n): what `rebuild` yields, without the product with an identity."""
        first, last = (view.matrix(factor) for view, factor in zip(self.product_views(use, ranks), factors[1:], strict=True))
        return np.asarray(use.view.matrix(factors[0]) + last @ first)

    def emit(self, emitter: Emitter, use: Use, factors: Sequence[str], output: str) -> None:
        """Over initializers the product of R and L, and an Add; or the layer with B, two thin layers beside it, and their sum."""
        if self.execution == "contract":
            _emit_branch(emitter, use, *factors)
            return
        product = emitter.name("correction")
        self._product.emit(emitter, use, factors[1:], product)
        emitter.node("Add", [factors[0], product], output)


def _emit_branch(emitter: Emitter, use: Use, base: str, first: str, last: str) -> None:
    """The node keeps its bias and reads the base; what sums has its name and output: the last thin Gemm itself, else an Add."""
    family, whole = FAMILIES[use.key], emitter.name("base")
    emitter.copy(_yielding(use.node, whole), {use.index: base})
    if use.node.op_type == "Gemm":
        thin = NodeProto()
        thin.CopyFrom(use.node)
        thin.input[2:] = [whole]
        kept = [attribute for attribute in thin.attribute if attribute.name != "beta"]  # the sum itself has factor 1
        del thin.attribute[:]
        thin.attribute.extend(kept)
        family.emit_split(emitter, replace(use, node=thin), first, last)
        return
    branch = emitter.name("branch")
    thin = _yielding(use.node, branch)
    del thin.input[2:]
    family.emit_split(emitter, replace(use, node=thin), first, last)
    emitter.node("Add", [whole, branch], use.node.output[0])
    emitter.nodes[-1].name, emitter.nodes[-1].doc_string = use.node.name, use.node.doc_string


def _yielding(node: NodeProto, output: str) -> NodeProto:
    """A copy of a node that yields another value, under no name."""
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.name, copy.doc_string, copy.output[0] = "", "", output
    return copy


RESIDUAL = Residual("dense")
RESIDUAL_BESIDE = Residual("contract")
