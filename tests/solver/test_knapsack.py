"""The knapsack against brute force: certificates, limits kept exactly, infeasible budgets explained, pruning harmless."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.knapsack import budgets, network
from intaglio.solver import QUANTITIES, Budget, Cost, Option, Problem, Quantity, solve, total_cost
from intaglio.solver import knapsack as module
from intaglio.solver.knapsack import undominated

GAP = 1e-4
TOLERANCE = 1e-7  # relative; HiGHS's own on its bound


def exact_cost(problem: Problem, choice: Iterable[int]) -> Cost:
    """The cost by its definition, written independently of the solver's."""
    options = [group[index] for group, index in zip(problem.groups, choice, strict=True)]
    resources = set[str]().union(*(option.shared for option in options))
    return Cost(
        problem.base.size_bytes + sum(o.size_bytes for o in options) + sum(problem.shared[name] for name in resources),
        math.fsum([problem.base.latency_s] + [o.latency_s for o in options]),
        math.fsum([problem.base.divergence] + [o.divergence for o in options]),
    )


def every_cost(problem: Problem) -> list[Cost]:
    return [exact_cost(problem, choice) for choice in itertools.product(*(range(len(group)) for group in problem.groups))]


def value(cost: Cost, quantity: Quantity) -> float:
    return cost.values()[QUANTITIES.index(quantity)]


# Three scales: small numbers with many ties, realistic ones, and divergences eight orders of magnitude apart.
SIZES = [st.integers(0, 5), st.integers(0, 10**7), st.integers(-50, 1000)]
LATENCIES = [st.sampled_from([-0.1, 0.0, 0.1, 0.2, 0.3]), st.floats(-1e-3, 1e-2), st.floats(0, 1)]
DIVERGENCES = [
    st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.7]),
    st.integers(1, 10**6).map(lambda n: n * 1e-9),
    st.floats(-7, 1).map(lambda exponent: 10.0**exponent),
]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    scale = draw(st.integers(0, 2))
    resources = {"a": 3, "b": draw(st.sampled_from([0, 1, 100])), "c": draw(st.integers(0, 10**4))}
    shared = st.lists(st.sampled_from(sorted(resources)), unique=True, max_size=2).map(tuple)
    option = st.builds(Option, SIZES[scale], LATENCIES[scale], DIVERGENCES[scale], shared)
    groups = draw(st.lists(st.lists(option, min_size=1, max_size=5).map(tuple), max_size=4).map(tuple))
    return Problem(groups, Cost(1000, 1.0, 0.0), resources)  # a base that the negative costs cannot cancel


@st.composite
def limited(draw: st.DrawFn) -> tuple[Problem, Budget]:
    """A problem, and limits that lie exactly on, a little off, or far from attained costs."""
    problem = draw(problems())
    costs = every_cost(problem)
    limits: list[float | None] = []
    for quantity in QUANTITIES:
        attained = st.sampled_from(sorted({value(cost, quantity) for cost in costs}))
        limits.append(draw(st.one_of(st.none(), attained, attained.map(lambda x: x * 1.01), attained.map(lambda x: x * 0.99))))
    size_bytes, latency_s, divergence = limits
    return problem, Budget(size_bytes, latency_s, divergence, draw(st.sampled_from(QUANTITIES)))


@settings(max_examples=150, deadline=None)
@given(limited())
def test_solution_is_certified_against_brute_force(case: tuple[Problem, Budget]) -> None:
    problem, budget = case
    attainable = [value(cost, budget.minimize) for cost in every_cost(problem) if budget.admits(cost)]
    solution = solve(problem, budget, gap=GAP)
    if not attainable:
        assert solution.status == "infeasible"
        assert (solution.choice, solution.cost) == ((), None)
        return
    optimum = min(attainable)
    assert solution.status == "optimal"
    assert solution.nearest is None
    assert solution.cost == exact_cost(problem, solution.choice)
    assert budget.admits(solution.cost)
    assert solution.objective == value(solution.cost, budget.minimize)
    assert solution.bound <= optimum + TOLERANCE * abs(optimum)
    assert optimum <= solution.objective <= optimum + GAP * abs(solution.objective) + TOLERANCE * abs(optimum)
    assert solution.gap <= GAP


