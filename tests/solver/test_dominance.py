"""Dominated options: what is dropped is never missed, and what couples groups is seen."""

from __future__ import annotations

from hypothesis import given, settings

from intaglio.solver import Budget, Cost, Option, Problem, total_cost
from intaglio.solver.dominance import undominated
from tests.solver.instances import every_cost, limited, value


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


def test_the_dominated_are_dropped_and_shared_bytes_respected() -> None:
    group = (
        Option(10, 1.0, 0.1),
        Option(10, 1.0, 0.1),  # the same again
        Option(11, 0.5, 0.1),  # larger; faster, which does not matter here
        Option(9, 1.0, 0.1, ("decoder",)),  # smaller only if somebody else pays the decoder
        Option(2, 1.0, 0.2, ("decoder",)),  # smaller than the next even with the decoder
        Option(8, 1.0, 0.2),
    )
    problem = Problem((group,), Cost(), {"decoder": Cost(5)})
    assert undominated(problem, Budget(size_bytes=10.0)) == ((0, 3, 4),)
    assert undominated(problem, Budget(size_bytes=10.0, latency_s=1.0)) == ((0, 2, 3, 4),)
    assert undominated(problem, Budget(latency_s=1.0)) == ((2,),)


def test_resources_count_in_every_quantity_that_matters() -> None:
    group = (Option(10, 1.0, 0.1), Option(9, 0.9, 0.1, ("change",)))
    slow = Problem((group,), Cost(), {"change": Cost(latency_s=0.5)})
    assert undominated(slow, Budget(latency_s=5.0, minimize="size")) == ((0, 1),)
    assert undominated(slow, Budget(minimize="size")) == ((1,),)
    assert undominated(Problem((group,), Cost(), {"change": Cost(latency_s=0.05)}), Budget(minimize="latency")) == ((1,),)


def test_what_provides_a_resource_is_dropped_only_for_more_than_the_resource_costs() -> None:
    group = (Option(10, 0.0, 0.0, provides=("quantized",)), Option(6, 0.0, 0.0), Option(4, 0.0, 0.0))
    reader = (Option(0, 0.0, 0.0, ("quantized",)),)
    for price, kept in ((7, (0, 2)), (5, (2,))):  # 10 bytes against 4 and, at worst, the price
        problem = Problem((group, reader), Cost(), {"quantized": Cost(price)})
        assert undominated(problem, Budget(minimize="size")) == (kept, (0,))


def test_what_others_require_is_never_dropped() -> None:
    writer = (Option(5, 0.0, 0.0), Option(9, 0.0, 0.0, provides=("mask",)), Option(10, 0.0, 0.0, provides=("mask",)))
    reader = (Option(50, 0.0, 0.0), Option(1, 0.0, 0.0, requires=("mask",)), Option(2, 0.0, 0.0, requires=("mask",)))
    problem = Problem((writer, reader), Cost(), {"mask": Cost()})
    assert undominated(problem, Budget(minimize="size")) == ((0, 1), (0, 1))


def test_equivalent_options_with_different_resources_stay() -> None:
    group = (Option(3, 0.0, 0.0, ("slow",)), Option(3, 0.5, 0.0), Option(3, 0.6, 0.0))
    problem = Problem((group,), Cost(), {"slow": Cost(latency_s=1.0)})
    assert undominated(problem, Budget(minimize="size")) == ((0, 1),)


def test_rounding_hides_no_loss() -> None:
    """0.1 + 0.4 is 0.5 in floating point, but next to another 0.1 their sum is larger than that of 0.5, and a limit is exact."""
    group = (Option(1, 0.1, 0.0, ("change",)), Option(2, 0.5, 0.0))
    problem = Problem((group, (Option(0, 0.1, 0.0),)), Cost(), {"change": Cost(latency_s=0.4)})
    assert total_cost(problem, (0, 0)).latency_s > total_cost(problem, (1, 0)).latency_s
    assert undominated(problem, Budget(latency_s=0.6, minimize="size")) == ((0, 1), (0,))
