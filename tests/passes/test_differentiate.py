"""The reverse pass of whole models: gradients against central differences, and where they stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from intaglio.passes.differentiate import Differentiated, differentiate
from intaglio.passes.errors import InputError
from intaglio.passes.load import load
from intaglio.passes.loss import CrossEntropy, SquaredError, with_loss
from intaglio.passes.session import open_session, to_value
from tests.models import CASES, assert_close, classifier, normal, operators, parse, run

Array = np.ndarray

STEP = 1e-5
TOLERANCE = 1e-6
"""Central differences in float64: step² times third derivatives of up to a thousand in networks this deep."""
SINGLE = 2e-4
"""Float32 against float64: thousands of roundings of 6e-8 that mostly cancel, on gradients whose terms cancel by a digit or two."""


def widened(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model in float64."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for value in (*copy.graph.input, *copy.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for tensor in copy.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    return copy


def results(found: Differentiated, feed: Mapping[str, Array], *, exact: bool) -> dict[str, Array]:
    """Gradients by value name, cotangents being ones: in float64 under the reference evaluator, or in float32 under ONNX Runtime."""
    inputs = {value.name: value for value in found.proto.graph.input}
    one = np.float64 if exact else np.float32
    fed = {
        **feed,
        **{name: np.ones([d.dim_value for d in inputs[name].type.tensor_type.shape.dim], one) for name in found.cotangents.values()},
    }
    names = list(found.gradients.values())
    made = ReferenceEvaluator(found.proto).run(names, fed) if exact else open_session(found.proto).run(names, fed)
    return dict(zip(found.gradients, made, strict=True))


def check_model(
    proto: onnx.ModelProto, feed: Mapping[str, Array], wrt: Sequence[str], *, step: float = STEP, tolerance: float = TOLERANCE
) -> None:
    """Gradients of a scalar in float64 against central differences along random directions, and those in float32 against them.

    Directional derivatives test every entry of a gradient at once: an error e goes unseen only if a random direction is orthogonal to it.
    """
    loss = "loss"
    found = differentiate(proto, [loss], wrt)
    assert not found.stops, [str(stop) for stop in found.stops]
    assert set(found.gradients) == set(wrt)
    wide = widened(proto)
    feed64 = {name: array.astype(np.float64) if array.dtype == np.float32 else array for name, array in feed.items()}
    exact = results(differentiate(wide, [loss], wrt), feed64, exact=True)
    single = results(found, feed, exact=False)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in wide.graph.initializer}
    for name in wide.graph.initializer:
        wide.graph.input.append(helper.make_tensor_value_info(name.name, name.data_type, name.dims))
    forward = ReferenceEvaluator(wide)
    rng = np.random.default_rng(0)
    for name in wrt:
        at = feed64[name] if name in feed64 else stored[name]
        direction = rng.standard_normal(at.shape)
        ends = [float(forward.run([loss], {**stored, **feed64, name: at + sign * step * direction})[0]) for sign in (1, -1)]
        numeric = (ends[0] - ends[1]) / (2 * step)
        assert abs(np.sum(exact[name] * direction) - numeric) <= tolerance * max(1.0, abs(numeric)), name
        scale = max(float(np.abs(exact[name]).max()), 1e-3)
        assert np.abs(single[name] - exact[name]).max() <= SINGLE * scale, name


# --- whole models


def test_a_convolutional_network() -> None:
    body = """a = Conv <pads = [1, 1, 1, 1]> (x, c1, b1)
        n = BatchNormalization (a, s, b1, m, v) r = Relu (n)
        d = Conv <pads = [1, 1, 1, 1], group = 6> (r, c2) k = Add (d, r)
        q = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (k)
        e = Conv (q, c3) g = GlobalAveragePool (e) f = Flatten (g)
        logits = Gemm <transB = 1> (f, w, b2)"""
    weights = {"c1": normal(1, 6, 3, 3, 3), "b1": normal(2, 6), "s": 1 + 0.1 * normal(3, 6), "m": 0.1 * normal(4, 6)}
    weights |= {
        "v": 1 + 0.1 * np.abs(normal(5, 6)),
        "c2": normal(6, 6, 1, 3, 3),
        "c3": normal(7, 8, 6, 1, 1),
        "w": normal(8, 5, 8),
        "b2": normal(9, 5),
    }
    proto = parse(f"net (float[4, 3, 6, 6] x) => (float[4, 5] logits) {{ {body} }}", {k: v.astype(np.float32) for k, v in weights.items()})
    rng = np.random.default_rng(0)
    feed = {"x": rng.standard_normal((4, 3, 6, 6)).astype(np.float32), "labels": rng.integers(0, 5, 4)}
    check_model(with_loss(proto, [CrossEntropy("logits")]).proto, feed, ["x", "c1", "b1", "c2", "c3", "w", "b2", "s"])


TRANSFORMER = """net (int64[2, 5] tokens) => (float[2, 5, 7] p) {
    x = Gather (table, tokens)
    n = LayerNormalization <axis = -1> (x, g1, o1)
    qkv = MatMul (n, wqkv)
    heads = Reshape (qkv, split)
    turned = Transpose <perm = [2, 0, 3, 1, 4]> (heads)
    q3, k3, v3 = Split <axis = 0, num_outputs = 3> (turned)
    zero = Constant <value_ints = [0]> ()
    q = Squeeze (q3, zero) k = Squeeze (k3, zero) v = Squeeze (v3, zero)
    kt = Transpose <perm = [0, 1, 3, 2]> (k)
    products = MatMul (q, kt)
    scaled = Div (products, root)
    attention = Softmax <axis = -1> (scaled)
    mixed = MatMul (attention, v)
    back = Transpose <perm = [0, 2, 1, 3]> (mixed)
    joined = Reshape (back, shape)
    out = MatMul (joined, wo)
    r = Add (x, out)
    n2 = LayerNormalization <axis = -1> (r, g1, o1)
    h = MatMul (n2, w1)
    a = Gelu (h)
    h2 = MatMul (a, w2)
    r2 = Add (r, h2)
    z = MatMul (r2, w3)
    p = Softmax <axis = -1> (z)
}"""


def transformer() -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A block of a transformer with a tied normalization, and tokens with labels."""
    weights = {
        "table": normal(1, 11, 8),
        "g1": 1 + 0.1 * normal(2, 8),
        "o1": 0.1 * normal(3, 8),
        "wqkv": normal(4, 8, 24),
        "wo": normal(5, 8, 8),
        "w1": normal(6, 8, 16),
        "w2": normal(7, 16, 8),
        "w3": normal(8, 8, 7),
        "root": np.array(2.0),
    }
    shapes = {"split": np.array([0, 0, 3, 2, 4]), "shape": np.array([0, 0, 8])}
    proto = parse(TRANSFORMER, {**{k: v.astype(np.float32) for k, v in weights.items()}, **shapes}, opset=20)
    rng = np.random.default_rng(0)
    return proto, {"tokens": rng.integers(0, 11, (2, 5)), "labels": rng.integers(0, 7, (2, 5))}


