"""Clean a graph before anyone looks for weights in it: constants folded, BatchNorm folded into Conv, dead code removed.

Before: the graph as exported. After: the same function, with fewer nodes and no more bytes.

Dead code is removed here. The rest is ONNX Runtime's own offline optimisation at its basic level, which does not depend on the
machine. What it loses (metadata, doc strings, opset imports, references to external data) is put back, and so is what it
expands because its CPU provider has no kernel: calls of model-local functions, function operators, fp16 and bf16 arithmetic.

ONNX Runtime's graph is not taken when
- it has as many nodes, or more bytes (a shared weight copied, a large constant computed ahead),
- it needs operators outside the standard that were not there, or has fewer QuantizeLinear or DequantizeLinear nodes,
- the checker, which accepted the original, refuses it, or its outputs differ on a random feed,
and it is not asked at all when it cannot load the model, when the model exceeds `LIMIT_BYTES`, or when training information
or quantization annotations refer to values by name.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

from .errors import InputError
from .graph import (
    Body,
    ValueIndex,
    all_names,
    defined_names,
    initializer_names,
    live,
    nested_graphs,
    output_names,
    reads,
    scopes,
    topological,
)
from .model import Model
from .session import CPU, Session, open_session, to_array, to_value
from .weights import WeightStore, is_external, tensors

Array: TypeAlias = npt.NDArray[Any]
Described: TypeAlias = NodeProto | GraphProto
T = TypeVar("T")

LIMIT_BYTES = 1 << 28
"""Larger models are not given to ONNX Runtime, which holds them in memory several times while it optimises."""

_SHAPE_BYTES = 4 << 10
"""Largest constant computed ahead once larger ones made the file grow: enough for shapes and the like."""

_TIED_BYTES = 1 << 10
"""Matrices from this size on that have several readers are hidden from folding, which would give each reader its own copy."""

_EXPANSIONS = ("_inlfunc_", "InsertedPrecisionFreeCast_")
"""How ONNX Runtime starts the names of values in expanded functions, and of those that it cast to fp32."""

_FEED_SIZES = (2, 16, 64)
"""Sizes of dynamic axes to try, in this order, until the original accepts a random feed."""

_FEED_ELEMENTS = 1 << 26
"""An input larger than this is not made up for a comparison."""


_FLOATS = frozenset((TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16))


@dataclass(frozen=True)
class Report:
    """What `canonicalize` did.

    Attributes:
        changed: whether the graph differs from the one given.
        reason: how it was simplified, or why it was not.
        nodes_before, nodes_after: nodes in all scopes.
        bytes_before, bytes_after: the serialized model plus the external data it refers to.
    """

    changed: bool
    reason: str
    nodes_before: int
    nodes_after: int
    bytes_before: int
    bytes_after: int


def canonicalize(model: Model) -> tuple[Model, Report]:
    """Simplify a model without changing what it computes, what it is called, or anything that only describes it.

    The same input gives the same bytes. The model given is not changed; it is returned itself if there is nothing to do.

    Raises:
        InputError: a weight cannot be read.
    """
    clean = remove_dead(model.proto)
    outcome = _simplified(clean, model.weights)
    proto, reason = (clean, outcome) if isinstance(outcome, str) else (outcome, "simplified by ONNX Runtime")
    report = Report(
        changed=proto.ByteSize() != model.proto.ByteSize() or _node_count(proto) != _node_count(model.proto),
        reason=reason,
        nodes_before=_node_count(model.proto),
        nodes_after=_node_count(proto),
        bytes_before=_size_bytes(model.proto, model.weights),
        bytes_after=_size_bytes(proto, model.weights),
    )
    return (replace(model, proto=proto) if report.changed else model), report


def remove_dead(proto: ModelProto) -> ModelProto:
    """A copy without the nodes, initializers and value_info entries, in any scope, that no output depends on.

    Inputs stay. An initializer that is also an input stays with it (a default that users may override), except up to IR
    version 3, where every initializer has to be listed as an input: there the two go together. Nodes without outputs stay with
    all they read, functions stay even when nobody calls them, and a model with training information stays as it is, because
    that refers to values by name.
    """
    result = ModelProto()
    result.CopyFrom(proto)
    if result.training_info:
        return result
    graph = result.graph
    if result.ir_version < 4:
        initialized = initializer_names(graph)
        _trim(graph, roots=set())
        lost = initialized - initializer_names(graph)
        _keep(graph.input, [value.name not in lost for value in graph.input])
    else:
        _trim(graph, roots={value.name for value in graph.input})
    for function in result.functions:
        _trim(function, roots=set())
    return result


def _trim(body: Body, roots: set[str]) -> None:
    """Remove from `body` and the graphs nested in it what neither its outputs nor `roots` depend on."""
    for node in body.node:
        for _, nested in nested_graphs(node):
            _trim(nested, roots={value.name for value in nested.input})
    silent = [node for node in body.node if not any(node.output)]
    wanted = {*output_names(body), *roots}.union(*(reads(node) for node in silent))
    if isinstance(body, GraphProto):
        wanted.update(entry.value for note in body.quantization_annotation for entry in note.quant_parameter_tensor_names)
    positions, needed = live(body, wanted)
    _keep(body.node, [position in positions or not any(node.output) for position, node in enumerate(body.node)])
    if isinstance(body, GraphProto):
        _keep(body.initializer, [tensor.name in needed for tensor in body.initializer])
        _keep(body.sparse_initializer, [tensor.values.name in needed for tensor in body.sparse_initializer])
    defined = defined_names(body)
    _keep(body.value_info, [value.name in defined for value in body.value_info])


def _keep(field: MutableSequence[T], wanted: Sequence[bool]) -> None:
    """Delete from a repeated field, in place, so that the weights that stay are not copied."""
    for position in reversed(range(len(wanted))):
        if not wanted[position]:
            del field[position]


def _simplified(proto: ModelProto, store: WeightStore) -> ModelProto | str:
    """`proto` as ONNX Runtime simplifies it, or why that is not to be had."""
    if proto.training_info or proto.graph.quantization_annotation:
        return "training information or quantization annotations refer to values by name"
    size_bytes = _size_bytes(proto, store)
    if size_bytes > LIMIT_BYTES:
        return f"{size_bytes} bytes are more than the {LIMIT_BYTES} that are simplified in memory"
    source = remove_dead(_without_identities(proto))
    visible = _without_tied(_embedded(source, store))
    growth_bytes = 0
    for fold_limit_bytes in (size_bytes, min(size_bytes, _SHAPE_BYTES)):  # a constant above the model's size never pays
        optimized = _optimized_offline(visible, fold_limit_bytes)
        if isinstance(optimized, str):
            return optimized
        candidate = _restored(source, optimized, store)
        if _node_count(candidate) >= _node_count(proto):
            return "nothing to simplify"
        growth_bytes = _size_bytes(candidate, store) - size_bytes
        if growth_bytes <= 0:
            return _objection(proto, candidate, store) or candidate
    return f"ONNX Runtime's graph is {growth_bytes} bytes larger"


def _without_identities(proto: ModelProto) -> ModelProto:
    """A copy in which nothing outside functions reads the output of an Identity, so that none is put back with other nodes."""
    result = ModelProto()
    result.CopyFrom(proto)
    index = ValueIndex(result)
    for scope in scopes(result):
        for node in scope.body.node:
            if node.op_type == "Identity" and not node.domain and isinstance(scope.body, GraphProto):
                for use in index.uses(node.output[0], scope):
                    use.node.input[use.index] = node.input[0]
    return result


def _without_tied(proto: ModelProto) -> ModelProto:
    """A copy in which matrices with several readers are plain inputs, so that nothing is computed from them ahead."""
    index = ValueIndex(proto)
    listed = {value.name for value in proto.graph.input}
    outputs = set(output_names(proto.graph))
    result = ModelProto()
    result.CopyFrom(proto)
    tied = [
        len(tensor.dims) >= 2
        and len(tensor.raw_data) >= _TIED_BYTES
        and tensor.name not in outputs
        and (tensor.name not in listed or proto.ir_version < 4)
        and len(index.uses(tensor.name)) > 1
        for tensor in proto.graph.initializer
    ]
    for tensor, hidden in zip(proto.graph.initializer, tied, strict=True):
        if hidden and tensor.name not in listed:
            result.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    _keep(result.graph.initializer, [not hidden for hidden in tied])
    return result


def _optimized_offline(proto: ModelProto, fold_limit_bytes: int) -> ModelProto | str:
    """What ONNX Runtime's basic optimisation makes of a model without external data, or its words if it cannot load it."""
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.disable_qdq_constant_folding", "1")
    options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(fold_limit_bytes))
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
        try:
            ort.InferenceSession(proto.SerializeToString(), options, providers=[CPU])
        except (
            ort_errors.Fail,
            ort_errors.InvalidArgument,
            ort_errors.InvalidGraph,
            ort_errors.InvalidProtobuf,
            ort_errors.NotImplemented,
            ort_errors.RuntimeException,
        ) as error:
            words = " ".join(str(error).split()).split(" : ", 3)[-1]  # after "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : "
            return f"ONNX Runtime cannot load it: {words}"
        return onnx.load(options.optimized_model_filepath)


