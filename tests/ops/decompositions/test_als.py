"""Alternating least squares for W ≈ U·(V ⊗ I)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.decompositions.als import compose, lift, metric_of, orthonormal, pull, regress, start, update_factor
from intaglio.ops.decompositions.linalg import balance, lower_root
from intaglio.ops.moment import Moment
from tests.ops.running import Array, moment_of, normal

INNER, POSITIONS, M = 5, 3, 6
N = INNER * POSITIONS

CLOSE = 1e-9
"""Double precision sums of at most some hundred products."""


def doubles(seed: int, *shape: int) -> Array:
    return normal(seed, *shape).astype(np.float64)


def prefix(factor: Array) -> Array:
    return np.kron(factor, np.eye(POSITIONS))


def error(weight: Array, factor: Array, outputs: Array, metric: Array) -> float:
    """‖(W − U·P)A½‖²."""
    difference = weight - outputs @ prefix(factor)
    return float(np.trace(difference @ metric @ difference.T))


def test_lift_compose_and_pull_are_what_they_stand_for() -> None:
    factor, outputs, right, image = doubles(1, 4, INNER), doubles(2, M, 4 * POSITIONS), doubles(3, N, 7), doubles(4, M, N)
    np.testing.assert_allclose(lift(factor, right), prefix(factor) @ right, atol=CLOSE)
    np.testing.assert_allclose(compose(outputs, factor), outputs @ prefix(factor), atol=CLOSE)
    assert np.vdot(pull(outputs, image, 4), factor) == pytest.approx(np.vdot(image, compose(outputs, factor)), rel=CLOSE)


@given(st.integers(1, INNER), st.integers(0, 1000))
def test_regression_is_the_least_squares_solution_and_its_nested_parts_too(rank: int, seed: int) -> None:
    metric, weight = moment_of(seed, 1, N).regularized(0.01).matrix[0], doubles(seed + 1, M, N)
    factor = orthonormal(doubles(seed + 2, INNER, INNER))
    nested = regress(factor, weight, metric).explained[: rank * POSITIONS]
    solved = regress(factor[:rank], weight, metric)
    np.testing.assert_allclose(nested.T @ nested, solved.explained.T @ solved.explained, atol=1e-6 * np.square(nested).sum())
    root = np.linalg.cholesky(metric)
    best, *_ = np.linalg.lstsq((prefix(factor[:rank]) @ root).T, (weight @ root).T)
    expected = error(weight, factor[:rank], best.T, metric)
    total = float(np.trace(weight @ metric @ weight.T))
    assert error(weight, factor[:rank], solved.outputs(), metric) == pytest.approx(expected, abs=1e-6 * total)
    assert total - np.square(nested).sum() == pytest.approx(expected, abs=1e-6 * total)


@settings(max_examples=50)
@given(st.integers(1, INNER), st.integers(0, 1000), st.sampled_from([N, 4, 1]))
def test_neither_step_raises_the_error(rank: int, seed: int, rows: int) -> None:
    metric = moment_of(seed, 1, N, 2 * rows).regularized(0.01).matrix[0]
    weight, factor, outputs = doubles(seed, M, N), doubles(seed + 1, rank, INNER), doubles(seed + 2, M, rank * POSITIONS)
    total = float(np.trace(weight @ metric @ weight.T))
    errors = [error(weight, factor, outputs, metric)]
    for _ in range(4):
        factor = update_factor(factor, outputs, weight, metric)
        errors.append(error(weight, factor, outputs, metric))
        outputs = regress(factor, weight, metric).outputs()
        errors.append(error(weight, factor, outputs, metric))
    assert all(later <= earlier + 1e-6 * total for earlier, later in pairwise(errors))
    assert errors[-1] < errors[0]


def test_enough_steps_solve_for_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "intaglio.ops.decompositions.als.STEPS", 3 * 2 * INNER
    )  # conjugate directions: as many as there are unknowns, and some for rounding
    monkeypatch.setattr("intaglio.ops.decompositions.als.NEGLIGIBLE", 1e-16)
    metric, weight, outputs = moment_of(5, 1, N).matrix[0], doubles(6, M, N), doubles(7, M, 2 * POSITIONS)
    factor = update_factor(doubles(8, 2, INNER), outputs, weight, metric)
    root = np.linalg.cholesky(metric)
    columns = [(compose(outputs, unit.reshape(2, INNER)) @ root).reshape(-1) for unit in np.eye(2 * INNER)]
    best, *_ = np.linalg.lstsq(np.stack(columns, 1), (weight @ root).reshape(-1))
    np.testing.assert_allclose(factor.reshape(-1), best, atol=1e-5)


def test_the_start_is_orthonormal_and_nested() -> None:
    metric, weight = moment_of(9, 1, N).matrix[0], doubles(10, M, N)
    large = start(weight, metric, INNER, 4)
    np.testing.assert_allclose(large @ large.T, np.eye(4), atol=CLOSE)
    small = start(weight, metric, INNER, 2)
    np.testing.assert_allclose(small.T @ small, large[:2].T @ large[:2], atol=1e-6)


def test_the_start_is_optimal_where_the_metric_is_the_same_at_every_position() -> None:
    inner = moment_of(11, 1, INNER).matrix[0]
    metric, weight = np.kron(inner, np.eye(POSITIONS)), doubles(12, M, N)
    unfolded = weight.reshape(M, INNER, POSITIONS).transpose(0, 2, 1).reshape(-1, INNER) @ np.linalg.cholesky(inner)
    tails = np.square(np.linalg.svd(unfolded, compute_uv=False))
    for rank in range(1, INNER + 1):
        factor = start(weight, metric, INNER, rank)
        measured = error(weight, factor, regress(factor, weight, metric).outputs(), metric)
        assert measured == pytest.approx(tails[rank:].sum(), abs=1e-6 * tails.sum())


def test_orthonormal_rows_span_the_same() -> None:
    factor = doubles(13, 3, INNER)
    rows = orthonormal(factor)
    np.testing.assert_allclose(rows @ rows.T, np.eye(3), atol=CLOSE)
    np.testing.assert_allclose(factor @ rows.T @ rows, factor, atol=CLOSE)


def test_metric_of_a_diagonal_moment() -> None:
    np.testing.assert_array_equal(metric_of(Moment(np.array([[1.0, 2.0]]), 0)), [[1, 0], [0, 2]])


@pytest.mark.parametrize("gram", [np.zeros((3, 3)), np.ones((3, 3)), np.diag([1.0, 0.0, -1e-12])], ids=["zero", "flat", "negative"])
def test_a_root_is_found_where_rounding_left_none(gram: Array) -> None:
    root = lower_root(gram)
    np.testing.assert_allclose(root @ root.T, gram, atol=1e-6)
    np.testing.assert_array_equal(root, np.tril(root))


def test_balance_leaves_components_without_scale_alone() -> None:
    np.testing.assert_array_equal(balance(np.array([4.0, 0, 2]), np.array([1.0, 1, 0])), [0.5, 1, 1])