def test_a_transformer_block() -> None:
    proto, feed = transformer()
    built = with_loss(proto, [CrossEntropy("p")])
    # The reference evaluator normalizes in float32: roundings of 6e-8 over the step, and step² times third derivatives of up to a hundred.
    check_model(built.proto, feed, ["table", "g1", "o1", "wqkv", "wo", "w1", "w2", "w3"], step=1e-3, tolerance=1e-3)


def test_a_transformer_block_recomputed() -> None:
    proto, feed = transformer()
    built = with_loss(proto, [CrossEntropy("p")])
    plain = results(differentiate(built.proto, ["loss"], ["table", "wqkv"]), feed, exact=False)
    found = differentiate(built.proto, ["loss"], ["table", "wqkv"], recompute=True)
    assert not found.stops, [str(stop) for stop in found.stops]
    assert found.recomputed
    for name, array in results(found, feed, exact=False).items():
        assert_close([array], [plain[name]], 1e-5, name)  # other fusions, thus other roundings of 6e-8 in a few hundred sums


def test_the_classifier_of_the_other_tests() -> None:
    proto, data = classifier(8)
    built = with_loss(proto, [CrossEntropy("logits")])
    built.proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
    feed = {"x": data["x"], "labels": data["labels"].astype(np.int64)}
    check_model(built.proto, feed, ["c1", "c3", "g", "gb", "head"])


