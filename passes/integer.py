"""Place Quantize/DequantizeLinear pairs around the operators that shall run in integers.

Before: a model in which weights of these operators come from `DequantizeLinear`. After: so do their activations, and ONNX Runtime's QDQ
fusion merges each of them into one integer kernel. Per value there is one pair. If an operator in integers yields the value, the pair
takes the value's name and everybody reads what was rounded; otherwise only operators in integers do.

- Relu and Clip that an operator absorbs go: bytes saturate where they would. A Relu that is an operator of its own becomes a LeakyRelu
  of slope zero, for which there is an integer kernel. Behind a product that yields floats they are written with LeakyRelu, Max and Min:
  ONNX Runtime does not find the integer kernel of a Gemm in front of a Relu or Clip that is not quantized.
- Operators that move entries keep the range of their input.
- The bias of a Conv, a Gemm, or a MatMul becomes int32 of scale x_scale·w_scale, by a program that is folded when the model is loaded.
- Matrix products yield floats unless an operator in integers reads them.

Operators that touch a value without a range stay in floats. No weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from intaglio.ops.emit import Emitter, Program, Target, fresh_name

from .canonicalize import remove_dead
from .graph import STANDARD, ValueIndex, all_names
from .model import Model
from .ranges import Range
from .regions import (
    CHANNELS_LAST,
    HELD,
    KEEPING,
    MIN_OPSET,
    activation_inputs,
    added_bias,
    clip_bounds,
    data_inputs,
    is_bias,
    unit_output,
    value_types,
    varying,
)
from .rewrite import FUNCTION_IR, OPTIONAL_INPUT_IR, carry
from .sites import opset

_PRODUCTS = frozenset(("Gemm", "MatMul"))
"""Operators whose integer kernels can yield floats."""

_BIASED = ("Conv", "Gemm")

_WIDENED = 4.0
"""How many times as wide as its own a range may become so that values that are joined have the same."""

_QUANTIZE_BIAS = Program(
    "QuantizeBias",
    """(b, s) => (q) {
        r = Div (b, s)
        n = Round (r)
        most = Constant <value = float {2147483520.0}> ()
        least = Constant <value = float {-2147483520.0}> ()
        below = Min (n, most)
        inside = Max (below, least)
        q = Cast <to = 6> (inside)
    }""",
)
"""int32 codes of a float32 bias: round(b / s), ties to even, within the float32 numbers that int32 holds."""


@dataclass(frozen=True, eq=False)
class _Unit:
    """An operator that shall run in integers.

    Attributes:
        node: the operator.
        inputs: activation values that its kernel reads, each once.
        output: the value that it yields together with what it absorbs.
        absorbed: these nodes: perhaps the Add of a bias, perhaps a Relu or Clip.
    """

    node: NodeProto
    inputs: tuple[str, ...]
    output: str
    absorbed: tuple[NodeProto, ...]

    @property
    def source(self) -> str | None:
        """The value whose range the output keeps; None where it has its own."""
        return self.inputs[0] if self.node.op_type in KEEPING else None


def declines(proto: ModelProto) -> str | None:
    """None when operators of the model can run in integers, else the reason why not."""
    version = opset(proto)
    return None if version >= MIN_OPSET else f"integers with one scale per channel need opset {MIN_OPSET}, the model has {version}"


def quantized_values(model: Model, operators: Collection[str]) -> tuple[str, ...]:
    """The values that need a range if these operators shall run in integers, in the order of the graph.

    Args:
        model: as for `place`.
        operators: as for `place`.
    """
    units = _units(model.proto, operators)
    kept = {unit.output for unit in units if unit.source is not None}
    return tuple(name for name in _quantized(units) if name not in kept)


def place(model: Model, operators: Collection[str], ranges: Mapping[str, Range]) -> Model:
    """A copy of the model in which the given operators run in integers; the input model is not changed.

    Args:
        model: the model, perhaps without the payloads of its weights.
        operators: first outputs (or names) of nodes of the main graph: carriers, and Conv, Gemm and MatMul that read a dequantized weight.
        ranges: by value; values of `quantized_values` that have none stay floats, and so do the operators around them.

    Raises:
        ValueError: the model's opset is too old; see `declines`.
    """
    reason = declines(model.proto)
    if reason:
        raise ValueError(reason)
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    units, known = _with_ranges(_units(proto, operators), ranges)
    if units:
        _Placement(proto, units, known).apply()
        proto = remove_dead(proto)
    return Model(proto, model.weights, model.path, model.size_bytes, model.sha256)


def fake_quantized(model: Model, values: Collection[str], ranges: Mapping[str, Range]) -> Model:
    """A copy of the model, in floats, in which everything that reads one of the given values reads it rounded.

    Args:
        model: the model, of opset 10 or newer.
        values: names of float32 values of the main graph; a graph output is rounded too, an input that is an output is not.
        ranges: of these values.
    """
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    index = ValueIndex(proto)
    splice = _Splice(proto)
    for name in dict.fromkeys(values):
        producer = index.producer(name)
        parameters = splice.parameters(name, ranges[name])
        if producer is not None:
            raw = splice.fresh(f"{name}_unrounded")
            producer.node.output[producer.index] = raw
            splice.after(producer.node, splice.pair(name, raw, name, parameters))
        else:
            rounded = splice.fresh(f"{name}_dequantized")
            splice.after(None, splice.pair(name, name, rounded, parameters))
            for use in index.uses(name):
                use.node.input[use.index] = rounded
    splice.finish()
    return Model(proto, model.weights, model.path, model.size_bytes, model.sha256)


def _units(proto: ModelProto, operators: Collection[str]) -> list[_Unit]:
    """The named operators with what is around them, in the order of the graph."""
    wanted = set(operators)
    named = wanted - {name for node in proto.graph.node for name in node.output}
    index, activations = ValueIndex(proto), varying(proto.graph)
    units, absorbed = [], set[int]()
    for node in proto.graph.node:
        if id(node) in absorbed or not (wanted.intersection(node.output[:1]) or node.name in named):
            continue
        inputs = activation_inputs(node, activations)
        if not inputs:
            continue
        output, nodes = unit_output(index, node)
        absorbed.update(map(id, nodes))
        units.append(_Unit(node, inputs, output, nodes))
    return units


def _quantized(units: Sequence[_Unit]) -> list[str]:
    """Every value that gets a pair: what the units read, and what they yield in bytes."""
    read = _read(units)
    return list(dict.fromkeys(name for unit in units for name in (*unit.inputs, *_yields(unit, read))))


def _read(units: Sequence[_Unit]) -> set[str]:
    """Every value that some unit reads."""
    return {name for unit in units for name in unit.inputs}


def _yields(unit: _Unit, read: Collection[str]) -> tuple[str, ...]:
    """The unit's output if it is bytes: always, but for products that only floats read."""
    return (unit.output,) if unit.node.op_type not in _PRODUCTS or unit.output in read else ()


