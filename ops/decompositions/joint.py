"""First-order prices: what a decomposition changes of a labelled loss, ⟨g, Ŵ − W⟩, for all ranks from one decomposition.

Joint low-rank factorization (arXiv 2412.06867) looks at the total differential of the loss and not at the size of the error alone. With
W = Σ σᵢuᵢvᵢᵀ and cᵢ = uᵢᵀ g vᵢ, leaving out the components after r changes the loss by −Σ_{i>r} σᵢcᵢ to first order: a suffix sum. The
same holds in an input metric, where component i is uᵢuᵢᵀW for an eigenvector uᵢ of W A Wᵀ, and for projections on nested prefixes
(separable, Tucker-2), where it is a prefix sum.

Gradients come in folds of samples, because what one set of samples promises need not hold on another: `trusted` shrinks the mean of the
folds by what their spread says about it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from ..families import Use
from ..moment import Moment
from .als import metric_of, regress, start
from .base import Decomposition, Ranks
from .linalg import Float64, solve_lower
from .lowrank import Components, LowRank, components
from .separable import Separable
from .tucker2 import Tucker2


def first_order(
    decomposition: Decomposition, weight: Float64, moment: Moment, use: Use, ranks: Sequence[Ranks], gradients: Float64
) -> Float64:
    """⟨g, Ŵ − W⟩ at each of the ranks, (folds, ranks) float64, for each fold's gradient.

    Ŵ is what `errors` prices: the optimum for low rank, the start of the alternating sweeps for separable and Tucker-2 forms. Other
    decompositions leave nothing out, which is zeros.

    Args:
        decomposition: of any kind.
        weight: W, (groups, m, n) float64.
        moment: the metric; where it has a slope, low rank keeps the components that `factorize` keeps.
        use: the node that reads the weight.
        ranks: of the decomposition.
        gradients: g, (folds, groups, m, n) float64.
    """
    if not ranks:
        return np.zeros((len(gradients), 0))
    if isinstance(decomposition, LowRank):
        return _low_rank(weight, moment, [r for (r,) in ranks], gradients)
    if isinstance(decomposition, (Separable, Tucker2)):
        return _projected(decomposition, weight, moment, use, ranks, gradients)
    return np.zeros((len(gradients), len(ranks)))


def trusted(folds: Float64, doubt: float = 0.0) -> Float64:
    """What can be relied on of a mean from independent folds; negative means are gains.

    Harm is the positive-part James–Stein estimate μ·max(0, 1 − s²∕μ²) with s the standard error of μ: two folds that agree keep their mean,
    two of opposite sign give zero. A gain is that too, but no more than μ + doubt·s, because a choice among many candidates finds those
    whose noise looks like a gain.

    Args:
        folds: (folds, ...) float64, at least two folds.
        doubt: standard errors that a gain is discounted by.

    Returns:
        (...) float64.
    """
    mean = folds.mean(0)
    variance = folds.var(0, ddof=1) / len(folds)
    square = np.square(mean)
    share = np.where(square > variance, 1 - np.divide(variance, square, out=np.ones_like(square), where=square > 0), 0.0)
    shrunk = share * mean
    return np.asarray(np.where(mean < 0, np.minimum(0.0, np.maximum(shrunk, mean + doubt * np.sqrt(variance))), shrunk))


def significant(folds: Float64, doubt: float) -> Float64:
    """The mean of folds where it is larger than a number of its standard errors, else 0.

    Single spreads of a few folds say little, so one standard error is taken for all entries, from their mean variance.

    Args:
        folds: (folds, ...) float64, at least two folds.
        doubt: the number of standard errors.

    Returns:
        (...) float64.
    """
    mean = folds.mean(0)
    error = float(np.sqrt(folds.var(0, ddof=1).mean() / len(folds)))
    return np.asarray(np.where(np.abs(mean) > doubt * error, mean, 0.0))


def agreement(gradients: Float64) -> float:
    """How far folds agree about a whole gradient, from 0 to 1: mean ⟨g_a, g_b⟩ over pairs of folds, over ‖ḡ‖².

    It is the share of the mean gradient's square that is not noise, as far as can be told.

    Args:
        gradients: (folds, ...) float64.
    """
    flat = gradients.reshape(len(gradients), -1)
    gram = flat @ flat.T
    count = len(flat)
    square = float(gram.sum()) / count**2
    common = float(gram.sum() - np.trace(gram)) / (count * (count - 1))
    return min(1.0, max(0.0, common / square)) if square > 0 else 0.0


def removals(parts: Components, gradients: Float64) -> Float64:
    """What leaving out each part changes to first order, (folds, groups, parts), for gradients (folds, groups, m, n)."""
    return np.stack([parts.removal(gradient) for gradient in gradients])


def _low_rank(weight: Float64, moment: Moment, ranks: Sequence[int], gradients: Float64) -> Float64:
    """Suffix sums over the components, in the order in which they are kept."""
    parts = components(weight, moment)
    changes = removals(parts, gradients)
    changes = np.take_along_axis(changes, parts.order[None], axis=2).sum(1)
    kept = np.concatenate([np.zeros((len(changes), 1)), np.cumsum(changes, axis=1)], axis=1)
    return np.asarray(kept[:, -1:] - kept[:, list(ranks)])


def _projected(
    decomposition: Separable | Tucker2, weight: Float64, moment: Moment, use: Use, ranks: Sequence[Ranks], gradients: Float64
) -> Float64:
    """⟨g, U·P⟩ − ⟨g, W⟩ for the least squares U on each prefix P.

    With P·A·Pᵀ = L·Lᵀ, Y = L⁻¹·P·A·Wᵀ and Z = L⁻¹·P·gᵀ this is Σ Y∘Z over the prefix's rows; L is lower triangular, so the rows of a
    shorter prefix are the first ones. Reduced to rank r₂ by projecting outputs on o_k, it is Σ_k o_kᵀ Yᵀ Z o_k.
    """
    metric, whole = metric_of(moment), moment.whiten(weight)[0]
    inner = int(np.prod(use.view.shape[1:3])) if isinstance(decomposition, Separable) else use.view.shape[1]
    positions = use.view.n // inner
    factor = start(whole, metric, inner, max(rank[0] for rank in ranks))
    regression = regress(factor, whole, metric)
    prefix = np.kron(factor, np.eye(positions))
    found = []
    for gradient in gradients:
        image = solve_lower(regression.root, prefix @ dual(gradient, moment)[0].T)
        products = (
            _prefix_sums(regression.explained, image, [r * positions for (r,) in ranks])
            if isinstance(decomposition, Separable)
            else _reduced_sums(regression.explained, image, [(r1 * positions, r2) for r1, r2 in ranks])
        )
        found.append(products - float(np.vdot(gradient, weight)))
    return np.stack(found)


def _prefix_sums(explained: Float64, image: Float64, rows: Sequence[int]) -> Float64:
    """Σ Y∘Z over the first rows of both, (q, m), for each number of rows."""
    return np.asarray(np.cumsum(np.einsum("qm,qm->q", explained, image))[np.asarray(rows) - 1])


def _reduced_sums(explained: Float64, image: Float64, pairs: Sequence[tuple[int, int]]) -> Float64:
    """Σ_k o_kᵀ Yᵀ Z o_k over the leading r₂ eigenvectors of Yᵀ·Y, for each (rows of Y and Z, r₂)."""
    sums = {}
    for rows in {rows for rows, _ in pairs}:
        part = explained[:rows]
        vectors = np.linalg.eigh(part.T @ part)[1][:, ::-1]
        sums[rows] = np.cumsum(np.einsum("mk,mk->k", vectors, part.T @ (image[:rows] @ vectors)))
    return np.array([sums[rows][r2 - 1] for rows, r2 in pairs])


def dual(gradient: Float64, moment: Moment) -> NDArray[np.float64]:
    """R⁻¹·g, the gradient with respect to Rᵀ·W where outputs have a metric R·Rᵀ; g itself where they have none."""
    if moment.outputs is None:
        return gradient
    root = moment.outputs.root
    if root.ndim == 2:
        return np.asarray(gradient / root[:, :, None])
    return np.stack([scipy.linalg.solve_triangular(each, part, lower=True) for each, part in zip(root, gradient, strict=True)])
