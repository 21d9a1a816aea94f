"""Error-compensated rounding against nearest rounding, a column-by-column reference and every other choice of integers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.moment import Moment
from intaglio.ops.rounding import Levels, compensation, feedback, gptq, round_compensated
from intaglio.ops.rounding.gptq import RIDGE
from tests.ops.running import Array, moment_of, normal

SINGLE = 1e-5
"""Errors are summed in float32 over some dozens of inputs; each is a square of a difference of numbers of the size of a step."""

SEEDS = st.integers(0, 2**16)


def symmetric(weight: Array, largest: int) -> Levels:
    """One step per output that clips nothing."""
    scale = np.abs(weight).max(2, keepdims=True) / largest
    return Levels(scale, np.zeros_like(scale), -largest, largest)


def nearest(weight: Array, levels: Levels) -> Array:
    return np.clip(np.rint(weight / levels.scale) + levels.zero, levels.lowest, levels.highest)


def values(codes: Array, levels: Levels) -> Array:
    return (codes - levels.zero) * levels.scale


def reference(weight: Array, levels: Levels, metric: Array) -> Array:
    """GPTQ as the paper writes it, for one matrix: round a column, spread its error over the later ones by the inverse that is left."""
    order = np.argsort(-np.diagonal(metric), kind="stable")
    left, codes = weight[:, order].copy(), np.empty(weight.shape)
    inverse = np.linalg.inv(metric[np.ix_(order, order)])
    scale = np.broadcast_to(levels.scale[0], weight.shape)[:, order]
    for k, column in enumerate(order):
        codes[:, column] = np.clip(np.rint(left[:, k] / scale[:, k]), levels.lowest, levels.highest)
        lost = (left[:, k] - codes[:, column] * scale[:, k]) / inverse[k, k]
        left[:, k:] -= lost[:, None] * inverse[k, k:]
        inverse[k:, k:] -= np.outer(inverse[k:, k], inverse[k, k:]) / inverse[k, k]
    return codes


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 90), st.sampled_from([1, 3, 7]), SEEDS)
def test_it_rounds_as_the_paper_does(m: int, n: int, largest: int, seed: int) -> None:
    """Against the inverse that is updated column by column; more inputs than a block has, too."""
    weight, moment = normal(seed, 1, m, n).astype(np.float64), moment_of(seed, 1, n)
    levels = symmetric(weight, largest)
    codes, errors = round_compensated(weight, levels, feedback(moment))
    expected = reference(weight[0], levels, moment.regularized(RIDGE).matrix[0])
    rows = (codes[0] == expected).all(1)  # the two compute in different precision: a tie that falls otherwise changes the rest of its row
    assert rows.mean() >= 0.75 or (~rows).sum() <= 1
    lost = weight[0] - values(expected, levels)[0]
    wanted = np.einsum("mn,nk,mk->m", lost, moment.regularized(RIDGE).matrix[0], lost)
    np.testing.assert_allclose(errors[0][rows], wanted[rows], rtol=1e-3, atol=SINGLE)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 40), st.integers(-4, 0), st.integers(1, 4), SEEDS)
def test_codes_stay_on_the_grid_and_the_error_is_theirs(groups: int, m: int, n: int, lowest: int, highest: int, seed: int) -> None:
    """Any step and zero point per entry; values far beyond the ends, too."""
    rng = np.random.default_rng(seed)
    weight, moment = 4 * rng.standard_normal((groups, m, n)), moment_of(seed, groups, n)
    levels = Levels(rng.uniform(0.1, 2, (groups, m, n)), rng.integers(lowest, highest, (groups, m, 1)).astype(float), lowest, highest)
    codes, errors = round_compensated(weight, levels, feedback(moment))
    assert codes.shape == weight.shape
    assert codes.dtype == np.int16
    assert codes.min() >= lowest
    assert codes.max() <= highest
    lost = weight - values(codes, levels)
    expected = np.einsum("gmn,gmn->gm", moment.regularized(RIDGE).times(lost), lost)
    np.testing.assert_allclose(errors, expected, rtol=1e-3, atol=SINGLE * expected.max())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 30), SEEDS)
def test_without_correlations_it_is_rounding_to_nearest(groups: int, m: int, n: int, seed: int) -> None:
    diagonal = np.random.default_rng(seed).uniform(0.1, 9, (groups, n))
    weight = normal(seed, groups, m, n).astype(np.float64)
    levels = symmetric(weight, 7)
    codes, _ = round_compensated(weight, levels, feedback(Moment(diagonal[:, :, None] * np.eye(n), 5)))
    near_tie = np.abs(np.abs(weight / levels.scale) % 1 - 0.5) < 1e-4  # decided in float32
    np.testing.assert_array_equal(codes[~near_tie], nearest(weight, levels)[~near_tie])


def kept(weight: Array, share: float) -> Array:
    """Where the largest entries of a weight are."""
    return np.asarray(np.abs(weight) >= np.quantile(np.abs(weight), 1 - share))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 150), st.integers(1, 4), st.floats(0.02, 1), SEEDS)
def test_as_many_entries_stay_as_the_support_has(groups: int, m: int, n: int, least: int, share: float, seed: int) -> None:
    """Which ones may change; codes of the others are zero, theirs never; and the error is that of the codes."""
    weight, moment = normal(seed, groups, m, n).astype(np.float64), moment_of(seed, groups, n)
    support, most = kept(weight, share), least + 3
    levels = Levels(np.full((1, 1, 1), 2 / most), np.zeros((1, 1, 1)), -most, most, support, least)
    codes, errors = round_compensated(weight, levels, feedback(moment))
    assert np.count_nonzero(codes) == np.count_nonzero(support)
    assert np.abs(codes[codes != 0]).min() >= least
    assert np.abs(codes).max() <= most
    lost = weight - values(codes, levels)
    expected = np.einsum("gmn,gmn->gm", moment.regularized(RIDGE).times(lost), lost)
    np.testing.assert_allclose(errors, expected, rtol=1e-3, atol=SINGLE * expected.max())


def test_a_support_of_all_entries_is_none() -> None:
    """With levels from zero on, nothing is left that a support changes."""
    weight, moment = normal(1, 2, 5, 90).astype(np.float64), moment_of(2, 2, 90)
    plain = symmetric(weight, 7)
    whole = Levels(plain.scale, plain.zero, -7, 7, np.ones(weight.shape, bool))
    for one, other in zip(
        round_compensated(weight, plain, feedback(moment)), round_compensated(weight, whole, feedback(moment)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_entries_of_outputs_that_cost_more_stay_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a support is shared among outputs, and also where these are rounded a few at a time."""
    weight, moment = normal(1, 1, 8, 64).astype(np.float64), moment_of(2, 1, 64)
    outputs = np.where(np.arange(8) % 2 == 0, 100.0, 1.0)[None]
    levels = Levels(np.full((1, 1, 1), 0.5), np.zeros((1, 1, 1)), -4, 4, kept(weight, 0.25), 1, outputs)
    for entries in (gptq._ENTRIES, 2 * 64):
        monkeypatch.setattr(gptq, "_ENTRIES", entries)
        codes, _ = round_compensated(weight, levels, feedback(moment))
        assert np.count_nonzero(codes[:, ::2]) > 2 * np.count_nonzero(codes[:, 1::2])