def _with_ranges(units: list[_Unit], ranges: Mapping[str, Range]) -> tuple[list[_Unit], dict[str, Range]]:
    """The units all of whose values have ranges, and these ranges, in the order of `_quantized`."""
    while True:
        known: dict[str, Range] = {}
        sources = {unit.output: unit.source for unit in units}
        for name in _quantized(units):
            source = sources.get(name)
            if source is None and name in ranges:
                known[name] = ranges[name]
            elif source is not None and source in known:
                known[name] = known[source]
        read = _read(units)
        able = [unit for unit in units if all(name in known for name in (*unit.inputs, *_yields(unit, read)))]
        if len(able) == len(units):
            return units, _agreed(units, known)
        units = able


def _agreed(units: Sequence[_Unit], ranges: Mapping[str, Range]) -> dict[str, Range]:
    """The ranges, with one for all that a Concat joins: its kernel then moves bytes without looking each of them up.

    Values of which one would have to give up more than `_WIDENED` of its steps keep ranges of their own.
    """
    sources = {unit.output: unit.source for unit in units}
    teams: dict[str, set[str]] = {}  # values of one range
    for name in ranges:
        source = sources.get(name)
        teams[name] = teams[source] if source is not None else set()
        teams[name].add(name)
    found = dict(ranges)
    for unit in units:
        if unit.node.op_type != "Concat":
            continue
        joined = (*unit.inputs, unit.output)
        spans = [found[name] for name in joined]
        if len(set(spans)) == 1 or len({span.dtype for span in spans}) > 1:
            continue
        low, high = min(span.lowest for span in spans), max(span.highest for span in spans)
        if high - low > _WIDENED * min(span.highest - span.lowest for span in spans):
            continue
        team = set().union(*(teams[name] for name in joined))
        found |= dict.fromkeys(team, Range.spanning(low, high, spans[0].dtype))
        teams |= dict.fromkeys(team, team)
    return found


