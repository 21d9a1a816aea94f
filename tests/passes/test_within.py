"""Plans within measured budgets, where what single operators took misleads about the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from intaglio.ops.form import UNCHANGED, Form
from intaglio.passes import within
from intaglio.passes.errors import InfeasibleError
from intaglio.passes.job import Clock
from intaglio.passes.latency import PairedLatency
from intaglio.passes.plan import Candidate, Correction, Menu, Plan
from intaglio.passes.within import Bracket, plan_within
from intaglio.solver import Budget, Cost

LARGE = Form("dense", (), "int8", "integer")
SMALL = Form("dense", (), "int4", "nbits")
GENTLE = Form("lowrank", (8,), "float", "contract")
BASE = Cost(10_000, 0.01, 0.0)

FORMS = {
    LARGE: Candidate(LARGE, -5_000, -0.006, 0.02, 0.2),
    SMALL: Candidate(SMALL, -8_000, -0.005, 0.01, 0.1),
    GENTLE: Candidate(GENTLE, -6_000, -0.002, 0.001, 0.01),
}


def planned(monkeypatch: pytest.MonkeyPatch, ratios: Mapping[Form, float], *, size: int = 9_000, latency: float) -> Plan:
    """A plan for a model of one layer whose forms take these shares of the original's time when they are measured."""
    menu = Menu("0" * 64, {"w": (Candidate(UNCHANGED, 0, 0.0, 0.0, 0.0), *FORMS.values())}, BASE, {}, "kl_nats")
    sizes: Any = SimpleNamespace(total=lambda forms: BASE.size_bytes + menu_bytes(forms["w"]))
    job: Any = SimpleNamespace(clock=Clock())
    monkeypatch.setattr(within, "_ratio", lambda _job, forms, _limit: {UNCHANGED: 1.0, **ratios}[forms["w"]])
    return plan_within(job, menu, Budget(size, latency * BASE.latency_s), Correction(), sizes)


def menu_bytes(form: Form) -> int:
    return 0 if form == UNCHANGED else FORMS[form].size_bytes


@pytest.mark.parametrize("form", [LARGE, SMALL, GENTLE])
def test_a_budget_that_looks_out_of_reach_is_met_by_whatever_form_meets_it(monkeypatch: pytest.MonkeyPatch, form: Form) -> None:
    ratios = {each: 0.2 if each == form else 0.9 for each in FORMS}
    if form == GENTLE:  # the fastest of no size: nothing tells it from others that are slow
        with pytest.raises(InfeasibleError, match="no plan meets"):
            planned(monkeypatch, ratios, latency=0.3)
    else:
        assert planned(monkeypatch, ratios, latency=0.3).forms == {"w": form}


def test_the_gentlest_plan_is_taken_once_a_fast_one_has_shown_that_sums_are_too_high(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(monkeypatch, {LARGE: 0.1, SMALL: 0.25, GENTLE: 0.7}, latency=0.35)
    assert plan.forms == {"w": SMALL}
    assert plan.correction.latency == pytest.approx(1.5)


def test_a_larger_size_is_never_harder_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = {LARGE: 0.9, SMALL: 0.3, GENTLE: 0.9}
    for size in (2_500, 4_500, 5_500, 9_000):
        plan = planned(monkeypatch, ratios, size=size, latency=0.35)
        assert plan.forms == {"w": SMALL}
        assert plan.budget == Budget(size, 0.35 * BASE.latency_s)


def test_what_no_plan_keeps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InfeasibleError, match=r"no plan meets size 9,000 B, latency 1 ms.*nearest feasible"):
        planned(monkeypatch, {LARGE: 0.5, SMALL: 0.6, GENTLE: 0.9}, latency=0.1)


def test_plans_that_measure_slower_than_predicted_are_solved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(monkeypatch, {LARGE: 0.5, SMALL: 0.7, GENTLE: 0.85}, latency=0.85)
    assert plan.forms == {"w": SMALL}  # gentle ones are predicted to take 0.8 of the original's time
    assert plan.correction.latency < 1


def test_a_harmful_plan_is_not_kept_where_a_gentler_one_is_fast_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest plan keeps the budget with room to spare, the gentlest that then looks fast enough does not; one between them does."""
    ratios = {LARGE: 0.2, SMALL: 0.39, GENTLE: 0.45}
    monkeypatch.setitem(FORMS, GENTLE, Candidate(GENTLE, -6_000, -0.0049, 0.001, 0.01))
    assert planned(monkeypatch, ratios, latency=0.41).forms == {"w": SMALL}


def test_the_search_goes_on_where_a_correction_asks_for_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 is too little for any form and 1.5 too much for the gentle one; what that suggests is too little again, and so is what follows."""
    monkeypatch.setitem(FORMS, GENTLE, Candidate(GENTLE, -6_000, -0.00565, 0.001, 0.01))
    monkeypatch.setitem(FORMS, SMALL, Candidate(SMALL, -8_000, -0.0058, 0.01, 0.1))
    asked: list[float] = []
    choose = within.choose_within

    def recorded(menu: Menu, budget: Budget, correction: Correction, **options: Any) -> Plan:
        asked.append(correction.latency)
        return choose(menu, budget, correction, **options)

    monkeypatch.setattr(within, "choose_within", recorded)
    plan = planned(monkeypatch, {LARGE: 0.1, SMALL: 0.19, GENTLE: 0.35}, latency=0.2)
    assert plan.forms == {"w": SMALL}
    slope = 1.5 * (1 - 0.35) / (1.5 * 0.565)
    assert asked == pytest.approx([1, 1.5, slope, (slope * 1.5) ** 0.5, (slope * 1.5**3) ** 0.25])