@settings(max_examples=60, deadline=None)
@given(limited())
def test_infeasible_budgets_name_the_nearest_attainable_values(case: tuple[Problem, Budget]) -> None:
    problem, budget = case
    costs = every_cost(problem)
    solution = solve(problem, budget, gap=GAP)
    if solution.status != "infeasible":
        assert any(budget.admits(cost) for cost in costs)
        return
    assert solution.nearest is not None
    nearest = (solution.nearest.size_bytes, solution.nearest.latency_s, solution.nearest.divergence)
    for quantity, limit, attained in zip(QUANTITIES, budget.limits(), nearest, strict=True):
        if limit is None:
            assert attained is None
            assert quantity not in solution.nearest.alone
            continue
        others = budget.relaxed(quantity)
        held = [value(cost, quantity) for cost in costs if others.admits(cost)]
        assert (quantity in solution.nearest.alone) == (not held)
        smallest = min(held or [value(cost, quantity) for cost in costs])
        assert attained is not None
        assert smallest <= attained <= smallest + (GAP + TOLERANCE) * abs(attained)
        assert attained in (held or [value(cost, quantity) for cost in costs])


@settings(max_examples=200, deadline=None)
@given(limited())
def test_pruning_keeps_the_optimum(case: tuple[Problem, Budget]) -> None:
    problem, budget = case
    kept = undominated(problem, budget)
    assert all(kept) or not problem.groups
    pruned = Problem(
        tuple(tuple(group[i] for i in indices) for group, indices in zip(problem.groups, kept, strict=True)),
        problem.base,
        problem.shared,
    )
    before, after = (
        min((value(cost, budget.minimize) for cost in every_cost(version) if budget.admits(cost)), default=None)
        for version in (problem, pruned)
    )
    assert before == after  # to the last bit: correctly rounded sums are monotone


def test_pruning_drops_the_dominated_and_respects_shared_bytes() -> None:
    group = (
        Option(10, 1.0, 0.1),
        Option(10, 1.0, 0.1),  # the same again
        Option(11, 0.5, 0.1),  # larger; faster, which does not matter here
        Option(9, 1.0, 0.1, ("decoder",)),  # smaller only if somebody else pays the decoder
        Option(2, 1.0, 0.2, ("decoder",)),  # smaller than the next even with the decoder
        Option(8, 1.0, 0.2),
    )
    problem = Problem((group,), Cost(), {"decoder": 5})
    assert undominated(problem, Budget(size_bytes=10.0)) == ((0, 3, 4),)
    assert undominated(problem, Budget(size_bytes=10.0, latency_s=1.0)) == ((0, 2, 3, 4),)
    assert undominated(problem, Budget(latency_s=1.0)) == ((2,),)


def test_a_shared_resource_is_paid_once() -> None:
    group = (Option(10, 0.0, 0.0), Option(4, 0.0, 0.1, ("decoder",)))
    alone = solve(Problem((group,), Cost(), {"decoder": 7}), Budget(minimize="size"))
    together = solve(Problem((group, group), Cost(), {"decoder": 7}), Budget(minimize="size"))
    assert (alone.choice, alone.objective) == ((0,), 10)
    assert (together.choice, together.objective) == ((1, 1), 15)


def test_limits_are_kept_to_the_last_bit() -> None:
    """0.1 + 0.2 exceeds 0.3 in floating point: within the solver's tolerance, but over the limit."""
    pair = (Option(0, 0.0, 0.0), Option(0, 0.0, 0.0))
    first, second = (Option(5, 0.0, 0.0), Option(0, 0.1, 0.0)), (Option(5, 0.0, 0.0), Option(0, 0.2, 0.0))
    solution = solve(Problem((pair, first, second), Cost(), {}), Budget(latency_s=0.3, minimize="size"))
    assert math.fsum([0.1, 0.2]) > 0.3
    assert solution.status == "optimal"
    assert solution.objective == 5