def _restored(proto: ModelProto, optimized: ModelProto, store: WeightStore) -> ModelProto:
    """The nodes of `optimized` in everything else that `proto` has."""
    result = ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    nodes = _compact(proto, optimized.graph)
    del graph.node[:]
    graph.node.extend(nodes)

    computed = {tensor.name: tensor for tensor in optimized.graph.initializer}
    for tensor in graph.initializer:
        replacement = computed.pop(tensor.name, None)
        if replacement is not None and not _equal(tensor, replacement, store):
            tensor.CopyFrom(replacement)
    new = [computed[name] for name in sorted(computed)]
    graph.initializer.extend(new)
    if result.ir_version < 4:
        graph.input.extend(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in new)
    sparse = initializer_names(graph)
    graph.sparse_initializer.extend(tensor for tensor in optimized.graph.sparse_initializer if tensor.values.name not in sparse)

    imported = {entry.domain for entry in result.opset_import}
    used = {node.domain for scope in scopes(result) for node in scope.body.node}
    result.opset_import.extend(entry for entry in optimized.opset_import if entry.domain in used - imported)
    _inherit_descriptions(proto, result)
    return remove_dead(result)


def _compact(proto: ModelProto, optimized: GraphProto) -> list[NodeProto]:
    """The nodes of `optimized`, with the nodes of `proto` in place of what ONNX Runtime expanded them to.

    A value keeps its meaning as long as it keeps its name, so the nodes that computed a lost value can compute it again.
    """
    known = all_names(proto)
    functions = {(function.domain, function.name) for function in proto.functions}
    producers = {name: node for node in proto.graph.node for name in node.output if name}
    called = {name for name, node in producers.items() if (node.domain, node.op_type) in functions}

    def expanded(node: NodeProto) -> bool:
        if called.intersection(node.output):
            return (node.domain, node.op_type) not in functions
        return any(name.startswith(_EXPANSIONS) and name not in known for name in _mentioned(node))

    nodes = [node for node in optimized.node if not expanded(node)]
    defined = {value.name for value in optimized.input} | initializer_names(optimized)
    defined.update(name for node in nodes for name in node.output)
    pending = [*output_names(optimized), *(name for node in nodes for name in sorted(reads(node)))]
    while pending:
        name = pending.pop()
        if name not in defined and name in producers:
            node = producers[name]
            nodes.append(node)
            defined.update(node.output)
            pending.extend(sorted(reads(node)))
    return topological(nodes)


