"""Second moments as metrics."""

from __future__ import annotations

import numpy as np
import pytest

from intaglio.ops.moment import Moment, OutputMetric, relative_error
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


def output_metric(seed: int, groups: int, m: int, rows: int | None = None) -> OutputMetric:
    return OutputMetric(moment_of(seed, groups, m, rows).matrix)


@pytest.mark.parametrize("groups", [1, 3])
def test_energy_in_both_metrics_is_the_mean_square_of_what_reaches_the_loss(groups: int) -> None:
    x, g = normal(2, groups, 50, 6).astype(np.float64), normal(3, groups, 20, 4).astype(np.float64)
    outputs = OutputMetric(g.transpose(0, 2, 1) @ g / 20)
    moment = Moment(x.transpose(0, 2, 1) @ x / 50, 50, outputs=outputs)
    weight, other = weights(groups, 4, 6), weights(groups, 4, 6)[:, ::-1]
    reached = g @ (weight - other) @ x.transpose(0, 2, 1)
    assert moment.energy(weight, other) == pytest.approx(np.square(reached).sum() / 20 / 50, rel=CLOSE)
    assert relative_error(weight, other, moment) == pytest.approx(moment.energy(weight, other) / moment.energy(weight), rel=CLOSE)


@pytest.mark.parametrize("rows", [9, 2])
def test_whitening_takes_the_metric_of_outputs_into_the_weight(rows: int) -> None:
    """Also where G has no root of full rank: what is added to it is far below what is compared."""
    moment = moment_of(1, 2, 5).with_outputs(output_metric(2, 2, 4, rows))
    weight = weights(2, 4, 5)
    plain = moment.with_outputs(None)
    assert plain.energy(moment.whiten(weight)) == pytest.approx(moment.energy(weight), rel=1e-6)
    np.testing.assert_allclose(moment.unwhiten(moment.whiten(weight)), weight, rtol=1e-4, atol=1e-4)  # a condition of up to 1e5
    assert plain.whiten(weight) is weight
    assert plain.unwhiten(weight) is weight


def test_a_diagonal_metric_of_outputs_is_the_full_one_with_that_diagonal() -> None:
    diagonal = OutputMetric(np.square(normal(3, 2, 4)).astype(np.float64) + 0.1)
    full = OutputMetric(diagonal.matrix[:, :, None] * np.eye(4))
    weight = weights(2, 4, 5)
    assert diagonal.diagonal
    assert not full.diagonal
    for one, other in (
        (diagonal.whiten(weight), full.whiten(weight)),
        (diagonal.unwhiten(weight), full.unwhiten(weight)),
        (diagonal.times(weight), full.times(weight)),
        (diagonal.diag, full.diag),
        (diagonal.part(slice(None, None, 2)).diag, full.part(slice(None, None, 2)).diag),
    ):
        np.testing.assert_allclose(one, other, rtol=CLOSE, atol=CLOSE)


def test_an_output_that_nothing_reads_has_a_root_all_the_same() -> None:
    for matrix in (np.zeros((1, 3, 3)), np.diag([1.0, 0.0, 2.0])[None], np.zeros((1, 3))):
        metric = OutputMetric(matrix)
        assert np.isfinite(metric.unwhiten(np.ones((1, 3, 2)))).all()


def test_separate_energy_leaves_out_all_that_lies_beside_the_diagonals() -> None:
    moment = moment_of(1, 2, 5).with_outputs(output_metric(2, 2, 4))
    weight = weights(2, 4, 5)
    assert moment.outputs is not None
    expected = np.einsum("gi,gj,gij->", moment.outputs.diag, moment.diag, np.square(weight))
    assert moment.separate_energy(weight) == pytest.approx(expected, rel=CLOSE)
    alike = moment.with_outputs(None)
    assert alike.separate_energy(weight) == Moment(alike.diag, 0).energy(weight)


def test_the_metric_of_outputs_is_kept_and_can_be_cut() -> None:
    outputs = output_metric(2, 1, 4)
    moment = moment_of(1, 1, 5).with_outputs(outputs)
    assert moment.regularized().outputs is outputs
    assert moment.shrunk().outputs is outputs
    some = moment.of_outputs(slice(None, None, 3)).outputs
    assert some is not None
    np.testing.assert_array_equal(some.matrix, outputs.matrix[:, ::3, ::3])
    alike = moment.with_outputs(None)
    assert alike.of_outputs(slice(2)) is alike
