"""Reverse-mode differentiation as a graph pass: a model that also computes gradients, run by ONNX Runtime itself.

Before: a model and the names of what to differentiate and with respect to what. After: a model with the same inputs and outputs, a further
input for every cotangent, and a further output for every gradient. The rules of the operators are in `ops.vjp`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

from intaglio.ops.vjp import MIN_OPSET, RULES, Call, Names, Tape, Unsupported, Value

from .errors import InputError
from .graph import all_names, reads, topological
from .sites import opset

_SMALL_BYTES = 1 << 16
"""Constants up to this size are shown to the rules (shapes, axes, positions)."""


@dataclass(frozen=True)
class Stop:
    """Where a path to the loss ended for want of a rule.

    Attributes:
        node: the operator's name, or its first output's name.
        op_type: the operator.
        reason: why no gradient passes.
    """

    node: str
    op_type: str
    reason: str

    def __str__(self) -> str:
        return f"no gradient through {self.op_type} '{self.node}': {self.reason}"


@dataclass(frozen=True)
class Differentiated:
    """A model with gradients.

    Attributes:
        proto: the model; initializers are those of the original.
        cotangents: output name → name of the input that takes its cotangent, shaped and typed like the output.
        gradients: value name → name of the output that holds its gradient. A value that the loss does not depend on is absent.
        stops: operators that no gradient passes.
        partial: names of values of which some path to the loss goes through a stop, so that their gradient lacks that part.
    """

    proto: ModelProto
    cotangents: Mapping[str, str]
    gradients: Mapping[str, str]
    stops: tuple[Stop, ...]
    partial: frozenset[str]


def differentiate(
    proto: ModelProto,
    outputs: Sequence[str],
    wrt: Sequence[str],
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Differentiated:
    """Add the reverse pass of a model.

    The loss is Σ ⟨cotangent, output⟩ over the outputs, for cotangents that are fed. A scalar loss that the model computes itself is
    differentiated by feeding 1.

    Args:
        proto: the model; not changed.
        outputs: names of values with given cotangents.
        wrt: names of initializers, inputs or other values.
        shapes: lengths of inputs that the model leaves open, which makes the reverse pass smaller.

    Raises:
        InputError: a name is not a value of the model, or no type can be inferred for it.
    """
    model, values = _typed(proto, shapes or {})
    graph = model.graph
    for name in (*outputs, *wrt):
        if name not in values:
            raise InputError(f"'{name}' is not a value of the model with a known type; it cannot take part in a derivative")
    active = _reachable(graph.node, set(wrt))
    tape = Tape(Names(all_names(model)), opset(model))
    pending: dict[str, list[str]] = {}
    cotangents: dict[str, str] = {}
    for name in outputs:
        cotangents[name] = tape.names.fresh(f"cotangent.{name}")
        pending.setdefault(name, []).append(cotangents[name])
        graph.input.append(_info(cotangents[name], values[name]))
    stops: list[Stop] = []
    blocked: set[str] = set()
    for node in reversed(topological(graph.node)):
        if not active.intersection(node.output):
            continue
        blocked |= {name for name in reads(node) if blocked.intersection(node.output)} & active
        given = [_total(tape, pending, name) if name in active else None for name in node.output]
        if not any(given):
            continue
        found = _apply(node, values, given, active, tape)
        if isinstance(found, Stop):
            stops.append(found)
            blocked |= reads(node) & active
            continue
        for index, gradient in found.items():
            pending.setdefault(node.input[index], []).append(gradient)
    gradients = {name: total for name in wrt if (total := _total(tape, pending, name)) is not None}
    results = {name: _published(tape, gradient, values[name], name) for name, gradient in gradients.items()}
    graph.node.extend(tape.nodes)
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in tape.constants.items())
    graph.output.extend(_info(results[name], values[name]) for name in results)
    return Differentiated(model, cotangents, results, tuple(stops), frozenset(blocked.intersection(wrt)))


def _apply(
    node: NodeProto, values: Mapping[str, Value], given: Sequence[str | None], active: set[str], tape: Tape
) -> Mapping[int, str] | Stop:
    """What the node's rule emits, or why it does not."""
    key = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
    label = node.name or next(name for name in node.output if name)
    wanted = frozenset(i for i, name in enumerate(node.input) if name in active and name in values and values[name].is_float)
    if not wanted:
        return {}
    if key not in RULES:
        return Stop(label, node.op_type, "the operator has no rule")
    try:
        call = Call(
            node,
            tuple(_known(values, name) for name in node.input),
            tuple(_known(values, name) for name in node.output),
            tuple(given),
            wanted,
            tape,
            partial(_add_output, node, tape.names),
        )
        found = RULES[key](call)
    except Unsupported as reason:
        return Stop(label, node.op_type, str(reason))
    return {index: name for index, name in found.items() if index in wanted}


