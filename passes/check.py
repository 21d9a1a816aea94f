"""Find bad settings before anything slow begins."""

from __future__ import annotations

from intaglio.solver import Cost

from .budget import Request, resolve
from .errors import InputError
from .job import Settings
from .metric import METRICS
from .ranges import METHODS
from .session import check_providers
from .targets import TARGETS


def check_settings(settings: Settings) -> None:
    """Raise for a setting that is wrong whatever the model is.

    Raises:
        InputError: an unknown name, or a number out of range.
    """
    if settings.target not in TARGETS:
        raise InputError(f"--target {settings.target}: unknown; expected one of {', '.join(TARGETS)}")
    settings.allowed()
    if settings.ranges not in ("auto", *METHODS):
        raise InputError(f"--ranges {settings.ranges}: unknown; expected one of auto, {', '.join(METHODS)}")
    check_providers(settings.runtime.providers)
    if settings.runtime.threads < 1:
        raise InputError(f"--threads {settings.runtime.threads}: expected at least 1; give the number of cores to use")
    if settings.samples is not None and settings.samples < 1:
        raise InputError(f"--samples {settings.samples}: expected at least 1; leave it out to use all samples")
    if settings.seed < 0:
        raise InputError(f"--seed {settings.seed}: expected a whole number from 0")
    if settings.labels is not None and settings.metric not in METRICS:
        raise InputError(f"--metric {settings.metric}: unknown; expected one of {', '.join(METRICS)}")


def check_request(request: Request) -> None:
    """Raise for a budget that cannot be read, whatever the model is.

    Raises:
        InputError: there is none, it is malformed, or it is no limit at all.
    """
    resolve(request, 1, Cost(1, 1.0, 0.0))