def test_the_fastest_plan_does_not_pass_for_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(monkeypatch, {LARGE: 0.2, SMALL: 0.9, GENTLE: 0.9}, latency=0.3)
    assert plan.forms == {"w": LARGE}
    assert plan.solution is not None
    assert plan.solution.status == "feasible"
    assert plan.solution.objective == pytest.approx(0.02)
    assert plan.solution.bound == 0.001  # of the gentlest that keeps the size
    assert plan.solution.gap == pytest.approx(0.95)


def test_a_size_budget_at_its_least_keeps_its_fastest_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned(monkeypatch, {LARGE: 0.9, SMALL: 0.2, GENTLE: 0.9}, size=2_010, latency=0.3).forms == {"w": SMALL}


def test_nothing_is_timed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Form] = []
    monkeypatch.setattr(within, "mock", lambda _job, forms: seen.append(forms["w"]))
    monkeypatch.setattr(within, "latency_of", lambda *_: SimpleNamespace(ratio=0.3))
    menu = Menu("0" * 64, {"w": (Candidate(UNCHANGED, 0, 0.0, 0.0, 0.0), *FORMS.values())}, BASE, {}, "kl_nats")
    sizes: Any = SimpleNamespace(total=lambda forms: BASE.size_bytes + menu_bytes(forms["w"]))
    job: Any = SimpleNamespace(clock=Clock())
    plan = plan_within(job, menu, Budget(2_500, 0.6 * BASE.latency_s), Correction(), sizes)
    assert plan.forms == {"w": SMALL}
    assert seen == [SMALL]


def test_a_model_that_canonical_form_alone_makes_fast_enough_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is predicted to save time, but the plan is measured to."""
    for form, candidate in list(FORMS.items()):
        monkeypatch.setitem(FORMS, form, replace(candidate, latency_s=0.0))
    ratios = dict.fromkeys((UNCHANGED, *FORMS), 0.5)
    assert planned(monkeypatch, ratios, latency=0.7).forms["w"] in ratios


def test_a_bracket_closes_in_on_the_factor_between_fast_and_slow_plans() -> None:
    bracket = Bracket()
    assert bracket.inside(3.0) == 3.0  # nothing is known
    bracket.add(1.0, fast=True)
    assert bracket.middle == float("inf")
    assert bracket.inside(0.5) == 0.5
    bracket.add(4.0, fast=False)
    assert bracket.inside(3.0) == 3.0
    assert bracket.inside(5.0) == bracket.inside(0.5) == bracket.inside(4.0) == 2.0
    bracket.add(0.5, fast=True)  # further out on either side says nothing new
    bracket.add(8.0, fast=False)
    assert (bracket.fast, bracket.slow, bracket.closed) == (1.0, 4.0, False)
    bracket.add(3.99, fast=True)
    assert bracket.closed


def judged(monkeypatch: pytest.MonkeyPatch, limit: float | None, *ratios: float) -> tuple[PairedLatency, list[float], int]:
    """The verdict where comparisons come out at these ratios, the pauses that were made, and how many comparisons there were."""
    left, pauses = list(ratios), list[float]()

    def compared(*_: object, pairs: int, **__: object) -> PairedLatency:
        return PairedLatency((np.tile([1.0, left.pop(0)], (pairs, 1)),))

    monkeypatch.setattr(within, "compare_models", compared)
    monkeypatch.setattr(within, "_sessions", lambda *_: (None, None))
    monkeypatch.setattr(within.time, "sleep", pauses.append)
    job: Any = SimpleNamespace(data=SimpleNamespace(first=lambda _: {}))
    found = within.latency_verdict(job, Any, limit)
    return found, pauses, len(ratios) - len(left)


@pytest.mark.parametrize(
    ("limit", "ratios", "kept", "pauses"),
    [
        (None, [0.9, 0.1], (0.9,), 0),
        (0.5, [0.4, 0.1], (0.4,), 0),
        (0.5, [0.6, 0.4, 0.1], (0.4,), 0),  # the longer measurement replaces the shorter one
        (0.5, [0.6, 0.6, 0.4, 0.1], (0.6, 0.4), 1),
        (0.5, [0.6, 0.6, 0.6, 0.1], (0.6, 0.6), 1),  # late is late: there is no third
    ],
)
def test_a_late_model_is_measured_once_more_and_both_count(
    monkeypatch: pytest.MonkeyPatch, limit: float | None, ratios: list[float], kept: tuple[float, ...], pauses: int
) -> None:
    found, paused, compared = judged(monkeypatch, limit, *ratios)
    assert found.ratios == kept
    assert found.ratio == pytest.approx(float(np.prod(kept)) ** (1 / len(kept)))
    assert paused == [2.0] * pauses
    assert compared == len(ratios) - 1
