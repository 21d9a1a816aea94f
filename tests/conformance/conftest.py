"""Counts what the conformance tests did, and prints it at the end of the run."""

from __future__ import annotations

from collections import defaultdict

import pytest

from tests.conformance.backend import Tally

TALLIES = pytest.StashKey[defaultdict[str, Tally]]()


def pytest_configure(config: pytest.Config) -> None:
    """Start with nothing counted."""
    config.stash[TALLIES] = defaultdict(Tally)


@pytest.fixture
def tallies(request: pytest.FixtureRequest) -> defaultdict[str, Tally]:
    """Counts by operator or network, shared by the whole run."""
    return request.config.stash[TALLIES]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line per operator or network, then the totals per form and per reason."""
    tallies = config.stash[TALLIES]
    if not tallies:
        return
    terminalreporter.section("conformance with ONNX's backend tests")
    total = Tally()
    for name, tally in tallies.items():
        terminalreporter.line(f"{name:24}{tally.models:5} models {tally.sites:5} sites {tally.forms.total():6} rewrites")
        total.models += tally.models
        total.sites += tally.sites
        total.forms.update(tally.forms)
        total.skips.update(tally.skips)
    terminalreporter.line(f"{'total':24}{total.models:5} models {total.sites:5} sites {total.forms.total():6} rewrites")
    for title, counts in (("rewritten", total.forms), ("not rewritten", total.skips)):
        for what, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            terminalreporter.line(f"{title:16}{count:6}  {what}")
