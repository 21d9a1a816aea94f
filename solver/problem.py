"""What is to be chosen: groups of options, and resources by which the options of different groups influence each other.

A resource is paid once if a chosen option *needs* it, unless a chosen option *provides* it: a decode function in the file is paid
by the first weight that uses it, and quantizing a value is free if the operator before it left the value quantized. An option
that *requires* a resource cannot pay for it: it exists only next to another group's option that provides it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .budget import Cost


@dataclass(frozen=True)
class Option:
    """One candidate of a group.

    Attributes:
        size_bytes: bytes of its own; may be negative when costs are differences.
        latency_s: seconds; may be negative when costs are differences.
        divergence: what it adds to the output divergence, >= 0.
        shared: resources that it needs; each is paid once however many options need it, and not at all if one provides it.
        provides: resources that nobody pays when it is chosen; none that it needs itself.
        requires: resources that a chosen option of another group has to provide.
    """

    size_bytes: int
    latency_s: float
    divergence: float
    shared: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()

    def costs(self) -> tuple[int, float, float]:
        """Its own costs in the order of `QUANTITIES`."""
        return self.size_bytes, self.latency_s, self.divergence


@dataclass(frozen=True)
class Problem:
    """Groups of options, exactly one option of each to be chosen.

    Attributes:
        groups: at least one option each.
        base: the cost of everything that is not decided.
        shared: what each resource costs, >= 0 in every quantity. It names all resources; one that is only required costs `Cost()`.

    Raises:
        ValueError: an empty group, a cost that is not finite, a negative divergence or resource, an unknown resource, or an option
            that provides what it needs.
    """

    groups: tuple[tuple[Option, ...], ...]
    base: Cost
    shared: Mapping[str, Cost]

    def __post_init__(self) -> None:
        for name, cost in self.shared.items():
            if min(cost.values()) < 0:
                raise ValueError(f"shared resource {name!r}: {cost}, expected at least 0 of each quantity")
        for index, group in enumerate(self.groups):
            if not group:
                raise ValueError(f"group {index}: no options, expected at least one")
            for option in group:
                self._check(index, option)

    def _check(self, index: int, option: Option) -> None:
        """Raises ValueError for an option of group `index` that is malformed by itself."""
        if not (all(map(math.isfinite, option.costs())) and option.divergence >= 0):
            raise ValueError(f"group {index}: {option}, expected finite costs and divergence >= 0")
        for name in (*option.shared, *option.provides, *option.requires):
            if name not in self.shared:
                raise ValueError(f"group {index}: unknown shared resource {name!r}, add its cost to `shared`")
        for name in option.shared:
            if name in option.provides:
                raise ValueError(f"group {index}: an option needs and provides {name!r}, expected at most one of the two")

    def allows(self, choice: Sequence[int]) -> bool:
        """Whether other groups provide everything that the chosen options (one index per group) require."""
        options = self.chosen(choice)
        providers = Counter(name for option in options for name in set(option.provides))
        return all(providers[name] > (name in option.provides) for option in options for name in option.requires)

    def chosen(self, choice: Sequence[int]) -> list[Option]:
        """The options of a choice (one index per group)."""
        return [group[index] for group, index in zip(self.groups, choice, strict=True)]


def total_cost(problem: Problem, choice: Sequence[int]) -> Cost:
    """The cost of a choice (one option index per group), allowed or not: sizes in exact integers, the rest correctly rounded sums."""
    options = problem.chosen(choice)
    needed = {name for option in options for name in option.shared}
    provided = {name for option in options for name in option.provides}
    paid = [problem.shared[name].values() for name in needed - provided]
    costs = [problem.base.values(), *paid, *(option.costs() for option in options)]
    return Cost(sum(size for size, _, _ in costs), math.fsum(latency for _, latency, _ in costs), math.fsum(error for _, _, error in costs))
