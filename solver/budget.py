"""What a choice costs and what it may cost: the three quantities that every decision trades.

Sizes are whole bytes, latencies seconds, divergences the unit of the caller's metric (nats or relative squared error). Costs of
independent decisions add up; nothing here knows what is being decided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Quantity = Literal["size", "latency", "error"]
QUANTITIES: tuple[Quantity, ...] = ("size", "latency", "error")


@dataclass(frozen=True)
class Cost:
    """A cost, or a difference of costs: `size_bytes` and `latency_s` may then be negative."""

    size_bytes: int = 0
    latency_s: float = 0.0
    divergence: float = 0.0

    def __post_init__(self) -> None:
        for value in self.values():
            if not math.isfinite(value):
                raise ValueError(f"{self}: expected finite costs, leave out what has no finite cost")

    def values(self) -> tuple[int, float, float]:
        """The three costs in the order of `QUANTITIES`."""
        return self.size_bytes, self.latency_s, self.divergence


@dataclass(frozen=True)
class Budget:
    """Upper limits, inclusive, on the total cost (None: no limit), and the quantity to minimize under them."""

    size_bytes: float | None = None
    latency_s: float | None = None
    divergence: float | None = None
    minimize: Quantity = "error"

    def __post_init__(self) -> None:
        if self.minimize not in QUANTITIES:
            raise ValueError(f"minimize={self.minimize!r}: expected one of {', '.join(QUANTITIES)}")
        for quantity, limit in zip(QUANTITIES, self.limits(), strict=True):
            if limit is not None and not math.isfinite(limit):
                raise ValueError(f"{quantity} limit {limit}: expected a finite number, or None for no limit")

    def limits(self) -> tuple[float | None, float | None, float | None]:
        """The three limits in the order of `QUANTITIES`."""
        return self.size_bytes, self.latency_s, self.divergence

    def relaxed(self, quantity: Quantity) -> Budget:
        """Minimize `quantity` itself instead of limiting it; the other limits stay."""
        limits = (None if name == quantity else limit for name, limit in zip(QUANTITIES, self.limits(), strict=True))
        size_bytes, latency_s, divergence = limits
        return Budget(size_bytes, latency_s, divergence, quantity)

    def admits(self, cost: Cost) -> bool:
        """Whether `cost` keeps every limit, compared exactly."""
        return all(limit is None or value <= limit for value, limit in zip(cost.values(), self.limits(), strict=True))


@dataclass(frozen=True)
class Nearest:
    """What could be promised instead of an infeasible budget: one attained value for each limited quantity (None: not limited,
    or none was found in time).

    Each value was attained by a choice that keeps all the *other* limits; for the quantities in `alone` there is no such choice
    (or none was found in time), and the value is attained with every other limit dropped.
    """

    size_bytes: int | None = None
    latency_s: float | None = None
    divergence: float | None = None
    alone: tuple[Quantity, ...] = ()
