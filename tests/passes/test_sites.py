"""Sites: what is found behind which operators and chains, what is skipped, and why."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from intaglio.passes.load import load
from intaglio.passes.sites import MIN_ELEMENTS, Sites, find_sites, without_broken
from tests.models import CASES, Array, normal, parse, run, site_of

W = normal(1, 16, 24)
INTEGERS = np.clip(np.rint(W * 100), -127, 127).astype(np.int8)
SCALES = np.linspace(0.005, 0.02, 24, dtype=np.float32)
HEAD = "g (float[N, 16] x) => (float[N, 24] y)"

IF = """<ir_version: 9, opset_import: ["" : 18]> g (float[N, 16] x, bool c) => (float[N, 24] y) {
    y = If (c) <
        then_branch = t () => (float[N, 24] a) { a = MatMul (x, w) },
        else_branch = e () => (float[N, 24] b) { b = MatMul (x, v) }
    >
}"""
SCAN = """g (float[24] i, float[S, 16] x) => (float[24] f, float[S, 24] y) {
    f, y = Scan <num_scan_inputs = 1, body = b (float[24] a, float[16] t) => (float[24] o, float[24] q) {
        row = Unsqueeze (t, axes)
        product = MatMul (row, w)
        q = Squeeze (product, axes)
        o = Add (a, q)
    }> (i, x)
}"""
LOOP = """g (int64 n, float[4, 16] x) => (float[4, 16] y) {
    y = Loop (n, , x) <body = b (int64 i, bool go, float[4, 16] h) => (bool more, float[4, 16] z) {
        more = Identity (go)
        z = MatMul (h, w)
    }>
}"""
FUNCTION = """<ir_version: 9, opset_import: ["" : 18, "my" : 1]> g (float[N, 16] x) => (float[N, 24] y) {{
    h = my.Given (x, w)
    y = my.Own <order = [1, 0]> (h)
}}
<domain: "my", opset_import: ["" : 18]> Given (x, w) => (y) {{ y = MatMul (x, w) }}
<domain: "my", opset_import: ["" : 18]> Own <order> (x) => (y) {{
    c = Constant <value = float[24, 24] {{{values}}}> ()
    t = Transpose <perm: ints = @order> (c)
    y = MatMul (x, t)
}}"""


def find(proto: onnx.ModelProto) -> Sites:
    return find_sites(load(proto))


def reasons(proto: onnx.ModelProto) -> dict[str, str]:
    return {skip.name: skip.reason for skip in find(proto).skipped}


def nested(weight: Array = W) -> onnx.ModelProto:
    """An If whose then-branch captures w from outside and whose else-branch owns v."""
    proto = onnx.parser.parse_model(IF)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    other = next(a.g for a in proto.graph.node[0].attribute if a.name == "else_branch")
    other.initializer.append(numpy_helper.from_array(-weight, "v"))
    return proto


@pytest.mark.parametrize("name", CASES)
def test_every_family_is_found_with_its_matrix_view(name: str) -> None:
    case = CASES[name]
    sites = find(case.proto())
    assert tuple(site.name for site in sites) == case.sites
    for site in sites:
        view = site.use.view
        assert site.shape == case.weights[site.name].shape
        assert view.groups * view.m * view.n == site.elements
        assert site.dtype == np.float32
        value = site.value(load(case.proto()))
        np.testing.assert_array_equal(value, case.weights[site.name])
        np.testing.assert_array_equal(site.stored(site.matrix(value)), value)


@pytest.mark.parametrize(
    ("name", "matrices"),
    [
        ("matmul", (1, 24, 16)),
        ("matmul_left", (1, 24, 16)),
        ("gemm_trans_b", (1, 24, 16)),
        ("gemm_weight_a_trans_a", (1, 24, 16)),
        ("conv2d_groups", (2, 8, 36)),
        ("conv_transpose", (1, 36, 12)),
        ("gather", (1, 16, 40)),
        ("lstm", (1, 64, 12)),
    ],
)
def test_views_have_outputs_as_rows(name: str, matrices: tuple[int, int, int]) -> None:
    view = site_of(CASES[name].proto())[1].use.view
    assert (view.groups, view.m, view.n) == matrices


def test_a_constant_node_is_an_anchor() -> None:
    proto = parse(f"{HEAD} {{ y = MatMul (x, w) }}")
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(W)))
    model, site = site_of(proto)
    np.testing.assert_array_equal(site.value(model), W)


CHAINS: dict[str, tuple[str, Mapping[str, Array]]] = {
    "identity": ("v = Identity (w)", {"w": W}),
    "transpose": ("v = Transpose <perm = [1, 0]> (w)", {"w": W.T}),
    "default transpose": ("v = Transpose (w)", {"w": W.T}),
    "reshape": ("v = Reshape (w, s)", {"w": W.reshape(8, 48), "s": np.array([16, -1])}),
    "transpose, reshape, identity": (
        "t = Transpose <perm = [2, 0, 1]> (w) i = Identity (t) v = Reshape (i, s)",
        {"w": normal(1, 4, 24, 4), "s": np.array([16, 24])},
    ),
    "squeeze": ("v = Squeeze (w, a)", {"w": W[:, None], "a": np.array([1])}),
    "flatten": ("v = Flatten (w)", {"w": W.reshape(16, 6, 4)}),
    "cast": ("v = Cast <to = 1> (w)", {"w": W.astype(np.float16)}),
    "bfloat16 cast": ("v = Cast <to = 1> (w)", {"w": W.astype(ml_dtypes.bfloat16)}),
    "double cast": ("v = Cast <to = 1> (w)", {"w": W.astype(np.float64)}),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_chains_are_followed_and_undone(chain: str) -> None:
    """The matrix of the site is the transpose of what the MatMul sees, whatever lies between."""
    text, weights = CHAINS[chain]
    proto = parse(f"{HEAD} {{ {text} y = MatMul (x, v) }}", weights)
    model, site = site_of(proto)
    value = site.value(model)
    assert site.shape == weights["w"].shape
    assert site.dtype == weights["w"].dtype
    assert site.uses[0].dtype == np.float32
    (seen,) = run(proto, {"x": np.eye(16, dtype=np.float32)})
    np.testing.assert_array_equal(site.matrix(value)[0].T, seen)
    np.testing.assert_array_equal(site.stored(site.matrix(value)), value)


@pytest.mark.parametrize(
    ("text", "weights", "opset"),
    [
        ("v = DequantizeLinear (w, s, z)", {"w": INTEGERS, "s": np.float32(0.01), "z": np.int8(3)}, 10),
        ("v = DequantizeLinear <axis = 1> (w, s)", {"w": INTEGERS, "s": SCALES}, 13),
        ("v = DequantizeLinear <axis = 1> (w, s, z)", {"w": INTEGERS.view(np.uint8), "s": SCALES, "z": np.full(24, 128, np.uint8)}, 18),
        ("d = DequantizeLinear (w, s) v = Transpose (d)", {"w": INTEGERS.T.copy(), "s": np.float32(0.01)}, 21),
        ("v = DequantizeLinear <axis = 1> (w, s)", {"w": (INTEGERS // 16).astype(ml_dtypes.int4), "s": SCALES}, 21),
        (
            "v = DequantizeLinear <axis = 0, block_size = 8> (w, s, z)",
            {"w": INTEGERS, "s": np.stack([SCALES, 2 * SCALES]), "z": np.full((2, 24), 2, np.int8)},
            21,
        ),
        ("v = Cast <to = 1> (w)", {"w": INTEGERS}, 18),
    ],
)
def test_stored_integers_become_a_float_anchor(text: str, weights: Mapping[str, Array], opset: int) -> None:
    proto = parse(f"{HEAD} {{ {text} y = MatMul (x, v) }}", weights, opset=opset, ir_version=10)
    (site,) = find(proto)
    assert site.anchor == text.split(" =")[0]
    assert site.widening is not None
    assert [source.name for source in site.sources] == list(weights)
    (seen,) = run(proto, {"x": np.eye(16, dtype=np.float32)}, optimize=False)  # fused, it would compute in int8
    np.testing.assert_array_equal(site.matrix(site.value(load(proto)))[0].T, seen)


def test_a_tied_weight_is_one_site_with_every_use() -> None:
    text = "g (int64[N, S] x) => (float[N, S, 40] y) { e = Gather (w, x) t = Transpose (w) y = MatMul (e, t) }"
    (site,) = find(parse(text, {"w": normal(1, 40, 16)}))
    assert [(use.use.node.op_type, use.order is None) for use in site.uses] == [("Gather", True), ("MatMul", False)]
    assert site.op_type == "Gather"


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types(dtype: type) -> None:
    kind = {np.float16: "float16", np.float64: "double"}[dtype]
    (site,) = find(parse(f"g ({kind}[N, 16] x) => ({kind}[N, 24] y) {{ y = MatMul (x, w) }}", {"w": W.astype(dtype)}))
    assert (site.dtype, site.uses[0].dtype) == (dtype, dtype)


def test_branches_may_capture_a_weight_or_own_one() -> None:
    captured, own = find(nested())
    assert (captured.name, captured.scope, captured.uses[0].scope) == ("w", "main", "main/If_0.then_branch")
    assert (own.name, own.scope, own.uses[0].scope) == ("main/If_0.else_branch:v", *["main/If_0.else_branch"] * 2)
    assert own.anchor == "v"


@pytest.mark.parametrize(("text", "shape"), [(SCAN, (16, 24)), (LOOP, (16, 16))])
def test_bodies_of_loops_and_scans(text: str, shape: tuple[int, int]) -> None:
    (site,) = find(parse(text, {"w": normal(1, *shape), "axes": np.array([0])}))
    assert site.scope == "main"
    assert site.uses[0].scope.startswith("main/")


def test_sites_come_in_the_order_in_which_the_graph_runs() -> None:
    text = "g (float[N, 16] x) => (float[N, 16] y) { a = MatMul (x, second) b = MatMul (a, first) y = MatMul (b, third) }"
    names = ("first", "second", "third")
    sites = find(parse(text, {name: normal(i, 16, 16) for i, name in enumerate(names)}))
    assert [site.name for site in sites] == ["second", "first", "third"]


def test_initializers_listed_as_inputs_are_weights_before_ir_4_and_defaults_after() -> None:
    text = f"{HEAD} {{ y = MatMul (x, w) }}"
    old = parse(text, {"w": W}, opset=8, ir_version=3)
    assert [value.name for value in old.graph.input] == ["x", "w"]
    assert [site.name for site in find(old)] == ["w"]
    new = parse("g (float[N, 16] x, float[16, 24] w) => (float[N, 24] y) { y = MatMul (x, w) }", {"w": W})
    assert not find(new).sites
    assert reasons(new) == {"w": "a graph input that callers may override"}


@pytest.mark.parametrize(
    ("graph", "weights", "expected"),
    [
        (f"{HEAD} {{ y = my.domain.MatMul (x, w) }}", {"w": W}, "read by my.domain.MatMul"),
        ("g (float[24] x) => (float[16, 24] y) { y = Add (x, w) }", {"w": W}, "read by Add"),
        ("g (float[4] x) => (float[4] y) { y = Identity (x) }", {"w": W}, "nothing reads it"),
        ("g (float[N, 4] x) => (float[N, 4] y) { y = MatMul (x, w) }", {"w": normal(1, 4, 4)}, f"fewer than {MIN_ELEMENTS} weights"),
        ("g (float[N, 16] x) => (float[N, 24] y, float[16, 24] w) { y = MatMul (x, w) }", {"w": W}, "it is an output of its graph"),
        (
            "g (float[N, 16] x, int64[2] s) => (float[N, 24] y) { r = Reshape (w, s) y = MatMul (x, r) }",
            {"w": W},
            "Reshape whose parameters are not constants",
        ),
        ("g (int32[N, 16] x) => (int32[N, 24] y) { v = Cast <to = 6> (w) y = MatMul (x, v) }", {"w": W}, "cast to INT32"),
        (
            "g (float[2, N, 16] x) => (float[2, N, 24] y) { y = MatMul (x, w) }",
            {"w": normal(1, 2, 16, 24)},
            "a batched weight of shape [2, 16, 24]: only two-dimensional weights are decomposed",
        ),
        ("g (int64[N] x) => (float[16, N] y) { y = Gather <axis = 1> (w, x) }", {"w": W}, "Gather along axis 1"),
        (
            "g (int64[N] x) => (float[N, 8, 8] y) { y = Gather (w, x) }",
            {"w": normal(1, 16, 8, 8)},
            "a table of shape [16, 8, 8]: only two-dimensional tables are decomposed",
        ),
        ("g (float[16, 24] x) => (float[16, 24] y) { y = Gemm (x, v, w) }", {"w": W, "v": normal(2, 24, 24)}, "the bias of a Gemm"),
        (
            "g (float[N, 16, 5, 5] x) => (float[N, C, H, V] y) { y = ConvTranspose <group = 2> (x, w) }",
            {"w": normal(1, 16, 4, 3, 3)},
            "a grouped ConvTranspose",
        ),
        (
            "g (float[8, 4, 3, 3] x) => (float[N, C, H, V] y) { y = Conv (w, x) }",
            {"w": normal(1, 2, 4, 8, 8)},
            "a constant image",
        ),
        (
            "g (float[N, 16] x) => (float[N, 24] y) { y = com.microsoft.FusedMatMul <transBatchB = 1> (x, w) }",
            {"w": W},
            "FusedMatMul with a transposed batch axis",
        ),
    ],
)
def test_skips_name_their_reason(graph: str, weights: Mapping[str, Array], expected: str) -> None:
    assert reasons(parse(graph, weights))["w"] == expected


def test_a_weight_with_one_reader_too_many_is_skipped_as_a_whole() -> None:
    """An unknown reader would see the damaged values."""
    text = "g (float[N, 24] x) => (float[N, 24] y, float[24] z) { y = MatMul (x, w) z = my.Norm (w) }"
    proto = parse(text, {"w": normal(1, 24, 24)})
    assert not find(proto).sites
    assert reasons(proto) == {"w": "read by my.Norm"}


def test_an_integer_kernel_is_left_alone() -> None:
    text = (
        f"{HEAD} {{ q = QuantizeLinear (x, t, z) d = DequantizeLinear (q, t, z) v = DequantizeLinear <axis = 1> (w, s) y = MatMul (d, v) }}"
    )
    proto = parse(text, {"w": INTEGERS, "s": SCALES, "t": np.float32(0.1), "z": np.int8(0)})
    assert not find(proto).sites
    assert reasons(proto) == {"v": "its input is dequantized: it runs in integers already"}


def test_operators_of_other_domains_are_no_widening() -> None:
    """com.microsoft.DequantizeLinear shares a name with the standard operator, not a meaning that is known here."""
    proto = parse(f"{HEAD} {{ v = com.microsoft.DequantizeLinear <axis = 1> (w, s) y = MatMul (x, v) }}", {"w": INTEGERS, "s": SCALES})
    assert not find(proto).sites


def test_weights_of_functions_are_listed_and_arguments_keep_the_name_of_the_call() -> None:
    proto = onnx.parser.parse_model(FUNCTION.format(values=", ".join(["0.1"] * 576)))
    proto.graph.initializer.append(numpy_helper.from_array(W, "w"))
    assert not find(proto).sites
    assert reasons(proto) == {"w": "read by my.Given", "function my::Own:c": "inside a model-local function"}


def test_skips_count_their_bytes() -> None:
    (skip,) = find(parse("g (float[24] x) => (float[16, 24] y) { y = Add (x, w) }", {"w": W})).skipped
    assert (skip.size_bytes, skip.shape) == (W.nbytes, W.shape)


@pytest.mark.parametrize("values", [[np.nan], [np.inf], [np.inf, -np.inf]])
def test_weights_that_are_not_finite_are_left_alone(values: list[float]) -> None:
    broken, huge = W.copy(), np.full((24, 24), np.finfo(np.float32).max, np.float32)
    broken[0, : len(values)] = values
    model = load(parse(f"{HEAD} {{ h = MatMul (x, w) y = MatMul (h, v) }}", {"w": broken, "v": huge}))
    kept = without_broken(model, find_sites(model))
    assert [site.name for site in kept] == ["v"]
    assert [(skip.name, skip.reason, skip.size_bytes) for skip in kept.skipped] == [("w", "it holds NaN or infinite values", W.nbytes)]
