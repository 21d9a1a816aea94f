"""Gradients of softmax and of the losses on classes."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from intaglio.passes.differentiate import differentiate

from .checking import RUNTIME_TOLERANCE, TOLERANCE, gradient_error, model_of, run_gradients, runtime_error

_LOSSES = ["NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"]


@pytest.mark.parametrize("op_type", ["Softmax", "LogSoftmax"])
@settings(max_examples=20, deadline=None)
@given(rank=st.integers(1, 4), data=st.data(), open_shapes=st.booleans(), seed=st.integers(0, 99))
def test_softmax(op_type: str, rank: int, data: st.DataObject, open_shapes: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    axis = data.draw(st.sampled_from([None, *range(-rank, rank)]))
    attributes = "" if axis is None else f" <axis = {axis}>"
    inputs = {"x": 2 * rng.standard_normal(rng.integers(1, 5, rank))}
    assert gradient_error(f"y = {op_type}{attributes} (x)", inputs, ["x"], open_shapes=open_shapes) < TOLERANCE


@pytest.mark.parametrize("op_type", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("axis", [1, -1])
def test_softmax_in_the_runtime(op_type: str, axis: int) -> None:
    inputs = {"x": np.random.default_rng(0).standard_normal((2, 3, 4))}
    assert runtime_error(f"y = {op_type} <axis = {axis}> (x)", inputs, ["x"]) < RUNTIME_TOLERANCE


def test_hardmax_has_no_gradient() -> None:
    proto = model_of("y = Hardmax(x)", {"x": np.zeros((2, 3))}, ["y"])
    found = differentiate(proto, ["y"], ["x"])
    assert not found.stops
    assert not found.gradients


def _classes(seed: int, shape: tuple[int, ...], count: int, ignored: int | None, dtype: str) -> dict[str, np.ndarray]:
    """Scores (N, C, …), targets (N, …) of which about a third are ignored but never all, and weights (C,)."""
    rng = np.random.default_rng(seed)
    target = rng.integers(0, count, shape).astype(dtype)
    if ignored is not None:
        target[rng.uniform(size=shape) < 0.3] = ignored
        target.flat[0] = 0 if ignored else 1
    scores = rng.standard_normal((shape[0], count, *shape[1:]))
    return {"x": scores, "t": target, "w": rng.uniform(0.5, 2, count)}


@pytest.mark.parametrize("op_type", _LOSSES)
@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(3,), (2, 3), (2, 2, 2)]),
    reduction=st.sampled_from([None, "mean", "sum", "none"]),
    ignored=st.sampled_from([None, 0, 2, -100]),
    weighted=st.booleans(),
    dtype=st.sampled_from(["int32", "int64"]),
    open_shapes=st.booleans(),
    seed=st.integers(0, 99),
)
def test_losses(
    op_type: str,
    shape: tuple[int, ...],
    reduction: str | None,
    ignored: int | None,
    weighted: bool,
    dtype: str,
    open_shapes: bool,
    seed: int,
) -> None:
    inputs = _classes(seed, shape, 4, ignored, dtype)
    text = _loss(op_type, "y", reduction, ignored, weighted)
    if not weighted:
        del inputs["w"]
    assert gradient_error(text, inputs, ["x"], open_shapes=open_shapes) < TOLERANCE


def _loss(op_type: str, outputs: str, reduction: str | None, ignored: int | None, weighted: bool) -> str:
    attributes = ([f'reduction = "{reduction}"'] if reduction else []) + ([] if ignored is None else [f"ignore_index = {ignored}"])
    given = f" <{', '.join(attributes)}>" if attributes else ""
    return f"{outputs} = {op_type}{given} (x, t{', w' if weighted else ''})"


@pytest.mark.parametrize("outputs", [("y", "p"), ("p",)])
def test_the_log_probabilities_of_a_loss(outputs: tuple[str, ...]) -> None:
    inputs = _classes(0, (2, 3), 4, None, "int64")
    assert gradient_error("y, p = SoftmaxCrossEntropyLoss(x, t, w)", inputs, ["x"], outputs) < TOLERANCE


@pytest.mark.parametrize("op_type", _LOSSES)
@pytest.mark.parametrize(("reduction", "ignored", "weighted"), [("mean", None, False), ("none", -1, True), ("mean", 2, True)])
def test_losses_in_the_runtime(op_type: str, reduction: str, ignored: int | None, weighted: bool) -> None:
    inputs = _classes(1, (2, 5), 4, ignored, "int64")
    if not weighted:
        del inputs["w"]
    assert runtime_error(_loss(op_type, "y", reduction, ignored, weighted), inputs, ["x"]) < RUNTIME_TOLERANCE


@pytest.mark.parametrize("op_type", _LOSSES)
def test_weights_of_classes_stop_the_derivative(op_type: str) -> None:
    proto = model_of(f"y = {op_type} (x, t, w)", _classes(0, (2,), 3, None, "int64"), ["y"])
    (stop,) = differentiate(proto, ["y"], ["x", "w"]).stops
    assert stop.reason == "the weights of the classes are not differentiated"


def test_a_perfect_and_an_absurd_score_give_finite_gradients() -> None:
    """Gradients of the cross entropy are probabilities minus the target: within [-1, 1], whatever the scores."""
    inputs = {"x": np.array([[1e4, -1e4], [1e4, -1e4]]), "t": np.array([0, 1])}
    found = differentiate(model_of('y = SoftmaxCrossEntropyLoss <reduction = "sum"> (x, t)', inputs, ["y"]), ["y"], ["x"])
    with np.errstate(divide="ignore"):  # the evaluator takes the logarithm of a probability of 0
        gradient = run_gradients(found, inputs, {"y": np.array(1.0)})["x"]
    np.testing.assert_array_equal(gradient, [[0, 0], [1, -1]])
