"""Which channels to give up, what that costs, and how the layers that read them are refitted.

A layer W reads n inputs, `block` of them per channel (the kernel's positions of a Conv, the image's behind a Flatten), whose second moment
is A. Keeping the inputs K, the best layer is Ŵ = W·A[:, K]·A[K, K]⁻¹: every dropped input is predicted linearly from the kept ones, and
‖(W − Ŵ)A½‖² is what the layer's output still loses. Channels are chosen by greedy backward elimination of this loss; each step costs what
the optimal brain surgeon says for a block of weights (Hassibi and Stork, "Second order derivatives for network pruning", 1993), summed
over all layers that read the channel. Refitting the readers in closed form is from He, Zhang and Sun, "Channel pruning for accelerating
very deep neural networks", arXiv 1707.06168, equation 1.

Every function measures inputs in units of their own root mean square, so results do not depend on how channels are scaled, and adds
`RIDGE`, so that duplicate and dead channels are no special case. A moment of few rows should be regularized before (`Moment.shrunk`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

from .decompositions.linalg import Float64, lower_root, solve_lower
from .moment import Moment

Int64 = NDArray[np.int64]

Consumer: TypeAlias = tuple[Float64, Moment, int]
"""Weight (1, m, n) and moment (n inputs) of a layer that reads the channels, and its inputs per channel."""

RIDGE = 1e-9
"""Added to every input's mean square, relative to it: far below what float32 weights resolve, far above rounding in double precision."""

_SILENT = 1e-12
"""Inputs with less energy than this share of the mean are measured in units of that share: nothing divides by zero."""

_PANEL = 128
"""Columns of updates that are collected before they are applied to whole matrices at once."""


def channel_order(consumers: Sequence[Consumer]) -> Int64:
    """The channels in the order in which to give them up; keeping k of them means keeping the last k.

    Greedy: each step drops the channel whose loss adds least to the sum of the consumers' relative output errors, all of them refitted.
    O(n³) for each consumer, mostly matrix products.

    Args:
        consumers: every layer that reads the channels.

    Returns:
        (channels,) int64, a permutation; ties go to the lower channel.

    Raises:
        ValueError: no consumer, or consumers that disagree about the number of channels.
    """
    counts = {_channels(weight, block) for weight, _, block in consumers}
    if len(counts) != 1:
        raise ValueError(f"consumers of {sorted(counts)} channels, expected one number of channels")
    (count,) = counts
    states = [_Elimination.begin(*consumer) for consumer in consumers]
    slots, alive = np.arange(count), np.ones(count, dtype=bool)
    order: list[int] = []
    while len(order) < count:
        scores = np.full(len(slots), np.inf)
        scores[alive] = sum((state.losses(alive) for state in states), np.zeros(int(alive.sum())))
        slot = int(np.argmin(scores))
        order.append(int(slots[slot]))
        alive[slot] = False
        for state in states:
            state.drop(slot)
        if any(state.full for state in states):
            for state in states:
                state.compact(alive)
            slots, alive = slots[alive], np.ones(int(alive.sum()), dtype=bool)
    return np.array(order, np.int64)


def pruning_errors(weight: Float64, moment: Moment, block: int, order: Int64, counts: Sequence[int]) -> list[float]:
    """‖(W − Ŵ)A½‖² / ‖W A½‖² of the refitted weight for each number of channels kept; one factorization serves all.

    With the inputs sorted by importance and A = L·Lᵀ, column j of W·L is what input j adds to the output beyond the inputs before it.

    Args:
        weight: (1, m, n).
        moment: of its n inputs.
        block: inputs per channel.
        order: from `channel_order`.
        counts: numbers of channels kept, from 0 to all.
    """
    _channels(weight, block)
    matrix, gram, _ = _scaled(weight, moment)
    energy = _energy(matrix, gram)
    if energy <= 0:
        return [0.0 for _ in counts]
    inputs = block_indices(order[::-1], block)
    root = lower_root(gram[np.ix_(inputs, inputs)], RIDGE)
    lost = np.append(np.cumsum(np.square(matrix[:, inputs] @ root).sum(0)[::-1])[::-1], 0.0)
    return [float(lost[count * block]) / energy for count in counts]


