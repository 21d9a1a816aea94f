"""Operator families: every operator whose weight can become a site."""

from __future__ import annotations

from .base import Family, GramRequest, Use
from .conv import CONV, CONV_TRANSPOSE
from .gather import GATHER
from .gemm import GEMM
from .matmul import MATMUL
from .recurrent import RECURRENT

FAMILIES: dict[tuple[str, str], Family] = {
    key: family for family in (MATMUL, GEMM, CONV, CONV_TRANSPOSE, GATHER, RECURRENT) for key in family.op_types
}
"""(domain, op_type) → family. To add one: write its file, list it here."""

__all__ = ["FAMILIES", "Family", "GramRequest", "Use"]
