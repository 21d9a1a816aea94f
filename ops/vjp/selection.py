"""Operators that let one of several operands through, element by element.

At ties the whole gradient goes to one operand: to the first of equal ones in Min and Max, and past a bound in Clip.
"""

from __future__ import annotations

import numpy as np

from .base import Call, Gradients, Rules, Unsupported


def _where(call: Call) -> Gradients:
    condition, zero = call.x(0).name, call.scalar(0, call.y().dtype)
    chosen = {1: (call.dy, zero), 2: (zero, call.dy)}
    return {index: call.sum_to(call.op("Where", condition, *chosen[index]), call.x(index)) for index in call.wanted}


def _extreme(call: Call) -> Gradients:
    """Each operand in turn takes what the operands before it left where it equals the output; the last one takes the rest."""
    rest, gradients = call.dy, {}
    last = len(call.inputs) - 1
    for index in range(max(call.wanted) + 1):
        share = rest
        if index < last:
            won = call.cast(call.op("Equal", call.x(index).name, call.y().name), call.y().dtype)
            share = call.op("Mul", rest, won)
            if index < max(call.wanted):
                rest = call.op("Sub", rest, share)
        if index in call.wanted:
            gradients[index] = call.sum_to(share, call.x(index))
    return gradients


def _clip(call: Call) -> Gradients:
    """y = min(max(x, low), high), so that bounds the wrong way round always give the upper one.

    The input passes where it equals the output. What is cut off below belongs to the lower bound and what is cut off above to the upper
    one; where the lower bound is larger, all of it belongs to the upper one.
    """
    x, y = call.x().name, call.y().name
    gradients = {}
    if 0 in call.wanted:
        gradients[0] = call.op("Mul", call.dy, call.cast(call.op("Equal", x, y), call.x().dtype))
    if not call.wanted & {1, 2}:
        return gradients
    below, above = _total(call, "Less"), _total(call, "Greater")
    if call.has_input(1) and call.has_input(2):
        crossed = call.op("Greater", call.x(1).name, call.x(2).name)
        above = call.op("Where", crossed, call.op("Add", below, above), above)
        below = call.op("Where", crossed, call.scalar(0), below)
    totals = {1: below, 2: above}
    return gradients | {index: call.reshape_like(totals[index], call.x(index)) for index in call.wanted & {1, 2}}


def _total(call: Call, comparison: str) -> str:
    """The sum of the cotangent where the input compares so with the output, a scalar."""
    beyond = call.cast(call.op(comparison, call.x().name, call.y().name), call.x().dtype)
    return call.op("ReduceSum", call.op("Mul", call.dy, beyond), keepdims=0)


def _dropout(call: Call) -> Gradients:
    """The identity in inference; in training g / (1 − ratio) where the mask keeps. The mask is an output of the forward node."""
    training = call.x(2) if call.has_input(2) else None
    if training is None or (training.constant is not None and not training.constant.any()):
        return {0: call.dy}
    if 1 in call.wanted:
        raise Unsupported("the ratio of a Dropout in training is not differentiated")
    dtype, mask = call.x().dtype, call.add_output(1)
    scale = _dropout_scale(call)
    if training.constant is None:
        scale = call.op("Where", training.name, scale, call.scalar(1))
    return {0: call.op("Mul", call.op("Mul", call.dy, scale), call.cast(mask, dtype))}


def _dropout_scale(call: Call) -> str:
    """1 / (1 − ratio), a scalar of the data's type."""
    ratio = call.x(1) if call.has_input(1) else None
    if ratio is None or ratio.constant is not None:
        share = 0.5 if ratio is None or ratio.constant is None else float(ratio.constant.item())
        return call.scalar(1 / (1 - share) if share < 1 else 0.0)
    kept = call.op("Sub", call.scalar(1), call.cast(ratio.name, call.x().dtype))
    return call.op("Reciprocal", call.op("Reshape", kept, call.constant(np.zeros(0, np.int64))))


RULES: Rules = {
    "Clip": _clip,
    "Dropout": _dropout,
    "Max": _extreme,
    "Min": _extreme,
    "Where": _where,
}
