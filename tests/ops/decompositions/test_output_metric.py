"""Decompositions in a metric of outputs: two-sided optimality, and factors that stand for the weight and not for its whitened form."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.decompositions import CHANNEL_SVD, LOW_RANK, RESIDUAL, SEPARABLE, TUCKER2, Decomposition, rebuild, refit_last
from intaglio.ops.decompositions.base import RIDGE, Ranks
from intaglio.ops.decompositions.lowrank import factorize, spectrum
from intaglio.ops.families import Use
from intaglio.ops.moment import Moment, OutputMetric, relative_error
from tests.ops.decompositions.rewriting import TINY, matrix_of
from tests.ops.running import Array, moment_of, normal, use_of

CLOSE = 1e-8
"""Roots, eigenvectors and triangular solves in double precision of metrics whose condition is below 1e5."""

CONV = use_of("[n] y = Conv <pads = [0, 0, 0, 0]> (x, w, b)", (6, 4, 3, 2))
GROUPED = use_of("[n] y = Conv <pads = [0, 0, 0, 0], group = 2> (x, w, b)", (8, 3, 3, 2))
MATMUL = use_of("[n] y = MatMul (x, w)", (10, 6))
TABLE = use_of("[n] y = Gather (w, x)", (20, 6), 0)

FORMS: dict[str, tuple[Decomposition, Use, Ranks]] = {
    "lowrank": (LOW_RANK, MATMUL, (3,)),
    "lowrank of a table": (LOW_RANK, TABLE, (3,)),
    "channel_svd": (CHANNEL_SVD, CONV, (3,)),
    "channel_svd in groups": (CHANNEL_SVD, GROUPED, (2,)),
    "separable": (SEPARABLE, CONV, (4,)),
    "tucker2": (TUCKER2, CONV, (2, 3)),
}


def metric(seed: int, groups: int, m: int) -> OutputMetric:
    return OutputMetric(moment_of(seed, groups, m).matrix)


def spread(groups: int, m: int) -> OutputMetric:
    """Outputs from unimportant to important."""
    return OutputMetric(np.tile(10.0 ** np.linspace(-2, 1, m), (groups, 1)))


def root(matrix: Array) -> Array:
    """The symmetric root."""
    return np.asarray(scipy.linalg.sqrtm(matrix)).real


@pytest.mark.parametrize(("m", "n"), [(5, 8), (8, 5)])
@pytest.mark.parametrize("diagonal", [False, True])
def test_low_rank_is_the_truncated_svd_between_both_roots(m: int, n: int, diagonal: bool) -> None:
    outputs = metric(1, 2, m)
    outputs = OutputMetric(outputs.diag.copy()) if diagonal else outputs
    moment = moment_of(2, 2, n).with_outputs(outputs)
    weight = normal(3, 2, m, n).astype(np.float64)
    for group in range(2):
        left = np.diag(np.sqrt(outputs.matrix[group])) if diagonal else root(outputs.matrix[group])
        u, s, v = np.linalg.svd(left @ weight[group] @ root(moment.matrix[group]))
        np.testing.assert_allclose(spectrum(weight, moment)[group], s**2, rtol=CLOSE)
        best = np.linalg.solve(left, (u[:, :3] * s[:3]) @ v[:3]) @ np.linalg.inv(root(moment.matrix[group]))
        first, last = (factor[group] for factor in factorize(weight, moment, 3))
        np.testing.assert_allclose(last @ first, best, atol=CLOSE * np.abs(weight).max())


@given(st.integers(0, 99), st.integers(2, 7), st.integers(2, 7), st.data())
def test_no_other_low_rank_is_better(seed: int, m: int, n: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    moment = moment_of(seed, 1, n).with_outputs(metric(seed + 1, 1, m))
    weight = normal(seed, 1, m, n).astype(np.float64)
    first, last = factorize(weight, moment, rank)
    least = moment.energy(weight, last @ first)
    rng = np.random.default_rng(seed)
    for size in (1e-3, 1e-1):
        moved = (last + size * rng.standard_normal(last.shape)) @ (first + size * rng.standard_normal(first.shape))
        assert moment.energy(weight, moved) >= least - CLOSE * moment.energy(weight)
    plain = np.matmul(*reversed(factorize(weight, moment.with_outputs(None), rank)))
    assert moment.energy(weight, plain) >= least - CLOSE * moment.energy(weight)


@settings(max_examples=25)
@given(st.sampled_from(list(FORMS)), st.integers(0, 99))
def test_the_identity_changes_nothing(name: str, seed: int) -> None:
    decomposition, use, ranks = FORMS[name]
    view = use.view
    moment, weight = moment_of(seed, view.groups, view.n), matrix_of(use, normal(seed, *view.shape))
    both = moment.with_outputs(OutputMetric(np.tile(np.eye(view.m), (view.groups, 1, 1))))
    one, other = (rebuild(decomposition, use, ranks, decomposition.fit(weight, each, use, ranks)) for each in (moment, both))
    np.testing.assert_allclose(one, other, atol=CLOSE * np.abs(weight).max())
    expected = decomposition.errors(weight, moment, use, [ranks])
    assert decomposition.errors(weight, both, use, [ranks]) == pytest.approx(expected, rel=CLOSE)


@pytest.mark.parametrize("name", list(FORMS))
def test_fits_spend_their_ranks_on_outputs_that_matter(name: str) -> None:
    decomposition, use, ranks = FORMS[name]
    view = use.view
    moment = moment_of(1, view.groups, view.n).regularized(RIDGE).with_outputs(spread(view.groups, view.m))
    weight = matrix_of(use, normal(2, *view.shape))
    lost = {}
    for known in (None, moment.outputs):
        factors = decomposition.fit(weight, moment.with_outputs(known), use, ranks)
        lost[known is None] = relative_error(weight, rebuild(decomposition, use, ranks, factors), moment)
    assert lost[False] < 0.9 * lost[True]


@settings(max_examples=25)
@given(st.sampled_from(list(FORMS)), st.integers(0, 99), st.booleans())
def test_errors_price_the_fit(name: str, seed: int, diagonal: bool) -> None:
    """Exactly where the optimum has a closed form, from above where a fit goes on from there."""
    decomposition, use, ranks = FORMS[name]
    view = use.view
    outputs = spread(view.groups, view.m) if diagonal else metric(seed, view.groups, view.m)
    moment, weight = moment_of(seed, view.groups, view.n).with_outputs(outputs), matrix_of(use, normal(seed, *view.shape))
    inner = moment.regularized(RIDGE)
    (predicted,) = decomposition.errors(weight, inner, use, [ranks])
    found = relative_error(weight, rebuild(decomposition, use, ranks, decomposition.fit(weight, moment, use, ranks)), inner)
    assert found <= predicted + TINY
    if decomposition.name in ("lowrank", "channel_svd") and view.groups == 1:
        assert found >= predicted - TINY


@pytest.mark.parametrize("name", list(FORMS))
def test_the_last_factor_is_what_least_squares_makes_of_the_prefix(name: str) -> None:
    """Whatever outputs cost: given the prefix, every output has a best row of its own. So un-whitening is right."""
    decomposition, use, ranks = FORMS[name]
    view = use.view
    moment = moment_of(1, view.groups, view.n).with_outputs(metric(2, view.groups, view.m))
    weight = matrix_of(use, normal(3, *view.shape))
    factors = decomposition.fit(weight, moment, use, ranks)
    if decomposition.name == "tucker2":  # its last factor and its core are fitted together, under the rank
        factors = (*factors[:-1], refit_last(decomposition, weight, moment, use, ranks, factors[:-1]))
    alike = refit_last(decomposition, weight, moment.with_outputs(None), use, ranks, factors[:-1])
    np.testing.assert_allclose(factors[-1], alike, atol=1e-6 * np.abs(alike).max())  # the ridge of least squares is 1e-9


def test_full_ranks_stay_exact() -> None:
    for decomposition, use, _ in FORMS.values():
        view, ranks = use.view, decomposition.full(use)
        moment, weight = moment_of(1, view.groups, view.n).with_outputs(spread(view.groups, view.m)), matrix_of(use, normal(2, *view.shape))
        rebuilt = rebuild(decomposition, use, ranks, decomposition.fit(weight, moment, use, ranks))
        np.testing.assert_allclose(rebuilt, weight, atol=1e-6 * np.abs(weight).max())  # the ridge of least squares is 1e-9


def test_a_correction_takes_the_directions_that_matter() -> None:
    moment = moment_of(1, 1, 10).with_outputs(spread(1, 6))
    weight = matrix_of(MATMUL, normal(2, 10, 6))
    base, first, last = RESIDUAL.fit(weight, moment, MATMUL, (2,))
    product = RESIDUAL.whole(MATMUL, (2,), [np.zeros_like(base), first, last])
    best = np.matmul(*reversed(factorize(weight, moment.regularized(RIDGE), 2)))
    np.testing.assert_allclose(product, best, atol=CLOSE)
    np.testing.assert_allclose(RESIDUAL.whole(MATMUL, (2,), [base, first, last]), weight, atol=CLOSE)


def test_a_diagonal_input_metric_goes_with_an_output_metric() -> None:
    counts, weight = Moment(np.arange(1.0, 21)[None], 36, outputs=metric(1, 1, 6)), matrix_of(TABLE, normal(2, 20, 6))
    full = Moment(np.diag(np.arange(1.0, 21))[None], 36, outputs=counts.outputs)
    np.testing.assert_allclose(spectrum(weight, counts), spectrum(weight, full), rtol=CLOSE)
