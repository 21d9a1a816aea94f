"""How an array lies in the file, and the program that expands it when the model is loaded."""

from __future__ import annotations

from .base import IntegerWeight, ScalarStorage, Storage, TableStorage, is_scalar, is_tabular, readers
from .codebook import CODEBOOKS
from .floating import HALF, SAME
from .grid import Grid
from .native import INT4_NATIVE
from .nbits import NBITS
from .planes import PLANES
from .requantize import LARGEST, requantize, requantized
from .rows import ROW_NIBBLES
from .sparse import SPARSE
from .table import Table
from .uniform import UNIFORM, limited
from .vector import VECTORS

_EVERY: tuple[Storage, ...] = (SAME, HALF, *UNIFORM, INT4_NATIVE, *PLANES, *SPARSE, *CODEBOOKS, *VECTORS, ROW_NIBBLES, *NBITS)

STORAGES: dict[str, Storage] = {storage.name: storage for storage in _EVERY}
"""Every storage, by the name that plans and reports use. To add one: write its file, list it here."""

__all__ = [
    "LARGEST",
    "STORAGES",
    "Grid",
    "IntegerWeight",
    "ScalarStorage",
    "Storage",
    "Table",
    "TableStorage",
    "is_scalar",
    "is_tabular",
    "limited",
    "readers",
    "requantize",
    "requantized",
]
