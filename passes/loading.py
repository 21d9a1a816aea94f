"""What loading a model costs: seconds and memory, each measured in a process of its own.

Weights that are stored in few bits are expanded when a session is created. That takes time and, for a moment, memory; a file's size shows
neither.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import intaglio

from .errors import InputError
from .session import CPU, open_session

_REPEATS = 3
_TIMEOUT_S = 600
_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


@dataclass(frozen=True)
class Loading:
    """What loading took.

    Attributes:
        seconds: to create a session.
        peak_bytes: most resident memory of the process above what it took before.
    """

    seconds: float
    peak_bytes: int


def measure_loading(path: Path, *, threads: int = 1, providers: Sequence[str] = (CPU,)) -> Loading:
    """Load a model in a fresh process, a few times, and take the medians.

    Raises:
        InputError: it does not load.
    """
    command = [sys.executable, "-m", "intaglio.passes.loading", str(path), str(threads), *providers]
    paths = [str(Path(intaglio.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]  # a checkout need not be installed
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    runs = []
    for _ in range(_REPEATS):
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S, env=environment)
        if answer.returncode != 0:
            last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"model {path}: a fresh process cannot load it ({last}); check memory and the file")
        runs.append(json.loads(answer.stdout.splitlines()[-1]))
    return Loading(median(run[0] for run in runs), int(median(run[1] for run in runs)))


def _resident_bytes(field: str) -> int:
    """Resident memory of this process as Linux reports it: "VmRSS" now, "VmHWM" at most since the last reset."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def _start_bytes() -> int:
    """Resident memory now, with the recorded peak set back to it where the system can do that: imports have peaks of their own."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _resident_bytes("VmRSS")
    return _highest_bytes()


def _highest_bytes() -> int:
    with contextlib.suppress(OSError):
        return _resident_bytes("VmHWM")

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT_BYTES


def _main(path: str, threads: str, *providers: str) -> None:
    """Load one model in this process and print seconds and bytes."""
    before_bytes, start_s = _start_bytes(), time.perf_counter()
    session = open_session(Path(path), threads=int(threads), providers=providers)
    seconds = time.perf_counter() - start_s
    print(json.dumps([seconds, max(0, _highest_bytes() - before_bytes)]))
    del session


if __name__ == "__main__":
    _main(*sys.argv[1:])
