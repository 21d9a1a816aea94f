"""Partners: both weights of an LSTM compute in integers or neither does, and where that cannot be the reason says why."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from intaglio.ops.form import UNCHANGED, Form
from intaglio.passes.apply import apply_plan
from intaglio.passes.budget import Request
from intaglio.passes.build import build, check
from intaglio.passes.errors import InputError
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.load import load
from intaglio.passes.partners import Partners, partners_of
from intaglio.passes.pipeline import compress_job
from intaglio.passes.plan import Plan, read_plan, to_json
from intaglio.passes.replan import plan_job, replan
from intaglio.passes.report import report
from intaglio.passes.rewrite import declines
from intaglio.passes.sites import find_sites
from intaglio.passes.targets import TARGETS
from intaglio.solver import Cost, Option, Problem
from tests.models import Array, normal, operators, optimized, parse, run

DYNAMIC = Form("dense", (), "int8", "dense", "dynamic")
TEXT = """g (float[N, 6, 16] x) => (float[N, 12] y) {
    t = Transpose <perm = [1, 0, 2]> (x)
    a, h, c = LSTM <hidden_size = 24> (t, w, r, b)
    d, e, f = LSTM <hidden_size = 24> (h, w2, r2)
    s = Squeeze (e, axes)
    y = MatMul (s, m)
}"""
AXES = {"axes": np.asarray([0], np.int64)}


def weights() -> dict[str, Array]:
    return AXES | {
        "w": normal(1, 1, 96, 16) * 4,
        "r": normal(2, 1, 96, 24) * 4,
        "b": normal(3, 1, 192),
        "w2": normal(4, 1, 96, 24) * 4,
        "r2": normal(5, 1, 96, 24) * 4,
        "m": normal(6, 24, 12) * 4,
    }


def network() -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Two layers, and sequences."""
    return parse(TEXT, weights()), {"x": normal(7, 40, 6, 16) * 4}


@cache
def job(target: str = "cpu", exclude: tuple[str, ...] = ()) -> Job:
    chosen = Settings(target=target, exclude=exclude, decompositions=("dense",), storages=("int8", "int4"))
    return open_job(*network(), chosen)


def one(body: str, arrays: dict[str, Array], graph: str = "float[S, B, 16] x") -> Partners:
    """Of a model around a layer or two."""
    model = load(parse(f"g ({graph}) => (float[S, 1, B, 24] y) {{ {body} }}", arrays))
    found = find_sites(model)
    return Partners.find(found, found.skipped)


def test_the_weights_of_each_layer_are_a_group_whose_first_reads_the_sequence() -> None:
    found = partners_of(job())
    assert {name: [site.name for site in group.sites] for name, group in found.groups.items()} == {
        "w": ["w", "r"],
        "r": ["w", "r"],
        "w2": ["w2", "r2"],
        "r2": ["w2", "r2"],
    }
    assert found.groups["w"] is found.groups["r"]
    assert found.reasons == {}


def test_only_forms_of_the_arithmetic_need_partners() -> None:
    found = partners_of(job())
    assert found.group("w", DYNAMIC) is found.groups["w"]
    assert found.group("w", UNCHANGED) is found.group("w", Form("dense", (), "int8")) is found.group("m", DYNAMIC) is None


LSTM = "y = LSTM <hidden_size = 24> (x, w, r)"
W, R = normal(1, 1, 96, 16), normal(2, 1, 96, 24)


@pytest.mark.parametrize(
    ("body", "arrays", "graph", "reasons"),
    [
        (
            "y = LSTM <hidden_size = 24> (x, w, r)",
            {"w": W},
            "float[S, B, 16] x, float[1, 96, 24] r",
            {"w": "its LSTM reads 'r' too, which stays as it is: no constant weight"},
        ),
        (
            "q = Identity (r) y = LSTM <hidden_size = 24> (x, w, q)",
            {"w": W, "r": R},
            "float[S, B, 16] x",
            {"w": "its LSTM reads 'q' too, which cannot: the weight is turned round before it is used"},
        ),
        (
            "a, h = LSTM <hidden_size = 24> (x, w, r) s = Squeeze (a, axes) y = LSTM <hidden_size = 24> (s, w2, r)",
            AXES | {"w": W, "r": R, "w2": normal(3, 1, 96, 24)},
            "float[S, B, 16] x",
            dict.fromkeys(("w", "r", "w2"), "'r' is tied: several operators read it, each beside another weight"),
        ),
        (
            "y = LSTM <hidden_size = 24> (x, w, r)",
            {"w": normal(1, 1, 96, 2), "r": R},
            "float[S, B, 2] x",
            {"r": "its LSTM reads 'w' too, which stays as it is: fewer than 256 weights"},
        ),
    ],
    ids=["an input", "turned", "tied", "small"],
)
def test_a_weight_whose_partner_cannot_change_with_it_declines(
    body: str, arrays: dict[str, Array], graph: str, reasons: dict[str, str]
) -> None:
    found = one(body, arrays, graph)
    assert found.groups == {}
    assert found.reasons == {(name, "dynamic"): reason for name, reason in reasons.items()}


