"""What was expensive to find out, kept on disk: latencies, and what the analysis of each weight found.

One SQLite file in the user's cache folder, shared by any number of threads and processes. An entry is found by a namespace
and a key; the key has to name everything that the value depends on (see `digest`), so entries never need invalidating.

A cache never breaks a run: when the file is corrupt, locked for long, read-only or on a full disk, one warning is logged
and the rest of the run keeps its entries in memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import sqlite3
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

_FILE_NAME = "cache-v1.sqlite"  # a new schema gets a new name: versions can work side by side, and nothing is migrated
_BUSY_TIMEOUT_S = 10.0  # how long another process may hold the write lock
_MEMORY_LIMIT_BYTES = 256 << 20
_ENTRY_LIMIT_BYTES = 512 << 20  # SQLite holds at most 10^9 bytes in a value

_USER_DEFINED = 2  # numpy's mark of types like those of ml_dtypes

_JSON, _ARRAYS = "json", "arrays"
_SCHEMA = "CREATE TABLE IF NOT EXISTS {} (id INTEGER PRIMARY KEY, namespace TEXT, key TEXT, data BLOB, UNIQUE (namespace, key))"


class Cache:
    """Values by (namespace, key), JSON and arrays apart. Safe to share between threads; pickles as its folder."""

    def __init__(self, folder: Path | None, limit_bytes: int = 2 << 30) -> None:
        """Use the cache in a folder, which is made on first use.

        Args:
            folder: where the cache file lies; None keeps everything in memory. See `default_folder`.
            limit_bytes: most bytes of arrays to keep; beyond it the oldest go first. JSON values are small and stay.
        """
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._memory: dict[tuple[str, str, str], bytes] = {}
        self._lock = threading.Lock()
        self._in_memory = folder is None

    def __reduce__(self) -> tuple[type[Cache], tuple[Path | None, int]]:
        return Cache, (self._folder, self._limit_bytes)

    def get_json(self, namespace: str, key: str) -> Json:
        """Return what `put_json` stored, or None."""
        data = self._get(_JSON, namespace, key)
        if data is None:
            return None
        try:
            value: Json = json.loads(data)
        except ValueError:
            self._warn_damaged(namespace)
            return None
        return value

    def put_json(self, namespace: str, key: str, value: Json) -> None:
        """Store a JSON value, in place of an earlier one."""
        self._put(_JSON, namespace, key, json.dumps(value).encode())

    def get_array(self, namespace: str, key: str) -> NDArray[Any] | None:
        """Return the array that `put_array` stored, or None when there is none (any more)."""
        data = self._get(_ARRAYS, namespace, key)
        if data is None:
            return None
        try:
            array: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError, OSError):
            self._warn_damaged(namespace)
            return None
        return array

    def put_array(self, namespace: str, key: str, array: NDArray[Any]) -> None:
        """Store an array of one of numpy's own number types, in place of an earlier one; one above 512 MB is not kept.

        Raises:
            ValueError: an array of objects, or of a type that numpy's file format does not know (bfloat16).
        """
        if array.dtype.isbuiltin == _USER_DEFINED or array.dtype.kind not in "biufc":
            raise ValueError(f"cannot cache an array of {array.dtype}: expected one of numpy's own number types")
        if array.nbytes > min(_ENTRY_LIMIT_BYTES, self._limit_bytes):
            return
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        self._put(_ARRAYS, namespace, key, buffer.getvalue())

    def _get(self, table: str, namespace: str, key: str) -> bytes | None:
        if not self._in_memory:
            try:
                with self._database() as database:
                    row = database.execute(f"SELECT data FROM {table} WHERE namespace = ? AND key = ?", (namespace, key)).fetchone()
                return None if row is None else bytes(row[0])
            except (sqlite3.Error, OSError) as error:
                self._fall_back(error)
        return self._memory.get((table, namespace, key))

    def _put(self, table: str, namespace: str, key: str, data: bytes) -> None:
        if not self._in_memory:
            try:
                with self._database() as database:
                    database.execute(f"REPLACE INTO {table} (namespace, key, data) VALUES (?, ?, ?)", (namespace, key, data))
                    if table == _ARRAYS:
                        _evict(database, self._limit_bytes)
                return
            except (sqlite3.Error, OSError) as error:
                self._fall_back(error)
        with self._lock:
            self._memory.pop((table, namespace, key), None)
            self._memory[table, namespace, key] = data
            held_bytes = sum(map(len, self._memory.values()))
            while held_bytes > min(_MEMORY_LIMIT_BYTES, self._limit_bytes):
                held_bytes -= len(self._memory.pop(next(iter(self._memory))))

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """Open the file for one transaction. A connection per use needs no care with threads, forks and closing."""
        assert self._folder is not None
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with closing(sqlite3.connect(self._folder / _FILE_NAME, timeout=_BUSY_TIMEOUT_S)) as database, database:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = OFF")  # a power cut may cost the cache, never a run; a put takes 1 ms, not 20
            for table in (_JSON, _ARRAYS):
                database.execute(_SCHEMA.format(table))
            yield database

    def _fall_back(self, error: Exception) -> None:
        with self._lock:
            if not self._in_memory:
                self._in_memory = True
                log.warning(
                    "cache in %s does not work (%s) and is not used in this run; delete it or choose another",
                    self._folder,
                    error,
                )

    def _warn_damaged(self, namespace: str) -> None:
        log.warning(
            "cache in %s has a damaged %r entry, which is computed again; delete the cache if this repeats",
            self._folder,
            namespace,
        )


def _evict(database: sqlite3.Connection, limit_bytes: int) -> None:
    """Delete the oldest arrays until the rest fit the limit."""
    total_bytes = 0
    for identity, size_bytes in database.execute(f"SELECT id, length(data) FROM {_ARRAYS} ORDER BY id DESC").fetchall():
        total_bytes += size_bytes
        if total_bytes > limit_bytes:
            database.execute(f"DELETE FROM {_ARRAYS} WHERE id <= ?", (identity,))
            return


def default_folder() -> Path:
    """The user's cache folder: `INTAGLIO_CACHE` if set, else where the platform keeps caches."""
    chosen = os.environ.get("INTAGLIO_CACHE")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "intaglio" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "intaglio"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "intaglio"


def digest(*parts: Json) -> str:
    """A key for the cache: SHA-256, in hex, of the parts that a value depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
