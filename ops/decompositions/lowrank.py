"""Low rank: W ≈ U·V, optimal in the input metric (METHODS.md, section 0; SVD-LLM, BALF).

The best rank-r approximation in the metric A is the projection of W on the leading eigenvectors of W A Wᵀ: with U_r those eigenvectors,
Ŵ = U_r U_rᵀ W, and the discarded eigenvalues are exactly the squared error. So one m×m eigenproblem prices every rank, without a
root or an inverse of A. Where n < m the same is done on the other side, in the coordinates of a Cholesky factor of A.

For a Conv with a kernel larger than one position this is the channel decomposition: the kernel with r outputs, then 1×1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from ..emit import Emitter
from ..families import FAMILIES, Use
from ..moment import Moment
from ..view import MatrixView
from .base import RIDGE, Float64, Ranks, Shape, rank_grid


@dataclass(frozen=True)
class LowRank:
    """Two factors, run one after the other ("contract") or multiplied out at load ("dense").

    Attributes:
        name: "channel_svd" for Conv kernels of several positions, "lowrank" for everything else.
        execution: "contract" or "dense".
    """

    name: str
    execution: str

    def declines(self, use: Use) -> str | None:
        """Vectors have no rank to lose; Conv kernels go by their own name; some layers cannot be split."""
        spatial = use.node.op_type in ("Conv", "FusedConv") and int(np.prod(use.view.shape[2:])) > 1
        if spatial != (self.name == "channel_svd"):
            return "see channel_svd" if spatial else "not a convolution kernel"
        if min(use.view.m, use.view.n) < 2:
            return f"its rank is at most {min(use.view.m, use.view.n)}"
        return FAMILIES[use.key].contract_reason(use) if self.execution == "contract" else None

    def grid(self, use: Use) -> list[Ranks]:
        """Below the rank at which the factors are as large as the weight."""
        m, n = use.view.m, use.view.n
        return [(r,) for r in rank_grid((m * n - 1) / (m + n), min(m, n))]

    def full(self, use: Use) -> Ranks:
        """min(m, n)."""
        return (min(use.view.m, use.view.n),)

    def errors(self, weight: Float64, moment: Moment, use: Use, ranks: Sequence[Ranks]) -> list[float]:
        """Suffix sums of one spectrum, summed over groups."""
        energies = spectrum(weight, moment)
        total = energies.sum()
        return [float(energies[:, r:].sum() / total) if total > 0 else 0.0 for (r,) in ranks]

    def views(self, use: Use, rank: int) -> tuple[MatrixView, MatrixView]:
        """How the two factors are stored."""
        view = use.view
        if self.execution == "contract":
            return FAMILIES[use.key].split_views(use, rank)
        lead = (view.groups,) if view.groups > 1 else ()
        first = (*lead, rank, view.n) if view.outputs_first else (view.n, rank)
        last = (*lead, view.m, rank) if view.outputs_first else (rank, view.m)
        return (
            MatrixView(first, view.groups, rank, view.n, view.outputs_first),
            MatrixView(last, view.groups, view.m, rank, view.outputs_first),
        )

    def shapes(self, use: Use, ranks: Ranks) -> tuple[Shape, ...]:
        """Of the two factors."""
        return tuple(view.shape for view in self.views(use, ranks[0]))

    def axes(self, use: Use) -> tuple[int, ...]:
        """Split layers: as the family says. Otherwise one scale per component and per output (per row of a table)."""
        if self.execution == "contract":
            return FAMILIES[use.key].split_axes(use)
        if not use.view.outputs_first:
            return (FAMILIES[use.key].channel_axis(use), 1)
        return (1, 1) if use.view.groups > 1 else (0, 0)

    def fit(self, weight: Float64, moment: Moment, use: Use, ranks: Ranks) -> tuple[Float64, ...]:
        """The optimum in the regularized metric, its scale balanced between the factors."""
        matrices = factorize(weight, moment.regularized(RIDGE), ranks[0])
        return tuple(view.stored(matrix) for view, matrix in zip(self.views(use, ranks[0]), matrices, strict=True))

    def prefix(self, use: Use, factors: Sequence[Float64]) -> Float64:
        """The first factor as a matrix."""
        rank = factors[0].size // (use.view.groups * use.view.n)
        return self.views(use, rank)[0].matrix(factors[0])

    def last_view(self, use: Use, ranks: Ranks) -> MatrixView:
        """The second factor."""
        return self.views(use, ranks[0])[1]

    def emit(self, emitter: Emitter, use: Use, factors: Sequence[str], output: str) -> None:
        """Two layers, or one MatMul over initializers (and a Reshape where the weight is no matrix)."""
        if self.execution == "contract":
            FAMILIES[use.key].emit_split(emitter, use, factors[0], factors[1])
            return
        view = use.view
        operands = [factors[1], factors[0]] if view.outputs_first else [factors[0], factors[1]]
        product = (view.m, view.n) if view.outputs_first else (view.n, view.m)
        if view.groups > 1:
            product = (view.groups, *product)
        if product == view.shape:
            emitter.node("MatMul", operands, output)
        else:
            flat = emitter.node("MatMul", operands)
            emitter.node("Reshape", [flat, emitter.ints("shape", view.shape)], output)


def spectrum(weight: Float64, moment: Moment) -> Float64:
    """Squared singular values of W A½ per group, descending: (groups, min(m, n)) float64.

    Args:
        weight: (groups, m, n) float64.
        moment: the input metric.
    """
    m, n = weight.shape[1:]
    if m <= n:
        gram = moment.output_gram(weight)
    else:
        root = _root(moment)
        half = weight * root[:, None, :] if root.ndim == 2 else weight @ root
        gram = half.transpose(0, 2, 1) @ half
    return np.asarray(np.clip(np.linalg.eigvalsh(gram)[:, ::-1], 0, None))


def factorize(weight: Float64, moment: Moment, rank: int) -> tuple[Float64, Float64]:
    """First (groups, r, n) and last (groups, m, r) factor of the best rank-r approximation in the metric.

    Each component's scale is shared so that its row of the first and its column of the last factor have equal norms.
    """
    m, n = weight.shape[1:]
    if m <= n:
        last = np.linalg.eigh(moment.output_gram(weight))[1][:, :, ::-1][:, :, :rank]
        first = last.transpose(0, 2, 1) @ weight
    else:
        root = _root(moment)
        half = weight * root[:, None, :] if root.ndim == 2 else weight @ root
        right = np.linalg.eigh(half.transpose(0, 2, 1) @ half)[1][:, :, ::-1][:, :, :rank]
        last = half @ right
        if root.ndim == 2:
            first = right.transpose(0, 2, 1) / root[:, None, :]
        else:
            first = np.stack(
                [scipy.linalg.solve_triangular(lower, part, lower=True, trans=1).T for lower, part in zip(root, right, strict=True)]
            )
    balance = np.linalg.norm(first, axis=2), np.linalg.norm(last, axis=1)
    scale = np.sqrt(np.divide(balance[1], balance[0], out=np.ones_like(balance[0]), where=(balance[0] > 0) & (balance[1] > 0)))
    return first * scale[:, :, None], last / scale[:, None, :]


def _root(moment: Moment) -> Float64:
    """A lower-triangular root of A per group, or the root of its diagonal; nudged until it is positive definite."""
    if moment.diagonal:
        return np.sqrt(np.maximum(moment.matrix, moment.matrix.max() * 1e-12 + np.finfo(np.float64).tiny))
    ridge = 0.0
    while True:
        try:
            return np.asarray(np.linalg.cholesky(moment.regularized(ridge).matrix))
        except np.linalg.LinAlgError:
            ridge = max(1e-10, ridge * 100)


LOW_RANK = LowRank("lowrank", "contract")
LOW_RANK_DENSE = LowRank("lowrank", "dense")
CHANNEL_SVD = LowRank("channel_svd", "contract")
CHANNEL_SVD_DENSE = LowRank("channel_svd", "dense")
