"""The knapsack against brute force: certificates, limits and couplings kept exactly, infeasible budgets explained."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import given, settings

from benchmarks.knapsack import budgets, chained, network
from intaglio.solver import QUANTITIES, Budget, Cost, Option, Problem, Quantity, solve, total_cost
from intaglio.solver import knapsack as module
from tests.solver.instances import every_cost, exact_cost, is_allowed, limited, value

GAP = 1e-4
TOLERANCE = 1e-7  # relative; HiGHS's own on its bound


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
    assert is_allowed(problem, solution.choice)
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
    if not costs or budget.limits() == (None, None, None):
        assert solution.nearest is None
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


def test_a_shared_resource_is_paid_once() -> None:
    group = (Option(10, 0.0, 0.0), Option(4, 0.0, 0.1, ("decoder",)))
    alone = solve(Problem((group,), Cost(), {"decoder": Cost(7)}), Budget(minimize="size"))
    together = solve(Problem((group, group), Cost(), {"decoder": Cost(7)}), Budget(minimize="size"))
    assert (alone.choice, alone.objective) == ((0,), 10)
    assert (together.choice, together.objective) == ((1, 1), 15)


def test_layers_change_to_integers_together_or_not_at_all() -> None:
    """Every change between integers and float costs more than one layer gains, but less than three do."""

    def layer(index: int) -> tuple[Option, ...]:
        return (
            Option(0, 3.0, 0.0, (f"float {index}",), (f"float {index + 1}",)),
            Option(0, 2.0, 0.0, (f"quantized {index}",), (f"quantized {index + 1}",)),
        )

    def network_of(layers: int) -> Problem:
        ends = (Option(0, 0.0, 0.0, provides=("float 0",)),), (Option(0, 0.0, 0.0, (f"float {layers}",)),)
        changes = {f"{kind} {index}": Cost(latency_s=0.75) for kind in ("float", "quantized") for index in range(layers + 1)}
        return Problem((ends[0], *(layer(index) for index in range(layers)), ends[1]), Cost(), changes)

    assert solve(network_of(1), Budget(minimize="latency")).choice == (0, 0, 0)
    assert solve(network_of(1), Budget(minimize="latency")).objective == 3.0
    assert solve(network_of(3), Budget(minimize="latency")).choice == (0, 1, 1, 1, 0)
    assert solve(network_of(3), Budget(minimize="latency")).objective == 7.5


def test_a_resource_counts_towards_every_limit() -> None:
    group = (Option(10, 0.0, 0.0), Option(4, 0.0, 0.0, ("change",)))
    problem = Problem((group,), Cost(), {"change": Cost(0, 0.5, 0.25)})
    assert solve(problem, Budget(latency_s=0.5, minimize="size")).choice == (1,)
    assert solve(problem, Budget(latency_s=0.4, minimize="size")).choice == (0,)
    assert solve(problem, Budget(divergence=0.25, minimize="size")).choice == (1,)
    assert solve(problem, Budget(divergence=0.2, minimize="size")).choice == (0,)


def test_what_nobody_can_pay_can_still_be_provided() -> None:
    writer = (Option(0, 0.0, 0.0), Option(1, 0.0, 0.0, provides=("change",)))
    reader = (Option(10, 0.0, 0.0), Option(4, 0.0, 0.0, ("change",)))
    problem = Problem((writer, reader), Cost(), {"change": Cost(0, 0.5)})
    assert solve(problem, Budget(latency_s=0.5, minimize="size")).choice == (0, 1)
    assert solve(problem, Budget(latency_s=0.4, minimize="size")).choice == (1, 1)


def test_a_required_choice_is_taken_along_or_both_are_left() -> None:
    writer = (Option(5, 0.0, 0.0), Option(8, 0.0, 0.0, provides=("mask",)))
    for saved, choice in ((4, (1, 1)), (2, (0, 0))):
        reader = (Option(9, 0.0, 0.0), Option(9 - saved, 0.0, 0.0, requires=("mask",)))
        assert solve(Problem((writer, reader), Cost(), {"mask": Cost()}), Budget(minimize="size")).choice == choice


def test_requirements_that_nothing_meets_have_no_nearest_budget() -> None:
    group = (Option(1, 0.0, 0.0, provides=("mask",), requires=("mask",)),)
    for budget in (Budget(), Budget(size_bytes=10.0, latency_s=1.0)):
        solution = solve(Problem((group,), Cost(), {"mask": Cost()}), budget)
        assert (solution.status, solution.choice, solution.cost, solution.nearest) == ("infeasible", (), None, None)


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


def test_ties_count_what_resources_cost_otherwise() -> None:
    group = (Option(3, 0.0, 0.0, ("slow",)), Option(3, 0.5, 0.0))
    for latency_s, choice in ((1.0, (1,)), (0.25, (0,))):
        problem = Problem((group,), Cost(), {"slow": Cost(latency_s=latency_s)})
        assert solve(problem, Budget(minimize="size")).choice == choice


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


@pytest.mark.parametrize("minimize", QUANTITIES)
def test_the_smallest_numbers_do_not_overflow(minimize: Quantity) -> None:
    """Their reciprocals would."""
    tiny = 5e-324
    group = (Option(0, tiny, 0.0, ("change",)), Option(1, 0.0, tiny))
    problem = Problem((group, group), Cost(), {"change": Cost(0, 0.0, tiny)})
    for budget in (Budget(minimize=minimize), Budget(latency_s=tiny, minimize=minimize)):
        solution = solve(problem, budget)
        assert solution.cost is not None
        assert budget.admits(solution.cost)


def test_the_same_problem_gives_the_same_solution() -> None:
    independent = network(30, 15, seed=2)
    for problem in (independent, chained(independent, seed=2)):
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


@pytest.mark.parametrize("coupled", [False, True])
def test_five_hundred_groups_of_fifty_options(coupled: bool) -> None:
    problem = chained(network(500, 50, seed=0), seed=0) if coupled else network(500, 50, seed=0)
    budget = budgets(problem)["error | size, latency"]
    solution = solve(problem, budget, time_limit_s=60.0)
    assert solution.status == "optimal"
    assert solution.gap <= GAP
    assert solution.candidates == sum(len(group) for group in problem.groups) >= 25_000
    assert is_allowed(problem, solution.choice)
    assert solution.cost == exact_cost(problem, solution.choice)
    assert budget.admits(solution.cost)
    assert solution.seconds < 60


@pytest.mark.parametrize(("gap", "time_limit_s"), [(-1.0, 1.0), (math.nan, 1.0), (0.1, 0.0)])
def test_malformed_tolerances_are_refused(gap: float, time_limit_s: float) -> None:
    with pytest.raises(ValueError, match="expected gap >= 0 and time_limit_s > 0"):
        solve(Problem((), Cost(), {}), Budget(), gap=gap, time_limit_s=time_limit_s)


def test_nothing_is_written_to_standard_output() -> None:
    """In a process of its own: HiGHS greets once, not through Python's `sys.stdout`."""
    program = """
from intaglio.solver import Budget, Cost, Option, Problem, solve
problem = Problem(((Option(3, 0.0, 0.0), Option(1, 0.0, 0.5)), (Option(3, 0.0, 0.0), Option(1, 0.0, 0.25))), Cost(), {})
print(solve(problem, Budget(4, None, None, "error")).choice)
"""
    found = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert found.stdout == "(0, 1)\n"
