"""Arithmetics: the ways in which operators can compute with narrow weights."""

from __future__ import annotations

from .base import Arithmetic, Operand
from .dynamic import DYNAMIC, merge_quantizers
from .integer import INTEGER
from .lstm import join
from .nbits import NBITS
from .rows import ROWS

ARITHMETICS: dict[str, Arithmetic] = {arithmetic.name: arithmetic for arithmetic in (INTEGER, DYNAMIC, NBITS, ROWS)}
"""Every arithmetic but floating point, by the name that plans and reports use. To add one: write its file, list it here."""

__all__ = ["ARITHMETICS", "Arithmetic", "Operand", "join", "merge_quantizers"]
