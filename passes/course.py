"""A course: a student with the loss that it is taught by, its lessons, and its examination on choose samples.

The loss is the Kullback-Leibler divergence from the original for class scores, and the relative mean square error (or the cosine distance)
for other outputs; labels and values between may take part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from .bases import entries_of
from .divergence import Divergence, Kind
from .errors import InputError
from .execute import Executor
from .footprint import affordable_bytes, peak_bytes
from .job import Job
from .learner import Learner, Slope, blocks_of, slope_of, units_of
from .lessons import KEPT_BYTES, Arrays, Lesson, Lessons
from .loss import CosineDistance, CrossEntropy, SquaredError, TeacherDivergence, Term
from .session import open_session, to_array, to_value
from .student import Student
from .tune_options import TuneOptions

ANSWER = "teacher."
"""Before a value's name: the input that takes what the original model has there."""

_LABELS = "tune.labels"

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)

_LEAST_RUN = 8
"""Samples in a run for which it is still cheaper to make more, smaller runs per step than to compute activations twice."""

_COPIES = 10
"""Arrays of the length of all parameters that training holds: values, gradients, what Adam keeps, projections, the best so far."""


_OPTIMIZERS = 2
"""That hold bases at a time: the one that tunes, and one that tries a rate."""


@dataclass(frozen=True)
class _Way:
    """How a step's samples are run, so that it fits in memory.

    Attributes:
        slope: the model that is run.
        most: samples in one run, at most.
    """

    slope: Slope
    most: int