def _mentioned(node: NodeProto) -> Iterator[str]:
    """Every value name in a node, those inside its nested graphs included."""
    yield from node.input
    yield from node.output
    for _, graph in nested_graphs(node):
        for inner in graph.node:
            yield from _mentioned(inner)


def _equal(one: TensorProto, other: TensorProto, store: WeightStore) -> bool:
    if one.data_type != other.data_type or one.dims != other.dims:
        return False
    if one.data_type == TensorProto.STRING:
        return bool(one.string_data == other.string_data)
    return bool(np.array_equal(store.payload(one), store.payload(other)))


def _inherit_descriptions(proto: ModelProto, result: ModelProto) -> None:
    """Give each node in `result` what ONNX Runtime drops from its origin, and take away what it adds.

    Doc string and metadata come back; attributes that only state the default and were not written before go. The same for the
    nested graphs; value_info is left only where there was some.
    """
    origins: defaultdict[tuple[str, str], list[NodeProto]] = defaultdict(list)
    for scope in scopes(proto):
        for node in scope.body.node:
            for label in {node.name, *node.output} - {""}:
                origins[node.op_type, label].append(node)
    versions = {entry.domain: entry.version for entry in result.opset_import}
    typed = {value.name for scope in scopes(proto) for value in scope.body.value_info}

    for scope in scopes(result):
        _keep(scope.body.value_info, [value.name in typed for value in scope.body.value_info])
        if isinstance(scope.body, FunctionProto):
            continue
        for node in scope.body.node:
            origin = _only_origin(origins, node)
            for field in ("name", "domain", "doc_string", "overload"):
                if not getattr(node, field):
                    node.ClearField(field)
            if origin is not None:
                _describe(node, origin)
            written = {attribute.name for attribute in origin.attribute} if origin is not None else set()
            defaults = _defaults(node, versions)
            _keep(
                node.attribute,
                [attribute.name in written or not _same_value(attribute, defaults.get(attribute.name)) for attribute in node.attribute],
            )
            if origin is not None:
                graphs = dict(nested_graphs(origin))
                for label, graph in nested_graphs(node):
                    _describe(graph, graphs[label])


