"""What a reverse rule is given and what it gives back.

A rule differentiates one node: from the cotangents of its outputs (gradients of a scalar loss) it emits nodes that compute those of its
inputs. Rules emit for opset 18 and newer, where axes of reductions are inputs; older models are converted before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from ..emit import fresh_name

MIN_OPSET = 18
"""The oldest default-domain opset that rules emit for."""

Dim: TypeAlias = int | None
"""A length, or None where only a run tells."""


@dataclass(frozen=True)
class Value:
    """A value around the node.

    Attributes:
        name: its name in the graph.
        dtype: its element type.
        shape: its lengths; None if not even the rank is known.
        constant: its elements, if they are known before a run.
        symbols: names of its lengths, one an axis; lengths of one name are equal in every run. None where a length has no name.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[Dim, ...] | None
    constant: NDArray[Any] | None = None
    symbols: tuple[str | None, ...] | None = None

    @property
    def rank(self) -> int:
        """Number of axes.

        Raises:
            Unsupported: it is unknown.
        """
        if self.shape is None:
            raise Unsupported(f"the rank of '{self.name}' is unknown")
        return len(self.shape)

    @property
    def static(self) -> tuple[int, ...] | None:
        """The shape, if all lengths are known."""
        if self.shape is None or None in self.shape:
            return None
        return tuple(length for length in self.shape if length is not None)

    @property
    def lengths(self) -> tuple[int | str | None, ...]:
        """The shape with names for the lengths that have one: equal entries other than None are equal lengths.

        Raises:
            Unsupported: the rank is unknown.
        """
        names = self.symbols or (None,) * self.rank
        return tuple(name if length is None else length for length, name in zip(self.shape or (), names, strict=True))

    @property
    def is_float(self) -> bool:
        """Whether a gradient with respect to the value has a meaning."""
        return bool(np.issubdtype(self.dtype, np.floating)) or self.dtype.name == "bfloat16"


class Unsupported(Exception):
    """A rule meets a case that it does not cover; its text is the reason."""


@dataclass
class Names:
    """Makes value names that nothing in the model uses yet."""

    taken: set[str]

    def fresh(self, stem: str) -> str:
        """A new name that begins with `stem`."""
        return fresh_name(stem, self.taken)


@dataclass
class Tape:
    """The nodes and initializers of the reverse pass, in topological order; constants of equal content exist once.

    Attributes:
        names: names in use.
        opset: version of the default domain.
        nodes: what was emitted.
        constants: initializers by name.
        stem: how names of constants begin.
    """

    names: Names
    opset: int
    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, NDArray[Any]] = field(default_factory=dict)
    stem: str = "grad"
    _by_content: dict[tuple[str, tuple[int, ...], bytes], str] = field(default_factory=dict)

    def constant(self, array: NDArray[Any]) -> str:
        """The name of an initializer with these elements."""
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self._by_content:
            name = self.names.fresh(f"{self.stem}.constant{len(self.constants)}")
            self._by_content[key], self.constants[name] = name, array
        return self._by_content[key]

    def emit(self, op_type: str, inputs: Sequence[str], outputs: int, stem: str, domain: str, attributes: Mapping[str, Any]) -> list[str]:
        """Add a node; the names of its outputs."""
        results = [self.names.fresh(f"{stem}.{op_type.lower()}") for _ in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), results, domain=domain, **attributes))
        return results


