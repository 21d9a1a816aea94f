"""Normalizations: a value is centred and scaled by its own statistics, or by given ones, and then by learned parameters.

Let x̂ = (x − μ)/σ over n entries and g the gradient with respect to x̂. Then dx = (g − mean(g) − x̂ mean(g ⊙ x̂))/σ; without centring (RMS) the
term mean(g) is absent. An ε inside of σ² changes nothing in this. Half precision is differentiated in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .base import Call, Gradients, Rules, Unsupported, Value


@dataclass(frozen=True)
class _Statistics:
    """What a normalization did.

    Attributes:
        normal: x̂, shaped like x.
        inverse: 1/σ, with length 1 along the reduced axes.
    """

    normal: str
    inverse: str


@dataclass(frozen=True)
class _Work:
    """Computing in float32 where the values are half precision."""

    call: Call

    @property
    def dtype(self) -> np.dtype[np.generic]:
        dtype = self.call.x().dtype
        return np.dtype(np.float32) if dtype.itemsize == 2 else dtype

    def up(self, name: str, value: Value) -> str:
        """A value in the type that is computed in."""
        return name if value.dtype == self.dtype else self.call.cast(name, self.dtype)

    def down(self, name: str, value: Value) -> str:
        """A result in the type of the value it belongs to."""
        return name if value.dtype == self.dtype else self.call.cast(name, value.dtype)

    def number(self, number: float) -> str:
        return self.call.scalar(number, self.dtype)

    def statistics(self, x: str, axes: Sequence[int], epsilon: float, centred: bool = True) -> _Statistics:
        """Computed anew."""
        call, over = self.call, self.call.ints(*axes)
        if centred:
            x = call.op("Sub", x, call.op("ReduceMean", x, over, keepdims=1))
        variance = call.op("ReduceMean", call.op("Mul", x, x), over, keepdims=1)
        inverse = call.op("Reciprocal", call.op("Sqrt", call.op("Add", variance, self.number(epsilon))))
        return _Statistics(call.op("Mul", x, inverse), inverse)

    def through(self, gradient: str, found: _Statistics, axes: Sequence[int], centred: bool = True) -> str:
        """The gradient of x from that of x̂."""
        call, over = self.call, self.call.ints(*axes)
        along = call.op("ReduceMean", call.op("Mul", gradient, found.normal), over, keepdims=1)
        removed = call.op("Mul", found.normal, along)
        if centred:
            gradient = call.op("Sub", gradient, call.op("ReduceMean", gradient, over, keepdims=1))
        return call.op("Mul", call.op("Sub", gradient, removed), found.inverse)


def _only_first(call: Call) -> None:
    if any(cotangent is not None for cotangent in call.cotangents[1:]):
        raise Unsupported("the loss depends on the statistics that it outputs")


def _trailing(call: Call) -> tuple[int, ...]:
    """The axes from `axis` on."""
    rank, axis = call.x().rank, call.attribute("axis", -1)
    return tuple(range(axis % rank, rank))


# --- statistics over the last axes of one row


def _layer(call: Call) -> Gradients:
    _only_first(call)
    work, axes = _Work(call), _trailing(call)
    x = work.up(call.x().name, call.x())
    if call.x().dtype == np.float64 or call.attribute("stash_type", 1) != 1:
        found = work.statistics(x, axes, call.attribute("epsilon", 1e-5))
    else:  # the statistics are float32, whatever x is
        mean, inverse = call.add_output(1), call.add_output(2)
        found = _Statistics(call.op("Mul", call.op("Sub", x, mean), inverse), inverse)
    return _affine(call, work, found, axes, centred=True)


def _root_mean_square(call: Call) -> Gradients:
    _only_first(call)
    work, axes = _Work(call), _trailing(call)
    found = work.statistics(work.up(call.x().name, call.x()), axes, call.attribute("epsilon", 1e-5), centred=False)
    return _affine(call, work, found, axes, centred=False)


def _affine(call: Call, work: _Work, found: _Statistics, axes: Sequence[int], *, centred: bool) -> Gradients:
    """Gradients of x, scale and bias (inputs 0, 1 and 2), where scale and bias broadcast to x."""
    dy, scale = work.up(call.dy, call.y()), call.x(1)
    gradients = {}
    if 0 in call.wanted:
        inner = call.op("Mul", dy, work.up(scale.name, scale))
        gradients[0] = work.down(work.through(inner, found, axes, centred), call.x())
    if 1 in call.wanted:
        gradients[1] = work.down(call.sum_to(call.op("Mul", dy, found.normal), scale, call.x()), scale)
    if 2 in call.wanted:
        gradients[2] = work.down(call.sum_to(dy, call.x(2), call.x()), call.x(2))
    return gradients


def _skip_layer(call: Call) -> Gradients:
    """com.microsoft: (input, skip, gamma, beta?, bias?) → layer normalization of input + skip + bias, which is output 3."""
    return _skip(call, centred=True, beta=3, bias=4)


def _skip_root_mean_square(call: Call) -> Gradients:
    """com.microsoft: (input, skip, gamma, bias?), likewise without centring."""
    return _skip(call, centred=False, beta=None, bias=3)


def _skip(call: Call, *, centred: bool, beta: int | None, bias: int) -> Gradients:
    if any(cotangent is not None for cotangent in call.cotangents[1:3]):
        raise Unsupported("the loss depends on the statistics that it outputs")
    work, x, gamma = _Work(call), call.x(), call.x(2)
    axes = (x.rank - 1,)
    through_sum = call.cotangents[3] if len(call.cotangents) > 3 else None
    found = work.statistics(work.up(call.add_output(3), x), axes, call.attribute("epsilon", 1e-12), centred)
    gradients, total = {}, through_sum
    if call.cotangents[0] is not None:
        dy = work.up(call.cotangents[0], x)
        inner = work.through(call.op("Mul", dy, work.up(gamma.name, gamma)), found, axes, centred)
        total = work.down(inner, x)
        if through_sum is not None:
            total = call.op("Add", total, through_sum)
        if 2 in call.wanted:
            gradients[2] = work.down(call.sum_to(call.op("Mul", dy, found.normal), gamma, x), gamma)
        if beta in call.wanted:
            gradients[beta] = work.down(call.sum_to(dy, call.x(beta), x), call.x(beta))
    if total is not None:
        gradients.update({index: call.sum_to(total, call.x(index), x) for index in (0, 1, bias) if index in call.wanted})
    return gradients


# --- statistics of channels


def _per_channel(call: Call, name: str, rank: int) -> str:
    """A vector of channels, shaped to broadcast along axis 1 of x."""
    return name if rank == 2 else call.op("Reshape", name, call.ints(-1, *(1,) * (rank - 2)))


def _batch(call: Call) -> Gradients:
    """Inputs x, scale, bias, mean, variance; the given statistics are parameters like the others."""
    if call.attribute("training_mode", 0):
        raise Unsupported("training_mode=1 normalizes by statistics of the batch; only inference is differentiated")
    if len({call.x(index).dtype for index in range(5)}) > 1:
        raise Unsupported("its inputs are of several types")
    x, (scale, mean, variance) = call.x(), (call.x(index).name for index in (1, 3, 4))
    inverse = call.op("Reciprocal", call.op("Sqrt", call.op("Add", variance, call.scalar(call.attribute("epsilon", 1e-5)))))
    slope = call.op("Mul", scale, inverse)
    others = call.ints(0, *range(2, x.rank))
    gradients = {}
    if 0 in call.wanted:
        gradients[0] = call.op("Mul", call.dy, _per_channel(call, slope, x.rank))
    if call.wanted & {2, 3}:
        gradients[2] = call.op("ReduceSum", call.dy, others, keepdims=0)
    if 3 in call.wanted:
        gradients[3] = call.op("Neg", call.op("Mul", gradients[2], slope))
    if call.wanted & {1, 4}:
        centred = call.op("Sub", x.name, _per_channel(call, mean, x.rank))
        gradients[1] = call.op("Mul", call.op("ReduceSum", call.op("Mul", call.dy, centred), others, keepdims=0), inverse)
    if 4 in call.wanted:
        half = call.op("Mul", call.op("Mul", inverse, slope), call.scalar(-0.5))
        gradients[4] = call.op("Mul", gradients[1], half)
    return gradients


def _instance(call: Call) -> Gradients:
    work, rank = _Work(call), call.x().rank
    axes = tuple(range(2, rank))
    if not axes:
        raise Unsupported("the input has no axes but batch and channels")
    dy = work.up(call.dy, call.y())
    found = work.statistics(work.up(call.x().name, call.x()), axes, call.attribute("epsilon", 1e-5))
    gradients = {}
    if 0 in call.wanted:
        scale = _per_channel(call, work.up(call.x(1).name, call.x(1)), rank)
        gradients[0] = work.down(work.through(call.op("Mul", dy, scale), found, axes), call.x())
    return {**gradients, **_channel_sums(call, work, dy, found.normal)}


def _group(call: Call) -> Gradients:
    """Before opset 21 one scale and one bias for each group, from then on for each channel."""
    work, x, groups = _Work(call), call.x(), call.attribute("num_groups")
    rank = x.rank
    by_channel = call.opset >= 21
    grouped = call.ints(0, groups, -1)  # (N, groups, entries)
    found = work.statistics(call.op("Reshape", work.up(x.name, x), grouped), (2,), call.attribute("epsilon", 1e-5))
    dy = work.up(call.dy, call.y())
    scale = work.up(call.x(1).name, call.x(1))
    if by_channel:
        inner = call.op("Reshape", call.op("Mul", dy, _per_channel(call, scale, rank)), grouped)
        normal = call.reshape_like(found.normal, x)
    else:
        dy = call.op("Reshape", dy, grouped)
        inner = call.op("Mul", dy, _per_channel(call, scale, 3))
        normal = found.normal
    gradients = {}
    if 0 in call.wanted:
        gradients[0] = work.down(call.reshape_like(work.through(inner, found, (2,)), x), x)
    return {**gradients, **_channel_sums(call, work, dy, normal, rank if by_channel else 3)}


def _channel_sums(call: Call, work: _Work, dy: str, normal: str, rank: int | None = None) -> Gradients:
    """Gradients of a scale and a bias (inputs 1 and 2) along axis 1."""
    others = call.ints(0, *range(2, rank or call.x().rank))
    gradients = {}
    for index in sorted(call.wanted & {1, 2}):
        term = call.op("Mul", dy, normal) if index == 1 else dy
        gradients[index] = work.down(call.op("ReduceSum", term, others, keepdims=0), call.x(index))
    return gradients


def _mean_variance(call: Call) -> Gradients:
    """(x − μ)/(σ + 1e-9); the offset is left out of the derivative of σ, where it is below the rounding of σ.

    Entries that are all equal have σ = 0, and so a gradient a billion times the cotangent.
    """
    work = _Work(call)
    axes = tuple(axis % call.x().rank for axis in call.attribute("axes", (0, 2, 3)))
    x, over, normal = work.up(call.x().name, call.x()), call.ints(*axes), work.up(call.y().name, call.y())
    centred = call.op("Sub", x, call.op("ReduceMean", x, over, keepdims=1))
    deviation = call.op("Sqrt", call.op("ReduceMean", call.op("Mul", centred, centred), over, keepdims=1))
    inverse = call.op("Reciprocal", call.op("Add", deviation, work.number(1e-9)))
    gradient = work.through(work.up(call.dy, call.y()), _Statistics(normal, inverse), axes)
    return {0: work.down(gradient, call.x())}


# --- norms


def _lp(call: Call) -> Gradients:
    """y = x/‖x‖, dx = (g − ‖x‖′ Σ g ⊙ y)/‖x‖ with ‖x‖′ = y for the Euclidean norm and sign x for the sum of magnitudes.

    Where the norm is zero, so is the result, and the gradient is taken to be zero.
    """
    order, axis = call.attribute("p", 2), call.ints(call.attribute("axis", -1))
    x, y = call.x(), call.y().name
    norm = call.op("ReduceL2" if order == 2 else "ReduceL1", x.name, axis, keepdims=1)
    inverse = call.op("Where", call.op("Equal", norm, call.scalar(0)), call.scalar(0), call.op("Reciprocal", norm))
    along = call.op("ReduceSum", call.op("Mul", call.dy, y), axis, keepdims=1)
    slope = y if order == 2 else call.op("Sign", x.name)
    return {0: call.op("Mul", call.op("Sub", call.dy, call.op("Mul", slope, along)), inverse)}


def _local_response(call: Call) -> Gradients:
    """y = x ⊙ b^−β with b = bias + α/size Σ x² over a window of channels.

    dx = g ⊙ b^−β − (2αβ/size) x ⊙ Wᵀ(g ⊙ y/b), W the 0/1 matrix of windows. The windows are summed as a product with W: channels are few.
    """
    x, size = call.x(), call.attribute("size")
    if x.shape is None or x.rank < 3 or x.shape[1] is None:
        raise Unsupported("the number of channels is unknown")
    alpha, beta, bias = call.attribute("alpha", 1e-4), call.attribute("beta", 0.75), call.attribute("bias", 1.0)
    channels = np.arange(x.shape[1])
    offset = channels[None, :] - channels[:, None]
    window = ((offset >= -((size - 1) // 2)) & (offset <= size // 2)).astype(x.dtype)
    flat = call.ints(0, x.shape[1], -1)
    rows = call.op("Reshape", x.name, flat)
    squares = call.op("MatMul", call.constant(window * np.asarray(alpha / size, x.dtype)), call.op("Mul", rows, rows))
    base = call.op("Add", squares, call.scalar(bias))
    slope = call.op("Pow", base, call.scalar(-beta))
    dy, y = (call.op("Reshape", name, flat) for name in (call.dy, call.y().name))
    inner = call.op("Div", call.op("Mul", dy, y), base)
    spread = call.op("MatMul", call.constant(np.ascontiguousarray(window.T) * np.asarray(2 * alpha * beta / size, x.dtype)), inner)
    gradient = call.op("Sub", call.op("Mul", dy, slope), call.op("Mul", rows, spread))
    return {0: call.reshape_like(gradient, x)}


RULES: Rules = {
    "BatchNormalization": _batch,
    "GroupNormalization": _group,
    "InstanceNormalization": _instance,
    "LRN": _local_response,
    "LayerNormalization": _layer,
    "LpNormalization": _lp,
    "MeanVarianceNormalization": _mean_variance,
    "RMSNormalization": _root_mean_square,
    "SimplifiedLayerNormalization": _root_mean_square,
    "com.microsoft::SimplifiedLayerNormalization": _root_mean_square,
    "com.microsoft::SkipLayerNormalization": _skip_layer,
    "com.microsoft::SkipSimplifiedLayerNormalization": _skip_root_mean_square,
}
