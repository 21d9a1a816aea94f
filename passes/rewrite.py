"""Rewrite sites: put each weight's chosen form in its place.

`fragment` emits what one site becomes; `rewrite` splices fragments into a copy of the model. A dense form replaces the anchor by a decode
program that yields a value of the same name, so every reader (chains, nested graphs, ties) keeps working untouched. A contracted form
replaces each operator that reads the weight; the last of its nodes keeps the operator's name, outputs, bias and fused activation.

Both run on real arrays or on `Spec`s alone, which is how bytes are predicted exactly before anything is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from intaglio.ops.arithmetic import ARITHMETICS, Arithmetic, Operand, join, merge_quantizers
from intaglio.ops.decompositions import DECOMPOSITIONS
from intaglio.ops.emit import DOMAIN, Array, Emitter, Program, Spec, Target, onnx_type
from intaglio.ops.families import FAMILIES, Use
from intaglio.ops.form import CARRIED, PRUNED, Form
from intaglio.ops.storage import STORAGES, Storage, limited, readers
from intaglio.ops.view import MatrixView

from .canonicalize import remove_dead
from .graph import MAIN, reads, scopes
from .kernels import Integers
from .model import Model
from .sites import Site, SiteUse, opset
from .weights import WeightStore

FUNCTION_IR = 8
"""The IR version from which a model can carry functions."""

OPTIONAL_INPUT_IR = 4
"""Before this IR version every initializer is listed as an input too."""

_LAYERS = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
"""Operators that can lose channels."""

_PRUNED_ARITHMETICS = ("float", "integer", "dynamic")

Packed = tuple[tuple[Array, ...], ...]
"""One entry per array of a form (the weight itself, or its factors): the packed arrays of its storage."""


@dataclass(frozen=True, eq=False)
class Fragment:
    """What one site becomes.

    Attributes:
        weights: decode nodes, which go where the weight was defined.
        replacements: the nodes that replace each use's operator, in the order of the site's uses; none where the operators stay.
        initializers: new initializers, by name.
        programs: decode programs that the nodes call, by name.
        tensors: initializers whose arrays the weight store has taken over already.
        coupled: first outputs of the operators that run in integers once the activations around them are quantized.
        changes: new contents of initializers that stay (corrected biases), by name.
    """

    weights: tuple[NodeProto, ...]
    replacements: tuple[tuple[NodeProto, ...], ...]
    initializers: Mapping[str, Array]
    programs: Mapping[str, Program]
    tensors: tuple[TensorProto, ...] = ()
    coupled: tuple[str, ...] = ()
    changes: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)


def array_specs(site: Site, form: Form) -> tuple[tuple[Spec, int], ...]:
    """Shape, dtype and scale axis of every array of a form, before storage."""
    site, form = as_dense(site, form)
    if form.decomposition == "dense":
        axis = FAMILIES[site.use.key].channel_axis(site.use)
        return ((Spec(site.shape, site.dtype), _anchor_axis(site, axis)),)
    decomposition = DECOMPOSITIONS[form.decomposition, form.execution]
    shapes, axes = decomposition.shapes(site.use, form.ranks), decomposition.axes(site.use)
    dtype = site.dtype if form.execution == "dense" else site.uses[0].dtype
    return tuple((Spec(shape, dtype), axis) for shape, axis in zip(shapes, axes, strict=True))


def _anchor_axis(site: Site, axis: int) -> int:
    """The anchor's axis that the first use sees as `axis`; its first axis where a chain mixes axes."""
    if site.order is None:
        return axis
    seen = site.use.view.shape
    if sorted(seen) != sorted(site.shape):
        return 0
    positions = site.order.reshape(seen)
    step = int(np.take(positions, 1, axis).flat[0] - np.take(positions, 0, axis).flat[0]) if seen[axis] > 1 else 0
    strides = [int(np.prod(site.shape[i + 1 :], dtype=np.int64)) for i in range(len(site.shape))]
    return strides.index(step) if step in strides else 0


def channel_axes(site: Site) -> tuple[int, int]:
    """The axes of a layer's stored weight along which its input and output channels lie."""
    return (1, 0) if site.use.view.outputs_first else (0, 1)