@dataclass(frozen=True)
class Call:
    """One node to differentiate, and the means to emit nodes.

    Attributes:
        node: the forward node. Rules read its attributes here; what they emit may read all of its inputs and outputs.
        inputs: by position; None where an optional input is left out.
        outputs: by position; None where an optional output is left out.
        cotangents: gradients of the loss with respect to the outputs, by position, shaped and typed like the output; None where the
            loss does not depend on the output. At least one is not None.
        wanted: positions of the inputs whose gradients are asked for; all are floats.
        tape: where emitted nodes go.
        add_output: makes the forward node give an optional output that it leaves out; its name.
    """

    node: NodeProto
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value | None, ...]
    cotangents: tuple[str | None, ...]
    wanted: frozenset[int]
    tape: Tape
    add_output: Callable[[int], str]

    # --- what the node says

    @property
    def opset(self) -> int:
        """Version of the default domain."""
        return self.tape.opset

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute's value (strings decoded), or the default."""
        for attribute in self.node.attribute:
            if attribute.name == name:
                value = helper.get_attribute_value(attribute)
                return value.decode() if isinstance(value, bytes) else value
        return default

    def has_input(self, index: int) -> bool:
        """Whether the node has an input at this position."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def x(self, index: int = 0) -> Value:
        """An input that is there.

        Raises:
            Unsupported: the node leaves it out.
        """
        if index < len(self.inputs):
            value = self.inputs[index]
            if value is not None:
                return value
        raise Unsupported(f"input {index} is missing")

    def y(self, index: int = 0) -> Value:
        """An output that is there.

        Raises:
            Unsupported: the node leaves it out.
        """
        if index < len(self.outputs):
            value = self.outputs[index]
            if value is not None:
                return value
        raise Unsupported(f"output {index} is missing")

    @property
    def dy(self) -> str:
        """The cotangent of the first output.

        Raises:
            Unsupported: the loss depends on other outputs only.
        """
        if self.cotangents[0] is None:
            raise Unsupported("the loss depends on outputs other than the first")
        return self.cotangents[0]

    def known(self, index: int) -> NDArray[Any]:
        """The elements of an input that must be constant.

        Raises:
            Unsupported: they are computed at run time.
        """
        value = self.x(index).constant
        if value is None:
            raise Unsupported(f"input {index} ('{self.x(index).name}') is not constant")
        return value

    # --- emitting

    def op(self, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Emit a node with one output; the output's name."""
        return self.tape.emit(op_type, inputs, 1, self._stem, domain, attributes)[0]

    def ops(self, op_type: str, *inputs: str, outputs: int, domain: str = "", **attributes: Any) -> list[str]:
        """Emit a node with several outputs; their names."""
        return self.tape.emit(op_type, inputs, outputs, self._stem, domain, attributes)

    def scalar(self, number: float, dtype: np.dtype[Any] | None = None) -> str:
        """A scalar constant, of the first input's type unless another is given."""
        return self.tape.constant(np.asarray(number, dtype or self.x().dtype))

    def ints(self, *numbers: int) -> str:
        """A one-dimensional int64 constant (axes, shapes, positions)."""
        return self.tape.constant(np.asarray(numbers, np.int64))

    def constant(self, array: NDArray[Any]) -> str:
        """A constant with these elements."""
        return self.tape.constant(array)

    def cast(self, name: str, dtype: np.dtype[Any]) -> str:
        """The value in another element type."""
        return self.op("Cast", name, to=int(helper.np_dtype_to_tensor_dtype(dtype)))

    def shape(self, value: Value) -> str:
        """The value's shape as an int64 value: a constant where it is known."""
        return self.op("Shape", value.name) if value.static is None else self.ints(*value.static)

    def reshape_like(self, name: str, value: Value) -> str:
        """The elements of `name` in the shape of `value`."""
        return self.op("Reshape", name, self.shape(value), allowzero=1)

    def zeros_like(self, value: Value) -> str:
        """Zeros of the value's shape and type."""
        zero = np.zeros(1, value.dtype)
        if value.dtype.name == "bfloat16":
            return self.op("Mul", value.name, self.constant(zero))
        tensor = TensorProto(data_type=helper.np_dtype_to_tensor_dtype(value.dtype), dims=[1], raw_data=zero.tobytes())
        return self.op("ConstantOfShape", self.shape(value), value=tensor)

    def sum_to(self, gradient: str, value: Value, result: Value | None = None) -> str:
        """Undo broadcasting: sum a gradient over the axes along which `value` was repeated.

        Args:
            gradient: shaped like the broadcast result.
            value: the operand whose gradient is wanted.
            result: what the gradient is shaped like; the node's first output unless given.
        """
        result = result or self.y()
        if value.shape is None or result.shape is None:
            return self._sum_at_run_time(gradient, value)
        if value.lengths == result.lengths and None not in value.lengths:
            return gradient
        lead = len(result.shape) - len(value.shape)
        pairs = list(enumerate(zip(result.lengths[lead:], value.lengths, strict=True), lead))
        if any(not isinstance(length, int) and (length is None or length != other) for _, (other, length) in pairs):
            return self._sum_at_run_time(gradient, value)
        repeated = [axis for axis, (a, b) in pairs if b == 1 and a != 1]
        total = gradient
        if repeated:
            total = self.op("ReduceSum", total, self.ints(*repeated), keepdims=1)
        return self.op("ReduceSum", total, self.ints(*range(lead)), keepdims=0) if lead else total

    def _sum_at_run_time(self, gradient: str, value: Value) -> str:
        """The same where lengths are known only then: sum over every axis on which the value, padded with ones in front, has one entry."""
        shape = self.op("Shape", value.name)
        missing = self.op("Sub", self.op("Size", self.op("Shape", gradient)), self.op("Size", shape))
        ones = self.op("Expand", self.ints(1), self.op("Reshape", missing, self.ints(1)))
        single = self.op("Equal", self.op("Concat", ones, shape, axis=0), self.ints(1))
        axes = self.op("Reshape", self.op("NonZero", single), self.ints(-1))
        total = self.op("ReduceSum", gradient, axes, keepdims=1, noop_with_empty_axes=1)
        return self.op("Reshape", total, shape, allowzero=1)

    @property
    def _stem(self) -> str:
        return f"grad.{next((name for name in self.node.output if name), self.node.op_type)}"


Gradients: TypeAlias = Mapping[int, str]
"""Names of emitted gradients by input position; an input left out has gradient zero."""

Rule: TypeAlias = Callable[[Call], Gradients]
"""Emits the gradients of a node's wanted inputs; raises `Unsupported` before it has emitted anything that matters."""

Rules: TypeAlias = Mapping[str, Rule]
"""Rules by operator type; "domain::type" outside the default domain."""
