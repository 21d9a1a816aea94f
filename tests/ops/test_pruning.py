"""Structured pruning: refits against least squares, prices against refits, orders against brute force."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops import pruning as module
from intaglio.ops.moment import Moment, relative_error
from intaglio.ops.pruning import Consumer, block_indices, channel_order, check_kept, pruning_errors, refit, spread
from tests.ops.running import Array, moment_of

CLOSE = 1e-6
"""The ridge of 1e-9, times the condition of moments of twice as many rows as inputs, which stays below 1e3 here."""

LOSSLESS = 1e-7
"""The ridge of 1e-9, times the few dozen inputs that share it."""


def consumer(seed: int, channels: int, block: int = 1, m: int = 5) -> Consumer:
    """A random layer on correlated inputs."""
    n = channels * block
    weight = np.random.default_rng(seed).standard_normal((1, m, n)) * np.geomspace(1, 0.2, n)
    return weight, moment_of(seed + 1, 1, n), block


def error(layer: Consumer, kept: Array) -> float:
    """What the layer's output loses when it is refitted to some channels."""
    weight, moment, block = layer
    whole = spread(refit(weight, moment, block, kept), block, kept, weight.shape[2] // block)
    return relative_error(weight, whole, moment)


def total(layers: list[Consumer], kept: Array) -> float:
    return sum(error(layer, kept) for layer in layers)


def without(channels: int, *dropped: int) -> Array:
    return np.setdiff1d(np.arange(channels), dropped)


def with_copies(data: Array, copies: list[tuple[int, int]]) -> Moment:
    """The moment of rows in which each pair's second channel repeats the first; (rows, channels, block)."""
    data = data.copy()
    for source, copy in copies:
        data[:, copy] = data[:, source]
    rows = data.reshape(len(data), -1)
    return Moment((rows.T @ rows / len(rows))[None], len(rows))


@pytest.mark.parametrize("block", [1, 4])
def test_a_refit_is_least_squares_on_the_kept_inputs(block: int) -> None:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((200, 6 * block)) @ rng.standard_normal((6 * block, 6 * block))
    weight, kept = rng.standard_normal((1, 7, 6 * block)), np.array([0, 2, 5])
    found = refit(weight, Moment((rows.T @ rows / 200)[None], 200), block, kept)
    expected, *_ = np.linalg.lstsq(rows[:, block_indices(kept, block)], rows @ weight[0].T, rcond=None)
    assert found.shape == (1, 7, 3 * block)
    np.testing.assert_allclose(found[0], expected.T, rtol=CLOSE, atol=CLOSE * np.abs(expected).max())


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 4))
def test_the_errors_are_those_of_the_refitted_weights(seed: int, channels: int, block: int) -> None:
    layer = consumer(seed, channels, block)
    order = np.random.default_rng(seed).permutation(channels)
    predicted = pruning_errors(*layer, order, range(channels + 1))
    assert predicted[0] == pytest.approx(1, abs=CLOSE)
    assert predicted[channels] == 0
    for count in range(1, channels):
        assert predicted[count] == pytest.approx(error(layer, np.sort(order[-count:])), rel=CLOSE, abs=1e-9)


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(2, 7), st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_each_step_gives_up_the_cheapest_channel_for_all_consumers_together(seed: int, channels: int, blocks: list[int]) -> None:
    layers = [consumer(seed + 10 * i, channels, block) for i, block in enumerate(blocks)]
    order = channel_order(layers)
    assert sorted(order) == list(range(channels))
    for step in range(channels - 1):
        left = sorted(set(range(channels)) - set(order[:step]))
        losses = [total(layers, without(channels, *order[:step], channel)) for channel in left]
        assert total(layers, without(channels, *order[: step + 1])) == pytest.approx(min(losses), rel=CLOSE, abs=1e-9)


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("compacted", [False, True])
def test_the_price_of_every_channel_stays_exact_as_others_go(block: int, compacted: bool) -> None:
    layer, alive = consumer(8, 7, block), np.ones(7, dtype=bool)
    state = module._Elimination.begin(*layer)
    for dropped in (4, 1, 6):
        state.drop(dropped)
        alive[dropped] = False
    left = np.flatnonzero(alive)
    before = error(layer, left)
    expected = [error(layer, np.setdiff1d(left, [channel])) - before for channel in left]
    if compacted:
        state.compact(alive)
        alive = np.ones(len(left), dtype=bool)
    np.testing.assert_allclose(state.losses(alive), expected, rtol=CLOSE, atol=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_the_greedy_order_comes_near_the_best_subsets(seed: int) -> None:
    """Of all subsets of each size: at most half as much again as the best, and below every third."""
    layers = [consumer(seed, 8, 2), consumer(seed + 50, 8, 1)]
    order = channel_order(layers)
    for count in (3, 5, 7):
        losses = sorted(total(layers, np.array(kept)) for kept in combinations(range(8), count))
        found = total(layers, np.sort(order[-count:]))
        assert found <= 1.5 * losses[0] + 1e-9
        assert found <= losses[len(losses) // 3] + 1e-9


@pytest.mark.parametrize("block", [1, 3])
def test_copies_and_dead_channels_go_first_and_cost_nothing(block: int) -> None:
    rng = np.random.default_rng(5)
    data = rng.standard_normal((100, 9, block))
    data[:, 4] = 0
    layer = (rng.standard_normal((1, 6, 9 * block)), with_copies(data, [(0, 3), (0, 7), (2, 8)]), block)
    order = channel_order([layer])
    dropped = set(order[:4].tolist())
    assert 4 in dropped
    assert (len(dropped & {0, 3, 7}), len(dropped & {2, 8})) == (2, 1)
    kept = np.sort(order[4:])
    assert error(layer, kept) < LOSSLESS
    assert pruning_errors(*layer, order, [5])[0] < LOSSLESS
    assert pruning_errors(*layer, order, [4])[0] > 0.01
    assert np.abs(refit(*layer, kept)).max() < 4 * np.abs(layer[0]).max()  # a sum of three weights, not a division by rounding errors


@pytest.mark.parametrize("block", [1, 5])
def test_updates_that_are_collected_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [consumer(1, 12, block), consumer(2, 12, 2)]
    collected = channel_order(layers)
    monkeypatch.setattr(module, "_PANEL", 1)
    np.testing.assert_array_equal(channel_order(layers), collected)


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_the_scale_of_a_channel_does_not_matter(seed: int) -> None:
    """A layer that reads channels scaled by powers of two and undoes that is the same layer."""
    weight, moment, block = consumer(seed, 6)
    factors = 2.0 ** np.random.default_rng(seed).integers(-8, 8, 6)
    other = (weight / factors, Moment(moment.matrix * factors[:, None] * factors, moment.rows), block)
    order = channel_order([(weight, moment, block)])
    np.testing.assert_array_equal(channel_order([other]), order)
    counts = range(7)
    np.testing.assert_allclose(pruning_errors(*other, order, counts), pruning_errors(weight, moment, block, order, counts), rtol=CLOSE)


def test_inputs_without_statistics_predict_nothing() -> None:
    weight, prior = np.arange(1.0, 9.0).reshape(1, 2, 4), Moment.isotropic(1, 4)
    np.testing.assert_array_equal(refit(weight, prior, 2, np.array([1])), weight[:, :, 2:])
    np.testing.assert_array_equal(channel_order([(weight, prior, 1)]), [0, 1, 2, 3])  # by the norms of the columns
    expected = np.square(weight[0, :, :3]).sum() / np.square(weight).sum()
    assert pruning_errors(weight, prior, 1, np.arange(4), [1])[0] == pytest.approx(expected, rel=CLOSE)


def test_a_layer_without_output_loses_nothing() -> None:
    silent = (np.zeros((1, 3, 4)), moment_of(1, 1, 4), 1)
    assert pruning_errors(*silent, np.arange(4), [0, 2]) == [0, 0]
    layer = consumer(3, 4)
    np.testing.assert_array_equal(channel_order([silent, layer]), channel_order([layer]))
    dead = (np.ones((1, 3, 4)), Moment(np.zeros((1, 4, 4)), 9), 1)
    assert sorted(channel_order([dead])) == [0, 1, 2, 3]
    assert pruning_errors(*dead, np.arange(4), [1]) == [0]


def test_keeping_everything_changes_nothing() -> None:
    weight, moment, block = consumer(4, 5, 2)
    np.testing.assert_array_equal(refit(weight, moment, block, np.arange(5)), weight)


def test_a_refitted_weight_lies_among_zeros() -> None:
    whole = spread(np.arange(1.0, 9.0).reshape(1, 2, 4), 2, np.array([0, 2]), 3)
    np.testing.assert_array_equal(whole, [[[1, 2, 0, 0, 3, 4], [5, 6, 0, 0, 7, 8]]])


@pytest.mark.parametrize("kept", [[], [1, 0], [1, 1], [-1, 0], [2, 4]])
def test_channels_that_are_not_there_are_refused(kept: list[int]) -> None:
    with pytest.raises(ValueError, match="expected ascending numbers from 0 to 3"):
        check_kept(np.array(kept, np.int64), 4)


def test_consumers_have_to_agree() -> None:
    with pytest.raises(ValueError, match=r"consumers of \[3, 4\] channels"):
        channel_order([consumer(1, 3), consumer(1, 4)])
    with pytest.raises(ValueError, match="expected one number of channels"):
        channel_order([])
    with pytest.raises(ValueError, match="a multiple of 2"):
        refit(np.ones((1, 2, 3)), Moment.isotropic(1, 3), 2, np.array([0]))
