"""Emitting a replacement: nodes, initializers and decode programs, with real arrays or with their shapes alone.

Pricing and rewriting run the same emission code. Pricing hands in a `Spec` where rewriting hands in an array, so the bytes
that are predicted are the bytes that will be written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper, parser

Attributes = Mapping[str, int | float | str | list[int] | TensorProto]
"""Attributes of a node, by name."""

DOMAIN = "intaglio"
"""The domain of the decode programs, carried in the model as local functions."""


@dataclass(frozen=True)
class Spec:
    """An array without its values: all that pricing needs."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    @property
    def nbytes(self) -> int:
        """Payload in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


Array = NDArray[np.generic] | Spec


def spec_of(array: Array) -> Spec:
    """The shape and dtype of an array or a spec."""
    return Spec(tuple(array.shape), array.dtype)


@dataclass(frozen=True)
class Program:
    """A decode program: a model-local function of standard operators that exist since opset 7.

    Attributes:
        name: function name in the `intaglio` domain.
        text: the function in ONNX text form, without the header that names domain and opset.
        uses: programs that the text calls, as nodes of the `intaglio` domain; they use no others.
    """

    name: str
    text: str
    uses: tuple[Program, ...] = ()

    def function(self, opset: int) -> FunctionProto:
        """The function for a model of the given default-domain opset."""
        imports = f'"" : {opset}' + (f', "{DOMAIN}" : 1' if self.uses else "")
        return parser.parse_function(f'<opset_import: [{imports}], domain: "{DOMAIN}">\n{self.name} {self.text}')

    def inline(self, call: NodeProto, opset: int, fresh: Callable[[str], str]) -> list[NodeProto]:
        """The nodes that one call stands for, for models too old (IR < 8) to carry functions.

        Args:
            call: a call of this program.
            opset: version of the model's default domain.
            fresh: makes a new value name from a name of the function's body.
        """
        function = self.function(opset)
        rename = dict(zip([*function.input, *function.output], [*call.input, *call.output], strict=True))
        rename |= {name: fresh(name) for body_node in function.node for name in body_node.output if name not in rename}
        given = {attribute.name: attribute for attribute in call.attribute}
        nodes: list[NodeProto] = []
        for body_node in function.node:
            node = NodeProto()
            node.CopyFrom(body_node)
            del node.input[:], node.output[:], node.attribute[:]
            node.input.extend(rename[name] for name in body_node.input)
            node.output.extend(rename[name] for name in body_node.output)
            for attribute in body_node.attribute:
                copy = AttributeProto()
                copy.CopyFrom(given[attribute.ref_attr_name] if attribute.ref_attr_name else attribute)
                copy.name = attribute.name
                node.attribute.append(copy)
            used = next((program for program in self.uses if node.domain == DOMAIN and program.name == node.op_type), None)
            nodes += [node] if used is None else used.inline(node, opset, fresh)
        return nodes


@dataclass(frozen=True)
class Target:
    """What the emitted nodes must fit into.

    Attributes:
        opset: version of the default domain.
        functions: whether the model's IR version admits model-local functions (IR 8 or newer).
        stem: prefix of every new value name; the name of the weight.
        taken: names that exist in the model already.
        largest_code: magnitude that codes of weights stay within where operators compute with them as int8.
    """

    opset: int
    functions: bool
    stem: str
    taken: frozenset[str] = frozenset()
    largest_code: int = 127


@dataclass
class Emitter:
    """Collects the nodes, initializers and programs of one replacement, in topological order."""

    target: Target
    nodes: list[NodeProto] = field(default_factory=list)
    initializers: dict[str, Array] = field(default_factory=dict)
    programs: dict[str, Program] = field(default_factory=dict)
    _used: set[str] = field(default_factory=set)

    def name(self, suffix: str) -> str:
        """A value name that neither the model nor this replacement uses yet.

        Dots of the suffix become underscores, so that replacements with different stems never make the same name: the last
        dot of a name tells where its stem ends ("a" with "0.q" makes "a.0_q", "a.0" with "q" makes "a.0.q").
        """
        stem = f"{self.target.stem}.{suffix.strip('.').replace('.', '_')}"
        name, count = stem, 1
        while name in self.target.taken or name in self._used:
            name, count = f"{stem}_{count}", count + 1
        self._used.add(name)
        return name

    def constant(self, suffix: str, array: Array) -> str:
        """Add an initializer."""
        name = self.name(suffix)
        self.initializers[name] = array
        return name

    def ints(self, suffix: str, values: Sequence[int]) -> str:
        """Add a one-dimensional int64 initializer (shapes, axes)."""
        return self.constant(suffix, np.asarray(values, np.int64))

    def node(
        self,
        op_type: str,
        inputs: Sequence[str],
        output: str | None = None,
        *,
        domain: str = "",
        attributes: Attributes | None = None,
    ) -> str:
        """Add a node with one output; the output's name is made up when not given."""
        output = output or self.name(op_type.lower())
        self.nodes.append(_node(op_type, inputs, output, domain, attributes or {}))
        return output

    def copy(
        self,
        original: NodeProto,
        changes: Mapping[int, str],
        *,
        drop: Sequence[str] = (),
        attributes: Attributes | None = None,
    ) -> None:
        """Add a copy of a node of the model that keeps its name and outputs, with some inputs and attributes replaced.

        Args:
            original: the node.
            changes: new names, by input position.
            drop: attributes that the copy does not have.
            attributes: attributes that replace the original's, or are added.
        """
        node = NodeProto()
        node.CopyFrom(original)
        for index, name in changes.items():
            node.input[index] = name
        keep = [a for a in node.attribute if a.name not in drop and a.name not in (attributes or {})]
        del node.attribute[:]
        node.attribute.extend(keep)
        node.attribute.extend(helper.make_attribute(name, value) for name, value in (attributes or {}).items())
        self.nodes.append(node)

    def call(self, program: Program, inputs: Sequence[str], output: str | None, attributes: Attributes) -> str:
        """Add a call of a decode program: one node where the model can carry functions, the body's nodes where it cannot."""
        output = output or self.name("w")
        call = _node(program.name, inputs, output, DOMAIN, attributes)
        if self.target.functions:
            self.programs |= {used.name: used for used in (*program.uses, program)}
            self.nodes.append(call)
        else:
            self.nodes.extend(program.inline(call, self.target.opset, self.name))
        return output


