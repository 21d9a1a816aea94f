"""First-order prices: sums over one decomposition equal ⟨g, Ŵ − W⟩ of every rank, and what folds disagree on does not count."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intaglio.ops.decompositions import DECOMPOSITIONS, rebuild
from intaglio.ops.decompositions.als import SWEEPS, compose, metric_of, regress, start
from intaglio.ops.decompositions.joint import agreement, first_order, removals, significant, trusted
from intaglio.ops.decompositions.lowrank import components, factorize, spectrum
from intaglio.ops.families import Use
from intaglio.ops.moment import Moment, OutputMetric
from tests.models import CASES, site_of

ROUNDING = 1e-9
"""Relative to the largest term of a sum of a few hundred float64 products, with condition numbers up to about 1e4."""


def spd(rng: np.random.Generator, groups: int, size: int) -> np.ndarray:
    """Positive definite matrices with a condition number of about a hundred."""
    factor = rng.standard_normal((groups, size, 2 * size))
    return np.asarray(factor @ factor.transpose(0, 2, 1) / (2 * size) + 0.05 * np.eye(size))


def problem(seed: int, groups: int, m: int, n: int, *, folds: int = 3, outputs: bool = False) -> tuple[np.ndarray, Moment, np.ndarray]:
    """A weight, a metric and gradients."""
    rng = np.random.default_rng(seed)
    metric = OutputMetric(spd(rng, groups, m)) if outputs else None
    moment = Moment(spd(rng, groups, n), 100, None, metric)
    return rng.standard_normal((groups, m, n)), moment, rng.standard_normal((folds, groups, m, n))


def use(name: str) -> Use:
    """The operator of a case."""
    return site_of(CASES[name].proto())[1].use


def brute(weight: np.ndarray, approximation: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    return np.array([float((gradient * (approximation - weight)).sum()) for gradient in gradients])


@given(
    seed=st.integers(0, 10**6),
    groups=st.integers(1, 2),
    m=st.integers(2, 8),
    n=st.integers(2, 8),
    outputs=st.booleans(),
    diagonal=st.booleans(),
    sloped=st.booleans(),
)
def test_suffix_sums_are_what_every_rank_changes(
    seed: int, groups: int, m: int, n: int, outputs: bool, diagonal: bool, sloped: bool
) -> None:
    weight, moment, gradients = problem(seed, groups, m, n, outputs=outputs)
    if diagonal:
        moment = Moment(moment.diag.copy(), 100, None, moment.outputs)
    if sloped:
        moment = moment.with_slope(np.random.default_rng(seed + 1).standard_normal(weight.shape))
    ranks = [(rank,) for rank in range(1, min(m, n) + 1)]
    found = first_order(DECOMPOSITIONS["lowrank", "dense"], weight, moment, use("gemm"), ranks, gradients)
    energies = spectrum(weight, moment)
    scale = np.abs(gradients).sum() * np.abs(weight).max()
    for (rank,), changes in zip(ranks, found.T, strict=True):
        first, last = factorize(weight, moment, rank)
        assert changes == pytest.approx(brute(weight, last @ first, gradients), abs=ROUNDING * scale)
        # the fit keeps what the prices say: the lost energies are its error
        assert energies[:, rank:].sum() == pytest.approx(moment.energy(weight, last @ first), abs=ROUNDING * moment.energy(weight))


@pytest.mark.parametrize("outputs", [False, True])
def test_separable_prices_are_those_of_the_projection(outputs: bool) -> None:
    where = use("conv2d")
    weight, moment, gradients = problem(3, 1, where.view.m, where.view.n, outputs=outputs)
    separable = DECOMPOSITIONS["separable", "contract"]
    ranks = [(1,), (3,), (7,), separable.full(where)]
    found = first_order(separable, weight, moment, where, ranks, gradients)
    metric, white = metric_of(moment), moment.whiten(weight)[0]
    _, channels, rows, _ = where.view.shape
    for (rank,), changes in zip(ranks, found.T, strict=True):
        factor = start(white, metric, channels * rows, rank)
        whole = moment.unwhiten(compose(regress(factor, white, metric).outputs(), factor)[None])
        assert changes == pytest.approx(brute(weight, whole, gradients), abs=1e-6)  # least squares have a relative ridge of 1e-9
    assert np.abs(found[:, -1]).max() < 1e-6 < np.abs(found[:, 0]).min()  # the full rank changes nothing, the lowest does


def test_tucker_prices_are_those_of_the_projection() -> None:
    where = use("conv2d")
    weight, moment, gradients = problem(4, 1, where.view.m, where.view.n)
    tucker = DECOMPOSITIONS["tucker2", "contract"]
    metric = metric_of(moment)
    ranks = [(2, 3), (4, 2), (6, 8)]
    found = first_order(tucker, weight, moment, where, ranks, gradients)
    for (inner, outer), changes in zip(ranks, found.T, strict=True):
        factor = start(weight[0], metric, where.view.shape[1], inner)
        regression = regress(factor, weight[0], metric)
        basis = np.linalg.eigh(regression.explained.T @ regression.explained)[1][:, ::-1][:, :outer]
        whole = compose(basis @ (basis.T @ regression.outputs()), factor)[None]
        assert changes == pytest.approx(brute(weight, whole, gradients), abs=1e-6)  # least squares have a relative ridge of 1e-9


def test_a_fit_agrees_with_its_price_where_no_sweep_changes_it() -> None:
    assert SWEEPS > 0  # otherwise the projection itself is the fit, and there is nothing to compare
    where = use("conv2d")
    weight, _, gradients = problem(5, 1, where.view.m, where.view.n)
    flat = Moment(np.eye(where.view.n)[None], 100)  # without a metric the start is optimal
    separable = DECOMPOSITIONS["separable", "contract"]
    found = first_order(separable, weight, flat, where, [(4,)], gradients)
    fitted = rebuild(separable, where, (4,), separable.fit(weight, flat, where, (4,)))
    assert found[:, 0] == pytest.approx(brute(weight, fitted, gradients), abs=1e-6)  # as above


def test_a_residual_leaves_nothing_out() -> None:
    weight, moment, gradients = problem(6, 1, 24, 16)
    found = first_order(DECOMPOSITIONS["residual", "dense"], weight, moment, use("gemm"), [(1,), (2,)], gradients)
    assert np.array_equal(found, np.zeros((3, 2)))


def test_no_ranks_have_no_prices() -> None:
    weight, moment, gradients = problem(6, 1, 24, 16)
    assert first_order(DECOMPOSITIONS["lowrank", "dense"], weight, moment, use("gemm"), [], gradients).shape == (3, 0)


@given(seed=st.integers(0, 10**6), m=st.integers(2, 7), n=st.integers(2, 7), outputs=st.booleans())
def test_a_slope_says_of_each_component_what_it_was_made_from(seed: int, m: int, n: int, outputs: bool) -> None:
    weight, moment, _ = problem(seed, 2, m, n, outputs=outputs)
    parts = components(weight, moment)
    changes = np.random.default_rng(seed).standard_normal(parts.energies.shape)
    scale = np.abs(parts.lefts).max() * np.abs(parts.rights).max() / np.sqrt(parts.energies.min())
    assert parts.removal(parts.slope(changes)) == pytest.approx(changes, abs=1e-8 * max(1.0, scale**2))  # pinv squares the condition


def test_the_order_follows_energy_and_slope_together() -> None:
    weight = np.diag([4.0, 3.0, 2.0, 1.0])[None]
    moment = Moment(np.eye(4)[None], 100)
    assert components(weight, moment).order.tolist() == [[0, 1, 2, 3]]
    # Of 30 in all, the second component costs 9 ∕ 30. Gaining 0.25 by its loss puts it between the third (4 ∕ 30) and the last (1 ∕ 30).
    steep = moment.with_slope(components(weight, moment).slope(np.array([[0.0, -0.25, 0.0, 0.0]])))
    assert components(weight, steep).order.tolist() == [[0, 2, 1, 3]]
    first, last = factorize(weight, steep, 2)
    assert np.abs(last @ first)[0] == pytest.approx(np.diag([4.0, 0.0, 2.0, 0.0]), abs=1e-12)  # eigenvectors of a diagonal are exact


def test_removals_are_one_for_each_fold() -> None:
    weight, moment, gradients = problem(7, 2, 4, 6)
    parts = components(weight, moment)
    found = removals(parts, gradients)
    assert found.shape == (3, 2, 4)
    whole = -np.einsum("fgmn,gmn->f", gradients, weight)
    assert found.sum((1, 2)) == pytest.approx(whole, rel=ROUNDING)  # all components together are the weight


def test_two_folds_that_agree_are_trusted_and_two_that_do_not_are_not() -> None:
    assert trusted(np.array([[2.0], [2.0]])).tolist() == [2.0]
    assert trusted(np.array([[-2.0], [-2.0]]), doubt=2.0).tolist() == [-2.0]
    assert trusted(np.array([[2.0], [-1.0]])).tolist() == [0.0]
    assert trusted(np.array([[3.0], [1.0]])) == pytest.approx([1.5])  # 2·(1 − 1 ∕ 4): the standard error of the mean is 1
    assert trusted(np.array([[-3.0], [-1.0]])) == pytest.approx([-1.5])
    assert trusted(np.array([[-3.0], [-1.0]]), doubt=1.5) == pytest.approx([-0.5])  # −2 + 1.5, less than what shrinkage leaves
    assert trusted(np.array([[-3.0], [-1.0]]), doubt=2.5).tolist() == [0.0]
    assert trusted(np.zeros((4, 2))).tolist() == [0.0, 0.0]


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=6), st.floats(0, 3))
def test_what_is_trusted_lies_between_nothing_and_the_mean(values: list[float], doubt: float) -> None:
    folds = np.array(values)[:, None]
    mean, (found,) = float(folds.mean()), trusted(folds, doubt)
    assert min(0.0, mean) - 1e-12 <= found <= max(0.0, mean) + 1e-12  # one rounding of a mean


def test_only_what_stands_out_is_significant() -> None:
    rng = np.random.default_rng(8)
    folds = rng.standard_normal((4, 200))
    folds[:, 17] += 5.0
    found = significant(folds, 4.0)  # 4 standard errors: one of 16,000 values of pure noise
    assert np.flatnonzero(found).tolist() == [17]
    assert found[17] == folds[:, 17].mean()


def test_agreement_is_the_share_that_is_not_noise() -> None:
    rng = np.random.default_rng(9)
    signal, noise = rng.standard_normal((1, 100_000)), rng.standard_normal((4, 100_000))
    assert agreement(np.repeat(signal, 3, axis=0)) == pytest.approx(1.0, rel=1e-12)
    # The mean of four folds has the signal's variance and a quarter of the noise's; each share is known to about 100,000^-½.
    assert agreement(signal + noise) == pytest.approx(1 / 1.25, abs=0.02)
    assert agreement(noise) < 0.02
    assert agreement(np.zeros((2, 3))) == 0.0
