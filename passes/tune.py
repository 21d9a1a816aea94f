"""Tuning: teach a compressed model what the original says, by gradients, with ONNX Runtime as the only engine.

Before: a plan's forms, fitted. After: the same forms with other codes and factors of exactly the same bytes, and other biases and scales of
normalizations. The student (`passes.student`) is differentiated with its loss by `passes.differentiate`; each step rounds the latent
parameters to what can be written, runs the student and its reverse pass on a batch of fit samples (`passes.course`), and moves the latents
by Adam. Blocks of the model may be taught one after the other before the whole is (`passes.blockwise`).

No labels are needed. What counts is the divergence on choose samples, measured every few steps on the rounded parameters: the best ones
win, the given ones included, so tuning never makes it worse. A student that cannot be taught is left as it is, with the reason.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from intaglio import __version__
from intaglio.ops.form import Form

from .adam import Adam, schedule
from .bases import Bases
from .blockwise import BlockPoint, Blockwise
from .build import Fitted
from .checkpoint import Checkpoint, fingerprint
from .course import Course, open_course
from .errors import InputError
from .interrupts import deferred
from .job import Job
from .options import Progress, silent
from .session import RUNTIME_VERSION
from .student import make_student
from .tune_options import TuneOptions, check_options

log = logging.getLogger(__name__)

_TRIAL_SHARE = 0.2
"""Share of the steps that finding the rate may take, over all rates together."""

_TRIAL_STEPS = (12, 40)
"""Fewest and most steps that a rate is tried for."""

_HARMLESS = 1.1
"""Divergence after a trial, relative to that at the start, up to which a rate is harmless."""

_RECOVERABLE, _LONG = 1.3, 10
"""The same for runs that are so many times as long as a trial: they make good what high rates lose at first.

On a pruned CIFAR ResNet, 240 steps at 1e-3 end 7 % below those at 3e-4, although their first 60 raise the divergence; on a VGG-16 in floats
at a hundredth of its bytes, 40 steps at 1e-3 end 17 % above the start, and 320 of 400 steps 18 % below it.
"""


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        step: after how many steps.
        loss: mean over the steps since the last measurement; not a number at the start, and after blocks were taught.
        divergence: on choose samples, of the rounded parameters.
        seconds: since the first step of this run.
    """

    step: int
    loss: float
    divergence: float
    seconds: float


@dataclass(frozen=True, eq=False)
class TuneResult:
    """A tuned plan.

    Attributes:
        fitted: the best arrays found; the ones given where `improved` is False.
        improved: whether any were better than the ones given.
        before: divergence of the student on choose samples at the start; not a number where that was not measured.
        after: the same of `fitted`.
        history: what was measured, in order; empty where nothing was.
        steps: how many were made, those of an earlier run that was resumed included.
        rate: the highest rate; 0 where none was chosen.
        steps_per_s: training alone, without measurements; 0 where no step was made.
        interrupted: whether the user stopped it.
        skipped: site name → why its arrays were not tuned.
        reason: why nothing was tuned, or why tuning ended early; None where neither is so.
        blocks: what teaching blocks by themselves reached, in order.
        unrounded: what teaching in floats reached before, and whether that was kept (`improved`); None where it was not tried.
    """

    fitted: Fitted
    improved: bool
    before: float
    after: float
    history: tuple[Point, ...]
    steps: int
    rate: float
    steps_per_s: float
    interrupted: bool = False
    skipped: Mapping[str, str] = field(default_factory=dict)
    reason: str | None = None
    blocks: tuple[BlockPoint, ...] = ()
    unrounded: TuneResult | None = None


