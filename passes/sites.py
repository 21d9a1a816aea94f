"""Find the sites: every weight value of a model with all of its uses.

A site is a constant float value (the *anchor*) that operators of a known family read, directly or through Identity, Cast, Transpose,
Reshape, Squeeze, Unsqueeze or Flatten of constants. The anchor is an initializer or a `Constant` node where that is float already, and
the output of `DequantizeLinear` or `Cast` where the stored tensor holds integers. Identity is the object: a tied weight is one site with
several uses. Nested graphs are searched; weights inside model-local functions are listed as skipped.

Must not fire on: vectors (biases, norms), weights of fewer than `MIN_ELEMENTS` entries, initializers that a caller may override, values
that are graph outputs, and weights whose activations are themselves dequantized (they run in integer kernels already).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from intaglio.ops.emit import FLOAT_TYPES, onnx_type
from intaglio.ops.families import FAMILIES, Use

from .graph import MAIN, STANDARD, Scope, ValueIndex, output_names, scopes
from .model import Model
from .session import open_session, to_array, to_value

MIN_ELEMENTS = 256
"""Smaller weights cost less than the nodes that would rebuild them."""

_IR = 4  # of one-node models: the oldest that takes inputs alone
_INTEGERS = frozenset(
    (
        TensorProto.INT4,
        TensorProto.UINT4,
        TensorProto.INT8,
        TensorProto.UINT8,
        TensorProto.INT16,
        TensorProto.UINT16,
        TensorProto.INT32,
    )
)
_WHOLE_BYTES = {"int4": np.dtype(np.int8), "uint4": np.dtype(np.uint8)}
_WIDENING = ("DequantizeLinear", "Cast")
_CHAIN = ("Identity", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten")


@dataclass(frozen=True, eq=False)
class SiteUse:
    """One operator that reads the weight.

    Attributes:
        use: node, input index and matrix view of the value that arrives there.
        scope: path of the node's scope.
        dtype: of the value that arrives there, which a Cast may have changed.
        order: as in `Site`, for this use.
    """

    use: Use
    scope: str
    dtype: np.dtype[np.generic]
    order: NDArray[np.int64] | None


@dataclass(frozen=True, eq=False)
class Site:
    """A weight and everything that reads it.

    Attributes:
        name: unique among the model's sites: the anchor's name, with its scope where that is not the main graph.
        anchor: the value's name.
        scope: path of the scope that defines it.
        shape: of the anchor.
        dtype: of the anchor.
        uses: at least one.
        sources: the stored tensors behind the anchor.
        widening: the DequantizeLinear or Cast node that makes the anchor; None where a tensor is the anchor.
        order: flat positions of the anchor's entries in the order in which the first use sees them; None where that is the same order.
        opset: version of the model's default domain.
    """

    name: str
    anchor: str
    scope: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    uses: tuple[SiteUse, ...]
    sources: tuple[TensorProto, ...]
    widening: NodeProto | None
    order: NDArray[np.int64] | None
    opset: int

    @property
    def op_type(self) -> str:
        """Operator of the first use."""
        return self.uses[0].use.node.op_type

    @property
    def use(self) -> Use:
        """The first use: the one that decompositions are made for."""
        return self.uses[0].use

    @property
    def elements(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape, dtype=np.int64))

    def value(self, model: Model) -> NDArray[np.generic]:
        """The anchor's array, read now and not kept."""
        arrays = [model.weights.read(tensor) for tensor in self.sources]
        return arrays[0] if self.widening is None else evaluate(self.widening, arrays, opset(model.proto))

    def matrix(self, value: NDArray[np.generic]) -> NDArray[np.float64]:
        """An array of the anchor's shape as the first use sees it: (groups, m, n) float64."""
        if self.order is not None:
            value = np.asarray(value).reshape(-1)[self.order].reshape(self.use.view.shape)
        return self.use.view.matrix(value)

    def stored_float64(self, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
        """The inverse of `matrix`: an array of the anchor's shape."""
        stored = self.use.view.stored(matrix)
        if self.order is None:
            return stored
        flat = np.empty(self.elements)
        flat[self.order] = stored.reshape(-1)
        return flat.reshape(self.shape)

    def stored(self, matrix: NDArray[np.float64]) -> NDArray[np.generic]:
        """The inverse of `matrix`, in the anchor's type."""
        return self.stored_float64(matrix).astype(self.dtype)


@dataclass(frozen=True)
class Skip:
    """A weight that no form can take, with the reason."""

    name: str
    reason: str
    op_type: str = ""
    shape: tuple[int, ...] = ()
    size_bytes: int = 0


@dataclass(frozen=True, eq=False)
class Sites:
    """What `find_sites` found, in the order in which the graph runs."""

    sites: tuple[Site, ...]
    skipped: tuple[Skip, ...]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


@dataclass
class _Anchor:
    scope: Scope
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    sources: tuple[TensorProto, ...]
    widening: NodeProto | None


def opset(proto: onnx.ModelProto) -> int:
    """Version of the default operator domain."""
    return next((o.version for o in proto.opset_import if o.domain in STANDARD), 0)


def evaluate(node: NodeProto, inputs: list[NDArray[np.generic]], version: int) -> NDArray[np.generic]:
    """Run one node on arrays under ONNX Runtime; 4-bit integers are fed as whole bytes, which no operator here tells apart.

    Args:
        node: a node of the default domain with one output.
        inputs: one array for each input that is not left out.
        version: of the default domain.
    """
    names = [name for name in node.input if name]
    arrays = [array.astype(_WHOLE_BYTES.get(array.dtype.name, array.dtype), copy=False) for array in inputs]
    infos = [helper.make_tensor_value_info(n, onnx_type(a.dtype), a.shape) for n, a in zip(names, arrays, strict=True)]
    graph = helper.make_graph([node], "one", infos, [onnx.ValueInfoProto(name=node.output[0])])
    session = open_session(helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=_IR), optimize=False)
    return to_array(session.run([node.output[0]], {n: to_value(a) for n, a in zip(names, arrays, strict=True)})[0])


