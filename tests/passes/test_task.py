"""The task that labels define: losses and scores of samples, and labels that do not fit."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import scipy.special
from onnx import TensorProto, helper

from intaglio.passes.divergence import Kind
from intaglio.passes.errors import InputError
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.task import Change, check_task, fed_with_labels, gain, loss_change, stand, task_model, unit_loss
from tests.models import Array, classifier, parse, run
from tests.passes.labelled import harmed

FLOAT32 = 1e-5
"""A few roundings of float32 in a sum of dozens of terms."""


def classified(**settings: object) -> tuple[Job, dict[str, Array]]:
    proto, arrays = classifier(24)
    return open_job(proto, arrays, Settings(labels="labels", **settings)), arrays  # type: ignore[arg-type]


def with_own_loss() -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model that computes a mean absolute value as its own loss."""
    text = "g (float[N, 16] x) => (float[N, 16] y, float l) { y = MatMul (x, w) a = Abs (y) l = ReduceMean <keepdims = 0> (a) }"
    rng = np.random.default_rng(2)
    proto = parse(text, {"w": rng.standard_normal((16, 16)).astype(np.float32)})
    return proto, {"x": rng.standard_normal((12, 16)).astype(np.float32), "labels": np.zeros((12, 16), np.float32)}


def test_cross_entropy_and_accuracy_of_each_sample() -> None:
    job, arrays = classified()
    indices = np.array([0, 3, 7, 11])
    found = stand(job, job.model, indices)
    (logits,) = run(job.model.proto, {"x": arrays["x"][indices]})
    logs = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
    order = np.argsort(found.rows)
    assert found.rows[order].tolist() == indices.tolist()
    np.testing.assert_allclose(found.losses[order], -logs[np.arange(4), arrays["labels"][indices]], atol=FLOAT32 * np.abs(logits).max())
    assert found.scores[order].tolist() == (100.0 * (logits.argmax(1) == arrays["labels"][indices])).tolist()
    assert found.loss == found.losses.mean()
    assert found.score == found.scores.mean()


def test_mean_square_error_of_each_sample() -> None:
    proto, arrays = harmed(12)
    job = open_job(proto, arrays, Settings(labels="labels", loss="mse", metric="mse"))
    found = stand(job, job.model, np.arange(12))
    (outputs,) = run(proto, {"x": arrays["x"]})
    expected = np.square(outputs.astype(np.float64) - arrays["labels"]).mean(1)
    np.testing.assert_allclose(found.losses, expected, rtol=FLOAT32)
    np.testing.assert_allclose(found.scores, expected, rtol=FLOAT32)


def test_a_named_loss_is_read_off_the_model() -> None:
    proto, arrays = with_own_loss()
    job = open_job(proto, arrays, Settings(labels="labels", loss="l", metric="mse"))
    check_task(job)
    assert stand(job, job.model, np.arange(12)).loss == pytest.approx(float(run(proto, {"x": arrays["x"]})[1]), rel=FLOAT32)


@pytest.mark.parametrize("loss", ["cross-entropy", "mse"])
def test_the_loss_in_the_graph_is_the_measured_one(loss: str) -> None:
    if loss == "mse":
        proto, arrays = harmed(12)
        job = open_job(proto, arrays, Settings(labels="labels", loss="mse", metric="mse"))
    else:
        job, _ = classified()
    built = task_model(job, job.model.proto, job.model)
    feed, rows = next(iter(job.data.feeds(np.arange(8), 8)))
    labels = job.data.labels(rows)
    assert labels is not None
    outputs = dict(
        zip([v.name for v in built.proto.graph.output], run(built.proto, fed_with_labels(job, built, feed, labels)), strict=True)
    )
    assert float(outputs[built.loss]) == pytest.approx(stand(job, job.model, rows).loss, rel=FLOAT32)


def test_labels_take_the_rank_that_the_loss_declares() -> None:
    job, _ = classified()
    built = task_model(job, job.model.proto, job.model)
    fed = fed_with_labels(job, built, {}, np.array([[1], [2], [0]]))[built.inputs[0]]
    assert fed.shape == (3,)
    assert fed.dtype == np.int64


def test_a_unit_of_divergence_is_worth_the_mean_square_of_the_output() -> None:
    proto, arrays = harmed(12)
    job = open_job(proto, arrays, Settings(labels="labels", loss="mse", metric="mse"))
    (outputs,) = run(proto, {"x": arrays["x"]})
    assert unit_loss(job, np.arange(12)) == pytest.approx(float(np.square(outputs).mean()), rel=FLOAT32)
    assert unit_loss(classified()[0], np.arange(4)) == 1.0


def test_changes_are_paired() -> None:
    change = Change.of(np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 4.0]))
    assert (change.mean, change.error, change.samples) == (1.0, 0.0, 3)
    spread = Change.of(np.zeros(4), np.array([1.0, -1.0, 1.0, -1.0]))
    assert spread.mean == 0.0
    assert spread.error == pytest.approx((4 / 3) ** 0.5 / 2)  # the standard deviation of n − 1, over √n
    assert Change.of(np.array([1.0]), np.array([3.0])) == Change(2.0, 0.0, 1)


def test_a_gain_is_positive_where_the_metric_gets_better() -> None:
    proto, arrays = harmed(12)
    job = open_job(proto, arrays, Settings(labels="labels", loss="mse", metric="mse"))
    before = stand(job, job.model, np.arange(12))
    double = parse(
        "net (float[N, 24] x) => (float[N, 24] y) { a = Gemm <transB = 1> (x, w) y = Add (a, a) }",
        {"w": np.asarray(job.sites.sites[0].value(job.model))},
    )
    after = stand(job, open_job(double, arrays, Settings(labels="labels", loss="mse")).model, np.arange(12))
    assert loss_change(before, after).mean == pytest.approx(after.loss - before.loss)
    assert gain(job, before, after).mean == pytest.approx(before.score - after.score)  # of an error, less is better


def test_what_does_not_fit_is_said() -> None:
    proto, arrays = classifier(24)
    with pytest.raises(InputError, match="need labels"):
        check_task(open_job(proto, arrays, Settings()))
    with pytest.raises(InputError, match="expected one of cross-entropy, mse, or an output of the model: logits"):
        check_task(open_job(proto, arrays, Settings(labels="labels", loss="regret")))
    plain, values = harmed(12)
    with pytest.raises(InputError, match="'y' is not known to hold class scores"):
        check_task(open_job(plain, values, Settings(labels="labels")))
    check_task(open_job(plain, values, Settings(labels="labels", kind="logits")))


def test_labels_out_of_range_are_named() -> None:
    job, arrays = classified()
    wrong = open_job(job.original.proto, {**arrays, "labels": arrays["labels"] + 5}, Settings(labels="labels"))
    with pytest.raises(InputError, match="for 6 classes; number classes from 0"):
        stand(wrong, wrong.model, np.arange(24))


def test_probabilities_are_scores_too() -> None:
    proto, arrays = classifier(24)
    proto.graph.node.append(helper.make_node("Softmax", ["logits"], ["p"], axis=1))
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("p", TensorProto.FLOAT, ["N", 6]))
    job = open_job(proto, arrays, Settings(labels="labels"))
    assert job.kinds == (Kind.PROBABILITIES,)
    check_task(job)
    plain, _ = classified()
    ours, theirs = (stand(each, each.model, np.arange(24)).loss for each in (job, plain))
    assert ours == pytest.approx(theirs, rel=1e-3)  # a float32 probability of a confident mistake has lost digits
