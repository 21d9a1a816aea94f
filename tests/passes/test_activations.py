"""Activations: which values may be quantized, and that what rounding each of them costs is what it does to the outputs."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import onnx
import pytest

from intaglio.ops.form import UNCHANGED, Form
from intaglio.passes.activations import RANGE_SAMPLES, Activations, measure_activations
from intaglio.passes.cache import Cache
from intaglio.passes.divergence import Divergence
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.kernels import INTEGERS, Integers
from intaglio.passes.partners import partners_of
from intaglio.passes.propose import Proposal
from intaglio.passes.ranges import calibrated
from intaglio.passes.recall import Finding, Findings
from intaglio.passes.rewrite import Fragment, Packed, fragment
from intaglio.passes.sensitivity import Curve, Probe, Sensitivity
from intaglio.passes.sites import Site
from intaglio.solver import Cost
from tests.models import normal, parse, run

INTEGER = Form("dense", (), "int8", "dense", "integer")
DYNAMIC = Form("dense", (), "int8", "dense", "dynamic")

NETWORK = """g (float[N, 8, 6, 6] x) => (float[N, 20] y, float[N, 8, 6, 6] t) {
    a = Conv <pads = [1, 1, 1, 1]> (x, c1, b1)
    ra = Relu (a)
    t = Tanh (ra)
    b = Conv <pads = [1, 1, 1, 1]> (ra, c2)
    s = Add (b, ra)
    p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (s)
    f = Flatten (p)
    y = Gemm (f, g)
}"""


@cache
def job() -> Job:
    weights = {"c1": normal(1, 8, 8, 3, 3), "b1": normal(2, 8), "c2": normal(3, 8, 8, 3, 3), "g": normal(4, 72, 20)}
    return open_job(parse(NETWORK, weights), {"x": normal(5, 40, 8, 6, 6)}, Settings())


def findings(*forms: Form, sites: tuple[str, ...] = ("c1", "c2", "g")) -> dict[str, Finding]:
    """The same forms for the named sites, and nothing but "unchanged" for the others."""
    flat = Sensitivity(Curve.through([]), Curve.through([]))
    known = {}
    for site in job().sites:
        offered = (UNCHANGED, *(forms if site.name in sites else ()))
        known[site.name] = Finding(tuple(Proposal(form, 0.0, 0.01) for form in offered), flat)
    return known


def measured(*forms: Form, sites: tuple[str, ...] = ("c1", "c2", "g")) -> Activations:
    return measure_activations(job(), findings(*forms, sites=sites), Findings(job(), job().settings.allowed(), Cache(None)))


def test_units_are_the_sites_with_integer_forms_and_the_carriers() -> None:
    found = measured(INTEGER)
    assert set(found.units) == {"c1", "c2", "g", "s", "p", "f"}
    assert {carrier.name for carrier in found.carriers} == {"s", "p", "f"}
    assert found.inputs == {}


def test_carriers_that_are_not_worthwhile_stand_outside() -> None:
    known = Findings(job(), job().settings.allowed(), Cache(None))
    found = measure_activations(job(), findings(INTEGER), known, lambda carrier: carrier.name != "s")
    assert set(found.units) == {"c1", "c2", "g", "p", "f"}
    assert "b" in found.outside


def test_sites_without_integer_forms_are_no_units() -> None:
    assert set(measured(INTEGER, sites=("c1", "g")).units) == {"c1", "g", "s", "p", "f"}
    assert measured().units == {}
    assert measured().carriers == ()


def test_values_that_something_else_reads_are_outside() -> None:
    """Tanh reads ra, and y is an output; the second convolution is no unit in the other case, so it stands outside too."""
    assert {"ra", "y"} <= measured(INTEGER).outside
    assert not {"b", "s", "p", "f", "x"} & measured(INTEGER).outside
    assert {"ra", "y"} <= measured(INTEGER, sites=("c1", "g")).outside
    assert "x" in measured(INTEGER, sites=("c2", "g")).outside


def test_operators_that_keep_the_range_of_their_input_round_nothing_anew() -> None:
    divergence = measured(INTEGER).divergence
    assert divergence["p"] == divergence["f"] == 0.0
    assert min(divergence[value] for value in ("x", "ra", "b", "s", "y")) > 0


def test_the_cost_of_a_value_is_what_rounding_it_does_to_the_outputs() -> None:
    """Rounded by hand, before it goes in: the same up to float32 and to what optimizations reorder, a percent of a small difference."""
    opened = job()
    ranges = calibrated(opened.model, ["x"], opened.data, opened.splits.fit[:RANGE_SAMPLES], opened.calibration, "mse")
    x = np.stack([opened.data.rows[int(i)]["x"][0] for i in opened.splits.fit])
    exact, rounded = (run(opened.model.proto, {"x": values}) for values in (x, ranges["x"].rounded(x)))
    expected = Divergence(opened.kinds)
    expected.add(exact, rounded)
    assert measured(INTEGER).divergence["x"] == pytest.approx(expected.value, rel=0.01)


def test_dynamic_layers_that_read_one_value_pay_for_it_once() -> None:
    found = measured(DYNAMIC, sites=("g",))
    (site,) = (site for site in job().sites if site.name == "g")
    (other,) = (site for site in job().sites if site.name == "c1")
    assert found.inputs == {"g": "f"}
    assert found.dynamic_needs(site) == ("dynamic:f",)
    assert found.dynamic_needs(other) == ()
    assert found.dynamic_costs() == {"dynamic:f": Cost(0, 0.0, found.divergence["f"])}
    assert found.units == {}


def test_what_was_measured_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Findings(job(), job().settings.allowed(), Cache(None))
    first = measure_activations(job(), findings(INTEGER), known)

    def refuse(*_: object, **__: object) -> dict[str, object]:
        raise AssertionError("measured again")

    monkeypatch.setattr("intaglio.passes.activations.calibrated", refuse)
    again = measure_activations(job(), findings(INTEGER), known)
    assert again.divergence == first.divergence
    assert again.units == first.units


def test_values_that_cannot_be_rounded_rule_out_the_operators_around_them() -> None:
    """Exp overflows: what lies between it and the last layer has no range."""
    text = """g (float[N, 16] x) => (float[N, 16] y) {
        a = Gemm (x, w) e = Exp (a) b = Gemm (e, v) y = Tanh (b)
    }"""
    proto = parse(text, {"w": 1000 * normal(1, 16, 16), "v": normal(2, 16, 16)})
    opened = open_job(proto, {"x": normal(3, 12, 16)}, Settings())
    flat = Sensitivity(Curve.through([]), Curve.through([]))
    known = {site.name: Finding((Proposal(INTEGER, 0.0, 0.01),), flat) for site in opened.sites}
    found = measure_activations(opened, known, Findings(opened, opened.settings.allowed(), Cache(None)))
    assert set(found.units) == {"w"}
    assert "e" not in found.divergence


def recurrent() -> tuple[Job, dict[str, Finding], str]:
    """An LSTM whose weights may be bytes within ±63, and the name of what it rounds."""
    text = """g (float[N, 6, 16] x) => (float[A, N, 24] h) {
        t = Transpose <perm = [1, 0, 2]> (x) y, h = LSTM <hidden_size = 24> (t, w, r)
    }"""
    proto = parse(text, {"w": normal(1, 1, 96, 16), "r": normal(2, 1, 96, 24)})
    opened = open_job(proto, {"x": normal(3, 40, 6, 16)}, Settings(integers="reduced"))
    flat = Sensitivity(Curve.through([]), Curve.through([]))
    known = {site.name: Finding((Proposal(UNCHANGED, 0.0, 0.0), Proposal(DYNAMIC, 0.0, 0.01)), flat) for site in opened.sites}
    (group,) = {group.name for group in partners_of(opened).groups.values()}
    return opened, known, group


def test_what_an_lstm_costs_is_measured_on_the_codes_that_it_will_have(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, known, group = recurrent()
    largest = []

    def watched(site: Site, form: Form, packed: Packed, proto: onnx.ModelProto, taken: frozenset[str], integers: Integers) -> Fragment:
        assert integers == INTEGERS["reduced"]
        largest.append(max(abs(int(code)) for code in np.ravel(packed[0][0])))
        return fragment(site, form, packed, proto, taken, integers)

    monkeypatch.setattr("intaglio.passes.activations.fragment", watched)
    found = measure_activations(opened, known, Findings(opened, opened.settings.allowed(), Cache(None)))
    assert largest == [63] * 4  # two weights, in integers and in floats
    assert 0 < found.divergence[group] < 0.01


@pytest.mark.parametrize("broken", [0, 1])
def test_an_lstm_that_yields_no_numbers_is_ruled_out(broken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In integers, or in floats with its weights as bytes."""
    opened, known, group = recurrent()
    found = [0.1, 0.1]
    found[broken] = math.nan
    monkeypatch.setattr(Probe, "divergence", lambda *_: found.pop(0))
    activations = measure_activations(opened, known, Findings(opened, opened.settings.allowed(), Cache(None)))
    assert activations.divergence[group] == math.inf
    assert activations.inputs == {}
