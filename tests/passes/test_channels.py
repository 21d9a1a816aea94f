"""Channel groups: what is found, what is refused and why, and that cutting superfluous channels changes no output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from intaglio.ops.moment import Moment
from intaglio.ops.pruning import block_indices, channel_order, pruning_errors
from intaglio.passes.channels import (
    ChannelGroup,
    Reader,
    Slice,
    find_channel_groups,
    prune,
    pruned_attributes,
    pruned_constants,
    pruned_shape,
    pruned_weight,
)
from intaglio.passes.data import input_specs, open_dataset
from intaglio.passes.load import load
from intaglio.passes.model import Model
from intaglio.passes.sites import Sites, find_sites
from tests.models import Array, assert_close, moments, normal, parse, run, with_weight
from tests.passes.test_calibrate import patches

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


def exact_moments(found: Found, feed: Mapping[str, Array]) -> dict[str, Moment]:
    """The same from float64 sums; for 3 x 3 kernels padded by one, 1 x 1 kernels and products of rows."""
    named = onnx.ModelProto()
    named.CopyFrom(found.proto)
    sites = [site for site in found.sites if site.use.view.groups == 1]
    named.graph.output.extend(onnx.ValueInfoProto(name=site.use.node.input[0]) for site in sites)
    exact = {}
    for site, value in zip(sites, run(named, feed)[1:], strict=True):
        kernel, wide = site.shape[2:], site.shape[2:] == (3, 3)
        rows = patches(value.astype(np.float64), kernel, [int(wide)] * 4, [1, 1], [1, 1]) if kernel else value.astype(np.float64)[None]
        exact[site.name] = Moment(rows.transpose(0, 2, 1) @ rows / rows.shape[1], rows.shape[1])
    return exact


def checked(model: Model) -> onnx.ModelProto:
    """The model's proto, valid in every detail."""
    onnx.checker.check_model(model.proto, full_check=True)
    onnx.shape_inference.infer_shapes(model.proto, check_type=True, strict_mode=True, data_prop=True)
    return model.proto


Statistics = Callable[[Found, Mapping[str, Array]], dict[str, Moment]]


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


def test_a_plain_chain() -> None:
    found = network(f"{FIRST} r = Relu (a) b = Conv <{PAD}> (r, c2, b2) z = Relu (b) {LAST}")
    first, second, last = found.groups.values()
    assert first == ChannelGroup("a", 12, ("c1",), (Reader("c2", 9),), (Slice("b1", 0, 1),), ("b1",), (), (), {}, ("a", "r"), None)
    assert second == ChannelGroup("b", 12, ("c2",), (Reader("c3", 1),), (Slice("b2", 0, 1),), ("b2",), (), (), {}, ("b", "z"), None)
    assert (last.producers, last.reason) == (("c3",), "an output of the graph; no layer reads it")
    smaller = assert_lossless(found, ["a", "b"], images())
    assert dims(smaller.proto) == {"c1": (11, 3, 3, 3), "b1": (11,), "c2": (11, 11, 3, 3), "b2": (11,), "c3": (8, 11, 1, 1)}


def test_a_residual_stream_is_one_group() -> None:
    body = f"""{FIRST} r = Relu (a) b = Conv <{PAD}> (r, c2, b2) s = Add (b, r) q = Relu (s)
        d = Conv <{PAD}> (q, c4) z = Add (q, d) {LAST}"""
    found = network(body, extra={"c4": normal(20, 12, 12, 3, 3)})
    group = found.groups["a"]
    assert [name for name, each in found.groups.items() if each.prunable] == ["a"]
    assert group.producers == ("c1", "c2", "c4")
    assert group.consumers == (Reader("c2", 9), Reader("c4", 9), Reader("c3", 1))
    assert set(group.values) == {"a", "r", "b", "s", "q", "d", "z"}
    smaller = assert_lossless(found, ["a"], images())
    assert dims(smaller.proto)["c4"] == (11, 11, 3, 3)


