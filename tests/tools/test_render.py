"""What is printed besides tables: only what happened is told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

import intaglio
from intaglio.passes.facts import LatencyFacts, Report
from intaglio.tools.render import compression
from tests.tools.conftest import network


@pytest.fixture(scope="module")
def report() -> Report:
    image = np.random.default_rng(1).standard_normal((48, 3, 8, 8)).astype(np.float32)
    return intaglio.compress(network(), {"image": image}, size=0.5).report


def printed(report: Report) -> str:
    """On a very wide terminal."""
    console = Console(width=400)
    with console.capture() as capture:
        console.print(compression(report))
    return capture.get()


def test_floors_are_told_where_there_are_some(report: Report) -> None:
    assert report.floors == {}
    assert "Softmax" not in printed(report)
    assert "Masked scores are clipped in front of Softmax (1 value)" in printed(replace(report, floors={"s": -80.0}))
    assert "(2 values)" in printed(replace(report, floors={"s": -80.0, "t": -81.0}))


def test_a_second_measurement_is_told(report: Report) -> None:
    once = LatencyFacts(1e-3, 0.5e-3, 0.5, 0.49, 0.51, (0.5,), 25, ("CPUExecutionProvider",), 1)
    assert "once more" not in printed(replace(report, latency=once))
    twice = replace(once, ratio=0.48, ratios=(0.512, 0.45))
    assert "measured once more: latency ratios 0.512 and 0.450; both count" in printed(replace(report, latency=twice))
