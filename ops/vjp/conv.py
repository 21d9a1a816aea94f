"""Convolutions.

The gradient of a Conv's input is a transposed convolution of the cotangent. With unit strides that is a convolution with the flipped
weight, which ONNX Runtime computes in its blocked layout if the weight is constant.

The gradient of the weight is, for each kernel position k, the product Σ dy[n, m, o] · x[n, c, stride·o + dilation·k − begin] over batch n
and output o: the cotangent times a shifted slice of the padded input. ONNX Runtime has four ways that are fast in different places:

- one product per position over some samples, with channels last, summed over the parts of the batch: a part is as much as stays in the
  cache between slice and product, if lengths are known, else the batch;
- one product per position and sample, summed over samples: 1×1 kernels, groups (depthwise ones too), large images of a batch of unknown
  size;
- one product per sample with the slices of all positions side by side: few channels, small kernels, such as the first layer;
- a convolution in which batch and channels change places: few channels, large kernels.

A ConvTranspose is the adjoint of a Conv, so input and cotangent change places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .base import Call, Dim, Gradients, Rules, Unsupported
from .windows import Windows, conv_windows, pad, shifts, spread, transposed_windows

_COLUMNS = 64
"""Columns (channels × kernel positions) up to which the slices of all positions are joined: beyond, copying costs more than it saves."""

_PART = 1 << 17
"""Entries of a slice of a part of the batch: half a megabyte in float32, so that slice and cotangent fit a second-level cache."""

_MOST_PARTS = 16
"""Parts of a batch at most, which bounds the size of the graph."""

_FEW_CHANNELS = 8
"""Below this a product per position leaves vector registers half empty."""


def _conv(call: Call) -> Gradients:
    weight = _weight_shape(call)
    windows, group = conv_windows(call, weight[2:]), call.attribute("group", 1)
    gradients = {}
    if 0 in call.wanted:
        gradients[0] = _input_gradient(call, windows, weight, group)
    if 1 in call.wanted:
        gradients[1] = _weight_gradient(call, call.x().name, call.dy, windows, weight, group)
    if 2 in call.wanted:
        gradients[2] = _bias_gradient(call, windows.rank)
    return gradients


def _conv_transpose(call: Call) -> Gradients:
    weight = _weight_shape(call)
    windows, group = transposed_windows(call, weight[2:]), call.attribute("group", 1)
    gradients = {}
    if 0 in call.wanted:
        gradients[0] = _convolve(call, call.dy, call.x(1).name, windows, group)
    if 1 in call.wanted:
        gradients[1] = _weight_gradient(call, call.dy, call.x().name, windows, weight, group)
    if 2 in call.wanted:
        gradients[2] = _bias_gradient(call, windows.rank)
    return gradients


def _weight_shape(call: Call) -> tuple[int, ...]:
    shape = call.x(1).static
    if shape is None:
        raise Unsupported(f"the shape of the weight '{call.x(1).name}' is unknown")
    return shape


def _bias_gradient(call: Call, rank: int) -> str:
    return call.op("ReduceSum", call.dy, call.ints(0, *range(2, 2 + rank)), keepdims=0)


# --- the input


def _input_gradient(call: Call, windows: Windows, weight: tuple[int, ...], group: int) -> str:
    behind = [reach - begin for reach, begin in zip(windows.reach, windows.begin, strict=True)]
    before = [reach - end for reach, end in zip(windows.reach, windows.end, strict=True)]
    if not windows.unit_stride or min(*behind, *before) < 0:
        return spread(call, call.dy, call.x(1).name, windows, call.x().name, group)
    flipped = _adjoint_weight(call, weight, group)
    return call.op("Conv", call.dy, flipped, pads=(*behind, *before), dilations=windows.dilations, group=group)


def _adjoint_weight(call: Call, weight: tuple[int, ...], group: int) -> str:
    """The weight (m, channels / group, kernel...) as (channels, m / group, kernel...), with every kernel axis reversed."""
    m, channels, *kernel = weight
    name, rank = call.x(1).name, len(kernel)
    if math.prod(kernel) > 1:
        last, before_first = call.ints(*(-1,) * rank), call.ints(*(-(2**62),) * rank)
        name = call.op("Slice", name, last, before_first, call.ints(*range(2, 2 + rank)), last)
    if group == 1:
        return call.op("Transpose", name, perm=(1, 0, *range(2, 2 + rank)))
    if channels == m // group == 1:
        return name
    split = call.op("Reshape", name, call.ints(group, m // group, channels, *kernel))
    turned = call.op("Transpose", split, perm=(0, 2, 1, *range(3, 3 + rank)))
    return call.op("Reshape", turned, call.ints(group * channels, m // group, *kernel))


def _convolve(call: Call, image: str, weight: str, windows: Windows, group: int) -> str:
    return call.op(
        "Conv",
        image,
        weight,
        pads=(*windows.begin, *windows.end),
        strides=windows.strides,
        dilations=windows.dilations,
        group=group,
    )


# --- the weight


def _weight_gradient(call: Call, image: str, signal: str, windows: Windows, weight: tuple[int, ...], group: int) -> str:
    """Correlate what the windows slide over with what there is one of per window.

    Args:
        image: (batch, channels, inputs...).
        signal: (batch, m, outputs...).
        weight: (m, channels / group, kernel...), the result's shape.
    """
    m, channels = weight[:2]
    if group == 1 and channels * windows.size <= _COLUMNS and windows.size > 1:
        return _columns(call, image, signal, windows, weight)
    if group == 1 and channels < _FEW_CHANNELS and windows.size > 1:
        return _swapped(call, image, signal, windows)
    outputs = _product(windows.outputs)
    shape = call.x().shape
    batch = shape[0] if shape is not None else None
    parts = _parts(batch, outputs, m, channels) if batch is not None and outputs is not None else 1
    long = outputs is not None and outputs >= (4 if windows.size == 1 else 8) * max(m, channels)
    if group > 1 or (long and (windows.size == 1 or (parts == 1 and windows.unit_stride))):
        return _per_sample(call, image, signal, windows, weight, group)
    return _in_parts(call, image, signal, windows, weight, _ranges(batch or 0, parts))


def _product(lengths: tuple[Dim, ...]) -> int | None:
    known = [length for length in lengths if length is not None]
    return math.prod(known) if len(known) == len(lengths) else None


def _parts(batch: int, outputs: int, m: int, channels: int) -> int:
    """Into how many parts the batch is cut; results of a part should not be larger than its slices."""
    samples = max(_PART, m * channels) // max(1, channels * outputs)
    return max(1, min(_MOST_PARTS, batch, -(-batch // max(1, samples))))


def _ranges(batch: int, parts: int) -> list[tuple[int, int]]:
    return [(batch * part // parts, batch * (part + 1) // parts) for part in range(parts)]


def _in_parts(call: Call, image: str, signal: str, windows: Windows, weight: tuple[int, ...], parts: list[tuple[int, int]]) -> str:
    m, channels, *kernel = weight
    spatial = range(2, 2 + windows.rank)
    flat, rows = call.ints(-1, channels), call.ints(m, -1)
    totals = []
    for start, stop in parts:
        some, others = (_samples(call, value, start, stop, len(parts)) for value in (image, signal))
        last = pad(call, call.op("Transpose", some, perm=(0, *spatial, 1)), windows, lead=1, trail=1)
        left = call.op("Reshape", call.op("Transpose", others, perm=(1, 0, *spatial)), rows)
        products = [call.op("MatMul", left, call.op("Reshape", shift, flat)) for shift in shifts(call, last, windows, lead=1)]
        totals.append(_together(call, products))
    total = call.op("Sum", *totals) if len(totals) > 1 else totals[0]
    return _kernel_last(call, total, (m, channels), kernel)


def _samples(call: Call, value: str, start: int, stop: int, parts: int) -> str:
    """A part of the batch."""
    return value if parts == 1 else call.op("Slice", value, call.ints(start), call.ints(stop), call.ints(0))


def _per_sample(call: Call, image: str, signal: str, windows: Windows, weight: tuple[int, ...], group: int) -> str:
    m, channels, *kernel = weight
    groups = (group,) if group > 1 else ()
    left = call.op("Reshape", signal, call.ints(0, *groups, m // group, -1))
    shape, turn = call.ints(0, *groups, channels, -1), (*range(1 + len(groups)), 2 + len(groups), 1 + len(groups))
    products = []
    for shift in shifts(call, pad(call, image, windows), windows):
        right = call.op("Transpose", call.op("Reshape", shift, shape), perm=turn)
        products.append(call.op("ReduceSum", call.op("MatMul", left, right), call.ints(0), keepdims=0))
    if groups:
        products = [call.op("Reshape", product, call.ints(m, channels)) for product in products]
    return _kernel_last(call, _together(call, products), (m, channels), kernel)


def _columns(call: Call, image: str, signal: str, windows: Windows, weight: tuple[int, ...]) -> str:
    m, channels, *kernel = weight
    joined = call.op("Concat", *shifts(call, pad(call, image, windows), windows), axis=1)
    right = call.op("Transpose", call.op("Reshape", joined, call.ints(0, channels * windows.size, -1)), perm=(0, 2, 1))
    product = call.op("MatMul", call.op("Reshape", signal, call.ints(0, m, -1)), right)
    total = call.op("ReduceSum", product, call.ints(0), keepdims=0)
    split = call.op("Reshape", total, call.ints(m, *kernel, channels))
    return call.op("Transpose", split, perm=(0, 1 + windows.rank, *range(1, 1 + windows.rank)))


def _swapped(call: Call, image: str, signal: str, windows: Windows) -> str:
    """A convolution over the batch: strides and dilations change places, and so do channels and samples."""
    swap = (1, 0, *range(2, 2 + windows.rank))
    found = call.op(
        "Conv",
        call.op("Transpose", image, perm=swap),
        call.op("Transpose", signal, perm=swap),
        pads=(*windows.begin, *windows.end),
        strides=windows.dilations,
        dilations=windows.strides,
    )
    axes = call.ints(*range(2, 2 + windows.rank))
    # Inputs behind the last window give positions that the kernel does not have.
    kept = call.op("Slice", found, call.ints(*(0,) * windows.rank), call.ints(*windows.kernel), axes)
    return call.op("Transpose", kept, perm=swap)


def _together(call: Call, products: list[str]) -> str:
    """Results per kernel position, one behind the other."""
    return call.op("Concat", *products, axis=0) if len(products) > 1 else products[0]


def _kernel_last(call: Call, total: str, shape: tuple[int, ...], kernel: Sequence[int]) -> str:
    """What `_together` gives for results of this shape, as (*shape, *kernel)."""
    split = call.op("Reshape", total, call.ints(*kernel, *shape))
    count = len(kernel)
    return call.op("Transpose", split, perm=(*range(count, count + len(shape)), *range(count)))


RULES: Rules = {"Conv": _conv, "ConvTranspose": _conv_transpose}
