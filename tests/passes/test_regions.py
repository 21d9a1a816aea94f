"""Carriers and units: what is found, and every reason for which something near is not."""

from __future__ import annotations

import numpy as np
import pytest

from intaglio.passes.graph import ValueIndex
from intaglio.passes.load import load
from intaglio.passes.price import skeleton
from intaglio.passes.regions import added_bias, clip_bounds, find_carriers, unit_output, value_types, varying
from tests.models import Array, normal, parse

ZERO, SIX = np.float32(0), np.float32(6)


def names(text: str, weights: dict[str, Array] | None = None, *, opset: int = 17) -> list[str]:
    """What `find_carriers` finds, by name."""
    return [carrier.name for carrier in find_carriers(load(parse(text, weights, opset=opset, ir_version=8)))]


def unit(body: str, weights: dict[str, Array] | None = None, outputs: str = "float[N, 8] y") -> tuple[str, list[str]]:
    """The output of the first node's unit, and the first outputs of what it absorbs."""
    proto = parse(f"g (float[N, 8] x, float[N, 8] z, bool p) => ({outputs}) {{ {body} }}", weights, ir_version=8)
    value, absorbed = unit_output(ValueIndex(proto), proto.graph.node[0])
    return value, [node.output[0] for node in absorbed]


W = normal(1, 8, 8)


@pytest.mark.parametrize(
    ("body", "weights", "expected"),
    [
        ("a = Add (x, z) y = Relu (a)", {}, ("y", ["y"])),
        ("a = Gemm (x, w) y = Clip (a, low, high)", {"w": W, "low": ZERO, "high": SIX}, ("y", ["y"])),
        ("a = Gemm (x, w) y = Clip (a, , high)", {"w": W, "high": SIX}, ("y", ["y"])),
        ("a = Gemm (x, w) low = Constant <value = float {-1.0}> () y = Clip (a, low)", {"w": W}, ("y", ["y"])),
        ("a = MatMul (x, w) b = Add (a, c) y = Relu (b)", {"w": W, "c": normal(2, 8)}, ("y", ["b", "y"])),
        ("a = MatMul (x, w) y = Add (c, a)", {"w": W, "c": normal(2, 1, 8)}, ("y", ["y"])),
        ("a = MatMul (x, w) y = Relu (a)", {"w": W}, ("y", ["y"])),
        ("a = MatMul (x, w) y = Add (a, c)", {"w": W, "c": normal(2, 3, 8)}, ("a", [])),  # no bias but a matrix
        ("a = MatMul (x, w) y = Add (a, z)", {"w": W}, ("a", [])),
        ("a = Gemm (x, w) y = Add (a, c)", {"w": W, "c": normal(2, 8)}, ("a", [])),  # a Gemm has its own
        ("a = Add (x, z) b = Relu (a) y = Mul (a, b)", {}, ("a", [])),  # read twice
        ("a = Add (x, z) y = Clip (a, low, high)", {"low": np.float32(1), "high": SIX}, ("a", [])),  # zero lies outside
        ("a = Add (x, z) y = Clip (a, x)", {}, ("a", [])),  # unknown bounds
        ("a = Add (x, z) s = ReduceMax <keepdims = 0> (a) y = Clip (z, s)", {}, ("a", [])),
        ("a = Tanh (x) y = Relu (a)", {}, ("a", [])),  # no integer kernel
        ("a = Transpose (x) y = Relu (a)", {}, ("a", [])),  # no scale of its own
        ("a = Add (x, z) y = Sigmoid (a)", {}, ("a", [])),
    ],
)
def test_units(body: str, weights: dict[str, Array], expected: tuple[str, list[str]]) -> None:
    assert unit(body, weights) == expected


def test_a_graph_output_is_not_absorbed() -> None:
    assert unit("a = Add (x, z) y = Relu (a)", outputs="float[N, 8] a, float[N, 8] y") == ("a", [])


def test_a_value_that_a_nested_graph_reads_is_not_absorbed() -> None:
    body = """a = Add (x, z) r = Relu (a)
        y = If (p) <then_branch = t () => (float[N, 8] u) { u = Neg (a) }, else_branch = e () => (float[N, 8] v) { v = Neg (r) }>"""
    assert unit(body) == ("a", [])
    only = """a = Add (x, z)
        y = If (p) <then_branch = t () => (float[N, 8] u) { u = Relu (a) }, else_branch = e () => (float[N, 8] v) { v = Neg (x) }>"""
    assert unit(only) == ("a", [])


def test_bounds_and_biases_that_a_caller_may_override_are_unknown() -> None:
    text = """g (float[N, 8] x, float low, float[8] c) => (float[N, 8] y) {
        a = MatMul (x, w) b = Add (a, c) y = Clip (b, low)
    }"""
    proto = parse(text, {"w": W, "low": ZERO, "c": normal(2, 8)}, ir_version=8)
    index = ValueIndex(proto)
    assert added_bias(index, proto.graph.node[1]) is None
    assert clip_bounds(index, proto.graph.node[2]) is None


