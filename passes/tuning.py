"""When and on what a compressed model is tuned: the user's settings, turned into one run of `tune`.

Statistics, prices and fits need a few hundred samples, gradients as many as there are. With `--samples`, the samples that it leaves over
serve as lessons, but for a tenth that joins the choose split to judge what was learnt; the verify split takes no part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from intaglio.ops.form import Form

from .build import Fitted
from .errors import InputError
from .job import Job, Settings
from .options import Progress, silent
from .tune import TuneResult, tune
from .tune_options import TuneOptions, check_options

AUTO = "auto"

_AUTO_EPOCHS = 12
_AUTO_STEPS = (300, 3000)
"""Steps of `--tune auto`: so many passes over the lessons, within bounds; it ends early where nothing gets better."""

_AUTO_PATIENCE = 12

_BLOCK_SHARE = 1 / 3
"""Share of the steps in which blocks are taught by themselves, before the whole model is.

On a pruned CIFAR ResNet, 60 such steps lower the divergence by 23 %, 240 of the whole model by 15 %.
"""

_GENTLE_RATES = (1e-4, 3e-4)
"""Rates for codes of what was taught in floats: they lie near the best already, and are only to make good what rounding took."""

_STEPS_BETWEEN = 12
_FEWEST_EVALUATIONS = 4
"""Steps between evaluations at least, if that leaves some: on the samples that judge, one takes as long as several steps."""

_MOST_JUDGES = 1024
"""Most of the samples that are left over by which tuning is judged, not taught."""


def asked_steps(given: str | int | None) -> int | str | None:
    """The value of `--tune`: a number of steps, "auto", or None for no tuning.

    Raises:
        InputError: it is neither.
    """
    if given is None or given == AUTO:
        return given
    try:
        steps = int(given)
    except ValueError:
        steps = -1
    if steps < 0:
        raise InputError(f"--tune {given}: expected a number of steps, or {AUTO}")
    return steps or None


def fewest_steps(given: str | int | None) -> int:
    """Steps that `--tune` asks for; the fewest of what "auto" may make, and 0 for no tuning."""
    steps = asked_steps(given)
    return _AUTO_STEPS[0] if isinstance(steps, str) else steps or 0


def check_tuning(job: Job) -> None:
    """Refuse settings of tuning that cannot be followed, before anything costly is done; nothing where they ask for no tuning.

    Raises:
        InputError: see `asked_steps` and `check_options`.
    """
    if asked_steps(job.settings.tune) is not None:
        check_options(job, _options(job.settings))


def _options(settings: Settings) -> TuneOptions:
    return TuneOptions(augmentations=settings.augment, labels=settings.tune_labels)


def lessons_of(job: Job) -> Job:
    """The job with the samples that `samples` leaves over dealt to its choose split, a tenth of them, and to its fit split.

    Plans differ by what shows on a hundred samples; what tuning gains from one measurement to the next does not.
    """
    splits = job.splits
    rest = np.setdiff1d(np.arange(len(job.data)), np.concatenate([splits.fit, splits.choose, splits.verify]))
    rest = np.random.default_rng((job.settings.seed, 5)).permutation(rest)
    held = min(len(rest) // 10, _MOST_JUDGES)
    choose, fit = np.sort(np.concatenate([splits.choose, rest[:held]])), np.sort(np.concatenate([splits.fit, rest[held:]]))
    return replace(job, splits=replace(splits, fit=fit, choose=choose))


def tuned(
    job: Job, forms: Mapping[str, Form], fitted: Fitted, *, share: float = 1.0, again: bool = False, progress: Progress = silent
) -> TuneResult | None:
    """Tune what was fitted as the settings say; None where they do not ask for it.

    Args:
        job: the job.
        forms: of the plan.
        fitted: from `fit_forms(keep=True)`.
        share: of the steps that the settings ask for.
        again: whether this has been taught before, in floats: then the whole model is taught gently, and no block by itself.
        progress: shows how far it is.

    Raises:
        InputError: as `check_tuning`.
    """
    steps = asked_steps(job.settings.tune)
    if steps is None:
        return None
    taught = lessons_of(job)
    options = _options(job.settings)
    if isinstance(steps, str):
        least, most = _AUTO_STEPS
        steps = int(np.clip(_AUTO_EPOCHS * len(taught.splits.fit) / options.batch, least, most))
        options = replace(options, patience=_AUTO_PATIENCE)
    steps = max(1, round(share * steps))
    blocks = 0 if again else int(_BLOCK_SHARE * steps)
    steps -= blocks
    evaluations = int(np.clip(steps // _STEPS_BETWEEN, _FEWEST_EVALUATIONS, options.evaluations))
    options = replace(options, block_steps=blocks, evaluations=evaluations)
    options = replace(options, rates=_GENTLE_RATES, bold=False) if again else options
    with job.clock.phase("tune"):
        judged = replace(job, splits=replace(job.splits, choose=taught.splits.choose))
        return tune(judged, forms, fitted, steps=steps, options=options, lessons=taught, progress=progress)
