"""Decompositions: how a weight falls into factors, and how the factors run."""

from __future__ import annotations

from .base import Decomposition, rebuild, refit_last
from .lowrank import CHANNEL_SVD, CHANNEL_SVD_DENSE, LOW_RANK, LOW_RANK_DENSE
from .residual import RESIDUAL, RESIDUAL_BESIDE
from .separable import SEPARABLE
from .tucker2 import TUCKER2

DECOMPOSITIONS: dict[tuple[str, str], Decomposition] = {
    (d.name, d.execution): d
    for d in (LOW_RANK, LOW_RANK_DENSE, CHANNEL_SVD, CHANNEL_SVD_DENSE, SEPARABLE, TUCKER2, RESIDUAL, RESIDUAL_BESIDE)
}
"""(name, execution) → decomposition. To add one: write its file, list it here."""

__all__ = [
    "CHANNEL_SVD",
    "CHANNEL_SVD_DENSE",
    "DECOMPOSITIONS",
    "LOW_RANK",
    "LOW_RANK_DENSE",
    "RESIDUAL",
    "RESIDUAL_BESIDE",
    "SEPARABLE",
    "TUCKER2",
    "Decomposition",
    "rebuild",
    "refit_last",
]
