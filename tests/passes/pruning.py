"""What the tests of pruning share: small networks, a reference, and that dropping a duplicate channel changes no output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import helper

from intaglio.ops.form import PRUNED, Form
from intaglio.ops.moment import Moment
from intaglio.ops.pruning import block_indices
from intaglio.passes.channels import find_channel_groups
from intaglio.passes.cuts import Cut, cut_between, pruned_weight
from intaglio.passes.data import input_specs, open_dataset
from intaglio.passes.groups import ChannelGroup
from intaglio.passes.job import Job
from intaglio.passes.load import load
from intaglio.passes.model import Model
from intaglio.passes.refit import channels_of
from intaglio.passes.sites import Site, Sites, find_sites
from tests.models import Array, assert_close, moments, normal, parse, run, with_weight

LOSSLESS = 2e-5
"""Of the largest output: float32 rounding of a few layers, and the ridge of 1e-9 divided by eigenvalues that are seldom below 1e-4."""

WEIGHTS = {
    "c1": normal(1, 12, 3, 3, 3),
    "b1": normal(2, 12),
    "c2": normal(3, 12, 12, 3, 3),
    "b2": normal(4, 12),
    "c3": normal(5, 8, 12, 1, 1),
    "dw": normal(6, 12, 1, 3, 3),
    "grouped": normal(7, 12, 6, 3, 3),
    "slope": normal(8, 12, 1, 1),
    "scale": np.abs(normal(9, 12)) + np.float32(0.5),
    "shift": normal(10, 12),
    "mean": normal(11, 12),
    "var": np.abs(normal(12, 12)) + np.float32(0.5),
    "half": np.float32(0.5),
    "head": normal(13, 10, 192),
    "pooled": normal(14, 12, 10),
    "t1": normal(15, 3, 12, 2, 2),
    "spatial": np.array([2, 3]),
}

MORE = {
    "six": np.float32(6),
    "one": np.float32(1),
    "plane": normal(21, 4, 4),
    "image": normal(22, 1, 12, 4, 4),
    "whole": normal(23, 1, 1, 1, 1),
    "c5": normal(24, 6, 12, 1, 1),
    "c6": normal(25, 12, 6, 1, 1),
    "c7": normal(26, 1, 12, 1, 1),
    "m5": normal(27, 12, 12),
}

OTHERS = {
    "c4": normal(60, 12, 3, 3, 3),
    "c8": normal(61, 8, 24, 1, 1),
    "twice": normal(62, 24, 1, 3, 3),
    "c9": normal(63, 12, 1, 1, 1),
    "m4": normal(64, 4, 4),
    "one": np.array([1]),
    "pixels": np.array([-1, 12]),
    "s": np.array([-1, 1, 1, 1]),
    "row": np.array([0, 192]),
    "square": normal(65, 16, 8),
    "c3b": normal(66, 8, 12, 1, 1),
    "i8": np.ones((12, 12, 1, 1), np.int8),
    "c10": normal(67, 8, 12, 1, 1),
    "left": normal(68, 7, 2),
    "c11": normal(69, 12, 3, 1, 1),
    "yes": np.array(True),
}

HEAD = "g (float[N, 3, 4, 4] x) => (float[N, K, P, Q] y)"
FLAT = "g (float[N, 3, 4, 4] x) => (float[N, 10] y)"
PAD = "pads = [1, 1, 1, 1]"
FIRST = f"a = Conv <{PAD}> (x, c1, b1)"
LAST = "y = Conv (z, c3)"


@dataclass(frozen=True)
class Found:
    """A model with what was found in it."""

    proto: onnx.ModelProto
    model: Model
    sites: Sites
    groups: Mapping[str, ChannelGroup]


def trace(proto: onnx.ModelProto) -> Found:
    model = load(proto)
    sites = find_sites(model, min_elements=1)
    return Found(proto, model, sites, {group.name: group for group in find_channel_groups(model, sites)})


def network(body: str, head: str = HEAD, extra: Mapping[str, Array] | None = None, *, opset: int = 18, ir_version: int = 9) -> Found:
    """A model of the weights that its text names."""
    everything = {**WEIGHTS, **(extra or {})}
    words = set(body.replace(",", " ").replace("(", " ").replace(")", " ").split())
    return trace(parse(f"{head} {{ {body} }}", {k: v for k, v in everything.items() if k in words}, opset=opset, ir_version=ir_version))


def reason_of_the_first(body: str) -> str:
    """Why the group stays that c1 writes."""
    found = network(body, "g (float[2, 3, 4, 4] x) => (float y)", OTHERS)
    (group,) = (group for group in found.groups.values() if "c1" in group.producers)
    assert not group.prunable
    return str(group.reason)


def images(count: int = 150, *shape: int) -> dict[str, Array]:
    return {"x": np.random.default_rng(7).standard_normal((count, *(shape or (3, 4, 4)))).astype(np.float32)}


def repeated(found: Found, group: ChannelGroup, source: int, copy: int) -> Found:
    """The same network, in which one channel of a group is computed exactly as another is."""
    index = np.arange(group.size)
    index[copy] = source
    proto = found.proto
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    for site in found.sites:
        if site.name in group.producers:
            proto = with_weight(proto, site.anchor, np.take(tensors[site.anchor], index, 0 if site.use.view.outputs_first else 1))
    for part in group.slices:
        proto = with_weight(proto, part.initializer, np.take(tensors[part.initializer], block_indices(index, part.block), part.axis))
    return trace(proto)


def known_moments(found: Found, feed: Mapping[str, Array]) -> dict[str, Moment]:
    return moments(found.model, found.sites, open_dataset(feed, input_specs(found.proto)))


def checked(model: Model) -> onnx.ModelProto:
    """The model's proto, valid in every detail."""
    onnx.checker.check_model(model.proto, full_check=True)
    onnx.shape_inference.infer_shapes(model.proto, check_type=True, strict_mode=True, data_prop=True)
    return model.proto


