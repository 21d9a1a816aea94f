"""Price candidates in bytes, exactly, before any array exists.

Bytes come from a *skeleton*, the model with its large payloads left out but counted: the rewriter runs on it with shapes in place of
arrays, so the serialized size of a whole plan is known to the byte.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from intaglio.ops.emit import DOMAIN, Array, Spec, spec_of
from intaglio.ops.form import CARRIED, PRUNED, UNCHANGED, Form

from .assemble import assemble, nominal_ranges
from .graph import all_names, field_size
from .kernels import INTEGERS, Integers
from .model import Model
from .prune import Channels
from .regions import find_carriers
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

    def read(self, tensor: TensorProto) -> NDArray[Any]:
        """The values, or zeros where a skeleton has none: good enough for what is cut by position."""
        if tensor.data_location != TensorProto.EXTERNAL:
            return super().read(tensor)
        return np.broadcast_to(np.zeros((), helper.tensor_dtype_to_np_dtype(tensor.data_type)), tuple(tensor.dims))

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

    def __init__(
        self,
        model: Model,
        integers: Integers = INTEGERS["full"],
        *,
        external: bool,
        name: str = "model.onnx",
        domains: Collection[str] = (),
    ) -> None:
        """Make the skeleton of the model that plans start from.

        Args:
            model: the model.
            integers: that operators compute with.
            external: whether its weights will be saved beside it.
            name: of the file.
            domains: as for `assemble`.
        """
        self._source, self._model, self._integers = model, skeleton(model), integers
        self._sites = {site.name: site for site in find_sites(self._model)}
        self._taken = frozenset(all_names(self._model.proto))
        self._domains = ("", "ai.onnx", *(entry.domain for entry in model.proto.opset_import))
        self._external, self._name, self._extra = external, name, domains
        self._channels: Channels | None = None
        self._freed: dict[tuple[str, bool], int] = {}
        self.base_bytes = self._size(self._model)
        self._carriers = {carrier.name: carrier for carrier in find_carriers(self._model)}
        self.shared: dict[str, int] = {DOMAIN_RESOURCE: 0}

    def price(self, site: Site, form: Form) -> SizePrice:
        """Bytes that a form adds or saves."""
        if form == UNCHANGED:
            return SizePrice(0, ())
        part = self._fragment(site.name, form)
        added, shared = self._added(part), self._shared(part)
        key = (site.name, bool(part.replacements))
        if key not in self._freed:
            fixed = sum(self.shared[name] for name in shared)
            twin = self._sites[site.name]
            self._freed[key] = self.base_bytes + added + fixed - self._size(rewrite(self._model, {site.name: part}, [twin]))
        return SizePrice(added - self._freed[key], shared)

    def total(self, plan: Mapping[str, Form]) -> int:
        """Bytes of the file (and its data file) that `save` will write for a plan."""
        parts = {name: self._fragment(name, form) for name, form in plan.items() if form not in (UNCHANGED, CARRIED)}
        carried = [self._carriers[name] for name, form in plan.items() if form == CARRIED]
        cuts = self._groups().cuts(plan) if any(form.decomposition == PRUNED for form in plan.values()) else ()
        return self._size(assemble(self._model, parts, list(self._sites.values()), carried, nominal_ranges, cuts, domains=self._extra))

    def overlap_bytes(self, forms: Mapping[str, Form]) -> int:
        """Bytes that the prices of several sites count more than once where their fragments share a node.

        Args:
            forms: by site name.
        """
        prices = [self.price(self._sites[name], form) for name, form in forms.items()]
        fixed = sum(self.shared[name] for name in dict.fromkeys(name for price in prices for name in price.shared))
        return self.base_bytes + sum(price.size_bytes for price in prices) + fixed - self.total(forms)

    def _groups(self) -> Channels:
        """The model's channel groups, found where a plan prunes some."""
        if self._channels is None:
            self._channels = Channels.find(self._source, find_sites(self._source).sites)
        return self._channels

    def pair_bytes(self, value: str) -> int:
        """About what quantizing an activation value adds to the file: two nodes, a scale and a zero point."""
        parameters = [f"{value}_scale", f"{value}_zero_point"]
        nodes = [
            helper.make_node("QuantizeLinear", [value, *parameters], [f"{value}_quantized"]),
            helper.make_node("DequantizeLinear", [f"{value}_quantized", *parameters], [f"{value}_dequantized"]),
        ]
        arrays = (Spec((), np.dtype(np.float32)), Spec((), np.dtype(np.uint8)))
        return sum(map(field_size, nodes)) + sum(_initializer_bytes(n, spec) for n, spec in zip(parameters, arrays, strict=True))

    def weight_bytes(self, site: Site, form: Form) -> int:
        """Payload of a form's arrays; of the stored tensors for "unchanged"."""
        if form == UNCHANGED:
            return sum(self._model.weights.nbytes(tensor) for tensor in self._sites[site.name].sources)
        return sum(array.nbytes for packed in ghosts(site, form) for array in packed)

    def _fragment(self, name: str, form: Form) -> Fragment:
        site = self._sites[name]
        return fragment(site, form, ghosts(site, form), self._model.proto, self._taken, self._integers)

    def _size(self, model: Model) -> int:
        return serialized_size(model, self._external, name=self._name)

    def _added(self, part: Fragment) -> int:
        nodes = [*part.weights, *(node for nodes in part.replacements for node in nodes)]
        arrays = sum(_initializer_bytes(name, Spec(tuple(a.shape), a.dtype)) for name, a in part.initializers.items())
        return sum(field_size(node) for node in nodes) + arrays

    def _shared(self, part: Fragment) -> tuple[str, ...]:
        shared: list[str] = []
        for node in (*part.weights, *(node for nodes in part.replacements for node in nodes)):
            if node.domain not in (DOMAIN, *self._domains, *shared):
                self.shared[node.domain] = field_size(helper.make_opsetid(node.domain, 1))
                shared.append(node.domain)
        if self._model.proto.ir_version < FUNCTION_IR or not part.programs:
            return tuple(shared)
        for name, program in part.programs.items():
            if name not in self.shared:
                self.shared[name] = field_size(program.function(opset(self._model.proto))) + 1  # field 25: two bytes of tag
        self.shared[DOMAIN_RESOURCE] = field_size(helper.make_opsetid(DOMAIN, 1))
        return (*shared, *sorted(part.programs), DOMAIN_RESOURCE)


