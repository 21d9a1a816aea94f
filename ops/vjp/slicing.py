"""Slices and paddings: one puts zeros where the other takes away."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .base import Call, Gradients, Rules, Unsupported
from .lengths import (
    INT64_MAX,
    INT64_MIN,
    Length,
    difference,
    entries,
    flip,
    greatest,
    least,
    length,
    lengths,
    pad,
    positive_axis,
    reshape,
    total,
)

# --- Slice


@dataclass(frozen=True)
class _Cut:
    """What a Slice takes along one axis: entries `low`, `low` + |step|, … of `whole`, `count` in all, backwards if step < 0."""

    axis: int
    low: int
    step: int
    count: int
    whole: int

    @property
    def stride(self) -> int:
        """Distance of neighbours; that of a single entry is of no matter."""
        return abs(self.step) if self.count > 1 else 1

    @property
    def phase(self) -> int:
        """Place of an entry in its block of `stride`."""
        return self.low % self.stride


def _slice(call: Call) -> Gradients:
    axes = _sliced_axes(call)
    if axes is None or (call.has_input(4) and call.x(4).constant is None):
        return {0: _by_position(call)}
    steps = [int(step) for step in call.known(4)] if call.has_input(4) else [1] * len(axes)
    if all(step == 1 for step in steps):
        return {0: _padded_back(call, axes)}
    cuts = _cuts(call, axes, steps)
    return {0: _by_position(call) if cuts is None else _spread_back(call, cuts)}


def _sliced_axes(call: Call) -> list[int] | None:
    """The axes, counted from the front; None where only a run tells."""
    starts = call.x(1)
    if starts.shape is None or starts.shape[0] is None or call.x().shape is None or call.y().shape is None:
        return None
    if not call.has_input(3):
        return list(range(starts.shape[0]))
    found = call.x(3).constant
    return None if found is None else [positive_axis(int(axis), call.x().rank) for axis in found]


def _padded_back(call: Call, axes: list[int]) -> str:
    """The gradient of a slice of step one: zeros on either side."""
    before, after = [], []
    for axis, start in zip(axes, entries(call, call.x(1)), strict=True):
        whole, count = length(call, call.x(), axis), length(call, call.y(), axis)
        before.append(0 if whole == count else _first(call, start, whole))
        after.append(difference(call, whole, before[-1], count))
    return pad(call, call.dy, axes, before, after)


def _first(call: Call, start: Length, whole: Length) -> Length:
    """The first entry that a start means: counted from the end if negative, within bounds."""
    if isinstance(start, int):
        return least(call, start, whole) if start > 0 else start and greatest(call, total(call, [whole, start]), 0)
    from_end = call.op("Add", start, call.ints(whole) if isinstance(whole, int) else whole)
    counted = call.op("Where", call.op("Less", start, call.ints(0)), from_end, start)
    return greatest(call, least(call, counted, whole), 0)


def _cuts(call: Call, axes: list[int], steps: list[int]) -> list[_Cut] | None:
    """What is taken along each axis, if all of it is known."""
    starts = call.x(1).constant
    if starts is None:
        return None
    cuts = []
    for axis, start, step in zip(axes, starts.tolist(), steps, strict=True):
        whole, count = length(call, call.x(), axis), length(call, call.y(), axis)
        if isinstance(whole, str) or isinstance(count, str):
            return None
        first = max(start + whole, 0) if start < 0 else start
        low = min(first, whole) if step > 0 else min(first, whole - 1) + (count - 1) * step
        cuts.append(_Cut(axis, low, step, count, whole))
    return cuts


def _spread_back(call: Call, cuts: list[_Cut]) -> str:
    """The gradient of a slice with steps: entries are set apart by zeros, then padded to the whole.

    Zeros between entries come from an axis of their own, of length `stride`, with the entry at `phase`.
    """
    if any(cut.count == 0 for cut in cuts):
        return call.zeros_like(call.x())
    gradient = flip(call, call.dy, [cut.axis for cut in cuts if cut.step < 0 and cut.count > 1])
    apart = sorted((cut for cut in cuts if cut.stride > 1), key=lambda cut: cut.axis)
    if apart:
        inner = [cut.axis + index + 1 for index, cut in enumerate(apart)]
        gradient = call.op("Unsqueeze", gradient, call.ints(*inner))
        gradient = pad(call, gradient, inner, [cut.phase for cut in apart], [cut.stride - 1 - cut.phase for cut in apart])
        shape = lengths(call, call.y())
        for cut in apart:
            shape[cut.axis] = cut.count * cut.stride
        gradient = reshape(call, gradient, shape)
    before = [cut.low - cut.phase for cut in cuts]
    after = [cut.whole - lead - cut.count * cut.stride for cut, lead in zip(cuts, before, strict=True)]
    gradient = pad(call, gradient, [cut.axis for cut in cuts], before, [max(0, trail) for trail in after])
    beyond = [cut for cut, trail in zip(cuts, after, strict=True) if trail < 0]
    if not beyond:
        return gradient
    ends, axes = call.ints(*(cut.whole for cut in beyond)), call.ints(*(cut.axis for cut in beyond))
    return call.op("Slice", gradient, call.ints(*[0] * len(beyond)), ends, axes)


def _by_position(call: Call) -> str:
    """The gradient of any slice: the same slice of the elements' positions tells where each one goes."""
    x = call.x()
    zero, one = (call.scalar(number, np.dtype(np.int64)) for number in (0, 1))
    everywhere = call.reshape_like(call.op("Range", zero, call.op("Size", x.name), one), x)
    arguments = [value.name if value is not None else "" for value in call.inputs[1:]]
    positions = call.op("Reshape", call.op("Slice", everywhere, *arguments), call.ints(-1))
    zeros = call.op("Reshape", call.zeros_like(x), call.ints(-1))
    return call.reshape_like(call.op("ScatterElements", zeros, positions, call.op("Reshape", call.dy, call.ints(-1)), axis=0), x)