class Course:
    """A student in training.

    Attributes:
        job: whose original model is the teacher.
        student: the student.
        options: how it is taught.
        lessons: what it is shown.
        learner: computes the loss and its gradient.
        units: (n,), what counts as a large change of each parameter.
        blocks: arrays among the parameters whose gradients may be averaged in another basis.
    """

    def __init__(self, job: Job, student: Student, options: TuneOptions, lessons: Lessons, slope: Slope) -> None:
        """Load the models; see `open_course`."""
        self.job, self.student, self.options, self.lessons = job, student, options, lessons
        runtime, weights = job.calibration, job.model.weights
        self.learner = Learner(slope, student.parameters, student.start(), runtime, weights)
        self.units = units_of(student.parameters, student.count)
        self.blocks = blocks_of({name: student.parameters[name] for name in self.learner.trained})
        self._outputs = [value.name for value in student.model.proto.graph.output]
        self._examiner = open_session(student.model.proto, weights=weights, threads=runtime.threads, providers=runtime.providers)
        self._teacher = Executor.of(job.reference, self._outputs, runtime)
        self._exam: list[tuple[Arrays, list[NDArray[np.generic]]]] | None = None

    @property
    def flat(self) -> NDArray[np.float32]:
        """(n,) values of all parameters."""
        return self.learner.flat

    @property
    def gradient(self) -> NDArray[np.float32]:
        """(n,), written by `learn`."""
        return self.learner.gradient

    def learn(self, step: int) -> float:
        """The loss of a step's lessons at the projected parameters; `gradient` holds its gradient."""
        return self.learner.learn([self.fed(lesson) for lesson in self.lessons.at(step)])

    def fed(self, lesson: Lesson) -> dict[str, NDArray[Any]]:
        """A lesson as inputs of the model with a loss."""
        answers = {ANSWER + name: array for name, array in lesson.answers.items()}
        labels = {_LABELS: self._labels(lesson.indices)} if self.options.labels else {}
        return {**lesson.feed, **answers, **labels}

    def _labels(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Labels in the rank that the loss takes: (samples, 1) counts as (samples,), and those of a whole feed have no samples' axis."""
        labels = np.asarray(self.job.data.labels(indices), np.int64)
        lengths = labels.shape
        while len(lengths) > self.learner.slope.answers[_LABELS][1] and 1 in lengths:
            place = len(lengths) - 1 - lengths[::-1].index(1)
            lengths = lengths[:place] + lengths[place + 1 :]
        return labels.reshape(lengths)

    def divergence(self) -> float:
        """Of the student with projected parameters, on choose samples."""
        self.learner.project()
        total = Divergence(self.job.kinds)
        kept: list[tuple[Arrays, list[NDArray[np.generic]]]] = []
        size_bytes = 0
        for feed, reference in self.examination():
            fed = {name: to_value(array) for name, array in feed.items()}
            total.add(reference, [to_array(value) for value in self._examiner.run(self._outputs, self.learner.values | fed)])
            size_bytes += sum(array.nbytes for array in (*feed.values(), *reference))
            if size_bytes <= KEPT_BYTES:
                kept.append((feed, reference))
        if size_bytes <= KEPT_BYTES:
            self._exam = kept
        return total.value

    def examination(self) -> Iterator[tuple[Arrays, list[NDArray[np.generic]]]]:
        """Feeds of choose samples, each with all outputs of the original model."""
        if self._exam is not None:
            yield from self._exam
            return
        job = self.job
        rng = np.random.default_rng((job.settings.seed, 3))
        chosen = np.sort(rng.permutation(job.splits.choose)[: job.data.enough(self.options.samples)])
        for feed, _ in job.data.feeds(chosen, self.options.batch):
            yield feed, self._teacher.run_feed(feed)


def open_course(job: Job, student: Student, options: TuneOptions, lessons: Job | None = None) -> Course | str:
    """Prepare to teach a student; the reason why it cannot be taught, if that is so.

    Args:
        job: whose original model is the teacher.
        student: made of it.
        options: checked with `check_options`.
        lessons: the job with the fit samples to be shown; `job` itself if None.
    """
    if not student.parameters:
        return next(iter(student.skipped.values()), "the plan leaves nothing to be tuned")
    if not float_outputs(job):
        return "no output of the model holds floats"
    try:
        course = Lessons(lessons or job, _taught(job, options), options.batch, options.augmentations)
        if not course.epoch:
            return f"no samples of one shape fill the model's fixed batch of {job.data.per_feed}"
        way = _way(job, student, options, course)
        if isinstance(way, str):
            return way
        course.limit(way.most)
        return Course(job, student, options, course, way.slope)
    except InputError as error:  # an operator that cannot be differentiated, or whose gradient ONNX Runtime does not run
        return str(error)


def float_outputs(job: Job) -> list[str]:
    """Names of the outputs that have a loss."""
    return [value.name for value in job.model.proto.graph.output if value.type.tensor_type.elem_type in _FLOATS]


def _taught(job: Job, options: TuneOptions) -> tuple[str, ...]:
    """The values of the original model that the student is compared with."""
    return tuple(dict.fromkeys((*float_outputs(job), *(options.matched if options.matching else ()))))


def output_terms(job: Job, options: TuneOptions) -> list[Term]:
    """The loss of the outputs: every float output alike."""
    floats = float_outputs(job)
    kinds = dict(zip((value.name for value in job.model.proto.graph.output), job.kinds, strict=True))
    return [term for name in floats for term in _output_terms(name, kinds[name], options, 1 / len(floats))]


def _output_terms(name: str, kind: Kind, options: TuneOptions, share: float) -> Iterator[Term]:
    if kind != Kind.VALUES:
        yield TeacherDivergence(name, ANSWER + name, kind, options.temperature, kind=kind, weight=share)
        return
    if options.loss != "cosine":
        yield SquaredError(name, ANSWER + name, weight=share)
    if options.loss.startswith("cosine"):
        yield CosineDistance(name, ANSWER + name, weight=share)


def _terms(job: Job, options: TuneOptions) -> list[Term]:
    """The whole loss: outputs, then labels, then values between."""
    terms = output_terms(job, options)
    if options.labels:
        first = job.model.proto.graph.output[0].name
        terms.append(CrossEntropy(first, _LABELS, kind=job.kinds[0], weight=options.labels))
    matched = options.matched if options.matching else ()
    return terms + [SquaredError(name, ANSWER + name, weight=options.matching / len(matched)) for name in matched]


# --- memory


def _way(job: Job, student: Student, options: TuneOptions, lessons: Lessons) -> _Way | str:
    """The fastest way to make a step that fits in memory, or the reason why none does.

    Raises:
        InputError: the student cannot be differentiated.
    """
    slopes: dict[bool, Slope] = {}
    terms, room = _terms(job, options), affordable_bytes() - _held_bytes(job, student)
    least = float("inf")
    for most, recompute in _ways(options.batch, job.data.per_feed):
        if recompute not in slopes:
            slopes[recompute] = slope_of(student.model.proto, terms, list(student.parameters), job.model.weights, recompute=recompute)
            if not slopes[recompute].gradients:
                reasons = "; ".join(slopes[recompute].stops[:3]) or "no parameter takes part in the outputs"
                return f"no gradient reaches any parameter: {reasons}"
        needed = _run_bytes(slopes[recompute], lessons, most, job)
        if needed <= room:
            return _Way(slopes[recompute], most)
        least = min(least, needed)
    return f"a step needs {(least + _held_bytes(job, student)) / 1e9:.1f} GB of memory, more than half of what there is"


def _ways(batch: int, per_feed: int | None) -> list[tuple[int, bool]]:
    """(samples in a run, whether activations are computed twice), from fast to slow."""
    sizes = [per_feed] if per_feed else [max(1, batch >> halvings) for halvings in range(batch.bit_length())]
    whole = [(size, False) for size in sizes if size >= _LEAST_RUN or size == sizes[0]]
    return whole + [(size, True) for size in sizes]


def _held_bytes(job: Job, student: Student) -> int:
    """What training holds besides the activations of one step: also three sessions with the model's weights."""
    bases = entries_of(blocks_of(student.parameters))
    return 4 * (_COPIES * student.count + _OPTIMIZERS * bases) + 3 * job.model.size_bytes


def _run_bytes(slope: Slope, lessons: Lessons, most: int, job: Job) -> int:
    """What a run of so many samples takes; 0 where onnx's shape inference does not see through the graph."""
    lesson = lessons.widest(most)
    given = {**lesson.feed, **{ANSWER + name: array for name, array in lesson.answers.items()}}
    try:
        return peak_bytes(slope.proto, {name: array.shape for name, array in given.items()}, job.model.weights)
    except InputError:
        return 0