def as_dense(site: Site, form: Form) -> tuple[Site, Form]:
    """What a pruned form means: the dense form of a smaller site. Any other form means itself.

    The smaller site has a weight of the kept sizes and a node of its own, whose `group` is the number of channels that a depthwise
    operator keeps; everything else is as before.
    """
    if form.decomposition != PRUNED:
        return site, form
    shape = list(site.shape)
    for axis, size in zip(channel_axes(site), form.ranks, strict=True):
        shape[axis] = size
    node = NodeProto()
    node.CopyFrom(site.use.node)
    for attribute in node.attribute:
        if attribute.name == "group" and attribute.i > 1:
            attribute.i = shape[0]
    view = FAMILIES[site.use.key].view(node, site.use.index, tuple(shape))
    if not isinstance(view, MatrixView):
        raise ValueError(f"{site.name} as {form}: {view}")
    use = Use(node, site.use.index, view)
    smaller = replace(site, shape=tuple(shape), uses=(replace(site.uses[0], use=use),))
    return smaller, Form("dense", (), form.storage, "dense", form.arithmetic)


def array_storages(form: Form, count: int) -> tuple[str, ...]:
    """The storage of each of a form's `count` arrays."""
    if form.decomposition in ("dense", PRUNED):
        return (form.storage,)
    return DECOMPOSITIONS[form.decomposition, form.execution].storages(form.storage, count)


def written_storages(form: Form, count: int, integers: Integers) -> tuple[Storage, ...]:
    """The same as they write their codes: those that operators in int8 read as they are have no code that these do not admit."""
    storages = [STORAGES[name] for name in array_storages(form, count)]
    if not reads_bytes(form):
        return tuple(storages)
    largest = integers.largest_code(form.arithmetic)
    return tuple(limited(each, largest) if narrow else each for each, narrow in zip(storages, array_narrow(form, count), strict=True))


def reads_bytes(form: Form) -> bool:
    """Whether operators in int8 read a form's arrays, and no product of them."""
    product = form.execution == "dense" and form.decomposition not in ("dense", PRUNED)
    return form.arithmetic in ("integer", "dynamic") and not product


def array_narrow(form: Form, count: int) -> tuple[bool, ...]:
    """Which of a form's `count` arrays compute in its arithmetic; the others compute in floats."""
    if form.decomposition in ("dense", PRUNED):
        return (True,)
    return DECOMPOSITIONS[form.decomposition, form.execution].narrow(count)


def ghosts(site: Site, form: Form) -> Packed:
    """The packed arrays' specs: stands in for the arrays of `pack`."""
    specs = array_specs(site, form)
    storages = array_storages(form, len(specs))
    return tuple(STORAGES[storage].layout(spec, axis) for storage, (spec, axis) in zip(storages, specs, strict=True))


def fragment(site: Site, form: Form, packed: Packed, proto: ModelProto, taken: frozenset[str], integers: Integers) -> Fragment:
    """Emit a form of a site.

    Args:
        site: the site.
        form: any but "unchanged".
        packed: arrays, or `ghosts`.
        proto: the model, for its opset and IR version.
        taken: names that exist in the model.
        integers: that operators compute with.
    """
    site, form = as_dense(site, form)
    largest = integers.largest_code(form.arithmetic)
    emitter = Emitter(Target(opset(proto), proto.ir_version >= FUNCTION_IR, site.anchor, taken, largest))
    if form.arithmetic == "float":
        return _float_fragment(emitter, site, form, packed)
    return _narrow_fragment(emitter, ARITHMETICS[form.arithmetic], site, form, packed)


def _float_fragment(emitter: Emitter, site: Site, form: Form, packed: Packed) -> Fragment:
    """The layer computes in the model's own type."""
    names = []
    dense = form.decomposition == "dense"
    arrays = zip(packed, array_specs(site, form), array_storages(form, len(packed)), strict=True)
    for number, (packs, (spec, _), storage) in enumerate(arrays):
        names.append(STORAGES[storage].emit(emitter, "" if dense else str(number), packs, spec, site.anchor if dense else None))
    if form.execution == "dense":
        if not dense:
            DECOMPOSITIONS[form.decomposition, "dense"].emit(emitter, site.use, names, site.anchor)
        return Fragment(tuple(emitter.nodes), (), emitter.initializers, emitter.programs)
    weights = tuple(emitter.nodes)
    replacements = []
    for site_use in site.uses:
        emitter.nodes = []
        DECOMPOSITIONS[form.decomposition, form.execution].emit(emitter, site_use.use, names, "")
        replacements.append(tuple(emitter.nodes))
    return Fragment(weights, tuple(replacements), emitter.initializers, emitter.programs)