# --- Pad


def _pad(call: Call) -> Gradients:
    if call.attribute("mode", "constant") != "constant":
        return {0: _folded_back(call)}
    gradients = {}
    if 0 in call.wanted:
        gradients[0] = _cropped(call)
    if 2 in call.wanted:
        gradients[2] = _at_padding(call)
    return gradients


def _cropped(call: Call) -> str:
    """The gradient of what constants surround: a crop where entries were added, zeros where they were taken."""
    if call.x(1).constant is None or (call.has_input(3) and call.x(3).constant is None):
        return call.op("Pad", call.dy, call.op("Neg", call.x(1).name), "", *_axes_input(call))
    pads = _known_pads(call)
    gradient = call.dy
    grown = [(axis, max(lead, 0), -trail if trail > 0 else INT64_MAX) for axis, lead, trail in pads if lead > 0 or trail > 0]
    if grown:
        axes, starts, ends = zip(*grown, strict=True)
        gradient = call.op("Slice", gradient, call.ints(*starts), call.ints(*ends), call.ints(*axes))
    before, after = ([max(-pads_of[side], 0) for pads_of in pads] for side in (1, 2))
    return pad(call, gradient, [axis for axis, _, _ in pads], before, after)


def _axes_input(call: Call) -> list[str]:
    return [call.x(3).name] if call.has_input(3) else []


def _known_pads(call: Call) -> list[tuple[int, int, int]]:
    """Axis, entries before and entries after, for each padded axis."""
    flat = call.known(1).tolist()
    count = len(flat) // 2
    axes = call.known(3).tolist() if call.has_input(3) else range(count)
    return list(zip(axes, flat[:count], flat[count:], strict=True))


def _at_padding(call: Call) -> str:
    """The gradient of the constant: the sum over entries that hold it."""
    held = call.op("Pad", call.zeros_like(call.x()), call.x(1).name, call.scalar(1), *_axes_input(call))
    summed = call.op("ReduceSum", call.op("Mul", call.dy, held), keepdims=0)
    return call.reshape_like(summed, call.x(2))


def _folded_back(call: Call) -> str:
    """The gradient of a padding with the value's own entries: one axis after the other, each entry's copies are added to it."""
    gradient = call.dy
    for axis, before, after in _known_pads(call):
        if before < 0 or after < 0:
            raise Unsupported("negative pads in a mode that copies entries")
        if before or after:
            gradient = _folded(call, gradient, positive_axis(axis, call.x().rank), before, after)
    return gradient


def _folded(call: Call, gradient: str, axis: int, before: int, after: int) -> str:
    """Undo the padding of one axis.

    Raises:
        Unsupported: the padding may repeat entries more than once, or the mode is unknown.
    """
    mode, whole = call.attribute("mode"), length(call, call.x(), axis)
    if mode not in ("reflect", "edge", "wrap"):
        raise Unsupported(f"pads of mode '{mode}'")
    if mode != "edge" and (mode == "wrap" if isinstance(whole, str) else max(before, after) > whole - (mode == "reflect")):
        raise Unsupported(f"{mode} pads that repeat entries more than once, or may do so")

    def part(start: int, end: int, step: int = 1) -> str:
        return call.op("Slice", gradient, call.ints(start), call.ints(end), call.ints(axis), call.ints(step))

    terms = [part(before, -after if after else INT64_MAX)]
    for count, front in ((before, True), (after, False)):
        if not count:
            continue
        if mode == "reflect":
            copies = part(count - 1, INT64_MIN, -1) if front else part(-1, -count - 1, -1)
        else:
            copies = part(0, count) if front else part(-count, INT64_MAX)
        if mode == "edge":
            copies, count = call.op("ReduceSum", copies, call.ints(axis), keepdims=1), 1
        near = int(mode == "reflect")
        far = difference(call, whole, near + count)
        before_them, after_them = (near, far) if front != (mode == "wrap") else (far, near)
        terms.append(pad(call, copies, [axis], [before_them], [after_them]))
    return call.op("Sum", *terms)


RULES: Rules = {"Slice": _slice, "Pad": _pad}
