"""Price candidates: exact bytes before any array exists, and latency measured on the user's provider, threads and shapes.

Bytes come from a *skeleton*, the model with its large payloads left out but counted: the rewriter runs on it with shapes in place of
arrays, so the serialized size of a whole plan is known to the byte. Latency comes from micro-models of a single operator at its real
shapes, each measured in alternation with the original operator. Storage never changes latency: it is folded when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from intaglio.ops.emit import DOMAIN, Array, Spec, spec_of
from intaglio.ops.families import FAMILIES, Use
from intaglio.ops.form import UNCHANGED, Form

from .calibrate import Shapes
from .graph import MAIN, all_names, field_size
from .latency import MicroBench, measure, structure
from .model import Model
from .rewrite import FUNCTION_IR, Fragment, fragment, ghost_tensor, ghosts, rewrite
from .save import serialized_size
from .sites import Site, find_sites, opset
from .weights import WeightStore, tensors

_GHOST_BYTES = 4096
"""Payloads from this size on are left out of a skeleton."""

DOMAIN_RESOURCE = "domain"
"""The shared resource that stands for importing the domain of the decode programs."""


class GhostStore(WeightStore):
    """Sizes tensors by shape and type alone: every reference counts as present."""

    def check(self, tensor: TensorProto) -> None:
        """Nothing to check: nothing is read."""

    def payload(self, tensor: TensorProto) -> memoryview:
        """Never available."""
        raise TypeError(f"tensor {tensor.name!r} of a skeleton has no values")


def skeleton(model: Model) -> Model:
    """The model without its large payloads, at the same serialized size."""
    large = {id(t): t for t in tensors(model.proto) if t.HasField("raw_data") and len(t.raw_data) >= _GHOST_BYTES}
    payloads = {key: tensor.raw_data for key, tensor in large.items()}
    try:
        for tensor in large.values():
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
        proto = ModelProto()
        proto.CopyFrom(model.proto)
    finally:
        for key, tensor in large.items():
            tensor.raw_data = payloads[key]
            tensor.ClearField("data_location")
    return Model(proto, GhostStore(None), model.path, model.size_bytes, model.sha256)


@dataclass(frozen=True)
class SizePrice:
    """What a form adds to the file.

    Attributes:
        size_bytes: change against the unchanged site; usually negative.
        shared: names of the decode programs it calls, each paid once per model.
    """

    size_bytes: int
    shared: tuple[str, ...]


class SizePricer:
    """Exact bytes of forms and of plans."""

    def __init__(self, model: Model, *, external: bool, name: str = "model.onnx") -> None:
        """Make the skeleton of the model that plans start from; `external` and `name` say how it will be saved."""
        self._model = skeleton(model)
        self._sites = {site.name: site for site in find_sites(self._model)}
        self._taken = frozenset(all_names(self._model.proto))
        self._external, self._name = external, name
        self._freed: dict[tuple[str, str], int] = {}
        self.base_bytes = self._size(self._model)
        self.shared: dict[str, int] = {DOMAIN_RESOURCE: 0}

    def price(self, site: Site, form: Form) -> SizePrice:
        """Bytes that a form adds or saves."""
        if form == UNCHANGED:
            return SizePrice(0, ())
        part = self._fragment(site.name, form)
        added, shared = self._added(part), self._shared(part)
        key = (site.name, form.execution)
        if key not in self._freed:
            fixed = sum(self.shared[name] for name in shared)
            twin = self._sites[site.name]
            self._freed[key] = self.base_bytes + added + fixed - self._size(rewrite(self._model, {site.name: part}, [twin]))
        return SizePrice(added - self._freed[key], shared)

    def total(self, plan: Mapping[str, Form]) -> int:
        """Bytes of the file (and its data file) that `save` will write for a plan."""
        parts = {site: self._fragment(site, form) for site, form in plan.items() if form != UNCHANGED}
        return self._size(rewrite(self._model, parts, list(self._sites.values())))

    def weight_bytes(self, site: Site, form: Form) -> int:
        """Payload of a form's arrays; of the stored tensors for "unchanged"."""
        if form == UNCHANGED:
            return sum(self._model.weights.nbytes(tensor) for tensor in self._sites[site.name].sources)
        return sum(array.nbytes for packed in ghosts(site, form) for array in packed)

    def _fragment(self, name: str, form: Form) -> Fragment:
        site = self._sites[name]
        return fragment(site, form, ghosts(site, form), self._model.proto, self._taken)

    def _size(self, model: Model) -> int:
        return serialized_size(model, self._external, name=self._name)

    def _added(self, part: Fragment) -> int:
        nodes = [*part.weights, *(node for nodes in part.replacements for node in nodes)]
        arrays = sum(_initializer_bytes(name, Spec(tuple(a.shape), a.dtype)) for name, a in part.initializers.items())
        return sum(field_size(node) for node in nodes) + arrays

    def _shared(self, part: Fragment) -> tuple[str, ...]:
        if self._model.proto.ir_version < FUNCTION_IR or not part.programs:
            return ()
        for name, program in part.programs.items():
            if name not in self.shared:
                self.shared[name] = field_size(program.function(opset(self._model.proto))) + 1  # field 25: two bytes of tag
        self.shared[DOMAIN_RESOURCE] = field_size(helper.make_opsetid(DOMAIN, 1))
        return (*sorted(part.programs), DOMAIN_RESOURCE)


