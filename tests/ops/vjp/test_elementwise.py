"""Gradients of functions of single elements."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from onnx import TensorProto, helper
from scipy.special import erf

from intaglio.passes.differentiate import differentiate

from .checking import (
    RUNTIME_TOLERANCE,
    TOLERANCE,
    differences,
    gradient_error,
    model_of,
    relative_error,
    run_gradients,
    run_in_runtime,
    runtime_error,
)

Array = np.ndarray

_DOMAINS = {
    "Abs": (-2, 2),
    "Acos": (-0.9, 0.9),
    "Acosh": (1.2, 3),
    "Asin": (-0.9, 0.9),
    "Asinh": (-3, 3),
    "Atan": (-3, 3),
    "Atanh": (-0.9, 0.9),
    "Cos": (-3, 3),
    "Cosh": (-2, 2),
    "Exp": (-2, 2),
    "Identity": (-2, 2),
    "Log": (0.3, 3),
    "Neg": (-2, 2),
    "Reciprocal": (0.3, 3),
    "Sin": (-3, 3),
    "Sinh": (-2, 2),
    "Sqrt": (0.3, 3),
    "Tan": (-1.2, 1.2),
    "Tanh": (-2, 2),
}
"""Operators of one input, and where they are differentiated."""

_STEPS = ["Ceil", "Floor", "Round", "Sign"]


def _uniform(seed: int, shape: tuple[int, ...], domain: tuple[float, float]) -> Array:
    return np.asarray(np.random.default_rng(seed).uniform(*domain, shape))


@pytest.mark.parametrize("op_type", _DOMAINS)
@settings(max_examples=8, deadline=None)
@given(shape=st.lists(st.integers(0, 3), max_size=3).map(tuple), open_shapes=st.booleans(), seed=st.integers(0, 99))
def test_functions_of_one_element(op_type: str, shape: tuple[int, ...], open_shapes: bool, seed: int) -> None:
    inputs = {"x": _uniform(seed, shape, _DOMAINS[op_type])}
    assert gradient_error(f"y = {op_type}(x)", inputs, ["x"], open_shapes=open_shapes) < TOLERANCE


@pytest.mark.parametrize("op_type", _DOMAINS)
def test_functions_of_one_element_in_the_runtime(op_type: str) -> None:
    assert runtime_error(f"y = {op_type}(x)", {"x": _uniform(0, (3, 4), _DOMAINS[op_type])}, ["x"]) < RUNTIME_TOLERANCE


def test_the_error_function() -> None:
    """The reference evaluator computes Erf itself in float32, so SciPy's stands in for it."""
    x, cotangent = _uniform(0, (3, 4), (-2, 2)), _uniform(1, (3, 4), (-1, 1))
    found = differentiate(model_of("y = Erf(x)", {"x": x}, ["y"]), ["y"], ["x"])
    expected = differences(lambda at: float(np.sum(cotangent * erf(at))), x)
    assert relative_error(run_gradients(found, {"x": x}, {"y": cotangent})["x"], expected) < TOLERANCE
    assert runtime_error("y = Erf(x)", {"x": x}, ["x"]) < RUNTIME_TOLERANCE


@pytest.mark.parametrize("op_type", [*_STEPS, "EyeLike", "RandomNormalLike", "RandomUniformLike"])
def test_steps_and_functions_of_a_shape_have_no_gradient(op_type: str) -> None:
    found = differentiate(model_of(f"y = {op_type}(x)", {"x": np.ones((2, 3))}, ["y"]), ["y"], ["x"])
    assert not found.gradients
    assert not found.stops
    assert not found.partial


@pytest.mark.parametrize("op_type", _STEPS)
def test_a_step_adds_nothing_beside_another_path(op_type: str) -> None:
    nodes = [helper.make_node(op_type, ["x"], ["step"]), helper.make_node("Sub", ["x", "step"], ["y"])]
    assert gradient_error(nodes, {"x": np.array([-1.7, -0.2, 0.4, 2.3])}, ["x"]) < TOLERANCE


def test_the_slope_of_abs_at_zero_is_zero() -> None:
    found = differentiate(model_of("y = Abs(x)", {"x": np.zeros(1)}, ["y"]), ["y"], ["x"])
    assert run_gradients(found, {"x": np.array([0.0])}, {"y": np.array([3.0])})["x"] == 0


