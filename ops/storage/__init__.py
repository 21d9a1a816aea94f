"""How an array lies in the file, and the program that expands it when the model is loaded."""

from __future__ import annotations

from .base import Storage
from .floating import HALF, SAME
from .integer import INT4, INT8

STORAGES: dict[str, Storage] = {storage.name: storage for storage in (SAME, HALF, INT8, INT4)}
"""Every storage, by the name that plans and reports use. To add one: write its file, list it here."""

__all__ = ["STORAGES", "Storage"]
