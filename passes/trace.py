"""What is known about which factors values and constants can carry, while a model is labelled.

Every value gets *labels*: integers of the value's rank, each axis full or 1, that say which factor its entries carry. Labels that are
tied share one factor; frozen ones have the factor 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .graph import ValueIndex, constant_tensors
from .weights import is_external

_EXACT = (TensorProto.FLOAT, TensorProto.DOUBLE)
_SHAPE_ELEMENTS = 1 << 10
"""Constants up to this size may be shapes, so shape inference sees their values."""

Labels = NDArray[np.int64]
Shape = tuple[int, ...]
Dims = tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Operand:
    """A constant that takes factors where one node reads it: entries times s[times] over s[over].

    Attributes:
        tensor: the constant's name.
        node: the node.
        index: which of its inputs.
        view: shape in which the factors broadcast against the constant's entries.
        times: labels to multiply with, broadcasting to `view`; None for none.
        over: labels to divide by, likewise.
    """

    tensor: str
    node: NodeProto
    index: int
    view: Shape
    times: Labels | None
    over: Labels | None

    @property
    def sides(self) -> tuple[Labels | None, Labels | None]:
        """Both labels."""
        return self.times, self.over


@dataclass
class Trace:
    """Everything that is known of labels. Handlers of operators read and extend it.

    Attributes:
        constants: constants of the main graph, by name.
        overridable: those among them that callers may override.
        embedded: those that lie in a node, and stay there.
        shapes: of values, as far as inferred.
        layouts: labels of values, in the order of the graph.
        operands: constants that take factors.
        ties: pairs of equally shaped labels that share factors.
        frozen: labels whose factor is 1, with the reason.
        count: of labels so far.
    """

    constants: Mapping[str, TensorProto]
    overridable: frozenset[str]
    embedded: frozenset[str]
    shapes: Mapping[str, Dims]
    index: ValueIndex
    layouts: dict[str, Labels] = field(default_factory=dict)
    operands: list[Operand] = field(default_factory=list)
    ties: list[tuple[Labels, Labels]] = field(default_factory=list)
    frozen: list[tuple[Labels, str]] = field(default_factory=list)
    count: int = 0

    def fresh(self, *shape: int) -> Labels:
        """New labels."""
        size = int(np.prod(shape, dtype=np.int64))
        self.count += size
        return np.arange(self.count - size, self.count).reshape(shape)

    def stuck(self, reason: str, *shape: int) -> Labels:
        """New labels that are frozen."""
        labels = self.fresh(*shape)
        self.frozen.append((labels, reason))
        return labels

    def freeze(self, name: str, reason: str) -> None:
        """Freeze a value's labels, if it has any."""
        if name in self.layouts:
            self.frozen.append((self.layouts[name], reason))

    def rank(self, name: str) -> int | None:
        """Number of a value's axes."""
        if name in self.layouts:
            return self.layouts[name].ndim
        if name in self.constants:
            return len(self.constants[name].dims)
        return len(self.shapes[name]) if name in self.shapes else None

    def refusal(self, name: str) -> str | None:
        """None for a constant that could take factors, else why it cannot."""
        if name not in self.constants:
            return f"'{name}' is not a constant"
        if name in self.overridable:
            return f"callers may override '{name}'"
        tensor = self.constants[name]
        if tensor.data_type not in _EXACT:
            return f"'{name}' is {TensorProto.DataType.Name(tensor.data_type)}, which has too few exponents"
        return None

    def entering(self, name: str, axis: int, count: int) -> Labels:
        """(count,) labels of what a node reads along one axis; a value that cannot give them is frozen, and so are its stand-ins."""
        labels = self.layouts.get(name)
        if labels is not None and labels.shape[axis] == labels.size == count:
            return labels.reshape(count)
        self.freeze(name, "its channels are not those that its reader multiplies")
        return self.stuck(f"shares a weight with '{name}', which takes no factor", count)

    def integers(self, node: NodeProto, name: str, index: int) -> list[int] | None:
        """An integer list that is an attribute or, later, an input; None where it is neither, or not embedded."""
        attribute = next((a for a in node.attribute if a.name == name), None)
        if attribute is not None:
            return list(attribute.ints)
        name = node.input[index] if len(node.input) > index else ""
        tensor = self.constants.get(name)
        if tensor is None or not _is_small(tensor) or name in self.overridable:
            return None
        return [int(value) for value in numpy_helper.to_array(tensor).reshape(-1)]


Handler = Callable[[Trace, NodeProto], str | None]
"""Labels a node's outputs; a reason instead freezes all labels that the node reads."""


def known_shapes(proto: ModelProto) -> dict[str, Dims]:
    """Shapes of values, None for an axis that is not known; inferred from the graph's inputs alone, on a copy without large weights."""
    skeleton = ModelProto(ir_version=max(4, proto.ir_version), opset_import=proto.opset_import, functions=proto.functions)
    skeleton.graph.node.extend(node for node in proto.graph.node if not _holds_large(node))
    constants = constant_tensors(proto)
    skeleton.graph.input.extend(value for value in proto.graph.input if value.name not in constants)
    for name, tensor in constants.items():
        if _is_small(tensor):
            if all(name not in node.output for node in skeleton.graph.node):
                skeleton.graph.initializer.append(tensor)
        else:
            skeleton.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    graph = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    return {value.name: _dims(value) for value in (*graph.input, *graph.value_info) if value.type.tensor_type.HasField("shape")}


def _is_small(tensor: TensorProto) -> bool:
    return not is_external(tensor) and int(np.prod(tensor.dims, dtype=np.int64)) <= _SHAPE_ELEMENTS


def _holds_large(node: NodeProto) -> bool:
    return node.op_type == "Constant" and any(a.name == "value" and not _is_small(a.t) for a in node.attribute)


def _dims(value: onnx.ValueInfoProto) -> Dims:
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim)
