"""How an array lies in the file, and the program that expands it when the model is loaded."""

from __future__ import annotations

from .base import IntegerWeight, ScalarStorage, Storage, is_scalar
from .floating import HALF, SAME
from .grid import Grid
from .requantize import requantize, requantized
from .uniform import UNIFORM

STORAGES: dict[str, Storage] = {storage.name: storage for storage in (SAME, HALF, *UNIFORM)}
"""Every storage, by the name that plans and reports use. To add one: write its file, list it here."""

__all__ = ["STORAGES", "Grid", "IntegerWeight", "ScalarStorage", "Storage", "is_scalar", "requantize", "requantized"]
