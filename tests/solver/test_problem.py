"""Problems: what a choice costs, what it may combine, what is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings

from intaglio.solver import Cost, Option, Problem, total_cost
from tests.solver.instances import every_choice, exact_cost, is_allowed, problems


@settings(max_examples=60, deadline=None)
@given(problems())
def test_costs_and_requirements_are_what_their_definitions_say(problem: Problem) -> None:
    for choice in every_choice(problem)[:50]:
        assert total_cost(problem, choice) == exact_cost(problem, choice)
        assert problem.allows(choice) == is_allowed(problem, choice)


def test_a_resource_is_paid_once_in_every_quantity() -> None:
    user = (Option(1, 0.5, 0.25, ("decoder",)),)
    problem = Problem((user, user, user), Cost(100, 1.0, 0.0), {"decoder": Cost(7, 0.125, 0.0625), "idle": Cost(1000, 9.0, 9.0)})
    assert total_cost(problem, (0, 0, 0)) == Cost(110, 2.625, 0.8125)


def test_nobody_pays_for_what_is_provided() -> None:
    reader = (Option(1, 0.0, 0.0, ("quantized",)),)
    writer = (Option(2, 0.0, 0.0), Option(3, 0.0, 0.0, provides=("quantized",)))
    problem = Problem((reader, writer, reader), Cost(), {"quantized": Cost(10, 0.5)})
    assert total_cost(problem, (0, 0, 0)) == Cost(14, 0.5)
    assert total_cost(problem, (0, 1, 0)) == Cost(5)


def test_what_is_required_has_to_come_from_another_group() -> None:
    both = (Option(0, 0.0, 0.0), Option(0, 0.0, 0.0, provides=("mask",), requires=("mask",)))
    problem = Problem((both, both), Cost(), {"mask": Cost()})
    assert [choice for choice in every_choice(problem) if problem.allows(choice)] == [(0, 0), (1, 1)]


@pytest.mark.parametrize(
    ("groups", "shared", "message"),
    [
        (((),), {}, "group 0: no options"),
        (((Option(1, 0.0, -0.1),),), {}, "divergence >= 0"),
        (((Option(1, math.inf, 0.1),),), {}, "expected finite costs"),
        (((Option(1, 0.0, 0.1, ("lost",)),),), {}, "group 0: unknown shared resource 'lost'"),
        (((Option(1, 0.0, 0.1, provides=("lost",)),),), {}, "group 0: unknown shared resource 'lost'"),
        (((Option(1, 0.0, 0.1, requires=("lost",)),),), {}, "group 0: unknown shared resource 'lost'"),
        (((Option(1, 0.0, 0.1, ("own",), ("own",)),),), {"own": Cost()}, "group 0: an option needs and provides 'own'"),
        ((), {"negative": Cost(-1)}, "'negative': .*expected at least 0 of each quantity"),
        ((), {"negative": Cost(1, -0.1)}, "'negative': .*expected at least 0 of each quantity"),
        ((), {"negative": Cost(1, 0.1, -0.1)}, "'negative': .*expected at least 0 of each quantity"),
    ],
)
def test_malformed_problems_are_refused(groups: tuple[tuple[Option, ...], ...], shared: dict[str, Cost], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Problem(groups, Cost(), shared)
