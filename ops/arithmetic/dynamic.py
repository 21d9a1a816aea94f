"""Dynamic integers: activations are rounded to eight bits when they arrive, with a scale of their own in every run.

Standard operators: DynamicQuantizeLinear, MatMulInteger, Cast, Mul. The scales are multiplied with each other first, because that is what
ONNX Runtime merges into one MatMulIntegerToFloat or DynamicQuantizeMatMul. An LSTM has an operator of its own (`lstm`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper

from ..emit import Array, Emitter, Spec
from ..families import Use
from ..storage import IntegerWeight, Storage, requantize
from .base import Operand
from .lstm import DOMAIN, WEIGHTS, lower_lstm, lstm_operand, lstm_reason
from .weight import SINGLE, add_bias, gemm_reason, integer_weight, operator_reason

QUANTIZER_OPSET = 11
"""The opset that brings DynamicQuantizeLinear, and `Round` for weights without codes."""

_QUANTIZER = "DynamicQuantizeLinear"
_LSTM = ("", "LSTM")
_FLOAT_ONLY = (("", "GRU"), ("", "RNN"))


@dataclass(frozen=True)
class Dynamic:
    """int8 weights and uint8 activations of one scale per tensor and run (an LSTM's state: per step), accumulated in int32."""

    name: str = "dynamic"
    coupled: bool = False
    product_reason: str | None = None

    def domains(self, use: Use) -> tuple[str, ...]:
        """Standard operators, but for an LSTM."""
        return (DOMAIN,) if use.key == _LSTM else ()

    def partners(self, use: Use) -> tuple[int, ...]:
        """The other weight of an LSTM."""
        return tuple(index for index in WEIGHTS if index != use.index) if use.key == _LSTM else ()

    def declines(self, use: Use, opset: int) -> str | None:
        """Plain Gemm and MatMul with the weight on the right, and LSTM, from opset 11 on."""
        if opset < QUANTIZER_OPSET:
            return f"{_QUANTIZER} needs opset {QUANTIZER_OPSET}, the model has {opset}"
        if use.key == _LSTM:
            return lstm_reason(use)
        if use.key in _FLOAT_ONLY:
            return f"ONNX Runtime has no {use.node.op_type} in integers"
        return operator_reason(use, ("Gemm", "MatMul")) or gemm_reason(use.node)

    def accepts(self, storage: Storage, spec: Spec, axis: int) -> str | None:
        """float32 weights in any storage."""
        if spec.dtype != SINGLE:
            return f"a weight of {spec.dtype}: {_QUANTIZER} takes float32"
        return None if len(spec.shape) in (2, 3) else f"a weight of shape {list(spec.shape)}: only matrices, or one for each direction"

    def operand(
        self, emitter: Emitter, suffix: str, storage: Storage, packed: tuple[Array, ...], spec: Spec, axis: int, output: str | None = None
    ) -> Operand:
        """The storage's own codes where it has some, else rounded ones."""
        return _operand(emitter, integer_weight(emitter, suffix, storage, packed, spec, axis), spec, output)

    def from_value(self, emitter: Emitter, value: str, spec: Spec, axis: int, output: str | None = None) -> Operand | None:
        """Rounded codes."""
        return _operand(emitter, requantize(emitter, value, spec, axis), spec, output)

    def lower(self, emitter: Emitter, node: NodeProto, index: int, operand: Operand) -> None:
        """x ≈ (x_q − x_zero)·x_s, so x·W ≈ ((x_q − x_zero)·W_q)·(x_s·w_s) [+ C]; an LSTM reads codes and scales itself.

        Raises:
            ValueError: the weight is neither the right factor of a MatMul or a Gemm nor an LSTM's.
        """
        if node.op_type == "LSTM" and index in WEIGHTS:
            lower_lstm(emitter, node, index, operand)
            return
        if node.op_type not in ("Gemm", "MatMul") or index != 1:
            raise ValueError(f"{node.op_type} with its weight as input {index} has no dynamic integers")
        codes, scale = operand.values
        rounded, step, zero = (emitter.name(suffix) for suffix in ("xq", "xs", "xz"))
        emitter.nodes.append(helper.make_node(_QUANTIZER, [node.input[0]], [rounded, step, zero]))
        total = emitter.node("MatMulInteger", [rounded, codes, zero])
        floats = emitter.node("Cast", [total], attributes={"to": TensorProto.FLOAT})
        product = emitter.node("Mul", [floats, emitter.node("Mul", [step, scale])])
        add_bias(emitter, node, product)


def _operand(emitter: Emitter, weight: IntegerWeight, spec: Spec, output: str | None) -> Operand:
    """Codes with one column for each output, as MatMulInteger reads them; no float operator finds the operand's name."""
    if len(spec.shape) == 3:
        return lstm_operand(emitter, weight, spec, output)
    columns = weight.codes if weight.axis == 1 else emitter.node("Transpose", [weight.codes], attributes={"perm": [1, 0]})
    return Operand(output or emitter.name("operand"), (columns, weight.scale), spec, weight.axis)


def merge_quantizers(graph: GraphProto) -> None:
    """Let all readers of a value share the first DynamicQuantizeLinear of it, in a graph and in those nested in it.

    Node order is kept. Quantizers whose results the graph yields stay.

    Args:
        graph: changed in place; its nodes are in topological order.
    """
    renamed: dict[str, str] = {}
    repeats = _repeats(graph)
    for position in sorted(repeats, reverse=True):
        renamed |= dict(zip(graph.node[position].output, repeats[position].output, strict=True))
        del graph.node[position]
    _rename(graph, renamed)
    for nested in _nested(graph):
        merge_quantizers(nested)


def _repeats(graph: GraphProto) -> dict[int, NodeProto]:
    """Position of every quantizer that can go → the first one of the same value."""
    results = {value.name for value in graph.output}
    firsts: dict[str, NodeProto] = {}
    repeats = {}
    for position, node in enumerate(graph.node):
        if node.domain in ("", "ai.onnx") and node.op_type == _QUANTIZER:
            first = firsts.setdefault(node.input[0], node)
            if first is not node and results.isdisjoint(node.output):
                repeats[position] = first
    return repeats


def _rename(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Rename what nodes read, nested graphs included."""
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
    for nested in _nested(graph):
        _rename(nested, names)


def _nested(graph: GraphProto) -> Iterator[GraphProto]:
    """The graphs in attributes of a graph's nodes."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield attribute.g
            yield from attribute.graphs


DYNAMIC = Dynamic()