def _initializer_bytes(name: str, spec: Spec) -> int:
    """What an initializer costs as an element of a graph."""
    tensor = ghost_tensor(name, spec)
    tensor.ClearField("data_location")
    payload = spec.nbytes
    body = int(tensor.ByteSize()) + 1 + _varint_bytes(payload) + payload
    return 1 + _varint_bytes(body) + body


def _varint_bytes(value: int) -> int:
    return max(1, -(-value.bit_length() // 7))


class LatencyPricer:
    """Measured latency of forms, one micro-model per distinct configuration."""

    def __init__(self, model: Model, shapes: Mapping[str, Shapes], bench: MicroBench) -> None:
        """Measure operators of `model` at the shapes that `observe` saw."""
        self._proto = model.proto
        self._shapes = shapes
        self._bench = bench
        self._small = {
            t.name: t for t in model.proto.graph.initializer if t.data_location != TensorProto.EXTERNAL and t.ByteSize() < 1 << 20
        }
        self._large = {
            t.name: Spec(tuple(t.dims), helper.tensor_dtype_to_np_dtype(t.data_type))
            for t in model.proto.graph.initializer
            if t.name not in self._small
        }
        self._reference: dict[str, float] = {}

    def measurable(self, site: Site) -> bool:
        """Whether the site's operator can be run by itself; the time of a recurrent layer counts for the weight of its input."""
        _, own = FAMILIES[site.use.key].activation(site.use)
        return not own and site.name in self._shapes and len(site.uses) == 1 and site.uses[0].scope == MAIN

    def calibrate(self, sites: Sequence[Site], whole: Callable[[], object]) -> float:
        """Time the whole model and every site's original operator in the same rounds, so that drift cannot set them apart.

        Operators by themselves take a little longer than in place (layouts are converted at their borders); where their sum comes out
        above what the whole model takes, all are scaled down to it.

        Args:
            sites: whose references to measure.
            whole: runs the model once.

        Returns:
            Seconds of one run of the model.
        """
        measurable = [site for site in sites if self.measurable(site)]
        micros = {site.name: self._micro(site, None) for site in measurable}
        distinct: dict[str, tuple[str, Callable[[], object]]] = {}
        keys = {}
        for site in measurable:
            shapes = {"x": self._shapes[site.name].input}
            keys[site.name] = key = structure(micros[site.name], shapes)
            if key not in distinct:
                distinct[key] = (site.name, self._bench.runner(micros[site.name], shapes, index_limit=site.use.view.n))
        timings = measure([whole, *(run for _, run in distinct.values())], budget_s=1.0)
        base_s = timings[0].minimum_s
        seconds = {key: timing.minimum_s for key, timing in zip(distinct, timings[1:], strict=True)}
        total_s = sum(seconds[key] for key in keys.values())
        scale = min(1.0, base_s / total_s) if total_s > 0 else 1.0
        self._reference = {name: scale * seconds[key] for name, key in keys.items()}
        return base_s

    def reference(self, site: Site) -> float:
        """Seconds of the original operator, in the units of `calibrate` where that was called; 0 if it cannot be run by itself."""
        if not self.measurable(site):
            return 0.0
        if site.name not in self._reference:
            shapes = {"x": self._shapes[site.name].input}
            self._reference[site.name] = self._bench.seconds(self._micro(site, None), shapes, index_limit=site.use.view.n)
        return self._reference[site.name]

    def change(self, site: Site, form: Form) -> float:
        """Seconds that a form adds to (or, negative, saves from) a run of the site's operator."""
        if form.execution == "dense" or not self.measurable(site):
            return 0.0
        before_s, after_s = self.pair(site, form)
        return self.reference(site) * (after_s / before_s - 1)

    def pair(self, site: Site, form: Form) -> tuple[float, float]:
        """Seconds of a measurable site's operator and of what a form makes of it, measured in alternation."""
        return self._bench.pair(
            self._micro(site, None),
            self._micro(site, Form(form.decomposition, form.ranks, "float", form.execution)),
            {"x": self._shapes[site.name].input},
            index_limit=site.use.view.n,
        )

    def _micro(self, site: Site, form: Form | None) -> ModelProto:
        """The site's operator, or what a form makes of it, as a model with one input x."""
        use, rng = site.use, np.random.default_rng(0)
        node = NodeProto()
        node.CopyFrom(use.node)
        value, _ = FAMILIES[use.key].activation(use)
        weight = use.node.input[use.index]
        constants: dict[str, NDArray[Any]] = {}
        others: dict[str, Spec] = {}
        for index, name in enumerate(node.input):
            if name in ("", value, weight):
                continue
            if name in self._small:
                constants[name] = numpy_helper.to_array(self._small[name])
            elif name in self._large:
                others[name] = self._large[name]
            elif index > 0:
                node.input[index] = ""  # initial states, lengths, residual inputs: left out on both sides
        while node.input and not node.input[-1]:
            del node.input[-1]
        output = next(name for name in node.output if name)
        twin = Use(node, use.index, use.view)
        if form is None:
            nodes = [node]
            arrays = {weight: Spec(use.view.shape, site.uses[0].dtype)}
        else:
            part = fragment(_single(site, twin), form, ghosts(site, form), self._proto, frozenset())
            nodes = [*part.weights, *(n for nodes in part.replacements for n in nodes)]
            arrays = {name: Spec(tuple(array.shape), array.dtype) for name, array in part.initializers.items()}
        constants |= {name: noise(spec, rng) for name, spec in (others | arrays).items()}
        dtype = np.dtype(np.int64) if site.op_type == "Gather" else site.uses[0].dtype
        return self._assemble(nodes, value, dtype, constants, output)

    def _assemble(
        self, nodes: Sequence[NodeProto], source: str, dtype: np.dtype[Any], constants: Mapping[str, NDArray[Any]], output: str
    ) -> ModelProto:
        """A model of these nodes that reads the value `source` as its input x and yields `output`."""
        tensors: dict[str, gs.Tensor] = {name: gs.Constant(name, array) for name, array in constants.items()}
        tensors |= {source: gs.Variable("x", dtype), "": gs.Variable.empty()}

        def named(names: Sequence[str]) -> list[gs.Tensor]:
            return [tensors.setdefault(name, gs.Variable(name)) for name in names]

        graph = gs.Graph(
            [
                gs.Node(
                    node.op_type,
                    node.name,
                    {a.name: helper.get_attribute_value(a) for a in node.attribute},
                    named(node.input),
                    named(node.output),
                    node.domain or None,
                )
                for node in nodes
            ],
            inputs=named([source]),
            outputs=named([output]),
            opset=opset(self._proto),
            import_domains=list(self._proto.opset_import),
        )
        model: ModelProto = gs.export_onnx(graph, do_type_check=False)
        model.ir_version = max(4, self._proto.ir_version)
        return model


def noise(array: Array, rng: np.random.Generator) -> NDArray[np.generic]:
    """Random values of an array's shape and dtype, scaled like weights; zeros for integers."""
    spec = spec_of(array)
    if spec.dtype.kind in "iu":
        return np.zeros(spec.shape, spec.dtype)
    return np.asarray(rng.standard_normal(spec.shape) / max(1, spec.shape[-1]) ** 0.5, spec.dtype)


def _single(site: Site, use: Use) -> Site:
    """The site with one other use."""
    return replace(site, uses=(replace(site.uses[0], use=use),))
