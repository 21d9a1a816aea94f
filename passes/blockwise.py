"""Teach a student block by block: each block alone, on what the blocks before it really hand on, against what the original has at its exit.

Before: a student. After: values of its parameters with which blocks err less at their exits, on samples that they were not taught on.
This is block reconstruction (Li et al., "BRECQ: pushing the limit of post-training quantization by block reconstruction", 2021) with the
latents, the rounding and the optimizer of `passes.tune`. A step takes the forward and reverse pass of one block, and errors are mended
where they arise; but errors at an exit do not all matter alike at the outputs, so that the whole model is taught afterwards.

Blocks are cut where one value alone carries on what parameters have touched: every other value that is read later depends on the model's
inputs alone (a mask), or on parameters alone (a product of factors), and is computed where it is read. That value must have the same name
and shape in the original. Consecutive cuts are merged until each block has a parameter and there are no more than `MOST_BLOCKS`.

Must not fire on: parameters that two blocks read, and blocks that no gradient passes. They stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto

from intaglio.ops.vjp import Value as Known

from .adam import Adam, schedule
from .course import ANSWER, Course, output_terms
from .divergence import Divergence
from .errors import InputError
from .execute import Executor
from .graph import reads, topological
from .latent import settled
from .learner import Learner, compact, slope_of, units_of
from .loss import SquaredError, Term
from .model import Model
from .modernize import modernize
from .options import Progress
from .session import Value, copy_fields, open_session, to_array, to_value
from .student import Student
from .values import infer, typed

Float32 = NDArray[np.float32]
Arrays = Mapping[str, NDArray[Any]]

MOST_BLOCKS = 12
"""More blocks mean more sessions, and exits that matter less to the outputs."""

KEPT_BYTES = 1 << 29
"""Most bytes of entries and exits that are kept, over the samples taught on and those held back."""

_HELD_BACK = 0.2
"""Share of them for samples held back."""

_EXAMS = 4
"""How often a block's error is measured while it is taught."""

_WARMUP = 0.05
"""Share of a block's steps over which the rate rises."""


@dataclass(frozen=True)
class BlockPoint:
    """What teaching one block reached.

    Attributes:
        exit: the value that it ends in; the first output for the last block.
        before: error at the exit, on samples held back: relative mean square, or the divergence of the outputs.
        after: the same of the parameters that were kept, which are those from before where none were better.
    """

    exit: str
    before: float
    after: float


@dataclass(frozen=True)
class Block:
    """A part of the student between two cuts.

    Attributes:
        entry: the value that it takes; None for the first, which takes the model's inputs alone.
        exits: the value that it yields; all of the model's outputs for the last.
        nodes: positions of its operators in the student's graph, those that others need too included.
        parameters: names of the parameters that it reads.
    """

    entry: str | None
    exits: tuple[str, ...]
    nodes: tuple[int, ...]
    parameters: frozenset[str]


# --- where to cut


def find_blocks(student: Student, original: Model, trained: Sequence[str], most: int = MOST_BLOCKS) -> list[Block]:
    """The blocks of a student, in order.

    Args:
        student: the student.
        original: the model that it is compared with.
        trained: names of the parameters that have a gradient; a block has at least one of them.
        most: blocks.

    Raises:
        InputError: a model cannot be brought into the form that is differentiated.
    """
    proto = student.model.proto
    ours, theirs = (_values(each) for each in (student.model, original))
    cuts = [name for name in single_cuts(proto, student.parameters) if _are_alike(ours.get(name), theirs.get(name))]
    outputs = tuple(value.name for value in proto.graph.output)
    blocks = _between(proto, [*((cut,) for cut in cuts if (cut,) != outputs), outputs], student.parameters)
    while (place := _to_merge(blocks, student, frozenset(trained), most)) is not None:
        first, second = blocks[place : place + 2]
        blocks[place : place + 2] = [_block(proto, first.entry, second.exits, student.parameters)]
    return blocks


