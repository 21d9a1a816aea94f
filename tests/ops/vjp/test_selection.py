"""Gradients of operators that let one of several operands through."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from onnx.reference import ReferenceEvaluator

from intaglio.passes.differentiate import differentiate
from intaglio.passes.session import open_session

from .checking import RUNTIME_TOLERANCE, TOLERANCE, gradient_error, model_of, run_gradients, runtime_error

Array = np.ndarray


def _normal(seed: int, *shape: int) -> Array:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape))


# --- Where


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.sampled_from([((2, 3),) * 3, ((3,), (2, 1), (2, 3)), ((2, 3), (), (1, 3)), ((), (2, 3), (3,)), ((2, 1, 1), (3,), (2, 1))]),
    open_shapes=st.booleans(),
    seed=st.integers(0, 99),
)
def test_where(shapes: tuple[tuple[int, ...], ...], open_shapes: bool, seed: int) -> None:
    inputs = {"c": _normal(seed, *shapes[0]) > 0, "a": _normal(seed + 1, *shapes[1]), "b": _normal(seed + 2, *shapes[2])}
    assert gradient_error("y = Where(c, a, b)", inputs, ["a", "b"], open_shapes=open_shapes) < TOLERANCE


def test_where_in_the_runtime() -> None:
    inputs = {"c": _normal(0, 3, 4) > 0, "a": _normal(1, 2, 1, 4), "b": _normal(2, 1)}
    assert runtime_error("y = Where(c, a, b)", inputs, ["a", "b"]) < RUNTIME_TOLERANCE


def test_where_keeps_infinite_gradients_of_the_other_operand_out() -> None:
    inputs = {"c": np.array([True, False]), "a": np.ones(2), "b": np.ones(2)}
    found = differentiate(model_of("y = Where(c, a, b)", inputs, ["y"]), ["y"], ["a", "b"])
    gradients = run_gradients(found, inputs, {"y": np.array([np.inf, 1.0])})
    np.testing.assert_array_equal(gradients["a"], [np.inf, 0])
    np.testing.assert_array_equal(gradients["b"], [0, 1])


# --- Min and Max


@pytest.mark.parametrize("op_type", ["Min", "Max"])
@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.sampled_from([(2, 3), (3,), (2, 1), (), (2, 2, 3)]), min_size=1, max_size=4),
    data=st.data(),
    open_shapes=st.booleans(),
    seed=st.integers(0, 99),
)
def test_extremes(op_type: str, shapes: list[tuple[int, ...]], data: st.DataObject, open_shapes: bool, seed: int) -> None:
    inputs = {f"x{index}": _normal(seed + 100 * index, *shape) for index, shape in enumerate(shapes)}
    wrt = data.draw(st.lists(st.sampled_from(sorted(inputs)), min_size=1, unique=True))
    assert gradient_error(f"y = {op_type}({', '.join(inputs)})", inputs, wrt, open_shapes=open_shapes) < TOLERANCE


@pytest.mark.parametrize("op_type", ["Min", "Max"])
def test_extremes_in_the_runtime(op_type: str) -> None:
    inputs = {"a": _normal(0, 2, 3, 4), "b": _normal(1, 4), "c": _normal(2, 3, 1)}
    assert runtime_error(f"y = {op_type}(a, b, c)", inputs, list(inputs)) < RUNTIME_TOLERANCE


@pytest.mark.parametrize("op_type", ["Min", "Max"])
def test_the_first_of_equal_extremes_takes_the_gradient(op_type: str) -> None:
    low, high = (1.0, 2.0) if op_type == "Max" else (2.0, 1.0)
    inputs = {"a": np.array([high, low, low, high]), "b": np.array([high, high, low, low]), "c": np.array([high, high, low, high])}
    found = differentiate(model_of(f"y = {op_type}(a, b, c)", inputs, ["y"]), ["y"], list(inputs))
    gradients = run_gradients(found, inputs, {"y": np.array([3.0, 5, 7, 11])})
    np.testing.assert_array_equal(gradients["a"], [3, 0, 7, 11])
    np.testing.assert_array_equal(gradients["b"], [0, 5, 0, 0])
    np.testing.assert_array_equal(gradients["c"], np.zeros(4))


def test_a_value_that_is_compared_with_itself() -> None:
    assert gradient_error("y = Max(a, a)", {"a": _normal(0, 2, 3)}, ["a"]) < TOLERANCE


# --- Clip


@settings(max_examples=40, deadline=None)
@given(
    bounds=st.sampled_from(["low", "high", "low, high"]),
    low=st.sampled_from([-0.7, 0.2]),
    high=st.sampled_from([-0.4, 0.9]),  # may lie below the lower bound
    known=st.booleans(),
    open_shapes=st.booleans(),
    seed=st.integers(0, 99),
)
def test_clip(bounds: str, low: float, high: float, known: bool, open_shapes: bool, seed: int) -> None:
    arrays = {"x": _normal(seed, 3, 4), "low": np.array(low), "high": np.array(high)}
    inputs = {name: array for name, array in arrays.items() if name in f"x, {bounds}"}
    wrt = ["x"] if known else list(inputs)
    text = f"y = Clip(x, {', ' if bounds == 'high' else ''}{bounds})"
    assert gradient_error(text, inputs, wrt, known=[*inputs][1:] if known else [], open_shapes=open_shapes) < TOLERANCE


@pytest.mark.parametrize(("low", "high"), [(-0.5, 0.5), (0.5, -0.5)])
def test_clip_in_the_runtime(low: float, high: float) -> None:
    inputs = {"x": _normal(0, 3, 4), "low": np.array(low), "high": np.array(high)}
    assert runtime_error("y = Clip(x, low, high)", inputs, list(inputs)) < RUNTIME_TOLERANCE


def test_an_open_clip_is_the_identity() -> None:
    assert gradient_error("y = Clip(x)", {"x": _normal(0, 5)}, ["x"]) < TOLERANCE


@pytest.mark.parametrize("level", [-1.0, 1.0])
def test_at_a_bound_the_gradient_goes_to_the_input_alone(level: float) -> None:
    inputs = {"x": np.array([level]), "low": np.array(-1.0), "high": np.array(1.0)}
    found = differentiate(model_of("y = Clip(x, low, high)", inputs, ["y"]), ["y"], list(inputs))
    gradients = run_gradients(found, inputs, {"y": np.array([3.0])})
    assert {name: float(gradient.item()) for name, gradient in gradients.items()} == {"x": 3, "low": 0, "high": 0}


# --- Dropout


@pytest.mark.parametrize(
    ("text", "known"), [("Dropout(x)", []), ("Dropout(x, ratio)", ["ratio"]), ("Dropout(x, ratio, training)", ["ratio", "training"])]
)
def test_dropout_in_inference(text: str, known: list[str]) -> None:
    arrays = {"x": _normal(0, 3, 4), "ratio": np.array(0.3), "training": np.array(False)}
    inputs = {"x": arrays["x"]} | {name: arrays[name] for name in known}
    assert gradient_error(f"y = {text}", inputs, ["x"], known=known) < TOLERANCE
    assert runtime_error(f"y = {text}", inputs, ["x"], known=known) < RUNTIME_TOLERANCE


@pytest.mark.parametrize("text", ["Dropout(x, , training)", "Dropout(x, ratio, training)"])
@pytest.mark.parametrize("known", [["training"], ["ratio", "training"], ["ratio"], []])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_passes_the_gradient_where_its_mask_passes_the_input(text: str, known: list[str], training: bool) -> None:
    """y = m x for a random m, so g = 1 gives the gradient y / x; two roundings to float32 separate them."""
    arrays = {"x": np.abs(_normal(0, 20, 20).astype(np.float32)) + 1, "ratio": np.array(0.3, np.float32), "training": np.array(training)}
    inputs = {name: array for name, array in arrays.items() if name in text}
    known = [name for name in known if name in inputs]
    found = differentiate(model_of(f"y = {text}", inputs, ["y"], known=known), ["y"], ["x"])
    feed = {name: array for name, array in inputs.items() if name not in known} | {found.cotangents["y"]: np.ones((20, 20), np.float32)}
    runs = [open_session(found.proto).run]
    if "ratio" in inputs:  # the reference evaluator refuses to train without one
        runs.append(ReferenceEvaluator(found.proto).run)
    for run in runs:
        y, gradient = run(["y", found.gradients["x"]], feed)
        np.testing.assert_allclose(gradient, y / arrays["x"], rtol=2 * np.finfo(np.float32).eps)
        assert (y == 0).any() == training


def test_the_ratio_of_a_dropout_in_training_stops_the_derivative() -> None:
    inputs = {"x": np.ones(3), "ratio": np.array(0.3), "training": np.array(True)}
    (stop,) = differentiate(model_of("y = Dropout(x, ratio, training)", inputs, ["y"]), ["y"], ["x", "ratio"]).stops
    assert stop.reason == "the ratio of a Dropout in training is not differentiated"
