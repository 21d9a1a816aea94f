"""Losses: their values against NumPy's, their gradients against what calculus says or central differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from intaglio.passes.differentiate import differentiate
from intaglio.passes.divergence import Kind
from intaglio.passes.errors import InputError
from intaglio.passes.loss import (
    CosineDistance,
    CrossEntropy,
    Named,
    SquaredError,
    TeacherDivergence,
    Term,
    with_cross_entropy,
    with_loss,
)
from tests.models import operators, parse, run

Array = np.ndarray

STEP = 1e-5
TOLERANCE = 1e-7
"""Central differences in float64: step² times a third derivative below 10, and rounding 1e-16 over the step."""
EXACT = 1e-12
"""Values in float64: a few dozen roundings of 1e-16."""


def scores(shape: Sequence[int], body: str = "y = Identity (x)", dtype: str = "double") -> onnx.ModelProto:
    """A model that computes scores y from an input x."""
    dims = ", ".join(map(str, shape))
    return parse(f"g ({dtype}[{dims}] x) => ({dtype}[{dims}] y) {{ {body} }}")


def value_and_gradient(proto: onnx.ModelProto, terms: Sequence[Term], feed: Mapping[str, Array], wrt: str = "x") -> tuple[float, Array]:
    """The loss and its gradient under the reference evaluator, after a check against central differences."""
    built = with_loss(proto, terms)
    forward = ReferenceEvaluator(built.proto)

    def loss(x: Array) -> float:
        return float(forward.run([built.loss], {**feed, wrt: x})[0])

    found = differentiate(built.proto, [built.loss], [wrt])
    assert not found.stops, [str(stop) for stop in found.stops]
    one = np.ones((), feed[wrt].dtype)
    (gradient,) = ReferenceEvaluator(found.proto).run([found.gradients[wrt]], {**feed, found.cotangents[built.loss]: one})
    numeric = np.zeros_like(feed[wrt])
    for index in np.ndindex(*numeric.shape):
        up, down = feed[wrt].copy(), feed[wrt].copy()
        up[index] += STEP
        down[index] -= STEP
        numeric[index] = (loss(up) - loss(down)) / (2 * STEP)
    assert np.abs(gradient - numeric).max() < TOLERANCE * max(1.0, np.abs(numeric).max())
    return loss(feed[wrt]), gradient


SHAPES = [((5, 4), 1), ((2, 3, 4), 2), ((2, 4, 3, 2), 1), ((4,), 0)]


@settings(max_examples=12)
@given(case=st.sampled_from(SHAPES), weighted=st.booleans(), seed=st.integers(0, 99))
def test_cross_entropy_of_logits(case: tuple[tuple[int, ...], int], weighted: bool, seed: int) -> None:
    shape, axis = case
    rng = np.random.default_rng(seed)
    x = 2 * rng.standard_normal(shape)
    samples = shape[:axis] + shape[axis + 1 :]
    labels, weights = rng.integers(0, 4, samples), rng.uniform(0.1, 2, samples)
    term = CrossEntropy("y", sample_weights="importance" if weighted else None)
    feed = {"x": x, "labels": labels, **({"importance": weights} if weighted else {})}
    loss, gradient = value_and_gradient(scores(shape), [term], feed)
    losses = -np.take_along_axis(scipy.special.log_softmax(x, axis), np.expand_dims(labels, axis), axis).squeeze(axis)
    share = weights / weights.sum() if weighted else np.full(samples, 1 / max(1, losses.size))
    assert abs(loss - (share * losses).sum()) < EXACT
    hot = np.moveaxis(np.eye(4)[labels], -1, axis)
    expected = (scipy.special.softmax(x, axis) - hot) * np.expand_dims(share, axis)
    np.testing.assert_allclose(gradient, expected, atol=EXACT)


BODIES = {
    "softmax": "y = Softmax <axis = 1> (x)",
    "log_softmax": "y = LogSoftmax <axis = 1> (x)",
    "softmax_then_moved": "p = Softmax <axis = 1> (x) t = Transpose <perm = [1, 0]> (p) u = Identity (t) y = Transpose <perm = [1, 0]> (u)",
}


@pytest.mark.parametrize("body", BODIES)
def test_probabilities_are_taken_from_the_input_of_their_softmax(body: str) -> None:
    rng = np.random.default_rng(0)
    feed = {"x": rng.standard_normal((5, 4)), "labels": rng.integers(0, 4, 5)}
    expected = value_and_gradient(scores((5, 4)), [CrossEntropy("y")], feed)
    loss, gradient = value_and_gradient(scores((5, 4), BODIES[body]), [CrossEntropy("y")], feed)
    assert abs(loss - expected[0]) < EXACT
    np.testing.assert_allclose(gradient, expected[1], atol=EXACT)


def test_a_confident_error_keeps_its_gradient() -> None:
    built = with_cross_entropy(scores((1, 2), BODIES["softmax"], "float"), "y")
    found = differentiate(built.proto, [built.loss], ["x"])
    feed = {"x": np.array([[0, 200]], np.float32), "labels": np.array([0]), found.cotangents["loss"]: np.ones((), np.float32)}
    results = dict(zip([value.name for value in found.proto.graph.output], run(found.proto, feed), strict=True))
    assert results["loss"] == 200
    assert results[found.gradients["x"]].tolist() == [[-1, 1]]


def test_probabilities_without_a_softmax() -> None:
    p = np.random.default_rng(0).uniform(0.1, 1, (5, 4))
    labels = np.arange(5) % 4
    loss, _ = value_and_gradient(scores((5, 4)), [CrossEntropy("y", kind=Kind.PROBABILITIES)], {"x": p, "labels": labels})
    assert abs(loss + np.log(p[np.arange(5), labels]).mean()) < EXACT


def test_the_class_axis_can_be_given() -> None:
    rng = np.random.default_rng(0)
    feed = {"x": rng.standard_normal((2, 4, 3)), "labels": rng.integers(0, 4, (2, 3))}
    loss, _ = value_and_gradient(scores((2, 4, 3)), [CrossEntropy("y", axis=-2)], feed)
    logs = scipy.special.log_softmax(feed["x"], 1)
    assert abs(loss + np.take_along_axis(logs, feed["labels"][:, None], 1).mean()) < EXACT


@settings(max_examples=12)
@given(
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    kind=st.sampled_from([Kind.LOGITS, Kind.PROBABILITIES, Kind.LOG_PROBABILITIES]),
    body=st.sampled_from(["y = Identity (x)", "y = Softmax <axis = 1> (x)"]),
    weighted=st.booleans(),
)
def test_divergence_from_a_teacher(temperature: float, kind: Kind, body: str, weighted: bool) -> None:
    rng = np.random.default_rng(1)
    x, logits, weights = rng.standard_normal((5, 4)), 2 * rng.standard_normal((5, 4)), rng.uniform(0.1, 2, 5)
    held = {
        Kind.LOGITS: logits,
        Kind.PROBABILITIES: scipy.special.softmax(logits, 1),
        Kind.LOG_PROBABILITIES: scipy.special.log_softmax(logits, 1),
    }
    term = TeacherDivergence("y", teacher_kind=kind, temperature=temperature, sample_weights="s" if weighted else None)
    feed = {"x": x, "teacher": held[kind], **({"s": weights} if weighted else {})}
    loss, _ = value_and_gradient(scores((5, 4), body), [term], feed)
    p, q = scipy.special.log_softmax(logits / temperature, 1), scipy.special.log_softmax(x / temperature, 1)
    rows = (np.exp(p) * (p - q)).sum(1)
    expected = temperature**2 * np.average(rows, weights=weights if weighted else None)
    assert abs(loss - expected) < 10 * EXACT, "one logarithm and exponential more where probabilities are given"


@pytest.mark.parametrize("relative", [True, False])
def test_squared_error(relative: bool) -> None:
    rng = np.random.default_rng(2)
    x, teacher = rng.standard_normal((3, 4)), rng.standard_normal((3, 4))
    loss, gradient = value_and_gradient(scores((3, 4)), [SquaredError("y", relative=relative)], {"x": x, "teacher": teacher})
    size = (teacher**2).sum() if relative else x.size
    assert abs(loss - ((x - teacher) ** 2).sum() / size) < EXACT
    np.testing.assert_allclose(gradient, 2 * (x - teacher) / size, atol=EXACT)


def test_a_weighted_sum_of_terms_that_share_an_input() -> None:
    rng = np.random.default_rng(3)
    feed = {"x": rng.standard_normal((3, 4)), "labels": rng.integers(0, 4, 3), "teacher": rng.standard_normal((3, 4))}
    terms: list[Term] = [
        CrossEntropy("y"),
        TeacherDivergence("y", temperature=2, weight=0.5),
        SquaredError("y", weight=3),
        Named("y", weight=-1),
    ]
    parts = [value_and_gradient(scores((3, 4)), [term], feed) for term in terms]
    loss, gradient = value_and_gradient(scores((3, 4)), terms, feed)
    assert abs(loss - sum(part[0] for part in parts)) < EXACT
    np.testing.assert_allclose(gradient, sum(part[1] for part in parts), atol=EXACT)
    assert with_loss(scores((3, 4)), terms).inputs == ("labels", "teacher")


def test_a_loss_of_the_model_itself() -> None:
    built = with_loss(parse("g (float[3, 4] x) => (float y) { s = Mul (x, x) y = ReduceSum <keepdims = 0> (s) }"), [Named("s")])
    x = np.random.default_rng(4).standard_normal((3, 4)).astype(np.float32)
    assert abs(run(built.proto, {"x": x})[-1] - (x**2).mean()) < 1e-6  # float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_models_have_losses_in_float32(dtype: str) -> None:
    built = with_loss(scores((3, 4), dtype=dtype), [SquaredError("y", "teacher")])
    types = {value.name: value.type.tensor_type.elem_type for value in (*built.proto.graph.input, *built.proto.graph.output)}
    assert types["teacher"] == types["loss"] == onnx.TensorProto.FLOAT
    found = differentiate(built.proto, ["loss"], ["x"])
    assert {v.name: v.type.tensor_type.elem_type for v in found.proto.graph.output}[found.gradients["x"]] == types["x"]


def test_an_open_batch_stays_open_and_old_models_are_converted() -> None:
    proto = parse("g (float[N, 4] x) => (float[N, 4] y) { y = Softmax <axis = 1> (x) }", opset=11, ir_version=4)
    built = with_cross_entropy(proto, "y")
    labels = next(value for value in built.proto.graph.input if value.name == "labels")
    assert [dim.dim_param for dim in labels.type.tensor_type.shape.dim] == ["N"]
    assert "LogSoftmax" in operators(built.proto)
    for count in (1, 5):
        x = np.random.default_rng(count).standard_normal((count, 4)).astype(np.float32)
        _, loss = run(built.proto, {"x": x, "labels": np.zeros(count, np.int64)})
        assert abs(loss + scipy.special.log_softmax(x, 1)[:, 0].mean()) < 1e-6  # float32


@pytest.mark.parametrize(
    ("terms", "reason"),
    [
        ([], "no terms"),
        ([CrossEntropy("nothing")], "'nothing' is no float value"),
        ([CrossEntropy("y", labels="x")], "'x' is already taken"),
        ([CrossEntropy("y"), SquaredError("y", teacher="labels")], "'labels' is already taken"),
        ([CrossEntropy("y", axis=2)], "class axis 2"),
        ([CrossEntropy("y", kind=Kind.VALUES)], "use SquaredError"),
        ([TeacherDivergence("y", temperature=0)], "temperature is 0"),
    ],
)
def test_terms_that_make_no_sense_are_refused(terms: list[Term], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        with_loss(scores((3, 4)), terms)


@settings(max_examples=12)
@given(case=st.sampled_from(SHAPES), seed=st.integers(0, 99))
def test_cosine_distance_looks_at_directions_alone(case: tuple[tuple[int, ...], int], seed: int) -> None:
    shape, axis = case
    rng = np.random.default_rng(seed)
    x, teacher = rng.standard_normal(shape), rng.standard_normal(shape)
    loss, gradient = value_and_gradient(scores(shape), [CosineDistance("y")], {"x": x, "teacher": teacher})
    lengths = np.linalg.norm(x, axis=axis) * np.linalg.norm(teacher, axis=axis)
    assert abs(loss - (1 - (x * teacher).sum(axis) / lengths).mean()) < EXACT
    np.testing.assert_allclose((gradient * x).sum(axis), 0, atol=EXACT)  # nothing is gained by a change of length
    longer, _ = value_and_gradient(scores(shape), [CosineDistance("y")], {"x": 3 * x, "teacher": teacher})
    assert abs(longer - loss) < EXACT


def test_a_vector_of_zeros_counts_as_orthogonal() -> None:
    built = with_loss(scores((2, 3)), [CosineDistance("y", axis=-1)])
    teacher = np.array([[1.0, 0, 0], [0, 0, 0]])
    found = ReferenceEvaluator(built.proto).run([built.loss], {"x": np.zeros((2, 3)), "teacher": teacher})[0]
    assert found == 1