def _describe(target: Described, source: Described) -> None:
    target.ClearField("doc_string")
    if source.HasField("doc_string"):
        target.doc_string = source.doc_string
    target.ClearField("metadata_props")
    target.metadata_props.extend(source.metadata_props)


def _only_origin(origins: Mapping[tuple[str, str], list[NodeProto]], node: NodeProto) -> NodeProto | None:
    for label in (node.name, *node.output):
        found = origins.get((node.op_type, label), [])
        if len(found) == 1:
            return found[0]
    return None


def _defaults(node: NodeProto, versions: Mapping[str, int]) -> dict[str, AttributeProto]:
    version = versions.get(node.domain, 0)
    if not version or not onnx.defs.has(node.op_type, max_inclusive_version=version, domain=node.domain):
        return {}
    schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    return {name: attribute.default_value for name, attribute in schema.attributes.items() if attribute.default_value.type}


def _same_value(attribute: AttributeProto, default: AttributeProto | None) -> bool:
    return (
        default is not None
        and attribute.type == default.type
        and bool(onnx.helper.get_attribute_value(attribute) == onnx.helper.get_attribute_value(default))
    )


def _objection(proto: ModelProto, candidate: ModelProto, store: WeightStore) -> str | None:
    """Why `candidate` may not replace `proto`; None if it may."""
    before, after = _operators(proto), _operators(candidate)
    domains = {domain for domain, _ in before} | {"", "ai.onnx"}
    foreign = sorted({f"{domain}::{op_type}" for domain, op_type in after if domain not in domains})
    if foreign:
        return f"ONNX Runtime's graph needs {', '.join(foreign)}"
    for op_type in ("QuantizeLinear", "DequantizeLinear"):
        if after["", op_type] < before["", op_type]:
            return f"ONNX Runtime's graph has {after['', op_type]} of {before['', op_type]} {op_type} nodes"
    complaint = _complaint(_embedded(candidate, store))
    if complaint and not _complaint(_embedded(proto, store)):
        return f"the checker refuses ONNX Runtime's graph: {complaint}"
    return _difference(proto, candidate, store)