def _narrow_fragment(emitter: Emitter, arithmetic: Arithmetic, site: Site, form: Form, packed: Packed) -> Fragment:
    """The layer computes in another arithmetic: its weights become operands, and each operator that reads one is lowered."""
    whole = form.execution == "dense"
    kept = whole and arithmetic.coupled  # the operators stay as they are and find the operand under the weight's name
    output = site.anchor if kept else None
    factors = [_product(emitter, arithmetic, site, form, packed, output)] if whole else _factors(emitter, arithmetic, site, form, packed)
    operands = [factor for factor in factors if isinstance(factor, Operand)]
    weights = tuple(emitter.nodes)
    if kept:
        outputs = tuple(site_use.use.node.output[0] for site_use in site.uses)
        return Fragment(weights, (), emitter.initializers, emitter.programs, coupled=outputs)
    by_name = {operand.name: operand for operand in operands}
    replacements, coupled = [], []
    for site_use in site.uses:
        emitter.nodes = []
        if whole:
            emitter.copy(site_use.use.node, {site_use.use.index: operands[0].name})
        else:
            names = [factor.name if isinstance(factor, Operand) else factor for factor in factors]
            DECOMPOSITIONS[form.decomposition, form.execution].emit(emitter, site_use.use, names, "")
        floats, emitter.nodes = emitter.nodes, []
        for node in floats:
            index = next((i for i, name in enumerate(node.input) if name in by_name), None)
            if index is None:
                emitter.nodes.append(node)
                continue
            arithmetic.lower(emitter, node, index, by_name[node.input[index]])
            coupled += [node.output[0]] if arithmetic.coupled else []
        replacements.append(tuple(emitter.nodes))
    return Fragment(weights, tuple(replacements), emitter.initializers, emitter.programs, coupled=tuple(coupled))


def _factors(emitter: Emitter, arithmetic: Arithmetic, site: Site, form: Form, packed: Packed) -> list[Operand | str]:
    """Every factor as an operand, or as the name of its value where it computes in floats."""
    storages, narrow = array_storages(form, len(packed)), array_narrow(form, len(packed))
    return [
        arithmetic.operand(emitter, str(number), STORAGES[storage], packs, spec, axis)
        if reads_operand
        else STORAGES[storage].emit(emitter, str(number), packs, spec)
        for number, (packs, (spec, axis), storage, reads_operand) in enumerate(
            zip(packed, array_specs(site, form), storages, narrow, strict=True)
        )
    ]


def _product(emitter: Emitter, arithmetic: Arithmetic, site: Site, form: Form, packed: Packed, output: str | None) -> Operand:
    """The whole weight as one operand: as it is stored, or a product that is multiplied out when the model is loaded."""
    specs = array_specs(site, form)
    if form.decomposition == "dense":
        ((spec, axis),) = specs
        return arithmetic.operand(emitter, "", STORAGES[form.storage], packed[0], spec, axis, output)
    storages = array_storages(form, len(packed))
    names = [
        STORAGES[storage].emit(emitter, str(number), packs, spec)
        for number, (packs, (spec, _), storage) in enumerate(zip(packed, specs, storages, strict=True))
    ]
    value = emitter.name("product")
    DECOMPOSITIONS[form.decomposition, "dense"].emit(emitter, site.use, names, value)
    axis = FAMILIES[site.use.key].channel_axis(site.use)
    operand = arithmetic.from_value(emitter, value, Spec(site.shape, site.dtype), axis, output)
    if operand is None:
        raise TypeError(f"{form} of {site.name}: {arithmetic.name} takes no product of factors")
    return operand


