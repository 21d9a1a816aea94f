"""Plans: choosing within budgets, and the JSON that is saved, edited and solved again."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.form import CARRIED, UNCHANGED, Form
from intaglio.passes.errors import InfeasibleError, InputError
from intaglio.passes.plan import VERSION, Candidate, Correction, Menu, Plan, choose, read_plan, to_json
from intaglio.solver import Budget, Cost

INT8 = Form("dense", (), "int8")
LOW = Form("lowrank", (8,), "float", "contract")
BOTH = Form("lowrank", (8,), "int4", "contract")


def menu() -> Menu:
    def candidates(size: int) -> tuple[Candidate, ...]:
        return (
            Candidate(UNCHANGED, 0, 0.0, 0.0, 0.0),
            Candidate(INT8, -3 * size // 4, 0.0, 0.001, 0.0001, ("DecodeInt8", "domain")),
            Candidate(LOW, -size // 2, -0.001, 0.01, 0.02),
            Candidate(BOTH, -15 * size // 16, -0.001, 0.02, 0.05, ("DecodeInt4", "domain")),
        )

    shared = {"DecodeInt8": Cost(100), "DecodeInt4": Cost(200), "domain": Cost(10)}
    return Menu("ab" * 32, {"first": candidates(4000), "second/w": candidates(8000)}, Cost(13_000, 0.01, 0.0), shared, "kl_nats")


def saved(plan: Plan, folder: Path) -> Path:
    path = folder / "plan.json"
    path.write_text(to_json(plan), encoding="utf-8")
    return path


def edited(plan: Plan, folder: Path, *keys: Any, value: Any) -> Path:
    """The saved plan with one field changed."""
    document = json.loads(to_json(plan))
    place = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path = folder / "plan.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


limits = st.none() | st.floats(0.2, 1.0)


@settings(max_examples=50)
@given(limits, limits, st.none() | st.floats(0.001, 0.05), st.sampled_from(["size", "latency", "error"]))
def test_choices_keep_every_limit_or_say_what_can_be_kept(
    size: float | None, latency: float | None, error: float | None, minimize: Any
) -> None:
    offer = menu()
    budget = Budget(None if size is None else 13_000 * size, None if latency is None else 0.01 * latency, error, minimize)
    if not any(budget.admits(cost_of(offer, a, b)) for a in range(4) for b in range(4)):
        with pytest.raises(InfeasibleError, match="nearest feasible: --"):
            choose(offer, budget)
        return
    plan = choose(offer, budget)
    assert budget.admits(Cost(plan.size_bytes, plan.latency_s, plan.divergence))
    assert plan.solution is not None
    assert plan.solution.status == "optimal"


def cost_of(offer: Menu, *choice: int) -> Cost:
    chosen = [candidates[i] for candidates, i in zip(offer.candidates.values(), choice, strict=True)]
    names = {name for c in chosen for name in c.needs} - {name for c in chosen for name in c.provides}
    paid = [offer.shared[name] for name in names]
    return Cost(
        sum(each.size_bytes for each in (offer.base, *chosen, *paid)),
        math.fsum(each.latency_s for each in (offer.base, *chosen, *paid)),
        math.fsum(each.divergence for each in (*chosen, *paid)),
    )


def test_nothing_changes_when_nothing_must() -> None:
    plan = choose(menu(), Budget(13_000, None, None, "error"))
    assert set(plan.forms.values()) == {UNCHANGED}
    assert (plan.divergence, plan.size_bytes) == (0.0, 13_000)


def test_the_gentlest_of_the_fastest_choices_is_taken() -> None:
    plan = choose(menu(), Budget(None, None, None, "latency"))
    assert set(plan.forms.values()) == {LOW}  # as fast as `BOTH`, and less harmful
    assert choose(menu(), Budget(2000.0, None, None, "latency")).forms["second/w"] == BOTH
    assert plan.solution is not None
    assert plan.solution.objective == pytest.approx(plan.latency_s)


def test_a_model_without_weights_keeps_every_budget_that_it_keeps_already() -> None:
    empty = Menu("ab" * 32, {}, Cost(1000, 0.01, 0.0), {}, "kl_nats")
    plan = choose(empty, Budget(1000.0, None, 0.1, "size"))
    assert (plan.forms, plan.size_bytes, plan.divergence) == ({}, 1000, 0.0)
    with pytest.raises(InfeasibleError, match=r"nearest feasible: --size 1000B; no weight of this model may change"):
        choose(empty, Budget(999.0, None, None, "error"))


def test_corrections_scale_the_predictions() -> None:
    budget = Budget(None, None, 0.011, "size")
    assert choose(menu(), budget).forms["second/w"] == INT8
    assert choose(menu(), budget, Correction(divergence=0.1)).forms["second/w"] == BOTH
    corrected = choose(menu(), budget, Correction(divergence=10.0))
    assert 0 < corrected.divergence <= 0.011
    assert set(corrected.forms.values()) <= {UNCHANGED, INT8}
    assert choose(menu(), Budget(None, 0.0091, None, "error"), Correction(latency=0.5)).latency_s == pytest.approx(0.009)


def test_spare_bytes_are_left_free() -> None:
    tight = choose(menu(), Budget(4110.0, None, None, "error"))
    spared = choose(menu(), Budget(4110.0, None, None, "error"), Correction(spare_bytes=1))
    assert tight.size_bytes == 4110
    assert spared.size_bytes <= 4109


@pytest.mark.parametrize(
    ("budget", "option", "kind"),
    [
        (Budget(1000.0, None, None, "error"), r"--size (\d+)B", "size"),
        (Budget(None, 0.0071234, None, "error"), r"--latency ([\d.]+)ms", "latency"),
        (Budget(8000.0, None, 0.0001, "error"), r"--error ([\d.e-]+)", "error"),
    ],
)
def test_the_nearest_offer_is_feasible(budget: Budget, option: str, kind: str) -> None:
    with pytest.raises(InfeasibleError) as caught:
        choose(menu(), budget)
    message = str(caught.value)
    assert "\n" not in message
    amount = float(re.findall(option, message)[-1])
    relaxed = {
        "size": Budget(amount, None, None, "error"),
        "latency": Budget(None, amount / 1e3, None, "error"),
        "error": Budget(budget.size_bytes, None, amount, "size"),
    }
    choose(menu(), relaxed[kind])


def test_offers_round_up_and_leave_the_spare_bytes_free() -> None:
    """An offer that rounds down would be refused in its turn."""
    odd = Candidate(LOW, -10, -0.00212344, 0.0123444, 0.1)
    offer = Menu("0", {"w": (odd,)}, Cost(100, 0.01, 0.0), {}, "kl_nats")
    for budget in (Budget(None, None, 0.001, "size"), Budget(None, 0.001, None, "size"), Budget(10, None, None, "error")):
        with pytest.raises(InfeasibleError) as caught:
            choose(offer, budget, Correction(spare_bytes=7), usable=0.97)
        near = re.search(r"nearest feasible: --(\w+) ([\d.e-]+)", str(caught.value))
        assert near is not None
        amount = float(near.group(2))
        choose(
            offer,
            {
                "size": Budget(amount, None, None, "error"),
                "latency": Budget(None, amount / 1e3, None, "error"),
                "error": Budget(None, None, amount, "size"),
            }[near.group(1)],
            Correction(spare_bytes=7),
            usable=0.97,
        )


def coupled() -> Menu:
    """Two layers in a row, and an operator without a weight between them: only together is it worth while to run in integers."""
    integer = Form("dense", (), "int8", "dense", "integer")

    def floats(value: str, following: str) -> Candidate:
        return Candidate(UNCHANGED, 0, 0.0, 0.0, 0.0, (f"dequantize:{value}",) if value != "x" else (), (f"dequantize:{following}",))

    def integers(form: Form, value: str, following: str) -> Candidate:
        needs = (f"round:{value}", f"quantize:{value}", f"round:{following}", *(("dequantize:y",) if following == "y" else ()))
        return Candidate(form, -100, -0.002, 0.001, 0.0001, needs, (f"quantize:{following}",))

    steps = (("first", integer, "x", "v"), ("relu", CARRIED, "v", "w"), ("second", integer, "w", "y"))
    candidates = {name: (floats(before, after), integers(form, before, after)) for name, form, before, after in steps}
    shared = {f"round:{value}": Cost(10, 0.0, 0.0001) for value in "xvwy"}
    shared |= {f"{way}:{value}": Cost(0, 0.0015, 0.0) for way in ("quantize", "dequantize") for value in "xvwy"}
    return Menu("ab" * 32, candidates, Cost(1000, 0.01, 0.0), shared, "kl_nats", True)


def test_neighbours_go_into_integers_together() -> None:
    plan = choose(coupled(), Budget(None, None, None, "latency"))
    assert [form.arithmetic for form in plan.forms.values()] == ["integer"] * 3
    assert plan.forms["relu"] == CARRIED
    assert plan.latency_s == pytest.approx(0.01 - 3 * 0.002 + 2 * 0.0015)  # in at x, out at y, nothing between
    assert plan.size_bytes == 1000 - 300 + 40
    assert plan.divergence == pytest.approx(3 * 0.001 + 4 * 0.0001)


def test_latency_and_divergence_corrections_scale_what_is_shared_too() -> None:
    plan = choose(coupled(), Budget(None, None, None, "latency"), Correction(2.0, 0.5))
    assert plan.latency_s == pytest.approx(0.01 + 0.5 * (-3 * 0.002 + 2 * 0.0015))
    assert plan.divergence == pytest.approx(2 * (3 * 0.001 + 4 * 0.0001))
    assert plan.solution is not None
    assert plan.solution.objective == pytest.approx(plan.latency_s)


def test_json_round_trip_of_integers_and_what_couples_them(tmp_path: Path) -> None:
    plan = choose(coupled(), Budget(None, None, None, "latency"))
    again = read_plan(saved(plan, tmp_path))
    assert (again.menu, again.forms, again.solution is None) == (plan.menu, plan.forms, False)
    assert to_json(again) == to_json(plan)
    assert (again.latency_s, again.size_bytes, again.divergence) == (plan.latency_s, plan.size_bytes, plan.divergence)


@pytest.mark.parametrize(
    "budget", [Budget(6000.0, None, None, "error"), Budget(None, 0.009, 0.05, "size"), Budget(9000.0, 0.0095, None, "latency")]
)
def test_json_round_trip(budget: Budget, tmp_path: Path) -> None:
    plan = choose(menu(), budget, Correction(1.5, 0.9, 3))
    again = read_plan(saved(plan, tmp_path))
    assert (again.menu, again.forms, again.budget, again.correction) == (plan.menu, plan.forms, plan.budget, plan.correction)
    assert to_json(again) == to_json(plan)
    assert choose(again.menu, budget, again.correction).forms == plan.forms


def test_an_edited_form_is_taken_over_and_the_certificate_falls(tmp_path: Path) -> None:
    plan = choose(menu(), Budget(6000.0, None, None, "error"))
    form = {"decomposition": "lowrank", "ranks": [24], "storage": "fp16", "execution": "dense", "arithmetic": "float"}
    again = read_plan(edited(plan, tmp_path, "sites", "first", value=form))
    assert again.forms["first"] == Form("lowrank", (24,), "fp16", "dense")
    assert again.forms["second/w"] == plan.forms["second/w"]
    assert again.solution is None
    assert again.candidate("first") is None


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("intaglio_plan",), VERSION + 1, f"expected {VERSION}"),
        (("sites", "first", "decomposition"), "svd", "unknown form svd/"),
        (("sites", "first", "storage"), "int7", "unknown storage 'int7'"),
        (("sites", "first", "execution"), "fast", "unknown form"),
        (("sites", "first", "ranks"), [0], r"ranks \[0\] are not positive"),
        (("sites", "first", "ranks"), [1.5], r"ranks \[1.5\] are not positive"),
        (("sites", "first", "ranks"), [True], r"ranks \[True\] are not positive"),
        (("sites", "first", "ranks"), 8, "expected decomposition, ranks"),
        (("sites", "first", "storage"), None, "expected decomposition, ranks"),
        (("sites", "first", "arithmetic"), "analog", "unknown arithmetic 'analog'; expected one of float, integer"),
        (("sites", "first", "arithmetic"), 8, "expected decomposition, ranks"),
        (("sites", "first"), {"decomposition": "dense", "ranks": [], "storage": "int8", "execution": "dense"}, "'arithmetic' is missing"),
        (("sites", "first"), "lowrank", "missing or malformed"),
        (("sites",), [], "missing or malformed"),
        (("sites",), None, "missing or malformed"),
        (("budget", "minimize"), "bytes", "missing or malformed"),
        (("budget", "size_bytes"), "small", "missing or malformed"),
        (("budget",), {}, "missing or malformed"),
        (("base", "size_bytes"), "many", "missing or malformed"),
        (("base", "latency_s"), math.nan, "missing or malformed"),
        (("correction", "divergence"), "big", "missing or malformed"),
        (("correction",), None, "missing or malformed"),
        (("candidates", "first"), 3, "missing or malformed"),
        (("candidates", "first"), [[1, 2]], "missing or malformed"),
        (("candidates", "first", 1, 4), "analog", "unknown arithmetic"),
        (("candidates", "first", 1, 5), "tiny", "missing or malformed"),
        (("candidates", "first", 1, 9), ["unheard of"], "missing or malformed"),
        (("candidates", "first", 1, 10), ["unheard of"], "missing or malformed"),
        (("candidates", "first", 1, 10), ["DecodeInt8"], "missing or malformed"),
        (("candidates", "first", 1, 10), None, "missing or malformed"),
        (("candidates",), {}, "missing or malformed"),
        (("shared", "DecodeInt8"), 100, "missing or malformed"),
        (("shared", "DecodeInt8"), [-1, 0.0, 0.0], "missing or malformed"),
        (("shared", "DecodeInt8"), [100], "missing or malformed"),
        (("shared",), [], "missing or malformed"),
        (("solver",), {"status": "optimal"}, "missing or malformed"),
        (("solver", "choice"), [99, 0], "missing or malformed"),
        (("unit",), "metres", "missing or malformed"),
    ],
)
def test_malformed_fields_are_refused_in_one_line(keys: tuple[Any, ...], value: Any, words: str, tmp_path: Path) -> None:
    plan = choose(menu(), Budget(6000.0, None, None, "error"))
    path = edited(plan, tmp_path, *keys, value=value)
    with pytest.raises(InputError, match=words) as caught:
        read_plan(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"{}", b"\xff\xfe", b'"text"'])
def test_what_is_no_plan_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"give a file that `intaglio plan` wrote"):
        read_plan(path)


def test_a_missing_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_plan(tmp_path / "plan.json")
    with pytest.raises(InputError, match="Is a directory"):
        read_plan(tmp_path)


# --- labels


def labelled(terms: list[float]) -> Menu:
    """The menu with linear terms, four per weight."""
    plain = menu()
    rows = {
        name: tuple(replace(c, linear=terms[4 * number + index]) for index, c in enumerate(candidates))
        for number, (name, candidates) in enumerate(plain.candidates.items())
    }
    return replace(plain, candidates=rows)


@settings(max_examples=50)
@given(st.lists(st.floats(-0.03, 0.03), min_size=8, max_size=8), st.floats(0.2, 1.0), st.floats(0.5, 2.0))
def test_a_joint_choice_is_the_best_of_all_by_loss(terms: list[float], size: float, factor: float) -> None:
    offered, budget = labelled(terms), Budget(size_bytes=size * 13_000)
    correction = Correction(divergence=factor)
    plan = choose(offered, budget, correction, joint=True)
    changes = []
    for choice in itertools.product(*offered.candidates.values()):
        names = {name for candidate in choice for name in candidate.needs}
        total = 13_000 + sum(c.size_bytes for c in choice) + sum(offered.shared[name].size_bytes for name in names)
        if total <= size * 13_000:
            changes.append(sum(factor * c.divergence + c.linear for c in choice))
    assert plan.joint
    assert plan.solution is not None
    # The solver stops within a gap of 1e-4 of costs that are moved up by at most 2 · 0.03.
    assert plan.loss_change == pytest.approx(min(changes), abs=2e-5)
    assert plan.solution.objective == pytest.approx(plan.loss_change, abs=1e-12)
    assert plan.solution.bound <= plan.solution.objective + 1e-12


def test_without_labels_linear_terms_change_nothing() -> None:
    budget = Budget(size_bytes=6_000)
    assert choose(labelled([-0.03] * 8), budget).forms == choose(menu(), budget).forms


def test_a_joint_choice_has_no_limit_on_the_divergence() -> None:
    with pytest.raises(ValueError, match="a joint choice minimises the loss"):
        choose(menu(), Budget(size_bytes=6_000, divergence=0.01), joint=True)


def test_linear_terms_survive_the_file_and_older_files_have_none(tmp_path: Path) -> None:
    plan = choose(labelled([0.0, -0.001, 0.002, -0.003] * 2), Budget(size_bytes=6_000), joint=True)
    assert read_plan(saved(plan, tmp_path)) == replace(plan, solution=read_plan(saved(plan, tmp_path)).solution)
    document = json.loads(to_json(plan))
    document["intaglio_plan"] = VERSION - 1
    del document["joint"]
    document["candidates"] = {name: [row[:12] for row in rows] for name, rows in document["candidates"].items()}
    path = tmp_path / "old.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    old = read_plan(path)
    assert not old.joint
    assert old.linear == 0.0
    assert old.forms == plan.forms