def test_operators_without_partners_are_no_concern() -> None:
    found = one("y = GRU <hidden_size = 24> (x, w, r)", {"w": normal(1, 1, 72, 16), "r": normal(2, 1, 72, 24)})
    assert (found.groups, found.reasons) == ({}, {})


def test_what_a_user_excludes_keeps_its_partner_in_floats() -> None:
    opened = job(exclude=("^r$",))
    reason = "its LSTM reads 'r' too, which stays as it is: excluded by --include/--exclude"
    assert partners_of(opened).reasons == {("w", "dynamic"): reason}
    assert set(partners_of(opened).groups) == {"w2", "r2"}
    allowed = opened.settings.allowed()
    assert "dynamic" not in partners_of(opened).admitted("w", allowed).arithmetics
    assert partners_of(opened).admitted("w2", allowed) == allowed
    with pytest.raises(InputError, match=f"plan: site 'w' cannot take dense/int8/dense/dynamic: {reason}; choose another form"):
        check(opened, {"w": DYNAMIC})


@pytest.mark.parametrize("target", TARGETS)
def test_only_the_processor_has_the_operator(target: str) -> None:
    """`web` computes in dynamic integers too, by standard operators."""
    opened = job(target)
    found = partners_of(opened)
    if target in ("cpu", "cuda"):
        assert set(found.groups) == {"w", "r", "w2", "r2"}
    else:
        assert found.groups == {}
        assert set(found.reasons.values()) == {"the target has no operators of com.microsoft"}
    admitted = {site.name for site in opened.sites if "dynamic" in found.admitted(site.name, opened.settings.allowed()).arithmetics}
    assert admitted == {"cpu": {"w", "r", "w2", "r2", "m"}, "web": {"m"}}.get(target, set())
    if target == "web":
        assert {node.domain for node in build(opened, {"m": DYNAMIC}).proto.graph.node} <= {"", "intaglio"}


@pytest.mark.parametrize("half", [UNCHANGED, Form("dense", (), "int4"), Form("lowrank", (4,), "int8", "dense")], ids=str)
@pytest.mark.parametrize(("name", "other"), [("w", "r"), ("r2", "w2")])
def test_a_plan_that_mixes_is_refused(name: str, other: str, half: Form) -> None:
    words = (
        f"plan: '{name}' and '{other}' are weights of one LSTM, and only the first has arithmetic 'dynamic'; give it to both or to neither"
    )
    for forms in ({name: DYNAMIC, other: half}, {other: half, name: DYNAMIC}, {name: DYNAMIC}):
        with pytest.raises(InputError, match=words):
            check(job(), forms)
    check(job(), {name: DYNAMIC, other: replace(DYNAMIC, storage="kmeans3")})


forms = st.sampled_from((UNCHANGED, Form("dense", (), "int4"), DYNAMIC, Form("lowrank", (4,), "int8", "contract", "dynamic")))


@given(st.fixed_dictionaries(dict.fromkeys(("w", "r", "w2", "r2"), forms)))
def test_the_solver_may_choose_what_a_plan_may_say(chosen: dict[str, Form]) -> None:
    found = partners_of(job())
    terms = [found.terms(name, form) for name, form in chosen.items()]
    options = tuple((Option(0, 0.0, 0.0, each.needs, each.provides, each.requires),) for each in terms)
    allowed = Problem(options, Cost(0, 0.0, 0.0), found.resources()).allows([0] * len(options))
    try:
        found.check(chosen)
    except InputError:
        assert not allowed
    else:
        assert allowed


def test_a_weight_waits_for_its_partner() -> None:
    found = partners_of(job())
    plan = {"w": DYNAMIC, "r": DYNAMIC, "w2": Form("dense", (), "int8"), "m": DYNAMIC}
    assert found.fitted(plan, {"w", "w2", "m"}) == {"w2", "m"}
    assert found.fitted(plan, set(plan)) == set(plan)


def test_weights_of_different_storages_and_factors_go_together() -> None:
    """A product of factors is multiplied out at load; where activations flow through it, the first factor is a product in integers."""
    plan = {
        "w": Form("lowrank", (8,), "int6", "contract", "dynamic"),
        "r": Form("lowrank", (16,), "int8", "dense", "dynamic"),
        "w2": replace(DYNAMIC, storage="kmeans4"),
        "r2": replace(DYNAMIC, storage="planes4.0"),
    }
    assert all(declines(site, plan[site.name]) is None for site in job().sites if site.name in plan)
    model = build(job(), plan).proto
    found = operators(optimized(model))
    assert found["DynamicQuantizeLSTM"] == 2
    assert found["DynamicQuantizeMatMul"] == found["MatMul"] == 1
    assert sum(found.values()) == 6  # and a Transpose and a Squeeze
    feed = network()[1]
    (plain,), (fused,) = (run(model, feed, optimize=optimize) for optimize in (False, True))
    assert np.abs(plain - fused).max() <= 0.03 * np.abs(plain).max()  # sums just between two steps are rounded to either


