"""Verification: two models on the same samples."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from intaglio.passes.data import Dataset, input_specs, open_dataset
from intaglio.passes.errors import InputError
from intaglio.passes.load import load
from intaglio.passes.options import Runtime
from intaglio.passes.verify import check_interface, compare
from tests.models import classifier, normal, parse, run, with_weight

EVERYTHING = np.arange(120)


def labelled() -> tuple[onnx.ModelProto, Dataset]:
    proto, arrays = classifier()
    return proto, open_dataset(arrays, input_specs(proto), labels="labels")


def test_a_model_agrees_with_itself() -> None:
    proto, data = labelled()
    found = compare(load(proto), load(proto), data, EVERYTHING, Runtime(), metric="accuracy")
    assert (found.divergence, found.agreement, found.samples) == (0.0, 1.0, 120)
    assert found.reference_metric == found.candidate_metric
    assert (found.unit, found.metric) == ("kl_nats", "accuracy")


@pytest.mark.parametrize("limit_bytes", [1, 1 << 29])
def test_everything_is_measured_on_the_given_samples(limit_bytes: int) -> None:
    """Also where models run in segments, all samples at once."""
    proto, data = labelled()
    damaged = with_weight(proto, "head", normal(3, 48, 6))
    indices = np.array([1, 4, 70, 119])
    found = compare(load(proto), load(damaged), data, indices, Runtime(batch=3, memory_limit_bytes=limit_bytes), metric="accuracy")
    _, arrays = classifier()
    feed = {"x": arrays["x"][indices]}
    (a,), (b,) = run(proto, feed), run(damaged, feed)
    a, b = (np.asarray(s - np.log(np.exp(s).sum(1, keepdims=True)), np.float64) for s in (a, b))
    assert found.divergence == pytest.approx((np.exp(a) * (a - b)).sum(1).mean(), rel=1e-4)
    assert found.agreement == (a.argmax(1) == b.argmax(1)).mean()
    assert found.reference_metric == pytest.approx(100 * (a.argmax(1) == arrays["labels"][indices]).mean())
    assert found.candidate_metric == pytest.approx(100 * (b.argmax(1) == arrays["labels"][indices]).mean())
    assert found.samples == 4


def test_without_labels_there_is_no_metric() -> None:
    proto, arrays = classifier()
    data = open_dataset({"x": arrays["x"]}, input_specs(proto))
    found = compare(load(proto), load(proto), data, EVERYTHING, Runtime())
    assert (found.metric, found.reference_metric, found.candidate_metric) == (None, None, None)


def test_the_users_word_decides_the_unit() -> None:
    proto, data = labelled()
    damaged = load(with_weight(proto, "head", normal(3, 48, 6)))
    found = compare(load(proto), damaged, data, EVERYTHING, Runtime(), kind="values")
    assert (found.unit, found.agreement) == ("relative_mse", None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("g (float[N, 17] x) => (float[N, 16] y) { y = MatMul (x, w) }", "inputs"),
        ("g (float[N, 16] z) => (float[N, 16] y) { y = MatMul (z, w) }", r"inputs \['z'\] differ from the reference's \['x'\]"),
        ("g (double[N, 16] x) => (double[N, 16] y) { y = MatMul (x, w) }", "inputs"),
        (
            "g (float[N, 16] x) => (float[N, 16] other) { other = MatMul (x, w) }",
            r"outputs \['other'\] differ from the reference's \['y'\]",
        ),
    ],
)
def test_models_with_another_interface_are_refused(text: str, words: str) -> None:
    reference = load(parse("g (float[N, 16] x) => (float[N, 16] y) { y = MatMul (x, w) }", {"w": normal(1, 16, 16)}))
    rows = 17 if "17" in text else 16
    dtype = np.float64 if "double" in text else np.float32
    with pytest.raises(InputError, match=words):
        check_interface(reference, load(parse(text, {"w": normal(1, rows, 16, dtype=dtype)})))