class _Splice:
    """Adds pairs to a main graph.

    Attributes:
        proto: the model, changed by `finish` only but for new initializers.
    """

    def __init__(self, proto: ModelProto) -> None:
        self.proto = proto
        self.taken = all_names(proto)
        self._before: dict[int, list[NodeProto]] = {}
        self._after: dict[int, list[NodeProto]] = {}
        self._start: list[NodeProto] = []
        self._removed: set[int] = set()

    def fresh(self, name: str) -> str:
        """The name, or one like it that is not taken."""
        return fresh_name(name, self.taken)

    def parameters(self, value: str, span: Range) -> tuple[str, str]:
        """Add the scale and the zero point of a value as initializers, and return their names."""
        arrays = {f"{value}_scale": np.asarray(span.scale, np.float32), f"{value}_zero_point": np.asarray(span.zero_point, span.dtype)}
        names = []
        for suggested, array in arrays.items():
            tensor = numpy_helper.from_array(array, self.fresh(suggested))
            self.proto.graph.initializer.append(tensor)
            if self.proto.ir_version < OPTIONAL_INPUT_IR:
                self.proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
            names.append(tensor.name)
        return names[0], names[1]

    def pair(self, value: str, source: str, target: str, parameters: tuple[str, str]) -> list[NodeProto]:
        """QuantizeLinear and DequantizeLinear from `source` to `target`, bytes named after `value`."""
        codes = self.fresh(f"{value}_quantized")
        return [
            helper.make_node("QuantizeLinear", [source, *parameters], [codes]),
            helper.make_node("DequantizeLinear", [codes, *parameters], [target]),
        ]

    def before(self, node: NodeProto, nodes: Sequence[NodeProto]) -> None:
        """Put nodes in front of a node."""
        self._before.setdefault(id(node), []).extend(nodes)

    def after(self, node: NodeProto | None, nodes: Sequence[NodeProto]) -> None:
        """Put nodes behind a node; None for the start of the graph."""
        (self._start if node is None else self._after.setdefault(id(node), [])).extend(nodes)

    def remove(self, node: NodeProto) -> None:
        """Take a node out."""
        self._removed.add(id(node))

    def finish(self) -> None:
        """Write the list of nodes."""
        nodes = list(self._start)
        for node in self.proto.graph.node:
            kept = [] if id(node) in self._removed else [node]
            nodes += [*self._before.get(id(node), ()), *kept, *self._after.get(id(node), ())]
        copies = []
        for node in nodes:
            copy = NodeProto()
            copy.CopyFrom(node)
            copies.append(copy)
        del self.proto.graph.node[:]
        self.proto.graph.node.extend(copies)


