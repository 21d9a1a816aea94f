"""Small random problems with every kind of coupling, and what is true of them by definition, written independently of the solver."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from hypothesis import strategies as st

from intaglio.solver import QUANTITIES, Budget, Cost, Option, Problem, Quantity

# Three scales: small numbers with many ties, realistic ones, and divergences eight orders of magnitude apart.
SIZES = [st.integers(0, 5), st.integers(0, 10**7), st.integers(-50, 1000)]
LATENCIES = [st.sampled_from([-0.1, 0.0, 0.1, 0.2, 0.3]), st.floats(-1e-3, 1e-2), st.floats(0, 1)]
DIVERGENCES = [
    st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.7]),
    st.integers(1, 10**6).map(lambda n: n * 1e-9),
    st.floats(-7, 1).map(lambda exponent: 10.0**exponent),
]
RESOURCE_SIZES = st.sampled_from([0, 1, 3, 100, 10**4])
RESOURCE_LATENCIES = [st.sampled_from([0.0, 0.1, 0.2]), st.floats(0, 1e-2), st.floats(0, 1)]
NAMES = ("a", "b", "c")


def exact_cost(problem: Problem, choice: Sequence[int]) -> Cost:
    """The cost of a choice."""
    options = [group[index] for group, index in zip(problem.groups, choice, strict=True)]
    paid = [
        cost
        for name, cost in problem.shared.items()
        if any(name in option.shared for option in options) and not any(name in option.provides for option in options)
    ]
    return Cost(
        problem.base.size_bytes + sum(o.size_bytes for o in options) + sum(cost.size_bytes for cost in paid),
        math.fsum([problem.base.latency_s] + [o.latency_s for o in options] + [cost.latency_s for cost in paid]),
        math.fsum([problem.base.divergence] + [o.divergence for o in options] + [cost.divergence for cost in paid]),
    )


def is_allowed(problem: Problem, choice: Sequence[int]) -> bool:
    """Whether every requirement is met by another group."""
    options = [group[index] for group, index in zip(problem.groups, choice, strict=True)]
    return all(
        any(name in other.provides for j, other in enumerate(options) if i != j)
        for i, option in enumerate(options)
        for name in option.requires
    )


def every_choice(problem: Problem) -> list[tuple[int, ...]]:
    """All choices, allowed or not."""
    return list(itertools.product(*(range(len(group)) for group in problem.groups)))


def every_cost(problem: Problem) -> list[Cost]:
    """The costs of all allowed choices."""
    return [exact_cost(problem, choice) for choice in every_choice(problem) if is_allowed(problem, choice)]


def value(cost: Cost, quantity: Quantity) -> float:
    """One quantity of a cost."""
    return cost.values()[QUANTITIES.index(quantity)]


@st.composite
def options(draw: st.DrawFn, scale: int) -> Option:
    """An option that needs, provides and requires a few resources; no more than half of them require any."""
    names = st.lists(st.sampled_from(NAMES), unique=True, max_size=2)
    shared = draw(names)
    provides = [name for name in draw(names) if name not in shared]
    requires = draw(st.one_of(st.just([]), names))
    costs = draw(SIZES[scale]), draw(LATENCIES[scale]), draw(DIVERGENCES[scale])
    return Option(*costs, tuple(shared), tuple(provides), tuple(requires))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to four groups of up to five options; in some no choice is allowed."""
    scale = draw(st.integers(0, 2))
    divergence = st.one_of(st.just(0.0), DIVERGENCES[scale])
    resource = st.builds(Cost, RESOURCE_SIZES, RESOURCE_LATENCIES[scale], divergence)
    shared = {name: draw(st.one_of(st.just(Cost()), resource)) for name in NAMES}
    groups = draw(st.lists(st.lists(options(scale), min_size=1, max_size=5).map(tuple), max_size=4).map(tuple))
    return Problem(groups, Cost(1000, 1.0, 0.0), shared)  # a base that the negative costs cannot cancel


@st.composite
def limited(draw: st.DrawFn) -> tuple[Problem, Budget]:
    """A problem, and limits that lie exactly on, a little off, or far from attained costs."""
    problem = draw(problems())
    costs = every_cost(problem) or [problem.base]
    limits: list[float | None] = []
    for quantity in QUANTITIES:
        attained = st.sampled_from(sorted({value(cost, quantity) for cost in costs}))
        limits.append(draw(st.one_of(st.none(), attained, attained.map(lambda x: x * 1.01), attained.map(lambda x: x * 0.99))))
    size_bytes, latency_s, divergence = limits
    return problem, Budget(size_bytes, latency_s, divergence, draw(st.sampled_from(QUANTITIES)))
