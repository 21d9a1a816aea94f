"""Which integers stand for a weight: chosen so that their errors cancel in what the layer computes."""

from __future__ import annotations

from .corrected import fit_corrected
from .correction import bias_shift
from .encoding import Problem, Reading, Rounding, encode
from .factors import factor_input
from .gptq import Levels, compensation, feedback, round_compensated

__all__ = [
    "Levels",
    "Problem",
    "Reading",
    "Rounding",
    "bias_shift",
    "compensation",
    "encode",
    "factor_input",
    "feedback",
    "fit_corrected",
    "round_compensated",
]
