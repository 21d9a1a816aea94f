"""Bases: orthogonal, of eigenvectors, undone exactly, and worth having where gradients of a row are mostly one direction."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intaglio.passes import bases as module
from intaglio.passes.adam import Adam, AdamOptions, schedule
from intaglio.passes.bases import LONGEST, Bases, Block, entries_of
from tests.models import Array, normal

shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


def blocks(*shapes: tuple[int, ...], gap: int = 3) -> tuple[list[Block], int]:
    """Arrays with other entries before, between and after them, and how many entries there are."""
    found, start = [], gap
    for shape in shapes:
        found.append(Block(slice(start, start + math.prod(shape)), shape))
        start = found[-1].part.stop + gap
    return found, start


def learnt(*shapes: tuple[int, ...]) -> tuple[Bases, list[Block], int]:
    """Bases after some gradients."""
    parts, count = blocks(*shapes)
    bases = Bases(parts)
    for seed in range(5):
        bases.observe(normal(seed, count), 0.9)
    bases.renew()
    return bases, parts, count


@given(st.lists(shapes, max_size=3))
def test_turning_keeps_lengths_and_other_entries_and_is_undone(many: list[tuple[int, ...]]) -> None:
    bases, parts, count = learnt(*many)
    given_, flat = normal(9, count), normal(9, count)
    bases.turn(flat)
    others = np.ones(count, bool)
    for block in parts:
        others[block.part] = False
        np.testing.assert_allclose(np.linalg.norm(flat[block.part]), np.linalg.norm(given_[block.part]), rtol=1e-4)
        if not block.axes:
            np.testing.assert_array_equal(flat[block.part], given_[block.part])
    np.testing.assert_array_equal(flat[others], given_[others])
    bases.back(flat)
    np.testing.assert_allclose(flat, given_, atol=1e-5)


def test_gradients_are_unrelated_in_the_basis_of_each_axis() -> None:
    (block,), count = blocks((4, 5, 3))
    bases = Bases([block])
    total = [np.zeros((length, length)) for length in block.shape]
    for seed in range(6):
        gradient = normal(seed, count)
        bases.observe(gradient, 0.9)
        array = gradient[block.part].reshape(block.shape).astype(np.float64)
        for axis, moment in enumerate(total):
            rows = np.moveaxis(array, axis, 0).reshape(len(moment), -1)
            moment[...] = 0.9 * moment + 0.1 * rows @ rows.T
    bases.renew()
    start = 0
    for moment in total:
        length = len(moment)
        vectors = bases.vectors[start : start + length**2].reshape(length, length)
        turned = vectors.T @ moment @ vectors
        np.testing.assert_allclose(turned, np.diag(np.diagonal(turned)), atol=1e-4 * np.abs(turned).max())
        start += length**2


def test_what_lies_in_the_bases_lies_in_the_new_ones_after_they_are_renewed() -> None:
    bases, _, count = learnt((4, 5), (3, 2, 2))
    kept = normal(7, count)
    turned = kept.copy()
    bases.turn(turned)
    before = turned.copy()
    bases.observe(normal(8, count), 0.1)
    bases.renew(turned)
    assert not np.allclose(turned, before, atol=1e-2)
    bases.back(turned)
    np.testing.assert_allclose(turned, kept, atol=1e-5)


def test_moments_that_are_not_finite_leave_the_basis_as_it_is() -> None:
    bases, _, count = learnt((4, 5))
    before = bases.vectors.copy()
    with np.errstate(over="ignore", invalid="ignore"):
        bases.observe(np.full(count, 1e30, np.float32), 0.5)
    bases.renew()
    np.testing.assert_array_equal(bases.vectors, before)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (7, 1, 1), (1,), (LONGEST + 1, LONGEST + 1)])
def test_arrays_of_one_axis_and_axes_that_are_too_long_have_none(shape: tuple[int, ...]) -> None:
    assert Block(slice(0, math.prod(shape)), shape).axes == ()
    assert entries_of([Block(slice(0, math.prod(shape)), shape)]) == 0


def test_a_long_axis_does_not_keep_the_others_from_theirs() -> None:
    assert Block(slice(0, 3 * (LONGEST + 1)), (LONGEST + 1, 3)).axes == (1,)


def test_arrays_that_need_little_work_come_first_and_the_rest_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, count = blocks((6, 6), (2, 2), (4, 4))
    monkeypatch.setattr(module, "MOST_WORK", parts[1].work + parts[2].work)
    assert entries_of(parts) == 2 * (2 * 4 + 2 * 16)
    bases = Bases(parts)
    assert len(bases.vectors) == 2 * 4 + 2 * 16
    bases.observe(normal(1, count), 0.5)
    bases.renew()
    flat = normal(2, count)
    bases.turn(flat)
    np.testing.assert_array_equal(flat[parts[0].part], normal(2, count)[parts[0].part])
    assert not np.allclose(flat[parts[2].part], normal(2, count)[parts[2].part], atol=1e-3)


ROWS, COLUMNS = 6, 128
MIXED = (np.eye(COLUMNS) + 10.0).astype(np.float32)
"""E[x xᵀ] of inputs that share a mean."""


def left(options: AdamOptions, rate: float) -> float:
    """What is left of a loss ½ tr(W A Wᵀ) after some steps along noisy gradients, relative to the start."""
    rng = np.random.default_rng(0)
    values = normal(3, ROWS * COLUMNS)
    units = np.ones_like(values)
    one = Adam(values, units, options, Bases([Block(slice(0, values.size), (ROWS, COLUMNS))]))
    root = np.linalg.cholesky(MIXED).astype(np.float32)

    def loss() -> float:
        weight = values.reshape(ROWS, COLUMNS)
        return float(np.vdot(weight @ MIXED, weight))

    start = loss()
    for step in range(300):
        noise = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32) @ root.T
        gradient = values.reshape(ROWS, COLUMNS) @ MIXED + 3.0 * noise
        one.step(gradient.reshape(-1), rate * schedule(step, 300, 15))
    return loss() / start


def test_flat_directions_no_longer_wait_for_the_steep_one() -> None:
    assert left(AdamOptions(), 0.06) < 0.25 * left(AdamOptions(renewal=0), 0.06)


@pytest.mark.parametrize("shape", [(64, 96), (16, 16), (128, 8), (8, 12, 3, 3)])
def test_no_step_moves_entries_much_farther_than_plain_adam_does(shape: tuple[int, ...]) -> None:
    """Whatever basis mean squares were taken in before."""
    count = math.prod(shape)
    values = np.zeros(count, np.float32)
    one = Adam(values, np.ones(count, np.float32), AdamOptions(), Bases([Block(slice(0, count), shape)]))
    for seed in range(24):
        before = values.copy()
        one.step(normal(seed, count), 1.0)
        assert np.sqrt(np.mean((values - before) ** 2)) < 1.5
        assert np.abs(values - before).max() < 10


def test_eigenvectors_that_are_not_found_leave_the_basis_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    bases, _, count = learnt((4, 5))
    before = bases.vectors.copy()

    def fails(*_: object, **__: object) -> None:
        raise np.linalg.LinAlgError("did not converge")

    monkeypatch.setattr("scipy.linalg.eigh", fails)
    bases.observe(normal(8, count), 0.1)
    bases.renew()
    np.testing.assert_array_equal(bases.vectors, before)


def test_without_renewals_it_is_plain_adam_bit_by_bit() -> None:
    def run(bases: Bases | None, renewal: int) -> Array:
        values = normal(1, 12)
        one = Adam(values, np.ones(12, np.float32), AdamOptions(renewal=renewal), bases)
        for seed in range(2, 9):
            one.step(normal(seed, 12), 0.01)
        return values

    bases = Bases([Block(slice(0, 12), (3, 4))])
    np.testing.assert_array_equal(run(bases, 0), run(None, 10))
    assert not np.array_equal(run(bases, 10), run(None, 10))


def test_it_goes_on_bit_by_bit_from_a_state() -> None:
    def fresh() -> Adam:
        return Adam(normal(1, 40), np.ones(40, np.float32), AdamOptions(renewal=3), Bases(blocks((3, 4), (2, 2, 2))[0]))

    one, other = fresh(), fresh()
    for seed in range(2, 10):
        one.step(normal(seed, 40), 0.01)
    other.restore({name: array.copy() for name, array in one.state().items()})
    for seed in range(10, 20):
        one.step(normal(seed, 40), 0.01)
        other.step(normal(seed, 40), 0.01)
    np.testing.assert_array_equal(one.values, other.values)