def declines(site: Site, form: Form) -> str | None:
    """None when the rewriter can give the site this form, else the reason why not."""
    if form.decomposition == PRUNED:
        return _pruning_reason(site, form) or declines(*as_dense(site, form))
    if form.decomposition in ("unchanged", "dense"):
        if form.ranks:
            return "a whole weight has no ranks"
        specs = array_specs(site, form) if form.decomposition == "dense" else ()
    else:
        decomposition = DECOMPOSITIONS[form.decomposition, form.execution]
        reason = decomposition.declines(site.use)
        if reason:
            return reason
        full = decomposition.full(site.use)
        if len(form.ranks) != len(full) or not all(1 <= rank <= most for rank, most in zip(form.ranks, full, strict=True)):
            return f"ranks {list(form.ranks)}, expected from 1 to {list(full)}"
        if form.execution == "dense" and site.order is not None:
            return "the weight is turned round before it is used"
        if form.execution == "dense" and site.dtype.name == "bfloat16":
            return "ONNX Runtime multiplies no bfloat16 on processors"
        if form.execution == "contract" and not all(_reads_alike(use, site.uses[0]) for use in site.uses):
            return "a tied weight whose uses read it differently"
        if form.execution == "contract" and any(use.scope != site.scope for use in site.uses):
            return "used in another graph than it is defined in"
        specs = array_specs(site, form)
    arrays = list(zip(specs, array_storages(form, len(specs)), strict=True))
    for (spec, _), name in arrays:
        storage = STORAGES[name]
        reason = storage.accepts(spec)
        if reason:
            return reason
        if storage.min_opset(spec) > site.opset:
            return f"storage {name} needs opset {storage.min_opset(spec)}, the model has {site.opset}"
        named = readers(storage)
        if named is not None and form.arithmetic not in named:
            return f"storage {name} is read by {', '.join(named)} only"
    return None if form.arithmetic == "float" else _arithmetic_reason(site, form, arrays)


def _pruning_reason(site: Site, form: Form) -> str | None:
    """None when the site can lose channels, else the reason why not; whether its neighbours lose them too is not seen from here."""
    plain = len(site.uses) == 1 and site.widening is None and site.order is None and site.scope == site.uses[0].scope == MAIN
    if not plain or site.op_type not in _LAYERS or site.use.index != 1 or site.dtype != np.float32:
        return "only float32 weights of the main graph that one layer reads lose channels"
    group = site.use.int("group", 1)
    if group != 1 and (site.op_type == "ConvTranspose" or site.shape[:2] != (group, 1)):
        return f"a grouped {site.op_type}"
    most = [site.shape[axis] for axis in channel_axes(site)]
    fits = len(form.ranks) == 2 and all(1 <= rank <= size for rank, size in zip(form.ranks, most, strict=True))
    if not fits or list(form.ranks) == most:
        return f"keeps {list(form.ranks)}, expected less than {most}"
    return None if form.arithmetic in _PRUNED_ARITHMETICS else f"a pruned weight computes in {', '.join(_PRUNED_ARITHMETICS)} only"


def _arithmetic_reason(site: Site, form: Form, arrays: Sequence[tuple[tuple[Spec, int], str]]) -> str | None:
    """None when the site's operators can compute in the form's arithmetic, else the reason why not."""
    if form == CARRIED or form.decomposition == "unchanged":
        return "a weight that stays as it is computes in floats"
    arithmetic = ARITHMETICS[form.arithmetic]
    for site_use in site.uses:
        reason = arithmetic.declines(site_use.use, site.opset)
        if reason:
            return reason
        if site_use.use.node.input[site_use.use.index] != site.anchor or site_use.scope != site.scope:
            return "the weight is turned round before it is used"
    if form.decomposition != "dense" and form.execution == "dense":
        return arithmetic.product_reason
    narrow = array_narrow(form, len(arrays))
    accepted = (arithmetic.accepts(STORAGES[name], spec, axis) for ((spec, axis), name), each in zip(arrays, narrow, strict=True) if each)
    return next((reason for reason in accepted if reason), None)


def _reads_alike(one: SiteUse, other: SiteUse) -> bool:
    """Whether the same factors can stand for the weight in both uses."""
    alike = one.use.view == other.use.view and one.use.key == other.use.key and one.use.index == other.use.index
    return alike and one.dtype == other.dtype and np.array_equal(one.order, other.order)  # type: ignore[arg-type]  # None equals None


