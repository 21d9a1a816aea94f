"""Find what can run in integers besides layers with weights: carriers, and the activations that an integer operator absorbs.

ONNX Runtime runs an operator on bytes when everything that it reads comes from DequantizeLinear and what it yields goes into
QuantizeLinear. A *carrier* is an operator without weights for which that is so; the tables below hold those that fuse on ONNX Runtime's
CPU provider, and `tests/passes/test_integer.py` checks each of them. A *unit* is an operator with what it absorbs: a Relu or Clip that
alone reads it costs nothing, because bytes saturate where the activation would, and a vector added to a matrix product becomes its bias.

Must not fire on: nodes in nested graphs and functions, models before opset 13, values that are not float32 or depend on no input,
operators whose other inputs are not small initializers, and operators around which the model has Quantize/DequantizeLinear already.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper, shape_inference

from .graph import STANDARD, ValueIndex, initializer_names, output_names, reads
from .model import Model
from .session import array_bytes
from .sites import opset
from .weights import is_external

MIN_OPSET = 13
"""The opset from which DequantizeLinear takes one scale per channel, as weights need it."""

_ALL = 1 << 30
_SMALL_BYTES = 1024
"""Initializers up to this size count as parameters, and are shown to shape inference."""

_RESCALING = {
    "Add": 2,
    "AveragePool": 1,
    "Concat": _ALL,
    "GlobalAveragePool": 1,
    "LeakyRelu": 1,
    "MatMul": 2,
    "Mul": 2,
    "Relu": 1,
    "Sigmoid": 1,
    "Softmax": 1,
}
"""Carriers whose output has a scale of its own, with the number of leading inputs that are activations."""

KEEPING = frozenset(
    (
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "MaxPool",
        "Reshape",
        "Resize",
        "Slice",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    )
)
"""Carriers that move or select entries of their first input: ONNX Runtime runs them on bytes if both sides have one scale."""

CHANNELS_LAST = {"MaxPool": "NhwcMaxPool"}
"""Carriers that have a kernel for bytes with channels last, as convolutions in integers leave them, and a far slower one elsewhere."""

HELD = frozenset((*CHANNELS_LAST, "Softmax"))
"""Operators whose kernel for bytes can be slower than the one for floats between quantizers, which ONNX Runtime never weighs against each
other: it takes bytes wherever it finds quantizers around them."""

_ABSORBING = frozenset(("Add", "AveragePool", "Concat", "Conv", "Gemm", "GlobalAveragePool", "MatMul", "Mul"))
"""Operators whose integer kernels round and saturate to a scale of the output's own."""

_QUANTIZERS = frozenset(("QuantizeLinear", "DequantizeLinear"))


@dataclass(frozen=True, eq=False)
class Carrier:
    """An operator without weights that can run in integers.

    Attributes:
        name: the first output of the node, which no other carrier and no weight has.
        node: the node itself, not a copy.
        inputs: the activation values that it reads, each once.
        output: the value that its unit yields.
    """

    name: str
    node: NodeProto
    inputs: tuple[str, ...]
    output: str


def find_carriers(model: Model) -> tuple[Carrier, ...]:
    """The carriers of the main graph, in its order; no weight is read."""
    if opset(model.proto) < MIN_OPSET:
        return ()
    graph = model.proto.graph
    index = ValueIndex(model.proto)
    floats = _float_activations(model.proto)
    small = _parameters(graph)
    absorbed = {id(node) for candidate in graph.node for node in unit_output(index, candidate)[1]}
    carriers = []
    for node in graph.node:
        inputs = activation_inputs(node, floats)
        parameters = [name for name in node.input if name and name not in inputs]
        if id(node) in absorbed or not _fuses(node) or not inputs or not small.issuperset(parameters):
            continue
        if len(node.output) != 1 or node.output[0] not in floats or _quantized_already(index, inputs, node.output[0]):
            continue
        if len([name for name in node.input[: data_inputs(node)] if name in floats]) == min(data_inputs(node), len(node.input)):
            carriers.append(Carrier(node.output[0], node, inputs, unit_output(index, node)[0]))
    return tuple(carriers)


def data_inputs(node: NodeProto) -> int:
    """How many leading inputs of an operator its integer kernel reads as activations; the rest are parameters."""
    if node.op_type in KEEPING or node.op_type == "Conv":
        return 1
    return 2 if node.op_type == "Gemm" else _RESCALING.get(node.op_type, 0)


def activation_inputs(node: NodeProto, activations: Iterable[str]) -> tuple[str, ...]:
    """The values among `activations` that an operator's integer kernel reads, each once."""
    known = activations if isinstance(activations, (set, frozenset)) else set(activations)
    return tuple(dict.fromkeys(name for name in node.input[: data_inputs(node)] if name in known))


def unit_output(index: ValueIndex, node: NodeProto) -> tuple[str, tuple[NodeProto, ...]]:
    """What an operator of the main graph yields together with what it absorbs, should it run in integers.

    Args:
        index: of the model's values.
        node: the operator.

    Returns:
        The value after the absorbed nodes, and these nodes in running order: the Add of a bias, then a Relu or Clip.
    """
    value, absorbed = node.output[0], []
    if node.domain not in STANDARD or node.op_type not in _ABSORBING:
        return value, ()
    bias = only_reader(index, value) if node.op_type == "MatMul" else None
    if bias is not None and added_bias(index, bias) is not None:
        absorbed.append(bias)
        value = bias.output[0]
    activation = only_reader(index, value)
    if activation is not None and activation.input[0] == value and clip_bounds(index, activation) is not None:
        absorbed.append(activation)
        value = activation.output[0]
    return value, tuple(absorbed)


