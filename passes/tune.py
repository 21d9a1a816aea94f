"""Tuning: teach a compressed model what the original says, by gradients, with ONNX Runtime as the only engine.

Before: a plan's forms, fitted. After: the same forms with other codes and factors of exactly the same bytes, and other biases and scales of
normalizations. The student (`passes.student`) is differentiated with its loss by `passes.differentiate`; each step rounds the latent
parameters to what can be written, runs the student and its reverse pass on a batch of fit samples, and moves the latents by Adam.

The loss is the Kullback-Leibler divergence from the original for class scores, and the relative mean square error for other outputs; no
labels are needed. What counts is the divergence on choose samples, measured every few steps on the rounded parameters: the best ones win,
the given ones included, so tuning never makes it worse.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from intaglio.ops.form import Form

from .adam import Adam, AdamOptions, schedule
from .augment import AUGMENTATIONS
from .build import Fitted
from .checkpoint import Checkpoint, fingerprint
from .differentiate import differentiate
from .divergence import Divergence, Kind
from .errors import InputError
from .execute import Executor
from .job import Job
from .lessons import KEPT_BYTES, Arrays, Lessons
from .loss import CrossEntropy, SquaredError, TeacherDivergence, Term, with_loss
from .options import Progress, silent
from .session import Session, Value, open_session, to_array, to_value
from .student import Student, make_student

log = logging.getLogger(__name__)

Float32 = NDArray[np.float32]

_ANSWER = "teacher."
_LABELS = "tune.labels"

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)

_TRIAL_SHARE = 0.12
"""Share of the steps that finding the rate may take, over all rates together."""

_TRIAL_STEPS = (8, 40)
"""Fewest and most steps that a rate is tried for."""


@dataclass(frozen=True)
class TuneOptions:
    """How a model is tuned.

    Attributes:
        batch: samples per step; models of a fixed, smaller batch are run several times per step.
        rate: how far a parameter may move per step, as a share of its array's root mean square; None to try `rates` and take the best.
        rates: to try.
        warmup: share of the steps over which the rate rises.
        adam: how gradients are averaged.
        constants: whether biases and normalizations are tuned too.
        augmentations: random changes of images; see `AUGMENTATIONS`.
        temperature: at which class probabilities are compared.
        labels: weight of the cross-entropy to the data's labels; 0 leaves them unused.
        matched: names of values that exist in both models and are matched too.
        matching: weight of the relative mean square error of all `matched` values together.
        evaluations: how often the divergence on choose samples is measured.
        patience: evaluations without a better one after which tuning ends; None for no end.
        samples: choose samples on which it is measured, at most.
        save_s: seconds between checkpoints, which lie in the job's cache folder if that has one.
    """

    batch: int = 64
    rate: float | None = None
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    warmup: float = 0.05
    adam: AdamOptions = field(default_factory=AdamOptions)
    constants: bool = True
    augmentations: tuple[str, ...] = ()
    temperature: float = 1.0
    labels: float = 0.0
    matched: tuple[str, ...] = ()
    matching: float = 0.0
    evaluations: int = 20
    patience: int | None = None
    samples: int = 1024
    save_s: float = 30.0


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        step: after how many steps.
        loss: mean over the steps since the last measurement; not a number at the start.
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
        before: divergence of the student on choose samples at the start.
        after: the same of `fitted`.
        history: what was measured, in order.
        steps: how many were made, those of an earlier run that was resumed included.
        rate: the highest rate.
        steps_per_s: training alone, without measurements; 0 where no step was made.
        interrupted: whether the user stopped it.
        skipped: site name → why its arrays were not tuned.
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

    A KeyboardInterrupt ends it early, with the best so far. With a cache folder, a call with equal arguments goes on where an earlier one
    was stopped, bit by bit.

    Args:
        job: the job.
        forms: of the plan.
        fitted: from `fit_forms(keep=True)`.
        steps: how many to make.
        options: how.
        lessons: the job with other fit samples to be taught on; those of `job`, by which `finish` calibrates ranges, if None.
        progress: shows how far it is.

    Raises:
        InputError: no gradient reaches any parameter, an option names something unknown, or labels are asked for and not there.
    """
    options = options or TuneOptions()
    _check(job, steps, options)
    student = make_student(job, forms, fitted, constants=options.constants)
    lessons = lessons or job
    course = _Course(job, student, options, lessons)
    checkpoint = _checkpoint(lessons, forms, fitted, steps, options)
    return _Run(course, steps, checkpoint).go(progress)