CHANNELWISE = {
    "activations": "p = LeakyRelu (a) q = HardSwish (p) r = Clip (q, , six) z = Identity (r)",
    "dropout": "z = Dropout (a)",
    "scalars": "p = Mul (a, half) q = Erf (p) r = Add (one, q) z = Mul (a, r)",
    "constants": "p = Mul (slope, a) q = Add (p, plane) r = Add (q, image) z = Sub (r, whole)",
    "prelu": "z = PRelu (a, slope)",
    "a slope for all": "z = PRelu (a, half)",
    "batch normalization": "z = BatchNormalization (a, scale, shift, mean, var)",
    "instance normalization": "z = InstanceNormalization (a, scale, shift)",
    "pools": f"p = MaxPool <kernel_shape = [3, 3], {PAD}> (a) z = AveragePool <kernel_shape = [2, 2]> (p)",
    "depthwise": f"z = Conv <group = 12, {PAD}> (a, dw, shift)",
    "depthwise without bias": f"z = Conv <group = 12, {PAD}> (a, dw)",
    "a gate": "p = GlobalAveragePool (a) q = Conv (p, c5) t = Relu (q) u = Conv (t, c6) v = Sigmoid (u) z = Mul (a, v)",
    "a gate of vectors": """p = ReduceMean <keepdims = 0> (a, spatial) q = MatMul (p, m5) u = Sigmoid (q)
        v = Unsqueeze (u, spatial) z = Mul (v, a)""",
    "one gate for all channels": "p = Conv (a, c7) q = Sigmoid (p) z = Mul (q, a)",
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


@pytest.mark.parametrize("name", CHANNELWISE)
def test_operators_that_treat_each_channel_by_itself(name: str) -> None:
    found = network(f"{FIRST} {CHANNELWISE[name]} {LAST}", extra=MORE)
    assert found.groups["a"].prunable
    assert "c3" in [reader.site for reader in found.groups["a"].consumers]
    assert_lossless(found, ["a"], images())


def test_a_depthwise_weight_is_cut_along() -> None:
    found = network(f"{FIRST} z = Conv <group = 12, {PAD}> (a, dw, shift) {LAST}")
    group = found.groups["a"]
    assert (group.producers, group.depthwise, group.grouped) == (("c1",), ("dw",), ("z",))
    assert group.slices == (Slice("b1", 0, 1), Slice("dw", 0, 1), Slice("shift", 0, 1))
    assert (group.biases, pruned_attributes(group, 7)) == (("b1",), {"z": 7})
    smaller = assert_lossless(found, ["a"], images())
    assert helper.get_node_attr_value(smaller.proto.graph.node[1], "group") == 11


TO_ROWS: dict[str, tuple[str, list[int]]] = {
    "flatten": ("f = Flatten (a)", []),
    "copied batch": ("f = Reshape (a, s)", [0, -1]),
    "inferred batch": ("f = Reshape (a, s)", [-1, 192]),
    "spelled out": ("f = Reshape (a, s)", [0, 192]),
}
"""Text, and the shape s."""


@pytest.mark.parametrize("name", TO_ROWS)
def test_each_channel_becomes_a_block_behind_a_flatten(name: str) -> None:
    text, shape = TO_ROWS[name]
    constants = {"s": np.array(shape), "each": normal(30, 192)}
    found = network(f"{FIRST} {text} m = Mul (f, each) r = Relu (m) y = Gemm <transB = 1> (r, head)", FLAT, constants)
    group = found.groups["a"]
    assert group.prunable
    assert group.consumers == (Reader("head", 16),)
    assert Slice("each", 0, 16) in group.slices
    assert dict(group.reshapes) == ({"s": (0, -1)} if 192 in shape else {})
    smaller = assert_lossless(found, ["a"], images(600))
    assert dims(smaller.proto)["head"] == (10, 176)


def test_a_fixed_batch_may_be_spelled_out() -> None:
    head = "g (float[5, 3, 4, 4] x) => (float[5, 10] y)"
    found = network(f"{FIRST} f = Reshape (a, s) y = Gemm <transB = 1> (f, head)", head, {"s": np.array([5, 192])})
    group = found.groups["a"]
    assert dict(group.reshapes) == {"s": (5, -1)}
    same = prune(found.model, found.sites, [group], {"a": np.arange(12)}, {})
    assert_close(run(checked(same), images(5)), run(found.proto, images(5)), 0)


def test_rows_behind_a_global_pool() -> None:
    found = network(f"{FIRST} p = GlobalAveragePool (a) s = Squeeze (p, spatial) y = MatMul (s, pooled)", FLAT)
    assert found.groups["a"].consumers == (Reader("pooled", 1),)
    assert_lossless(found, ["a"], images())


def test_the_hidden_units_of_matrix_products() -> None:
    """Inputs first, a bias in an Add, and more axes than the model says."""
    extra = {"up": normal(40, 16, 24), "bias": normal(41, 24), "down": normal(42, 24, 16), "sqrt": np.float32(2**0.5), "one": np.float32(1)}
    body = "h = MatMul (x, up) b = Add (bias, h) d = Div (b, sqrt) e = Erf (d) f = Add (e, one) z = Mul (b, f) y = MatMul (z, down)"
    found = network(body, "g (float[N, S, 16] x) => (float[N, S, 16] y)", extra)
    assert found.groups["h"].slices == (Slice("bias", 0, 1),)
    smaller = assert_lossless(found, ["h"], images(100, 5, 16))
    assert dims(smaller.proto)["up"] == (16, 23)
    assert dims(smaller.proto)["down"] == (23, 16)


def test_a_gemm_between_gemms() -> None:
    products = {"up": normal(40, 24, 16), "middle": normal(42, 24, 20), "down": normal(43, 20, 10)}
    extra = {**products, "bias": normal(41, 1, 24), "c": normal(44, 1)}
    body = "h = Gemm <transB = 1, alpha = 0.5> (x, up, bias) r = Relu (h) m = Gemm (r, middle, c) s = Tanh (m) y = Gemm (s, down)"
    found = network(body, "g (float[N, 16] x) => (float[N, 10] y)", extra)
    assert (found.groups["h"].slices, found.groups["m"].slices) == ((Slice("bias", 1, 1),), ())
    assert_lossless(found, ["h", "m"], images(200, 16))


def test_transposed_convolutions_write_and_read_channels() -> None:
    body = "a = ConvTranspose <strides = [2, 2]> (x, t1, b1) r = Relu (a) y = ConvTranspose (r, t2)"
    found = network(body, extra={"t2": normal(50, 12, 5, 2, 2)})
    assert found.groups["a"].consumers == (Reader("t2", 1),)
    smaller = assert_lossless(found, ["a"], images())
    assert (dims(smaller.proto)["t1"], dims(smaller.proto)["t2"]) == ((3, 11, 2, 2), (11, 5, 2, 2))


def test_initializers_that_are_listed_as_inputs_change_their_shape_there_too() -> None:
    found = network(f"{FIRST} z = Relu (a) {LAST}", opset=8, ir_version=3)
    smaller = assert_lossless(found, ["a"], images())
    listed = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in smaller.proto.graph.input}
    assert (listed["c1"], listed["c3"]) == ([11, 3, 3, 3], [8, 11, 1, 1])