def added_bias(index: ValueIndex, node: NodeProto) -> str | None:
    """The initializer that an Add adds to a value, if there is one float32 number for each entry of the last axis; else None."""
    if node.domain not in STANDARD or node.op_type != "Add":
        return None
    return next((name for name in node.input if is_bias(index, name)), None)


def is_bias(index: ValueIndex, name: str) -> bool:
    """Whether a value of the main graph is a float32 initializer with one number for each entry of its last axis."""
    tensor = _initializer(index, name)
    return tensor is not None and tensor.data_type == TensorProto.FLOAT and math.prod(tensor.dims[:-1]) == 1


def clip_bounds(index: ValueIndex, node: NodeProto) -> tuple[float, float] | None:
    """Between which numbers a Relu or Clip keeps its input; None for other nodes, unknown bounds, and bounds that exclude zero."""
    if node.domain not in STANDARD or node.op_type not in ("Relu", "Clip"):
        return None
    if node.op_type == "Relu":
        return 0.0, math.inf
    given = [*node.input[1:], "", ""]
    low = _number(index, given[0]) if given[0] else -math.inf
    high = _number(index, given[1]) if given[1] else math.inf
    return (low, high) if low is not None and high is not None and low <= 0 <= high and low < high else None


def varying(graph: GraphProto) -> frozenset[str]:
    """Values of a graph that depend on its inputs; defaults of inputs count as constants."""
    constants = initializer_names(graph)
    names = {value.name for value in graph.input} - constants
    for node in graph.node:
        if not names.isdisjoint(reads(node)):
            names.update(filter(None, node.output))
    return frozenset(names)


def value_types(proto: ModelProto) -> dict[str, TypeProto.Tensor]:
    """Types and shapes of the main graph's tensors, as far as shape inference knows them; large initializers are not looked at."""
    light = ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import, functions=proto.functions)
    graph = light.graph
    graph.name = proto.graph.name
    graph.node.extend(proto.graph.node)
    graph.input.extend(proto.graph.input)
    graph.output.extend(proto.graph.output)
    graph.value_info.extend(proto.graph.value_info)
    declared = {value.name for value in graph.input}
    for tensor in proto.graph.initializer:
        if _is_parameter(tensor):
            graph.initializer.append(tensor)
        elif tensor.name not in declared:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    known = shape_inference.infer_shapes(light).graph
    values = (*known.value_info, *known.input, *known.output)
    return {value.name: value.type.tensor_type for value in values if value.type.HasField("tensor_type")}


def _float_activations(proto: ModelProto) -> frozenset[str]:
    """The values of the main graph that are float32 and depend on its inputs."""
    types = value_types(proto)
    return frozenset(name for name in varying(proto.graph) if name in types and types[name].elem_type == TensorProto.FLOAT)


def _parameters(graph: GraphProto) -> frozenset[str]:
    """Small initializers that lie in the model file and that nobody can override."""
    inputs = {value.name for value in graph.input}
    return frozenset(tensor.name for tensor in graph.initializer if _is_parameter(tensor) and tensor.name not in inputs)


def _is_parameter(tensor: TensorProto) -> bool:
    return not is_external(tensor) and array_bytes(tensor.data_type, tensor.dims) <= _SMALL_BYTES


def _fuses(node: NodeProto) -> bool:
    """Whether ONNX Runtime runs this node on bytes, going by its type and attributes."""
    if node.domain not in STANDARD or not (node.op_type in _RESCALING or node.op_type in KEEPING):
        return False
    given = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type == "AveragePool":
        return "dilations" not in given or set(given["dilations"].ints) == {1}
    if node.op_type == "Resize":
        return "mode" not in given or given["mode"].s == b"nearest"
    return True


def _quantized_already(index: ValueIndex, inputs: Iterable[str], output: str) -> bool:
    """Whether the model has Quantize/DequantizeLinear around an operator."""
    producers = (index.producer(name) for name in inputs)
    before = any(producer is not None and producer.node.op_type in _QUANTIZERS for producer in producers)
    return before or any(use.node.op_type in _QUANTIZERS for use in index.uses(output))


def only_reader(index: ValueIndex, value: str) -> NodeProto | None:
    """The one node of the main graph that reads a value, if nothing else does and it is no output."""
    uses = index.uses(value)
    home = index.home(value)
    if len(uses) != 1 or uses[0].scope is not home or value in output_names(home.body):
        return None
    return uses[0].node


def _initializer(index: ValueIndex, name: str) -> TensorProto | None:
    """The initializer of the main graph that a value is; None where a caller may override it."""
    body = index.home(name).body
    if not isinstance(body, GraphProto) or any(value.name == name for value in body.input):
        return None
    return next((tensor for tensor in body.initializer if tensor.name == name), None)


def _number(index: ValueIndex, name: str) -> float | None:
    """The value of a constant with one entry that lies in the model file."""
    tensor = _initializer(index, name)
    producer = index.producer(name)
    if producer is not None and producer.node.op_type == "Constant" and producer.node.attribute[0].name == "value":
        tensor = producer.node.attribute[0].t
    if tensor is None or is_external(tensor) or math.prod(tensor.dims) != 1:
        return None
    return float(np.asarray(numpy_helper.to_array(tensor)).reshape(-1)[0])
