"""Intaglio cuts ONNX models down: `compress`, `inspect`, `plan`, `apply`, `verify` and `bench`, as on the command line.

Names are imported when they are first used, so that `import intaglio` is fast.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import apply, bench, compress, inspect, plan, verify
    from .passes.cache import default_folder
    from .passes.errors import InfeasibleError, InputError, IntaglioError, VerificationError
    from .passes.facts import Report
    from .passes.job import Settings
    from .passes.options import Runtime
    from .passes.plan import Plan
    from .passes.report import Result

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before anything imports onnxruntime

__version__ = "0.1.0"

_HOMES = {
    "api": ("apply", "bench", "compress", "inspect", "plan", "verify"),
    "passes.cache": ("default_folder",),
    "passes.errors": ("InfeasibleError", "InputError", "IntaglioError", "VerificationError"),
    "passes.options": ("Runtime",),
    "passes.job": ("Settings",),
    "passes.plan": ("Plan",),
    "passes.facts": ("Report",),
    "passes.report": ("Result",),
}

__all__ = [
    "InfeasibleError",
    "InputError",
    "IntaglioError",
    "Plan",
    "Report",
    "Result",
    "Runtime",
    "Settings",
    "VerificationError",
    "apply",
    "bench",
    "compress",
    "default_folder",
    "inspect",
    "plan",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
