"""Second moments as metrics."""

from __future__ import annotations

import numpy as np
import pytest

from intaglio.ops.moment import Moment, relative_error
from tests.ops.running import moment_of, normal

CLOSE = 1e-10
"""Double precision sums of a few dozen terms."""


def weights(groups: int, m: int, n: int) -> np.ndarray:
    return normal(1, groups, m, n).astype(np.float64)


@pytest.mark.parametrize("groups", [1, 3])
def test_energy_is_the_mean_square_of_the_outputs(groups: int) -> None:
    rows = normal(2, groups, 50, 6).astype(np.float64)
    moment = Moment(rows.transpose(0, 2, 1) @ rows / 50, 50)
    weight = weights(groups, 4, 6)
    outputs = rows @ weight.transpose(0, 2, 1)
    assert moment.energy(weight) == pytest.approx(np.square(outputs).sum() / 50, rel=CLOSE)
    np.testing.assert_allclose(moment.output_gram(weight), outputs.transpose(0, 2, 1) @ outputs / 50, rtol=CLOSE, atol=CLOSE)


def test_a_diagonal_moment_is_the_full_one_with_that_diagonal() -> None:
    diagonal = Moment(np.square(normal(3, 2, 5)).astype(np.float64), 9)
    full = Moment(diagonal.matrix[:, :, None] * np.eye(5), 9)
    weight = weights(2, 3, 5)
    assert diagonal.diagonal
    assert not full.diagonal
    np.testing.assert_allclose(diagonal.times(weight), full.times(weight), rtol=CLOSE)
    np.testing.assert_allclose(diagonal.output_gram(weight), full.output_gram(weight), rtol=CLOSE)
    np.testing.assert_allclose(diagonal.regularized(0.5).diag, full.regularized(0.5).diag, rtol=CLOSE)
    np.testing.assert_array_equal(diagonal.diag, full.diag)


def test_regularization_adds_a_share_of_the_mean_square_and_changes_no_input() -> None:
    moment = moment_of(4, 2, 5)
    before = moment.matrix.copy()
    added = moment.regularized(0.25).matrix - moment.matrix
    for group in range(2):
        np.testing.assert_allclose(added[group], 0.25 * np.trace(before[group]) / 5 * np.eye(5), rtol=CLOSE, atol=CLOSE)
    np.testing.assert_array_equal(moment.matrix, before)
    assert moment.regularized().rows == moment.rows


def test_the_mean_is_kept() -> None:
    mean = normal(1, 2, 5).astype(np.float64)
    moment = Moment(moment_of(4, 2, 5).matrix, 3, mean)
    assert moment.regularized().mean is mean
    assert moment.shrunk().mean is mean
    assert moment_of(4, 2, 5).shrunk().mean is None


@pytest.mark.parametrize("matrix", [np.zeros((2, 4, 4)), np.zeros((2, 4))])
def test_an_input_that_was_always_zero_gets_a_metric(matrix: np.ndarray) -> None:
    assert (Moment(matrix, 3).regularized(0.01).diag == 0.01).all()


def test_isotropic_error_is_the_frobenius_norm() -> None:
    weight, other = weights(2, 3, 4), weights(2, 3, 4)[::-1]
    expected = np.square(weight - other).sum() / np.square(weight).sum()
    assert relative_error(weight, other, Moment.isotropic(2, 4)) == pytest.approx(expected, rel=CLOSE)


def test_relative_error_of_a_weight_without_output() -> None:
    zero = np.zeros((1, 2, 3))
    assert relative_error(zero, zero, Moment.isotropic(1, 3)) == 0
    assert relative_error(zero, zero + 1, Moment.isotropic(1, 3)) == 1