def test_written_shapes_of_pruned_values_go() -> None:
    found = network(f"{FIRST} z = Relu (a) q = Relu (z) w = Conv (q, c3) y = Relu (w)")
    proto = onnx.shape_inference.infer_shapes(found.proto)
    smaller = assert_lossless(trace(proto), ["a"], images())
    assert [value.name for value in proto.graph.value_info] == ["a", "z", "q", "w"]
    assert [value.name for value in smaller.proto.graph.value_info] == ["w"]


REFUSED = {
    "concat": (f"{FIRST} b = Conv <{PAD}> (x, c4) z = Concat <axis = 1> (a, b) y = Conv (z, c8)", "read by Concat"),
    "graph output": (f"y = Conv <{PAD}> (x, c1, b1) z = Relu (y) w = Conv (z, c3)", "an output of the graph"),
    "nested graph": (
        f"""{FIRST} z = Relu (a) {LAST}
        q = If (yes) <then_branch = t () => (float b) {{ b = Neg (z) }}, else_branch = e () => (float c) {{ c = Abs (z) }}>""",
        "read inside a nested graph",
    ),
    "transpose": (f"{FIRST} t = Transpose (a) z = Transpose (t) {LAST}", "read by Transpose"),
    "shape": (f"{FIRST} k = Shape (a) z = Reshape (a, k) {LAST}", "read by Shape"),
    "softmax": (f"{FIRST} z = Softmax <axis = 1> (a) {LAST}", "read by Softmax"),
    "grouped": (f"{FIRST} z = Conv <group = 2, {PAD}> (a, grouped) {LAST}", "a grouped Conv"),
    "multiplier": (f"{FIRST} b = Conv <group = 12, {PAD}> (a, twice) y = Conv (b, c8)", "a grouped Conv"),
    "unknown partner": (f"{FIRST} i = Conv <group = 3> (x, c9) z = Add (a, i) {LAST}", "Add meets 'i', whose channels are not known"),
    "another axis": (f"{FIRST} r = MatMul (x, m4) z = Add (a, r) {LAST}", "its channels meet others on another axis"),
    "indices": (f"{FIRST} z, i = MaxPool <kernel_shape = [2, 2]> (a) {LAST}", "MaxPool along another axis or with indices"),
    "training": (
        f"{FIRST} z, m, v = BatchNormalization <training_mode = 1> (a, scale, shift, mean, var) {LAST}",
        "BatchNormalization along another axis or by statistics of the batch",
    ),
    "reduced channels": (f"{FIRST} p = ReduceMean (a, one) z = Mul (a, p) {LAST}", "ReduceMean over the channels"),
    "rows of pixels": (f"{FIRST} r = Reshape (a, pixels) m = MatMul (r, pooled) y = Reshape (m, s)", "Reshape to [-1, 12], which may mix"),
    "another flatten": (f"{FIRST} r = Flatten <axis = 2> (a) m = MatMul (r, square) y = Reshape (m, s)", "Flatten that mixes channels"),
    "last axis": (f"{FIRST} y = MatMul (a, m4)", "MatMul reads it along another axis"),
    "computed weight": (f"{FIRST} z = Conv (a, a) {LAST}", "Conv whose weight is no site"),
    "tied": (f"{FIRST} r = Relu (a) b = Conv <{PAD}> (r, c2) z = Conv <{PAD}> (b, c2) {LAST}", "tied weight 'c2'"),
    "turned": (
        f"{FIRST} t = Transpose <perm = [1, 0, 2, 3]> (c2) z = Conv <{PAD}> (a, t) {LAST}",
        "weight 'c2' is turned round before it is used",
    ),
    "shared constant": (
        f"{FIRST} b = Conv <{PAD}> (x, c4, b1) p = Conv (a, c3) q = Conv (b, c3b) y = Add (p, q)",
        "constant 'b1' is read elsewhere too",
    ),
    "shared shape": (
        f"{FIRST} f = Reshape (a, row) m = Gemm <transB = 1> (f, head) v = Reshape (x, row) y = Mul (m, v)",
        "shape 'row' is read elsewhere too",
    ),
    "stored as integers": (
        f"{FIRST} d = DequantizeLinear (i8, half) z = Conv (a, d) y = Conv (z, c10)",
        "weight 'd' is stored in another type",
    ),
    "weight on the left": (f"{FIRST} f = Flatten (a) y = MatMul (left, f)", "MatMul with its operands turned round"),
    "computed parameter": (
        f"{FIRST} m = ReduceMax <keepdims = 0> (x) z = Clip (a, , m) {LAST}",
        "Clip with parameters that are no constant numbers",
    ),
    "constant node": (
        f"{FIRST} k = Constant <value = float[12, 1, 1] {{{', '.join('1' * 12)}}}> () z = Mul (a, k) {LAST}",
        "'k' is no initializer of its own",
    ),
    "nobody": (f"{FIRST} y = Conv (x, c11)", "no layer reads it"),
}
"""Text, and why the group of a (or y) stays."""

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