def tune(
    job: Job,
    forms: Mapping[str, Form],
    fitted: Fitted,
    *,
    steps: int,
    options: TuneOptions | None = None,
    lessons: Job | None = None,
    progress: Progress = silent,
) -> TuneResult:
    """Tune what was fitted.

    A KeyboardInterrupt ends it early, with the best so far, whenever it comes. With a cache folder, a call with equal arguments goes on
    where an earlier one was stopped, bit by bit; a run that came to its end leaves nothing there.

    Args:
        job: the job.
        forms: of the plan.
        fitted: from `fit_forms(keep=True)`.
        steps: how many to make.
        options: how.
        lessons: the job with other fit samples to be taught on; those of `job`, by which `finish` calibrates ranges, if None.
        progress: shows how far it is.

    Raises:
        InputError: an option asks for what is unknown or cannot be done (`check_options`).
    """
    options = options or TuneOptions()
    if steps < 1:
        raise InputError(f"tuning: {steps} steps, expected at least 1; give more, or do not tune")
    check_options(job, options)
    try:
        student = make_student(job, forms, fitted, constants=options.constants, scales=options.scales)
        course = open_course(job, student, options, lessons)
        if isinstance(course, str):
            log.info("not tuned: %s", course)
            return replace(untouched(fitted), skipped=student.skipped, reason=course)
        run = _Run(course, steps, _checkpoint(lessons or job, forms, fitted, steps, options))
    except KeyboardInterrupt:
        return untouched(fitted, interrupted=True)
    return run.go(progress)


def untouched(fitted: Fitted, *, interrupted: bool = False) -> TuneResult:
    """Of a plan that nothing was learnt of."""
    return TuneResult(fitted, False, math.nan, math.nan, (), 0, 0.0, 0.0, interrupted)


