"""What is printed besides tables: only what happened is told."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from intaglio.passes.canonicalize import Report as Canonicalization
from intaglio.passes.facts import DataFacts, DivergenceFacts, FileFacts, LatencyFacts, Report, SizeFacts
from intaglio.passes.margins import Margin
from intaglio.tools.render import compression

REPORT = Report(
    intaglio="0",
    status="met",
    model=FileFacts("model.onnx", "0" * 64),
    output=FileFacts(None, None),
    size=SizeFacts.of(1000, 500),
    latency=None,
    loading=None,
    divergence=DivergenceFacts("kl_nats", 0.01, 0.01, 16),
    agreement=1.0,
    metric=None,
    task=None,
    tuning=None,
    rounds=(),
    solver=None,
    margins=(),
    data=DataFacts(0, 16, 16, 16, False),
    statistics=(),
    canonicalization=Canonicalization(False, "nothing to do", 4, 4, 1000, 1000),
    sites=(),
    integers="full",
    carriers=(),
    floors={},
    normalizations=(),
    skipped=(),
    seconds={},
)


def printed(report: Report) -> str:
    """On a very wide terminal."""
    console = Console(width=400)
    with console.capture() as capture:
        console.print(compression(report))
    return capture.get()


def test_floors_are_told_where_there_are_some() -> None:
    assert "Softmax" not in printed(REPORT)
    assert "Masked scores are clipped in front of Softmax (1 value)" in printed(replace(REPORT, floors={"s": -80.0}))
    assert "(2 values)" in printed(replace(REPORT, floors={"s": -80.0, "t": -81.0}))


def test_a_second_measurement_is_told() -> None:
    once = LatencyFacts(1e-3, 0.5e-3, 0.5, 0.49, 0.51, (0.5,), 25, ("CPUExecutionProvider",), 1)
    assert "once more" not in printed(replace(REPORT, latency=once))
    twice = replace(once, ratio=0.48, ratios=(0.512, 0.45))
    assert "measured once more: latency ratios 0.512 and 0.450; both count" in printed(replace(REPORT, latency=twice))


def test_what_more_of_a_budget_would_buy_is_told() -> None:
    assert "more size" not in printed(REPORT)
    found = (Margin("size", 1.1, "error", 1.0), Margin("latency", 1.1, "error", 0.28))
    expected = "Predicted, of what it takes: 10% more size: divergence as it is; 10% more latency: divergence 72% lower."
    assert expected in printed(replace(REPORT, margins=found))
