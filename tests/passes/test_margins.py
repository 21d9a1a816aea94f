"""Margins: what more of a budget would buy, against every choice there is."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from intaglio.ops.form import UNCHANGED, Form
from intaglio.passes.errors import InfeasibleError
from intaglio.passes.margins import MORE, margins
from intaglio.passes.plan import Candidate, Correction, Menu, Plan, choose
from intaglio.solver import QUANTITIES, Budget, Cost, Quantity

FORMS = (Form("dense", (), "int8"), Form("dense", (), "int4"), Form("lowrank", (8,), "float", "contract"))

prices = st.tuples(st.integers(-900, -100), st.integers(-900, 100), st.integers(1, 1000))


@st.composite
def menus(draw: st.DrawFn) -> Menu:
    """Two weights of 1,000 bytes and 1 ms, each with three forms."""
    candidates = {}
    for name in ("first", "second"):
        rows = [Candidate(UNCHANGED, 0, 0.0, 0.0, 0.0)]
        for form in FORMS:
            size_bytes, latency, divergence = draw(prices)
            rows.append(Candidate(form, size_bytes, 1e-6 * latency, 1e-3 * divergence, 0.0, ("domain",)))
        candidates[name] = tuple(rows)
    return Menu("ab" * 32, candidates, Cost(2000, 2e-3, 0.0), {"domain": Cost(7)}, "kl_nats")


def choices(menu: Menu, correction: Correction) -> list[dict[Quantity, float]]:
    """The predicted costs of every choice."""
    found = []
    for chosen in itertools.product(*menu.candidates.values()):
        plan = Plan(menu, {name: c.form for name, c in zip(menu.candidates, chosen, strict=True)}, Budget(), None, correction)
        found.append({"size": float(plan.size_bytes), "latency": plan.latency_s, "error": plan.divergence})
    return found


@settings(max_examples=100)
@given(menus(), st.floats(0.3, 0.9), st.floats(0.3, 0.9), st.floats(0.05, 1.0), st.sampled_from(QUANTITIES), st.floats(0.5, 1.0))
def test_margins_are_those_of_all_choices(menu: Menu, size: float, latency: float, error: float, minimize: Quantity, slow: float) -> None:
    limits = {"size": 2000 * size, "latency": 2e-3 * latency, "error": error}
    budget = Budget(*(None if name == minimize else limits[name] for name in QUANTITIES), minimize=minimize)
    correction = Correction(latency=slow, divergence=0.7, spare_bytes=16)
    try:
        plan = choose(menu, budget, correction)
    except InfeasibleError:
        assume(False)
    taken = {"size": float(plan.size_bytes), "latency": plan.latency_s, "error": plan.divergence}
    assume(taken[minimize] > 0)
    found = margins(plan)
    assert [(each.budget, each.minimized, each.factor) for each in found] == [
        (name, minimize, MORE) for name in QUANTITIES if name != minimize and taken[name] > 0
    ]
    for each in found:
        within = {name: taken[name] * (MORE if name == each.budget else 1 + 1e-6) for name in QUANTITIES if name != minimize}
        best = min(cost[minimize] for cost in choices(menu, correction) if all(cost[name] <= limit for name, limit in within.items()))
        assert each.ratio == pytest.approx(best / taken[minimize], rel=1e-3)


def a_menu(*divergences: float) -> Menu:
    """One weight, whose forms take 100, 105 and so on of 1,000 bytes."""
    rows = [Candidate(form, -900 + 5 * number, 0.0, divergences[number], 0.0) for number, form in enumerate(FORMS[: len(divergences)])]
    return Menu("ab" * 32, {"w": (Candidate(UNCHANGED, 0, 0.0, 0.0, 0.0), *rows)}, Cost(1000, 1e-3, 0.0), {}, "kl_nats")


def test_a_step_next_to_the_plan_is_found_and_one_farther_away_is_not() -> None:
    budget = Budget(size_bytes=104, minimize="error")
    assert [each.ratio for each in margins(choose(a_menu(0.1, 0.02), budget))] == [pytest.approx(0.2)]
    assert [each.ratio for each in margins(choose(a_menu(0.1), budget))] == [1.0]


def test_there_is_nothing_to_say_where_nothing_was_solved_for_or_nothing_is_left_to_gain() -> None:
    budget = Budget(size_bytes=104, minimize="error")
    plan = choose(a_menu(0.1, 0.02), budget)
    assert margins(replace(plan, solution=None)) == ()
    assert margins(replace(plan, joint=True)) == ()
    assert margins(choose(a_menu(0.0, 0.0), budget)) == ()
    assert margins(choose(a_menu(0.1), Budget(minimize="size"))) == ()


def test_what_is_not_found_in_time_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = choose(a_menu(0.1, 0.02), Budget(size_bytes=104, minimize="error"))

    def late(*_: object) -> Plan:
        raise InfeasibleError("unknown")

    monkeypatch.setattr("intaglio.passes.margins.choose", late)
    assert margins(plan) == ()


def test_a_plan_that_is_not_proved_to_be_the_best_says_nothing() -> None:
    """Better ones might take no more than it does."""
    plan = choose(a_menu(0.1, 0.02), Budget(size_bytes=104, minimize="error"))
    assert plan.solution is not None
    assert margins(replace(plan, solution=replace(plan.solution, status="feasible"))) == ()


def test_a_budget_of_which_nothing_is_taken_is_left_out() -> None:
    plan = choose(a_menu(0.1, 0.02), Budget(divergence=0.01, minimize="size"))
    assert plan.divergence == 0
    assert margins(plan) == ()
