"""Bias correction on data."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.moment import Moment
from intaglio.ops.rounding import bias_shift
from tests.ops.running import normal

EXACT = 1e-12
"""Double precision sums of a few dozen terms of about 1."""


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7), st.integers(0, 2**16))
def test_the_mean_of_the_output_stays(groups: int, m: int, n: int, seed: int) -> None:
    rows = 1 + normal(seed, groups, 20, n).astype(np.float64)
    moment = Moment(rows.transpose(0, 2, 1) @ rows / 20, 20, rows.mean(1))
    weight, other = (normal(seed + i, groups, m, n).astype(np.float64) for i in (1, 2))
    shift = bias_shift(weight, other, moment)
    assert shift.shape == (groups, m)
    before, after = (rows @ each.transpose(0, 2, 1) for each in (weight, other))
    np.testing.assert_allclose((after + shift[:, None]).mean(1), before.mean(1), atol=EXACT * n)
    assert np.square(after + shift[:, None] - before).mean() <= np.square(after - before).mean() + EXACT


def test_no_mean_no_shift() -> None:
    weight = normal(1, 2, 3, 4).astype(np.float64)
    np.testing.assert_array_equal(bias_shift(weight, weight + 1, Moment.isotropic(2, 4)), np.zeros((2, 3)))
