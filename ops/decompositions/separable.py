"""Separable (spatial) decomposition of a two-dimensional kernel: k×1 to r channels, then 1×k.

W[o, c, i, j] ≈ Σ_r U[o, r, j]·V[r, c, i] (Jaderberg et al., 2014; AIMET's spatial SVD). Without a metric this is the SVD of
the (o·j) × (c·i) unfolding; with one, the same in the metric's mean over j is the start of alternating least squares. The
vertical factor carries the vertical stride, dilation and padding, the horizontal one the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..emit import Emitter
from ..families import Use
from ..moment import Moment
from ..view import MatrixView
from .als import SWEEPS, metric_of, orthonormal, regress, start, update_factor
from .base import RIDGE, Ranks, Shape, UniformFactors, rank_grid
from .linalg import Float64, balance


@dataclass(frozen=True)
class Separable(UniformFactors):
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

    def errors(self, weight: Float64, moment: Moment, use: Use, ranks: Sequence[Ranks]) -> list[float]:
        """From the start, before the alternating sweeps: an upper bound. One regression prices every rank."""
        total = moment.energy(weight)
        if not ranks or total <= 0:
            return [0.0] * len(ranks)
        metric, (_, c, rows, columns) = metric_of(moment), use.view.shape
        weight = moment.whiten(weight)
        factor = start(weight[0], metric, c * rows, max(r for (r,) in ranks))
        kept = np.cumsum(np.square(regress(factor, weight[0], metric).explained).sum(axis=1))
        return [max(0.0, 1 - float(kept[r * columns - 1]) / total) for (r,) in ranks]

    def shapes(self, use: Use, ranks: Ranks) -> tuple[Shape, ...]:
        """(r, c, i, 1) and (o, r, 1, j)."""
        m, c, rows, columns = use.view.shape
        return (ranks[0], c, rows, 1), (m, ranks[0], 1, columns)

    def axes(self, use: Use) -> tuple[int, ...]:
        """Output channels of each."""
        return 0, 0

    def fit(self, weight: Float64, moment: Moment, use: Use, ranks: Ranks) -> tuple[Float64, ...]:
        """Alternating least squares from the weighted SVD."""
        metric, (m, c, rows, _) = metric_of(moment.regularized(RIDGE)), use.view.shape
        weight = moment.whiten(weight)
        factor = start(weight[0], metric, c * rows, ranks[0])
        outputs = regress(factor, weight[0], metric).outputs()
        for _ in range(SWEEPS):
            factor = orthonormal(update_factor(factor, outputs, weight[0], metric))
            outputs = regress(factor, weight[0], metric).outputs()
        outputs = moment.unwhiten(outputs[None])[0]
        shapes = self.shapes(use, ranks)
        scale = balance(np.linalg.norm(factor, axis=1), np.linalg.norm(outputs.reshape(m, ranks[0], -1), axis=(0, 2)))
        first, last = factor * scale[:, None], outputs.reshape(m, ranks[0], -1) / scale[:, None]
        return first.reshape(shapes[0]), last.reshape(shapes[1])

    def prefix(self, use: Use, factors: Sequence[Float64]) -> Float64:
        """The vertical factor at every horizontal position."""
        return np.asarray(np.kron(factors[0].reshape(len(factors[0]), -1), np.eye(use.view.shape[3]))[None])

    def last_view(self, use: Use, ranks: Ranks) -> MatrixView:
        """(o, (r, j))."""
        shape = self.shapes(use, ranks)[1]
        return MatrixView(shape, 1, shape[0], int(np.prod(shape[1:])), True)

    def emit(self, emitter: Emitter, use: Use, factors: Sequence[str], output: str) -> None:
        """The geometry is split by axis; auto_pad works on each axis by itself."""
        vertical: dict[str, int | float | str | list[int]] = {}
        horizontal: dict[str, int | float | str | list[int]] = {}
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


SEPARABLE = Separable()
