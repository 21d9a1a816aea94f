"""Reverse-mode rules: for each operator, the nodes that carry gradients from its outputs to its inputs. One file per operator family."""

from __future__ import annotations

from .arithmetic import RULES as _ARITHMETIC
from .base import MIN_OPSET, Call, Gradients, Names, Rule, Rules, Tape, Unsupported, Value

RULES: Rules = {**_ARITHMETIC}
"""Every rule by operator type; "domain::type" outside the default domain."""

__all__ = ["MIN_OPSET", "RULES", "Call", "Gradients", "Names", "Rule", "Rules", "Tape", "Unsupported", "Value"]
