"""Task metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest

from intaglio.passes.errors import InputError
from intaglio.passes.metric import METRICS, Metric


def test_accuracy_is_a_percentage_over_all_feeds() -> None:
    metric = Metric("accuracy")
    metric.add([np.eye(4, dtype=np.float32)], np.array([0, 1, 2, 0]))
    metric.add([np.eye(4, dtype=np.float32)[:1], np.zeros(9)], np.array([[0]]))
    assert metric.value == pytest.approx(80.0)


def test_accuracy_reads_images_of_one_pixel() -> None:
    metric = Metric("accuracy")
    metric.add([np.eye(3, dtype=np.float16)[:, :, None, None]], np.array([0, 1, 1]))
    assert metric.value == pytest.approx(200 / 3)


def test_mean_squared_error() -> None:
    metric = Metric("mse")
    metric.add([np.array([[1.0], [2.0]], np.float32)], np.array([1.0, 4.0]))
    assert metric.value == pytest.approx(2.0)


def test_nothing_added_has_no_value() -> None:
    assert math.isnan(Metric("accuracy").value)


def test_bad_use_is_refused() -> None:
    with pytest.raises(InputError, match=f"'f1' is unknown; expected one of {', '.join(METRICS)}"):
        Metric("f1")
    with pytest.raises(InputError, match="2 labels for 3 rows"):
        Metric("accuracy").add([np.eye(3)], np.array([0, 1]))
