"""Match the original's outputs: fit a layer to what it should say, not to what its own weight says about inputs that are off already.

In a partly compressed model a layer W reads z where the original's reads x. Fitting Ŵ to W on z passes on what the prefix has lost. The
layer that is nearest to the original's output is instead fitted to the regression of that output on z,

    W* = W + (W·C − W·A)·(A + λ·mean(diag A)·I)⁻¹,    A = E[z zᵀ],  C = E[x zᵀ],

because E‖Ŵz − Wx‖² = ‖(Ŵ − W*)A½‖² + const where λ = 0: whatever form is fitted to W* in the metric A matches the output as well as it can.
With a bias both moments are centred, and the bias takes what is left of the mean (`mean_shift`). Matching outputs of the original through
closed-form regression is from He, Zhang and Sun, "Channel pruning for accelerating very deep neural networks", arXiv 1707.06168; as the
target of compensated rounding it is GPTAQ (Li et al., arXiv 2504.02692).

Layers that follow each other must be matched one after the other, each on what the one before really yields (`levels`): both would make
good the same loss.

The ridge λ draws W* to W, and the samples decide how much: half of them fit every candidate, the other half tells what it gains, and the
other way round. Where nothing gains there, the layer keeps its weight as the target.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import DTypeLike, NDArray
from onnx import ModelProto

from intaglio.ops.decompositions.linalg import lower_root, solve_lower
from intaglio.ops.moment import Moment, OutputMetric

from .calibrate import PAIRED, Pair
from .graph import MAIN, downstream, reads
from .sites import Site

Float64 = NDArray[np.float64]

FOLDS = 2
"""Parts of the samples, each of which tries what the other suggests."""

RIDGES = (0.1, 1.0, 10.0)
"""Values of λ that are tried; the last one moves a weight along the strongest inputs alone."""

_JUDGED_OUTPUTS = 64
"""Outputs of a group on which they are tried."""


def matchable(site: Site) -> bool:
    """Whether a site's inputs can be compared with the original's: one use, in the main graph, by an operator in `PAIRED`."""
    return len(site.uses) == 1 and site.scope == site.uses[0].scope == MAIN and site.op_type in PAIRED


def levels(proto: ModelProto, sites: Sequence[Site]) -> list[list[Site]]:
    """Consecutive sites none of which reads what another of the same level computes.

    What is lost before a level is made good by each of its sites independently; sites that follow each other would make it good twice.
    """
    found: list[list[Site]] = []
    reached: set[str] = set()
    for site in sites:
        if not found or not reached.isdisjoint(reads(site.use.node) - {site.anchor}):
            found.append([])
            reached = set()
        found[-1].append(site)
        reached |= downstream(proto, {site.anchor})
    return found


def pooled(folds: Sequence[Pair]) -> Pair:
    """The pair over all folds."""
    return Pair(pooled_moment(folds), _mean(folds, (fold.cross for fold in folds)), _mean(folds, (fold.mean for fold in folds)))


def pooled_moment(folds: Sequence[Pair]) -> Moment:
    """The moment of `pooled`."""
    matrix = _mean(folds, (fold.moment.matrix for fold in folds))
    center = _mean(folds, (_center(fold) for fold in folds))
    return replace(folds[0].moment, matrix=matrix, rows=sum(fold.moment.rows for fold in folds), mean=center)


def _mean(folds: Sequence[Pair], arrays: Iterable[Float64]) -> Float64:
    """Of arrays that belong to the folds, each with the weight of its fold's rows."""
    rows = [fold.moment.rows for fold in folds]
    parts = (count / sum(rows) * array for count, array in zip(rows, arrays, strict=True))
    total = next(parts)
    for part in parts:
        total += part
    return total


def centred(pair: Pair) -> Pair:
    """The same of inputs whose means are taken away: covariances, and means of zero."""
    center = _center(pair)
    moment = replace(pair.moment, matrix=_less_outer(pair.moment.matrix, center, center), mean=np.zeros_like(center))
    return Pair(moment, _less_outer(pair.cross, pair.mean, center), np.zeros_like(pair.mean))