def _initializer_bytes(name: str, spec: Spec) -> int:
    """What an initializer costs as an element of a graph."""
    tensor = ghost_tensor(name, spec)
    tensor.ClearField("data_location")
    payload = spec.nbytes
    body = int(tensor.ByteSize()) + 1 + _varint_bytes(payload) + payload
    return 1 + _varint_bytes(body) + body


def _varint_bytes(value: int) -> int:
    return max(1, -(-value.bit_length() // 7))


def packed_noise(packed: Sequence[Array], rng: np.random.Generator) -> tuple[NDArray[np.generic], ...]:
    """Random values for the arrays of one storage, such that what they decode to is about as large as weights are.

    Activations then stay ordinary numbers: larger ones would saturate a Softmax, and its denormal numbers are slow.
    """
    arrays = tuple(noise(array, rng) for array in packed)
    codes = [array for array in arrays if array.dtype.kind in "iu" and array.size]
    if not codes:
        return arrays
    step = 1 / (32 * max(codes[0].shape) ** 0.5)
    return tuple(np.full_like(array, step) if array.dtype.kind in "fV" else array for array in arrays)


_ADMITTED = min(each.largest_code(name) for each in INTEGERS.values() for name in ("integer", "dynamic"))
"""Magnitude of codes of weights that operators in integers compute with whatever the variant."""


def noise(array: Array, rng: np.random.Generator) -> NDArray[np.generic]:
    """Random values of an array's shape and dtype, scaled like weights; bytes are spread like quantized weights, other integers are zeros.

    Processors multiply zeros faster: by a tenth in the 8-bit kernels for whole models. Signed bytes are codes that every kernel admits.
    """
    spec = spec_of(array)
    if spec.dtype in (np.int8, np.uint8):
        codes = np.clip(np.rint(np.float32(32) * rng.standard_normal(spec.shape, np.float32)), -_ADMITTED, _ADMITTED).astype(np.int8)
        return np.asarray(codes.view(np.uint8) ^ np.uint8(128)) if spec.dtype == np.uint8 else codes
    if spec.dtype.kind in "iu":
        return np.zeros(spec.shape, spec.dtype)
    return np.asarray(rng.standard_normal(spec.shape) / max(1, spec.shape[-1]) ** 0.5, spec.dtype)