@pytest.mark.parametrize("name", ["matmul", "gemm_trans_b", "conv1d", "conv2d_groups", "conv_transpose", "gather", "lstm", "gru"])
def test_the_small_models(name: str) -> None:
    case = CASES[name]
    proto = case.proto()
    rank = len(proto.graph.input[0].type.tensor_type.shape.dim)
    x = case.inputs["x"] if case.inputs["x"].ndim == rank else case.inputs["x"][0]
    (y,) = run(proto, {"x": x})
    built = with_loss(proto, [SquaredError("y")], shapes={"x": list(x.shape)})
    found = differentiate(built.proto, ["loss"], case.sites)
    assert not found.stops, [str(stop) for stop in found.stops]
    teacher = (0.5 * y).astype(np.float32)
    gradients = results(found, {"x": x, "teacher": teacher}, exact=False)
    stored = {tensor.name: tensor for tensor in built.proto.graph.initializer}
    for site in case.sites:
        weight = numpy_helper.to_array(stored[site])
        direction = gradients[site] / np.linalg.norm(gradients[site])
        ends = []
        for sign in (1, -1):
            stored[site].CopyFrom(numpy_helper.from_array((weight + sign * 1e-2 * direction).astype(np.float32), site))
            ends.append(float(run(built.proto, {"x": x, "teacher": teacher})[-1]))
        stored[site].CopyFrom(numpy_helper.from_array(weight, site))
        # In float32 only: roundings of 1e-6 of a loss near 1 over a step of 2e-2, and a third derivative times step².
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-2, np.linalg.norm(gradients[site]), rtol=5e-3, atol=1e-4)


# --- what is differentiated


def test_a_value_between_an_input_and_an_output_that_is_itself_differentiated() -> None:
    proto = parse("g (float[3] x) => (float[3] y) { h = Mul (x, x) y = Mul (h, h) }")
    found = differentiate(proto, ["y", "h"], ["x", "h", "y"])
    x = np.array([1, 2, 3], np.float32)
    grads = results(found, {"x": x}, exact=False)
    np.testing.assert_array_equal(grads["y"], np.ones(3))
    np.testing.assert_array_equal(grads["h"], 2 * x**2 + 1)
    np.testing.assert_array_equal(grads["x"], (2 * x**2 + 1) * 2 * x)


def test_two_values_may_share_a_gradient() -> None:
    found = differentiate(parse("g (float[3] a, float[3] b) => (float[3] y) { y = Add (a, b) }"), ["y"], ["a", "b"])
    assert found.gradients["a"] != found.gradients["b"]
    one = np.ones(3, np.float32)
    assert [array.tolist() for array in results(found, {"a": one, "b": one}, exact=False).values()] == [[1, 1, 1], [1, 1, 1]]


def test_a_value_that_no_output_depends_on_is_absent() -> None:
    proto = parse("g (float[3] a, float[3] b) => (float[3] y, float[3] z) { y = Mul (a, a) z = Mul (b, b) }")
    found = differentiate(proto, ["y"], ["a", "b"])
    assert set(found.gradients) == {"a"}
    assert not found.stops
    assert not found.partial


def test_the_given_model_is_not_changed_and_names_do_not_collide() -> None:
    text = "g (float[3] x) => (float[3] y) { h = Mul (x, x) y = Mul (h, x) }"
    proto = parse(text)
    proto.graph.node[0].output[0] = proto.graph.node[1].input[0] = "gradient.x"
    before = proto.SerializeToString(deterministic=True)
    found = differentiate(proto, ["y"], ["x"])
    assert proto.SerializeToString(deterministic=True) == before
    assert found.gradients["x"] != "gradient.x"
    onnx.checker.check_model(found.proto, full_check=True)
    x = np.array([1, 2, 3], np.float32)
    np.testing.assert_array_equal(results(found, {"x": x}, exact=False)["x"], 3 * x**2)


@settings(max_examples=10)
@given(samples=st.integers(0, 4))
def test_an_open_batch_stays_open(samples: int) -> None:
    proto = parse("g (float[N, 4] x) => (float[N, 4] y) { h = Mul (x, w) r = Add (h, x) y = Mul (r, h) }", {"w": normal(1, 4)})
    found = differentiate(proto, ["y"], ["x", "w"])
    assert "Shape" not in operators(found.proto), "the batch has a name, so nothing need be asked of a run"
    x = np.random.default_rng(0).standard_normal((samples, 4)).astype(np.float32)
    fed = {"x": x, found.cotangents["y"]: np.ones_like(x)}
    y, gx, gw = run(found.proto, fed)
    w = normal(1, 4)
    assert_close([y, gx, gw], [(x * w + x) * x * w, 2 * x * w * (w + 1), (2 * x**2 * w + x**2).sum(0)], 1e-5)  # float32


def test_old_models_are_converted() -> None:
    text = "g (float[3, 4] x) => (float[3] y) { h = Mul (x, w) y = ReduceSum <axes = [1], keepdims = 0> (h) }"
    found = differentiate(parse(text, {"w": normal(1, 4)}, opset=11, ir_version=3), ["y"], ["w"])
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    assert_close([results(found, {"x": x}, exact=False)["w"]], [x.sum(0)], 1e-6)  # three roundings