def _check(job: Job, steps: int, options: TuneOptions) -> None:
    if steps < 1:
        raise InputError(f"tuning: {steps} steps, expected at least 1; give more, or do not tune")
    unknown = [name for name in options.augmentations if name not in AUGMENTATIONS]
    if unknown:
        raise InputError(f"augmentation {unknown[0]!r} is unknown; expected one of {', '.join(AUGMENTATIONS)}")
    if options.labels and job.data.label_values is None:
        raise InputError("tuning: labels have a weight, but the data has none; name the array that holds them")
    if options.labels and "mixup" in options.augmentations:
        raise InputError("augmentation 'mixup': mixed samples have no label; leave out mixup or the labels")


# --- one step: a loss and its gradient


class _Course:
    """A student with its loss, its lessons and its examination."""

    def __init__(self, job: Job, student: Student, options: TuneOptions, lessons: Job | None = None) -> None:
        self.job, self.student, self.options = job, student, options
        self.flat, self.gradient = student.start(), np.zeros(student.count, np.float32)
        self.units = student.units()
        self.lessons = Lessons(lessons or job, _taught(job, options), options.batch, options.augmentations)
        self._fed = {name: np.zeros(each.latent.shape, np.float32) for name, each in student.parameters.items()}
        self._values = {name: to_value(array) for name, array in self._fed.items()}
        self._open()
        self._teacher = Executor.of(job.model, self._outputs, job.calibration)
        self._exam: list[tuple[Arrays, list[NDArray[np.generic]]]] | None = None

    def _open(self) -> None:
        job, parameters = self.job, self.student.parameters
        built = with_loss(self.student.model.proto, _terms(job, self.options), name="tune.loss", weights=job.model.weights)
        found = differentiate(built.proto, [built.loss], list(parameters), weights=job.model.weights)
        self.trained = tuple(name for name in parameters if name in found.gradients)
        if not self.trained:
            reasons = "; ".join(map(str, found.stops[:3])) or "no parameter takes part in the outputs"
            raise InputError(f"tuning: no gradient reaches any parameter: {reasons}")
        self._fetches = [built.loss, *(found.gradients[name] for name in self.trained)]
        self._session = self._session_of(found.proto)
        declared = {value.name: value.type.tensor_type for value in found.proto.graph.input}
        self._types = {name: helper.tensor_dtype_to_np_dtype(tensor_type.elem_type) for name, tensor_type in declared.items()}
        self._label_rank = len(declared[_LABELS].shape.dim) if _LABELS in declared else 0
        one = found.cotangents[built.loss]
        self._values[one] = to_value(np.ones((), self._types[one]))
        self._outputs = [value.name for value in self.student.model.proto.graph.output]
        self._examiner = self._session_of(self.student.model.proto)

    def _session_of(self, proto: ModelProto) -> Session:
        runtime = self.job.calibration
        return open_session(proto, weights=self.job.model.weights, threads=runtime.threads, providers=runtime.providers)

    def project(self) -> None:
        """Bring the parameters to what the model computes with."""
        for name, parameter in self.student.parameters.items():
            parameter.project(self.flat, self._fed[name])

    def learn(self, step: int) -> float:
        """The loss of a step's lessons at the projected parameters; `gradient` holds its gradient."""
        self.project()
        total = 0.0
        self.gradient.fill(0)
        lessons = self.lessons.at(step)
        for number, lesson in enumerate(lessons):
            answers = {_ANSWER + name: np.asarray(array, self._types[_ANSWER + name]) for name, array in lesson.answers.items()}
            if self.options.labels:
                answers[_LABELS] = self._labels(lesson.indices)
            fed = {name: to_value(array) for name, array in (*lesson.feed.items(), *answers.items())}
            loss, *gradients = self._session.run(self._fetches, self._values | fed)
            total += float(to_array(loss))
            self._collect(gradients, first=number == 0)
        if len(lessons) > 1:
            self.gradient /= np.float32(len(lessons))
        return total / len(lessons)

    def _labels(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Labels in the rank that the loss takes: (samples, 1) counts as (samples,), and those of a whole feed have no samples' axis."""
        labels = np.asarray(self.job.data.labels(indices), np.int64)
        lengths = labels.shape
        while len(lengths) > self._label_rank and 1 in lengths:
            place = len(lengths) - 1 - lengths[::-1].index(1)
            lengths = lengths[:place] + lengths[place + 1 :]
        return labels.reshape(lengths)

    def _collect(self, gradients: Sequence[Value], first: bool) -> None:
        for name, gradient in zip(self.trained, gradients, strict=True):
            parameter = self.student.parameters[name]
            part = self.gradient[parameter.part]
            if first:
                parameter.latent.pull(to_array(gradient), part)
            else:
                more = np.empty_like(part)
                parameter.latent.pull(to_array(gradient), more)
                part += more

    def divergence(self) -> float:
        """Of the student with projected parameters, on choose samples."""
        self.project()
        total = Divergence(self.job.kinds)
        kept: list[tuple[Arrays, list[NDArray[np.generic]]]] = []
        size_bytes = 0
        for feed, reference in self._exam or self._examination():
            fed = {name: to_value(array) for name, array in feed.items()}
            total.add(reference, [to_array(value) for value in self._examiner.run(self._outputs, self._values | fed)])
            size_bytes += sum(array.nbytes for array in (*feed.values(), *reference))
            if size_bytes <= KEPT_BYTES:
                kept.append((feed, reference))
        if size_bytes <= KEPT_BYTES:
            self._exam = kept
        return total.value

    def _examination(self) -> Iterator[tuple[Arrays, list[NDArray[np.generic]]]]:
        job = self.job
        rng = np.random.default_rng((job.settings.seed, 3))
        chosen = np.sort(rng.permutation(job.splits.choose)[: job.data.enough(self.options.samples)])
        for feed, _ in job.data.feeds(chosen, self.options.batch):
            yield feed, self._teacher.run_feed(feed)


def _taught(job: Job, options: TuneOptions) -> tuple[str, ...]:
    """The values of the original model that the student is compared with."""
    return tuple(dict.fromkeys((*_float_outputs(job), *(options.matched if options.matching else ()))))


def _float_outputs(job: Job) -> list[str]:
    return [value.name for value in job.model.proto.graph.output if value.type.tensor_type.elem_type in _FLOATS]


def _terms(job: Job, options: TuneOptions) -> list[Term]:
    """The loss: every float output alike, then labels, then values between."""
    names = [value.name for value in job.model.proto.graph.output]
    kinds = dict(zip(names, job.kinds, strict=True))
    floats = _float_outputs(job)
    terms: list[Term] = []
    for name in floats:
        share = 1 / len(floats)
        if kinds[name] == Kind.VALUES:
            terms.append(SquaredError(name, _ANSWER + name, weight=share))
        else:
            kind = kinds[name]
            terms.append(TeacherDivergence(name, _ANSWER + name, kind, options.temperature, kind=kind, weight=share))
    if options.labels:
        terms.append(CrossEntropy(names[0], _LABELS, kind=job.kinds[0], weight=options.labels))
    matched = options.matched if options.matching else ()
    return terms + [SquaredError(name, _ANSWER + name, weight=options.matching / len(matched)) for name in matched]


# --- many steps


class _Run:
    """The loop, and what it has to remember."""

    def __init__(self, course: _Course, steps: int, checkpoint: Checkpoint | None) -> None:
        self.course, self.steps, self.checkpoint = course, steps, checkpoint
        self.options = course.options
        self.history: list[Point] = []
        self.rate = 0.0
        self.best, self.best_divergence = course.flat.copy(), math.inf
        self.adam = self._adam()
        self._losses: list[float] = []
        self._trained_s = 0.0
        self._made = 0
        self._done = 0  # steps, those of an earlier run included; Adam does not count what was not finite

    def _adam(self) -> Adam:
        return Adam(self.course.flat, self.course.units, self.options.adam)

    def go(self, progress: Progress) -> TuneResult:
        """Everything from the first measurement, or the last checkpoint, to the result."""
        interrupted = False
        start = time.perf_counter()
        if not self._resume():
            self._measure(0, start)
        try:
            self.rate = self.rate or self.options.rate or self._best_rate(progress)
            self._train(progress, start)
        except KeyboardInterrupt:
            interrupted = True
        self._save(force=True)
        return self._result(interrupted)

    def _train(self, progress: Progress, start: float) -> None:
        if self._is_due(self._done) and self.history[-1].step < self._done:  # stopped while it measured
            self._measure(self._done, start)
        rest = range(self._done, self.steps)
        for step in progress(rest, "Tuning", len(rest)):
            if self._is_hopeless():
                continue
            began = time.perf_counter()
            self._step(step, self.rate * schedule(step, self.steps, int(self.options.warmup * self.steps)))
            self._trained_s += time.perf_counter() - began
            self._made, self._done = self._made + 1, step + 1
            if self._is_due(step + 1):
                self._measure(step + 1, start)
            self._save()

    def _is_due(self, step: int) -> bool:
        """Whether the divergence is measured after so many steps."""
        return step % max(1, self.steps // self.options.evaluations) == 0 or step == self.steps

    def _step(self, step: int, rate: float) -> None:
        self._losses.append(self.course.learn(step))
        self.adam.step(self.course.gradient, rate)

    def _measure(self, step: int, start: float) -> None:
        divergence = self.course.divergence()
        loss = float(np.mean(self._losses)) if self._losses else math.nan
        self._losses = []
        self.history.append(Point(step, loss, divergence, time.perf_counter() - start))
        log.info("step %d: loss %.6g, divergence %.6g", step, loss, divergence)
        if divergence < self.best_divergence:
            self.best_divergence, self.best = divergence, self.course.flat.copy()

    def _is_hopeless(self) -> bool:
        if self.options.patience is None:
            return False
        best = min(range(len(self.history)), key=lambda number: self.history[number].divergence)
        return len(self.history) - 1 - best >= self.options.patience

    def _best_rate(self, progress: Progress) -> float:
        """The rate that lowers the divergence most in a few steps from the same start; the parameters are put back.

        Rates fall to zero as in a whole run: at a constant rate, what rounding makes of the last steps would favour the low ones.
        """
        course, rates = self.course, self.options.rates
        start = course.flat.copy()
        steps = int(min(max(self.steps * _TRIAL_SHARE / len(rates), _TRIAL_STEPS[0]), _TRIAL_STEPS[1]))
        found = {}
        try:
            for rate in progress(rates, "Trying rates", len(rates)):
                course.flat[...] = start
                self.adam = self._adam()
                for step in range(steps):
                    self._step(step, rate * schedule(step, steps, steps // 4))
                found[rate] = course.divergence()
                log.info("rate %g: divergence %.6g after %d steps", rate, found[rate], steps)
        finally:
            course.flat[...] = start
            self.adam, self._losses = self._adam(), []
        return min(found, key=lambda rate: found[rate] if math.isfinite(found[rate]) else math.inf)

    def _result(self, interrupted: bool) -> TuneResult:
        course, before = self.course, self.history[0].divergence
        improved = self.best_divergence < before
        fitted = course.student.taught(self.best) if improved else course.student.fitted
        return TuneResult(
            fitted=fitted,
            improved=improved,
            before=before,
            after=self.best_divergence,
            history=tuple(self.history),
            steps=self._done,
            rate=self.rate,
            steps_per_s=self._made / self._trained_s if self._made else 0.0,
            interrupted=interrupted,
            skipped=course.student.skipped,
        )

    # --- checkpoints

    def _save(self, force: bool = False) -> None:
        if self.checkpoint is None or not (force or self.checkpoint.is_due(self.options.save_s)):
            return
        history = np.array([(p.step, p.loss, p.divergence, p.seconds) for p in self.history], np.float64)
        self.checkpoint.save(
            {
                **{f"adam.{key}": array for key, array in self.adam.state().items()},
                "best": self.best,
                "history": history,
                "losses": np.array(self._losses, np.float64),
                "rate": np.asarray(self.rate, np.float64),
                "done": np.asarray(self._done),
            }
        )

    def _resume(self) -> bool:
        state = self.checkpoint.load() if self.checkpoint is not None else None
        if state is None or not self._fits(state):
            return False
        self.adam.restore({key.removeprefix("adam."): array for key, array in state.items() if key.startswith("adam.")})
        self.best = np.asarray(state["best"], np.float32)
        self.history = [Point(int(step), loss, divergence, s) for step, loss, divergence, s in np.asarray(state["history"]).tolist()]
        self.best_divergence = min(point.divergence for point in self.history)
        self._losses, self.rate = np.asarray(state["losses"]).tolist(), float(state["rate"])
        self._done = int(state["done"])
        log.info("goes on after step %d", self._done)
        return True

    def _fits(self, state: Mapping[str, NDArray[np.generic]]) -> bool:
        """Whether a state is one of this run: another version of the program may have written it."""
        flat = (self.course.student.count,)
        shapes = {"best": flat, "rate": (), "done": (), **{f"adam.{key}": array.shape for key, array in self.adam.state().items()}}
        history = state.get("history", np.zeros(0))
        fits = (
            all(key in state and state[key].shape == shape and state[key].dtype.kind in "fi" for key, shape in shapes.items())
            and (history.ndim, history.shape[1:], len(history) > 0, history.dtype.kind) == (2, (4,), True, "f")
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
    arrays = [array for name in sorted(fitted.packed) for packs in fitted.packed[name] for array in packs]
    arrays += [job.splits.fit, job.splits.choose]
    if options.labels and job.data.label_values is not None:  # the data's digest leaves them out
        arrays.append(job.data.label_values)
    described = [
        job.original.sha256,
        job.data.digest,
        str(job.settings),
        str(steps),
        str(replace(options, save_s=0)),
        *(f"{name}={form}" for name, form in sorted(forms.items())),
    ]
    return Checkpoint(folder / f"tune-{fingerprint(described, arrays)[:32]}.npz")
