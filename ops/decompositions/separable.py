"""Separable (spatial) decomposition of a two-dimensional kernel: k×1 to r channels, then 1×k (Jaderberg et al., 2014; AIMET's spatial SVD).

W[o, c, i, j] ≈ Σ_r U[o, r, j]·V[r, c, i]. Without a metric this is the SVD of the (c·i) × (o·j) unfolding; with one, that start is
improved by alternating least squares. The vertical factor carries the vertical stride, dilation and padding, the horizontal one the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..emit import Emitter
from ..families import Use
from ..moment import Moment
from ..view import MatrixView
from .als import full, update_factor
from .base import RIDGE, Float64, Ranks, Shape, explained, least_squares, rank_grid

SWEEPS = 2
"""Rounds of alternating least squares; the error falls little after the second."""


@dataclass(frozen=True)
class _Lift:
    """V (r, c, i) → P ((r, j), (c, i, j'))."""

    rank: int
    channels: int
    kernel: tuple[int, int]

    def times(self, factor: Float64, metric: Float64) -> Float64:
        rows, columns = self.kernel
        n = metric.shape[1]
        folded = metric.reshape(self.channels * rows, columns * n)
        return (factor.reshape(self.rank, -1) @ folded).reshape(self.rank * columns, n)

    def adjoint(self, gradient: Float64) -> Float64:
        rows, columns = self.kernel
        folded = gradient.reshape(self.rank, columns, self.channels, rows, columns)
        return np.einsum("rjcij->rci", folded)

    def matrix(self, factor: Float64) -> Float64:
        rows, columns = self.kernel
        return np.einsum("rci,jk->rjcik", factor, np.eye(columns)).reshape(self.rank * columns, -1)


@dataclass(frozen=True)
class Separable:
    """Two Convs with one-dimensional kernels."""

    name: str = "separable"
    execution: str = "contract"

    def declines(self, use: Use) -> str | None:
        """Needs a kernel larger than one in both directions, one group, and paddings that split by axis."""
        if use.node.op_type not in ("Conv", "FusedConv"):
            return "not a convolution kernel"
        kernel = use.view.shape[2:]
        if len(kernel) != 2 or min(kernel) < 2:
            return f"a kernel of shape {list(kernel)} does not separate"
        return "a grouped kernel" if use.view.groups > 1 else None

    def grid(self, use: Use) -> list[Ranks]:
        """Below the rank at which the factors are as large as the weight."""
        m, c, rows, columns = use.view.shape
        return [(r,) for r in rank_grid((m * c * rows * columns - 1) / (c * rows + m * columns), self.full(use)[0], 8)]

    def full(self, use: Use) -> Ranks:
        """min(c·i, o·j)."""
        m, c, rows, columns = use.view.shape
        return (min(c * rows, m * columns),)

    def _start(self, weight: Float64, moment: Moment, use: Use, rank: int) -> Float64:
        """Leading vertical components of W, each input channel and row weighted by its energy: (r, c, i)."""
        m, c, rows, columns = use.view.shape
        energy = moment.matrix[0] if moment.diagonal else np.diagonal(moment.matrix[0])
        scale = np.sqrt(np.maximum(energy.reshape(c, rows, columns).mean(2), np.finfo(np.float64).tiny))
        unfolded = (weight[0].reshape(m, c, rows, columns) * scale[None, :, :, None]).transpose(1, 2, 0, 3).reshape(c * rows, m * columns)
        vectors = np.linalg.eigh(unfolded @ unfolded.T)[1][:, ::-1][:, :rank]
        return np.asarray(vectors.T.reshape(rank, c, rows) * scale)

    def errors(self, weight: Float64, moment: Moment, use: Use, ranks: Sequence[Ranks]) -> list[float]:
        """From the start, before the alternating sweeps: an upper bound."""
        total = moment.energy(weight)
        start = self._start(weight, moment, use, max(r for (r,) in ranks)) if ranks else None
        result = []
        for (rank,) in ranks:
            lift = self._lift(use, rank)
            kept = explained(weight, moment, lift.matrix(start[:rank] if start is not None else np.zeros(0))[None])
            result.append(max(0.0, 1 - float(np.trace(kept[0])) / total) if total > 0 else 0.0)
        return result

    def shapes(self, use: Use, ranks: Ranks) -> tuple[Shape, ...]:
        """(r, c, i, 1) and (o, r, 1, j)."""
        m, c, rows, columns = use.view.shape
        return (ranks[0], c, rows, 1), (m, ranks[0], 1, columns)

    def axes(self, use: Use) -> tuple[int, ...]:
        """Output channels of each."""
        return 0, 0

    def fit(self, weight: Float64, moment: Moment, use: Use, ranks: Ranks) -> tuple[Float64, ...]:
        """Alternating least squares from the weighted SVD."""
        moment = full(moment.regularized(RIDGE), use.view.n)
        lift = self._lift(use, ranks[0])
        factor = self._start(weight, moment, use, ranks[0])
        outputs = least_squares(weight, moment, lift.matrix(factor)[None])
        for _ in range(SWEEPS):
            factor = update_factor(lift, factor, outputs[0], weight[0], moment)
            outputs = least_squares(weight, moment, lift.matrix(factor)[None])
        shapes = self.shapes(use, ranks)
        norms = np.linalg.norm(factor, axis=(1, 2)), np.linalg.norm(outputs.reshape(use.view.m, ranks[0], -1), axis=(0, 2))
        scale = np.sqrt(np.divide(norms[1], norms[0], out=np.ones_like(norms[0]), where=(norms[0] > 0) & (norms[1] > 0)))
        first, last = factor.reshape(shapes[0]), outputs[0].reshape(shapes[1])
        return first * scale[:, None, None, None], last / scale[None, :, None, None]

    def prefix(self, use: Use, factors: Sequence[Float64]) -> Float64:
        """The vertical factor at every horizontal position."""
        rank = factors[0].shape[0]
        return self._lift(use, rank).matrix(factors[0].reshape(rank, *use.view.shape[1:3]))[None]

    def last_view(self, use: Use, ranks: Ranks) -> MatrixView:
        """(o, (r, j))."""
        shape = self.shapes(use, ranks)[1]
        return MatrixView(shape, 1, shape[0], int(np.prod(shape[1:])), True)

    def emit(self, emitter: Emitter, use: Use, factors: Sequence[str], output: str) -> None:
        """The geometry is split by axis; auto_pad works on each axis by itself."""
        vertical: dict[str, int | float | str | list[int]] = {}
        horizontal: dict[str, list[int] | int] = {}
        for name, neutral in (("strides", 1), ("dilations", 1)):
            values = use.ints(name, [1, 1])
            vertical[name], horizontal[name] = [values[0], neutral], [neutral, values[1]]
        drop = []
        if use.text("auto_pad", "NOTSET") in ("NOTSET", ""):
            top, left, bottom, right = use.ints("pads", [0, 0, 0, 0])
            vertical["pads"], horizontal["pads"] = [top, 0, bottom, 0], [0, left, 0, right]
            drop = ["auto_pad"]
        else:
            vertical["auto_pad"] = use.text("auto_pad", "NOTSET")
        if use.has("kernel_shape"):
            horizontal["kernel_shape"] = [1, use.view.shape[3]]
        hidden = emitter.node("Conv", [use.node.input[0], factors[0]], attributes=vertical)
        emitter.copy(use.node, {0: hidden, 1: factors[1]}, drop=drop, attributes=horizontal)

    @staticmethod
    def _lift(use: Use, rank: int) -> _Lift:
        return _Lift(rank, use.view.shape[1], (use.view.shape[2], use.view.shape[3]))


SEPARABLE = Separable()
