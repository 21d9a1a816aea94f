"""Pools.

- MaxPool sends the cotangent to the input that the forward node names in its output Indices: the first one among equals.
- AveragePool and LpPool are sums over windows; the adjoint of such a sum adds each output's share to all inputs of its window. With unit
  strides that is a sum over windows again, for windows side by side a repetition, else a transposed convolution with ones, in which
  every channel is a sample.
- GlobalMaxPool shares the cotangent between equals.
- The p-norm has no gradient where it is 0; there it is taken to be 0. For p = 1 the gradient is the sign, 0 at 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import reduce

import numpy as np

from .base import Call, Gradients, Rules, Unsupported
from .windows import Windows, pool_windows, spread

# --- maxima


def _max_pool(call: Call) -> Gradients:
    if call.cotangents[0] is None or 0 not in call.wanted:
        return {}
    if call.attribute("storage_order", 0):
        raise Unsupported("indices in column-major order")
    windows, x = pool_windows(call), call.x()
    indices = call.add_output(1)
    if windows.disjoint and x.dtype == np.float32 and not windows.padded and not call.attribute("ceil_mode", 0):
        return {0: call.op("MaxUnpool", call.dy, indices, call.shape(x), kernel_shape=windows.kernel, strides=windows.strides)}
    flat = call.ints(-1)
    zeros = call.op("Reshape", call.zeros_like(x), flat)
    reduction = "none" if windows.disjoint else "add"
    spots, shares = call.op("Reshape", indices, flat), call.op("Reshape", call.dy, flat)
    return {0: call.reshape_like(call.op("ScatterElements", zeros, spots, shares, axis=0, reduction=reduction), x)}


def _global_max_pool(call: Call) -> Gradients:
    x = call.x()
    axes = call.ints(*range(2, x.rank))
    mask = call.cast(call.op("Equal", x.name, call.y().name), x.dtype)
    share = call.op("Div", call.dy, call.op("ReduceSum", mask, axes, keepdims=1))
    return {0: call.op("Mul", mask, share)}


# --- means


def _average_pool(call: Call) -> Gradients:
    windows = pool_windows(call)
    share = call.op("Div", call.dy, _count(call, windows))
    return {0: _spread_sum(call, share, windows)}


def _count(call: Call, windows: Windows) -> str:
    """How many inputs each mean is over: a scalar, or (outputs...)."""
    include, ceil = bool(call.attribute("count_include_pad", 0)), bool(call.attribute("ceil_mode", 0))
    if not ceil and (include or not windows.padded):
        return call.scalar(windows.size)
    counts = [_counts(windows, axis, include) for axis in range(windows.rank)]
    if all(count is not None for count in counts):
        return call.constant(reduce(np.multiply.outer, [count for count in counts if count is not None]).astype(call.x().dtype))
    if ceil:
        raise Unsupported("ceil_mode over an unknown length")
    return _count_at_run_time(call, windows)


def _counts(windows: Windows, axis: int, include: bool) -> np.ndarray | None:
    """Inputs, or inputs and padding, that each window of one axis meets; None where the length is unknown."""
    length, steps = windows.inputs[axis], windows.outputs[axis]
    if length is None or steps is None:
        return None
    taps = np.arange(steps)[:, None] * windows.strides[axis] + np.arange(windows.kernel[axis]) * windows.dilations[axis]
    front, behind = (0, windows.begin[axis] + windows.end[axis]) if include else (windows.begin[axis], windows.begin[axis])
    counts: np.ndarray = ((taps >= front) & (taps < length + behind)).sum(1)
    return counts


def _count_at_run_time(call: Call, windows: Windows) -> str:
    """The same as a sum over windows of ones of the input's shape."""
    dtype = call.x().dtype
    one = call.constant(np.ones((1,) * (2 + windows.rank), dtype))
    lengths = call.op("Concat", call.ints(1, 1), call.op("Shape", call.x().name, start=2), axis=0)
    kernel = call.constant(np.ones((1, 1, *windows.kernel), dtype))
    pads = (*windows.begin, *windows.end)
    return call.op("Conv", call.op("Expand", one, lengths), kernel, strides=windows.strides, dilations=windows.dilations, pads=pads)


def _global_average_pool(call: Call) -> Gradients:
    x = call.x()
    share = call.op("Div", call.dy, _positions(call))
    return {0: call.op("Expand", share, call.shape(x))}


