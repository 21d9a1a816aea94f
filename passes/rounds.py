"""Compress in rounds: approach a far budget step by step, and look at the model anew after each.

A round chooses forms for a part of the way, tunes what they hold against the original, and puts what they decode to back into the
original's graph (`passes.decoded`). The next round starts from these weights: it gathers their statistics, and prices, chooses and fits
them like those of any model. A weight that was cut to some rank has nothing beyond it to lose, so a choice stands where it was right and
is made again where it was not. All rounds are taught and judged by the original.

Budgets of size and latency are approached in equal ratios: three rounds to a hundredth go by 0.22 and 0.046.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

from intaglio.solver import Budget

from .analyse import analyse
from .budget import Request, resolve
from .cache import Cache
from .decoded import continued
from .errors import InfeasibleError, InputError
from .job import Job
from .options import Progress, silent
from .search import searched, taught
from .tuning import AUTO, asked_steps

log = logging.getLogger(__name__)

LONGEST_STEP = 6.0
"""Times that `--rounds auto` shrinks a model in one round, at most."""

MOST = 4
"""Rounds of `--rounds auto` at most."""


@dataclass(frozen=True)
class Round:
    """One round before the last.

    Attributes:
        budget: that it chose for.
        size_bytes: of its plan.
        divergence: from the original on the choose split, before it was tuned.
        tuned: the same once it was tuned.
        interrupted: whether the user stopped it; the last round is not tuned then.
    """

    budget: Budget
    size_bytes: int
    divergence: float
    tuned: float
    interrupted: bool = False


def asked_rounds(given: str | int | None, request: Request, tune: str | int | None) -> int | str | None:
    """The value of `--rounds`: a number, "auto", or None for a single one.

    Raises:
        InputError: it is neither, or there is nothing that could be approached in rounds.
    """
    if given is None:
        return None
    try:
        number = given if given == AUTO else int(given)
    except ValueError:
        number = 0
    if isinstance(number, int) and number < 1:
        raise InputError(f"--rounds {given}: expected a number from 1, or {AUTO}")
    if request.size is None and request.latency is None:
        raise InputError(f"--rounds {given}: rounds approach a size or a latency; give --size or --latency")
    if request.preset is not None or request.drop is not None:
        raise InputError(f"--rounds {given}: presets have rounds of their own; leave one of them out")
    if asked_steps(tune) is None:
        raise InputError(f"--rounds {given}: each round ends by tuning; give --tune STEPS, or --tune {AUTO}")
    return None if number == 1 else number


def approached(job: Job, request: Request, cache: Cache, *, timed: bool, progress: Progress = silent) -> tuple[Job, tuple[Round, ...]]:
    """Make every round but the last: the job to go on with, and what was done.

    A user's interrupt ends the rounds; the last one goes on from what there is, untuned.

    Args:
        job: the job; it is returned as it is where one round is enough.
        request: the budgets.
        cache: of analyses.
        timed: whether forms are timed.
        progress: shows how far each part is.

    Raises:
        InputError: a budget or the number of rounds cannot be read.
    """
    asked = asked_rounds(job.settings.rounds, request, job.settings.tune)
    done: list[Round] = []
    number, total = 1, 2
    while asked is not None and number < total:
        menu = analyse(job, cache, latency=timed, progress=progress)
        budget = resolve(request, job.original.size_bytes, menu.base)
        total = _count(budget, menu.base.size_bytes, menu.base.latency_s) if isinstance(asked, str) else asked
        if number >= total:
            break
        step = _part(budget, menu.base.size_bytes, menu.base.latency_s, number / total)
        try:
            attempt = searched(job, menu, step, job.sizes(), progress)
        except InfeasibleError as error:
            log.info("round %d of %d is left out: %s", number, total, error)
            break
        better, result = taught(job, attempt, progress)
        interrupted = result is not None and result.interrupted
        done.append(Round(step, job.sizes().total(attempt.plan.forms), attempt.measured, better.measured, interrupted))
        log.info("round %d of %d: divergence %.6g, tuned %.6g", number, total, attempt.measured, better.measured)
        job = continued(better.job, better.plan.forms, better.fitted)
        if interrupted:
            job = replace(job, settings=replace(job.settings, tune=None))
            break
        number += 1
    return job, tuple(done)


def _count(budget: Budget, size_bytes: float, latency_s: float) -> int:
    """Rounds for a budget: as many as keep each of them within `LONGEST_STEP` in size and half of that in latency."""
    shrink = 1.0 if budget.size_bytes is None else size_bytes / budget.size_bytes
    hurry = 1.0 if budget.latency_s is None else latency_s / budget.latency_s
    steps = max(math.log(shrink) / math.log(LONGEST_STEP), math.log(hurry) / math.log(LONGEST_STEP / 2))
    return min(MOST, max(1, math.ceil(steps)))


def _part(budget: Budget, size_bytes: float, latency_s: float, share: float) -> Budget:
    """The budget of a round, a share of the way from the original to the last one's; what diverges may do so in the end only."""
    size = None if budget.size_bytes is None else min(size_bytes, size_bytes ** (1 - share) * budget.size_bytes**share)
    latency = None if budget.latency_s is None else min(latency_s, latency_s ** (1 - share) * budget.latency_s**share)
    return Budget(size, latency, None, "error")