def _known(values: Mapping[str, Value], name: str) -> Value | None:
    """The value of this name; None where an optional one is left out."""
    if not name:
        return None
    if name not in values:
        raise Unsupported(f"the type of '{name}' is unknown")
    return values[name]


def _add_output(node: NodeProto, names: Names, index: int) -> str:
    """Make the node give an optional output."""
    while len(node.output) <= index:
        node.output.append("")
    if not node.output[index]:
        node.output[index] = names.fresh(f"{node.output[0]}.output{index}")
    return str(node.output[index])


def _total(tape: Tape, pending: dict[str, list[str]], name: str) -> str | None:
    """The sum of a value's gradients over its readers."""
    terms = pending.get(name, [])
    if len(terms) > 1:
        terms = tape.emit("Sum", terms, 1, f"grad.{name}", "", {})
        pending[name] = terms
    return terms[0] if terms else None


def _published(tape: Tape, gradient: str, value: Value, name: str) -> str:
    """An output of its own for a gradient: two values may share one."""
    result = tape.names.fresh(f"gradient.{name}")
    tape.nodes.append(helper.make_node("Identity", [gradient], [result]))
    return result


def _reachable(nodes: Sequence[NodeProto], start: set[str]) -> set[str]:
    """Values that depend on any of `start`, themselves included."""
    found = set(start)
    for node in topological(nodes):
        if found & reads(node):
            found.update(name for name in node.output if name)
    return found


def _typed(proto: ModelProto, shapes: Mapping[str, Sequence[int]]) -> tuple[ModelProto, dict[str, Value]]:
    """A copy of the model at an opset that rules emit for, and what is known of its values."""
    model = ModelProto()
    model.CopyFrom(proto)
    if opset(model) < MIN_OPSET:
        raise InputError(f"opset {opset(model)} is too old to differentiate; convert the model to opset {MIN_OPSET} or newer")
    for value in model.graph.input:
        if value.name in shapes:
            value.type.tensor_type.shape.CopyFrom(helper.make_tensor_type_proto(1, list(shapes[value.name])).tensor_type.shape)
    inferred = shape_inference.infer_shapes(model, data_prop=True).graph
    values: dict[str, Value] = {}
    for info in (*inferred.input, *inferred.value_info, *inferred.output):
        if info.type.HasField("tensor_type") and info.type.tensor_type.elem_type:
            values[info.name] = Value(info.name, _dtype(info.type.tensor_type.elem_type), _lengths(info.type.tensor_type))
    for tensor in inferred.initializer:
        small = tensor.data_location != TensorProto.EXTERNAL and tensor.ByteSize() <= _SMALL_BYTES
        constant = numpy_helper.to_array(tensor) if small else None
        values[tensor.name] = Value(tensor.name, _dtype(tensor.data_type), tuple(tensor.dims), constant)
    for node in inferred.node:
        if node.op_type == "Constant" and node.output[0] in values:
            values[node.output[0]] = Value(node.output[0], *_constant(node))
    return model, values


def _constant(node: NodeProto) -> tuple[np.dtype[Any], tuple[int, ...], NDArray[Any]]:
    """What a Constant node holds."""
    found = helper.get_attribute_value(node.attribute[0])
    if isinstance(found, TensorProto):
        array = numpy_helper.to_array(found)
    else:
        array = np.asarray(found, np.float32 if node.attribute[0].name.startswith("value_float") else np.int64)
    return array.dtype, array.shape, array


def _dtype(data_type: int) -> np.dtype[Any]:
    return np.dtype(helper.tensor_dtype_to_np_dtype(data_type))


def _lengths(tensor: Any) -> tuple[int | None, ...] | None:
    """Lengths of a tensor type; None for one that is open, and for a rank that is."""
    if not tensor.HasField("shape"):
        return None
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)


def _info(name: str, value: Value) -> Any:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