def test_many_choices_just_over_the_limit_do_not_hide_a_good_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the cuts run out the limits are tightened; what is found then keeps them, whatever can still be proved."""
    monkeypatch.setattr(module, "_MAX_CUTS", 1)
    over = tuple(Option(size_bytes, 0.5 + (4 - size_bytes) * 1e-13, 0.0) for size_bytes in range(4))
    groups = tuple((*over, Option(10, 0.25, 0.0)) for _ in range(2))
    solution = solve(Problem(groups, Cost(), {}), Budget(latency_s=1.0, minimize="size"))
    assert solution.cost is not None
    assert solution.cost.latency_s <= 1.0
    assert solution.objective == 10
    assert solution.bound <= 10


def test_exact_ties_go_to_the_smaller_other_costs() -> None:
    group = (Option(9, 0.1, 0.0), Option(3, 0.4, 0.0), Option(3, 0.2, 0.0), Option(3, 0.2, 0.5))
    assert solve(Problem((group, group), Cost(), {}), Budget(size_bytes=20.0)).choice == (2, 2)
    assert solve(Problem((group,), Cost(), {}), Budget(minimize="size")).choice == (2,)


def test_nearest_prefers_holding_the_other_limits() -> None:
    group = (Option(10, 1.0, 0.0), Option(5, 1.0, 0.25), Option(2, 1.0, 0.75))
    problem = Problem((group, group), Cost(), {})
    nearest = solve(problem, Budget(size_bytes=9.0, divergence=0.3)).nearest
    assert nearest is not None
    assert (nearest.size_bytes, nearest.latency_s, nearest.divergence, nearest.alone) == (15, None, 1.0, ())
    hopeless = solve(problem, Budget(size_bytes=3.0, divergence=0.3)).nearest
    assert hopeless is not None
    assert (hopeless.size_bytes, hopeless.divergence, hopeless.alone) == (15, 0.0, ("error",))


def test_a_nearest_value_is_a_feasible_limit() -> None:
    problem = network(20, 10, seed=1)
    whole = total_cost(problem, [0] * 20)
    budget = Budget(0.02 * whole.size_bytes, 0.7 * whole.latency_s)
    nearest = solve(problem, budget).nearest
    assert nearest is not None
    assert nearest.alone == ("latency",)
    assert nearest.size_bytes is not None
    again = solve(problem, Budget(nearest.size_bytes, budget.latency_s))
    assert again.status == "optimal"
    assert again.cost is not None
    assert again.cost.size_bytes <= nearest.size_bytes


def test_nothing_to_decide() -> None:
    problem = Problem((), Cost(5, 1.0, 0.5), {})
    solution = solve(problem, Budget(size_bytes=5))
    assert (solution.status, solution.choice, solution.objective, solution.gap) == ("optimal", (), 0.5, 0.0)
    assert solve(problem, Budget(size_bytes=4)).status == "infeasible"


def test_the_same_problem_gives_the_same_solution() -> None:
    problem = network(40, 20, seed=2)
    for budget in budgets(problem).values():
        first, second = solve(problem, budget), solve(problem, budget)
        assert (first.choice, first.bound, first.nearest) == (second.choice, second.bound, second.nearest)


def test_a_short_time_limit_claims_no_more_than_it_proved() -> None:
    problem = network(200, 50, seed=0)
    budget = budgets(problem)["error | size, latency"]
    proved = solve(problem, budget, time_limit_s=60.0)
    for time_limit_s in (0.001, 0.1):
        hurried = solve(problem, budget, time_limit_s=time_limit_s)
        assert hurried.bound <= proved.objective
        assert hurried.objective >= proved.bound
        assert hurried.status == ("unknown" if not hurried.choice else "optimal" if hurried.gap <= GAP else "feasible")
        assert hurried.cost is None or budget.admits(hurried.cost)


def test_five_hundred_groups_of_fifty_options() -> None:
    problem = network(500, 50, seed=0)
    budget = budgets(problem)["error | size, latency"]
    solution = solve(problem, budget, time_limit_s=60.0)
    assert solution.status == "optimal"
    assert solution.gap <= GAP
    assert solution.candidates == 25_000
    assert solution.cost == exact_cost(problem, solution.choice)
    assert budget.admits(solution.cost)
    assert solution.seconds < 60


@pytest.mark.parametrize(
    ("groups", "shared", "message"),
    [
        (((),), {}, "group 0: no options"),
        (((Option(1, 0.0, -0.1),),), {}, "divergence >= 0"),
        (((Option(1, math.inf, 0.1),),), {}, "expected finite costs"),
        (((Option(1, 0.0, 0.1, ("lost",)),),), {}, "group 0: unknown shared resource 'lost'"),
        ((), {"negative": -1}, "'negative': -1 bytes, expected at least 0"),
    ],
)
def test_malformed_problems_are_refused(groups: tuple[tuple[Option, ...], ...], shared: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Problem(groups, Cost(), shared)


@pytest.mark.parametrize(("gap", "time_limit_s"), [(-1.0, 1.0), (math.nan, 1.0), (0.1, 0.0)])
def test_malformed_tolerances_are_refused(gap: float, time_limit_s: float) -> None:
    with pytest.raises(ValueError, match="expected gap >= 0 and time_limit_s > 0"):
        solve(Problem((), Cost(), {}), Budget(), gap=gap, time_limit_s=time_limit_s)
