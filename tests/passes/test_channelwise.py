"""Operators between layers: which hand channels on, what they take along, and which end a group."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from intaglio.passes.groups import Reader, Slice
from tests.models import assert_close, normal, run
from tests.passes.pruning import FIRST, FLAT, LAST, MORE, PAD, assert_lossless, checked, dims, images, network, prune, reason_of_the_first

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
    assert group.biases == ("b1",)
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


REFUSED = {
    "concat": (f"{FIRST} b = Conv <{PAD}> (x, c4) z = Concat <axis = 1> (a, b) y = Conv (z, c8)", "read by Concat"),
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
    "computed weight": (f"{FIRST} z = Conv (a, a) {LAST}", "Conv whose weight is no site"),
    "computed parameter": (
        f"{FIRST} m = ReduceMax <keepdims = 0> (x) z = Clip (a, , m) {LAST}",
        "Clip with parameters that are no constant numbers",
    ),
    "constant node": (
        f"{FIRST} k = Constant <value = float[12, 1, 1] {{{', '.join('1' * 12)}}}> () z = Mul (a, k) {LAST}",
        "'k' is no initializer of its own",
    ),
}
"""Text, and why the group that c1 writes stays."""


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    body, reason = REFUSED[name]
    assert reason in reason_of_the_first(body)
