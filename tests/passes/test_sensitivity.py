"""Sensitivity: curves from local error to divergence, and the probe that measures their points."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from intaglio.ops.form import UNCHANGED
from intaglio.passes.analyse import analyse
from intaglio.passes.build import build
from intaglio.passes.cache import Cache
from intaglio.passes.data import input_specs, open_dataset
from intaglio.passes.divergence import Divergence, Kind
from intaglio.passes.job import Settings, open_job
from intaglio.passes.load import load
from intaglio.passes.options import Runtime
from intaglio.passes.sensitivity import Curve, Probe
from intaglio.passes.sites import find_sites
from intaglio.passes.verify import compare
from tests.models import CASES, classifier, normal, parse, run, with_weight
from tests.passes.test_sites import nested

errors = st.floats(1e-8, 1.0)


@given(st.lists(st.tuples(errors, st.floats(0, 10)), max_size=5), st.lists(errors, min_size=2, max_size=2))
def test_curves_never_fall_and_start_at_zero(points: list[tuple[float, float]], two: list[float]) -> None:
    curve = Curve.through(points)
    low, high = sorted(two)
    assert curve(0.0) == 0.0
    assert 0 <= curve(low) <= curve(high) * (1 + 1e-9)
    assert np.isfinite(curve(high))


def test_curves_pass_through_their_points_and_go_on_in_proportion() -> None:
    curve = Curve.through([(0.1, 0.4), (0.01, 0.02)])
    assert curve(0.01) == pytest.approx(0.02)
    assert curve(0.1) == pytest.approx(0.4)
    assert curve(0.001) == pytest.approx(0.002)
    assert curve(0.2) == pytest.approx(0.8)
    assert curve(np.sqrt(0.001)) == pytest.approx(np.sqrt(0.008))


def test_a_trial_that_helped_by_chance_does_not_make_a_curve_fall() -> None:
    assert Curve.through([(0.01, 0.5), (0.1, 0.2)])(0.1) == pytest.approx(0.5)


def test_without_trials_the_error_itself_is_the_price() -> None:
    assert Curve.through([])(0.3) == 0.3
    assert Curve.through([(0.0, 1.0)])(0.3) == 0.3


@pytest.mark.parametrize("name", ["matmul", "conv2d", "gather", "lstm"])
@pytest.mark.parametrize("ir_version", [3, 9])
def test_the_probe_measures_the_divergence_of_a_replaced_weight(name: str, ir_version: int) -> None:
    case = CASES[name]
    proto = case.proto(opset=8 if ir_version == 3 else None, ir_version=ir_version)
    model = load(proto)
    indices = np.arange(len(case.data()))
    probe = Probe(model, (Kind.VALUES,), case.data(), indices, Runtime())
    before = model.proto.SerializeToString(deterministic=True)
    for site in find_sites(model):
        assert probe.replaced(site, site.value(model)) == 0.0
        damaged = (site.value(model) * 0.9).astype(np.float32)
        expected = Divergence((Kind.VALUES,))
        for feed, _ in case.data().feeds(indices, 16):
            expected.add(run(proto, feed), run(with_weight(proto, site.name, damaged), feed))
        assert probe.replaced(site, damaged) == pytest.approx(expected.value, rel=1e-4)
    assert model.proto.SerializeToString(deterministic=True) == before


def test_the_probe_reaches_into_branches() -> None:
    model = load(nested())
    data = open_dataset({"x": normal(1, 4, 16), "c": np.array(False)}, input_specs(model.proto))
    probe = Probe(model, (Kind.VALUES,), data, np.arange(4), Runtime())
    captured, own = find_sites(model)
    assert probe.replaced(captured, captured.value(model) * 0) == 0.0
    assert probe.replaced(own, own.value(model) * 0) == pytest.approx(1.0)


def test_the_probe_replaces_a_dequantized_weight_behind_its_widening() -> None:
    codes = np.random.default_rng(1).integers(-127, 128, (16, 24), np.int8)
    text = "g (float[N, 16] x) => (float[N, 24] y) { v = DequantizeLinear (w, s) y = MatMul (x, v) }"
    model = load(parse(text, {"w": codes, "s": np.float32(0.01)}))
    data = open_dataset({"x": normal(1, 4, 16)}, input_specs(model.proto))
    (site,) = find_sites(model)
    assert Probe(model, (Kind.VALUES,), data, np.arange(4), Runtime()).replaced(site, site.value(model) * 0) == 1.0


def test_predicted_divergences_rank_like_measured_ones() -> None:
    """The plan trusts predictions of single sites: their order must be right on a network like a trained one."""
    proto, arrays = classifier(90)
    job = open_job(proto, arrays, Settings(labels="labels"))
    menu = analyse(job, Cache(None), latency=False)
    rng = np.random.default_rng(5)
    predicted, measured = [], []
    for name, candidates in menu.candidates.items():
        changed = [c for c in candidates if c.form != UNCHANGED and c.error > 1e-4]
        for index in rng.choice(len(changed), min(6, len(changed)), replace=False):
            candidate = changed[int(index)]
            model = build(job, {name: candidate.form})
            measured.append(compare(job.original, model, job.data, job.splits.choose, job.calibration).divergence)
            predicted.append(candidate.divergence)
    assert scipy.stats.spearmanr(predicted, measured).statistic >= 0.9
    assert 0.5 < np.median(np.array(measured) / np.array(predicted)) < 2