def _positions(call: Call) -> str:
    """How many entries each channel has."""
    x = call.x()
    if x.static is not None:
        return call.scalar(int(np.prod(x.static[2:])))
    lengths = x.shape[2:] if x.shape is not None else (None,)
    if None not in lengths:
        return call.scalar(int(np.prod([length for length in lengths if length is not None])))
    count = call.op("ReduceProd", call.op("Shape", x.name, start=2), keepdims=0)
    return call.cast(count, x.dtype)


# --- norms


def _lp_pool(call: Call) -> Gradients:
    windows = pool_windows(call)
    return {0: _norm(call, lambda share: _spread_sum(call, share, windows))}


def _global_lp_pool(call: Call) -> Gradients:
    return {0: _norm(call, lambda share: share)}


def _norm(call: Call, widen: Callable[[str], str]) -> str:
    """sign(x)·|x|^(p−1) · widen(dy · y^(1−p)) for y = (Σ|x|^p)^(1/p)."""
    p, x, y = call.attribute("p", 2), call.x().name, call.y().name
    if p == 1:
        return call.op("Mul", call.op("Sign", x), widen(call.dy))
    zero = call.scalar(0)
    if p == 2:
        ratio, slope = y, x
    else:
        ratio = call.op("Pow", y, call.scalar(p - 1))
        slope = call.op("Mul", call.op("Sign", x), call.op("Pow", call.op("Abs", x), call.scalar(p - 1)))
    share = call.op("Where", call.op("Equal", ratio, zero), zero, call.op("Div", call.dy, ratio))
    return call.op("Mul", slope, widen(share))


# --- sums over windows


def _spread_sum(call: Call, share: str, windows: Windows) -> str:
    """Add each output's share to all inputs of its window; shaped like the input."""
    if windows.tiles:
        return _repeat(call, share, windows)
    if _mirrors(windows):
        return _sum_again(call, share, windows)
    x = call.x()
    ones = call.constant(np.ones((1, 1, *windows.kernel), x.dtype))
    lengths = call.op("Shape", share, start=2)
    single = call.op("Reshape", share, call.op("Concat", call.ints(-1, 1), lengths, axis=0))
    return call.reshape_like(spread(call, single, ones, windows, x.name), x)


def _mirrors(windows: Windows) -> bool:
    """Whether the adjoint is a sum over windows of the same shape, with padding that a pool accepts."""
    return windows.unit_stride and all(
        d == 1 and begin <= reach and end <= reach and (last is None or last == end)
        for d, reach, begin, end, last in zip(windows.dilations, windows.reach, windows.begin, windows.end, windows.last_end, strict=True)
    )


def _sum_again(call: Call, share: str, windows: Windows) -> str:
    before = [reach - begin for reach, begin in zip(windows.reach, windows.begin, strict=True)]
    behind = [reach - end for reach, end in zip(windows.reach, windows.end, strict=True)]
    mean = call.op("AveragePool", share, kernel_shape=windows.kernel, pads=(*before, *behind), count_include_pad=1)
    return call.op("Mul", mean, call.scalar(windows.size))


def _repeat(call: Call, share: str, windows: Windows) -> str:
    """Every output as often as its window is large; zeros for inputs behind the last window."""
    rank, x = windows.rank, call.x()
    inner = call.op("Unsqueeze", share, call.ints(*range(3, 3 + 2 * rank, 2)))
    factors = call.ints(1, 1, *itertools.chain.from_iterable((1, k) for k in windows.kernel))
    lengths = call.op("Mul", call.op("Shape", share, start=2), call.ints(*windows.kernel))
    whole = call.op("Reshape", call.op("Expand", inner, factors), call.op("Concat", call.ints(0, 0), lengths, axis=0))
    if all(end == 0 for end in windows.last_end):
        return whole
    missing = call.op("Sub", call.op("Shape", x.name, start=2), lengths)
    return call.op("Pad", whole, call.op("Concat", call.ints(*(0,) * (4 + rank)), missing, axis=0))


RULES: Rules = {
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average_pool,
    "GlobalLpPool": _global_lp_pool,
    "GlobalMaxPool": _global_max_pool,
    "LpPool": _lp_pool,
    "MaxPool": _max_pool,
}
