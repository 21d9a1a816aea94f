"""Which integers stand for a weight: codes or indices, chosen so that their errors cancel in what the layer computes."""

from __future__ import annotations

from .corrected import fit_corrected
from .correction import bias_shift
from .encoding import Problem, Reading, Rounding, compensates, encode
from .factors import factor_input
from .gptq import Levels, compensation, feedback, round_compensated
from .tabular import refit_centroids, round_runs

__all__ = [
    "Levels",
    "Problem",
    "Reading",
    "Rounding",
    "bias_shift",
    "compensates",
    "compensation",
    "encode",
    "factor_input",
    "feedback",
    "fit_corrected",
    "refit_centroids",
    "round_compensated",
    "round_runs",
]