def _less_outer(matrix: Float64, left: Float64, right: Float64) -> Float64:
    """(groups, p, n) − left·rightᵀ; such matrices fill hundreds of megabytes, so only one is allocated."""
    found = left[:, :, None] * right[:, None, :]
    return np.subtract(matrix, found, out=found)


def matched(
    weight: Float64, start: Float64, folds: Sequence[Pair], *, free_mean: bool, outputs: OutputMetric | None = None
) -> Float64 | None:
    """W*, the weight on z whose outputs are nearest to those of W on x; None where held-out samples see no gain over `start`.

    Args:
        weight: W, (groups, m, p).
        start: what W* is drawn to, (groups, m, n): W itself where z has the same entries as x.
        folds: z and x on parts of the samples, from `calibrate.calibrate_pairs`; with fewer than two nothing can be held out.
        free_mean: whether a bias takes the mean, so that only deviations from it need be matched.
        outputs: what errors of each output cost.
    """
    if len(folds) < FOLDS:
        return None
    seen = [centred(fold) for fold in folds] if free_mean else list(folds)
    step = -(-weight.shape[1] // _JUDGED_OUTPUTS)
    some = slice(None, None, step)
    metric = None if outputs is None else outputs.part(some)
    turns = zip(seen, (*seen[1:], seen[0]), strict=True)
    gains = np.stack([_gains(weight[:, some], start[:, some], fit, judge, metric) for fit, judge in turns])
    best = int(np.argmax(gains.min(0)))
    if not gains[:, best].min() > 0:
        return None
    whole = pooled(folds)
    whole = centred(whole) if free_mean else whole
    return start + next(_steps(_residual(weight, start, whole), whole.moment, RIDGES[best : best + 1]))


def mean_shift(weight: Float64, approximation: Float64, folds: Sequence[Pair]) -> Float64:
    """W·E[x] − Ŵ·E[z], (groups, m), over all folds: added to the output of Ŵ on z, it gives the mean of W on x."""
    wanted, center = _mean(folds, (fold.mean for fold in folds)), _mean(folds, (_center(fold) for fold in folds))
    return np.asarray(np.einsum("gmp,gp->gm", weight, wanted) - np.einsum("gmn,gn->gm", approximation, center))


def _center(pair: Pair) -> Float64:
    """E[z], (groups, n)."""
    if pair.moment.mean is None:
        raise ValueError("a pair without the mean of its inputs")
    return pair.moment.mean


def _residual(weight: Float64, start: Float64, pair: Pair) -> Float64:
    """E[(W·x − Ŵ·z) zᵀ] for Ŵ = start, (groups, m, n)."""
    return np.asarray(weight @ pair.cross - pair.moment.times(start))


def _steps(residual: Float64, moment: Moment, ridges: Sequence[float], precision: DTypeLike = np.float64) -> Iterator[Float64]:
    """residual·(A + λ·mean(diag A)·I)⁻¹ for each λ, solved in some precision."""
    for ridge in ridges:
        solved = []
        for matrix, each in zip(moment.regularized(ridge).matrix, residual, strict=True):
            root = lower_root(matrix.astype(precision))
            solved.append(solve_lower(root, solve_lower(root, each.T.astype(precision)), transposed=True).T)
        yield np.stack(solved)


def _gains(weight: Float64, start: Float64, fit: Pair, judge: Pair, outputs: OutputMetric | None) -> Float64:
    """How much nearer each ridge of `RIDGES` comes to the original's outputs on samples that it was not fitted on, (ridges,).

    In single precision, which costs half the time: the ridges bound what its rounding can do. What does not fit into it gains nothing.
    """
    wanted, moment = _residual(weight, start, judge), judge.moment.with_outputs(outputs)
    costs = wanted if outputs is None else outputs.times(wanted)
    residual = _residual(weight, start, fit)
    with np.errstate(over="ignore"):
        if not all(np.isfinite(array.astype(np.float32)).all() for array in (residual, fit.moment.matrix)):
            return np.full(len(RIDGES), -np.inf)
    steps = _steps(residual, fit.moment, RIDGES, np.float32)
    return np.array([2 * float(np.vdot(costs, step)) - moment.energy(step) for step in steps])
