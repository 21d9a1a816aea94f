"""Price candidates in seconds, measured on the user's provider, threads and shapes.

Latency comes from micro-models of a single operator at its real shapes, each measured in alternation with the original operator. Storage
never changes latency: it is folded when the model is loaded. Operators that run in integers are measured from quantized input to quantized
output, so that entering and leaving integers is counted once, where it happens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from intaglio.ops.arithmetic import ARITHMETICS, join
from intaglio.ops.emit import Spec, fresh_name
from intaglio.ops.families import FAMILIES, Use
from intaglio.ops.form import PRUNED, UNCHANGED, Form
from intaglio.ops.storage import STORAGES, readers

from .assemble import nominal_ranges
from .calibrate import Shapes
from .graph import MAIN
from .integer import place, quantized_values
from .kernels import INTEGERS, Integers
from .latency import MicroBench, measure, structure
from .model import Model
from .partners import Partners
from .price import noise
from .regions import CHANNELS_LAST, HELD, Carrier
from .rewrite import FUNCTION_IR, as_dense, channel_axes, fragment, ghosts
from .sites import Site, opset
from .weights import WeightStore


class LatencyPricer:
    """Measured latency of forms, one micro-model per distinct configuration."""

    def __init__(
        self,
        model: Model,
        shapes: Mapping[str, Shapes],
        bench: MicroBench,
        values: Mapping[str, tuple[int, ...]] | None = None,
        partners: Partners | None = None,
        integers: Integers = INTEGERS["full"],
    ) -> None:
        """Measure operators of a model.

        Args:
            model: the model.
            shapes: that `observe` saw around its sites.
            bench: measures.
            values: shapes of activations around carriers.
            partners: the weights that change with a site where it computes in their arithmetic.
            integers: that operators compute with.
        """
        self._integers, self._activations = integers, integers.activations
        self._byte = helper.np_dtype_to_tensor_dtype(integers.activations)
        self._proto = model.proto
        self._shapes = shapes
        self._values = values or {}
        self._partners = partners or Partners()
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
        self._pairs: dict[tuple[object, ...], tuple[float, float]] = {}
        self._float_scale = 1.0
        self._integer_scale = 1.0

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
            shapes = {_source(site): self._shapes[site.name].input}
            keys[site.name] = key = structure(micros[site.name], shapes)
            if key not in distinct:
                distinct[key] = (site.name, self._bench.runner(micros[site.name], shapes, index_limit=site.use.view.n))
        timings = measure([whole, *(run for _, run in distinct.values())], budget_s=1.0)
        base_s = timings[0].minimum_s
        seconds = {key: timing.minimum_s for key, timing in zip(distinct, timings[1:], strict=True)}
        total_s = sum(seconds[key] for key in keys.values())
        self._float_scale = min(1.0, base_s / total_s) if total_s > 0 else 1.0
        self._reference = {name: self._float_scale * seconds[key] for name, key in keys.items()}
        return base_s

    def calibrate_integers(self, changes_s: Mapping[str, float], change_s: float) -> None:
        """Agree with a measurement of many operators in integers at once: one by itself pays for layouts that a region does not change.

        Args:
            changes_s: what `change` and `carry` said of each, by site or carrier name.
            change_s: what all of them changed together, measured.
        """
        spent_s = sum(self._spent(name, change) for name, change in changes_s.items())
        together_s = spent_s + change_s - sum(changes_s.values())
        if spent_s > 0:
            self._integer_scale = float(np.clip(self._integer_scale * together_s / spent_s, 0.1, 2.0))

    def _spent(self, name: str, change_s: float) -> float:
        """Seconds of an operator in integers, from the change against floats."""
        return self._reference.get(name, 0.0) + change_s

    def reference(self, site: Site) -> float:
        """Seconds of the original operator, in the units of `calibrate` where that was called; 0 if it cannot be run by itself."""
        if not self.measurable(site):
            return 0.0
        if site.name not in self._reference:
            shapes = {_source(site): self._shapes[site.name].input}
            self._reference[site.name] = self._bench.seconds(self._micro(site, None), shapes, index_limit=site.use.view.n)
        return self._reference[site.name]

    def change(self, site: Site, form: Form) -> float:
        """Seconds that a form adds to (or, negative, saves from) a run of the site's operator."""
        if not changes_latency(form) or not self.measurable(site):
            return 0.0
        before_s, after_s = self.pair(site, form)
        scale = self._integer_scale if _coupled(form) else 1.0
        return self.reference(site) * (scale * after_s / before_s - 1)

    def pair(self, site: Site, form: Form) -> tuple[float, float]:
        """Seconds of a measurable site's operator and of what a form makes of it, measured in alternation.

        Sites whose operators have the same attributes and shapes share a measurement.
        """
        run, use, shapes = as_run(form), site.use, self._shapes[site.name]
        attributes = tuple(sorted(attribute.SerializeToString(deterministic=True) for attribute in use.node.attribute))
        present = tuple(bool(name) for name in use.node.input)
        key = (run, use.key, use.index, use.view, attributes, present, site.uses[0].dtype, shapes)
        if key not in self._pairs:
            models = self._micro(site, None), self._micro(site, run)
            inputs = {_source(site): shapes.input} | {_source(site, run): _fewer_channels(site, run, shapes.input)}
            self._pairs[key] = self._bench.pair(*models, inputs, index_limit=use.view.n)
        return self._pairs[key]

    def carry(self, carrier: Carrier) -> float:
        """Seconds that an operator without a weight adds when it runs in integers."""
        if carrier.node.op_type in CHANNELS_LAST:
            before_s = self._bench.seconds(self._carrier_micro(carrier), {name: self._values[name] for name in carrier.inputs})
            after_s = self._bench.seconds(*self._channels_last(carrier))
        else:
            before_s, after_s = self._carrier_pair(carrier)
        self._reference[carrier.name] = self._float_scale * before_s
        return self._float_scale * (self._integer_scale * after_s - before_s)

    def worthwhile(self, carrier: Carrier) -> bool:
        """Whether an operator without a weight can gain from running in integers: its kernel for bytes is faster than the one for floats
        between conversions of all that goes in and comes out, and what holds it back."""
        if carrier.node.op_type not in HELD or carrier.node.op_type in CHANNELS_LAST:
            return True
        before_s, after_s = self._carrier_pair(carrier)
        inside_s = sum(self._converted(value)[1] for value in carrier.inputs)
        held_s = self._bench.seconds(self._conversion("Sum"), {"x": self._values[carrier.output]})
        return after_s < inside_s + before_s + held_s + self._converted(carrier.output)[0]

    def _carrier_pair(self, carrier: Carrier) -> tuple[float, float]:
        """Seconds of an operator without a weight in floats and in integers, measured in alternation."""
        floats = self._carrier_micro(carrier)
        integers = _in_integers(floats, (carrier.node.output[0],), self._activations)
        shapes = {name: self._values[name] for name in carrier.inputs}
        return self._bench.pair(floats, integers, shapes, index_limit=256)

    def _channels_last(self, carrier: Carrier) -> tuple[ModelProto, dict[str, tuple[int, ...]]]:
        """A model of the kernel that replaces the operator between convolutions in integers, and the shape of its input."""
        batch, channels, *lengths = self._values[carrier.inputs[0]]
        shape = (batch, *lengths, channels)
        node = helper.make_node(CHANNELS_LAST[carrier.node.op_type], ["x"], ["y"], domain="com.microsoft")
        node.attribute.extend(a for a in carrier.node.attribute if a.name != "storage_order")
        graph = helper.make_graph(
            [node],
            "channels_last",
            [helper.make_tensor_value_info("x", self._byte, shape)],
            [helper.make_tensor_value_info("y", self._byte, None)],
        )
        imports = [helper.make_opsetid("", opset(self._proto)), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=FUNCTION_IR), {"x": shape}

    def boundary(self, value: str) -> tuple[float, float]:
        """Seconds of quantizing an activation value, and of dequantizing it."""
        quantize_s, dequantize_s = self._converted(value)
        return self._float_scale * quantize_s, self._float_scale * dequantize_s

    def _converted(self, value: str) -> tuple[float, float]:
        """The same, not scaled."""
        shapes = {"x": self._values[value]}
        quantize_s, dequantize_s = (self._bench.seconds(self._conversion(op_type), shapes) for op_type in _CONVERSIONS)
        return quantize_s, dequantize_s

    def _conversion(self, op_type: str) -> ModelProto:
        """A model of one conversion, or of a Sum."""
        return _conversion(op_type, opset(self._proto), self._activations)

    def _carrier_micro(self, carrier: Carrier) -> ModelProto:
        """The operator with the activations around it as inputs and output."""
        constants = {name: numpy_helper.to_array(self._small[name]) for name in carrier.node.input if name in self._small}
        sources = {name: Spec(self._values[name], np.dtype(np.float32)) for name in carrier.inputs}
        return self._assemble([carrier.node], sources, constants, carrier.node.output[0])

    def _micro(self, site: Site, form: Form | None) -> ModelProto:
        """The site's operator, or what a form makes of it, as a model with one input, `_source`."""
        use, rng = site.use, np.random.default_rng(0)
        group = None if form is None else self._partners.group(site.name, form)
        members = (site,) if group is None else (site, *(other for other in group.sites if other.name != site.name))
        node = NodeProto()
        node.CopyFrom(use.node)
        value, _ = FAMILIES[use.key].activation(use)
        weights = [member.use.node.input[member.use.index] for member in members]
        constants: dict[str, NDArray[Any]] = {}
        others: dict[str, Spec] = {}
        for index, name in enumerate(node.input):
            if name in ("", value, *weights):
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
        source = _source(site, form)
        coupled: tuple[str, ...] = ()
        if form is None:
            nodes = [node]
            arrays = {weights[0]: Spec(use.view.shape, site.uses[0].dtype)}
        else:
            taken = frozenset((*node.input, *node.output, source))
            alone = [_single(member, Use(node, member.use.index, member.use.view)) for member in members]
            forms = (form, *(group.form for _ in members[1:] if group is not None))
            parts = [
                fragment(each, its, ghosts(each, its), self._inlining(), taken, self._integers)
                for each, its in zip(alone, forms, strict=True)
            ]
            node = as_dense(alone[0], form)[0].use.node
            constants = {name: _cut_bias(site, form, array) for name, array in constants.items()}
            nodes = [*(each for part in parts for each in part.weights), *_joined(node, [part.replacements for part in parts])]
            initializers = {name: array for part in parts for name, array in part.initializers.items()}
            arrays = {name: array for name, array in initializers.items() if isinstance(array, Spec)}
            constants |= {name: array for name, array in initializers.items() if not isinstance(array, Spec)}
            coupled = parts[0].coupled
        constants |= {name: noise(spec, rng) for name, spec in (others | arrays).items()}
        dtype = np.dtype(np.int64) if site.op_type == "Gather" else site.uses[0].dtype
        nodes = [_renamed(each, value, source) for each in nodes]
        shape = self._shapes[site.name].input
        sources = {source: Spec(shape if form is None else _fewer_channels(site, form, shape), dtype)}
        micro = self._assemble(nodes, sources, constants, output)
        return micro if form is None or not _coupled(form) else _in_integers(micro, coupled, self._activations)

    def _inlining(self) -> ModelProto:
        """A model like the job's, but too old for functions: programs are written out, so that a micro-model needs none."""
        return ModelProto(ir_version=min(self._proto.ir_version, FUNCTION_IR - 1), opset_import=self._proto.opset_import)

    def _assemble(
        self, nodes: Sequence[NodeProto], sources: Mapping[str, Spec], constants: Mapping[str, NDArray[Any]], output: str
    ) -> ModelProto:
        """A model of these nodes with the values `sources` as inputs and the value `output` as its output.

        Inputs have shapes: ONNX Runtime turns convolutions in integers channels-last only where it knows the rank.
        """
        tensors: dict[str, gs.Tensor] = {name: gs.Constant(name, array) for name, array in constants.items()}
        tensors |= {name: gs.Variable(name, spec.dtype, spec.shape) for name, spec in sources.items()}
        tensors[""] = gs.Variable.empty()

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
            inputs=named(list(sources)),
            outputs=named([output]),
            opset=opset(self._proto),
            import_domains=list(self._proto.opset_import),
        )
        model: ModelProto = gs.export_onnx(graph, do_type_check=False)
        model.ir_version = max(4, self._proto.ir_version)
        return model


