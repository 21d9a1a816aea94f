"""Tucker-2 of a convolution kernel: 1×1 to r₁ channels, the kernel from r₁ to r₂, 1×1 to all outputs (Kim et al., 2016).

W[o, c, k] ≈ Σ U[o, r₂]·G[r₂, r₁, k]·V[r₁, c]. Given V, the best U·G in a metric is a reduced-rank regression in closed form: the
leading eigenvectors of the output second moment that the prefix V explains. V starts from the input-side unfolding, weighted by the
channel energies (HOSVD), and is improved by alternating least squares.
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
from .als import full, update_factor
from .base import RIDGE, Float64, Ranks, Shape, explained, least_squares, rank_grid

SWEEPS = 2
"""Rounds of alternating least squares; the error falls little after the second."""


@dataclass(frozen=True)
class _Lift:
    """V (r₁, c) → P ((r₁, k), (c, k'))."""

    rank: int
    channels: int
    positions: int

    def times(self, factor: Float64, metric: Float64) -> Float64:
        n = metric.shape[1]
        return (factor @ metric.reshape(self.channels, self.positions * n)).reshape(self.rank * self.positions, n)

    def adjoint(self, gradient: Float64) -> Float64:
        return np.einsum("rkck->rc", gradient.reshape(self.rank, self.positions, self.channels, self.positions))

    def matrix(self, factor: Float64) -> Float64:
        return np.kron(factor, np.eye(self.positions))


@dataclass(frozen=True)
class Tucker2:
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
        m, c = use.view.shape[:2]
        inputs, outputs = rank_grid(c, c, 6), rank_grid(m, m, 6)
        size = int(np.prod(use.view.shape))
        pairs = {
            (r1, r2)
            for i, r1 in enumerate(inputs)
            for j, r2 in enumerate(outputs)
            if abs(i / max(1, len(inputs) - 1) - j / max(1, len(outputs) - 1)) <= 0.21
        }
        return sorted(pair for pair in pairs if sum(int(np.prod(s)) for s in self.shapes(use, pair)) < size)

    def full(self, use: Use) -> Ranks:
        """(c, o)."""
        return use.view.shape[1], use.view.shape[0]

    def _start(self, weight: Float64, moment: Moment, use: Use, rank: int) -> Float64:
        """Leading input-channel components of W, each channel weighted by its energy: (r₁, c)."""
        m, c = use.view.shape[:2]
        unfolded = weight[0].reshape(m, c, -1)
        if moment.diagonal:
            metric = np.diag(moment.matrix[0].reshape(c, -1).mean(1))
        else:
            metric = np.einsum("ckdk->cd", moment.matrix[0].reshape(c, unfolded.shape[2], c, -1)) / unfolded.shape[2]
        values, vectors = np.linalg.eigh(metric)
        keep = np.maximum(values, values.max() * 1e-8 + np.finfo(np.float64).tiny)
        root, inverse = (vectors * np.sqrt(keep)) @ vectors.T, (vectors / np.sqrt(keep)) @ vectors.T
        half = np.einsum("mck,cd->mkd", unfolded, root).reshape(-1, c)
        leading = np.linalg.eigh(half.T @ half)[1][:, ::-1][:, :rank]
        return np.asarray(leading.T @ inverse)

    def errors(self, weight: Float64, moment: Moment, use: Use, ranks: Sequence[Ranks]) -> list[float]:
        """From the start, before the alternating sweeps: one eigenproblem prices every output rank of an input rank."""
        total = moment.energy(weight)
        if not ranks or total <= 0:
            return [0.0] * len(ranks)
        start = self._start(weight, moment, use, max(r1 for r1, _ in ranks))
        kept: dict[int, Float64] = {}
        for r1 in sorted({r1 for r1, _ in ranks}):
            values = np.linalg.eigvalsh(explained(weight, moment, self._lift(use, r1).matrix(start[:r1])[None])[0])
            kept[r1] = np.cumsum(np.clip(values[::-1], 0, None))
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
        moment = full(moment.regularized(RIDGE), use.view.n)
        lift = self._lift(use, ranks[0])
        factor = self._start(weight, moment, use, ranks[0])
        outputs, core = self._outputs(weight, moment, lift.matrix(factor)[None], ranks[1])
        for _ in range(SWEEPS):
            factor = update_factor(lift, factor, outputs @ core, weight[0], moment)
            factor = np.linalg.qr(factor.T)[0].T  # a change of basis that the core takes up
            outputs, core = self._outputs(weight, moment, lift.matrix(factor)[None], ranks[1])
        scale = np.sqrt(np.maximum(np.linalg.norm(core, axis=1), np.finfo(np.float64).tiny))
        shapes = self.shapes(use, ranks)
        return factor.reshape(shapes[0]), (core / scale[:, None]).reshape(shapes[1]), (outputs * scale).reshape(shapes[2])

    @staticmethod
    def _outputs(weight: Float64, moment: Moment, prefix: Float64, rank: int) -> tuple[Float64, Float64]:
        """Reduced-rank regression on a prefix: U (o, r₂) with orthonormal columns and G (r₂, q)."""
        outputs = np.linalg.eigh(explained(weight, moment, prefix)[0])[1][:, ::-1][:, :rank]
        return outputs, outputs.T @ least_squares(weight, moment, prefix)[0]

    def prefix(self, use: Use, factors: Sequence[Float64]) -> Float64:
        """The core applied to the input factor."""
        r1, r2 = factors[0].shape[0], factors[1].shape[0]
        return np.einsum("srk,rc->sck", factors[1].reshape(r2, r1, -1), factors[0].reshape(r1, -1)).reshape(1, r2, -1)

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

    @staticmethod
    def _lift(use: Use, rank: int) -> _Lift:
        return _Lift(rank, use.view.shape[1], int(np.prod(use.view.shape[2:])))


TUCKER2 = Tucker2()