def test_functions_and_constant_branches_pass_gradients() -> None:
    text = """<ir_version: 8, opset_import: ["": 18, "local": 1]>
    agraph (float[3] x) => (float[3] y) {
        on = Constant <value = bool {1}> ()
        h = local.square (x)
        y = If (on) <then_branch = t () => (r) { r = Mul (h, x) }, else_branch = e () => (r) { r = Add (h, x) }>
    }
    <domain: "local", opset_import: ["": 18]> square (a) => (b) { b = Mul (a, a) }"""
    found = differentiate(onnx.parser.parse_model(text), ["y"], ["x"])
    x = np.array([1, 2, 3], np.float32)
    np.testing.assert_array_equal(results(found, {"x": x}, exact=False)["x"], 3 * x**2)


def test_external_weights_are_not_read(tmp_path: Path) -> None:
    weight = normal(1, 200, 200)
    proto = parse("g (float[2, 200] x) => (float[2, 200] y) { y = Mul (x, w) }", {"w": weight[:1]})
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    model = load(tmp_path / "m.onnx")
    (tmp_path / "m.data").rename(tmp_path / "away")
    found = differentiate(model.proto, ["y"], ["x", "w"])
    (tmp_path / "away").rename(tmp_path / "m.data")
    x = np.ones((2, 200), np.float32)
    fed = {"x": to_value(x), found.cotangents["y"]: to_value(x)}
    names = [found.gradients["x"], found.gradients["w"]]
    gx, gw = open_session(found.proto, weights=model.weights).run(names, fed)
    np.testing.assert_array_equal(np.array(gx.numpy()), np.repeat(weight[:1], 2, 0))
    np.testing.assert_array_equal(np.array(gw.numpy()), np.full((1, 200), 2))


def test_what_is_differentiated_may_be_replaced() -> None:
    text = "g (float[3] x) => (float[3] y) { t = Mul (s, s) y = Mul (x, t) }"
    found = differentiate(parse(text, {"s": np.array([2], np.float32)}), ["y"], ["s"])
    for tensor in found.proto.graph.initializer:
        if tensor.name == "s":
            tensor.CopyFrom(numpy_helper.from_array(np.array([5], np.float32), "s"))
    x = np.array([1, 2, 3], np.float32)
    np.testing.assert_array_equal(results(found, {"x": x}, exact=False)["s"], [2 * 5 * 6])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str) -> None:
    proto = parse(f"g ({dtype}[3] x) => ({dtype}[3] y) {{ h = Add (x, x) y = Mul (h, x) }}")
    found = differentiate(proto, ["y"], ["x"])
    types = {value.name: value.type.tensor_type.elem_type for value in (*found.proto.graph.input, *found.proto.graph.output)}
    assert types[found.gradients["x"]] == types[found.cotangents["y"]] == types["x"]
    x = np.array([1, 2, 3], np.float16)
    if dtype == "float16":
        made = run(found.proto, {"x": x, found.cotangents["y"]: np.ones_like(x)})
        np.testing.assert_array_equal(made[1], 4 * x)


# --- codes


def test_gradients_pass_between_quantize_and_dequantize() -> None:
    text = """g (float[2, 4] x) => (float[4, 2] y) {
        q = QuantizeLinear (x, s, z) t = Transpose <perm = [1, 0]> (q) d = DequantizeLinear (t, s, z) y = Mul (d, d)
    }"""
    proto = parse(text, {"s": np.float32(0.1).reshape(()), "z": np.array(0, np.int8)}, opset=19)
    found = differentiate(proto, ["y"], ["x"])
    assert not found.stops, [str(stop) for stop in found.stops]
    x = np.array([[0.2, -0.5, 3.0, 100.0], [0.0, 1.0, -2.0, -100.0]], np.float32)
    gradient = results(found, {"x": x}, exact=False)["x"]
    expected = np.where(np.abs(x) < 12.7, 2 * np.round(x / np.float32(0.1)) * np.float32(0.1), 0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)  # two roundings


def test_integers_from_elsewhere_stop_gradients() -> None:
    text = "g (float[2, 4] x) => (float[2, 4] y) { c = Cast <to = 3> (x) d = DequantizeLinear (c, s) y = Mul (d, x) }"
    found = differentiate(parse(text, {"s": np.array(0.1, np.float32)}), ["y"], ["x"])
    (stop,) = found.stops
    assert (stop.node, stop.op_type) == ("c", "Cast")
    assert "integers that come from no QuantizeLinear" in stop.reason
    assert found.partial == {"x"}
    assert set(found.gradients) == {"x"}


