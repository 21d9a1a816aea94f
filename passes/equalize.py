"""Rescale channels so that one scale fits all channels of an activation, without changing what the model computes.

Before: a value whose channels differ in range loses the small ones when it is quantized with one scale. After: what writes channel c is
divided by s_c, and all that reads channel c is multiplied by s_c. This is cross-layer equalization (Nagel et al., "Data-free quantization
through weight equalization and bias correction", 2019, arXiv 1906.04721, section 4.1) where convolutions and matrix products write, and
SmoothQuant (Xiao et al., 2022, arXiv 2211.10438, equation 4) where a normalization or a product with a constant does. Both use

    s_c = max(r_c)^α / max|w_c|^(1−α),

with r_c the root mean square of channel c where a site reads it, from the site's second moment, and w_c what that site multiplies it with.
Factors are centred on 1 within a stream, rounded to powers of two and kept within [1/16, 16]. Products and sums of floats scale exactly
by powers of two, so every value outside the rescaled streams keeps its bits, as long as no activation overflows or becomes subnormal;
that weights do neither is checked.

How it is found. Every value gets *labels* that say which factor its entries carry; operators hand them on, tie them to each other, start
new ones or freeze them at 1 (`passes.labelling`). Labels that are tied share one factor. A *stream* is all values that share factors with
each other, and what is decided together (`passes.streams`).

Must not fire on: graph inputs and outputs; values that reach an operator which is not positively homogeneous, a nested graph, a function
or another domain; constants that callers may override, that something else reads too, that are computed, or that are not float32 or
float64 (others have too few exponents); streams without measured statistics, or whose ranges would not become more equal; anything in
models with training information or quantization annotations. Each stream that stays is listed with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper

from intaglio.ops.moment import Moment

from .graph import constant_tensors
from .labelling import labelled
from .model import Model
from .sites import Site
from .streams import Stream, Streams, measured_operands, solve
from .trace import Labels, Trace
from .weights import WeightStore

ALPHA = 0.5
"""Share of the imbalance that moves from activations into weights: SmoothQuant's default."""


@dataclass(frozen=True)
class Equalization:
    """What became of one stream.

    Attributes:
        value: its first value.
        tensors: the constants that were rescaled for it; none where it was declined.
        channels: number of independent factors.
        rescaled: how many of them are not 1.
        bits_before: log₂ of the largest range over the geometric mean of all: bits that a common scale costs the mean channel.
        bits_after: the same after rescaling, predicted; both are 0 where no ranges are known.
        reason: why it was declined, or why some of its channels could not take a factor; empty where nothing stood in the way.
    """

    value: str
    tensors: tuple[str, ...]
    channels: int
    rescaled: int
    bits_before: float
    bits_after: float
    reason: str


def equalize(
    model: Model, sites: Iterable[Site], statistics: Mapping[str, Moment], *, alpha: float = ALPHA
) -> tuple[Model, tuple[Equalization, ...]]:
    """Rescale the channels of every stream that allows it. No data is run; large weights are read one at a time.

    Sites and moments of the result differ from those of `model` and have to be found again.

    Args:
        model: the model; it is not changed, and returned itself where nothing is rescaled.
        sites: found in `model`.
        statistics: second moments of the sites' inputs, by site name; a prior (no rows) says nothing about ranges.
        alpha: share of the imbalance, from 0 to 1, that moves from activations into weights.

    Returns:
        The model, and one record per stream in the order of the graph.

    Raises:
        ValueError: `alpha` lies outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, expected a number from 0 to 1")
    trace = labelled(model)
    measured = measured_operands(trace, sites, statistics)
    while True:
        streams = solve(trace, model.weights, measured, alpha)
        tensors, inexact = _rescaled(trace, model.weights, streams)
        if not inexact:
            break
        trace.frozen += inexact
    records = tuple(_record(stream, trace, streams) for stream in streams.all)
    if not tensors:
        return model, records
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    for name, tensor in constant_tensors(proto).items():
        if name in tensors:
            tensor.CopyFrom(tensors[name])
    return replace(model, proto=proto), records


def _rescaled(trace: Trace, weights: WeightStore, streams: Streams) -> tuple[dict[str, TensorProto], list[tuple[Labels, str]]]:
    """The constants that change, and the labels that have to be frozen because a constant would lose digits."""
    tensors: dict[str, TensorProto] = {}
    inexact: list[tuple[Labels, str]] = []
    for operand in {operand.tensor: operand for operand in trace.operands}.values():
        exponent = streams.exponent(operand).astype(np.int32)
        if not exponent.any():
            continue
        stored = trace.constants[operand.tensor]
        value = weights.read(stored)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            scaled = np.ldexp(value.reshape(operand.view), exponent)
            lost = np.ldexp(scaled, -exponent) != value.reshape(operand.view)
        if lost.any():
            sides = (np.broadcast_to(side, operand.view)[lost] for side in operand.sides if side is not None)
            inexact += [(labels, f"'{operand.tensor}' would lose digits") for labels in sides]
            continue
        embed, scaled = operand.tensor in trace.embedded, scaled.reshape(value.shape)
        tensors[operand.tensor] = numpy_helper.from_array(scaled, stored.name) if embed else weights.spool(stored.name, scaled)
    return tensors, inexact


def _record(stream: Stream, trace: Trace, streams: Streams) -> Equalization:
    """What is reported of a stream."""
    own = np.zeros(len(streams.exponents), np.bool_)
    own[stream.classes] = streams.exponents[stream.classes] != 0
    touched = (
        operand.tensor for operand in trace.operands if any(side is not None and own[streams.classes[side]].any() for side in operand.sides)
    )
    tensors = tuple(dict.fromkeys(touched))
    return Equalization(stream.value, tensors, len(stream.classes), stream.rescaled, stream.bits_before, stream.bits_after, stream.reason)
