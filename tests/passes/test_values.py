"""What is known of values before a run."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from intaglio.ops.vjp import Value
from intaglio.passes.errors import InputError
from intaglio.passes.modernize import modernize
from intaglio.passes.values import infer, nbytes, typed
from tests.models import normal, parse


def infer_text(
    text: str, weights: dict[str, np.ndarray] | None = None, *, variable: tuple[str, ...] = (), **shapes: list[int]
) -> dict[str, Value]:
    """Values of a model given as text."""
    return infer(modernize(parse(text, weights)).proto, variable, shapes)


def test_types_lengths_and_names_of_lengths() -> None:
    values = infer_text("g (float16[N, 4] x) => (float16[N, K] y) { y = MatMul (x, w) }", {"w": normal(1, 4, 6).astype(np.float16)})
    assert values["y"].dtype == np.float16
    assert values["y"].shape == (None, 6)
    assert values["y"].lengths == ("N", 6)
    assert values["w"].static == (4, 6)


def test_bfloat16_is_a_float() -> None:
    values = infer_text("g (bfloat16[2, 4] x) => (bfloat16[2, 4] y) { y = Relu (x) }")
    assert values["y"].dtype.name == "bfloat16"
    assert values["y"].is_float
    assert nbytes(values["y"]) == 16


SHAPES = """g (float[N, 3, 8] x) => (float[A, B] y) {
    s = Shape (x)
    one = Constant <value_ints = [1]> ()
    three = Gather (s, one)
    two = Constant <value_ints = [2]> ()
    eight = Slice (s, two, th)
    product = Mul (three, eight)
    any = Constant <value_ints = [-1]> ()
    target = Concat <axis = 0> (any, product)
    whole = Concat <axis = 0> (s, product)
    batch = Slice (s, zero, one)
    y = Reshape (x, target)
}"""


def test_shape_arithmetic_is_known_although_the_batch_is_open() -> None:
    values = infer_text(SHAPES, {"th": np.array([3]), "zero": np.array([0])})
    known = {name: value.constant.tolist() for name, value in values.items() if value.constant is not None}
    assert known["three"] == [3]
    assert known["eight"] == [8]
    assert known["product"] == [24]
    assert known["target"] == [-1, 24]
    assert not known.keys() & {"s", "whole", "batch"}, "the batch is not known"
    assert values["y"].shape == (None, 24)


def test_lengths_that_only_a_part_of_a_shape_tells() -> None:
    text = """g (float[N, M, 24] x) => (float[A, B, C, D] y) {
        s = Shape (x) head = Slice (s, zero, two) six = Div (width, four)
        target = Concat <axis = 0> (head, four, six) y = Reshape (x, target) z = Transpose <perm = [0, 2, 1, 3]> (y)
    }"""
    weights = {"zero": np.array([0]), "two": np.array([2]), "four": np.array([4]), "width": np.array([24])}
    values = infer_text(text, weights)
    assert values["y"].shape == (None, None, 4, 6)
    assert values["z"].shape == (None, 4, None, 6)


def test_given_lengths_make_the_rest_known() -> None:
    values = infer_text(SHAPES, {"th": np.array([3]), "zero": np.array([0])}, x=[5, 3, 8])
    assert values["whole"].constant is not None
    assert values["whole"].constant.tolist() == [5, 3, 8, 24]
    assert values["y"].static == (5, 24)


def test_constants_make_shapes_that_make_constants() -> None:
    text = """g (float[2, 6] x) => (int64[R] z) {
        k = Add (a, a) y = Reshape (x, k) z = Shape (y)
    }"""
    values = infer_text(text, {"a": np.array([2, 1])})
    assert values["y"].static is None or values["y"].static == (4, 2)
    values = infer_text(text.replace("Add (a, a)", "Mul (a, b)"), {"a": np.array([2, 3]), "b": np.array([2, 1])})
    assert values["y"].static == (4, 3)
    assert values["z"].constant is not None
    assert values["z"].constant.tolist() == [4, 3]


def test_what_is_differentiated_is_not_constant() -> None:
    text = "g (float[2] x) => (float[2] y) { t = Add (s, s) y = Mul (x, t) }"
    weights = {"s": np.array([1.5], np.float32)}
    assert infer_text(text, weights)["t"].constant is not None
    values = infer_text(text, weights, variable=("s",))
    assert values["s"].constant is None
    assert values["t"].constant is None
    assert infer_text(text, weights, variable=("t",))["t"].constant is None


def test_an_initializer_that_a_caller_may_override_is_not_constant() -> None:
    values = infer_text("g (float[2] x, float[1] s) => (float[2] y) { y = Mul (x, s) }", {"s": np.ones(1, np.float32)})
    assert values["s"].constant is None


def test_large_constants_are_not_made() -> None:
    text = "g (float[2] x) => (float[A] y) { big = ConstantOfShape (s) wide = Expand (x, s) r = Range (lo, hi, by) y = Relu (x) }"
    weights = {"s": np.array([1 << 20]), "lo": np.array(0), "hi": np.array(1 << 40), "by": np.array(1)}
    values = infer_text(text, weights)
    assert values["big"].constant is None
    assert values["big"].static == (1 << 20,)
    assert "r" not in values or values["r"].constant is None


CONTRIB = [
    ("FastGelu (x, b)", (None, 4)),
    ("Gelu (x)", (None, 4)),
    ("QuickGelu (x)", (None, 4)),
    ("BiasGelu (x, b)", (None, 4)),
    ("FusedMatMul (x, w)", (None, 6)),
    ("FusedMatMul <transB = 1, alpha = 0.5> (x, v)", (None, 6)),
    ("MatMulIntegerToFloat (x, w8, s, s)", (None, 6)),
    ("FusedGemm <transB = 1> (x, v)", (None, 6)),
    ("SkipLayerNormalization (x, x, b)", (None, 4)),
]


@pytest.mark.parametrize(("call", "shape"), CONTRIB)
def test_operators_of_the_runtime_have_types(call: str, shape: tuple[int | None, ...]) -> None:
    weights = {"w": normal(1, 4, 6), "v": normal(2, 6, 4), "b": normal(3, 4), "w8": np.ones((4, 6), np.int8), "s": np.float32(0.5)}
    values = infer_text(f"g (float[N, 4] x) => (float[P, Q] z) {{ y = com.microsoft.{call} z = Relu (y) }}", weights)
    assert values["y"].shape == shape
    assert values["z"].shape == shape


@pytest.mark.parametrize(("shapes", "reason"), [({"w": [1]}, "no input"), ({"x": [2, 5]}, "contradicts"), ({"x": [2]}, "contradicts")])
def test_lengths_that_do_not_fit_are_refused(shapes: dict[str, list[int]], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        infer_text("g (float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }", **shapes)


def test_what_inference_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise onnx.shape_inference.InferenceError("[ShapeInferenceError]\nInferred elem type differs")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", refuse)
    with pytest.raises(InputError, match=r"contradict each other: .* elem type differs; export the model again"):
        infer_text("g (float[2, 4] x) => (float[2, 4] y) { y = Relu (x) }")


def test_a_declaration_keeps_names_of_lengths() -> None:
    value = Value("a", np.dtype(np.float32), (None, 4), symbols=("N", None))
    assert typed(value) == onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, ["N", 4])
