"""How the window of a convolution or pool slides over spatial axes, and what its reverse rules share.

Output o of an axis reads the inputs stride·o + dilation·k − begin for k < kernel; those outside of the input are padding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Call, Dim, Unsupported

_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Windows:
    """The windows of one node, axis by axis.

    Attributes:
        kernel: positions in a window.
        strides: inputs between windows.
        dilations: inputs between positions.
        begin: padding in front.
        end: padding behind, as the node says; with `ceil_mode` the last window may reach beyond it.
        inputs: lengths of what the windows slide over; None where only a run tells.
        outputs: numbers of windows.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]
    inputs: tuple[Dim, ...]
    outputs: tuple[Dim, ...]

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    @property
    def size(self) -> int:
        """Positions in a window."""
        return math.prod(self.kernel)

    @property
    def reach(self) -> tuple[int, ...]:
        """Distance from the first to the last position."""
        return tuple(d * (k - 1) for d, k in zip(self.dilations, self.kernel, strict=True))

    @property
    def unit_stride(self) -> bool:
        """Whether there is a window at every position."""
        return all(stride == 1 for stride in self.strides)

    @property
    def padded(self) -> bool:
        """Whether any window may touch padding that the node asks for."""
        return any(self.begin) or any(self.end)

    @property
    def tiles(self) -> bool:
        """Whether windows lie side by side, without gaps and padding."""
        return self.kernel == self.strides and not self.padded and all(d == 1 for d in self.dilations)

    @property
    def disjoint(self) -> bool:
        """Whether no input is in two windows (sufficient)."""
        return all(reach < stride for reach, stride in zip(self.reach, self.strides, strict=True))

    @property
    def last_end(self) -> tuple[Dim, ...]:
        """Padding behind that the last window needs: negative where inputs behind it are in no window."""
        return tuple(
            None if length is None or steps is None else (steps - 1) * stride + reach + 1 - length - begin
            for length, steps, stride, reach, begin in zip(self.inputs, self.outputs, self.strides, self.reach, self.begin, strict=True)
        )


def conv_windows(call: Call, kernel: Sequence[int]) -> Windows:
    """The windows of a Conv over its first input.

    Raises:
        Unsupported: automatic padding that is negative, or of strided windows over an unknown length.
    """
    return _sliding(call, kernel, ceil=False)


def pool_windows(call: Call) -> Windows:
    """The windows of a pool over its first input.

    Raises:
        Unsupported: automatic padding of dilated windows, on which runtimes disagree, or as for `conv_windows`.
    """
    kernel = call.attribute("kernel_shape")
    if kernel is None:
        raise Unsupported("the node has no kernel_shape")
    if any(d != 1 for d in call.attribute("dilations") or ()) and call.attribute("auto_pad", "NOTSET").startswith("SAME"):
        raise Unsupported("automatic padding of dilated windows")
    return _sliding(call, kernel, ceil=bool(call.attribute("ceil_mode", 0)))


