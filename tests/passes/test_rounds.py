"""Rounds: budgets are approached in equal ratios, every round starts from what the last one left, and the original judges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from intaglio.passes import rounds
from intaglio.passes.budget import Request
from intaglio.passes.cache import Cache
from intaglio.passes.errors import InfeasibleError, InputError
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.pipeline import Outcome, compress_job
from intaglio.passes.plan import read_plan, to_json
from intaglio.passes.replan import replan
from intaglio.passes.report import report
from intaglio.passes.rounds import MOST, approached, asked_rounds
from intaglio.passes.verify import compare
from tests.models import classifier, run

SIZE = 0.08


def job_of(**changes: object) -> Job:
    settings = Settings(storages=("int2", "int4", "float"), decompositions=("dense", "lowrank"), tune=40)
    return open_job(*classifier(400), replace(settings, **changes))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are not timed, which takes most of the time."""
    monkeypatch.setattr(Job, "times", lambda *_: False)


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "times", lambda *_: False)
        return compress_job(job_of(rounds=2), Request(size=SIZE))


@pytest.mark.parametrize(("given", "rounds"), [(None, None), (1, None), ("1", None), ("3", 3), (2, 2), ("auto", "auto")])
def test_what_the_option_says(given: object, rounds: object) -> None:
    assert asked_rounds(given, Request(size=0.1), 10) == rounds  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "request_", "tune", "what"),
    [
        ("many", Request(size=0.1), 10, "expected a number from 1, or auto"),
        (0, Request(size=0.1), 10, "expected a number from 1, or auto"),
        (2, Request(error=0.1), 10, "give --size or --latency"),
        (2, Request(size=0.1), None, "give --tune"),
        (2, Request(drop=1.0, latency=0.5), 10, "presets"),
    ],
)
def test_what_the_option_cannot_say(given: object, request_: Request, tune: int | None, what: str) -> None:
    with pytest.raises(InputError, match=what):
        asked_rounds(given, request_, tune)  # type: ignore[arg-type]


def test_the_budget_holds_and_the_original_judges(outcome: Outcome) -> None:
    job = outcome.job
    assert outcome.size_bytes <= SIZE * job.original.size_bytes
    assert job.teacher is not None
    assert job.lineage
    x = {"x": job.data.first(20)["x"]}
    np.testing.assert_allclose(run(job.reference.proto, x)[0], run(job.original.proto, x)[0], atol=1e-4)
    measured = compare(job.original, outcome.model, job.data, job.splits.choose, job.calibration).divergence
    assert outcome.choose_divergence == pytest.approx(measured)


def test_a_round_goes_part_of_the_way(outcome: Outcome) -> None:
    (only,) = outcome.rounds
    assert only.budget.size_bytes == pytest.approx(SIZE**0.5 * outcome.job.original.size_bytes, rel=0.02)  # simplified, it is a bit smaller
    assert only.size_bytes <= only.budget.size_bytes
    assert only.tuned <= only.divergence
    facts = report(outcome).rounds
    assert [(each.size_bytes, each.before, each.after) for each in facts] == [(only.size_bytes, only.divergence, only.tuned)]


def test_the_next_round_starts_from_what_was_learnt(outcome: Outcome) -> None:
    """Not from the original: the model that it cut is as far from the original as the round before left it."""
    (only,) = outcome.rounds
    job = outcome.job
    again = compare(job.original, job.model, job.data, job.splits.choose, job.calibration).divergence
    assert again == pytest.approx(only.tuned, rel=1e-3)
    assert again > 0


def test_it_is_deterministic(outcome: Outcome) -> None:
    assert compress_job(job_of(rounds=2), Request(size=SIZE)).model.proto == outcome.model.proto


@pytest.mark.parametrize(("size", "count"), [(0.5, 1), (0.1, 2), (0.02, 3), (1e-6, MOST)])
def test_auto_takes_as_many_rounds_as_the_way_is_long(size: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def infeasible(_: object, __: object, budget: object, *___: object) -> object:
        seen.append(budget)
        raise InfeasibleError("not this time")

    monkeypatch.setattr(rounds, "searched", infeasible)
    job = job_of(rounds="auto")
    unchanged, done = approached(job, Request(size=size), Cache(None), timed=False)
    assert (unchanged, done) == (job, ())
    assert len(seen) == (count > 1)
    if seen:
        assert seen[0].size_bytes == pytest.approx(size ** (1 / count) * job.original.size_bytes, rel=0.02)


def test_an_interrupt_ends_the_rounds_and_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    taught = rounds.taught

    def interrupted(*given: object) -> object:
        better, result = taught(*given)  # type: ignore[arg-type]
        assert result is not None
        return better, replace(result, interrupted=True)

    monkeypatch.setattr(rounds, "taught", interrupted)
    job, done = approached(job_of(rounds=3, tune=5), Request(size=0.1), Cache(None), timed=False)
    assert len(done) == 1
    assert done[0].interrupted
    assert job.settings.tune is None


def test_a_plan_of_rounds_prices_other_weights(outcome: Outcome, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(to_json(outcome.plan), encoding="utf-8")
    assert read_plan(path).menu == outcome.plan.menu
    with pytest.raises(InputError, match="made in rounds"):
        replan(classifier(400)[0], read_plan(path), Request(size=0.5))