def single_cuts(proto: ModelProto, parameters: Mapping[str, object]) -> list[str]:
    """Values that alone carry on what depends on inputs and on parameters, in order.

    Args:
        proto: a model whose parameters are inputs.
        parameters: by name.
    """
    nodes = topological(proto.graph.node)
    fed = {value.name for value in proto.graph.input} - {tensor.name for tensor in proto.graph.initializer} - set(parameters)
    touched, learnt = set(fed), set(parameters)
    for node in nodes:
        names = reads(node)
        touched.update(node.output if names & touched else ())
        learnt.update(node.output if names & learnt else ())
    last = {name: position for position, node in enumerate(nodes) for name in reads(node)}
    last |= {value.name: len(nodes) for value in proto.graph.output}
    alive: set[str] = set()
    found: list[str] = []
    for position, node in enumerate(nodes):
        alive.update(name for name in node.output if name in touched and name in learnt)
        alive = {name for name in alive if last.get(name, -1) > position}
        if len(alive) == 1 and alive.isdisjoint(found):
            found.extend(alive)
    return found


def _values(model: Model) -> dict[str, Known]:
    return infer(modernize(model.proto, model.weights).proto)


def _are_alike(ours: Known | None, theirs: Known | None) -> bool:
    """Whether a value can stand for another: float32 arrays of equal lengths, as far as these are known."""
    if ours is None or theirs is None or ours.shape is None or theirs.shape is None or len(ours.shape) != len(theirs.shape):
        return False
    lengths = zip(ours.shape, theirs.shape, strict=True)
    return ours.dtype == theirs.dtype == np.float32 and all(a is None or b is None or a == b for a, b in lengths)


def _between(proto: ModelProto, exits: Sequence[tuple[str, ...]], parameters: Mapping[str, object]) -> list[Block]:
    """The blocks that end in the given exits."""
    entries = [None, *(names[0] for names in exits[:-1])]
    return [_block(proto, entry, names, parameters) for entry, names in zip(entries, exits, strict=True)]


def _block(proto: ModelProto, entry: str | None, exits: tuple[str, ...], parameters: Mapping[str, object]) -> Block:
    """What computing the exits takes, given the entry."""
    producers = {name: position for position, node in enumerate(proto.graph.node) for name in node.output if name}
    positions: set[int] = set()
    seen: set[str] = set() if entry is None else {entry}
    pending = [name for name in exits if name != entry]
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in producers and producers[name] not in positions:
            positions.add(producers[name])
            pending.extend(reads(proto.graph.node[producers[name]]))
    return Block(entry, exits, tuple(sorted(positions)), frozenset(name for name in seen if name in parameters))


def _to_merge(blocks: Sequence[Block], student: Student, trained: frozenset[str], most: int) -> int | None:
    """The number of a block to merge with the next; None if all is well.

    Blocks without a parameter come first, then the two neighbours that have the fewest entries to be tuned.
    """
    if len(blocks) < 2:
        return None
    for number, block in enumerate(blocks):
        if not block.parameters & trained:
            return min(number, len(blocks) - 2)
    if len(blocks) <= most:
        return None
    sizes = [sum(len(student.parameters[name].start) for name in block.parameters) for block in blocks]
    return min(range(len(blocks) - 1), key=lambda number: sizes[number] + sizes[number + 1])


# --- teaching


@dataclass
class _Sample:
    """A batch of samples on its way through the blocks.

    Attributes:
        feed: of the model's inputs.
        answers: what the original has at its outputs.
        entry: what the blocks before hand on; empty before the first.
        aim: what the original has at the exit of the block that is being taught.
    """

    feed: Arrays
    answers: Arrays
    entry: Arrays
    aim: Arrays