def refit(weight: Float64, moment: Moment, block: int, kept: Int64) -> Float64:
    """Ŵ = W·A[:, K]·A[K, K]⁻¹: the layer on the kept channels alone that is nearest to the whole one.

    Args:
        weight: (1, m, n).
        moment: of its n inputs; a diagonal one predicts nothing, so the weight is only cut.
        block: inputs per channel.
        kept: channels, (k,) int64, ascending.

    Returns:
        (1, m, k·block) float64.

    Raises:
        ValueError: `kept` is empty, not ascending or out of range.
    """
    channels = _channels(weight, block)
    check_kept(kept, channels)
    if moment.diagonal or len(kept) == channels:
        return np.asarray(weight[:, :, block_indices(kept, block)], np.float64)
    matrix, gram, scale = _scaled(weight, moment)
    inside = block_indices(kept, block)
    outside = np.setdiff1d(np.arange(weight.shape[2]), inside)
    root = lower_root(gram[np.ix_(inside, inside)], RIDGE)
    moved = matrix[:, outside] @ gram[np.ix_(outside, inside)]
    moved = solve_lower(root, solve_lower(root, moved.T), transposed=True).T
    return np.asarray((matrix[:, inside] + moved) / scale[inside])[None]


def spread(weight: Float64, block: int, kept: Int64, channels: int) -> Float64:
    """A refitted weight (1, m, k·block) among zeros for the dropped channels: (1, m, channels·block), comparable with the original."""
    whole = np.zeros((*weight.shape[:2], channels * block))
    whole[:, :, block_indices(kept, block)] = weight
    return whole


def block_indices(channels: Int64, block: int) -> Int64:
    """Positions of the channels' entries where each channel has `block` of them in a row: (k·block,) int64."""
    return np.asarray((channels[:, None] * block + np.arange(block)).reshape(-1), np.int64)


def check_kept(kept: Int64, channels: int) -> None:
    """Raise ValueError unless `kept` holds at least one of `channels` channels, ascending."""
    if kept.ndim != 1 or len(kept) == 0 or kept[0] < 0 or kept[-1] >= channels or (np.diff(kept) <= 0).any():
        raise ValueError(f"kept channels {kept.tolist()}, expected ascending numbers from 0 to {channels - 1}, at least one")


