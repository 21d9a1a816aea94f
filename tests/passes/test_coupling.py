"""Coupling: what the solver pays at the borders of integer regions is what the rewritten model quantizes and dequantizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.form import CARRIED, Form
from intaglio.passes.coupling import Coupling, Unit, ValuePrice, couple
from intaglio.passes.load import load
from intaglio.passes.model import Model
from intaglio.passes.regions import find_carriers
from intaglio.passes.sites import find_sites
from intaglio.passes.units import units_around
from intaglio.solver import Budget, Cost, Option, Problem, solve, total_cost
from tests.models import mocked, normal, operators, optimized, parse

INTEGER = Form("dense", (), "int8", "dense", "integer")

PRICE = ValuePrice(1000, 10.0, 1.0, 0.5)
"""Of every value: bytes of the pair, seconds in and out, divergence. No sum of some is a sum of others."""

SAVED_S = 3.0
"""What a unit saves in integers."""


def problem_of(coupling: Coupling, groups: Sequence[str], saved_s: float = SAVED_S) -> Problem:
    """Every group in floats or in integers."""
    floats = [coupling.terms(group, integer=False) for group in groups]
    integers = [coupling.terms(group, integer=True) for group in groups]
    options = tuple(
        (Option(0, 0.0, 0.0, f.needs, f.provides), Option(0, -saved_s, 0.0, i.needs, i.provides))
        for f, i in zip(floats, integers, strict=True)
    )
    return Problem(options, Cost(0, 1000.0, 0.0), coupling.resources)


def borders(units: Mapping[str, Unit], outside: frozenset[str], chosen: Mapping[str, bool]) -> Cost:
    """What a choice (group → whether in integers) pays for activations, counted value by value."""
    rounded = entered = left = 0
    for value in {name for unit in units.values() for name in (*unit.inputs, *unit.outputs)}:
        readers = [chosen[group] for group, unit in units.items() if value in unit.inputs]
        makers = [(chosen[group], unit.float_output) for group, unit in units.items() if value in unit.outputs]
        as_bytes = any(integer and not yields_floats for integer, yields_floats in makers)
        rounded += any(readers) or as_bytes
        entered += any(readers) and not any(integer for integer, _ in makers)
        left += as_bytes and (not all(readers) or value in outside)
    return Cost(1000 * rounded, 10.0 * entered + 1.0 * left, 0.5 * rounded)


@st.composite
def networks(draw: st.DrawFn) -> tuple[dict[str, Unit], frozenset[str]]:
    """Up to six units in running order, each of which reads one or two values that exist already; some values are read outside too."""
    values, units = ["x"], {}
    for number in range(draw(st.integers(1, 6))):
        inputs = draw(st.lists(st.sampled_from(values), min_size=1, max_size=2, unique=True))
        units[f"u{number}"] = Unit(tuple(inputs), (f"v{number}",), draw(st.booleans()))
        values.append(f"v{number}")
    return units, frozenset(draw(st.sets(st.sampled_from(values))))


@settings(max_examples=100)
@given(networks(), st.data())
def test_a_choice_pays_for_every_border_once(network: tuple[dict[str, Unit], frozenset[str]], data: st.DataObject) -> None:
    units, outside = network
    values = {name for unit in units.values() for name in (*unit.inputs, *unit.outputs)}
    coupling = couple(units, dict.fromkeys(values, PRICE), outside)
    chosen = {group: data.draw(st.booleans(), group) for group in units}
    paid = total_cost(problem_of(coupling, tuple(units)), [int(chosen[group]) for group in units])
    expected = borders(units, outside, chosen)
    assert paid.size_bytes == expected.size_bytes
    assert paid.latency_s == pytest.approx(1000.0 - SAVED_S * sum(chosen.values()) + expected.latency_s)
    assert paid.divergence == pytest.approx(expected.divergence)


@settings(max_examples=40)
@given(networks(), st.floats(0.5, 12))
def test_the_solver_finds_the_fastest_choice(network: tuple[dict[str, Unit], frozenset[str]], saved_s: float) -> None:
    """Against all choices, each counted value by value."""
    units, outside = network
    values = {name for unit in units.values() for name in (*unit.inputs, *unit.outputs)}
    coupling = couple(units, dict.fromkeys(values, PRICE), outside)
    solution = solve(problem_of(coupling, tuple(units), saved_s), Budget(None, None, None, "latency"))
    every = (dict(zip(units, choice, strict=True)) for choice in product((False, True), repeat=len(units)))
    best_s = min(1000.0 - saved_s * sum(chosen.values()) + borders(units, outside, chosen).latency_s for chosen in every)
    assert solution.objective == pytest.approx(best_s, abs=1e-6)


def test_a_region_is_entered_and_left_once() -> None:
    """Three layers of which each alone would not pay: together they do, and nothing is paid between them."""
    units = {"a": Unit(("x",), ("v",)), "b": Unit(("v",), ("w",)), "c": Unit(("w",), ("y",))}
    coupling = couple(units, dict.fromkeys("xvwy", PRICE), frozenset("y"))
    alone = total_cost(problem_of(coupling, "abc", 4.0), (0, 1, 0))
    solution = solve(problem_of(coupling, "abc", 4.0), Budget(None, None, None, "latency"))
    assert alone.latency_s > 1000
    assert solution.choice == (1, 1, 1)
    assert solution.objective == pytest.approx(1000 - 3 * 4.0 + 10.0 + 1.0)


@pytest.mark.parametrize(("follows", "choice"), [(False, (0, 1)), (True, (1, 1))])
def test_what_follows_runs_in_integers_only_behind_integers(follows: bool, choice: tuple[int, int]) -> None:
    """The pool alone would save time on paper; where its kernel wants the layout of the layer before it, both change or neither."""
    units = {"layer": Unit(("x",), ("v",)), "pool": Unit(("v",), ("y",), follows=follows)}
    coupling = couple(units, dict.fromkeys("xvy", PRICE), frozenset())
    groups = []
    for name, saved_s in (("layer", -1.0), ("pool", 20.0)):
        floats, integers = (coupling.terms(name, integer=integer) for integer in (False, True))
        groups.append(
            (
                Option(0, 0.0, 0.0, floats.needs, floats.provides, floats.requires),
                Option(0, -saved_s, 0.0, integers.needs, integers.provides, integers.requires),
            )
        )
    problem = Problem(tuple(groups), Cost(0, 1000.0, 0.0), coupling.resources)
    assert solve(problem, Budget(None, None, None, "latency")).choice == choice
    assert problem.allows((0, 1)) is not follows


def test_units_that_border_on_nothing_that_anyone_reads_need_nothing_in_floats() -> None:
    coupling = couple({"a": Unit(("x",), ("y",))}, {"x": PRICE, "y": PRICE}, frozenset("y"))
    assert coupling.terms("a", integer=False).needs == ()
    assert set(coupling.terms("a", integer=True).needs) == {"round:x", "quantize:x", "round:y", "dequantize:y"}
    assert coupling.terms("unknown", integer=True).needs == ()


CHAIN = """g (float[N, 8, 6, 6] x) => (float[N, 8, 6, 6] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, c1, b1)
    ra = Relu (a)
    b = Conv <pads = [1, 1, 1, 1]> (ra, c2)
    s = Sigmoid (b)
    d = Conv <pads = [1, 1, 1, 1]> (s, c3)
    rd = Relu (d)
    y = Conv <pads = [1, 1, 1, 1]> (rd, c4)
}"""
ORDER = ("c1", "c2", "s", "c3", "c4")
"""Its units: four sites and a carrier."""


@cache
def chain() -> Model:
    weights = {f"c{number}": normal(number, 8, 8, 3, 3) for number in range(1, 5)}
    return load(parse(CHAIN, weights | {"b1": normal(9, 8)}))


@pytest.mark.parametrize("integers", tuple(product((False, True), repeat=5)), ids=lambda integers: "".join("fi"[i] for i in integers))
def test_what_is_paid_is_what_onnx_runtime_runs(integers: tuple[bool, ...]) -> None:
    """QuantizeLinear and DequantizeLinear that are left in the optimized model, for every part of a network in integers.

    A layer in floats between two in integers is paid for, although ONNX Runtime takes it into the region of its own accord.
    """
    model = chain()
    units = units_around(model, find_sites(model), find_carriers(model))
    assert set(units) == set(ORDER)
    chosen = dict(zip(ORDER, integers, strict=True))
    forms = {name: CARRIED if name == "s" else INTEGER for name, integer in chosen.items() if integer}
    found = operators(optimized(mocked(model, forms).proto))
    between = [
        name
        for before, name, after in zip(ORDER, ORDER[1:], ORDER[2:], strict=False)
        if chosen[before] and not chosen[name] and chosen[after]
    ]
    run = chosen | dict.fromkeys(between, True)
    assert 10 * found["QuantizeLinear"] + found["DequantizeLinear"] == borders(units, frozenset("y"), run).latency_s
    assert found["QLinearConv"] == sum(run.values()) - run["s"]
    assert found["QLinearSigmoid"] == run["s"]