def _source(site: Site, form: Form | None = None) -> str:
    """The input of a micro-model: the activation that the operator reads, or one of another name where it lost channels."""
    value, _ = FAMILIES[site.use.key].activation(site.use)
    if form is None or form.decomposition != PRUNED:
        return value
    return fresh_name(f"{value}-pruned", {*site.use.node.input, *site.use.node.output})


def _joined(node: NodeProto, replacements: Sequence[Sequence[Sequence[NodeProto]]]) -> list[NodeProto]:
    """What the fragments of one operator's weights make of it together: the replacements of each, none where the operator stays."""
    nodes = [node]
    for own in replacements:
        for made in own:
            last = made[-1] if nodes[-1] is node else join(node, nodes[-1], made[-1])
            nodes = [*nodes[:-1], *made[:-1], last]
    return nodes


def _fewer_channels(site: Site, form: Form, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a site's activation in a form."""
    if form.decomposition != PRUNED:
        return shape
    inputs, outputs = form.ranks
    axis = 1 if len(site.shape) > 2 else len(shape) - 1
    kept = outputs if site.use.view.groups > 1 else inputs
    return (*shape[:axis], kept, *shape[axis + 1 :])


def _cut_bias(site: Site, form: Form, array: NDArray[Any]) -> NDArray[Any]:
    """A layer's bias where its outputs are pruned: the first entries along its last axis, unless one entry serves all of them."""
    outputs = site.shape[channel_axes(site)[1]]
    cut = form.decomposition == PRUNED and array.ndim > 0 and array.shape[-1] == outputs
    return array[..., : form.ranks[1]] if cut else array


def _single(site: Site, use: Use) -> Site:
    """The site with one other use."""
    return replace(site, uses=(replace(site.uses[0], use=use),))


_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")


def changes_latency(form: Form) -> bool:
    """Whether a layer of this form runs other operators than before."""
    return form.execution == "contract" or form.arithmetic != "float"


def _coupled(form: Form) -> bool:
    return form.arithmetic != "float" and ARITHMETICS[form.arithmetic].coupled


def as_run(form: Form) -> Form:
    """The form whose layer runs the same operators but is stored as they read it: what storage expands to does not matter at run time."""
    if not changes_latency(form):
        return UNCHANGED
    storage = "float" if form.arithmetic == "float" else "int8"
    if readers(STORAGES[form.storage]) is not None or form.arithmetic == "rows":  # whatever decodes rows, decodes them in every run
        storage = form.storage
    if form.execution == "dense":
        return Form("dense", (), storage, "dense", form.arithmetic)
    return replace(form, storage=storage)


def _in_integers(micro: ModelProto, operators: Sequence[str], activations: np.dtype[Any]) -> ModelProto:
    """The micro-model with the given operators in integers, from bytes to bytes."""
    model = Model(micro, WeightStore(None), None, 0, "")
    ranges = nominal_ranges(model, operators, quantized_values(model, operators), activations)
    return _between_quantizers(place(model, operators, ranges).proto, helper.np_dtype_to_tensor_dtype(activations))


def _between_quantizers(proto: ModelProto, kind: int) -> ModelProto:
    """The same without the quantizers of its inputs and the dequantizers of its outputs, which then are of a type of bytes."""
    graph = proto.graph
    for value in graph.input:
        readers = [node for node in graph.node if value.name in node.input]
        if len(readers) == 1 and readers[0].op_type == "QuantizeLinear":
            renamed = readers[0].output[0]
            graph.node.remove(readers[0])
            for node in graph.node:
                node.input[:] = [value.name if name == renamed else name for name in node.input]
            value.type.tensor_type.elem_type = kind
    for value in graph.output:
        producer = next((node for node in graph.node if value.name in node.output), None)
        if producer is not None and producer.op_type == "DequantizeLinear":
            graph.node.remove(producer)
            value.name = producer.input[0]
            value.type.tensor_type.elem_type = kind
    return proto


def _conversion(op_type: str, version: int, activations: np.dtype[Any]) -> ModelProto:
    """A model of one QuantizeLinear or DequantizeLinear, or of a Sum of one term."""
    byte, parameters = helper.np_dtype_to_tensor_dtype(activations), [] if op_type == "Sum" else ["scale", "zero"]
    graph = helper.make_graph(
        [helper.make_node(op_type, ["x", *parameters], ["y"])],
        op_type,
        [helper.make_tensor_value_info("x", byte if op_type == "DequantizeLinear" else TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", byte if op_type == "QuantizeLinear" else TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.asarray(0.05, np.float32), "scale"),
            numpy_helper.from_array(np.zeros((), activations), "zero"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=FUNCTION_IR)


def _renamed(node: NodeProto, old: str, new: str) -> NodeProto:
    """A copy of a node that reads `new` instead of `old`."""
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [new if name == old else name for name in copy.input]
    return copy