class Blockwise:
    """Teaches one block after the other.

    Attributes:
        blocks: in order.
    """

    def __init__(self, course: Course, steps: int, rate: float) -> None:
        """Find the blocks.

        Args:
            course: whose student is taught, on its lessons.
            steps: for each block.
            rate: the highest.

        Raises:
            InputError: see `find_blocks`.
        """
        self._course, self._steps, self._rate = course, steps, rate
        self.blocks = find_blocks(course.student, course.job.reference, course.learner.trained)

    def teach(self, progress: Progress, done: int = 0) -> Iterator[tuple[BlockPoint, Float32]]:
        """Teach the blocks; after each, what was reached and the values of all parameters (n,).

        The caller puts the values into the course's before it asks for the next block.

        Args:
            progress: shows how far it is.
            done: blocks that were taught already, whose parameters the course has.
        """
        if len(self.blocks) < 2:
            return
        lessons, exams = self._samples()
        for number, block in enumerate(progress(self.blocks, "Tuning blocks", len(self.blocks))):
            workshop = _Workshop(self._course, block, self._shared(), is_last=number == len(self.blocks) - 1)
            if number >= done:
                workshop.aim([*lessons, *exams])
                yield workshop.teach(lessons, exams, self._steps, self._rate, seed=number)
            workshop.hand_on([*lessons, *exams])

    def _shared(self) -> frozenset[str]:
        """Parameters of more than one block."""
        names = [name for block in self.blocks for name in block.parameters]
        return frozenset(name for name in names if names.count(name) > 1)

    def _samples(self) -> tuple[list[_Sample], list[_Sample]]:
        """Batches to be taught on, and held back ones from the examination, as many as may be kept."""
        course = self._course
        outputs = [value.name for value in course.student.model.proto.graph.output]
        exams = (_Sample(feed, dict(zip(outputs, reference, strict=True)), {}, {}) for feed, reference in course.examination())
        first = course.lessons.at(0)[0]
        batch_bytes = self._batch_bytes(first.feed)
        count = max(1, int((1 - _HELD_BACK) * KEPT_BYTES / batch_bytes))
        steps = range(-(-min(count, course.lessons.epoch) // course.lessons.runs))
        shown = [lesson for step in steps for lesson in course.lessons.at(step)][:count]
        lessons = [_Sample(lesson.feed, lesson.answers, {}, {}) for lesson in shown]
        return lessons, list(islice(exams, max(1, int(_HELD_BACK * KEPT_BYTES / batch_bytes))))

    def _batch_bytes(self, feed: Arrays) -> int:
        """Of a batch's entry and exit together, at most."""
        job = self._course.job
        cuts = [block.exits[0] for block in self.blocks[:-1]]
        sizes = [array.nbytes for array in Executor.of(job.reference, cuts, job.calibration).run_feed(feed)]
        return 1 + 2 * max(sizes)


class _Workshop:
    """One block with its loss."""

    def __init__(self, course: Course, block: Block, shared: frozenset[str], *, is_last: bool) -> None:
        self._course, self._block, self._is_last = course, block, is_last
        job, student = course.job, course.student
        self._proto = extracted(student, block)
        self._teacher = None if is_last else Executor.of(job.reference, block.exits, job.calibration)
        runtime = job.calibration
        weights = job.model.weights
        self._forward = open_session(self._proto, weights=weights, threads=runtime.threads, providers=runtime.providers)
        self._known = {name: each for name, each in student.parameters.items() if name in block.parameters}
        self._own = [name for name in course.learner.trained if name in block.parameters - shared]

    def aim(self, samples: Sequence[_Sample]) -> None:
        """Put into samples what the original has at the exit."""
        for sample in samples:
            found = None if self._teacher is None else self._teacher.run_feed(sample.feed)
            sample.aim = sample.answers if found is None else dict(zip(self._block.exits, found, strict=True))

    def hand_on(self, samples: Sequence[_Sample]) -> None:
        """Put into samples what the block yields, as the entry of the next."""
        if not self._is_last:
            values = self._projected(self._course.flat)
            for sample in samples:
                sample.entry = dict(zip(self._block.exits, self._yielded(values, sample), strict=True))

    def teach(self, lessons: Sequence[_Sample], exams: Sequence[_Sample], steps: int, rate: float, seed: int) -> tuple[BlockPoint, Float32]:
        """What was reached, and the values of all parameters."""
        flat = self._course.flat.copy()
        before = best_error = self._error(flat, exams)
        best = flat.copy()
        learner = self._learner(flat)
        if learner is None:
            return BlockPoint(self._block.exits[0], before, before), flat
        adam = Adam(learner.flat, units_of(learner.parameters, len(learner.flat)), self._course.options.adam)
        runs = self._course.lessons.runs
        for step in range(steps):
            shown = [lessons[place] for place in _drawn(len(lessons), runs, step, seed)]
            learner.learn([{**sample.feed, **sample.entry, **_named(sample.aim)} for sample in shown])
            adam.step(learner.gradient, rate * schedule(step, steps, int(_WARMUP * steps)))
            if (step + 1) % max(1, steps // _EXAMS) == 0 or step + 1 == steps:
                for name, parameter in learner.parameters.items():
                    flat[self._known[name].part] = learner.flat[parameter.part]
                error = self._error(flat, exams)
                if error < best_error:
                    best_error, best = error, flat.copy()
        for name in learner.parameters:
            known = self._known[name]
            best[known.part] = settled(known.latent, best[known.part], known.start)
        return BlockPoint(self._block.exits[0], before, best_error), best

    def _learner(self, flat: Float32) -> Learner | None:
        """The block with its loss; None where no gradient reaches a parameter."""
        job = self._course.job
        terms: Sequence[Term] = [SquaredError(name, ANSWER + name) for name in self._block.exits]
        if self._is_last:
            terms = output_terms(job, self._course.options)
        try:
            slope = slope_of(self._proto, terms, self._own, job.model.weights)
        except InputError:
            return None
        if not slope.gradients:
            return None
        parameters = compact(self._known)
        own = np.concatenate([flat[self._known[name].part] for name in parameters])
        return Learner(slope, parameters, own, job.calibration, job.model.weights)

    def _error(self, flat: Float32, samples: Sequence[_Sample]) -> float:
        """At the exit, on samples with aims."""
        values = self._projected(flat)
        if self._is_last:
            total = Divergence(self._course.job.kinds)
            for sample in samples:
                total.add([sample.aim[name] for name in self._block.exits], self._yielded(values, sample))
            return total.value
        off = size = 0.0
        for sample in samples:
            (found,) = self._yielded(values, sample)
            aim = sample.aim[self._block.exits[0]]
            off += float(np.square(found - aim, dtype=np.float64).sum())
            size += float(np.square(aim, dtype=np.float64).sum())
        return off / size if size > 0 else off

    def _projected(self, flat: Float32) -> dict[str, Value]:
        """What the block's parameters are fed with."""
        fed = {}
        for name, parameter in self._known.items():
            out = np.zeros(parameter.latent.shape, np.float32)
            parameter.project(flat, out)
            fed[name] = to_value(out)
        return fed

    def _yielded(self, values: Mapping[str, Value], sample: _Sample) -> list[NDArray[Any]]:
        fed = {name: to_value(array) for name, array in (*sample.feed.items(), *sample.entry.items())}
        return [to_array(value) for value in self._forward.run(self._block.exits, {**values, **fed})]


def extracted(student: Student, block: Block) -> ModelProto:
    """A block as a model: its entry, the model's inputs and its parameters are inputs, its exits are outputs.

    Raises:
        InputError: the student cannot be brought into the form that types are inferred in.
    """
    source = student.model.proto
    known = _values(student.model)
    declared: dict[str, ValueInfoProto] = {value.name: value for value in (*source.graph.input, *source.graph.output)}
    nodes = [source.graph.node[position] for position in block.nodes]
    read = set().union(*(reads(node) for node in nodes)) | set(block.exits)
    proto = ModelProto()
    copy_fields(source, proto, ("graph", "training_info"))
    proto.graph.name = f"{source.graph.name}, block"
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(tensor for tensor in source.graph.initializer if tensor.name in read)
    proto.graph.sparse_initializer.extend(tensor for tensor in source.graph.sparse_initializer if tensor.values.name in read)
    names = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in source.graph.input if value.name in read and value.name != block.entry]
    proto.graph.input.extend(inputs)
    if block.entry is not None:
        proto.graph.input.append(typed(known[block.entry]))
    proto.graph.output.extend(declared.get(name) or typed(known[name]) for name in block.exits)
    made = {name for node in nodes for name in node.output} - set(block.exits) - names
    proto.graph.value_info.extend(value for value in source.graph.value_info if value.name in made)
    return proto


def _named(aim: Arrays) -> dict[str, NDArray[Any]]:
    return {ANSWER + name: array for name, array in aim.items()}


def _drawn(count: int, runs: int, step: int, seed: int) -> list[int]:
    """Numbers of the batches that make up a step: all in turn, in another order each time round."""
    found = []
    for number in range(step * runs, (step + 1) * runs):
        rounds, place = divmod(number, count)
        found.append(int(np.random.default_rng((seed, 5, rounds)).permutation(count)[place]))
    return found
