"""Find bad settings before anything slow begins."""

from __future__ import annotations

import math

from intaglio.solver import Cost

from .augment import AUGMENTATIONS
from .budget import Request, resolve
from .curvature import CURVATURES
from .errors import InputError
from .job import Settings
from .kernels import INTEGERS
from .metric import METRICS
from .presets import goal_of
from .ranges import METHODS
from .rounds import asked_rounds
from .session import check_providers
from .targets import TARGETS
from .tuning import asked_steps


def check_settings(settings: Settings) -> None:
    """Raise for a setting that is wrong whatever the model is.

    Raises:
        InputError: an unknown name, or a number out of range.
    """
    if settings.target not in TARGETS:
        raise InputError(f"--target {settings.target}: unknown; expected one of {', '.join(TARGETS)}")
    settings.allowed()
    if settings.integers not in ("auto", *INTEGERS):
        raise InputError(f"--integers {settings.integers}: unknown; expected one of auto, {', '.join(INTEGERS)}")
    if settings.ranges not in ("auto", *METHODS):
        raise InputError(f"--ranges {settings.ranges}: unknown; expected one of auto, {', '.join(METHODS)}")
    if settings.curvature not in CURVATURES:
        raise InputError(f"--curvature {settings.curvature}: unknown; expected {' or '.join(CURVATURES)}")
    check_providers(settings.runtime.providers)
    if settings.runtime.threads < 1:
        raise InputError(f"--threads {settings.runtime.threads}: expected at least 1; give the number of cores to use")
    if settings.samples is not None and settings.samples < 1:
        raise InputError(f"--samples {settings.samples}: expected at least 1; leave it out to use all samples")
    if settings.seed < 0:
        raise InputError(f"--seed {settings.seed}: expected a whole number from 0")
    _check_tuning(settings)
    if settings.labels is not None and settings.metric not in METRICS:
        raise InputError(f"--metric {settings.metric}: unknown; expected one of {', '.join(METRICS)}")


def _check_tuning(settings: Settings) -> None:
    steps = asked_steps(settings.tune)
    unknown = [name for name in settings.augment if name not in AUGMENTATIONS]
    if unknown:
        raise InputError(f"--augment {unknown[0]}: unknown; expected some of {', '.join(AUGMENTATIONS)}")
    if not 0 <= settings.tune_labels < math.inf:
        raise InputError(f"--tune-labels {settings.tune_labels}: expected a weight from 0; for example 0.5")
    if settings.tune_labels and settings.labels is None:
        raise InputError("--tune-labels: it needs labels; name the array of the data that holds them with --labels")
    if settings.tune_labels and "mixup" in settings.augment:
        raise InputError("--augment mixup: mixed images have no label; leave out mixup or --tune-labels")
    if steps is None and (settings.augment or settings.tune_labels):
        raise InputError("--augment and --tune-labels belong to tuning; give --tune a number of steps, or auto")


def check_request(request: Request) -> None:
    """Raise for a budget or a preset that cannot be read, whatever the model is.

    Raises:
        InputError: there is none, it is malformed, it is no limit at all, or it does not go with the others.
    """
    goal = goal_of(request)
    if goal is None:
        resolve(request, 1, Cost(1, 1.0, 0.0))
    elif goal.size is not None:
        resolve(Request(size=goal.size), 1, Cost(1, 1.0, 0.0))


def check_together(request: Request, settings: Settings) -> None:
    """Raise where settings do not go with what is asked for.

    Raises:
        InputError: a preset without labels or with tuning, or rounds that have nothing to approach.
    """
    asked_rounds(settings.rounds, request, settings.tune)
    if goal_of(request) is not None and settings.labels is None:
        raise InputError("--preset and --drop need labels; name the array of the data that holds them with --labels")
    if goal_of(request) is not None and asked_steps(settings.tune) is not None:
        raise InputError("--tune: it does not go with --preset and --drop; give a --size, --latency or --error to tune for")
