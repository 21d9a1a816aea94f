"""Checkpointing: compute forward values again in the reverse pass instead of keeping them (Chen et al. 2016, arXiv 1604.06174).

Before: the forward nodes and a tape that reads their values. After: the tape reads copies; the nodes that make the copies start from the
values that are kept.

Values that are not kept connect forward nodes to *segments*. A segment is computed again only once the reverse pass has reached it: what
enters it passes a gate (`gates.py`) that waits for the cotangent which the segment's last operator receives. So the copies cannot run
before, and common-subexpression elimination cannot merge them with the originals.

Must not fire on: operators that draw random numbers or hold nested graphs, values that depend on no input (they are folded at load), and
the graph's outputs; all of these are kept.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from onnx import NodeProto

from intaglio.ops.vjp import Tape, Value

from .gates import Gates
from .graph import nested_graphs, reads
from .modernize import rename
from .values import nbytes

_RANDOM = frozenset({"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"})


@dataclass(frozen=True)
class Recomputed:
    """A reverse pass that computes forward values again.

    Attributes:
        nodes: the nodes of the tape on copies, and those that make the copies; not in topological order.
        values: names of the forward values that the reverse pass would otherwise keep.
    """

    nodes: tuple[NodeProto, ...]
    values: frozenset[str]


def recompute_forward(
    nodes: Sequence[NodeProto],
    tape: Tape,
    entered: Sequence[tuple[NodeProto, str]],
    barrier: Gates,
    values: Mapping[str, Value],
    inputs: Collection[str],
    outputs: Collection[str],
    keep: frozenset[str] | None,
) -> Recomputed:
    """Make a tape read copies of what is not kept.

    Args:
        nodes: the forward nodes, in topological order.
        tape: the reverse pass, complete. Its nodes are not changed; names, a few nodes and constants are added.
        entered: the nodes differentiated, in the order of the reverse pass, each with one of its cotangents.
        barrier: emits gates to the tape.
        values: what is known of the forward values; what is missing counts as small.
        inputs: names of the graph's inputs.
        outputs: names of the graph's outputs.
        keep: names of values to keep; None to choose them.
    """
    reverse = list(tape.nodes)
    varying = _varying(nodes, inputs)
    fixed = _fixed(nodes, inputs) | set(outputs)
    saved = {name for node in reverse for name in node.input}
    if keep is None:
        keep = _chosen(nodes, varying - fixed, saved, values)
    free = varying - fixed - keep
    segments = _segments(nodes, free)
    gates = {segments[_key(node)]: cotangent for node, cotangent in reversed(entered)}
    producers = {name: node for node in nodes for name in node.output if name}
    wanted = [name for name in _in_order(nodes) if name in free and name in saved and segments[_key(producers[name])] in gates]
    needed = _needed(wanted, producers, free)
    copies_of = {name: tape.names.fresh(f"again.{name}") for name in _in_order(nodes) if name in needed}
    copier = _Copier(tape, varying, free, segments, gates, copies_of, values, barrier)
    first = len(tape.nodes)
    copies = [copier.copy(node) for node in nodes if needed.intersection(node.output)]
    renamed = {name: copies_of[name] for name in wanted}
    emitted = tape.nodes[first:]
    changed = []
    for node in reverse:
        copy = NodeProto()
        copy.CopyFrom(node)
        rename(copy, renamed)
        changed.append(copy)
    return Recomputed((*emitted, *copies, *changed), frozenset(wanted))


@dataclass(frozen=True)
class _Copier:
    """Copies nodes of segments.

    Attributes:
        tape: gives names.
        varying: values that depend on inputs, these included.
        free: values that are not kept.
        segments: node (by `_key`) → its segment.
        gates: segment → the cotangent that it waits for.
        copies: free value → its copy's name.
        values: what is known of the forward values.
        barrier: makes kept values wait.
    """

    tape: Tape
    varying: set[str]
    free: set[str]
    segments: Mapping[str, str]
    gates: Mapping[str, str]
    copies: Mapping[str, str]
    values: Mapping[str, Value]
    barrier: Gates
    _entrances: dict[tuple[str, str], str] = field(default_factory=dict)

    def copy(self, node: NodeProto) -> NodeProto:
        """The node on copies and gated values."""
        segment = self.segments[_key(node)]
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = self.tape.names.fresh(f"again.{node.name}") if node.name else ""
        for index, name in enumerate(node.input):
            if name in self.free:
                copy.input[index] = self.copies[name]
            elif name in self.varying:
                copy.input[index] = self._gated(segment, name)
        for index, name in enumerate(node.output):
            copy.output[index] = self.copies.get(name) or (self.tape.names.fresh(f"again.{name}") if name else "")
        return copy

    def _gated(self, segment: str, name: str) -> str:
        """A kept value, there once the segment's cotangent is."""
        if (segment, name) not in self._entrances:
            self._entrances[segment, name] = self.barrier.wait(name, self.values.get(name), [self.gates[segment]])
        return self._entrances[segment, name]


