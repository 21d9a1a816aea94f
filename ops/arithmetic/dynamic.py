"""Dynamic integers: activations are rounded to eight bits when they arrive, with a scale of their own in every run.

Standard operators: DynamicQuantizeLinear, MatMulInteger, Cast, Mul. The scales are multiplied with each other first, because that is what
ONNX Runtime merges into one MatMulIntegerToFloat or DynamicQuantizeMatMul.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper

from ..emit import Array, Emitter, Spec
from ..families import Use
from ..storage import IntegerWeight, Storage, requantize
from .base import Operand
from .weight import SINGLE, add_bias, gemm_reason, integer_weight, operator_reason

QUANTIZER_OPSET = 11
"""The opset that brings DynamicQuantizeLinear, and `Round` for weights without codes."""

_QUANTIZER = "DynamicQuantizeLinear"


@dataclass(frozen=True)
class Dynamic:
    """int8 weights and uint8 activations of one scale per tensor and run, accumulated in int32."""

    name: str = "dynamic"
    domains: tuple[str, ...] = ()
    coupled: bool = False
    product_reason: str | None = None

    def declines(self, use: Use, opset: int) -> str | None:
        """Plain Gemm and MatMul with the weight on the right, from opset 11 on."""
        if opset < QUANTIZER_OPSET:
            return f"{_QUANTIZER} needs opset {QUANTIZER_OPSET}, the model has {opset}"
        if use.node.op_type in ("LSTM", "GRU", "RNN"):
            return "a recurrent layer reads two weights, each of which gets its own form"
        return operator_reason(use, ("Gemm", "MatMul")) or gemm_reason(use.node)

    def accepts(self, storage: Storage, spec: Spec, axis: int) -> str | None:
        """float32 matrices in any storage."""
        if spec.dtype != SINGLE:
            return f"a weight of {spec.dtype}: {_QUANTIZER} takes float32"
        return None if len(spec.shape) == 2 else f"a weight of shape {list(spec.shape)}: only matrices"

    def operand(
        self, emitter: Emitter, suffix: str, storage: Storage, packed: tuple[Array, ...], spec: Spec, axis: int, output: str | None = None
    ) -> Operand:
        """The storage's own codes where it has some, else rounded ones."""
        return _inputs_first(emitter, integer_weight(emitter, suffix, storage, packed, spec, axis), spec, output)

    def from_value(self, emitter: Emitter, value: str, spec: Spec, axis: int, output: str | None = None) -> Operand | None:
        """Rounded codes."""
        return _inputs_first(emitter, requantize(emitter, value, spec, axis), spec, output)

    def lower(self, emitter: Emitter, node: NodeProto, index: int, operand: Operand) -> None:
        """x ≈ (x_q − x_zero)·x_s, so x·W ≈ ((x_q − x_zero)·W_q)·(x_s·w_s) [+ C].

        Raises:
            ValueError: the weight is not the right factor of a MatMul or a Gemm.
        """
        if node.op_type not in ("Gemm", "MatMul") or index != 1:
            raise ValueError(f"{node.op_type} with its weight as input {index} has no dynamic integers")
        codes, scale = operand.values
        rounded, step, zero = (emitter.name(suffix) for suffix in ("xq", "xs", "xz"))
        emitter.nodes.append(helper.make_node(_QUANTIZER, [node.input[0]], [rounded, step, zero]))
        total = emitter.node("MatMulInteger", [rounded, codes, zero])
        floats = emitter.node("Cast", [total], attributes={"to": TensorProto.FLOAT})
        product = emitter.node("Mul", [floats, emitter.node("Mul", [step, scale])])
        add_bias(emitter, node, product)


def _inputs_first(emitter: Emitter, weight: IntegerWeight, spec: Spec, output: str | None) -> Operand:
    """Codes with one column for each output, as MatMulInteger reads them; no float operator finds the operand's name."""
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
