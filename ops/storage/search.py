"""The search for scales: the clipping that loses least when values are rounded to the nearest level."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .grid import single
from .scaling import Partition

_CHUNK = 1 << 17
"""Entries that are worked on at once: small enough for a processor's cache, large enough that NumPy's overhead is lost."""

_RATIOS = 21
"""Clipping ratios that are tried."""


def clipping_ratios(levels: int) -> NDArray[np.float64]:
    """Steps to try, as shares of the step that clips nothing; fewer levels are worth more clipping."""
    if levels > 100:
        return np.linspace(1.0, 0.8, 9)
    return np.linspace(1.0, 0.12 if levels <= 4 else 0.25 if levels <= 8 else 0.4, _RATIOS)


def search_scales(
    array: NDArray[np.generic],
    partition: Partition,
    lowest: int,
    highest: int,
    rounded: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    importance: NDArray[np.float64] | None,
    shifted: bool,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales, and zero points of shifted grids, that minimise the (weighted) squared rounding error over a range of clipping ratios.

    Args:
        array: finite values of any float type.
        partition: which of them share a scale.
        lowest: the smallest code.
        highest: the largest code.
        rounded: scales as they can be written.
        importance: weights of squared errors, broadcastable to `array`; None for ones.
        shifted: whether the range need not be symmetric: the step is then a share of the range, from the smallest to the largest value.

    Returns:
        Scales and zeros, float32 of shape `partition.scales`. The scale is 0 where a group is all zero.
    """
    every = None if importance is None else _rows(np.broadcast_to(importance, array.shape), partition)
    ratios = clipping_ratios(highest - lowest + 1)
    scales, zeros = [], []
    for rows in _rows(array, partition):
        values = single(rows)
        peak = np.abs(values).max(axis=1)
        divisor = np.where(peak > 0, peak, np.float32(1))
        values /= divisor[:, None]
        weights = None if every is None else _shares(next(every))
        candidates = _shifted_candidates if shifted else _symmetric_candidates
        steps, origins = candidates(values, lowest, highest, ratios)
        steps = np.stack([rounded(step * divisor) / divisor for step in steps]).astype(np.float32)
        best = _best(values, steps, origins, (lowest, highest), weights)
        rank = np.arange(len(values))
        scales.append(steps[best, rank] * peak)
        zeros.append(origins[best, rank])
    return np.concatenate(scales).reshape(partition.scales), np.concatenate(zeros).reshape(partition.scales)


def _rows(array: NDArray[Any], partition: Partition) -> Iterator[NDArray[Any]]:
    """The groups of a partition in order, as rows (k, entries), some at a time."""
    groups, axes = partition.groups(array)
    step = max(1, _CHUNK * len(groups) // groups.size)
    for start in range(0, len(groups), step):
        chunk = groups[start : start + step]
        yield chunk.reshape(int(np.prod(chunk.shape[:axes])), -1)


def _shares(weights: NDArray[np.float64]) -> NDArray[np.float32]:
    """Weights, scaled to at most 1."""
    return (weights / max(float(weights.max()), np.finfo(np.float64).tiny)).astype(np.float32)


def _symmetric_candidates(
    values: NDArray[np.float32], lowest: int, highest: int, ratios: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Steps and zeros, (ratios, k) each, for rows (k, entries) of largest magnitude 1."""
    steps = np.broadcast_to((ratios / highest).astype(np.float32)[:, None], (len(ratios), len(values)))
    return steps, np.zeros(steps.shape, np.float32)


def _shifted_candidates(
    values: NDArray[np.float32], lowest: int, highest: int, ratios: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Steps and zeros, (ratios, k) each, for ranges that hold zero."""
    low, high = np.minimum(values.min(axis=1), 0), np.maximum(values.max(axis=1), 0)
    full = np.where(high > low, (high - low) / (highest - lowest), np.float32(1))
    steps = (ratios[:, None] * full).astype(np.float32)
    middle = (low + high) / 2
    zeros = np.clip(np.rint((lowest + highest) / 2 - middle / steps), lowest, highest)
    return steps, zeros.astype(np.float32)


def _best(
    values: NDArray[np.float32],
    steps: NDArray[np.float32],
    zeros: NDArray[np.float32],
    bounds: tuple[int, int],
    weights: NDArray[np.float32] | None,
) -> NDArray[np.intp]:
    """Which candidate, of (candidates, k) steps and zeros, rounds each row of (k, entries) with the least squared error."""
    errors, work, limited = np.empty(steps.shape, np.float32), np.empty_like(values), np.empty_like(values)
    for error, step, zero in zip(errors, steps, zeros, strict=True):
        safe = np.maximum(step, np.float32(1e-30))[:, None]
        np.multiply(values, 1 / safe, out=work)
        np.rint(work, out=limited)
        np.clip(limited, bounds[0] - zero[:, None], bounds[1] - zero[:, None], out=limited)
        limited -= work
        if weights is None:
            np.einsum("ij,ij->i", limited, limited, out=error)
        else:
            np.einsum("ij,ij,ij->i", limited, limited, weights, out=error)
        error *= np.square(np.minimum(step, 1e15))
    return np.asarray(errors.argmin(axis=0))