Statistics = Callable[[Found, Mapping[str, Array]], dict[str, Moment]]


def prune(
    model: Model, sites: Iterable[Site], groups: Iterable[ChannelGroup], kept: Mapping[str, Array], moments: Mapping[str, Moment]
) -> Model:
    """A copy of a float model with fewer channels: the layers' weights one by one, then what lies between; the reference for builds.

    Args:
        model: the model.
        sites: its sites.
        groups: from `find_channel_groups`.
        kept: group name → channels that stay, ascending; groups without an entry stay whole.
        moments: site name → second moment of its input; a consumer without one is cut, not refitted.
    """
    cuts = [Cut(group, kept[group.name]) for group in groups if group.name in kept]
    reads = {reader.site: (reader.block, cut.kept) for cut in cuts for reader in cut.group.consumers}
    writes = {name: cut.kept for cut in cuts for name in cut.group.producers}
    kernels = {name: cut.kept for cut in cuts for name in cut.group.depthwise}
    weights: dict[str, Array] = {}
    for site in sites:
        value = site.value(model)
        if site.name in kernels:
            weights[site.anchor] = value[kernels[site.name]]
        elif site.name in reads or site.name in writes:
            block, inputs = reads.get(site.name, (1, None))
            moment = moments.get(site.name) or Moment.isotropic(1, site.use.view.n)
            weights[site.anchor] = pruned_weight(site, value, moment, block, inputs, writes.get(site.name))
    return cut_between(replace(model, proto=_with_weights(model.proto, weights)), cuts)


def _with_weights(proto: onnx.ModelProto, weights: Mapping[str, Array]) -> onnx.ModelProto:
    """A copy with other initializers, of other shapes."""
    for name, array in weights.items():
        proto = with_weight(proto, name, array)
        for value in proto.graph.input:  # where initializers are listed as inputs
            if value.name == name:
                value.CopyFrom(helper.make_tensor_value_info(name, value.type.tensor_type.elem_type, array.shape))
    return proto


def assert_lossless(found: Found, names: list[str], feed: Mapping[str, Array], statistics: Statistics = known_moments) -> Model:
    """Cut a copy out of each of the named groups and compare the outputs; returns the smaller model."""
    kept = {}
    for name in names:
        source, copy = 2, found.groups[name].size - 3
        found = repeated(found, found.groups[name], source, copy)
        kept[name] = np.delete(np.arange(found.groups[name].size), copy)
    before = found.proto.SerializeToString()
    smaller = prune(found.model, found.sites, list(found.groups.values()), kept, statistics(found, feed))
    assert found.model.proto.SerializeToString() == before
    assert_close(run(checked(smaller), feed), run(found.proto, feed), LOSSLESS)
    return smaller


def dims(proto: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}


def pruned_plan(job: Job, writer: str) -> dict[str, Form]:
    """A plan in which the channels that a site writes are cut as far as they may be, and everything is stored in four bits."""
    channels = channels_of(job)
    group = channels.groups[channels.writes[writer]]
    keep = channels.levels(group.name)[-1]
    forms = {}
    for site in job.sites:
        reads = channels.reads.get(site.name, ("", 1))[0] == group.name
        writes = channels.writes.get(site.name) == group.name
        inputs = site.shape[1] * keep // group.size if reads else site.shape[1]
        pruned = Form(PRUNED, (inputs, keep if writes else site.shape[0]), "int4")
        forms[site.name] = pruned if reads or writes else Form("dense", (), "int4")
    return forms
