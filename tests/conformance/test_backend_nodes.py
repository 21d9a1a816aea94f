"""ONNX's backend tests for the operators whose weights are rewritten: full-rank rewriting reproduces their expected outputs."""

from __future__ import annotations

from collections import defaultdict

import pytest

from intaglio.passes.errors import InputError
from intaglio.passes.load import load
from intaglio.passes.sites import find_sites
from tests.conformance.backend import (
    ALWAYS,
    OPERATORS,
    OTHERS,
    BackendTest,
    Tally,
    backend_tests,
    check_arithmetics,
    check_site,
    frozen,
    modern,
    run,
    turn,
)

FLOORS = {
    "MatMul": (60, 4, 40),
    "Gemm": (14, 28, 300),
    "Conv": (30, 30, 380),
    "ConvTranspose": (14, 12, 60),
    "Gather": (15, 12, 135),
    "LSTM": (5, 10, 90),
    "GRU": (5, 10, 80),
    "RNN": (5, 10, 85),
}
"""Operator → fewest models, sites and rewrites; a little below what is reached, since other versions of onnx bring other tests."""

ARITHMETICS = {
    "MatMul": {"integer", "dynamic", "nbits"},
    "Gemm": {"integer", "dynamic", "nbits"},
    "Conv": {"integer"},
    "Gather": {"nbits", "rows"},
}
"""Operator → arithmetics that some site has to be tried in."""

CANNOT = {"int4-rows", "int4-native"}
"""Storages that hold matrices only, or need a newer opset than these models have."""


@pytest.mark.parametrize("operator", OPERATORS)
def test_full_rank_rewriting_reproduces_outputs(operator: str, tallies: defaultdict[str, Tally]) -> None:
    tally = tallies[operator]
    for test in backend_tests()[operator]:
        if _check(test, tally) and operator in ARITHMETICS:
            _check_modern(modern(test), tally)
    reached = (tally.models, tally.sites, tally.forms.total())
    assert all(count >= floor for count, floor in zip(reached, FLOORS[operator], strict=True)), reached
    assert tally.arithmetics >= ARITHMETICS.get(operator, set()) | {"float"}
    if operator == "Conv":  # has sites enough for every turn
        assert tally.storages >= {*ALWAYS, *OTHERS} - CANNOT


def _check(test: BackendTest, tally: Tally) -> bool:
    """Every site of the model as it is, and the site that each frozen input makes; False where the model itself does not run."""
    try:
        model = load(test.proto)
        outputs = run(model, model.proto, test.feed, optimize=False)
    except InputError as error:
        tally.skip("model", str(error).partition(": ")[2].partition(";")[0])
        return False
    try:
        test.check(outputs)
    except AssertionError:
        tally.skip("model", "ONNX Runtime itself does not reproduce the expected outputs")
        return False
    tally.models += 1
    for site in find_sites(model, min_elements=1):
        check_site(test, model, site, tally)
    for name, variant in frozen(test):
        model = load(variant.proto)
        found = find_sites(model, min_elements=1)
        for site in found:
            if site.name == name:
                check_site(variant, model, site, tally)
        for skip in found.skipped:
            if skip.name == name:
                tally.skip("weight", skip.reason)
    return True


def _check_modern(test: BackendTest, tally: Tally) -> None:
    """The same sites in every arithmetic that takes them, and in a few of the other storages."""
    for name, variant in ((None, test), *frozen(test)):
        model = load(variant.proto)
        for site in find_sites(model, min_elements=1):
            if name in (None, site.name):
                check_site(variant, model, site, tally, turn(tally))
                check_arithmetics(variant, model, site, tally)