@pytest.mark.parametrize("name", REFUSED)
def test_channels_that_something_else_sees_stay(name: str) -> None:
    body, reason = REFUSED[name]
    found = network(body, "g (float[2, 3, 4, 4] x) => (float y)", OTHERS)
    (group,) = (group for group in found.groups.values() if "c1" in group.producers)
    assert not group.prunable
    assert reason in str(group.reason)


def test_a_refusal_reaches_every_part_of_a_group() -> None:
    """The residual stream is refused because of what reads its last sum; what was followed no further is refused too."""
    body = f"""{FIRST} b = Conv <{PAD}> (a, c2) q = Add (a, b) t = Transpose (q) u = Transpose (t)
        v = Conv <{PAD}> (x, c4) z = Add (u, v) {LAST}"""
    groups = network(body, extra=OTHERS).groups
    assert (groups["a"].producers, groups["a"].reason) == (("c1", "c2"), "read by Transpose")
    assert groups["v"].reason == "Add meets 'u', whose channels are not known; no layer reads it"


def test_an_axis_of_the_same_length_is_another_axis() -> None:
    groups = network(
        "a = Conv <pads = [1, 1, 1, 1]> (x, square) y = MatMul (a, m4)", extra={**OTHERS, "square": normal(70, 4, 3, 3, 3)}
    ).groups
    assert groups["a"].reason == "MatMul reads it along another axis; no layer reads it"


