"""Low rank: W ≈ U·V, optimal in the input metric (SVD-LLM, BALF).

The best rank-r approximation in the metric A is the projection of W on the leading eigenvectors of W A Wᵀ: with U_r those
eigenvectors, Ŵ = U_r U_rᵀ W, and the discarded eigenvalues are exactly the squared error. So one m×m eigenproblem prices
every rank, without a root or an inverse of A. Where n < m the same is done on the other side, in the coordinates of a
Cholesky factor of A. Where outputs have a metric G = R·Rᵀ too, all this is done to Rᵀ·W, and the last factor multiplied by R⁻ᵀ.

For a Conv with a kernel larger than one position this is the channel decomposition: the kernel with r outputs, then 1×1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..emit import Emitter
from ..families import FAMILIES, Use
from ..moment import Moment
from ..view import MatrixView
from .base import RIDGE, Ranks, Shape, UniformFactors, rank_grid
from .linalg import Float64, balance, lower_root, solve_lower


@dataclass(frozen=True)
class LowRank(UniformFactors):
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
        lead = (view.groups,) if view.groups > 1 else ()
        product = (*lead, view.m, view.n) if view.outputs_first else (view.n, view.m)
        if product == view.shape:
            emitter.node("MatMul", operands, output)
        else:
            flat = emitter.node("MatMul", operands)
            emitter.node("Reshape", [flat, emitter.ints("shape", view.shape)], output)


def spectrum(weight: Float64, moment: Moment) -> Float64:
    """Squared singular values of W A½ (of Rᵀ W A½ where outputs have a metric R Rᵀ) per group: (groups, min(m, n)) float64.

    Descending, or where the moment has a slope in the order in which components are kept.

    Args:
        weight: (groups, m, n) float64.
        moment: the metric of inputs, and of outputs where it has one.
    """
    if moment.slope is not None:
        found = components(weight, moment)
        return np.asarray(np.take_along_axis(found.energies, found.order, axis=1))
    m, n = weight.shape[1:]
    weight = moment.whiten(weight)
    gram = moment.output_gram(weight) if m <= n else _input_gram(weight, _roots(moment))
    return np.asarray(np.clip(np.linalg.eigvalsh(gram)[:, ::-1], 0, None))


def factorize(weight: Float64, moment: Moment, rank: int) -> tuple[Float64, Float64]:
    """First (groups, r, n) and last (groups, m, r) factor of the best rank-r approximation in the metric.

    Each component's scale is shared so that its row of the first and its column of the last factor have equal norms.

    Args:
        weight: (groups, m, n) float64.
        moment: the metric of inputs, and of outputs where it has one.
        rank: at most min(m, n).
    """
    if moment.slope is not None:
        first, last = components(weight, moment).kept(rank)
        scale = balance(np.linalg.norm(first, axis=2), np.linalg.norm(last, axis=1))
        return first * scale[:, :, None], last / scale[:, None, :]
    m, n = weight.shape[1:]
    weight = moment.whiten(weight)
    if m <= n:
        last = _leading(moment.output_gram(weight), rank).copy()
        first = last.transpose(0, 2, 1) @ weight
    else:
        roots = _roots(moment)
        right = _leading(_input_gram(weight, roots), rank)
        if moment.diagonal:
            last = weight @ (roots[:, :, None] * right)
            first = (right / roots[:, :, None]).transpose(0, 2, 1)
        else:
            last = weight @ (roots @ right)
            first = np.stack([solve_lower(root, part, transposed=True).T for root, part in zip(roots, right, strict=True)])
    last = moment.unwhiten(last)
    scale = balance(np.linalg.norm(first, axis=2), np.linalg.norm(last, axis=1))
    last /= scale[:, None, :]
    return first * scale[:, :, None], last


@dataclass(frozen=True, eq=False)
class Components:
    """W as a sum of min(m, n) parts of rank one, of which a low rank keeps some: each is unrelated to the others in the metric.

    Attributes:
        lefts: (groups, m, k) float64; part i is lefts[:, :, i] · rights[:, i].
        rights: (groups, k, n) float64.
        energies: what the loss of a part adds to the squared error, (groups, k), descending.
        order: (groups, k), the parts in the order in which they are kept: by energy, or where the moment has a slope by what losing
            them costs in all, first-order term included.
    """

    lefts: Float64
    rights: Float64
    energies: Float64
    order: NDArray[np.int64]

    def removal(self, gradient: Float64) -> Float64:
        """−⟨g, part⟩ for a gradient g (groups, m, n): what leaving out each part changes to first order, (groups, k)."""
        return np.asarray(-np.einsum("gkn,gnk->gk", self.rights, gradient.transpose(0, 2, 1) @ self.lefts))

    def slope(self, changes: Float64) -> Float64:
        """A gradient (groups, m, n) with which `removal` gives these changes, (groups, k)."""
        duals = np.linalg.pinv(self.lefts, rcond=1e-12).transpose(0, 2, 1)
        squares = np.maximum(np.square(self.rights).sum(2), np.finfo(np.float64).tiny)
        return np.asarray(-(duals * (changes / squares)[:, None, :]) @ self.rights)

    def kept(self, rank: int) -> tuple[Float64, Float64]:
        """The first and the last factor of the parts that are kept: (groups, rank, n) and (groups, m, rank)."""
        chosen = self.order[:, :rank]
        return np.take_along_axis(self.rights, chosen[:, :, None], axis=1), np.take_along_axis(self.lefts, chosen[:, None, :], axis=2)


def components(weight: Float64, moment: Moment) -> Components:
    """The parts of a weight (groups, m, n) that low ranks are made of."""
    white = moment.whiten(weight)
    if weight.shape[1] <= weight.shape[2]:
        values, vectors = np.linalg.eigh(moment.output_gram(white))
        lefts = np.ascontiguousarray(vectors[:, :, ::-1])
        rights = lefts.transpose(0, 2, 1) @ white
    else:
        roots = _roots(moment)
        values, vectors = np.linalg.eigh(_input_gram(white, roots))
        vectors = vectors[:, :, ::-1]
        lefts = white @ (roots[:, :, None] * vectors if moment.diagonal else roots @ vectors)
        rights = np.stack([_unrooted(root, part) for root, part in zip(roots, vectors, strict=True)])
    energies = np.clip(values[:, ::-1], 0, None)
    found = Components(moment.unwhiten(lefts), rights, energies, np.tile(np.arange(energies.shape[1]), (len(energies), 1)))
    total = energies.sum()
    if moment.slope is None or total <= 0:
        return found
    cost = energies / total + found.removal(moment.slope)
    return replace(found, order=np.argsort(-cost, axis=1, kind="stable"))


def _unrooted(root: Float64, vectors: Float64) -> Float64:
    """(R⁻ᵀ·V)ᵀ for a root R of A, (n, n) or its diagonal (n,), and V (n, k)."""
    return np.asarray((vectors / root[:, None]).T if root.ndim == 1 else solve_lower(root, vectors, transposed=True).T)


def _leading(gram: Float64, rank: int) -> Float64:
    """The eigenvectors of the `rank` largest eigenvalues, (groups, n, rank)."""
    return np.asarray(np.linalg.eigh(gram)[1][:, :, ::-1][:, :, :rank])


def _roots(moment: Moment) -> Float64:
    """A lower-triangular root of A per group, or the root of its diagonal; made positive definite where A is not."""
    if moment.diagonal:
        return np.asarray(np.sqrt(np.maximum(moment.matrix, moment.matrix.max() * 1e-12 + np.finfo(np.float64).tiny)))
    return np.stack([lower_root(matrix) for matrix in moment.matrix])


def _input_gram(weight: Float64, roots: Float64) -> Float64:
    """A½ᵀ Wᵀ W A½, (groups, n, n); nothing as large as the weight is allocated."""
    gram = weight.transpose(0, 2, 1) @ weight
    if roots.ndim == 2:
        return np.asarray(roots[:, :, None] * gram * roots[:, None, :])
    gram = roots.transpose(0, 2, 1) @ gram @ roots
    return np.asarray(0.5 * (gram + gram.transpose(0, 2, 1)))


LOW_RANK = LowRank("lowrank", "contract")
LOW_RANK_DENSE = LowRank("lowrank", "dense")
CHANNEL_SVD = LowRank("channel_svd", "contract")
CHANNEL_SVD_DENSE = LowRank("channel_svd", "dense")
