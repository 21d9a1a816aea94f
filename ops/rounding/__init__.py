"""Which integers stand for a weight: chosen so that their errors cancel in what the layer computes."""

from __future__ import annotations

from .correction import bias_shift
from .encode import Problem, Reading, Rounding, encode
from .factors import factor_input
from .gptq import feedback, round_compensated

__all__ = ["Problem", "Reading", "Rounding", "bias_shift", "encode", "factor_input", "feedback", "round_compensated"]