def test_what_is_dropped_is_made_up_for() -> None:
    """Against the same number of nearest codes that are dropped by magnitude times cost: at least a third of the error goes."""
    found = plain = 0.0
    for seed in range(4):
        weight, moment = normal(seed, 1, 32, 96).astype(np.float64), moment_of(seed, 1, 96, 60)
        support = kept(weight * np.sqrt(moment.diag[:, None, :]), 0.5)
        levels = Levels(np.full((1, 1, 1), 0.3), np.zeros((1, 1, 1)), -8, 8, support, 1)
        codes, _ = round_compensated(weight, levels, feedback(moment))
        dropped = np.copysign(np.clip(np.rint(np.abs(weight) / 0.3), 1, 8), weight) * support
        found += moment.energy(weight, values(codes, levels))
        plain += moment.energy(weight, values(dropped, levels))
    assert found < 0.67 * plain


def test_it_is_near_the_best_of_all_integers() -> None:
    """All 3⁷ choices for a row: over many rows compensation takes away at least half of what nearest rounding loses beyond the optimum."""
    every = np.array(list(itertools.product([-1.0, 0.0, 1.0], repeat=7)))
    compensated = plain = optimum = 0.0
    for seed in range(40):
        weight, moment = normal(seed, 1, 1, 7).astype(np.float64), moment_of(seed, 1, 7, 9)
        metric, levels = moment.regularized(RIDGE), symmetric(weight, 1)
        _, errors = round_compensated(weight, levels, feedback(moment))
        lost = weight[0] - every * levels.scale[0]
        best = np.einsum("kn,nj,kj->k", lost, metric.matrix[0], lost).min()
        assert errors[0, 0] >= best * (1 - 1e-4)  # summed in float32
        compensated += float(errors.sum())
        plain += metric.energy(weight, values(nearest(weight, levels), levels))
        optimum += float(best)
    assert compensated - optimum < 0.5 * (plain - optimum)


