"""Operators that change where elements lie, or repeat them, without computing: gradients go back the same way.

Slices and paddings are in `slicing`, gathers and scatters in `indexing`.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from .base import Call, Gradients, Rules, Value
from .lengths import Length, entry, length, lengths, pad, positive_axis, reshape, vector


def _reshaped(call: Call) -> Gradients:
    return {0: call.reshape_like(call.dy, call.x())}


def _transpose(call: Call) -> Gradients:
    order = call.attribute("perm")
    if order is None:
        return {0: call.op("Transpose", call.dy)}
    return {0: call.op("Transpose", call.dy, perm=[int(axis) for axis in np.argsort(order)])}


def _concat(call: Call) -> Gradients:
    if len(call.inputs) == 1:
        return {0: call.dy}
    axis = positive_axis(call.attribute("axis"), call.y().rank)
    parts = [length(call, call.x(index), axis) for index in range(len(call.inputs))]
    numbers = [part for part in parts if isinstance(part, int)]
    if len(numbers) == len(parts) and len(call.wanted) < len(parts):
        ends = list(accumulate(numbers))
        return {
            index: call.op("Slice", call.dy, call.ints(ends[index] - numbers[index]), call.ints(ends[index]), call.ints(axis))
            for index in call.wanted
        }
    pieces = call.ops("Split", call.dy, vector(call, parts), outputs=len(parts), axis=axis)
    return {index: pieces[index] for index in call.wanted}


def _split(call: Call) -> Gradients:
    """The inverse of Concat; parts that the loss does not depend on are zeros."""
    axis = positive_axis(call.attribute("axis", 0), call.x().rank)
    used = [index for index, cotangent in enumerate(call.cotangents) if cotangent is not None]
    parts = [value.shape[axis] if value is not None and value.shape is not None else None for value in call.outputs]
    if used == list(range(used[0], used[-1] + 1)) and None not in parts:
        numbers = [part for part in parts if part is not None]
        pieces = [cotangent for cotangent in call.cotangents if cotangent is not None]
        joined = pieces[0] if len(pieces) == 1 else call.op("Concat", *pieces, axis=axis)
        return {0: pad(call, joined, [axis], [sum(numbers[: used[0]])], [sum(numbers[used[-1] + 1 :])])}
    pieces = [cotangent or call.zeros_like(call.y(index)) for index, cotangent in enumerate(call.cotangents)]
    return {0: call.op("Concat", *pieces, axis=axis)}


def _expand(call: Call) -> Gradients:
    return {0: call.sum_to(call.dy, call.x())}


def _tile(call: Call) -> Gradients:
    """Copies lie along an axis of their own once the repeated one is split in (repeats, length); they are summed."""
    x, y = call.x(), call.y()
    shape: list[Length] = []
    summed = []
    for axis, one in enumerate(lengths(call, x)):
        times = _repeats(call, x, y, axis)
        if times != 1:
            summed.append(len(shape))
            shape.append(times)
        shape.append(one)
    if not summed:
        return {0: call.dy}
    return {0: call.op("ReduceSum", reshape(call, call.dy, shape), call.ints(*summed), keepdims=0)}


def _repeats(call: Call, x: Value, y: Value, axis: int) -> Length:
    """How often an axis is repeated: from the shapes where they tell."""
    one, many = (value.shape[axis] if value.shape is not None else None for value in (x, y))
    return many // one if one and many is not None else entry(call, call.x(1), axis)


def _trilu(call: Call) -> Gradients:
    inputs = [call.dy, call.x(1).name] if call.has_input(1) else [call.dy]
    return {0: call.op("Trilu", *inputs, upper=call.attribute("upper", 1))}


def _cumsum(call: Call) -> Gradients:
    """An entry is in all later sums, so that its gradient is the sum from the other end."""
    backwards = 1 - call.attribute("reverse", 0)
    return {0: call.op("CumSum", call.dy, call.x(1).name, exclusive=call.attribute("exclusive", 0), reverse=backwards)}


def _reverse_sequence(call: Call) -> Gradients:
    axes = {"batch_axis": call.attribute("batch_axis", 1), "time_axis": call.attribute("time_axis", 0)}
    return {0: call.op("ReverseSequence", call.dy, call.x(1).name, **axes)}


RULES: Rules = {
    "Reshape": _reshaped,
    "Flatten": _reshaped,
    "Squeeze": _reshaped,
    "Unsqueeze": _reshaped,
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Expand": _expand,
    "Tile": _tile,
    "Trilu": _trilu,
    "CumSum": _cumsum,
    "ReverseSequence": _reverse_sequence,
}
