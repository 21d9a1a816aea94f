"""Adam: the size of its steps, that it finds minima, and that it goes on bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intaglio.passes.adam import Adam, AdamOptions, schedule
from tests.models import Array, normal

COUNT = 50
UNITS = np.geomspace(1e-3, 1e3, COUNT).astype(np.float32)


def adam(options: AdamOptions | None = None) -> Adam:
    return Adam(normal(1, COUNT) * UNITS, UNITS, options or AdamOptions())


def gradients(count: int) -> list[Array]:
    return [normal(seed, COUNT) for seed in range(2, 2 + count)]


@given(st.floats(1e-3, 1e3))
def test_the_first_step_moves_every_entry_by_the_rate_in_its_unit_whatever_the_gradient(scale: float) -> None:
    one = adam()
    start, gradient = one.values.copy(), np.float32(scale) * normal(2, COUNT)
    one.step(gradient.copy(), 0.01)
    moved = (start - one.values) / UNITS
    large = np.abs(gradient * UNITS) > 1e-5  # beside an epsilon of 1e-8
    # One part in a thousand by epsilon; starts of up to 4 units are float32
    np.testing.assert_allclose(moved[large], 0.01 * np.sign(gradient[large]), rtol=1e-3, atol=1e-6)


def test_it_follows_the_published_recursion() -> None:
    options = AdamOptions(clip=np.inf)
    one, first, second = adam(options), np.zeros(COUNT), np.zeros(COUNT)
    values = one.values.astype(np.float64)
    for step, gradient in enumerate(gradients(5), 1):
        g = gradient.astype(np.float64) * UNITS
        first, second = 0.9 * first + 0.1 * g, 0.99 * second + 0.01 * g**2
        values -= 0.01 * UNITS * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.99**step)) + 1e-8)
        one.step(gradient.copy(), 0.01)
    np.testing.assert_allclose(one.values, values, rtol=1e-5, atol=1e-6)  # float32 against float64 over five steps


def test_a_quadratic_bowl_with_a_noisy_gradient_is_descended() -> None:
    rng, goal = np.random.default_rng(0), normal(9, COUNT) * UNITS
    one = adam()
    for step in range(400):
        noise = 0.1 * rng.standard_normal(COUNT).astype(np.float32)
        one.step(((one.values - goal) / UNITS + noise) / UNITS, 0.1 * schedule(step, 400, 20))
    assert np.abs((one.values - goal) / UNITS).max() < 0.05


def test_decay_takes_its_share_of_every_entry() -> None:
    one = adam(AdamOptions(decay=0.5))
    start = one.values.copy()
    one.step(np.zeros(COUNT, np.float32), 0.1)
    np.testing.assert_allclose(one.values, 0.95 * start, rtol=1e-6)


def test_an_outlying_gradient_is_cut_to_a_multiple_of_the_recent_length() -> None:
    """So it makes no difference how far out it lies, and the gradient's own length is reported all the same."""

    def run(options: AdamOptions, factor: float) -> Array:
        one = adam(options)
        lengths = [one.step(gradient * np.float32(factor if number == 8 else 1), 0.01) for number, gradient in enumerate(gradients(12))]
        np.testing.assert_allclose(lengths[8], factor * float(np.linalg.norm(gradients(12)[8] * UNITS)), rtol=1e-5)
        return one.values

    # float32, over four steps
    np.testing.assert_allclose(run(AdamOptions(clip=3.0), 1e3), run(AdamOptions(clip=3.0), 1e6), rtol=1e-5)
    assert not np.allclose(run(AdamOptions(clip=np.inf), 1e3), run(AdamOptions(clip=3.0), 1e3), rtol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    one = adam()
    one.step(normal(2, COUNT), 0.01)
    state = {key: array.copy() for key, array in one.state().items()}
    gradient = normal(3, COUNT)
    gradient[7] = bad
    assert not np.isfinite(one.step(gradient, 0.01))
    for key, array in one.state().items():
        np.testing.assert_array_equal(array, state[key])


def test_a_restored_state_goes_on_bit_by_bit() -> None:
    whole, first = adam(), adam()
    for gradient in gradients(6):
        whole.step(gradient.copy(), 0.01)
    for gradient in gradients(3):
        first.step(gradient.copy(), 0.01)
    second = Adam(np.zeros(COUNT, np.float32), UNITS)
    second.restore({key: array.copy() for key, array in first.state().items()})
    for gradient in gradients(6)[3:]:
        second.step(gradient.copy(), 0.01)
    np.testing.assert_array_equal(second.values, whole.values)
    assert second.steps == 6


@given(st.integers(2, 500), st.data())
def test_rates_rise_and_then_fall_to_almost_nothing(steps: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    shares = [schedule(step, steps, warmup) for step in range(steps)]
    assert all(0 < share <= 1 for share in shares)
    assert shares[warmup] == 1
    assert shares[: warmup + 1] == sorted(shares[: warmup + 1])
    assert shares[warmup:] == sorted(shares[warmup:], reverse=True)
    assert schedule(steps, steps, warmup) == 0