@pytest.mark.parametrize(
    ("op_type", "x"), [("Asin", 1 - 2.0**-20), ("Acos", 2.0**-20 - 1), ("Acosh", 1 + 2.0**-20), ("Atanh", 1 - 2.0**-20)]
)
def test_slopes_near_poles_keep_their_digits(op_type: str, x: float) -> None:
    """In float32, 1 − x² computed from the square would have three digits here. Factors, root and quotient round five times."""
    found = differentiate(model_of(f"y = {op_type}(x)", {"x": np.zeros((), np.float32)}, ["y"]), ["y"], ["x"])
    gradient = run_in_runtime(found, {"x": np.array(x, np.float32)}, {"y": np.array(1, np.float32)})["x"]
    distance = abs(1 - x * x)
    expected = 1 / distance if op_type == "Atanh" else (-1 if op_type == "Acos" else 1) / np.sqrt(distance)
    assert abs(gradient / expected - 1) < 5 * np.finfo(np.float32).eps


# --- powers


@pytest.mark.parametrize("exponent", [-2, -1, -0.5, 0.5, 1, 1.7, 2, 3, 4])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_known_scalar_powers(exponent: float, shape: tuple[int, ...]) -> None:
    inputs = {"x": _uniform(0, (2, 3), (0.3, 2)), "p": np.full(shape, exponent, np.float64)}
    assert gradient_error("y = Pow(x, p)", inputs, ["x"], known=["p"]) < TOLERANCE
    assert runtime_error("y = Pow(x, p)", inputs, ["x"], known=["p"]) < RUNTIME_TOLERANCE


def test_a_known_exponent_of_zero_gives_no_gradient() -> None:
    found = differentiate(model_of("y = Pow(x, p)", {"x": np.ones(2), "p": np.zeros(())}, ["y"], known=["p"]), ["y"], ["x"])
    assert not found.gradients
    assert not found.stops


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("dtype", ["int64", "int32", "float32"])
def test_powers_of_other_types(dtype: str, known: bool) -> None:
    inputs = {"x": _uniform(0, (2, 3), (-2, -0.3)), "p": np.array([0, 3, -1], dtype)}
    assert gradient_error("y = Pow(x, p)", inputs, ["x"], known=["p"] if known else []) < TOLERANCE


_SHAPES = [((2, 3), (2, 3)), ((2, 3), (3,)), ((1, 3), (2, 1)), ((), (2, 2)), ((3,), ())]


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.sampled_from(_SHAPES),
    exponents=st.sampled_from([(-2.0, 2.0), (0.0, 0.0), (2.0, 2.0)]),
    known=st.booleans(),
    open_shapes=st.booleans(),
    seed=st.integers(0, 99),
)
def test_powers_that_vary(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], exponents: tuple[float, float], known: bool, open_shapes: bool, seed: int
) -> None:
    inputs = {"x": _uniform(seed, shapes[0], (0.3, 2)), "p": _uniform(seed + 1, shapes[1], exponents)}
    wrt, constant = (["x"], ["p"]) if known else (["x", "p"], [])
    assert gradient_error("y = Pow(x, p)", inputs, wrt, known=constant, open_shapes=open_shapes) < TOLERANCE


def test_powers_in_the_runtime() -> None:
    inputs = {"x": _uniform(0, (4, 1), (0.3, 2)), "p": _uniform(1, (3,), (-2, 2))}
    assert runtime_error("y = Pow(x, p)", inputs, ["x", "p"]) < RUNTIME_TOLERANCE


@pytest.mark.parametrize("known", [True, False])
def test_powers_of_zero(known: bool) -> None:
    """d xᵖ/dx at 0 is 0 for p = 0 and p > 1, and 1 for p = 1; d xᵖ/dp is 0 for p > 0."""
    inputs = {"x": np.zeros(4), "p": np.array([0.0, 1, 2, 2.5])}
    found = differentiate(model_of("y = Pow(x, p)", inputs, ["y"], known=["p"] if known else []), ["y"], ["x"] if known else ["x", "p"])
    gradients = run_gradients(found, {"x": inputs["x"]} if known else inputs, {"y": np.ones(4)})
    np.testing.assert_array_equal(gradients["x"], [0, 1, 0, 0])
    if not known:
        np.testing.assert_array_equal(gradients["p"], np.zeros(4))