def test_correlated_inputs_gain_most() -> None:
    """Two inputs that are nearly the same: what one loses the other gives back, so the error of a pair is that of one step in all."""
    rng = np.random.default_rng(3)
    shared = rng.standard_normal((4000, 16))
    rows = np.concatenate([shared, shared + 0.01 * rng.standard_normal(shared.shape)], axis=1)
    weight = rng.standard_normal((1, 32, 32))
    close, apart = Moment((rows.T @ rows / 4000)[None], 4000), Moment(np.eye(32)[None], 4000)
    assert compensation(weight, close) < 0.6
    assert compensation(weight, apart) == pytest.approx(1, abs=0.01)  # ties aside nothing can be compensated
    assert compensation(weight, Moment.isotropic(1, 32)) == 1


def test_the_gain_does_not_depend_on_bits() -> None:
    """The assumption behind one gain for all storages, at a step that clips nothing; within a quarter from three bits on."""
    weight, moment = normal(1, 1, 64, 96).astype(np.float64), moment_of(2, 1, 96, 100)
    expected, parts = compensation(weight, moment), feedback(moment)
    for largest in (3, 7, 31):
        levels = symmetric(weight, largest)
        found = moment.energy(weight, values(round_compensated(weight, levels, parts)[0], levels))
        assert found / moment.energy(weight, values(nearest(weight, levels), levels)) == pytest.approx(expected, rel=0.25)


def test_many_inputs_fall_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are compensated by themselves: the codes of each are those of its own part of the metric."""
    weight, moment = normal(1, 2, 5, 20).astype(np.float64), moment_of(2, 2, 20)
    levels = symmetric(weight, 3)
    monkeypatch.setattr(gptq, "LARGEST_BLOCK", 7)
    parts = feedback(moment)
    codes, errors = round_compensated(weight, levels, parts)
    assert [part.order.shape[1] for part in parts] == [7, 7, 6]
    total = 0.0
    for start, stop in ((0, 7), (7, 14), (14, 20)):
        part = feedback(Moment(moment.matrix[:, start:stop, start:stop], 5))
        alone, error = round_compensated(weight[:, :, start:stop], levels, part)
        np.testing.assert_array_equal(codes[:, :, start:stop], alone)
        total += error
    np.testing.assert_allclose(errors, total, rtol=1e-6)


def test_outputs_do_not_depend_on_how_many_are_rounded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = normal(1, 2, 11, 70).astype(np.float64), moment_of(2, 2, 70)
    levels, parts = symmetric(weight, 3), feedback(moment)
    whole = round_compensated(weight, levels, parts)[1]
    monkeypatch.setattr(gptq, "_ENTRIES", 3 * 2 * 70)
    pieces = round_compensated(weight, levels, parts)[1]
    same = np.isclose(pieces, whole, rtol=1e-4)
    assert same.mean() >= 0.9  # products of another size sum in another order, so that a tie may fall otherwise


@pytest.mark.parametrize("matrix", [np.zeros((1, 6, 6)), np.ones((1, 6, 6)), np.eye(6)[None] * 1e-300, -1e-12 * np.eye(6)[None]])
def test_metrics_without_full_rank(matrix: Array) -> None:
    """No input was ever seen, all are the same, or rounding made the metric indefinite."""
    weight = normal(1, 1, 4, 6).astype(np.float64)
    codes, errors = round_compensated(weight, symmetric(weight, 7), feedback(Moment(matrix, 3)))
    assert np.isfinite(errors).all()
    assert np.abs(codes).max() <= 7
