"""Reports as JSON, and the parts that need no run. What runs report is tested with the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from intaglio.ops.form import UNCHANGED, Form
from intaglio.passes.facts import MetricFacts, SiteFacts, SizeFacts, parameters, to_json
from intaglio.passes.verify import Comparison


@dataclass(frozen=True)
class Inner:
    """A nested record."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Outer:
    """A record with everything that reports hold."""

    inner: Inner
    several: tuple[Inner, ...]
    by_name: dict[str, float]
    nothing: None = None


def test_json_holds_fields_in_order_and_no_infinities() -> None:
    document = to_json(Outer(Inner("ä", (1.5, float("inf"))), (Inner("b", ()),), {"x": float("nan")}))
    assert json.loads(document) == {
        "inner": {"name": "ä", "values": [1.5, None]},
        "several": [{"name": "b", "values": []}],
        "by_name": {"x": None},
        "nothing": None,
    }
    assert document.index("inner") < document.index("several") < document.index("by_name")


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (UNCHANGED, {}),
        (Form("dense", (), "int8"), {}),
        (Form("dense", (), "int4", "dense", "integer"), {}),
        (Form("lowrank", (8,), "fp16", "contract"), {"rank": 8}),
        (Form("tucker2", (8, 4), "float", "contract"), {"ranks": [8, 4]}),
    ],
)
def test_parameters_say_everything_about_a_form(form: Form, expected: dict[str, object]) -> None:
    assert parameters(form) == expected
    site = SiteFacts(
        name="w",
        op_type="Conv",
        shape=(16, 16, 1, 1),
        form=form.decomposition,
        parameters=parameters(form),
        storage=form.storage,
        execution=form.execution,
        arithmetic=form.arithmetic,
        reference_bytes=1024,
        bytes=512,
        predicted_divergence=None,
        predicted_linear=None,
        reference_latency_s=None,
        latency_s=None,
        reason="",
    )
    assert site.chosen == form


def test_size_ratio_is_after_over_before() -> None:
    assert SizeFacts.of(200, 50).ratio == 0.25


@pytest.mark.parametrize("metric", [None, "accuracy"])
def test_a_metric_needs_labels(metric: str | None) -> None:
    value = None if metric is None else 90.0
    found = MetricFacts.of(Comparison("kl_nats", 0.0, 1.0, metric, value, value, 10))
    assert found == (None if metric is None else MetricFacts("accuracy", 90.0, 90.0))