@pytest.mark.parametrize(("exponent", "expected"), [(0.5, np.inf), (-1, -np.inf), (-2, -np.inf), (1, 1), (2, 0), (3, 0), (1.5, 0)])
def test_known_powers_of_zero(exponent: float, expected: float) -> None:
    inputs = {"x": np.zeros(1), "p": np.array(exponent)}
    found = differentiate(model_of("y = Pow(x, p)", inputs, ["y"], known=["p"]), ["y"], ["x"])
    with np.errstate(divide="ignore"):
        assert run_gradients(found, {"x": inputs["x"]}, {"y": np.ones(1)})["x"] == expected


# --- remainders


@settings(max_examples=20, deadline=None)
@given(shapes=st.sampled_from(_SHAPES), open_shapes=st.booleans(), seed=st.integers(0, 99))
def test_remainders(shapes: tuple[tuple[int, ...], tuple[int, ...]], open_shapes: bool, seed: int) -> None:
    inputs = {"a": _uniform(seed, shapes[0], (-5, 5)), "b": _uniform(seed + 1, shapes[1], (0.7, 2))}
    assert gradient_error("y = Mod <fmod = 1> (a, b)", inputs, ["a", "b"], open_shapes=open_shapes) < TOLERANCE


def test_remainders_in_the_runtime() -> None:
    inputs = {"a": _uniform(0, (3, 4), (-5, 5)), "b": _uniform(1, (4,), (-2, -0.7))}
    assert runtime_error("y = Mod <fmod = 1> (a, b)", inputs, ["a", "b"]) < RUNTIME_TOLERANCE


def test_a_remainder_just_below_the_divisor() -> None:
    """The quotient of these two lies below 3 and rounds to it; the gradient is minus the true quotient, cut to an integer."""
    a, b = np.array(3.3, np.float32), np.array(1.1, np.float32)
    assert a / b == 3
    assert float(a) / float(b) < 3
    found = differentiate(model_of("y = Mod <fmod = 1> (a, b)", {"a": a, "b": b}, ["y"]), ["y"], ["b"])
    assert run_in_runtime(found, {"a": a, "b": b}, {"y": np.array(1, np.float32)})["b"] == -2


def test_remainders_without_fmod_stop_the_derivative() -> None:
    inputs = {"a": np.ones(2), "b": np.ones(2)}
    (stop,) = differentiate(model_of("y = Mod(a, b)", inputs, ["y"]), ["y"], ["a"]).stops
    assert stop.reason == "fmod must be 1 for floats"


# --- casts


@pytest.mark.parametrize("back", [f"y = Cast <to = {TensorProto.DOUBLE}> (x)", "y = CastLike(x, like)"])
def test_casts_give_gradients_in_the_type_of_their_input(back: str) -> None:
    inputs = {"x": np.array([0.1, -2], np.float32), "like": np.zeros(1)}
    found = differentiate(model_of(back, inputs, ["y"], opset=19), ["y"], ["x", "like"])
    assert set(found.gradients) == {"x"}
    cotangent = np.array([1 / 3, 4])
    for gradients in (run_gradients(found, inputs, {"y": cotangent}), run_in_runtime(found, inputs, {"y": cotangent})):
        np.testing.assert_array_equal(gradients["x"], cotangent.astype(np.float32))
        assert gradients["x"].dtype == np.float32


def test_casts_to_the_same_type() -> None:
    assert gradient_error(f"y = Cast <to = {TensorProto.DOUBLE}> (x)", {"x": np.ones((2, 3))}, ["x"]) < TOLERANCE


def test_casts_to_integers_pass_nothing() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Cast", ["whole"], ["y"], to=TensorProto.DOUBLE),
    ]
    found = differentiate(model_of(nodes, {"x": np.ones(2)}, ["y"]), ["y"], ["x"])
    assert not found.gradients
    assert not found.stops


def test_half_precision_in_the_runtime() -> None:
    """A round trip through float16: the gradient is rounded to it, and its constants are of its type."""
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Erf", ["half"], ["bent"]),
        helper.make_node("Cast", ["bent"], ["y"], to=TensorProto.FLOAT),
    ]
    x, cotangent = np.linspace(-2, 2, 5, dtype=np.float32), np.ones(5, np.float32)
    found = differentiate(model_of(nodes, {"x": x}, ["y"]), ["y"], ["x"])
    gradient = run_in_runtime(found, {"x": x}, {"y": cotangent})["x"]
    expected = 2 / np.sqrt(np.pi) * np.exp(-(x.astype(np.float64) ** 2))
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=4e-3)  # a few roundings of 2⁻¹¹ each, of values and exponents up to 4