def test_a_layer_inside_a_branch() -> None:
    """Sites of nested graphs are not timed, so the solver never sees them so; a plan may say it."""
    text = """g (bool k, float[S, B, 16] x) => (float[S, 1, B, 24] y) {
        y = If (k) <
            then_branch = a () => (float[S, 1, B, 24] p) {
                p = LSTM <hidden_size = 24> (x, w, r)
            },
            else_branch = b () => (float[S, 1, B, 24] q) {
                q = LSTM <hidden_size = 24> (x, w2, r2)
            }
        >
    }"""
    proto = parse(text)
    for attribute, names in zip(proto.graph.node[0].attribute, (("w", "r"), ("w2", "r2")), strict=True):
        attribute.g.initializer.extend(numpy_helper.from_array(array, name) for name, array in zip(names, (W, R), strict=True))
    model = load(proto)
    found = Partners.find(find_sites(model))
    assert len(found.groups) == 4
    assert {len(group.sites) for group in found.groups.values()} == {2}


@cache
def plan() -> Plan:
    return plan_job(job(), Request(size="0.5"))


def test_a_plan_prices_both_weights_and_counts_the_time_once() -> None:
    menu = plan().menu
    rows = {name: [row for row in menu.candidates[name] if row.form.arithmetic == "dynamic"] for name in ("w", "r", "w2", "r2")}
    assert all(rows.values())
    assert {row.latency_s for name in ("r", "r2") for row in rows[name]} == {0.0}
    assert all(row.latency_s != 0.0 for name in ("w", "w2") for row in rows[name])
    for name, other in (("w", "r"), ("r", "w"), ("w2", "r2")):
        assert all(row.provides == (f"arithmetic:{name}",) and row.requires == (f"arithmetic:{other}",) for row in rows[name])
        first = min(name, other, key="wr".index) if "2" not in name else "w2"
        assert all(f"dynamic:{first}+{first.replace('w', 'r')}" in row.needs for row in rows[name])
    assert menu.shared["dynamic:w+r"].divergence > 0
    assert menu.shared["arithmetic:w"] == Cost(0, 0.0, 0.0)


def test_the_sum_of_prices_is_the_size() -> None:
    """What the prices of both weights say of their node is counted once, give or take the lengths of fields."""
    for names in (("w", "r"), ("w2", "r2")):
        chosen = {name: replace(DYNAMIC, storage=storage) for name, storage in zip(names, ("int8", "int4"), strict=True)}
        whole = {name: chosen.get(name, UNCHANGED) for name in plan().forms}
        edited = replace(plan(), forms=whole, solution=None)
        assert abs(edited.size_bytes - job().sizes().total(whole)) <= 8


def test_what_rounding_inside_a_layer_costs_is_what_it_does_to_the_outputs() -> None:
    """The same layer in integers and in floats, with the weights in bytes both times."""
    opened = job()
    pairs = [{name: replace(DYNAMIC, arithmetic=arithmetic) for name in ("w2", "r2")} for arithmetic in ("dynamic", "float")]
    both, rounded = (opened.probe().divergence(build(opened, pair).proto) for pair in pairs)
    # Weights are rounded to nearest for the one and with compensation for the other: the rounding of activations hardly depends on that.
    assert plan().menu.shared["dynamic:w2+r2"].divergence == pytest.approx(both - rounded, rel=0.5)


def test_plans_are_written_read_solved_again_and_applied(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(to_json(plan()), encoding="utf-8")
    read = read_plan(path)
    again = replan(network()[0], read, Request(minimize="latency"))
    partners_of(job()).check(again.forms)
    document = json.loads(path.read_text(encoding="utf-8"))
    for name in ("w", "r"):
        document["sites"][name] = {"decomposition": "dense", "ranks": [], "storage": "int4", "execution": "dense", "arithmetic": "dynamic"}
    path.write_text(json.dumps(document), encoding="utf-8")
    outcome = apply_plan(job(), read_plan(path))
    assert operators(outcome.model.proto)["DynamicQuantizeLSTM"] == 1
    document["sites"]["r"]["arithmetic"] = "float"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(InputError, match="'w' and 'r' are weights of one LSTM"):
        apply_plan(job(), read_plan(path))


def test_the_report_says_why_a_weight_stays_in_floats() -> None:
    facts = report(compress_job(job(exclude=("^r$",)), Request(size=0.6)))
    reasons = {site.name: site.reason for site in facts.sites}
    assert "; not dynamic: its LSTM reads 'r' too, which stays as it is" in reasons["w"]
    assert "; not dynamic" not in reasons["w2"]