@dataclass
class _Elimination:
    """One consumer while its channels are given up one after another.

    `inverse` is A[S, S]⁻¹ and `gram` is ŴᵀŴ of the refitted weight Ŵ over the inputs S that were left at the last `compact`, both
    (q, q). What has changed since is held as left·leftᵀ and right·leftᵀ + left·rightᵀ, to be subtracted; only the diagonal blocks,
    (channels, block, block), are always up to date.
    """

    inverse: Float64
    gram: Float64
    block: int
    energy: float
    left: Float64 = field(init=False)
    right: Float64 = field(init=False)
    width: int = field(init=False)
    inverse_blocks: Float64 = field(init=False)
    gram_blocks: Float64 = field(init=False)

    @classmethod
    def begin(cls, weight: Float64, moment: Moment, block: int) -> _Elimination:
        """With all channels in place, where Ŵ = W."""
        matrix, gram, _ = _scaled(weight, moment)
        return cls(_inverse(gram), matrix.T @ matrix, block, _energy(matrix, gram))

    def __post_init__(self) -> None:
        size, channels = len(self.inverse), len(self.inverse) // self.block
        self.left = np.empty((size, max(_PANEL, self.block)))
        self.right = np.empty_like(self.left)
        self.width = 0
        shape = (channels, self.block, channels, self.block)
        index = np.arange(channels)
        self.inverse_blocks = self.inverse.reshape(shape)[index, :, index]
        self.gram_blocks = self.gram.reshape(shape)[index, :, index]

    @property
    def full(self) -> bool:
        """Whether there is no room for another drop's updates."""
        return bool(self.width + self.block > self.left.shape[1])

    def losses(self, alive: NDArray[np.bool_]) -> Float64:
        """What dropping each channel that is alive adds to the relative error: tr(Ŵ_c · (A⁻¹)_cc⁻¹ · Ŵ_cᵀ)."""
        if self.energy <= 0:
            return np.zeros(int(alive.sum()))
        ratio = np.linalg.solve(self.inverse_blocks[alive], self.gram_blocks[alive])
        return np.asarray(np.maximum(np.trace(ratio, axis1=1, axis2=2), 0.0) / self.energy)

    def drop(self, slot: int) -> None:
        """Eliminate a channel B: A⁻¹ loses H_B·H_BB⁻¹·H_Bᵀ and Ŵ loses Ŵ_B·H_BB⁻¹·H_Bᵀ, with H = A⁻¹."""
        rows = slice(slot * self.block, (slot + 1) * self.block)
        left, right = self.left[:, : self.width], self.right[:, : self.width]
        inverse = self.inverse[rows].T - left @ left[rows].T
        gram = self.gram[rows].T - right @ left[rows].T - left @ right[rows].T
        root = lower_root(inverse[rows])
        core = solve_lower(root, solve_lower(root, gram[rows]).T)
        new_left = solve_lower(root, inverse.T).T
        new_right = solve_lower(root, gram.T).T - 0.5 * new_left @ core
        self.left[:, self.width : self.width + self.block] = new_left
        self.right[:, self.width : self.width + self.block] = new_right
        self.width += self.block
        cubes = new_left.reshape(-1, self.block, self.block), new_right.reshape(-1, self.block, self.block)
        cross = cubes[1] @ cubes[0].transpose(0, 2, 1)
        self.inverse_blocks -= cubes[0] @ cubes[0].transpose(0, 2, 1)
        self.gram_blocks -= cross + cross.transpose(0, 2, 1)

    def compact(self, alive: NDArray[np.bool_]) -> None:
        """Apply the updates, and forget the channels that are gone."""
        rows = np.flatnonzero(np.repeat(alive, self.block))
        left, right = self.left[rows, : self.width], self.right[rows, : self.width]
        self.inverse = self.inverse[np.ix_(rows, rows)]
        self.inverse -= left @ left.T
        self.gram = self.gram[np.ix_(rows, rows)]
        cross = right @ left.T
        self.gram -= cross
        self.gram -= cross.T
        self.__post_init__()


def _channels(weight: Float64, block: int) -> int:
    """Number of channels that a weight (1, m, n) reads."""
    if weight.ndim != 3 or weight.shape[0] != 1 or weight.shape[2] % block:
        raise ValueError(f"weight of shape {list(weight.shape)}, expected (1, m, n) with n a multiple of {block}")
    return int(weight.shape[2]) // block


def _scaled(weight: Float64, moment: Moment) -> tuple[Float64, Float64, Float64]:
    """Weight (m, n), moment (n, n) and units (n,), all in units of each input's root mean square."""
    diagonal = moment.diag[0]
    mean = float(diagonal.mean())
    scale = np.sqrt(np.maximum(diagonal, _SILENT * mean if mean > 0 else 1.0))
    gram = np.diag(diagonal) if moment.diagonal else moment.matrix[0]
    return np.asarray(weight[0] * scale), np.asarray(gram / scale[:, None] / scale), scale


def _energy(matrix: Float64, gram: Float64) -> float:
    """tr(W A Wᵀ)."""
    return float(np.einsum("mn,mn->", matrix @ gram, matrix))


def _inverse(gram: Float64) -> Float64:
    """(A + ridge)⁻¹, symmetric to the last bit."""
    lower, _ = lapack.dpotri(lower_root(gram, RIDGE), lower=1)
    lower = np.tril(lower)
    return np.asarray(lower + np.tril(lower, -1).T)