def find_sites(model: Model, *, min_elements: int = MIN_ELEMENTS) -> Sites:
    """Every weight of the model, as a site or, with its reason, as a skip; smaller weights than `min_elements` are skipped."""
    found: list[Site] = []
    skipped: list[Skip] = []
    index = ValueIndex(model.proto)
    every = list(scopes(model.proto))
    outputs = {(scope.path, name) for scope in every for name in output_names(scope.body)}
    overridable = {v.name for v in model.proto.graph.input} if model.proto.ir_version >= 4 else set()
    for scope in every:
        for anchor in _anchors(scope, index, opset(model.proto)):
            name = anchor.name if scope.path == MAIN else f"{scope.path}:{anchor.name}"
            size = sum(model.weights.nbytes(tensor) for tensor in anchor.sources)
            if isinstance(scope.body, onnx.FunctionProto):
                skipped.append(Skip(name, "inside a model-local function", "", anchor.shape, size))
                continue
            uses, reasons = _collect(anchor.name, scope, anchor.shape, anchor.dtype, index, opset(model.proto), outputs)
            if scope.path == MAIN and anchor.name in overridable:
                reasons.append("a graph input that callers may override")
            if int(np.prod(anchor.shape, dtype=np.int64)) < min_elements:
                reasons.append(f"fewer than {min_elements} weights")
            if uses and not reasons:
                found.append(
                    Site(
                        name,
                        anchor.name,
                        scope.path,
                        anchor.shape,
                        anchor.dtype,
                        tuple(uses),
                        anchor.sources,
                        anchor.widening,
                        uses[0].order,
                        opset(model.proto),
                    )
                )
            else:
                op_type = uses[0].use.node.op_type if uses else ""
                skipped.append(Skip(name, "; ".join(dict.fromkeys(reasons)) or "nothing reads it", op_type, anchor.shape, size))
    order = {id(node): position for position, node in enumerate(model.proto.graph.node)}
    found.sort(key=lambda site: min(order.get(id(use.use.node), len(order)) for use in site.uses))
    return Sites(tuple(found), tuple(skipped))


def without_broken(model: Model, sites: Sites) -> Sites:
    """The same, with every site whose weight holds NaN or infinities among the skips; reads each weight once."""
    broken = [site for site in sites if not _is_finite(site.value(model))]
    kept = tuple(site for site in sites if site not in broken)
    reason = "it holds NaN or infinite values"
    skips = (Skip(site.name, reason, site.op_type, site.shape, sum(map(model.weights.nbytes, site.sources))) for site in broken)
    return Sites(kept, (*sites.skipped, *skips))


def _is_finite(value: NDArray[np.generic]) -> bool:
    """Whether all entries are; their sum tells without a second array, as float32 sums do not overflow in float64."""
    with np.errstate(invalid="ignore", over="ignore"):
        return bool(np.isfinite(value.sum(dtype=np.float64)))


