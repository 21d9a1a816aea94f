"""Assembly: fragments, integer regions and carriers in one model, of exactly the size that was predicted."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.arithmetic import ARITHMETICS
from intaglio.ops.form import CARRIED, UNCHANGED, Form
from intaglio.ops.storage import STORAGES
from intaglio.passes.assemble import assemble, nominal_ranges
from intaglio.passes.load import load
from intaglio.passes.model import Model
from intaglio.passes.price import SizePricer
from intaglio.passes.ranges import Range
from intaglio.passes.regions import find_carriers
from intaglio.passes.rewrite import declines
from intaglio.passes.save import save, serialized_size
from intaglio.passes.sites import find_sites
from tests.models import Array, assert_close, mocked, narrow_forms, normal, operators, optimized, parse, run

INTEGER = Form("dense", (), "int8", "dense", "integer")

NETWORK = """g (float[N, 8, 6, 6] x, int64[N] i) => (float[N, 33] y, float[N, 1120] z) {
    a = Conv <pads = [1, 1, 1, 1]> (x, c1, b1)
    ra = Relu (a)
    b = Conv <pads = [1, 1, 1, 1]> (ra, c2, b2)
    s = Add (b, ra)
    p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (s)
    f = Flatten (p)
    g = Gemm <transB = 1> (f, g1, b3)
    k = Clip (g, least, most)
    e = Gather (t, i)
    u = Add (k, e)
    h = MatMul (u, m1)
    ha = Add (h, b4)
    y = Sigmoid (ha)
    w = MatMul (u, m2)
    z = Add (w, b5)
}"""
"""Every family that computes in integers, weights and biases below and above the size from which payloads are left out of a skeleton."""


def network(ir_version: int, opset: int) -> onnx.ModelProto:
    weights = {
        "c1": normal(1, 8, 8, 3, 3),
        "b1": normal(2, 8),
        "c2": normal(3, 8, 8, 3, 3),
        "b2": normal(4, 8),
        "g1": normal(5, 40, 72),
        "b3": normal(6, 40),
        "t": normal(7, 30, 40),
        "m1": normal(8, 40, 33),
        "b4": normal(9, 1, 33),
        "m2": normal(10, 40, 1120),
        "b5": normal(11, 1120),
        "least": np.asarray(0, np.float32),
        "most": np.asarray(6, np.float32),
    }
    return parse(NETWORK, weights, opset=opset, ir_version=ir_version)


VERSIONS = ((7, 13), (8, 17), (10, 21))
"""IR version and opset: without functions, with functions, with 4-bit types."""


@cache
def opened(ir_version: int, opset: int) -> tuple[Model, dict[str, list[Form]]]:
    """The model, and the forms of every site and carrier: every storage in every arithmetic, products in some."""
    model = load(network(ir_version, opset))
    options: dict[str, list[Form]] = {}
    for site in find_sites(model):
        whole = [Form("dense", (), storage, "dense", arithmetic) for storage in STORAGES for arithmetic in ("float", *ARITHMETICS)]
        found = [form for form in whole if declines(site, form) is None]
        options[site.name] = [UNCHANGED, *dict.fromkeys([*found, *narrow_forms(site)])]
    options |= {carrier.name: [UNCHANGED, CARRIED] for carrier in find_carriers(model)}
    return model, options


def test_the_network_has_everything_that_may_run_in_integers() -> None:
    _, options = opened(8, 17)
    assert set(options) == {"c1", "c2", "g1", "t", "m1", "m2", "s", "p", "f", "u", "y"}
    assert {form.arithmetic for forms in options.values() for form in forms} == {"float", *ARITHMETICS}
    _, newest = opened(10, 21)
    assert {form.storage for forms in newest.values() for form in forms} == set(STORAGES)


@settings(max_examples=60)
@given(st.data(), st.sampled_from(VERSIONS), st.booleans())
def test_random_plans_have_the_size_that_was_predicted(data: st.DataObject, versions: tuple[int, int], external: bool) -> None:
    model, options = opened(*versions)
    plan = {name: data.draw(st.sampled_from(forms), name) for name, forms in options.items()}
    assert SizePricer(model, external=external).total(plan) == serialized_size(mocked(model, plan), external)


@pytest.mark.parametrize("external", [False, True], ids=["embedded", "external"])
@pytest.mark.parametrize("versions", VERSIONS, ids=str)
def test_the_size_is_that_of_the_files(versions: tuple[int, int], external: bool, tmp_path: Path) -> None:
    model, options = opened(*versions)
    for turn in (0, 3, 8):
        plan = {name: forms[(turn + 5 * number) % len(forms)] for number, (name, forms) in enumerate(options.items())}
        plan |= {name: CARRIED for name, forms in options.items() if CARRIED in forms}
        path = tmp_path / str(turn) / "model.onnx"
        path.parent.mkdir()
        size = save(mocked(model, plan), path, source=None, external=external)
        assert SizePricer(model, external=external).total(plan) == size == sum(f.stat().st_size for f in path.parent.iterdir())
        onnx.checker.check_model(path, full_check=True)


def test_without_integers_nothing_is_asked_for_ranges() -> None:
    model, options = opened(8, 17)

    def refuse(*_: object) -> dict[str, Range]:
        raise AssertionError("no range is needed")

    result = assemble(model, {}, list(find_sites(model)), [], refuse)
    assert operators(result.proto) == operators(model.proto)
    assert set(options) >= {site.name for site in find_sites(model)}


def test_ranges_are_asked_for_the_values_that_are_quantized() -> None:
    """Of an absorbed Relu its output, and of a MaxPool nothing: it keeps the range of its input."""
    model, _ = opened(8, 17)
    asked: list[tuple[list[str], list[str]]] = []

    def ranges(given: Model, names: object, values: object) -> dict[str, Range]:
        asked.append((sorted(names), sorted(values)))  # type: ignore[call-overload]
        return nominal_ranges(given, [], values)  # type: ignore[arg-type]

    carried = [carrier for carrier in find_carriers(model) if carrier.name in ("s", "p")]
    assemble(model, {}, list(find_sites(model)), carried, ranges)
    assert asked == [(["p", "s"], ["b", "ra", "s"])]


def test_nominal_ranges_differ() -> None:
    model, _ = opened(8, 17)
    ranges = nominal_ranges(model, ["a"], ["x", "y", "z"])
    assert list(ranges) == ["x", "y", "z"]
    assert len({span.scale for span in ranges.values()}) == 3


def feed() -> dict[str, Array]:
    return {"x": normal(20, 5, 8, 6, 6), "i": np.arange(5)}


@pytest.mark.parametrize("versions", VERSIONS, ids=str)
def test_the_whole_network_runs_in_integers(versions: tuple[int, int]) -> None:
    model, options = opened(*versions)
    plan = {name: CARRIED if CARRIED in forms else INTEGER if INTEGER in forms else UNCHANGED for name, forms in options.items()}
    proto = mocked(model, plan).proto
    found = operators(optimized(proto))
    assert found["QLinearConv"] == 2
    assert found["Conv"] == found["Gemm"] == found["MatMul"] == 0
    assert found["QLinearAdd"] == 2
    outputs = run(proto, feed())
    assert [output.shape for output in outputs] == [(5, 33), (5, 1120)]
    assert_close(outputs, run(proto, feed(), optimize=False), 0.01)  # zeros as weights: half of a sigmoid, and biases in bytes