# --- which values can be had again


def _varying(nodes: Sequence[NodeProto], inputs: Collection[str]) -> set[str]:
    """Values that depend on an input, the inputs included."""
    found = set(inputs)
    for node in nodes:
        if found & reads(node):
            found.update(name for name in node.output if name)
    return found


def _fixed(nodes: Sequence[NodeProto], inputs: Collection[str]) -> set[str]:
    """Values that must be kept: the inputs, and what random operators and those with nested graphs make."""
    found = set(inputs)
    for node in nodes:
        if node.op_type in _RANDOM or any(nested_graphs(node)):
            found.update(node.output)
    return found


def _segments(nodes: Sequence[NodeProto], free: Collection[str]) -> dict[str, str]:
    """Node (by `_key`) → the segment that it is in: nodes are in one if values that are not kept connect them."""
    parents: dict[str, str] = {}

    def root(name: str) -> str:
        while parents.setdefault(name, name) != name:
            parents[name] = parents[parents[name]]
            name = parents[name]
        return name

    for node in nodes:
        key = root(_key(node))
        for name in {*node.output, *node.input}.intersection(free):
            parents[root(name)] = key = root(key)
    return {_key(node): root(_key(node)) for node in nodes}


def _needed(wanted: Sequence[str], producers: Mapping[str, NodeProto], free: Collection[str]) -> set[str]:
    """The free values that computing `wanted` takes."""
    found: set[str] = set()
    pending = list(wanted)
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending.extend(reads(producers[name]).intersection(free))
    return found


# --- which values to keep


def _chosen(nodes: Sequence[NodeProto], candidates: Collection[str], saved: Collection[str], values: Mapping[str, Value]) -> frozenset[str]:
    """Values to keep: those that cross cuts of the forward pass, and all after the last cut, which the reverse pass needs at once.

    Cuts divide what the reverse pass saves into parts of about equal size, and lie where few bytes cross. Of all numbers of parts up to
    2√n for n operators, that with the least estimated peak (what is kept plus the largest part) is taken.
    """
    steps = [node for node in nodes if not {*node.output}.isdisjoint(candidates)]
    if len(steps) < 2:
        return frozenset(candidates)
    sizes = {name: nbytes(values[name]) if name in values else 1 for name in candidates}
    crossing = _crossing(steps, candidates)
    bulk = np.cumsum([0, *(sum(sizes[name] for name in node.output if name in saved and name in sizes) for node in steps)])
    weight = np.array([sum(sizes[name] for name in names) for names in crossing])
    best: tuple[float, frozenset[str]] = math.inf, frozenset(candidates)
    for parts in range(2, 2 + math.isqrt(4 * len(steps))):
        cuts = _cuts(bulk, weight, parts)
        kept = frozenset().union(*(crossing[cut] for cut in cuts))
        bounds = [0, *cuts, len(steps)]
        largest = max(bulk[b] - bulk[a] for a, b in pairwise(bounds))
        peak = sum(sizes[name] for name in kept) + largest
        if peak < best[0]:
            last = {name for node in steps[cuts[-1] :] for name in node.output if name in sizes}
            best = float(peak), kept | last
    return best[1]


def _crossing(steps: Sequence[NodeProto], candidates: Collection[str]) -> list[set[str]]:
    """For every position: the candidates made before it that are read at or after it."""
    last = {name: position for position, node in enumerate(steps) for name in reads(node)}
    alive: set[str] = set()
    found: list[set[str]] = []
    for position, node in enumerate(steps):
        alive = {name for name in alive if last[name] >= position}
        found.append(set(alive))
        alive |= {name for name in node.output if name in candidates and last.get(name, -1) > position}
    return found


def _cuts(bulk: np.ndarray[Any, Any], weight: np.ndarray[Any, Any], parts: int) -> list[int]:
    """Positions that divide the bulk into parts, each the cheapest to cross within half a part around the even division."""
    total, count = float(bulk[-1]), len(weight)
    found: set[int] = set()
    for part in range(1, parts):
        low, middle, high = (int(np.searchsorted(bulk, total * (part + shift) / parts)) for shift in (-0.5, 0.0, 0.5))
        window = np.arange(max(1, low), min(count - 1, high) + 1)
        if len(window):
            found.add(int(window[np.lexsort((np.abs(window - middle), weight[window]))[0]]))
    return sorted(found) or [count // 2]


def _key(node: NodeProto) -> str:
    """The name of a node's first output, which is the node's alone."""
    return next(str(name) for name in node.output if name)


def _in_order(nodes: Sequence[NodeProto]) -> list[str]:
    return [name for node in nodes for name in node.output if name]
