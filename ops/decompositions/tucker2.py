"""Tucker-2 of a convolution kernel: 1×1 to r₁ channels, the kernel from r₁ to r₂, 1×1 to all outputs (Kim et al., 2016).

W[o, c, k] ≈ Σ U[o, r₂]·G[r₂, r₁, k]·V[r₁, c]. Given V, the best U·G in a metric is a reduced-rank regression in closed
form: the leading eigenvectors of the output second moment that the prefix V explains. V starts from the input-side
unfolding in the metric's mean over positions (HOSVD) and is improved by alternating least squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..emit import Emitter
from ..families import Use
from ..families.conv import CONV, GEOMETRY
from ..moment import Moment
from ..view import MatrixView
from .als import SWEEPS, Regression, compose, metric_of, orthonormal, regress, start, update_factor
from .base import RIDGE, Ranks, Shape, UniformFactors, rank_grid
from .linalg import Float64, balance


@dataclass(frozen=True)
class Tucker2(UniformFactors):
    """Three Convs: 1×1, k×k, 1×1."""

    name: str = "tucker2"
    execution: str = "contract"

    def declines(self, use: Use) -> str | None:
        """Needs a kernel of several positions, one group, and more than one channel on both sides."""
        if use.node.op_type not in ("Conv", "FusedConv"):
            return "not a convolution kernel"
        if int(np.prod(use.view.shape[2:])) < 2:
            return "a 1×1 kernel: see lowrank"
        if use.view.groups > 1:
            return "a grouped kernel"
        return "fewer than two channels" if min(use.view.shape[:2]) < 2 else None

    def grid(self, use: Use) -> list[Ranks]:
        """Input and output ranks at like shares of their full ranks, and one step to either side."""
        inputs, outputs = (rank_grid(full, full, 6) for full in self.full(use))
        size = int(np.prod(use.view.shape))
        pairs = {
            (r1, r2)
            for i, r1 in enumerate(inputs)
            for j, r2 in enumerate(outputs)
            if abs(i / max(1, len(inputs) - 1) - j / max(1, len(outputs) - 1)) <= 0.21
        }
        return sorted(pair for pair in pairs if sum(int(np.prod(s)) for s in self.shapes(use, pair)) < size)

    def full(self, use: Use) -> Ranks:
        """(c, o), or less where the other axes together are shorter."""
        m, c, *kernel = use.view.shape
        return min(c, m * int(np.prod(kernel))), min(m, c * int(np.prod(kernel)))

    def errors(self, weight: Float64, moment: Moment, use: Use, ranks: Sequence[Ranks]) -> list[float]:
        """From the start, before the alternating sweeps: an upper bound.

        One regression prices every input rank, and one eigenproblem every output rank of an input rank.
        """
        total = moment.energy(weight)
        if not ranks or total <= 0:
            return [0.0] * len(ranks)
        metric, (_, c, *kernel) = metric_of(moment), use.view.shape
        weight = moment.whiten(weight)
        factor = start(weight[0], metric, c, max(r1 for r1, _ in ranks))
        explained = regress(factor, weight[0], metric).explained
        kept: dict[int, Float64] = {}
        for r1 in {r1 for r1, _ in ranks}:
            part = explained[: r1 * int(np.prod(kernel))]
            kept[r1] = np.cumsum(np.clip(np.linalg.eigvalsh(part.T @ part)[::-1], 0, None))
        return [max(0.0, 1 - float(kept[r1][r2 - 1]) / total) for r1, r2 in ranks]

    def shapes(self, use: Use, ranks: Ranks) -> tuple[Shape, ...]:
        """(r₁, c, 1…), (r₂, r₁, k…), (o, r₂, 1…)."""
        m, c, *kernel = use.view.shape
        ones = (1,) * len(kernel)
        return (ranks[0], c, *ones), (ranks[1], ranks[0], *kernel), (m, ranks[1], *ones)

    def axes(self, use: Use) -> tuple[int, ...]:
        """Output channels of each."""
        return 0, 0, 0

    def fit(self, weight: Float64, moment: Moment, use: Use, ranks: Ranks) -> tuple[Float64, ...]:
        """Alternating least squares: (U, G) in closed form, V by conjugate gradients."""
        metric, weight = metric_of(moment.regularized(RIDGE)), moment.whiten(weight)
        factor = start(weight[0], metric, use.view.shape[1], ranks[0])
        outputs, core = _reduced(regress(factor, weight[0], metric), ranks[1])
        for _ in range(SWEEPS):
            factor = orthonormal(update_factor(factor, core, outputs.T @ weight[0], metric))
            outputs, core = _reduced(regress(factor, weight[0], metric), ranks[1])
        outputs = moment.unwhiten(outputs[None])[0]
        scale = balance(np.linalg.norm(core, axis=1), np.linalg.norm(outputs, axis=0))
        shapes = self.shapes(use, ranks)
        return (
            factor.reshape(shapes[0]),
            (core * scale[:, None]).reshape(shapes[1]),
            (outputs / scale).reshape(shapes[2]),
        )

    def prefix(self, use: Use, factors: Sequence[Float64]) -> Float64:
        """The core applied to the input factor."""
        r1, r2 = factors[0].shape[0], factors[1].shape[0]
        return compose(factors[1].reshape(r2, -1), factors[0].reshape(r1, -1))[None]

    def last_view(self, use: Use, ranks: Ranks) -> MatrixView:
        """(o, r₂)."""
        shape = self.shapes(use, ranks)[2]
        return MatrixView(shape, 1, shape[0], ranks[1], True)

    def emit(self, emitter: Emitter, use: Use, factors: Sequence[str], output: str) -> None:
        """The middle node has the geometry; the last keeps bias, fused activation and name of the original."""
        narrow = emitter.node("Conv", [use.node.input[0], factors[0]])
        hidden = emitter.node("Conv", [narrow, factors[1]])
        emitter.nodes[-1].attribute.extend(a for a in use.node.attribute if a.name in GEOMETRY)
        CONV.emit_last(emitter, use, hidden, factors[2])


def _reduced(regression: Regression, rank: int) -> tuple[Float64, Float64]:
    """Reduced-rank regression: U (o, r₂) with orthonormal columns and G (r₂, q), so that U·G is the best map of rank r₂."""
    outputs = np.asarray(np.linalg.eigh(regression.explained.T @ regression.explained)[1][:, ::-1][:, :rank])
    return outputs, outputs.T @ regression.outputs()


TUCKER2 = Tucker2()
