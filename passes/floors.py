"""Clip what a Softmax reads, from below.

Before: Softmax(s). After: Softmax(Clip(s, floor)). Where floors are, and why, is decided in `scores.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from intaglio.ops.emit import fresh_name

from .graph import STANDARD, ValueIndex, all_names
from .model import Model
from .rewrite import OPTIONAL_INPUT_IR

REACH = 84.0
"""How far below the largest score a floor lies: e^-84 is 3e-37, still an ordinary float32 number."""


def with_floors(model: Model, floors: Mapping[str, float]) -> Model:
    """A copy of a model in which every Softmax of the main graph reads these values clipped; the model itself where there is none."""
    if not floors:
        return model
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    bounds, index = _Bounds(proto), ValueIndex(proto)
    nodes: list[NodeProto] = []
    clipped: dict[str, str] = {}
    for node in proto.graph.node:
        name = node.input[0] if is_softmax(node) else ""
        if name in floors and index.producer(name) is not None:
            if name not in clipped:
                clipped[name] = bounds.fresh(f"{name}_floored")
                nodes.append(helper.make_node("Clip", [name, bounds.add(f"{name}_floor", floors[name])], [clipped[name]]))
            node.input[0] = clipped[name]
        copy = NodeProto()
        copy.CopyFrom(node)
        nodes.append(copy)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return Model(proto, model.weights, model.path, model.size_bytes, model.sha256)


def with_ceilings(model: Model, floors: Mapping[str, float]) -> Model:
    """A copy of a model with these floors that clips from above too: for models of noise, whose scores may be far larger than real ones.

    With them a Softmax takes as long as it does on real scores.
    """
    if not floors:
        return model
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    bounds = _Bounds(proto)
    for node in proto.graph.node:
        if _is_floor(node, floors):
            node.input.append(bounds.add(f"{node.input[0]}_ceiling", floors[node.input[0]] + REACH))
    return Model(proto, model.weights, model.path, model.size_bytes, model.sha256)


def is_softmax(node: NodeProto) -> bool:
    """Whether a node is a Softmax of the default domain."""
    return node.domain in STANDARD and node.op_type == "Softmax"


def _is_floor(node: NodeProto, floors: Mapping[str, float]) -> bool:
    """Whether a node is a Clip that `with_floors` put in."""
    if node.domain not in STANDARD or node.op_type != "Clip" or len(node.input) != 2:
        return False
    return node.input[0] in floors and node.input[1].startswith(f"{node.input[0]}_floor")


class _Bounds:
    """Adds numbers to a main graph."""

    def __init__(self, proto: ModelProto) -> None:
        self._proto, self._taken = proto, all_names(proto)

    def add(self, name: str, value: float) -> str:
        """A float32 initializer of this value, and about this name."""
        name = self.fresh(name)
        self._proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        if self._proto.ir_version < OPTIONAL_INPUT_IR:
            self._proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
        return name

    def fresh(self, name: str) -> str:
        """The name, or one like it that is not taken."""
        return fresh_name(name, self._taken)
