"""The model that is tuned: a plan's model in floats, in which every array that may change is an input.

Before: a plan's forms, fitted. After: a model that runs the same chain of layers as the compressed one (factors one after the other where
these run so, products formed in the graph where they are multiplied out), whose factors, biases, and scales and shifts of normalizations
are inputs. Activations that will be bytes pass through pairs of Quantize/DequantizeLinear. `Student.taught` takes what was learnt back.

Not modelled is what layers round by a scale per run (arithmetics `dynamic` and `nbits`): they compute in floats with the stored weight.
Nor is the rounding of products that are multiplied out and then rounded to int8.

Must not be tuned: weights of nested graphs, and of other types than float32 (`Student.skipped` has the reason). They are as fitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from intaglio.ops.emit import Array, Emitter, Spec, Target
from intaglio.ops.form import Form
from intaglio.ops.storage import LARGEST, Storage, requantized

from .assemble import coupled_operators, joined
from .build import Fitted, carried_nodes, chosen_sites, quantization_ranges
from .graph import MAIN, ValueIndex, all_names
from .integer import fake_quantized, quantized_values
from .job import Job
from .latent import Latent, Levelled, Plain, Rounded, latent_of, scattered, within_cells
from .model import Model
from .rewrite import Fragment, array_narrow, array_specs, fragment, reads_bytes, spooled, written_storages
from .sites import Site

Float32 = NDArray[np.float32]

_CONSTANTS: Mapping[str, tuple[int, ...]] = {
    "Conv": (2,),
    "ConvTranspose": (2,),
    "Gemm": (2,),
    "BatchNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SkipLayerNormalization": (2, 3, 4),
    "Add": (0, 1),
    "Mul": (0, 1),
}
"""Inputs by which an operator adds to or scales channels."""

_NEW_OPSET = 18
"""An opset that has every operator of a decode program."""

_LARGEST_CONSTANT = 1 << 14
"""Entries of a constant at most: one number per channel."""


@dataclass(frozen=True, eq=False)
class Parameter:
    """An input of the student.

    Attributes:
        name: of the input.
        latent: what may change.
        start: (n,), values from which to move; they stand for the array as it was fitted.
        part: where its values lie in the flat array of all parameters.
        axis: of the scales to which the array is rounded once more when it is run in int8; None where it is not.
        largest: magnitude of the codes that it is rounded to.
    """

    name: str
    latent: Latent
    start: Float32
    part: slice
    axis: int | None = None
    largest: int = LARGEST

    def project(self, flat: Float32, out: Float32) -> None:
        """Write what the model computes with; values may be moved back to the outermost level.

        Args:
            flat: values of all parameters.
            out: of the input's shape.
        """
        self.latent.project(flat[self.part], out)
        if self.axis is not None:
            codes, scale = requantized(out, self.axis, self.largest)
            np.multiply(codes, scale.reshape([-1 if i == self.axis else 1 for i in range(out.ndim)]), out=out)


@dataclass(frozen=True, eq=False)
class Student:
    """A plan's model with open parameters.

    Attributes:
        model: the graph; parameters are inputs after the model's own.
        parameters: by input name.
        arrays: site name → for each array of its form the name of its parameter, or None where it is fixed.
        constants: names of the parameters that stand for constants between the sites.
        skipped: site name → why (some of) its arrays are fixed.
        fitted: what it was made of.
        forms: the plan.
        job: the job.
    """

    model: Model
    parameters: Mapping[str, Parameter]
    arrays: Mapping[str, tuple[str | None, ...]]
    constants: tuple[str, ...]
    skipped: Mapping[str, str]
    fitted: Fitted
    forms: Mapping[str, Form]
    job: Job

    @property
    def count(self) -> int:
        """Entries of the flat array of all parameters."""
        return sum(parameter.part.stop - parameter.part.start for parameter in self.parameters.values())

    def start(self) -> Float32:
        """(count,): the flat array that stands for what was fitted."""
        return np.concatenate([np.zeros(0, np.float32), *(each.start for each in self.parameters.values())])

    def taught(self, flat: Float32) -> Fitted:
        """What was fitted, with the arrays that stand for other values of the parameters.

        Args:
            flat: (count,).
        """
        flat = flat.copy()
        packs = {name: parameter.latent.pack(flat[parameter.part]) for name, parameter in self.parameters.items()}
        taken = frozenset(all_names(self.job.model.proto))
        sites = {site.name: site for site in self.job.sites}
        fragments, packed = dict(self.fitted.fragments), dict(self.fitted.packed)
        for name, names in self.arrays.items():
            if not any(names):
                continue
            packed[name] = tuple(old if key is None else packs[key] for old, key in zip(packed[name], names, strict=True))
            part = fragment(sites[name], self.forms[name], packed[name], self.job.model.proto, taken, self.job.integers)
            fragments[name] = spooled(replace(part, changes=fragments[name].changes), self.job.model.weights)
        constants = {name: np.asarray(packs[name][0], np.float32) for name in self.constants}
        return Fitted(fragments, self.fitted.cuts, packed, {**self.fitted.constants, **constants})


def make_student(job: Job, forms: Mapping[str, Form], fitted: Fitted, *, constants: bool = True, scales: bool = True) -> Student:
    """Open the parameters of a plan's model.

    Args:
        job: the job.
        forms: of the plan.
        fitted: from `fit_forms`, with packed arrays.
        constants: whether biases and normalizations are parameters too.
        scales: whether scales of codes, and levels of scalar codebooks, are too.
    """
    opener = _Opener(job, scales=scales)
    fragments = {site.name: opener.add(site, forms[site.name], fitted) for site in chosen_sites(job, forms)}
    model = joined(job.model, fragments, chosen_sites(job, forms), fitted.cuts, fitted.constants)
    model = _rounded(job, forms, fitted, model)
    names = _tunable(model, opener.parameters) if constants else ()
    for name in names:
        tensor = next(tensor for tensor in model.proto.graph.initializer if tensor.name == name)
        opener.open(name, Plain(np.array(job.model.weights.read(tensor), np.float32), np.dtype(np.float32)))
    opened = _with_inputs(model, opener.parameters)
    return Student(opened, opener.parameters, opener.arrays, names, opener.skipped, fitted, forms, job)


class _Opener:
    """Makes parameters of the arrays of one form after the other."""

    def __init__(self, job: Job, *, scales: bool) -> None:
        self.job, self.scales = job, scales
        self.parameters: dict[str, Parameter] = {}
        self.arrays: dict[str, tuple[str | None, ...]] = {}
        self.skipped: dict[str, str] = {}
        self._taken = frozenset(all_names(job.model.proto))
        self._end = 0
        self._rng = np.random.default_rng((job.settings.seed, 4))

    def add(self, site: Site, form: Form, fitted: Fitted) -> Fragment:
        """A form in floats; its arrays are entered as parameters where they can be tuned."""
        specs, packed = array_specs(site, form), fitted.packed[site.name]
        storages, narrow = written_storages(form, len(specs), self.job.integers), array_narrow(form, len(specs))
        latents: list[Latent | str] = [
            latent_of(storage, packs, spec, axis, scales=self.scales) if site.scope == MAIN else "a weight of a nested graph"
            for storage, packs, (spec, axis) in zip(storages, packed, specs, strict=True)
        ]
        reasons = [latent for latent in latents if isinstance(latent, str)]
        if reasons:
            self.skipped[site.name] = reasons[0]
        arrays: list[tuple[Array]] = [
            (storage.decode(packs, spec) if isinstance(latent, str) else spec,)
            for latent, storage, packs, (spec, _) in zip(latents, storages, packed, specs, strict=True)
        ]
        part = fragment(
            site, replace(form, storage="float", arithmetic="float"), tuple(arrays), self.job.model.proto, self._taken, self.job.integers
        )
        names: list[str | None] = []
        for latent, name, number in zip(latents, part.initializers, range(len(specs)), strict=False):
            if isinstance(latent, str):
                names.append(None)
                continue
            largest = self.job.integers.largest_code(form.arithmetic)
            axis = rounding_axis(form, storages[number], packed[number], *specs[number]) if narrow[number] else None
            self.open(name, latent, self._start(site, form, latent), axis, largest)
            names.append(name)
        self.arrays[site.name] = tuple(names)
        return replace(part, changes=fitted.fragments[site.name].changes)

    def open(self, name: str, latent: Latent, start: Float32 | None = None, axis: int | None = None, largest: int = LARGEST) -> None:
        """Enter a parameter."""
        start = latent.start if start is None else start
        part = slice(self._end, self._end + len(start))
        self.parameters[name], self._end = Parameter(name, latent, start, part, axis, largest), part.stop

    def _start(self, site: Site, form: Form, latent: Latent) -> Float32:
        """The weight before it was rounded; of a factor, which is not known any more, something that is rounded to the same."""
        if not isinstance(latent, (Rounded, Levelled)):
            return latent.start
        whole = form.decomposition == "dense"
        aim = np.asarray(site.value(self.job.model), np.float32).reshape(-1) if whole else scattered(latent, self._rng)
        return within_cells(latent, aim)


def rounding_axis(form: Form, storage: Storage, packed: Sequence[NDArray[np.generic]], spec: Spec, axis: int) -> int | None:
    """The axis of the scales to which a stored array is rounded when it is run in int8; None where it runs as it is stored."""
    if not reads_bytes(form):
        return None
    return axis if storage.emit_integer(Emitter(Target(_NEW_OPSET, True, "w")), "", tuple(packed), spec, axis) is None else None


def _rounded(job: Job, forms: Mapping[str, Form], fitted: Fitted, model: Model) -> Model:
    """The student with activations rounded where the plan's model will run in integers.

    Values inside a chain of factors have names of their own there and stay as they are.
    """
    operators = coupled_operators(fitted.fragments, carried_nodes(job, forms))
    if not operators:
        return model
    narrow = joined(job.model, fitted.fragments, chosen_sites(job, forms), fitted.cuts, fitted.constants)
    ranges = quantization_ranges(job, narrow, operators, quantized_values(narrow, operators))
    known = {name for node in model.proto.graph.node for name in node.output} | {value.name for value in model.proto.graph.input}
    return fake_quantized(model, [name for name in ranges if name in known], ranges)


def _tunable(model: Model, parameters: Mapping[str, Parameter]) -> tuple[str, ...]:
    """Names of the initializers of the main graph that hold one number per channel, and are added or multiplied by all that read them."""
    index = ValueIndex(model.proto)
    taken = {value.name for value in (*model.proto.graph.input, *model.proto.graph.output)} | set(parameters)
    return tuple(
        tensor.name
        for tensor in model.proto.graph.initializer
        if tensor.name not in taken and _is_per_channel(tensor) and _is_constant(index, tensor.name)
    )


def _is_per_channel(tensor: TensorProto) -> bool:
    size = math.prod(tensor.dims)
    return tensor.data_type == TensorProto.FLOAT and 1 < size == max(tensor.dims, default=0) <= _LARGEST_CONSTANT


def _is_constant(index: ValueIndex, name: str) -> bool:
    uses = index.uses(name)
    return bool(uses) and all(use.scope.path == MAIN and use.index in _CONSTANTS.get(use.node.op_type, ()) for use in uses)


def _with_inputs(model: Model, parameters: Mapping[str, Parameter]) -> Model:
    """The model with inputs in place of the parameters' initializers."""
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    graph = proto.graph
    listed = {value.name for value in graph.input}
    kept = [tensor for tensor in model.proto.graph.initializer if tensor.name not in parameters]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    graph.input.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, parameter.latent.shape)
        for name, parameter in parameters.items()
        if name not in listed
    )
    return replace(model, proto=proto)
