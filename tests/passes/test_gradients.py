"""Gradients of the labelled loss: by fold, against calculus, and reasons where there are none."""

from __future__ import annotations

import numpy as np
import pytest

from intaglio.passes.gradients import FOLDS, MEMORY_LIMIT_BYTES, fold_count, measure_gradients
from intaglio.passes.job import Settings, open_job
from intaglio.passes.rewrite import Fragment, rewrite
from tests.models import classifier, normal, parse
from tests.passes.labelled import SIDE, harmed

FLOAT32 = 1e-4
"""Sums of a hundred float32 products, relative to the largest entry."""


def test_folds_are_gradients_of_disjoint_samples() -> None:
    proto, arrays = harmed(64)
    job = open_job(proto, arrays, Settings(labels="labels", loss="mse", metric="mse"))
    found = measure_gradients(job)
    folds = found.folds["w"]
    assert folds.shape == (FOLDS, SIDE, SIDE)
    assert found.declined == {}
    weight = np.asarray(job.sites.sites[0].value(job.model), np.float64)
    x, labels = arrays["x"][job.splits.fit].astype(np.float64), arrays["labels"][job.splits.fit]
    whole = 2 * (x @ weight.T - labels).T @ x / labels.size  # of the mean of (Wx − t)² over samples and outputs
    np.testing.assert_allclose(folds.mean(0), whole, atol=FLOAT32 * np.abs(whole).max())  # folds of 8 samples each weigh alike
    assert np.abs(folds[0] - folds[1]).max() > 0.1 * np.abs(whole).max()  # other samples, another gradient
    assert found.losses.mean() == pytest.approx(float(np.square(x @ weight.T - labels).mean()), rel=FLOAT32)


def test_gradients_agree_with_differences_of_the_loss() -> None:
    proto, arrays = classifier(48)
    job = open_job(proto, arrays, Settings(labels="labels"))
    found = measure_gradients(job)
    assert set(found.folds) == {site.name for site in job.sites}
    rng = np.random.default_rng(3)
    for site in job.sites:
        value = np.asarray(site.value(job.model), np.float64)
        direction = rng.standard_normal(value.shape) * np.abs(value).mean()
        moved = []
        for step in (-1e-3, 1e-3):
            changed = Fragment((), (), {site.anchor: (value + step * direction).astype(np.float32)}, {})
            moved.append(measure_gradients(job, rewrite(job.model, {site.name: changed}, [site])).losses.mean())
        slope = float((found.folds[site.name].mean(0) * direction).sum())
        # Float32 losses of about 1 have an error of 1e-7, over a step of 2e-3; kinks of Relu within the step move single terms.
        assert (moved[1] - moved[0]) / 2e-3 == pytest.approx(slope, rel=0.05, abs=1e-4)


def test_other_weights_have_other_gradients() -> None:
    proto, arrays = harmed(64)
    job = open_job(proto, arrays, Settings(labels="labels", loss="mse", metric="mse"))
    (site,) = job.sites
    zero = rewrite(job.model, {"w": Fragment((), (), {"w": np.zeros((SIDE, SIDE), np.float32)}, {})}, [site])
    x, labels = arrays["x"][job.splits.fit], arrays["labels"][job.splits.fit]
    expected = -2 * labels.T @ x / labels.size
    np.testing.assert_allclose(measure_gradients(job, zero).folds["w"].mean(0), expected, atol=FLOAT32 * np.abs(expected).max())


def test_a_site_behind_an_operator_without_a_rule_has_a_reason() -> None:
    text = """g (float[N, 16] x) => (float[N, 16] logits)
        <int64[3] square = {-1, 4, 4}, int64[1] last = {1}> {
        a = MatMul (x, v) s = Reshape (a, square) d = Det (s) u = Unsqueeze (d, last) c = Mul (x, u) logits = MatMul (c, w)
    }"""
    weights = {"v": normal(1, 16, 16), "w": normal(2, 16, 16)}
    x = np.random.default_rng(1).standard_normal((16, 16)).astype(np.float32)
    job = open_job(parse(text, weights), {"x": x, "labels": np.arange(16) % 16}, Settings(labels="labels"))
    found = measure_gradients(job)
    assert set(found.folds) == {"w"}
    assert "Det" in found.declined["v"]


@pytest.mark.parametrize(
    ("samples", "limit", "count"),
    [(100, MEMORY_LIMIT_BYTES, 4), (3, MEMORY_LIMIT_BYTES, 2), (1, MEMORY_LIMIT_BYTES, 0), (100, 2304 * 3, 2), (100, 2304, 0)],
)
def test_folds_fit_in_memory(samples: int, limit: int, count: int) -> None:
    proto, arrays = harmed(12)
    job = open_job(proto, arrays, Settings(labels="labels", loss="mse", metric="mse"))
    assert fold_count(job.sites.sites, samples, limit) == count


def test_too_little_memory_is_a_reason() -> None:
    proto, arrays = harmed(12)
    job = open_job(proto, arrays, Settings(labels="labels", loss="mse", metric="mse"))
    found = measure_gradients(job, limit_bytes=100)
    assert dict(found.folds) == {}
    assert found.declined == {"w": "gradients of all weights do not fit in memory"}