def _node(op_type: str, inputs: Sequence[str], output: str, domain: str, attributes: Attributes) -> NodeProto:
    node = helper.make_node(op_type, list(inputs), [output], domain=domain)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    return node


def fresh_name(name: str, taken: set[str]) -> str:
    """The name, or one like it that is not taken; it is taken from then on."""
    found, count = name, 1
    while found in taken:
        found, count = f"{name}_{count}", count + 1
    taken.add(found)
    return found


def ints_attribute(values: Sequence[int]) -> TensorProto:
    """A one-dimensional int64 tensor for an attribute, in its shortest form; `Constant <value: tensor = @name>` reads it in any opset."""
    return TensorProto(dims=[len(values)], data_type=TensorProto.INT64, int64_data=values)


def byte_attribute(value: int) -> TensorProto:
    """A uint8 scalar for an attribute."""
    return TensorProto(data_type=TensorProto.UINT8, int32_data=[value])


def float_attribute(value: float) -> TensorProto:
    """A float32 scalar; a tensor, because `Constant` takes plain floats only from opset 12 on."""
    return TensorProto(data_type=TensorProto.FLOAT, float_data=[value])


def onnx_type(dtype: np.dtype[np.generic]) -> int:
    """The `TensorProto.DataType` of a NumPy dtype (bfloat16 through ml_dtypes)."""
    return int(helper.np_dtype_to_tensor_dtype(dtype))


FLOAT_TYPES = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
"""Element types of weights that can be compressed."""
