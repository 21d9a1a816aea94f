"""Products of bytes with their bias: one kernel, the same numbers, and nothing where it would be wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.passes.biased import DOMAIN, KERNEL, with_biases
from intaglio.passes.load import load
from tests.models import Array, normal, operators, parse, run

QUANTIZED = "q = QuantizeLinear (x, xs, xz) d = DequantizeLinear (q, xs, xz) v = DequantizeLinear <axis = 1> (w, ws)"
BODY = f"{QUANTIZED} p = MatMul (d, v) y = Add (p, b)"


def model(
    body: str = BODY, *, inner: int = 8, outer: int = 6, unsigned: bool = True, weights: dict[str, Array] | None = None, **versions: int
) -> onnx.ModelProto:
    """A product of quantized activations and quantized weights."""
    rng = np.random.default_rng(3)
    arrays = {
        "xs": np.asarray(0.02, np.float32),
        "xz": np.asarray(117, np.uint8) if unsigned else np.asarray(-11, np.int8),
        "w": rng.integers(-127, 128, (inner, outer)).astype(np.int8),
        "ws": rng.uniform(0.001, 0.01, outer).astype(np.float32),
        "b": normal(4, outer),
    }
    proto = parse(f"g (float[N, S, {inner}] x) => (float[N, S, {outer}] y) {{ {body} }}", {**arrays, **(weights or {})}, **versions)
    for tensor in [each for each in proto.graph.initializer if not any(each.name in node.input for node in proto.graph.node)]:
        proto.graph.initializer.remove(tensor)
    return proto


def kernels(proto: onnx.ModelProto, folder: Path) -> Counter[str]:
    """Operators of what ONNX Runtime makes of a model."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return operators(onnx.load(folder / "optimized.onnx"))


def test_the_bias_goes_into_the_kernel(tmp_path: Path) -> None:
    before = load(model())
    text = before.proto.SerializeToString()
    after = with_biases(before, ["p"])
    assert before.proto.SerializeToString() == text
    onnx.checker.check_model(after.proto, full_check=True)
    assert operators(after.proto) == {"QuantizeLinear": 1, KERNEL: 1}
    assert [entry.version for entry in after.proto.opset_import if entry.domain == DOMAIN] == [1]
    assert kernels(before.proto, tmp_path) == {"QuantizeLinear": 1, KERNEL: 1, "Add": 1}
    assert kernels(after.proto, tmp_path) == {"QuantizeLinear": 1, KERNEL: 1}
    assert with_biases(after, ["p"]) is after


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.booleans(), st.booleans(), st.booleans())
def test_outputs_stay(inner: int, outer: int, rows: int, unsigned: bool, shared: bool, swapped: bool) -> None:
    scale = {"ws": np.asarray(0.01, np.float32)} if shared else {}
    body = BODY.replace("Add (p, b)", "Add (b, p)") if swapped else BODY
    proto = model(body.replace(" <axis = 1>", "") if shared else body, inner=inner, outer=outer, unsigned=unsigned, weights=scale)
    after = with_biases(load(proto), ["p"]).proto
    assert KERNEL in operators(after)
    feed = {"x": normal(5, 2, rows, inner)}
    (expected,) = run(proto, feed, optimize=False)
    for optimize in (True, False):
        np.testing.assert_allclose(run(after, feed, optimize=optimize)[0], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_others_go_on_reading_what_was_dequantized() -> None:
    proto = model(f"{QUANTIZED} p = MatMul (d, v) a = Add (p, b) m = ReduceMean <keepdims = 1> (d) y = Mul (a, m)")
    after = with_biases(load(proto), ["p"]).proto
    assert operators(after) == {"QuantizeLinear": 1, "DequantizeLinear": 1, KERNEL: 1, "ReduceMean": 1, "Mul": 1}
    feed = {"x": normal(5, 2, 3, 8)}
    np.testing.assert_allclose(run(after, feed)[0], run(proto, feed)[0], rtol=1e-5, atol=1e-6)


SQUARE = {"w": np.ones((6, 6), np.int8), "b": normal(4, 6)}

LEFT_ALONE = {
    "floats": (f"{QUANTIZED} p = MatMul (x, v) y = Add (p, b)", {}),
    "a float weight": (BODY.replace("DequantizeLinear <axis = 1> (w, ws)", "Identity (w)"), {"w": normal(1, 8, 6)}),
    "a scale per row": (BODY.replace("axis = 1", "axis = 0"), SQUARE),
    "scales per block": (BODY.replace("axis = 1", "axis = 0, block_size = 3"), {**SQUARE, "ws": np.full((2, 6), 0.01, np.float32)}),
    "a broadcast bias": (BODY, {"b": normal(1, 1)}),
    "a matrix added": (BODY, {"b": normal(1, 2, 6)}),
    "a bias of two axes": (BODY, {"b": normal(1, 1, 6).reshape(1, 6)}),
    "another reader": (f"{QUANTIZED} p = MatMul (d, v) a = Add (p, b) y = Mul (a, p)", {}),
    "a stack of weights": (BODY, {"w": np.ones((3, 6, 6), np.int8), "ws": np.full(6, 0.01, np.float32)}),
    "a bias in int32": (
        f"{QUANTIZED} p = MatMul (d, v) c = DequantizeLinear <axis = 0> (b, ws) y = Add (p, c)",
        {"b": np.arange(6, dtype=np.int32)},
    ),
    "a bias that varies": (f"{QUANTIZED} p = MatMul (d, v) c = ReduceMax <keepdims = 0> (x) y = Add (p, c)", {}),
    "words of 16 bits": (BODY, {"xz": np.asarray(0, np.uint16)}),
    "signed activations, unsigned weights": (BODY, {"xz": np.asarray(0, np.int8), "w": np.ones((8, 6), np.uint8)}),
    "an int32 weight": (BODY, {"w": np.ones((8, 6), np.int32)}),
}


@pytest.mark.parametrize(("body", "weights"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_it_must_not_fire_on(body: str, weights: dict[str, Array]) -> None:
    square = weights.get("w", np.ones((8, 6))).shape[-2] == 6
    before = load(model(body, weights=weights, inner=6 if square else 8, opset=21, ir_version=10))
    assert with_biases(before, ["p"]) is before


def test_it_fires_on_a_square_weight_too() -> None:
    """What the cases above differ from."""
    before = load(model(inner=6, weights=SQUARE, opset=21, ir_version=10))
    assert KERNEL in operators(with_biases(before, ["p"]).proto)


def test_products_that_the_model_came_with_stay() -> None:
    before = load(model())
    assert with_biases(before, ["another"]) is before


def test_a_product_that_is_an_output_stays() -> None:
    proto = model()
    proto.graph.output.append(onnx.helper.make_tensor_value_info("p", onnx.TensorProto.FLOAT, ["N", "S", 6]))
    before = load(proto)
    assert with_biases(before, ["p"]) is before


def test_a_bias_that_a_caller_may_override_stays() -> None:
    proto = model()
    proto.graph.input.append(onnx.helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, [6]))
    before = load(proto)
    assert with_biases(before, ["p"]) is before
