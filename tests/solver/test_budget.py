"""Costs and budgets: exact comparison, refusals."""

from __future__ import annotations

import math

import pytest

from intaglio.solver import Budget, Cost


def test_a_limit_is_inclusive_and_exact() -> None:
    assert Budget(size_bytes=7, latency_s=0.3).admits(Cost(7, 0.3, 100.0))
    assert not Budget(size_bytes=7).admits(Cost(8, 0.0, 0.0))
    assert not Budget(latency_s=0.3).admits(Cost(0, math.nextafter(0.3, 1), 0.0))
    assert not Budget(divergence=0.0).admits(Cost(0, 0.0, 5e-324))
    assert Budget().admits(Cost(10**18, 1e9, 1e9))


def test_relaxed_minimizes_what_it_no_longer_limits() -> None:
    budget = Budget(1.0, 2.0, 3.0, "error")
    assert budget.relaxed("size") == Budget(None, 2.0, 3.0, "size")
    assert budget.relaxed("latency") == Budget(1.0, None, 3.0, "latency")
    assert budget.relaxed("error") == Budget(1.0, 2.0, None, "error")


@pytest.mark.parametrize("limit", [math.nan, math.inf, -math.inf])
def test_a_limit_must_be_finite(limit: float) -> None:
    with pytest.raises(ValueError, match=r"latency limit .*: expected a finite number, or None"):
        Budget(latency_s=limit)


def test_the_minimized_quantity_must_be_known() -> None:
    with pytest.raises(ValueError, match="minimize='bytes': expected one of size, latency, error"):
        Budget(minimize="bytes")  # type: ignore[arg-type]


def test_a_cost_must_be_finite() -> None:
    with pytest.raises(ValueError, match="expected finite costs"):
        Cost(0, math.nan, 0.0)
