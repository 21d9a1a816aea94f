"""Budgets as users write them."""

from __future__ import annotations

import pytest

from intaglio.passes.budget import Request, resolve
from intaglio.passes.errors import InputError
from intaglio.solver import Budget, Cost

BASE = Cost(900, 0.004, 0.0)


@pytest.mark.parametrize(
    ("size", "expected_bytes"),
    [
        (0.25, 250),
        ("0.25", 250),
        ("25%", 250),
        (" 25 % ", 250),
        (1.0, 1000),
        ("100B", 100),
        ("2kB", 2000),
        ("1.5MB", 1_500_000),
        ("1GB", 10**9),
        ("2KiB", 2048),
        ("2 mib", 2 << 20),
        ("1GiB", 1 << 30),
        (".5", 500),
        ("1e-1", 100),
    ],
)
def test_sizes(size: float | str, expected_bytes: float) -> None:
    """Ratios refer to the original file, not to the canonical model that plans start from."""
    assert resolve(Request(size=size), 1000, BASE) == Budget(expected_bytes, None, None, "error")


@pytest.mark.parametrize(
    ("latency", "expected_s"), [(0.5, 0.002), ("50%", 0.002), ("3ms", 0.003), ("250us", 0.00025), ("2s", 2.0), ("0.1 S", 0.1)]
)
def test_latencies(latency: float | str, expected_s: float) -> None:
    budget = resolve(Request(latency=latency), 1000, BASE)
    assert budget.latency_s == pytest.approx(expected_s)
    assert budget.minimize == "error"


@pytest.mark.parametrize("error", [0.01, "0.01", "1e-2"])
def test_errors_are_absolute_and_minimize_size(error: float | str) -> None:
    assert resolve(Request(error=error), 1000, BASE) == Budget(None, None, 0.01, "size")


def test_a_named_objective_wins() -> None:
    assert resolve(Request(size=0.5, error=0.1, minimize="latency"), 1000, BASE) == Budget(500, None, 0.1, "latency")
    assert resolve(Request(minimize="size"), 1000, BASE) == Budget(None, None, None, "size")


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(), "no budget"),
        (Request(size="small"), "--size small"),
        (Request(size="-1MB"), "--size -1MB"),
        (Request(size="0"), "expected a positive, finite amount"),
        (Request(size="4MBs"), "--size 4MBs"),
        (Request(size="3ms"), "--size 3ms"),
        (Request(size="4"), "a ratio above 1"),
        (Request(size="120%"), "a ratio above 1"),
        (Request(size=float("nan")), "--size nan"),
        (Request(size=float("inf")), "--size inf"),
        (Request(size="1e999MB"), "--size 1e999MB"),
        (Request(latency="3MB"), "--latency 3MB"),
        (Request(latency=""), "--latency"),
        (Request(error="1%"), "--error 1%"),
        (Request(error=0), "--error 0"),
        (Request(error=-1.0), "--error -1.0"),
        (Request(error="nan"), "--error nan"),
        (Request(error="inf"), "--error inf"),
        (Request(size=0.5, minimize="bytes"), "--minimize bytes"),  # type: ignore[arg-type]
    ],
)
def test_nonsense_is_refused_in_one_line_that_names_the_option(request_: Request, words: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve(request_, 1000, BASE)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
