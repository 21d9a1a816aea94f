"""What a student is shown: batches of samples, and what the original model says about them.

Batches are drawn without replacement, epoch by epoch, from samples of equal shapes. They follow from the seed and the number of the step
alone, so training can be resumed anywhere. The original model is run once per sample and its outputs are kept, unless they do not fit in
memory, or do not have one row per sample. Where samples are changed at random, each changed batch is shown `SHOWINGS` times, and the
original is run once for these as far as its outputs fit in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .augment import augmented
from .data import Dataset
from .execute import Executor
from .job import Job

KEPT_BYTES = 1 << 28
"""Most bytes of outputs of the original model that are kept."""

SHOWINGS = 2
"""Epochs that show the same changed batches before samples are changed anew: asking the original model can take longer than teaching."""

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Lesson:
    """One run of the student.

    Attributes:
        feed: input name → array.
        answers: value name → what the original model has there.
        indices: which samples it holds.
    """

    feed: Arrays
    answers: Arrays
    indices: NDArray[np.int64]


class Lessons:
    """An endless course of lessons.

    Attributes:
        runs: lessons that make up one step: several where the model's batch is fixed, or limited, below the one asked for.
        epoch: lessons until each sample was shown once.
    """

    runs: int
    epoch: int

    def __init__(self, job: Job, values: Sequence[str], batch: int, augmentations: Sequence[str] = ()) -> None:
        """Sort the samples by shape.

        Args:
            job: its fit samples are shown.
            values: names of float values of its model that the student is to match.
            batch: samples per step.
            augmentations: names of random changes.
        """
        self._data, self._seed, self._names, self._augmentations = job.data, job.settings.seed, tuple(values), tuple(augmentations)
        self._teacher = Executor.of(job.reference, self._names, job.calibration)
        self._batch = batch
        self._groups = _alike(job.data, job.splits.fit, job.data.per_feed or 1)
        self.limit(job.data.per_feed or batch)
        self._kept: dict[int, tuple[NDArray[Any], ...]] | None = None if augmentations else {}
        self._kept_bytes = 0

    def limit(self, most: int) -> None:
        """Put at most so many samples into a lesson; a step then has more of them. A fixed batch stays as it is."""
        self._size = self._data.per_feed or min(most, self._batch)
        self.runs = max(1, round(self._batch / self._size))
        self.epoch = sum(-(-len(group) // self._size) for group in self._groups)
        self._batches: tuple[int, list[NDArray[np.int64]]] = (-1, [])
        self._changed: dict[int, tuple[NDArray[Any], ...]] = {}
        self._changed_bytes = 0

    def widest(self, most: int) -> Lesson:
        """A lesson of so many samples that takes the most memory: of those with the largest arrays."""
        count = self._data.per_feed or most
        group = max(self._groups, key=lambda group: sum(array.nbytes for array in joined_feed(self._data, group[:count]).values()))
        feed = joined_feed(self._data, group[:count])
        return Lesson(feed, dict(zip(self._names, self._teacher.run_feed(feed), strict=True)), group[:count])

    def at(self, step: int) -> list[Lesson]:
        """The lessons of a step."""
        return [self._lesson(step * self.runs + number) for number in range(self.runs)]

    def _lesson(self, number: int) -> Lesson:
        epoch, place = divmod(number, self.epoch)
        if not self._augmentations:
            indices = self._dealt(epoch)[place]
            feed = joined_feed(self._data, indices)
            return Lesson(feed, self._answers(indices, feed), indices)
        half = self.epoch // 2
        showing = epoch % SHOWINGS if half >= self.runs else 0
        first = epoch - showing
        if showing:  # halves are dealt anew by themselves, so that no step in which two epochs meet holds a batch twice
            rng = np.random.default_rng((self._seed, 6, epoch))
            place = int(np.concatenate([rng.permutation(half), half + rng.permutation(self.epoch - half)])[place])
        indices = self._dealt(first)[place]
        number = first * self.epoch + place
        changed = augmented(joined_feed(self._data, indices), self._augmentations, np.random.default_rng((self._seed, 2, number)))
        return Lesson(changed, self._answers_to_changed(number, changed), indices)

    def _dealt(self, epoch: int) -> list[NDArray[np.int64]]:
        """The batches of an epoch; answers that were kept for those of another one are forgotten."""
        if self._batches[0] != epoch:
            self._batches = epoch, self._shuffled(epoch)
            self._changed, self._changed_bytes = {}, 0
        return self._batches[1]

    def _shuffled(self, epoch: int) -> list[NDArray[np.int64]]:
        """The batches of an epoch; what a group lacks to fill its last one is drawn from the group again, if it is large enough."""
        rng = np.random.default_rng((self._seed, 1, epoch))
        chunks = []
        for group in self._groups:
            order = rng.permutation(group)
            if len(order) > self._size:
                order = np.concatenate([order, order[: -len(order) % self._size]])
            chunks += [order[start : start + self._size] for start in range(0, len(order), self._size)]
        return [chunks[place] for place in rng.permutation(len(chunks))]

    def _answers(self, indices: NDArray[np.int64], feed: Arrays) -> Arrays:
        kept = self._kept
        if kept is None or not all(int(index) in kept for index in indices):
            found = self._teacher.run_feed(feed)
            self._keep(indices, found)
            return dict(zip(self._names, found, strict=True))
        rows = [kept[int(index)] for index in indices]
        return {name: np.concatenate([row[number] for row in rows]) for number, name in enumerate(self._names)}

    def _answers_to_changed(self, number: int, feed: Arrays) -> Arrays:
        found = self._changed.get(number)
        if found is None:
            found = tuple(self._teacher.run_feed(feed))
            size_bytes = sum(array.nbytes for array in found)
            if self._changed_bytes + size_bytes <= KEPT_BYTES:
                self._changed[number] = found
                self._changed_bytes += size_bytes
        return dict(zip(self._names, found, strict=True))

    def _keep(self, indices: NDArray[np.int64], found: Sequence[NDArray[Any]]) -> None:
        if self._kept is None:
            return
        if any(array.ndim == 0 or len(array) != len(indices) for array in found):
            self._kept = None
            return
        for place, index in enumerate(indices):
            if int(index) in self._kept:
                continue
            rows = tuple(array[place : place + 1].copy() for array in found)
            self._kept_bytes += sum(row.nbytes for row in rows)
            if self._kept_bytes > KEPT_BYTES:
                self._kept = None
                return
            self._kept[int(index)] = rows


def joined_feed(data: Dataset, indices: NDArray[np.int64]) -> Arrays:
    """One feed of samples of equal shapes."""
    feed, _ = next(data.feeds(indices, len(indices)))
    return feed


def _alike(data: Dataset, indices: NDArray[np.int64], least: int) -> list[NDArray[np.int64]]:
    """Samples by shape; groups that cannot fill a feed of a fixed size are left out."""
    shapes = {}
    for index in indices:
        feed = joined_feed(data, np.array([index])) if data.per_feed is None else {}
        shapes[int(index)] = tuple(array.shape for array in feed.values())
    order = sorted(shapes, key=lambda index: (shapes[index], index))
    groups = [np.array(list(group), np.int64) for _, group in groupby(order, key=shapes.__getitem__)]
    return [group for group in groups if data.per_feed is None or len(group) >= least]
