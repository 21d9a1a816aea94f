"""Outputs of the command line: refused before the work starts, written all at once when it is done."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from intaglio.passes.errors import InputError


def check_output(path: Path, suffix: str, protected: Sequence[Path]) -> None:
    """Raise unless a file can be written there.

    Args:
        path: the file.
        suffix: its expected extension.
        protected: files that must not be overwritten.

    Raises:
        InputError: the extension is another, the file is protected or a folder, or its folder is missing or cannot be written.
    """
    if path.suffix != suffix:
        raise InputError(f"output {path}: expected a name that ends in {suffix}; rename it")
    if path.is_dir():
        raise InputError(f"output {path}: it is a folder; name a file in it")
    if path.exists() and any(known.exists() and path.samefile(known) for known in protected):
        raise InputError(f"output {path}: it is an input of this command, which is kept; choose another name")
    if not path.parent.is_dir():
        raise InputError(f"output {path}: there is no folder {path.parent}; create it or choose another")
    _check_writable(path.parent, f"output {path}")


def check_folder(path: Path) -> None:
    """Raise unless files can be written to a folder, which need not exist yet.

    Raises:
        InputError: something else is there, or it cannot be written.
    """
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise InputError(f"--report {path}: {existing} is not a folder; choose another")
    _check_writable(existing, f"--report {path}")


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all; missing folders are made.

    Raises:
        InputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".intaglio-", dir=path.parent) as scratch:
            new = Path(scratch, path.name)
            with new.open("x", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; free space or choose another folder") from error


def _check_writable(folder: Path, what: str) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{what}: {folder} cannot be written ({error.strerror}); choose another folder") from error