def rewrite(model: Model, fragments: Mapping[str, Fragment], sites: Sequence[Site]) -> Model:
    """A copy of the model in which the given sites have new forms; the input model is not changed.

    Args:
        model: the model that `sites` were found in.
        fragments: by site name; sites without one stay.
        sites: the sites.
    """
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    bodies = {scope.path: scope.body for scope in scopes(proto)}
    programs: dict[str, Program] = {}
    for site in sites:
        if site.name not in fragments:
            continue
        part = fragments[site.name]
        body = bodies[site.scope]
        if not isinstance(body, GraphProto):
            raise TypeError(f"site {site.name} lies in a function body")
        programs |= part.programs
        if part.replacements:
            for site_use, nodes in zip(site.uses, part.replacements, strict=True):
                _replace(body, site_use.use.node, nodes)
            first = min(_position(body, nodes[0]) for nodes in part.replacements if nodes)
        else:
            _drop_anchor(body, site)
            first = next((i for i, node in enumerate(body.node) if site.anchor in reads(node)), len(body.node))
        _insert(body, first, part.weights)
        for tensor in body.initializer:
            if tensor.name in part.changes:
                tensor.CopyFrom(numpy_helper.from_array(part.changes[tensor.name], tensor.name))
        for tensor in spooled(part, model.weights).tensors:
            body.initializer.append(tensor)
            if proto.ir_version < OPTIONAL_INPUT_IR and body is proto.graph:
                body.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    merge_quantizers(proto.graph)
    _import_domains(proto)
    carry(proto, programs)
    return Model(remove_dead(proto), model.weights, model.path, model.size_bytes, model.sha256)


def spooled(part: Fragment, weights: WeightStore) -> Fragment:
    """The fragment with its arrays handed over to a weight store, which may keep them on disk; specs become ghosts."""
    tensors = (
        ghost_tensor(name, array) if isinstance(array, Spec) else weights.spool(name, array) for name, array in part.initializers.items()
    )
    return replace(part, initializers={}, tensors=(*part.tensors, *tensors))


def tensor_proto(name: str, array: Array) -> TensorProto:
    """An embedded tensor."""
    if isinstance(array, Spec):
        raise TypeError(f"{name} has a shape but no values")
    return numpy_helper.from_array(array, name)


def ghost_tensor(name: str, spec: Spec) -> TensorProto:
    """A tensor that has every field of the real one but its payload; read by nobody, sized by a `GhostStore`."""
    return TensorProto(name=name, dims=spec.shape, data_type=onnx_type(spec.dtype), data_location=TensorProto.EXTERNAL)


def _position(body: GraphProto, wanted: NodeProto) -> int:
    return next(i for i, node in enumerate(body.node) if node.output == wanted.output)


def _replace(body: GraphProto, node: NodeProto, nodes: Sequence[NodeProto]) -> None:
    """Put nodes in the place of a node of the model, or of what the fragment of another of its weights has made of it."""
    position = _position(body, node)
    if body.node[position] != node:
        nodes = [*nodes[:-1], join(node, body.node[position], nodes[-1])]
    del body.node[position]
    _insert(body, position, nodes)


def _insert(body: GraphProto, position: int, nodes: Sequence[NodeProto]) -> None:
    for offset, node in enumerate(nodes):
        body.node.insert(position + offset, node)


def _drop_anchor(body: GraphProto, site: Site) -> None:
    """Remove what defines the anchor's name, so that the decode program can."""
    for position, tensor in enumerate(body.initializer):
        if tensor.name == site.anchor:
            del body.initializer[position]
            break
    for position, node in enumerate(body.node):
        if list(node.output) == [site.anchor]:
            del body.node[position]
            break
    for position, value in enumerate(body.input):
        if value.name == site.anchor:
            del body.input[position]
            break


def _import_domains(proto: ModelProto) -> None:
    """Declare the domains of new nodes."""
    known = {"", "ai.onnx", DOMAIN, *(entry.domain for entry in proto.opset_import)}
    used = dict.fromkeys(node.domain for scope in scopes(proto) if isinstance(scope.body, GraphProto) for node in scope.body.node)
    proto.opset_import.extend(helper.make_opsetid(domain, 1) for domain in used if domain not in known)


def carry(proto: ModelProto, programs: Mapping[str, Program]) -> None:
    """Add the decode programs as functions, and their domain."""
    present = {(function.domain, function.name) for function in proto.functions}
    for name in sorted(programs):
        if (DOMAIN, name) not in present and proto.ir_version >= FUNCTION_IR:
            proto.functions.append(programs[name].function(opset(proto)))
    if proto.ir_version >= FUNCTION_IR and programs and all(o.domain != DOMAIN for o in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