def test_carriers_of_a_residual_network() -> None:
    text = """g (float[N, 3, 8, 8] x) => (float[N, 5] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, w1)
        r = Relu (a)
        c = Conv <pads = [1, 1, 1, 1]> (r, w2)
        s = Add (c, r)
        t = Relu (s)
        p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (t)
        u = Relu (p)
        j = Concat <axis = 1> (p, u, p)
        q = GlobalAveragePool (j)
        f = Reshape (q, shape)
        y = Gemm (f, w3)
    }"""
    weights = {"w1": normal(1, 4, 3, 3, 3), "w2": normal(2, 4, 4, 3, 3), "w3": normal(3, 12, 5), "shape": np.array([0, -1], np.int64)}
    model = load(parse(text, weights, ir_version=8))
    found = [(carrier.name, carrier.inputs, carrier.output) for carrier in find_carriers(model)]
    assert found == [
        ("s", ("c", "r"), "t"),
        ("p", ("t",), "p"),
        ("u", ("p",), "u"),  # MaxPool keeps its scale, so it absorbs nothing
        ("j", ("p", "u"), "j"),
        ("q", ("j",), "q"),
        ("f", ("q",), "f"),
    ]
    assert [carrier.node for carrier in find_carriers(model)] == [model.proto.graph.node[i] for i in (3, 5, 6, 7, 8, 9)]
    assert [carrier.name for carrier in find_carriers(skeleton(model))] == [name for name, _, _ in found]


NEAR_MISSES = {
    "constant operand": "g (float[N, 8] x) => (float[N, 8] y) { y = Add (x, c) }",
    "whole numbers": "g (int64[N, 8] x) => (int64[N, 8] y) { y = Add (x, x) }",
    "half precision": "g (float16[N, 8] x) => (float16[N, 8] y) { y = Add (x, x) }",
    "no kernel": "g (float[N, 8] x) => (float[N, 8] y) { y = Tanh (x) }",
    "another domain": "g (float[N, 8] x) => (float[N, 8] y) { y = com.microsoft.Gelu (x) }",
    "two outputs": "g (float[N, 8, 4] x) => (float[N, 8, 3] y, int64[N, 8, 3] i) { y, i = MaxPool <kernel_shape = [2]> (x) }",
    "computed shape": "g (float[N, 8] x, int64[2] s) => (float[M, K] y) { y = Reshape (x, s) }",
    "computed indices": "g (float[N, 8] x, int64[K] i) => (float[K, 8] y) { y = Gather (x, i) }",
    "large parameter": "g (float[N, 8] x) => (float[K, 8] y) { y = Gather (x, many) }",
    "other interpolation": 'g (float[N, 2, 4, 4] x) => (float[N, 2, 8, 8] y) { y = Resize <mode = "linear"> (x, , factors) }',
    "independent of the input": "g (float[N, 8] x) => (float[N, 8] y) { e = Relu (c) y = Exp (e) }",
    "in integers already": """g (float[N, 8] x) => (float[N, 8] y) {
        q = QuantizeLinear (x, scale, zero) d = DequantizeLinear (q, scale, zero) y = Sigmoid (d)
    }""",
    "about to be quantized": """g (float[N, 8] x) => (float[N, 8] y) {
        s = Sigmoid (x) q = QuantizeLinear (s, scale, zero) y = DequantizeLinear (q, scale, zero)
    }""",
    "a nested graph": """g (float[N, 8] x, bool p) => (float[N, 8] y) {
        y = If (p) <then_branch = t () => (float[N, 8] u) { u = Add (x, x) }, else_branch = e () => (float[N, 8] v) { v = Relu (x) }>
    }""",
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses(case: str) -> None:
    everything = {
        "c": normal(1, 8),
        "many": np.zeros(129, np.int64),  # 1032 bytes
        "factors": np.array([1, 1, 2, 2], np.float32),
        "scale": np.float32(0.1),
        "zero": np.uint8(0),
    }
    text = NEAR_MISSES[case]
    assert names(text, {name: array for name, array in everything.items() if name in text}) == []


def test_a_dilated_average_does_not_fuse() -> None:
    """ONNX Runtime would make it an operator that it cannot load."""
    text = "g (float[N, 2, 8] x) => (float[N, 2, M] y) {{ y = AveragePool <kernel_shape = [2], dilations = [{}]> (x) }}"
    assert names(text.format(2), opset=19) == []
    assert names(text.format(1), opset=19) == ["y"]


def test_old_opsets_have_no_carriers() -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) { y = Relu (x) }"
    assert names(text, opset=12) == []
    assert names(text, opset=13) == ["y"]


def test_values_that_vary() -> None:
    """What comes from a graph input, through nested graphs too; not what callers may override."""
    text = """g (float[N, 8] x, bool p, float[8] c) => (float[N, 8] y) {
        k = Neg (c)
        a = Add (x, k)
        y = If (p) <then_branch = t () => (float[N, 8] u) { u = Neg (a) }, else_branch = e () => (float[N, 8] v) { v = Exp (a) }>
    }"""
    assert varying(parse(text, {"c": normal(1, 8)}).graph) == {"x", "p", "a", "y"}


def test_types_are_inferred_without_weights() -> None:
    text = "g (float[N, 8] x) => (float[N, K] y) { h = MatMul (x, w) y = Reshape (h, s) }"
    proto = skeleton(load(parse(text, {"w": normal(1, 8, 200), "s": np.array([-1, 100], np.int64)}))).proto
    shape = value_types(proto)["h"].shape
    assert [dim.dim_value or dim.dim_param for dim in shape.dim] == ["N", 200]