def _operators(proto: ModelProto) -> Counter[tuple[str, str]]:
    return Counter((node.domain, node.op_type) for scope in scopes(proto) for node in scope.body.node)


def _complaint(proto: ModelProto) -> str:
    """The first words of the checker against a model, "" if it has none."""
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return str(error).strip().splitlines()[0]
    return ""


def _difference(proto: ModelProto, candidate: ModelProto, store: WeightStore) -> str | None:
    """How the outputs differ on a random feed; None if they agree, or if no feed can decide it."""
    if any(op_type == "Loop" for _, op_type in _operators(proto)):
        return None  # on made-up data it may run for ever
    try:
        original = open_session(proto, weights=store, optimize=False)
        simplified = open_session(candidate, weights=store, optimize=False)
    except InputError as error:
        return str(error)
    for size in _FEED_SIZES:
        feed = _random_feed(proto.graph, size)
        if feed is None:
            return None
        expected = _run(original, feed)
        if expected is None:
            continue
        if _agree(expected, _run(simplified, feed)) or not _agree(expected, _run(original, feed)):
            return None  # equal, or random in itself
        return f"the outputs of ONNX Runtime's graph differ on random inputs with dynamic axes of {size}"
    return None


def _random_feed(graph: GraphProto, size: int) -> dict[str, Array] | None:
    """Made-up inputs: standard normal floats, zeros and ones otherwise. None if an input is no plain tensor, or too large."""
    generator = np.random.default_rng(0)
    initialized = initializer_names(graph)
    feed: dict[str, Array] = {}
    for value in graph.input:
        if value.name in initialized:
            continue
        tensor_type = value.type.tensor_type
        if not tensor_type.HasField("shape") or tensor_type.elem_type == TensorProto.STRING:
            return None
        shape = [dim.dim_value if dim.HasField("dim_value") else size for dim in tensor_type.shape.dim]
        if math.prod(shape) > _FEED_ELEMENTS:
            return None
        floating = tensor_type.elem_type in _FLOATS
        numbers = generator.standard_normal(shape, np.float32) if floating else generator.integers(0, 2, shape)
        feed[value.name] = np.asarray(numbers).astype(onnx.helper.tensor_dtype_to_np_dtype(tensor_type.elem_type))
    return feed


def _run(session: Session, feed: Mapping[str, Array]) -> list[Array] | None:
    """The outputs, or None if the session refuses the feed or gives something that is no array."""
    try:
        values = {name: to_value(array) for name, array in feed.items()}
        return [to_array(value) for value in session.run(session.outputs, values)]
    except InputError:
        return None


def _agree(expected: Sequence[Array], actual: Sequence[Array] | None) -> bool:
    return actual is not None and all(_close(one, other) for one, other in zip(expected, actual, strict=True))


def _close(expected: Array, actual: Array) -> bool:
    """Equal, but for rounding in another order: about 1e-6 of the norm in fp32, 1e-3 in half precision, times some depth."""
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return False
    if onnx.helper.np_dtype_to_tensor_dtype(expected.dtype) not in _FLOATS:
        return bool(np.array_equal(expected, actual))
    tolerance = 1e-4 if expected.dtype.itemsize >= 4 else 2e-2
    one, other = expected.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(one)
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
        return False
    return bool(np.linalg.norm(one[finite] - other[finite]) <= tolerance * np.linalg.norm(one[finite]))


def _embedded(proto: ModelProto, store: WeightStore) -> ModelProto:
    """A copy with all external data inside."""
    result = ModelProto()
    result.CopyFrom(proto)
    for tensor in tensors(result):
        if is_external(tensor):
            payload = store.payload(tensor).tobytes()
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = payload
    return result


def _size_bytes(proto: ModelProto, store: WeightStore) -> int:
    size_bytes: int = proto.ByteSize()
    return size_bytes + sum(store.nbytes(tensor) for tensor in tensors(proto) if is_external(tensor))


def _node_count(proto: ModelProto) -> int:
    return sum(len(scope.body.node) for scope in scopes(proto))
