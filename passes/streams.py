"""Which labels share a factor, whether rescaling them pays, and by how much.

A *stream* is all values that share factors with each other. Its factors are those of `equalize`, unless its ranges would not become more
equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from intaglio.ops.moment import Moment

from .graph import MAIN
from .sites import Site
from .trace import Operand, Trace
from .weights import WeightStore

MAX_EXPONENT = 4
"""Factors lie in [2⁻⁴, 2⁴]: beyond, a weight's own scale would have to cover too wide a range."""


@dataclass(frozen=True, eq=False)
class Measured:
    """An operand that is a site, with the mean square of what it multiplies.

    Attributes:
        operand: the operand; `times` are its input channels.
        squares: of each of them, in the order of `times`.
    """

    operand: Operand
    squares: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Stream:
    """Values that share factors, and what was decided for them; the fields are those of `Equalization`."""

    value: str
    classes: NDArray[np.int64]
    rescaled: int
    bits_before: float
    bits_after: float
    reason: str


@dataclass(frozen=True, eq=False)
class Streams:
    """A solution.

    Attributes:
        all: the streams, in the order of the graph.
        classes: class of each label: labels of one class share a factor.
        exponents: log₂ of each class's factor.
    """

    all: tuple[Stream, ...]
    classes: NDArray[np.int64]
    exponents: NDArray[np.int64]

    def exponent(self, operand: Operand) -> NDArray[np.int64]:
        """log₂ of what a constant's entries are multiplied with, broadcasting to the operand's view."""
        total = np.zeros((1,) * len(operand.view), np.int64)
        for labels, sign in ((operand.times, 1), (operand.over, -1)):
            if labels is not None:
                total = total + sign * self.exponents[self.classes[labels]]
        return total


def measured_operands(trace: Trace, sites: Iterable[Site], statistics: Mapping[str, Moment]) -> list[Measured]:
    """Which operands are sites with a measured input."""
    names = {(use.use.node.output[0], use.use.index): site.name for site in sites for use in site.uses if use.scope == MAIN}
    found = []
    for operand in trace.operands:
        moment = statistics.get(names.get((operand.node.output[0], operand.index), ""))
        if moment is not None and moment.rows > 0 and operand.times is not None:
            squares = moment.diag.reshape(operand.times.size, -1).mean(1)  # of a Conv: over the positions of the kernel
            found.append(Measured(operand, squares))
    return found


def solve(trace: Trace, weights: WeightStore, measured: Sequence[Measured], alpha: float) -> Streams:
    """Classes, streams and factors."""
    ties = [(one.reshape(-1), other.reshape(-1)) for one, other in trace.ties]
    classes = _components(trace.count, ties)
    count = int(classes.max(initial=-1)) + 1
    reasons = _reasons(trace, classes)
    ranges, extents = np.zeros(count), np.zeros(count)
    for each in measured:
        labels = each.operand.times
        if labels is None or all(int(one) in reasons for one in classes[labels].reshape(-1)):
            continue
        np.maximum.at(ranges, classes[labels].reshape(-1), np.sqrt(each.squares))
        np.maximum.at(extents, classes[labels].reshape(-1), _extent(weights.read(trace.constants[each.operand.tensor]), each.operand))
    exponents = np.zeros(count, np.int64)
    streams = []
    for value, members in _members(trace, classes, count):
        frozen = np.array([int(one) in reasons for one in members])
        chosen, stream = _decide(value, members, frozen, (ranges[members], extents[members]), alpha)
        exponents[members] = chosen
        why = next((reasons[int(one)] for one in members if int(one) in reasons), "")
        streams.append(replace(stream, reason="; ".join(filter(None, (why, stream.reason)))))
    return Streams(tuple(streams), classes, exponents)


def _reasons(trace: Trace, classes: NDArray[np.int64]) -> dict[int, str]:
    """Frozen classes, each with the first reason."""
    reasons: dict[int, str] = {}
    for labels, reason in trace.frozen:
        for one in np.unique(classes[labels]):
            reasons.setdefault(int(one), reason)
    return reasons


def _components(count: int, pairs: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> NDArray[np.int64]:
    """Connected component of each of `count` vertices."""
    if not count:
        return np.empty(0, np.int64)
    ends = [np.concatenate([pair[side] for pair in pairs]) if pairs else np.empty(0, np.int64) for side in (0, 1)]
    graph = coo_array((np.ones(len(ends[0])), (ends[0], ends[1])), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def _members(trace: Trace, classes: NDArray[np.int64], count: int) -> list[tuple[str, NDArray[np.int64]]]:
    """Streams as (first value, classes): values that share a class are in one stream."""
    owned = [np.unique(classes[labels]) for labels in trace.layouts.values()]
    pairs = [(np.full(len(own), count + number), own) for number, own in enumerate(owned)]
    parts = _components(count + len(owned), pairs)
    streams: dict[int, tuple[str, list[NDArray[np.int64]]]] = {}
    for number, (name, own) in enumerate(zip(trace.layouts, owned, strict=True)):
        streams.setdefault(int(parts[count + number]), (name, []))[1].append(own)
    return [(name, np.unique(np.concatenate(own))) for name, own in streams.values()]


def _extent(value: NDArray[np.generic], operand: Operand) -> NDArray[np.float64]:
    """Largest magnitude of a weight for each of its input channels, in the order of `times`."""
    labels = operand.times
    assert labels is not None  # only measured operands come here
    axes = tuple(axis for axis, size in enumerate(labels.shape) if size == 1)
    view = np.asarray(value).reshape(operand.view)
    return np.asarray(np.maximum(view.max(axis=axes), -view.min(axis=axes)), np.float64).reshape(-1)


def _decide(
    value: str,
    members: NDArray[np.int64],
    frozen: NDArray[np.bool_],
    measured: tuple[NDArray[np.float64], NDArray[np.float64]],
    alpha: float,
) -> tuple[NDArray[np.int64], Stream]:
    """log₂ of the factors of one stream's classes, and the stream.

    Args:
        value: the stream's first value.
        members: its classes.
        frozen: which of them keep the factor 1.
        measured: range of each class, and largest weight that reads it; 0 where not known.
        alpha: as in `equalize`.
    """
    ranges, extents = measured
    none = np.zeros(len(members), np.int64)
    known = (ranges > 0) & (extents > 0)
    if not (known & ~frozen).any():
        return none, Stream(value, members, 0, 0.0, 0.0, "" if frozen.all() else "no statistics of what reads it")
    wanted = np.zeros(len(members))
    wanted[known] = alpha * np.log2(ranges[known]) - (1 - alpha) * np.log2(extents[known])
    centred = np.rint(wanted - wanted[known].mean())
    exponents = np.where(known & ~frozen, np.clip(centred, -MAX_EXPONENT, MAX_EXPONENT), 0).astype(np.int64)
    active = ranges > 0
    before, after = (_bits(np.log2(ranges[active]) - shift) for shift in (0, exponents[active]))
    if after >= before:
        reason = "its ranges would become less equal" if exponents.any() else "its channels are balanced already"
        return none, Stream(value, members, 0, before, before, reason)
    return exponents, Stream(value, members, int(np.count_nonzero(exponents)), before, after, "")


def _bits(logarithms: NDArray[np.float64]) -> float:
    return float(logarithms.max() - logarithms.mean())