def transposed_windows(call: Call, kernel: Sequence[int]) -> Windows:
    """The windows of a ConvTranspose, which slide over its output.

    Raises:
        Unsupported: padding whose sides are a matter of interpretation, or output padding of a stride or more.
    """
    rank = len(kernel)
    strides, dilations = _ints(call, "strides", rank, 1), _ints(call, "dilations", rank, 1)
    extra = _ints(call, "output_padding", rank, 0)
    if any(more >= stride for more, stride in zip(extra, strides, strict=True)):
        raise Unsupported("output padding of a stride or more")
    steps = _spatial(call.x().shape, rank)
    shape, auto = call.attribute("output_shape"), call.attribute("auto_pad", "NOTSET")
    pads = _ints(call, "pads", 2 * rank, 0) if auto == "NOTSET" else (0,) * (2 * rank)
    full = [_times(n, s) for n, s in zip(steps, strides, strict=True)]
    spare = [d * (k - 1) + 1 + more - s for d, k, more, s in zip(dilations, kernel, extra, strides, strict=True)]
    if shape is not None or auto.startswith("SAME"):
        wanted = list(shape)[-rank:] if shape is not None else full
        totals = [_total_padding(length, more, want) for length, more, want in zip(full, spare, wanted, strict=True)]
        pads = tuple(total // 2 for total in totals) * 2
    lengths = tuple(
        None if length is None else length + more - begin - end
        for length, more, begin, end in zip(full, spare, pads[:rank], pads[rank:], strict=True)
    )
    return Windows(tuple(kernel), strides, dilations, pads[:rank], pads[rank:], lengths, steps)


def _total_padding(length: Dim, more: int, wanted: Dim) -> int:
    """Padding that makes a transposed convolution give `wanted` outputs out of length + more; it must be known to be even."""
    if length is None or wanted is None:
        if length is not wanted:
            raise Unsupported("output_shape for an input of unknown length")
        total = more
    else:
        total = length + more - wanted
    if total < 0 or total % 2:
        raise Unsupported("automatic padding that is odd or negative, whose sides runtimes choose differently")
    return total


def _sliding(call: Call, kernel: Sequence[int], *, ceil: bool) -> Windows:
    rank = len(kernel)
    strides, dilations = _ints(call, "strides", rank, 1), _ints(call, "dilations", rank, 1)
    auto = call.attribute("auto_pad", "NOTSET")
    inputs = _spatial(call.x().shape, rank)
    reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    if auto.startswith("SAME"):
        totals = [_same_padding(length, s, r) for length, s, r in zip(inputs, strides, reach, strict=True)]
        first, second = [total // 2 for total in totals], [total - total // 2 for total in totals]
        pads = (*first, *second) if auto == "SAME_UPPER" else (*second, *first)
        ceil = False
    else:
        pads = _ints(call, "pads", 2 * rank, 0) if auto == "NOTSET" else (0,) * (2 * rank)
    begin, end = pads[:rank], pads[rank:]
    outputs = tuple(_steps(length, s, r, b, e, ceil) for length, s, r, b, e in zip(inputs, strides, reach, begin, end, strict=True))
    return Windows(tuple(kernel), strides, dilations, begin, end, inputs, outputs)


def _same_padding(length: Dim, stride: int, reach: int) -> int:
    """Padding in all that gives ⌈length / stride⌉ windows."""
    if stride == 1:
        return reach
    if length is None:
        raise Unsupported("automatic padding of strided windows over an unknown length")
    total = (-(-length // stride) - 1) * stride + reach + 1 - length
    if total < 0:
        raise Unsupported("automatic padding that is negative, which runtimes read differently")
    return total


def _steps(length: Dim, stride: int, reach: int, begin: int, end: int, ceil: bool) -> Dim:
    """Number of windows; with `ceil` also one that reaches beyond the padding, if it begins before the padding behind."""
    if length is None:
        return None
    room = length + begin + end - reach - 1
    if not ceil:
        return room // stride + 1
    steps = -(-room // stride) + 1
    return steps - 1 if (steps - 1) * stride >= length + begin else steps


def _times(length: Dim, factor: int) -> Dim:
    return None if length is None else length * factor


def _ints(call: Call, name: str, count: int, default: int) -> tuple[int, ...]:
    return tuple(call.attribute(name) or [default] * count)


def _spatial(shape: tuple[Dim, ...] | None, rank: int) -> tuple[Dim, ...]:
    return (None,) * rank if shape is None else shape[-rank:]


# --- emitting


def pad(call: Call, image: str, windows: Windows, lead: int = 2, trail: int = 0) -> str:
    """Zeros around the spatial axes, of which `lead` axes are in front and `trail` behind."""
    if not windows.padded:
        return image
    begin, end = ((0,) * lead + sides + (0,) * trail for sides in (windows.begin, windows.end))
    return call.op("Pad", image, call.ints(*begin, *end))


def shifts(call: Call, padded: str, windows: Windows, lead: int = 2) -> Iterator[str]:
    """What each position of the window meets, in C order: shaped like the output, channels apart.

    Slices end relative to the end of the axis, so that lengths need not be known: fewer inputs than a stride follow the last window.
    """
    axes = call.ints(*range(lead, lead + windows.rank))
    for position in itertools.product(*map(range, windows.kernel)):
        if windows.size == 1 and windows.unit_stride:
            yield padded
            continue
        starts = [d * k for d, k in zip(windows.dilations, position, strict=True)]
        ends = [start - reach or _END for start, reach in zip(starts, windows.reach, strict=True)]
        yield call.op("Slice", padded, call.ints(*starts), call.ints(*ends), axes, call.ints(*windows.strides))


def spread(call: Call, dy: str, weight: str, windows: Windows, like: str, group: int = 1) -> str:
    """The adjoint of a strided convolution: every output's cotangent, times the weight, is added to what its window met.

    Args:
        dy: (batch, m, outputs...).
        weight: (m, channels / group, kernel...).
        like: a value with the input's shape, read where lengths are unknown.
        group: of the convolution.
    """
    short = windows.last_end
    attributes: dict[str, Any] = {"strides": windows.strides, "dilations": windows.dilations, "group": group}
    if all(end is not None for end in short):
        # Inputs behind the last window are output padding; what a last window meets beyond the input is cut.
        known = [end for end in short if end is not None]
        behind, missing = [max(0, end) for end in known], [max(0, -end) for end in known]
        return call.op("ConvTranspose", dy, weight, pads=(*windows.begin, *behind), output_padding=missing, **attributes)
    longest = [stride - 1 for stride in windows.strides]
    wide = call.op("ConvTranspose", dy, weight, pads=(*windows.begin, *windows.end), output_padding=longest, **attributes)
    if windows.unit_stride:
        return wide
    lengths = call.op("Shape", like, start=2)
    return call.op("Slice", wide, call.ints(*(0,) * windows.rank), lengths, call.ints(*range(2, 2 + windows.rank)))
