"""Sums, means, extremes, products and norms over axes.

Which axes are reduced may be known only at run time. With `noop_with_empty_axes` and no axes each element is its own reduction, for which
the same rules hold.
"""

from __future__ import annotations

import numpy as np

from .base import Call, Gradients, Rules

# --- between the shapes of input and output


def _kept(call: Call, name: str) -> str:
    """A value shaped like the output, so that it broadcasts against the input.

    Without axes the output has the input's shape or none at all, and either broadcasts.
    """
    if call.attribute("keepdims", 1) or not _has_axes(call):
        return name
    return call.op("Unsqueeze", name, call.x(1).name)


def _has_axes(call: Call) -> bool:
    """Whether axes are given, or may be."""
    if not call.has_input(1):
        return False
    axes = call.x(1).constant
    return axes is None or axes.size > 0


def _reduced(call: Call, op_type: str, name: str) -> str:
    """Reduce a value shaped like the input over the same axes, which are kept with length one."""
    axes = [call.x(1).name] if call.has_input(1) else []
    return call.op(op_type, name, *axes, keepdims=1, noop_with_empty_axes=call.attribute("noop_with_empty_axes", 0))


def _spread(call: Call, name: str) -> str:
    """A value shaped like the output, repeated to the shape of the input."""
    return call.op("Expand", _kept(call, name), call.shape(call.x()))


def _weight(call: Call) -> str:
    """One over the number of elements behind each element of the output, a scalar of the input's type.

    The number itself may be too large for float16.
    """
    x, axes = call.x(), call.x(1).constant if call.has_input(1) else np.zeros(0, np.int64)
    if x.shape is not None and axes is not None:
        everything = [] if call.attribute("noop_with_empty_axes", 0) else range(len(x.shape))
        known = [x.shape[axis] for axis in (axes.tolist() or everything)]
        numbers = [length for length in known if length is not None]
        if len(numbers) == len(known):
            return call.scalar(1 / max(float(np.prod(numbers)), 1))
    sizes = (call.cast(call.op("Size", name), np.dtype(np.float32)) for name in (call.y().name, x.name))
    return call.cast(call.op("Div", *sizes), x.dtype)


# --- sums


def _sum(call: Call) -> Gradients:
    return {0: _spread(call, call.dy)}


def _mean(call: Call) -> Gradients:
    return {0: _spread(call, call.op("Mul", call.dy, _weight(call)))}


def _log_sum(call: Call) -> Gradients:
    return {0: _spread(call, call.op("Mul", call.dy, call.op("Exp", call.op("Neg", call.y().name))))}


def _l1(call: Call) -> Gradients:
    """The subgradient at 0 is 0."""
    return {0: call.op("Mul", _kept(call, call.dy), call.op("Sign", call.x().name))}


def _sum_square(call: Call) -> Gradients:
    return {0: call.op("Mul", _kept(call, call.op("Mul", call.dy, call.scalar(2))), call.x().name)}


def _l2(call: Call) -> Gradients:
    """x / ‖x‖; the subgradient at 0 is 0."""
    norm = call.y().name
    nonzero = call.op("Where", call.op("Equal", norm, call.scalar(0)), call.scalar(1), norm)
    return {0: call.op("Mul", _kept(call, call.op("Div", call.dy, nonzero)), call.x().name)}


def _log_sum_exp(call: Call) -> Gradients:
    """exp(x − y), a softmax. Where all terms are −∞ it is 0."""
    y = call.y().name
    finite = call.op("Where", call.op("Equal", y, call.scalar(-np.inf)), call.scalar(0), y)
    softmax = call.op("Exp", call.op("Sub", call.x().name, _kept(call, finite)))
    return {0: call.op("Mul", _kept(call, call.dy), softmax)}


# --- extremes and products


def _extreme(call: Call) -> Gradients:
    """Of equal extremes each gets an equal share."""
    x = call.x()
    extreme = call.cast(call.op("Equal", x.name, _kept(call, call.y().name)), x.dtype)
    return {0: call.op("Mul", extreme, call.op("Div", _kept(call, call.dy), _reduced(call, "ReduceSum", extreme)))}


def _product(call: Call) -> Gradients:
    """The product of the others: that of all nonzero factors over the own one, if no other factor is 0; else 0."""
    x = call.x()
    zero = call.op("Equal", x.name, call.scalar(0))
    nonzero = call.op("Where", zero, call.scalar(1), x.name)
    zeros = call.cast(zero, x.dtype)
    others_nonzero = call.op("Equal", _reduced(call, "ReduceSum", zeros), zeros)
    others = call.op("Div", _reduced(call, "ReduceProd", nonzero), nonzero)
    return {0: call.op("Mul", _kept(call, call.dy), call.op("Where", others_nonzero, others, call.scalar(0)))}


# --- of several operands


def _mean_of_several(call: Call) -> Gradients:
    share = call.op("Div", call.dy, call.scalar(len(call.inputs)))
    return {index: call.sum_to(share, call.x(index)) for index in call.wanted}


RULES: Rules = {
    "ReduceSum": _sum,
    "ReduceMean": _mean,
    "ReduceMax": _extreme,
    "ReduceMin": _extreme,
    "ReduceProd": _product,
    "ReduceL1": _l1,
    "ReduceL2": _l2,
    "ReduceSumSquare": _sum_square,
    "ReduceLogSum": _log_sum,
    "ReduceLogSumExp": _log_sum_exp,
    "Mean": _mean_of_several,
}