def _anchors(scope: Scope, index: ValueIndex, version: int) -> Iterator[_Anchor]:
    """Constant float values of at least two axes in one scope."""
    tensors: list[tuple[str, TensorProto]] = []
    if isinstance(scope.body, onnx.GraphProto):
        tensors += [(tensor.name, tensor) for tensor in scope.body.initializer]
    for node in scope.body.node:
        if node.op_type == "Constant" and node.domain in STANDARD and node.attribute and node.attribute[0].name == "value":
            tensors.append((node.output[0], node.attribute[0].t))
    stored = dict(tensors)
    for name, tensor in tensors:
        if tensor.data_type in FLOAT_TYPES and len(tensor.dims) >= 2:
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            yield _Anchor(scope, name, tuple(tensor.dims), dtype, (tensor,), None)
    for node in scope.body.node:
        if node.op_type not in _WIDENING or node.domain not in STANDARD or not all(name in stored for name in node.input if name):
            continue
        first = stored[node.input[0]]
        if first.data_type not in _INTEGERS or len(first.dims) < 2:
            continue
        to = next((a.i for a in node.attribute if a.name in ("to", "output_dtype") and a.i), 0)
        scale_type = stored[node.input[1]].data_type if node.op_type == "DequantizeLinear" else 0
        if (to or scale_type) in FLOAT_TYPES:
            dtype = helper.tensor_dtype_to_np_dtype(to or scale_type)
            sources = tuple(stored[name] for name in node.input if name)
            yield _Anchor(scope, node.output[0], tuple(first.dims), dtype, sources, node)


def _collect(
    name: str,
    scope: Scope,
    value: NDArray[np.int64] | tuple[int, ...],
    dtype: np.dtype[np.generic],
    index: ValueIndex,
    version: int,
    outputs: set[tuple[str, str]],
) -> tuple[list[SiteUse], list[str]]:
    """Follow a constant to the operators that read it: their uses, and the reasons against some of them.

    `value` stands for the constant: its shape, or, behind a node that moves entries, each entry's flat position in the anchor.
    """
    uses: list[SiteUse] = []
    reasons: list[str] = []
    shape = value if isinstance(value, tuple) else value.shape
    order = None if isinstance(value, tuple) else value.reshape(-1)
    if (scope.path, name) in outputs:
        reasons.append("it is an output of its graph")
    for read in index.uses(name, scope):
        node, key = read.node, ("" if read.node.domain in STANDARD else read.node.domain, read.node.op_type)
        if key[0] == "" and node.op_type in _CHAIN and read.index == 0:
            after = _follow(node, value, index, read.scope, version)
            if after is None:
                reasons.append(f"{node.op_type} whose parameters are not constants")
                continue
            kind = next((a.i for a in node.attribute if a.name == "to"), 0) if node.op_type == "Cast" else onnx_type(dtype)
            if kind not in FLOAT_TYPES:
                reasons.append(f"cast to {TensorProto.DataType.Name(kind)}")
                continue
            after_dtype = helper.tensor_dtype_to_np_dtype(kind)
            more, against = _collect(node.output[0], read.scope, after, after_dtype, index, version, outputs)
            uses += more
            reasons += against
            continue
        family = FAMILIES.get(key)
        if family is None:
            reasons.append(f"read by {'.'.join(filter(None, key))}")
            continue
        view = family.view(node, read.index, shape)
        if isinstance(view, str):
            reasons.append(view)
            continue
        use = Use(node, read.index, view)
        activation, own_output = family.activation(use)
        producer = None if own_output else index.producer(activation, read.scope)
        if producer is not None and producer.node.op_type == "DequantizeLinear":
            reasons.append("its input is dequantized: it runs in integers already")
            continue
        uses.append(SiteUse(use, read.scope.path, dtype, order))
    return uses, reasons


def _follow(
    node: NodeProto, value: NDArray[np.int64] | tuple[int, ...], index: ValueIndex, scope: Scope, version: int
) -> NDArray[np.int64] | tuple[int, ...] | None:
    """The constant after a node that moves or renames entries; None where the node's parameters are not known."""
    if node.op_type in ("Identity", "Cast"):
        return value
    parameters = [_small_constant(name, index, scope) for name in node.input[1:] if name]
    if any(parameter is None for parameter in parameters):
        return None
    entries = np.arange(np.prod(value, dtype=np.int64)).reshape(value) if isinstance(value, tuple) else value
    return evaluate(node, [entries, *(p for p in parameters if p is not None)], version).astype(np.int64)


def _small_constant(name: str, index: ValueIndex, scope: Scope) -> NDArray[np.generic] | None:
    """A shape or axes tensor that lies in the model file itself."""
    producer = index.producer(name, scope)
    if producer is not None:
        attribute = producer.node.attribute[0] if producer.node.op_type == "Constant" and producer.node.attribute else None
        return onnx.numpy_helper.to_array(attribute.t) if attribute is not None and attribute.name == "value" else None
    body = index.home(name, scope).body
    tensors = body.initializer if isinstance(body, onnx.GraphProto) else ()
    tensor = next((t for t in tensors if t.name == name and t.data_location != TensorProto.EXTERNAL), None)
    return None if tensor is None else onnx.numpy_helper.to_array(tensor)
