"""ONNX operators in PyTorch: a small interpreter for graphs of classifiers, their weights given as tensors.

Needs onnx, NumPy and PyTorch alone, so a Python without this package can run it; the process ends with one line where PyTorch is missing.
QuantizeLinear and the DequantizeLinear behind it become one of PyTorch's fake quantizations, which passes gradients as ours does.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from onnx import NodeProto, TensorProto, helper

try:
    torch: Any = importlib.import_module("torch")  # no dependency, so there is nothing to check types against
except ImportError:
    sys.exit(f"PyTorch is not installed in {sys.executable}: install torch there, or name a Python that has it by --torch-python")

functional: Any = torch.nn.functional

Tensor: TypeAlias = Any
"""A `torch.Tensor`; None for an input that is left out."""

Given: TypeAlias = Mapping[str, Any]
"""The attributes of a node."""

Rule: TypeAlias = Callable[[Sequence[Tensor], Given], Tensor]


class UnknownOperator(Exception):
    """A node that the interpreter cannot run; the message is one line that names it."""


@dataclass(frozen=True)
class Codes:
    """What QuantizeLinear yields: the value, and how it is to be rounded.

    Attributes:
        values: before rounding.
        scale: one, or one per entry of `axis`.
        zero: the same in integers; None for 0 of uint8.
        axis: that scales lie on.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor | None
    axis: int

    def rounded(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        """What DequantizeLinear yields with the same scale and zero point."""
        if scale is not self.scale or zero is not self.zero:
            raise UnknownOperator("DequantizeLinear has another scale or zero point than its QuantizeLinear")
        limits = torch.iinfo(torch.uint8 if zero is None else zero.dtype)
        if scale.numel() == 1:
            point = 0 if zero is None else int(zero)
            return torch.fake_quantize_per_tensor_affine(self.values, float(scale), point, limits.min, limits.max)
        points = torch.zeros(scale.shape, dtype=torch.int32) if zero is None else zero.to(torch.int32)
        return torch.fake_quantize_per_channel_affine(self.values, scale, points, self.axis, limits.min, limits.max)


def run_node(node: NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    """The first output of a node.

    Args:
        node: of the default domain.
        inputs: tensors, None where one is left out.

    Raises:
        UnknownOperator: there is no rule for it.
    """
    rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    where = f"{node.op_type} '{node.name or node.output[0]}'"
    if rule is None or any(node.output[1:]):
        raise UnknownOperator(f"the interpreter over PyTorch has no rule for {where}")
    try:
        return rule(inputs, {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute})
    except UnknownOperator as error:
        raise UnknownOperator(f"the interpreter over PyTorch cannot run {where}: {error}") from error


# --- windows


def _padded(x: Tensor, given: Given, value: float) -> tuple[Tensor, list[int]]:
    """The input, and what is left to pad on both sides alike: nothing once it was padded here, because its sides differ."""
    if given.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise UnknownOperator(f"auto_pad {given['auto_pad'].decode()}")
    axes = x.dim() - 2
    pads = given.get("pads", [0] * (2 * axes))
    if pads[:axes] == pads[axes:]:
        return x, pads[:axes]
    sides = [side for axis in reversed(range(axes)) for side in (pads[axis], pads[axes + axis])]
    return functional.pad(x, sides, value=value), [0] * axes


def _conv(inputs: Sequence[Tensor], given: Given) -> Tensor:
    x, padding = _padded(inputs[0], given, 0.0)
    run = getattr(functional, f"conv{x.dim() - 2}d")
    options = {"stride": given.get("strides", 1), "dilation": given.get("dilations", 1), "groups": given.get("group", 1)}
    return run(x, *inputs[1:], padding=padding, **options)


def _max_pool(inputs: Sequence[Tensor], given: Given) -> Tensor:
    x, padding = _padded(inputs[0], given, -float("inf"))
    run = getattr(functional, f"max_pool{x.dim() - 2}d")
    options = {"stride": given.get("strides", 1), "dilation": given.get("dilations", 1), "ceil_mode": bool(given.get("ceil_mode", 0))}
    return run(x, given["kernel_shape"], padding=padding, **options)


def _average_pool(inputs: Sequence[Tensor], given: Given) -> Tensor:
    include = bool(given.get("count_include_pad", 0))
    x, padding = _padded(inputs[0], given, 0.0)
    if x is not inputs[0] and not include:
        raise UnknownOperator("padding that differs between sides and does not count")
    run = getattr(functional, f"avg_pool{x.dim() - 2}d")
    ceil = bool(given.get("ceil_mode", 0))
    return run(x, given["kernel_shape"], stride=given.get("strides", 1), padding=padding, ceil_mode=ceil, count_include_pad=include)


# --- products, normalization, layout


def _gemm(inputs: Sequence[Tensor], given: Given) -> Tensor:
    a, b, *c = inputs
    a, weight = a.T if given.get("transA", 0) else a, b if given.get("transB", 0) else b.T
    alpha, beta = given.get("alpha", 1.0), given.get("beta", 1.0)
    if alpha == beta == 1 and all(bias.dim() == 1 for bias in c):
        return functional.linear(a, weight, *c)
    return alpha * (a @ weight.T) + (beta * c[0] if c else 0)


def _batch_normalization(inputs: Sequence[Tensor], given: Given) -> Tensor:
    x, scale, bias, mean, variance = inputs
    return functional.batch_norm(x, mean, variance, scale, bias, eps=given.get("epsilon", 1e-5))


def _reduce_mean(inputs: Sequence[Tensor], given: Given) -> Tensor:
    axes = inputs[1].tolist() if len(inputs) > 1 else given.get("axes", list(range(inputs[0].dim())))
    return inputs[0].mean(axes, keepdim=bool(given.get("keepdims", 1)))


def _reshape(inputs: Sequence[Tensor], given: Given) -> Tensor:
    x, shape = inputs[0], inputs[1].tolist()
    if given.get("allowzero", 0) and 0 in shape:
        raise UnknownOperator("allowzero")
    return x.reshape([x.shape[axis] if length == 0 else length for axis, length in enumerate(shape)])


def _flatten(inputs: Sequence[Tensor], given: Given) -> Tensor:
    x, axis = inputs[0], given.get("axis", 1) % (inputs[0].dim() + 1)
    return x.reshape(x.shape[:axis].numel(), -1)


def _transpose(inputs: Sequence[Tensor], given: Given) -> Tensor:
    return inputs[0].permute(given.get("perm", list(reversed(range(inputs[0].dim())))))


def _squeeze(inputs: Sequence[Tensor], given: Given) -> Tensor:
    return inputs[0].squeeze(tuple(inputs[1].tolist())) if len(inputs) > 1 else inputs[0].squeeze()


def _unsqueeze(inputs: Sequence[Tensor], given: Given) -> Tensor:
    x, axes = inputs[0], inputs[1].tolist()
    for axis in sorted(axis % (x.dim() + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _gather(inputs: Sequence[Tensor], given: Given) -> Tensor:
    x, places, axis = inputs[0], inputs[1].long(), given.get("axis", 0) % inputs[0].dim()
    places = torch.where(places < 0, places + x.shape[axis], places)
    return x.index_select(axis, places.reshape(-1)).reshape(*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])


# --- values


_TYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT64: torch.int64,
    TensorProto.INT32: torch.int32,
}


def _cast(inputs: Sequence[Tensor], given: Given) -> Tensor:
    if given["to"] not in _TYPES:
        raise UnknownOperator(f"to {TensorProto.DataType.Name(given['to'])}")
    return inputs[0].to(_TYPES[given["to"]])


def _clip(inputs: Sequence[Tensor], given: Given) -> Tensor:
    low, high = [*inputs[1:], None, None][:2]
    return torch.clamp(inputs[0], given.get("min") if low is None else low, given.get("max") if high is None else high)


def _quantize(inputs: Sequence[Tensor], given: Given) -> Codes:
    x, scale, *zero = inputs
    if given.get("block_size", 0):
        raise UnknownOperator("blocks")
    return Codes(x, scale, zero[0] if zero else None, given.get("axis", 1))


def _dequantize(inputs: Sequence[Tensor], given: Given) -> Tensor:
    codes, scale, *zero = inputs
    if isinstance(codes, Codes):
        return codes.rounded(scale, zero[0] if zero else None)
    if scale.numel() > 1:
        raise UnknownOperator("constant codes of several scales")
    return (codes.float() - (zero[0].float() if zero else 0)) * scale


RULES: Mapping[str, Rule] = {
    "Add": lambda x, given: x[0] + x[1],
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda x, given: torch.cat(list(x), given["axis"]),
    "Conv": _conv,
    "DequantizeLinear": _dequantize,
    "Div": lambda x, given: x[0] / x[1],
    "Dropout": lambda x, given: x[0],
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x, given: x[0].mean(tuple(range(2, x[0].dim())), keepdim=True),
    "Identity": lambda x, given: x[0],
    "LeakyRelu": lambda x, given: functional.leaky_relu(x[0], given.get("alpha", 0.01)),
    "MatMul": lambda x, given: x[0] @ x[1],
    "MaxPool": _max_pool,
    "Mul": lambda x, given: x[0] * x[1],
    "QuantizeLinear": _quantize,
    "ReduceMean": _reduce_mean,
    "Relu": lambda x, given: torch.relu(x[0]),
    "Reshape": _reshape,
    "Sigmoid": lambda x, given: torch.sigmoid(x[0]),
    "Softmax": lambda x, given: torch.softmax(x[0], given.get("axis", -1)),
    "Squeeze": _squeeze,
    "Sub": lambda x, given: x[0] - x[1],
    "Tanh": lambda x, given: torch.tanh(x[0]),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""Operators of the default domain, as they are since opset 13."""
