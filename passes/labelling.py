"""Label all values of a model by the factors that they can carry: where channels can be rescaled.

Operators hand labels on (`Relu`, pools, `Reshape`, `Concat`, ...; `passes.homogeneous`), tie labels to each other (`Add` of two values, and
so residual streams; a weight with two uses), start new ones (whatever has constants that can take a factor; `passes.rescalable`), or
freeze them at 1.
"""

from __future__ import annotations

from collections import defaultdict

from onnx import NodeProto

from .graph import MAIN, STANDARD, ValueIndex, constant_tensors, output_names, reads, topological
from .homogeneous import HOMOGENEOUS
from .model import Model
from .rescalable import RESCALABLE
from .trace import Handler, Operand, Trace, known_shapes

_HANDLERS: dict[str, Handler] = HOMOGENEOUS | RESCALABLE


def labelled(model: Model) -> Trace:
    """Label all values of the main graph."""
    graph = model.proto.graph
    overridable = frozenset(value.name for value in graph.input) if model.proto.ir_version >= 4 else frozenset[str]()
    constants = constant_tensors(model.proto)
    embedded = frozenset(constants) - {tensor.name for tensor in graph.initializer}
    trace = Trace(constants, overridable, embedded, known_shapes(model.proto), ValueIndex(model.proto))
    local = {(function.domain, function.name) for function in model.proto.functions}
    for node in topological(graph.node):
        standard = node.domain in STANDARD and (node.domain, node.op_type) not in local
        reason = _HANDLERS.get(node.op_type if standard else "", _refuse)(trace, node)
        if reason is not None:
            for name in sorted(reads(node)):
                trace.freeze(name, reason)
    for name in output_names(graph):
        trace.freeze(name, f"'{name}' is an output of the graph")
    if model.proto.training_info or graph.quantization_annotation:
        for name in trace.layouts:
            trace.freeze(name, "training information or quantization annotations refer to values by name")
    _tie_shared(trace, set(output_names(graph)))
    return trace


def _tie_shared(trace: Trace, outputs: set[str]) -> None:
    """Tie the labels of all uses of a constant, or freeze them where some use cannot take the same factors."""
    shared: defaultdict[str, list[Operand]] = defaultdict(list)
    for operand in trace.operands:
        shared[operand.tensor].append(operand)
    for name, operands in shared.items():
        known = {(*operand.node.output, operand.index) for operand in operands}
        unknown = [use for use in trace.index.uses(name) if use.scope.path != MAIN or (*use.node.output, use.index) not in known]
        signatures = {(operand.view, *(None if side is None else side.shape for side in operand.sides)) for operand in operands}
        if name in outputs or unknown or len(signatures) > 1:
            what = "an output of the graph" if name in outputs else f"read by {unknown[0].node.op_type}" if unknown else "read in two ways"
            trace.frozen += [(side, f"'{name}' is also {what}") for operand in operands for side in operand.sides if side is not None]
            continue
        for operand in operands[1:]:
            pairs = zip(operands[0].sides, operand.sides, strict=True)
            trace.ties += [(one, other) for one, other in pairs if one is not None and other is not None]


def _refuse(trace: Trace, node: NodeProto) -> str | None:
    """An operator that is not positively homogeneous, or not known to be."""
    return f"read by {node.op_type}"
