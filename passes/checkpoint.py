"""A file from which a long computation goes on after it was stopped."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

KEPT = 4
"""Most checkpoints of one kind in a folder. Those of runs that nobody goes on with are never asked for again."""


class Checkpoint:
    """Arrays by name in one file, which at any time is a whole state or is not there.

    A checkpoint never breaks a run: what cannot be written is logged once, what cannot be read counts as absent. The oldest of a kind make
    room for a new one: of files whose names are alike up to the first hyphen, `KEPT` stay.
    """

    def __init__(self, path: Path) -> None:
        """Use a file, whose folder is made on first use."""
        self.path = path
        self._saved_s = time.monotonic()
        self._warned = False

    def is_due(self, seconds: float) -> bool:
        """Whether the last state is older than that."""
        return time.monotonic() - self._saved_s >= seconds

    def save(self, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """Put a state in place of the last one."""
        self._saved_s = time.monotonic()
        partial = None
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path.parent, suffix=".part", delete=False) as file:
                partial = Path(file.name)
                np.savez(file, **arrays)  # type: ignore[arg-type]  # its own keywords are not among the names
            os.replace(partial, self.path)
            self._make_room()
        except OSError as error:
            if not self._warned:
                self._warned = True
                log.warning("cannot write checkpoint %s (%s); an interrupted run will start again", self.path, error)
        finally:
            if partial is not None:
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)

    def _make_room(self) -> None:
        """Remove the oldest others of the same kind."""
        kind = self.path.stem.partition("-")[0]
        others = [path for path in self.path.parent.glob(f"{glob.escape(kind)}-*{self.path.suffix}") if path != self.path]
        for path in sorted(others, key=_age_key, reverse=True)[KEPT - 1 :]:
            with contextlib.suppress(OSError):
                path.unlink()

    def load(self) -> dict[str, NDArray[np.generic]] | None:
        """The last state; None where there is none that can be read."""
        try:
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        except FileNotFoundError:
            return None
        except Exception as error:  # what zipfile and NumPy make of damaged bytes has no common type
            log.warning("checkpoint %s cannot be read (%s) and is not used", self.path, error)
            return None

    def remove(self) -> None:
        """Forget the state."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def _age_key(path: Path) -> float:
    """When a file was written; zero if it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def fingerprint(words: Sequence[str], arrays: Sequence[NDArray[np.generic]] = ()) -> str:
    """SHA-256, in hex, of what a state depends on."""
    digest = hashlib.sha256()
    for word in words:
        digest.update(f"{len(word)}:{word}".encode())
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
