"""What was found out about sites: an interrupted analysis goes on, and what it gives is that of an undisturbed one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import TypeVar

import numpy as np
import onnx
import pytest

from intaglio.ops.form import UNCHANGED, Form
from intaglio.passes import analyse as module
from intaglio.passes.analyse import analyse
from intaglio.passes.cache import Cache
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.plan import Menu
from intaglio.passes.propose import Allowed, Proposal
from intaglio.passes.recall import Finding, Findings
from intaglio.passes.sensitivity import Curve, Sensitivity
from tests.models import Array, normal, parse

T = TypeVar("T")


@cache
def network() -> tuple[onnx.ModelProto, dict[str, Array]]:
    proto = parse(
        "g (float[N, 16] x) => (float[N, 24] y) { h = MatMul (x, a) r = Relu (h) s = MatMul (r, b) t = Relu (s) y = MatMul (t, c) }",
        {"a": normal(1, 16, 32), "b": normal(2, 32, 32), "c": normal(3, 32, 24)},
    )
    return proto, {"x": normal(4, 20, 16)}


def job_of(settings: Settings = Settings()) -> Job:  # noqa: B008
    return open_job(*network(), settings)


def interrupting(items: Iterable[T], what: str, count: int) -> Iterator[T]:
    """Ctrl-C once the second site is done."""
    for number, item in enumerate(items):
        if number == 2:
            raise KeyboardInterrupt
        yield item


def prices(menu: Menu) -> object:
    """All that does not depend on the clock."""
    return [
        (name, [(str(c.form), c.size_bytes, c.divergence, c.error) for c in candidates]) for name, candidates in menu.candidates.items()
    ]


def proposed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sites that are looked at from now on."""
    names: list[str] = []
    plain = module.propose

    def counting(site: module.Site, *rest: object) -> object:
        names.append(site.name)
        return plain(site, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "propose", counting)
    return names


def test_an_interrupted_analysis_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = analyse(job_of(), Cache(None), latency=False)
    kept = Cache(None)
    with pytest.raises(KeyboardInterrupt):
        analyse(job_of(), kept, latency=False, progress=interrupting)
    names = proposed(monkeypatch)
    assert prices(analyse(job_of(), kept, latency=False)) == prices(whole)
    assert names == ["c"]
    analyse(job_of(), kept, latency=False)
    assert names == ["c"]


def test_costs_of_activations_return_as_they_were() -> None:
    job, kept = job_of(), Cache(None)
    assert Findings(job, Allowed(), kept).activations() is None
    Findings(job, Allowed(), kept).put_activations({"x": 0.5, "h": 0.0})
    assert Findings(job, Allowed(), kept).activations() == {"x": 0.5, "h": 0.0}
    assert Findings(job_of(Settings(seed=1)), Allowed(), kept).activations() is None
    assert Findings(job, Allowed(arithmetics=("float",)), kept).activations() is None


def test_findings_return_as_they_were_and_only_to_the_same_question() -> None:
    job, allowed, kept = job_of(), Allowed(), Cache(None)
    proposals = (Proposal(UNCHANGED, 0.0, 0.0), Proposal(Form("lowrank", (8,), "fp16", "contract", "dynamic"), 0.1, 1e-9))
    finding = Finding(proposals, Sensitivity(Curve(((0.01, 1e-15), (0.3, np.inf))), Curve(())))
    Findings(job, allowed, kept).put("a", finding)
    assert Findings(job, allowed, kept).get("a") == finding
    assert Findings(job, allowed, kept).get("b") is None
    others = [
        (job_of(Settings(seed=1)), allowed),
        (job_of(Settings(samples=12)), allowed),
        (job_of(Settings(exclude=("b",))), allowed),
        (open_job(network()[0], {"x": normal(5, 20, 16)}, Settings()), allowed),
        (job, replace(allowed, storages=("fp16",))),
    ]
    assert [Findings(other, forms, kept).get("a") for other, forms in others] == [None] * len(others)
