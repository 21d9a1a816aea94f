"""Bias correction: give back the mean that rounding a weight takes from its layer's output.

An error Δ of a weight moves the mean of the layer's output by Δ·E[x]; the layer's bias can take exactly that back, at no cost (Nagel et
al., "Data-free quantization through weight equalization and bias correction", 2019, section 4.2, with measured instead of modelled means).

Must not fire on: layers without a bias of their own, biases that something else reads or that callers may override or that do not lie along
the outputs, scaled Gemms, ConvTranspose (whose outputs do not all see the same part of the kernel), tied weights, nested graphs.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from .graph import MAIN, ValueIndex
from .model import Model
from .sites import Site

_CONVOLUTIONS = ("Conv", "FusedConv")


def find_bias(model: Model, site: Site, index: ValueIndex) -> TensorProto | None:
    """The initializer that is added to what a site's operator yields, one number per output; None where there is none to correct.

    Args:
        model: the model that the site was found in.
        site: the site.
        index: of the model's values.
    """
    if len(site.uses) != 1 or site.uses[0].scope != MAIN or site.scope != MAIN:
        return None
    node = site.use.node
    name = _bias_name(node, site, index)
    tensor = next((t for t in model.proto.graph.initializer if t.name == name), None)
    outputs = site.use.view.groups * site.use.view.m
    if (
        tensor is None
        or tensor.data_type != TensorProto.FLOAT
        or math.prod(tensor.dims) != outputs
        or not tensor.dims
        or tensor.dims[-1] != outputs
    ):
        return None
    taken = any(value.name == name for value in (*model.proto.graph.input, *model.proto.graph.output))
    return None if taken or len(index.uses(tensor.name)) != 1 else tensor


def corrected(model: Model, bias: TensorProto, shift: NDArray[np.float64]) -> NDArray[np.float32]:
    """The bias with a shift of the mean (groups, m) added, in the bias's own shape."""
    value = model.weights.read(bias)
    return np.asarray(value + shift.reshape(value.shape), np.float32)


def _bias_name(node: NodeProto, site: Site, index: ValueIndex) -> str | None:
    """The third input, or the constant that a following Add adds to a product."""
    if node.op_type in _CONVOLUTIONS:
        return node.input[2] if len(node.input) > 2 else None
    if node.op_type == "Gemm":
        scaled = any(a.name in ("alpha", "beta") and a.f != 1.0 for a in node.attribute)
        return node.input[2] if len(node.input) > 2 and not scaled and site.use.index == 1 else None
    if node.op_type == "MatMul" and site.use.index == 1:
        readers = index.uses(node.output[0])
        if len(readers) == 1 and readers[0].node.op_type == "Add":
            return next((name for name in readers[0].node.input if name != node.output[0]), None)
    return None