def test_positions_pass_no_gradient_and_are_no_stop() -> None:
    text = "g (float[2, 4] x) => (float[2, 1] y) { i = ArgMax <axis = 1> (x) f = Cast <to = 1> (i) y = Mul (f, w) }"
    found = differentiate(parse(text, {"w": np.ones((2, 1), np.float32)}), ["y"], ["x", "w"])
    assert not found.stops
    assert not found.partial
    assert set(found.gradients) == {"w"}


# --- stops


def test_an_operator_without_a_rule_is_named() -> None:
    text = "g (float[3, 3] x) => (float[3, 3] y, float d) { d = Det (x) y = Mul (x, d) }"
    proto = parse(text)
    proto.graph.node[0].name = "determinant"
    found = differentiate(proto, ["y"], ["x"])
    (stop,) = found.stops
    assert str(stop) == "no gradient through Det 'determinant': the operator has no rule"
    assert found.partial == {"x"}
    assert set(found.gradients) == {"x"}


def test_other_domains_are_named() -> None:
    text = "g (float[3, 3] x) => (float[3, 3] y) { y = com.microsoft.Inverse (x) }"
    proto = parse(text)
    found = differentiate(proto, ["y"], ["x"])
    assert [stop.op_type for stop in found.stops] == ["com.microsoft::Inverse"]
    assert not found.gradients
    assert found.partial == {"x"}


def test_only_stops_between_are_reported() -> None:
    text = """g (float[3, 3] x, float[3, 3] a) => (float[3, 3] y, float z) {
        before = Det (a) y0 = Mul (x, before) y = Mul (y0, y0) z = Det (y)
    }"""
    found = differentiate(parse(text), ["y"], ["x"])
    assert not found.stops, "one is not reached from x, the other does not reach y"
    assert not found.partial


def test_only_values_behind_a_stop_are_partial() -> None:
    text = "g (float[3, 3] a, float[3, 3] b) => (float[3, 3] y) { h = Mul (a, a) d = Det (h) k = Mul (b, b) y = Mul (k, d) }"
    found = differentiate(parse(text), ["y"], ["a", "b", "k"])
    assert found.partial == {"a"}
    assert set(found.gradients) == {"b", "k"}


LOOPS = {
    "inputs": "y = If (on) <then_branch = t () => (r) { r = Mul (x, x) }, else_branch = e () => (r) { r = Add (x, x) }>",
    "captures": "h = Mul (x, x) y = If (on) <then_branch = t () => (r) { r = Add (h, h) }, else_branch = e () => (r) { r = Mul (h, h) }>",
}


@pytest.mark.parametrize("body", LOOPS)
def test_branches_chosen_at_run_time_stop_gradients(body: str) -> None:
    found = differentiate(parse(f"g (float[3] x, bool on) => (float[3] y) {{ {LOOPS[body]} }}"), ["y"], ["x"])
    (stop,) = found.stops
    assert (stop.op_type, stop.reason) == ("If", "it holds nested graphs")
    assert found.partial == {"x"}


@pytest.mark.parametrize(
    ("outputs", "wrt", "reason"),
    [
        (["nothing"], ["x"], "'nothing' is not a value"),
        (["y"], ["nothing"], "'nothing' is not a value"),
        (["i"], ["x"], "'i' holds int64, expected floats"),
        (["odd"], ["x"], "the type of 'odd', made by my.domain::Odd 'odd', is unknown"),
    ],
)
def test_values_without_gradients_are_refused(outputs: list[str], wrt: list[str], reason: str) -> None:
    text = "g (float[2, 4] x) => (float[2, 4] y, int64[2, 1] i) { y = Mul (x, x) i = ArgMax <axis = 1> (x) odd = my.domain.Odd (x) }"
    with pytest.raises(InputError, match=reason):
        differentiate(parse(text), outputs, wrt)


def test_a_value_of_unknown_type_stops_gradients() -> None:
    text = "g (float[2, 4] x) => (float[2, 4] y) { odd = my.domain.Odd (x) h = Mul (odd, x) y = Mul (x, h) }"
    proto = parse(text)
    proto.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, [2, 4]))
    found = differentiate(proto, ["y"], ["x"])
    assert [str(stop) for stop in found.stops] == ["no gradient through Mul 'h': the type of 'odd' is unknown"]
    assert found.partial == {"x"}