class _Placement:
    """Puts units of a model into integers."""

    def __init__(self, proto: ModelProto, units: Sequence[_Unit], ranges: Mapping[str, Range]) -> None:
        """Look at the model, which `apply` will change.

        Args:
            proto: the model.
            units: the operators, in the order of the graph.
            ranges: of every value that gets a pair.
        """
        self._proto = proto
        self._units = units
        self._ranges = ranges
        self._index = ValueIndex(proto)
        self._types = value_types(proto)
        self._splice = _Splice(proto)
        read = _read(units)
        self._yielders = {name: unit for unit in units for name in _yields(unit, read)}
        self._parameters: dict[str, tuple[str, str]] = {}
        self._programs: dict[str, Program] = {}

    def apply(self) -> None:
        """Change the model."""
        self._name_parameters()
        for unit in self._units:  # while nodes still read and yield what they did
            self._narrow_bias(unit)
        for name in self._ranges:
            if name in self._yielders:
                self._round_output(name, self._yielders[name])
            else:
                self._round_input(name)
        for unit in self._units:
            for node in (unit.node, *(() if unit.output in self._yielders else unit.absorbed)):
                self._disguise(node)
        self._splice.finish()
        carry(self._proto, self._programs)

    def _name_parameters(self) -> None:
        """Scales and zero points; a value that keeps its source's range shares them."""
        for name, span in self._ranges.items():
            unit = self._yielders.get(name)
            source = None if unit is None else unit.source
            if source is not None:
                self._parameters[name] = self._parameters[source]
                continue
            bounds = None if unit is None or not unit.absorbed else clip_bounds(self._index, unit.absorbed[-1])
            self._parameters[name] = self._splice.parameters(name, span if bounds is None else span.within(*bounds))

    def _round_output(self, name: str, unit: _Unit) -> None:
        """The pair takes the value's name; the last node of the unit that stays yields another."""
        last = unit.node
        for node in unit.absorbed:
            if clip_bounds(self._index, node) is None:
                last = node
            else:
                self._splice.remove(node)
        if last.output[0] == name:
            last.output[0] = self._splice.fresh(f"{name}_unrounded")
        self._splice.after(last, self._splice.pair(name, last.output[0], name, self._parameters[name]))

    def _round_input(self, name: str) -> None:
        """A pair for the operators in integers that read a value; everybody else reads it as before.

        Where the operator that yields it is to stay in floats, a Sum of one term may have to keep the quantizer away from it.
        """
        producer = self._index.producer(name)
        rounded, source, held = self._splice.fresh(f"{name}_dequantized"), name, []
        if producer is not None and self._drawn(producer.node):
            source = self._splice.fresh(f"{name}_held")
            held = [helper.make_node("Sum", [name], [source])]
        pair = self._splice.pair(name, source, rounded, self._parameters[name])
        self._splice.after(None if producer is None else producer.node, [*held, *pair])
        for unit in self._units:
            if name in unit.inputs:
                for position, each in enumerate(unit.node.input[: data_inputs(unit.node)]):
                    unit.node.input[position] = rounded if each == name else each

    def _drawn(self, node: NodeProto) -> bool:
        """Whether ONNX Runtime would draw an operator into bytes because of a quantizer behind it: it moves quantizers in front of pools,
        and takes other operators where what they read was dequantized. Operators that move entries hand either on."""
        held = self._moved(node)
        if held is None or held.domain not in STANDARD or held.op_type not in HELD:
            return False
        return held.op_type in CHANNELS_LAST or all(self._in_bytes(name) for name in held.input[: data_inputs(held)])

    def _moved(self, node: NodeProto | None) -> NodeProto | None:
        """The operator whose entries a node moves, itself if it moves none; None for what comes from elsewhere."""
        while node is not None and node.domain in STANDARD and node.op_type in KEEPING - CHANNELS_LAST.keys():
            producer = self._index.producer(node.input[0])
            node = None if producer is None else producer.node
        return node

    def _in_bytes(self, name: str) -> bool:
        """Whether a value was dequantized, perhaps before its entries were moved."""
        producer = self._index.producer(name)
        while name not in self._yielders and producer is not None and producer.node.op_type in KEEPING - CHANNELS_LAST.keys():
            name = producer.node.input[0]
            producer = self._index.producer(name)
        return name in self._yielders

    def _narrow_bias(self, unit: _Unit) -> None:
        """Turn a float bias into int32 of the scale that the integer kernel accumulates in."""
        reader, position = self._bias(unit)
        weight_scale = self._weight_scale(unit.node)
        if reader is None or weight_scale is None or unit.node.input[0] not in self._parameters:
            return
        bias = reader.input[position]
        dims = next(tuple(tensor.dims) for tensor in self._proto.graph.initializer if tensor.name == bias)
        if math.prod(dims) != self._outputs(unit.node, math.prod(dims)):
            return  # a bias that is broadcast stays a float
        rank = len(dims)
        target = Target(opset(self._proto), self._proto.ir_version >= FUNCTION_IR, unit.node.output[0], frozenset(self._splice.taken))
        emitter = Emitter(target)
        scale = emitter.node("Mul", [self._parameters[unit.node.input[0]][0], weight_scale], emitter.name("bias_scale"))
        codes = emitter.call(_QUANTIZE_BIAS, [bias, scale], emitter.name("bias_quantized"), {})
        axis = {"axis": max(0, rank - 1)}
        reader.input[position] = emitter.node("DequantizeLinear", [codes, scale], emitter.name("bias"), attributes=axis)
        self._splice.before(unit.node, emitter.nodes)
        self._splice.taken.update(name for node in emitter.nodes for name in node.output)
        self._programs |= emitter.programs

    def _outputs(self, node: NodeProto, unknown: int) -> int:
        """How many outputs a layer has: entries of the channel axis of what it yields; `unknown` where shape inference does not tell."""
        shape = self._types[node.output[0]].shape.dim if node.output[0] in self._types else ()
        if len(shape) < 2:
            return unknown
        axis = 1 if node.op_type == "Conv" else -1
        return int(shape[axis].dim_value) if shape[axis].HasField("dim_value") else unknown

    def _bias(self, unit: _Unit) -> tuple[NodeProto | None, int]:
        """The node that reads a unit's bias, and at which input; (None, 0) where there is none that can become int32."""
        node = unit.node
        if node.op_type in _BIASED and len(node.input) > 2 and node.input[2] and is_bias(self._index, node.input[2]):
            return node, 2
        adds = [each for each in unit.absorbed if added_bias(self._index, each) is not None] if node.op_type == "MatMul" else []
        if not adds or not self._becomes_gemm(node.output[0]):
            return None, 0
        return adds[0], list(adds[0].input).index(str(added_bias(self._index, adds[0])))

    def _becomes_gemm(self, product: str) -> bool:
        """Whether ONNX Runtime joins a MatMul and the Add behind it: two axes, or known sizes. Else its kernel yields floats to add to."""
        shape = self._types[product].shape if product in self._types and self._types[product].HasField("shape") else None
        return shape is None or len(shape.dim) <= 2 or all(dim.HasField("dim_value") for dim in shape.dim)

    def _weight_scale(self, node: NodeProto) -> str | None:
        """The scale of an operator's second operand."""
        if node.op_type not in (*_BIASED, "MatMul"):
            return None
        if node.input[1] in self._parameters:
            return self._parameters[node.input[1]][0]
        producer = self._index.producer(node.input[1])
        return producer.node.input[1] if producer is not None and producer.node.op_type == "DequantizeLinear" else None

    def _disguise(self, node: NodeProto) -> None:
        """Write a Relu or Clip that stays with other operators: a LeakyRelu of slope zero, or Max and Min."""
        if node.op_type == "Relu":
            node.op_type = "LeakyRelu"
            node.attribute.append(helper.make_attribute("alpha", 0.0))
        elif node.op_type == "Clip":
            value, low, high = [*node.input, "", ""][:3]
            if low and high:
                above = self._splice.fresh(f"{node.output[0]}_above")
                self._splice.before(node, [helper.make_node("Max", [value, low], [above])])
                value, low = above, ""
            node.op_type = "Max" if low else "Min"
            node.input[:] = [value, low or high] if low or high else [value]