def test_both_sides_of_a_tied_weight_stay() -> None:
    body = f"{FIRST} r = Relu (a) b = Conv <{PAD}> (r, c2) z = Conv <{PAD}> (b, c2) {LAST}"
    reasons = {name: group.reason for name, group in network(body).groups.items()}
    assert reasons == {"a": "tied weight 'c2'; no layer reads it", "b": "tied weight 'c2'; no layer reads it"} | {
        "z": "tied weight 'c2'",
        "y": "an output of the graph; no layer reads it",
    }


def test_a_constant_that_callers_may_override_stays() -> None:
    proto = parse(f"{HEAD} {{ {FIRST} z = Mul (a, slope) {LAST} }}", {k: WEIGHTS[k] for k in ("c1", "b1", "slope", "c3")})
    assert trace(proto).groups["a"].prunable
    proto.graph.input.append(helper.make_tensor_value_info("slope", 1, [12, 1, 1]))
    assert trace(proto).groups["a"].reason == "'slope' is no initializer of its own; no layer reads it"


def test_a_single_channel_is_no_choice() -> None:
    found = network(f"{FIRST} p = Conv (a, c7) q = Sigmoid (p) z = Mul (q, a) {LAST}", extra=MORE)
    assert found.groups["p"].reason == "a single channel; no layer reads it"


def test_what_pruning_loses_is_what_was_predicted() -> None:
    """A last layer without bias: the mean square of its change, relative, is the closed form's; both from the same samples."""
    found = network(f"{FIRST} z = Relu (a) {LAST}")
    feed = images(12)  # few enough that no position is left out of the moment
    known = known_moments(found, feed)
    site = next(site for site in found.sites if site.name == "c3")
    layer = (site.matrix(site.value(found.model)), known["c3"], 1)
    order = channel_order([layer])
    (expected,) = run(found.proto, feed)
    for count in (3, 8):
        kept = {"a": np.sort(order[-count:])}
        (actual,) = run(checked(prune(found.model, found.sites, list(found.groups.values()), kept, known)), feed)
        measured = np.square(actual - expected).sum() / np.square(expected).sum()
        assert measured == pytest.approx(pruning_errors(*layer, order, [count])[0], rel=1e-4)  # sums in float32


def test_the_pieces_are_what_the_whole_is_made_of() -> None:
    body = f"{FIRST} m = Conv <group = 12, {PAD}> (a, dw) r = Relu (m) b = Conv <{PAD}> (r, c2, b2) z = Relu (b) {LAST}"
    found, feed = network(body), images()
    known = known_moments(found, feed)
    kept = {"a": np.array([0, 3, 4, 9]), "b": np.array([1, 2, 11])}
    smaller = prune(found.model, found.sites, list(found.groups.values()), kept, known)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in checked(smaller).graph.initializer}
    middle = next(site for site in found.sites if site.name == "c2")
    both = pruned_weight(middle, middle.value(found.model), known["c2"], 9, kept["a"], kept["b"])
    np.testing.assert_array_equal(both, stored["c2"])
    assert both.dtype == np.float32
    assert both.shape == pruned_shape(middle, 9, 4, 3) == (3, 4, 3, 3)
    constants = pruned_constants(found.model, found.groups["a"], kept["a"])
    assert sorted(constants) == ["b1", "dw"]
    for name, array in constants.items():
        np.testing.assert_array_equal(array, stored[name])
        np.testing.assert_array_equal(array, WEIGHTS[name][kept["a"]])
    rows = pruned_weight(middle, middle.value(found.model), known["c2"], 1, None, kept["b"])
    np.testing.assert_array_equal(rows, WEIGHTS["c2"][kept["b"]])
    assert rows.shape == pruned_shape(middle, 1, None, 3)


