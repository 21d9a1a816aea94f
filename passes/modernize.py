"""Bring a working copy of a model into the form that reverse rules are written for.

Before: any model that loads. After: the same function of the same inputs, at opset 18 or newer, without model-local functions, without
`If` nodes whose condition is constant, and without initializers among the inputs where the IR version (below 4) made them so. Names of
inputs, outputs, initializers and of the values between are kept.

Large weights take no part: the version converter, the inliner and shape inference serialize what they are given, so they see an input in
place of each weight, and `restored` puts the weights back.

Must not fire on: an `If` whose condition is only known at run time; functions of a model that calls none lose nothing but their text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, inliner, numpy_helper, version_converter

from intaglio.ops.vjp import MIN_OPSET, Names

from .errors import InputError
from .graph import STANDARD, all_names, captures, defined_names, nested_graphs, output_names
from .session import array_bytes, copy_fields
from .sites import opset
from .weights import WeightStore, is_external

SMALL_BYTES = 1 << 16
"""Tensors up to this size stay in the working copy: shapes, axes, scales."""

_IR = 8  # the oldest IR version in which opset 18 and initializers that are no inputs may stand
_MESSAGE_LIMIT = 300  # characters of onnx's own words in an error
_COPIES = frozenset({"Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape"})  # between a condition and the constant it comes from


@dataclass(frozen=True)
class Working:
    """A model to work on, and the weights that it lacks.

    Attributes:
        proto: the model; every tensor of `heavy` is an input of it, after the inputs of the model proper.
        heavy: name → initializer of the original model that is large or external.
        sparse: name → sparse initializer of the original model.
    """

    proto: ModelProto
    heavy: Mapping[str, TensorProto]
    sparse: Mapping[str, onnx.SparseTensorProto]

    def restored(self) -> ModelProto:
        """The model with its weights in place of the inputs that stand for them."""
        model = ModelProto()
        model.CopyFrom(self.proto)
        kept = [value for value in model.graph.input if value.name not in self.heavy and value.name not in self.sparse]
        del model.graph.input[:]
        model.graph.input.extend(kept)
        model.graph.initializer.extend(self.heavy.values())
        model.graph.sparse_initializer.extend(self.sparse.values())
        return model


def modernize(proto: ModelProto, weights: WeightStore | None = None) -> Working:
    """Make the working copy.

    Args:
        proto: the model; not changed.
        weights: reads small tensors with external data, so that rules see them; without it they count as large.

    Raises:
        InputError: onnx cannot convert the model to opset 18, or cannot inline its functions.
    """
    working = _without_weights(proto, weights)
    model = working.proto
    if model.functions:
        model = _inlined(model)
    _fold_branches(model)
    if opset(model) < MIN_OPSET:
        model = _converted(model)
    model.ir_version = max(model.ir_version, _IR)
    return Working(model, working.heavy, working.sparse)


# --- weights


def _without_weights(proto: ModelProto, weights: WeightStore | None) -> Working:
    """A copy in which inputs stand for weights that are large or that nobody can read here."""
    model = ModelProto()
    copy_fields(proto, model, ("graph", "training_info"))
    copy_fields(proto.graph, model.graph, ("initializer", "sparse_initializer"))
    heavy: dict[str, TensorProto] = {}
    for tensor in proto.graph.initializer:
        if _is_heavy(tensor, weights):
            heavy[tensor.name] = tensor
        elif is_external(tensor) and weights is not None:
            model.graph.initializer.append(numpy_helper.from_array(weights.read(tensor), tensor.name))
        else:
            model.graph.initializer.append(tensor)
    sparse = {tensor.values.name: tensor for tensor in proto.graph.sparse_initializer}
    if proto.ir_version < 4:  # there every initializer is an input too
        names = {tensor.name for tensor in proto.graph.initializer} | set(sparse)
        kept = [value for value in model.graph.input if value.name not in names]
        del model.graph.input[:]
        model.graph.input.extend(kept)
        model.ir_version = _IR
    listed = {value.name for value in model.graph.input}
    for tensor in heavy.values():
        if tensor.name not in listed:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    for name, entry in sparse.items():
        if name not in listed:
            model.graph.input.append(helper.make_tensor_value_info(name, entry.values.data_type, list(entry.dims)))
    return Working(model, heavy, sparse)


def _is_heavy(tensor: TensorProto, weights: WeightStore | None) -> bool:
    if is_external(tensor) and weights is None:
        return True
    return tensor.data_type != TensorProto.STRING and array_bytes(tensor.data_type, tensor.dims) > SMALL_BYTES


# --- functions and versions


def _inlined(model: ModelProto) -> ModelProto:
    """The model with the bodies of its functions in place of the calls."""
    try:
        found: ModelProto = inliner.inline_local_functions(model, convert_version=True)
    except Exception as error:  # what onnx's C++ throws has no common type
        raise InputError(f"the model's functions cannot be inlined: {_words(error)}; export the model without functions") from error
    return found


def _converted(model: ModelProto) -> ModelProto:
    """The model at the oldest opset that rules emit for. Only the graph and its opset come from the converter: it drops metadata."""
    old = opset(model)
    try:
        found = version_converter.convert_version(model, MIN_OPSET)
    except Exception as error:  # what onnx's C++ throws has no common type
        raise InputError(
            f"opset {old}, expected {MIN_OPSET} or newer, and onnx cannot convert the model: {_words(error)}; "
            f"export it for opset {MIN_OPSET}"
        ) from error
    result = ModelProto()
    result.CopyFrom(model)
    result.graph.CopyFrom(found.graph)
    del result.opset_import[:]
    result.opset_import.extend(found.opset_import)
    return result


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:_MESSAGE_LIMIT]


# --- constant conditions


def _fold_branches(model: ModelProto) -> None:
    """Put the branch that runs in place of every `If` of the main graph whose condition is constant."""
    graph = model.graph
    names = Names(all_names(model))
    while True:
        constants = _scalars(graph)
        for position, node in enumerate(graph.node):
            if node.op_type == "If" and node.domain in STANDARD and node.input[0] in constants:
                branch = _branch(node, constants[node.input[0]])
                nodes = _spliced(node, branch, names)
                graph.initializer.extend(branch.initializer)
                _replace(graph, position, nodes)
                break
        else:
            return


def _scalars(graph: GraphProto) -> dict[str, bool]:
    """Truth of the one-element values that are constant, through `Not` and what copies."""
    overridable = {value.name for value in graph.input}
    found: dict[str, bool] = {}
    for tensor in graph.initializer:
        if tensor.name not in overridable and tensor.data_type == TensorProto.BOOL and not is_external(tensor):
            array = numpy_helper.to_array(tensor)
            if array.size == 1:
                found[tensor.name] = bool(array.item())
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].type == AttributeProto.TENSOR:
            array = numpy_helper.to_array(node.attribute[0].t)
            if array.size == 1 and array.dtype.kind in "biu":
                found[node.output[0]] = bool(array.item())
        elif node.input and node.input[0] in found and (node.op_type in _COPIES or node.op_type == "Not"):
            found[node.output[0]] = found[node.input[0]] != (node.op_type == "Not")
    return found


def _branch(node: NodeProto, condition: bool) -> GraphProto:
    wanted = "then_branch" if condition else "else_branch"
    return next(graph for label, graph in nested_graphs(node) if label == wanted)


def _spliced(node: NodeProto, branch: GraphProto, names: Names) -> list[NodeProto]:
    """The branch's nodes for the graph around it: its names made new, its outputs called as the node's. Renames the initializers."""
    renamed = {name: names.fresh(f"{node.output[0]}.{name}") for name in sorted(defined_names(branch))}
    for tensor in branch.initializer:
        tensor.name = renamed[tensor.name]
    nodes = []
    for inner in branch.node:
        copy = NodeProto()
        copy.CopyFrom(inner)
        rename(copy, renamed)
        nodes.append(copy)
    for source, target in zip(output_names(branch), node.output, strict=True):
        if target:
            nodes.append(helper.make_node("Identity", [renamed.get(source, source)], [target]))
    return nodes


def _replace(graph: GraphProto, position: int, nodes: Iterable[NodeProto]) -> None:
    after = list(graph.node)
    del graph.node[:]
    graph.node.extend([*after[:position], *nodes, *after[position + 1 :]])


def rename(node: NodeProto, renamed: Mapping[str, str]) -> None:
    """Give values other names where a node reads or makes them, what its nested graphs capture included."""
    for names in (node.input, node.output):
        for index, name in enumerate(names):
            names[index] = renamed.get(name, name)
    for _, graph in nested_graphs(node):
        outer = {old: new for old, new in renamed.items() if old in captures(graph)}
        for inner in graph.node:
            rename(inner, outer)
        for value in graph.output:
            value.name = outer.get(value.name, value.name)
