"""Error-compensated codebooks against nearest centroids, uniform levels, a run-by-run reference and exact least squares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.moment import Moment, OutputMetric
from intaglio.ops.rounding import Levels, feedback, gptq, refit_centroids, round_compensated, round_runs, tabular
from intaglio.ops.rounding.gptq import RIDGE
from tests.ops.running import Array, moment_of, normal

SINGLE = 1e-5
"""Errors are summed in float32 over some dozens of inputs; each is a square of a difference of numbers of the size of a step."""

SEEDS = st.integers(0, 2**16)


def values(index: Array, scale: Array, centroids: Array) -> Array:
    """What indices (groups, m, runs) stand for, (groups, m, n)."""
    runs = np.asarray(centroids, np.float64)[index]
    return np.asarray(runs.reshape(*index.shape[:2], -1)[:, :, : scale.shape[2]] * scale)


def problem(seed: int, groups: int, m: int, n: int) -> tuple[Array, Array, Moment]:
    """A weight, scales of its outputs, and a metric."""
    rng = np.random.default_rng(seed)
    scale = np.broadcast_to(rng.uniform(0.5, 2, (groups, m, 1)), (groups, m, n))
    return rng.standard_normal((groups, m, n)) * scale, scale, moment_of(seed, groups, n)


def reference(weight: Array, scale: Array, centroids: Array, metric: Array, entries: int) -> Array:
    """GPTVQ by the definition, for one matrix: each run takes the centroid of least error, all later inputs being free to make good for it.

    That is least squares over what the later inputs change by, in place of a triangular root.
    """
    n = weight.shape[1]
    whole = n // entries
    sums = np.diagonal(metric)[: whole * entries].reshape(whole, entries).sum(1)
    runs = [*np.argsort(-sums, kind="stable"), *([whole] if n % entries else [])]
    found = np.empty((len(weight), len(runs)), np.int64)
    for row, (values_of_row, unit) in enumerate(zip(weight, scale[:, 0], strict=True)):
        lost, done = np.zeros(n), []
        for run in runs:
            inputs = np.arange(run * entries, min((run + 1) * entries, n))
            done += list(inputs)
            free = np.setdiff1d(np.arange(n), done)
            costs = []
            for centroid in centroids:
                tried = lost.copy()
                tried[inputs] = values_of_row[inputs] - unit * centroid[: len(inputs)]
                if len(free):
                    tried[free] = -np.linalg.solve(
                        metric[np.ix_(free, free)], metric[free] @ np.where(np.isin(np.arange(n), free), 0, tried)
                    )
                costs.append(tried @ metric @ tried)
            found[row, run] = int(np.argmin(costs))
            lost[inputs] = values_of_row[inputs] - unit * centroids[found[row, run], : len(inputs)]
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 14), st.integers(1, 4), st.integers(2, 9), SEEDS)
def test_each_run_takes_the_centroid_that_later_inputs_can_make_good_for_best(m: int, n: int, entries: int, count: int, seed: int) -> None:
    """Runs that do not divide the inputs, too; near ties may fall otherwise and change the rest of their row."""
    weight, scale, moment = problem(seed, 1, m, n)
    centroids = normal(seed, count, entries)
    index, _ = round_runs(weight, scale, centroids, feedback(moment, entries))
    expected = reference(weight[0], scale[0], centroids.astype(np.float64), moment.regularized(RIDGE).matrix[0], entries)
    assert (index[0] == expected).all(1).mean() >= 0.75 or (index[0] != expected).any(1).sum() <= 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 150), st.integers(1, 4), st.sampled_from([2, 16, 40]), SEEDS)
def test_indices_stay_in_the_table_and_the_error_is_theirs(groups: int, m: int, n: int, entries: int, count: int, seed: int) -> None:
    """More inputs than are worked on between two products, too."""
    weight, scale, moment = problem(seed, groups, m, n)
    centroids = normal(seed, count, entries)
    index, errors = round_runs(weight, scale, centroids, feedback(moment, entries))
    assert index.shape == (groups, m, -(-n // entries))
    assert index.dtype == np.int16
    assert index.min() >= 0
    assert index.max() < count
    lost = weight - values(index, scale, centroids)
    expected = np.einsum("gmn,gmn->gm", moment.regularized(RIDGE).times(lost), lost)
    np.testing.assert_allclose(errors, expected, rtol=2e-3, atol=SINGLE * moment.energy(weight))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 2), st.integers(1, 6), st.integers(1, 80), SEEDS)
def test_evenly_spaced_levels_are_a_uniform_grid(groups: int, m: int, n: int, seed: int) -> None:
    """One entry to a run, levels at whole numbers: the codes of GPTQ, unless a tie falls otherwise."""
    weight, scale, moment = problem(seed, groups, m, n)
    levels = np.arange(-3.0, 4.0)[:, None]
    index, _ = round_runs(weight, scale, levels, feedback(moment))
    codes, _ = round_compensated(weight, Levels(scale, np.zeros_like(scale), -3, 3), feedback(moment))
    same = (index - 3 == codes).all(2)
    assert same.mean() >= 0.75 or (~same).sum() <= 1


@pytest.mark.parametrize("entries", [1, 2, 4])
def test_it_beats_nearest_centroids_where_inputs_are_correlated(entries: int) -> None:
    weight, scale, moment = problem(1, 1, 32, 64)
    centroids = normal(2, 16, entries)
    index, _ = round_runs(weight, scale, centroids, feedback(moment, entries))
    runs = (weight / scale).reshape(1, 32, -1, 1, entries)
    near = np.square(runs - centroids).sum(4).argmin(3)
    found, plain = (moment.energy(weight, values(each, scale, centroids)) for each in (index, near))
    assert found < (0.7 if entries < 4 else 0.8) * plain  # sixteen centroids drawn at random are far apart in four dimensions


def test_feedback_keeps_runs_together_and_puts_a_short_one_last() -> None:
    moment = moment_of(3, 2, 11)
    (part,) = feedback(moment, 4)
    sums = moment.diag[:, :8].reshape(2, 2, 4).sum(2)
    for group in range(2):
        runs = part.order[group].tolist()
        first = 0 if sums[group, 0] >= sums[group, 1] else 4
        assert runs == [*range(first, first + 4), *range(4 - first, 8 - first), 8, 9, 10]


def test_many_inputs_fall_into_blocks_of_whole_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale, moment = problem(4, 1, 3, 22)
    centroids = normal(5, 6, 3)
    monkeypatch.setattr(gptq, "LARGEST_BLOCK", 9)
    parts = feedback(moment, 3)
    assert [part.order.shape[1] for part in parts] == [9, 9, 4]
    index, _ = round_runs(weight, scale, centroids, parts)
    for start, stop in ((0, 9), (9, 18), (18, 22)):
        part = feedback(Moment(moment.matrix[:, start:stop, start:stop], 5), 3)
        alone, _ = round_runs(weight[:, :, start:stop], scale[:, :, start:stop], centroids, part)
        np.testing.assert_array_equal(index[:, :, start // 3 : -(-stop // 3)], alone)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 2), st.integers(3, 8), st.integers(2, 20), st.integers(1, 3), st.booleans(), SEEDS)
def test_refitted_centroids_near_the_least_squares(groups: int, m: int, n: int, entries: int, outputs: bool, seed: int) -> None:
    """Against the normal equations solved directly; a few steps of conjugate gradients take most of what there is to take."""
    weight, scale, moment = problem(seed, groups, m, n)
    metric = moment.regularized(RIDGE)
    costs = np.random.default_rng(seed).uniform(0.1, 3, (groups, m)) if outputs else np.ones((groups, m))
    if outputs:
        metric = metric.with_outputs(OutputMetric(costs))
    centroids = normal(seed, 4, entries)
    index, errors = round_runs(weight, scale, centroids, feedback(moment, entries))
    found = refit_centroids(weight, scale, index, centroids, metric, errors)
    columns = [values(index, scale, unit.reshape(4, entries)) for unit in np.eye(4 * entries)]
    right = np.array([np.vdot(costs[:, :, None] * metric.times(column), weight) for column in columns])
    left = np.array([[np.vdot(costs[:, :, None] * metric.times(one), other) for one in columns] for other in columns])
    best = np.linalg.lstsq(left, right, rcond=None)[0].reshape(4, entries)
    before, after, least = (metric.energy(weight, values(index, scale, each)) for each in (centroids, found, best))
    assert after <= before * (1 + SINGLE)
    assert after - least <= 0.1 * (before - least) + SINGLE * before


def test_a_sample_of_the_outputs_holds_those_that_lose_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """One output's entries are far larger than all others: refitting must not forget it."""
    weight, scale, moment = problem(6, 1, 40, 32)
    weight = weight.copy()
    weight[0, 13] *= 30
    centroids = normal(7, 16, 2)
    index, errors = round_runs(weight, scale, centroids, feedback(moment, 2))
    whole = refit_centroids(weight, scale, index, centroids, moment.regularized(RIDGE), errors)
    monkeypatch.setattr(tabular, "_ENTRIES", 320)  # a quarter of the outputs
    found = refit_centroids(weight, scale, index, centroids, moment.regularized(RIDGE), errors)
    assert not np.array_equal(found, whole)
    before, after, least = (moment.energy(weight, values(index, scale, each)) for each in (centroids, found, whole))
    assert after - least < 0.25 * (before - least)


@pytest.mark.parametrize("matrix", [np.zeros((1, 6, 6)), np.ones((1, 6, 6)), np.eye(6)[None] * 1e-300, -1e-12 * np.eye(6)[None]])
def test_metrics_without_full_rank(matrix: Array) -> None:
    """No input was ever seen, all are the same, or rounding made the metric indefinite."""
    weight, scale, _ = problem(1, 1, 4, 6)
    moment, centroids = Moment(matrix, 3), normal(1, 8, 2)
    index, errors = round_runs(weight, scale, centroids, feedback(moment, 2))
    found = refit_centroids(weight, scale, index, centroids, moment.regularized(RIDGE), errors)
    assert np.isfinite(errors).all()
    assert np.isfinite(found).all()