def test_a_consumer_without_statistics_is_only_cut() -> None:
    found = network(f"{FIRST} z = Relu (a) {LAST}")
    smaller = prune(found.model, found.sites, list(found.groups.values()), {"a": np.array([2, 5])}, {})
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(smaller.proto.graph.initializer[2]), WEIGHTS["c3"][:, [2, 5]])
    checked(smaller)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"q": np.array([0])}, "channels of 'q': no such group"),
        ({"y": np.array([0])}, "channels of 'y': an output of the graph"),
        ({"a": np.array([3, 12])}, "expected ascending numbers from 0 to 11"),
        ({"a": np.array([], np.int64)}, "at least one"),
    ],
)
def test_impossible_requests(kept: Mapping[str, Array], message: str) -> None:
    found = network(f"{FIRST} z = Relu (a) {LAST}")
    with pytest.raises(ValueError, match=message):
        prune(found.model, found.sites, list(found.groups.values()), kept, {})


BLOCKS = ("conv", "relu", "normalization", "depthwise", "residual", "pool", "gate")


def random_network(blocks: list[str], flat: bool, seed: int) -> Found:
    """A small CNN on (N, 3, 4, 4) of the given blocks, with 6 channels everywhere and an image of 4 x 4 up to the head."""
    weights: dict[str, Array] = {"stem": normal(seed, 6, 3, 3, 3), "head": normal(seed + 1, 96 if flat else 6, 5)}
    lines, value = [f"v = Conv <{PAD}> (x, stem)"], "v"
    for number, block in enumerate(blocks):
        after = f"v{number}"

        def weight(name: str, *shape: int, number: int = number) -> str:
            weights[f"{name}{number}"] = normal(seed + 10 * number + len(weights), *shape)
            return f"{name}{number}"

        if block in ("conv", "residual"):
            line = f"Conv <{PAD}> ({value}, {weight('w', 6, 6, 3, 3)}, {weight('b', 6)})"
            line = line if block == "conv" else f"{line} {after} = Add (s{number}, {value})"
            lines.append(f"{after if block == 'conv' else f's{number}'} = {line}")
        elif block == "relu":
            lines.append(f"{after} = LeakyRelu <alpha = 0.3> ({value})")
        elif block == "normalization":
            parameters = ", ".join(weight(name, 6) for name in ("scale", "shift", "mean", "var"))
            weights[f"var{number}"] = np.abs(weights[f"var{number}"]) + np.float32(0.5)
            lines.append(f"{after} = BatchNormalization ({value}, {parameters})")
        elif block == "depthwise":
            lines.append(f"{after} = Conv <group = 6, {PAD}> ({value}, {weight('w', 6, 1, 3, 3)})")
        elif block == "pool":
            lines.append(f"{after} = MaxPool <kernel_shape = [3, 3], {PAD}> ({value})")
        else:
            gate = f"g{number} = GlobalAveragePool ({value}) h{number} = Conv (g{number}, {weight('w', 6, 6, 1, 1)})"
            lines.append(f"{gate} i{number} = Sigmoid (h{number}) {after} = Mul ({value}, i{number})")
        value = after
    head = f"f = Flatten ({value})" if flat else f"p = GlobalAveragePool ({value}) f = Flatten (p)"
    text = f"g (float[N, 3, 4, 4] x) => (float[N, 5] y) {{ {' '.join(lines)} {head} y = MatMul (f, head) }}"
    return trace(parse(text, weights))


@settings(max_examples=60)
@given(st.lists(st.sampled_from(BLOCKS), max_size=6), st.booleans(), st.integers(0, 1000))
def test_dropping_a_duplicate_is_lossless(blocks: list[str], flat: bool, seed: int) -> None:
    found = random_network(blocks, flat, seed)
    names = [name for name, group in found.groups.items() if group.prunable]
    assert len(names) == 1 + blocks.count("conv")
    assert_lossless(found, names, images(120), exact_moments)  # pooled and filtered images leave directions below float32's rounding
