"""Error-compensated codebooks: GPTVQ (van Baalen et al. 2024, arXiv 2402.15319), on the triangular root of `gptq`.

A run of consecutive inputs of an output is written as one centroid. With D = W − Ŵ, A = R·Rᵀ and R upper triangular, the run b of a row
adds ‖(T − v)·R_bb‖² to its error ‖D·R‖², with v what stands for the run and T = W_b + Σ_{a<b} D_a·R_ab·R_bb⁻¹ what is left of it after it
has cancelled what the runs before have lost. So runs are written in order, each with the centroid that is nearest to T in the metric
R_bb·R_bbᵀ. Runs of one entry are GPTQ on levels that are not uniform. Given the indices, the error is quadratic in the centroids,
whatever the layer's inputs have in common, so these are then refitted (AQLM, Egiazarian et al. 2024, arXiv 2401.06118, section 3.3, has
a gradient for it; here it is conjugate gradients).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..decompositions.linalg import Float64
from ..moment import Moment
from .gptq import BLOCK, Feedback, Float32, row_chunks, taken

_STEPS = 8
"""Steps of conjugate gradients, from the centroids that the indices were chosen with; more of them gain next to nothing."""

_ENTRIES = 1 << 18
"""About how many entries of a weight the centroids are refitted on: there are few centroids."""


def round_runs(
    weight: Float64, scale: Float64, centroids: NDArray[np.generic], parts: tuple[Feedback, ...]
) -> tuple[NDArray[np.int16], Float64]:
    """Indices of a weight's runs whose errors cancel each other as far as the metric lets them.

    Args:
        weight: (groups, m, n) float64; a run is `entries` consecutive inputs, or what is left of them at the end.
        scale: of the same shape, positive, the same all along a run.
        centroids: (count, entries), in units of the scale.
        parts: from `feedback` with as many entries.

    Returns:
        Indices (groups, m, ⌈n/entries⌉) int16, and the squared error of each output (groups, m), in the metric that `feedback`
        regularized and cut into blocks.
    """
    entries = centroids.shape[1]
    groups, m, n = weight.shape
    index, errors = np.empty((groups, m, -(-n // entries)), np.int16), np.zeros((groups, m))
    for part in parts:
        runs = part.order[:, ::entries] // entries
        for rows in row_chunks(weight.shape):
            target, units = (taken(each, weight.shape, rows, part.order[:, :, None]) for each in (weight, scale))
            found, error = _round_in_order(target, units, centroids.astype(np.float32), part)
            np.put_along_axis(index[:, rows].transpose(0, 2, 1), runs[:, :, None], found, 1)
            errors[:, rows] += error
    return index, errors


def _round_in_order(weight: Float32, scale: Float32, centroids: Float32, part: Feedback) -> tuple[NDArray[np.int16], Float64]:
    """Indices (groups, runs, rows) and errors (groups, rows) of runs in order; weight and scale are (groups, k, rows)."""
    (groups, k, rows), entries = weight.shape, centroids.shape[1]
    index, lost = np.empty((groups, -(-k // entries), rows), np.int16), np.empty_like(weight)
    errors = np.zeros((groups, rows))
    width = max(1, BLOCK // entries) * entries
    for start in range(0, k, width):
        stop = min(start + width, k)
        target = weight[:, start:stop] + part.shares[:, :start, start:stop].transpose(0, 2, 1) @ lost[:, :start]
        for first in range(start, stop, entries):
            run = slice(first, min(first + entries, stop))
            root, costs = np.triu(part.shares[:, run, run], 1) + np.eye(run.stop - first, dtype=np.float32), part.costs[:, run]
            passed_on = target[:, first - start : run.stop - start] - weight[:, run]
            wanted = weight[:, run] + np.linalg.inv(root).transpose(0, 2, 1) @ passed_on
            unit, known = scale[:, first, :, None], centroids[:, : run.stop - first]
            found = _nearest(np.asarray(wanted.transpose(0, 2, 1) / unit, np.float32), root, costs, known)
            value = (known[found] * unit).transpose(0, 2, 1)
            index[:, first // entries], lost[:, run] = found, weight[:, run] - value
            errors += np.einsum("gk,gkr->gr", costs, np.square(root.transpose(0, 2, 1) @ (wanted - value), dtype=np.float64))
            target[:, run.stop - start :] += part.shares[:, run, run.stop : stop].transpose(0, 2, 1) @ lost[:, run]
    return index, errors


def _nearest(vectors: Float32, root: Float32, costs: Float64, centroids: Float32) -> NDArray[np.int64]:
    """The centroid c of least ‖(x − c)·U·C½‖² for each x of (groups, rows, entries); U is `root`, C has the costs (groups, entries)."""
    shares = (costs / np.maximum(costs.max(1, keepdims=True), np.finfo(np.float64).tiny)).astype(np.float32)
    metric = (root * shares[:, None, :]) @ root.transpose(0, 2, 1)
    spread = centroids @ metric
    own = np.einsum("gce,ce->gc", spread, centroids)
    return np.asarray((own[:, None, :] - 2 * vectors @ spread.transpose(0, 2, 1)).argmin(2))


def refit_centroids(
    weight: Float64, scale: Float64, index: NDArray[np.int16], centroids: NDArray[np.generic], moment: Moment, errors: Float64
) -> Float64:
    """Centroids (count, entries) that make the error of given indices small, in the metric of inputs and of each output by itself.

    Preconditioned conjugate gradients on the normal equations (Hestenes and Stiefel 1952), so that no matrix of them is ever formed. Of a
    large weight only some outputs take part: those with the largest errors, and others that stand for all the rest.

    Args:
        weight: (groups, m, n) float64.
        scale: of the same shape.
        index: of every run, (groups, m, runs).
        centroids: those that the indices were chosen with, (count, entries).
        moment: of the layer's input, not a diagonal one, regularized.
        errors: of each output as the indices were chosen, (groups, m).
    """
    some, counts = _sample(errors, weight.size)
    worth = counts * (1.0 if moment.outputs is None else moment.outputs.diag[:, some, None])
    metric = np.asarray(moment.matrix, np.float32)
    problem = _Normal(scale[:, some], index[:, some], (len(centroids), centroids.shape[1]), metric, worth)
    found = centroids.astype(np.float64)
    left = problem.gather(weight[:, some] - problem.spread(found))
    damping = problem.damping()
    scaled = step = left * damping
    size = float(np.vdot(left, scaled))
    for _ in range(_STEPS):
        image = problem.gather(problem.spread(step))
        curvature = float(np.vdot(step, image))
        if not curvature > 0:
            break
        found, left = found + size / curvature * step, left - size / curvature * image
        scaled, before = left * damping, size
        size = float(np.vdot(left, scaled))
        step = scaled + size / before * step
    return found


def _sample(errors: Float64, elements: int) -> tuple[NDArray[np.int64], Float64]:
    """Outputs that the centroids are fitted on, and how many each stands for, (k, 1)."""
    ranked = np.argsort(-errors.sum(0), kind="stable")
    step = max(1, elements // _ENTRIES)
    largest, others = np.split(ranked, [len(ranked) // (2 * step) if step > 1 else len(ranked)])
    some = others[step // 2 :: step]
    counts = np.full(len(some), len(others) / max(1, len(some)))
    return np.concatenate([largest, some]), np.concatenate([np.ones(len(largest)), counts])[:, None]


@dataclass(frozen=True, eq=False)
class _Normal:
    """The linear map S from centroids to a weight, and the metric M of errors: the normal equations are SᵀMS·c = SᵀM·W.

    Attributes:
        scale: (groups, m, n).
        index: (groups, m, runs).
        shape: of the centroids.
        metric: of inputs, (groups, n, n) float32.
        worth: of each output, broadcastable to (groups, m, 1).
    """

    scale: Float64
    index: NDArray[np.int16]
    shape: tuple[int, int]
    metric: Float32
    worth: Float64

    def spread(self, centroids: Float64) -> Float64:
        """S·c, (groups, m, n)."""
        return np.asarray(centroids[self.index].reshape(*self.index.shape[:2], -1)[:, :, : self.scale.shape[2]] * self.scale)

    def gather(self, weight: Float64) -> Float64:
        """SᵀM·W of the centroids' shape."""
        return self._sums((weight.astype(np.float32) @ self.metric) * self.worth * self.scale)

    def damping(self) -> Float64:
        """The reciprocal of the diagonal of SᵀMS; 0 for entries that stand for nothing."""
        diagonal = self._sums(np.square(self.scale) * self.worth * np.diagonal(self.metric, axis1=1, axis2=2)[:, None, :])
        return np.divide(1, diagonal, out=np.zeros(self.shape), where=diagonal > 0)

    def _sums(self, values: Float64) -> Float64:
        """Of (groups, m, n) over all that one entry of a centroid stands for."""
        sums, flat = np.zeros(self.shape), self.index.reshape(-1)
        whole = np.pad(values, ((0, 0), (0, 0), (0, self.index.shape[2] * self.shape[1] - values.shape[2])))
        for place in range(self.shape[1]):
            sums[:, place] = np.bincount(flat, whole[:, :, place :: self.shape[1]].reshape(-1), self.shape[0])
        return sums