class _Run:
    """The loop, and what it has to remember.

    Whatever belongs together is changed where no interrupt comes between (`deferred`), so that at any time the best so far is whole, and
    what is saved is the state after some number of steps.
    """

    def __init__(self, course: Course, steps: int, checkpoint: Checkpoint | None) -> None:
        self.course, self.steps, self.checkpoint = course, steps, checkpoint
        self.options = course.options
        self.history: list[Point] = []
        self.blocks: list[BlockPoint] = []
        self.rate = 0.0
        self.best, self.best_divergence = course.flat.copy(), math.inf
        self.adam = self._adam()
        self._are_blocks_taught = not self.options.block_steps
        self._losses: list[float] = []
        self._trained_s = 0.0
        self._made = 0
        self._done = 0  # steps, those of an earlier run included; Adam does not count what was not finite

    def _adam(self) -> Adam:
        return Adam(self.course.flat, self.course.units, self.options.adam, Bases(self.course.blocks))

    def go(self, progress: Progress) -> TuneResult:
        """Everything from the first measurement, or the last checkpoint, to the result."""
        interrupted, reason = False, None
        try:
            self._teach(progress)
        except KeyboardInterrupt:
            interrupted = True
        except InputError as error:  # ONNX Runtime refuses a run, as for want of memory
            reason = str(error)
        result: TuneResult | None = None
        try:
            with deferred():
                if self.checkpoint is not None and not interrupted and reason is None:
                    self.checkpoint.remove()
                else:
                    self._save(force=True)
                result = self._result(interrupted, reason)
        except KeyboardInterrupt:
            result = replace(result or self._result(interrupted, reason), interrupted=True)
        return result

    def _teach(self, progress: Progress) -> None:
        start = time.perf_counter()
        if not self._resume():
            self._measure(0, start)
        if not self._are_blocks_taught:
            self._teach_blocks(progress, start)
        self.rate = self.rate or self.options.rate or self._best_rate(progress)
        if self._is_due(self._done) and self.history[-1].step < self._done:  # stopped while it measured
            self._measure(self._done, start)
        rest = range(self._done, self.steps)
        for step in progress(rest, "Tuning", len(rest)):
            if self._is_hopeless():
                continue
            self._step(step)
            if self._is_due(step + 1):
                self._measure(step + 1, start)
            self._save()

    def _is_due(self, step: int) -> bool:
        """Whether the divergence is measured after so many steps."""
        return step % max(1, self.steps // self.options.evaluations) == 0 or step == self.steps

    def _step(self, step: int) -> None:
        began = time.perf_counter()
        loss = self.course.learn(step)
        with deferred():
            self.adam.step(self.course.gradient, self.rate * schedule(step, self.steps, int(self.options.warmup * self.steps)))
            self._losses.append(loss)
            self._made, self._done = self._made + 1, step + 1
            self._trained_s += time.perf_counter() - began

    def _measure(self, step: int, start: float) -> None:
        divergence = self.course.divergence()
        with deferred():
            self._note(step, divergence, time.perf_counter() - start)

    def _note(self, step: int, divergence: float, seconds: float) -> None:
        loss = float(np.mean(self._losses)) if self._losses else math.nan
        self._losses = []
        self.history.append(Point(step, loss, divergence, seconds))
        self._consider(divergence)
        log.info("step %d: loss %.6g, divergence %.6g", step, loss, divergence)

    def _consider(self, divergence: float) -> None:
        """Keep the parameters if they are the best so far."""
        if divergence < self.best_divergence:
            self.best_divergence, self.best = divergence, self.course.flat.copy()

    def _is_hopeless(self) -> bool:
        if self.options.patience is None:
            return False
        best = min(range(len(self.history)), key=lambda number: self.history[number].divergence)
        return len(self.history) - 1 - best >= self.options.patience

    def _teach_blocks(self, progress: Progress, start: float) -> None:
        """Teach one block after the other; all of it is kept if it lowers the divergence of the whole."""
        try:
            blocks = Blockwise(self.course, self.options.block_steps, self.options.block_rate)
            for point, flat in blocks.teach(progress, len(self.blocks)):
                with deferred():
                    self.course.flat[...] = flat
                    self.blocks.append(point)
                log.info("block up to '%s': error %.6g → %.6g", point.exit, point.before, point.after)
                self._save()
        except InputError as error:
            log.warning("blocks are not taught any further: %s", error)
        divergence = self.course.divergence()
        with deferred():
            if not divergence < self.best_divergence:
                self.course.flat[...] = self.course.student.start()
            self._note(0, divergence, time.perf_counter() - start)
            self._are_blocks_taught = True

    def _best_rate(self, progress: Progress) -> float:
        """The highest rate that a few steps from the same start do no harm with, or the best one; the parameters are put back.

        Rates fall to zero as in a whole run: at a constant rate, what rounding makes of the last steps would favour the low ones. A few
        steps favour these all the same: what a high rate loses at first it makes good later.
        """
        course, rates = self.course, self.options.rates
        put_back = course.flat.copy()
        steps = int(min(max(self.steps * _TRIAL_SHARE / len(rates), _TRIAL_STEPS[0]), _TRIAL_STEPS[1]))
        found = {}
        try:
            for rate in progress(rates, "Trying rates", len(rates)):
                course.flat[...] = put_back
                self._try(rate, steps)
                found[rate] = course.divergence()
                with deferred():
                    self._consider(found[rate])
                log.info("rate %g: divergence %.6g after %d steps", rate, found[rate], steps)
        finally:
            with deferred():
                course.flat[...] = put_back
        start = min(point.divergence for point in self.history)
        finite = {rate: divergence for rate, divergence in found.items() if math.isfinite(divergence)}
        if not self.options.bold:
            return min(finite or found, key=found.__getitem__)
        limit = start * (_RECOVERABLE if self.steps >= _LONG * steps else _HARMLESS)
        harmless = [rate for rate, divergence in finite.items() if divergence <= limit]
        return max(harmless) if harmless else min(finite or found, key=found.__getitem__)

    def _try(self, rate: float, steps: int) -> None:
        """Make a few steps."""
        adam = self._adam()
        for step in range(steps):
            self.course.learn(step)
            adam.step(self.course.gradient, rate * schedule(step, steps, steps // 4))

    def _result(self, interrupted: bool, reason: str | None) -> TuneResult:
        course = self.course
        before = self.history[0].divergence if self.history else math.nan
        improved = bool(self.history) and self.best_divergence < before
        return TuneResult(
            fitted=course.student.taught(self.best) if improved else course.student.fitted,
            improved=improved,
            before=before,
            after=self.best_divergence if improved else before,
            history=tuple(self.history),
            steps=self._done,
            rate=self.rate,
            steps_per_s=self._made / self._trained_s if self._made else 0.0,
            interrupted=interrupted,
            skipped=course.student.skipped,
            reason=reason,
            blocks=tuple(self.blocks),
        )

    # --- checkpoints

    def _save(self, force: bool = False) -> None:
        due = force or (self.checkpoint is not None and self.checkpoint.is_due(self.options.save_s))
        if self.checkpoint is None or not due or not self.history:
            return
        history = np.array([(p.step, p.loss, p.divergence, p.seconds) for p in self.history], np.float64)
        with deferred():
            self.checkpoint.save(
                {
                    **{f"adam.{key}": array for key, array in self.adam.state().items()},
                    "best": self.best,
                    "best_divergence": np.asarray(self.best_divergence, np.float64),
                    "history": history,
                    "losses": np.array(self._losses, np.float64),
                    "rate": np.asarray(self.rate, np.float64),
                    "done": np.asarray(self._done),
                    "blocks": np.array([(p.before, p.after) for p in self.blocks], np.float64).reshape(-1, 2),
                    "exits": np.array([p.exit for p in self.blocks], np.str_),
                    "are_blocks_taught": np.asarray(int(self._are_blocks_taught)),
                }
            )

    def _resume(self) -> bool:
        state = self.checkpoint.load() if self.checkpoint is not None else None
        if state is None or not self._fits(state):
            return False
        with deferred():
            self.adam.restore({key.removeprefix("adam."): array for key, array in state.items() if key.startswith("adam.")})
            self.best = np.asarray(state["best"], np.float32)
            self.best_divergence = float(state["best_divergence"])
            self.history = [Point(int(step), loss, divergence, s) for step, loss, divergence, s in np.asarray(state["history"]).tolist()]
            self._losses, self.rate = np.asarray(state["losses"]).tolist(), float(state["rate"])
            rows = zip(state["exits"].tolist(), np.asarray(state["blocks"]).tolist(), strict=True)
            self.blocks = [BlockPoint(str(end), before, after) for end, (before, after) in rows]
            self._are_blocks_taught = bool(state["are_blocks_taught"])
            self._done = int(state["done"])
        log.info("goes on after step %d", self._done)
        return True

    def _fits(self, state: Mapping[str, NDArray[np.generic]]) -> bool:
        """Whether a state is one of this run: another version of the program may have written it."""
        flat = (self.course.student.count,)
        numbers = dict.fromkeys(("best_divergence", "rate", "done", "are_blocks_taught"), ())
        shapes = {"best": flat, **numbers, **{f"adam.{key}": array.shape for key, array in self.adam.state().items()}}
        history, blocks, exits = (state.get(key, np.zeros((0, 0, 0))) for key in ("history", "blocks", "exits"))
        fits = (
            all(key in state and state[key].shape == shape and state[key].dtype.kind in "fi" for key, shape in shapes.items())
            and (history.ndim, history.shape[1:], len(history) > 0, history.dtype.kind) == (2, (4,), True, "f")
            and (blocks.shape, blocks.dtype.kind, exits.dtype.kind) == ((len(exits), 2), "f", "U")
            and exits.ndim == 1
            and (losses := state.get("losses")) is not None
            and (losses.ndim, losses.dtype.kind) == (1, "f")
            and 0 <= int(state["done"]) <= self.steps
        )
        if not fits:
            log.warning("a checkpoint holds the state of another run and is not used")
        return fits


def _checkpoint(job: Job, forms: Mapping[str, Form], fitted: Fitted, steps: int, options: TuneOptions) -> Checkpoint | None:
    folder: Path | None = job.settings.cache
    if folder is None:
        return None
    arrays = [*fitted.contents(), job.splits.fit, job.splits.choose]
    if options.labels and job.data.label_values is not None:  # the data's digest leaves them out
        arrays.append(job.data.label_values)
    described = [
        __version__,
        RUNTIME_VERSION,
        job.original.sha256,
        job.lineage,
        job.data.digest,
        str(job.settings),
        str(steps),
        str(replace(options, save_s=0)),
        *(f"{name}={form}" for name, form in sorted(forms.items())),
    ]
    return Checkpoint(folder / f"tune-{fingerprint(described, arrays)[:32]}.npz")
