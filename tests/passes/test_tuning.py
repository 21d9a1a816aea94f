"""Tuning as a part of compression: on which samples, kept only if it helps, and told in the report."""

from __future__ import annotations

from dataclasses import astuple, replace

import numpy as np
import pytest

from intaglio.passes import pipeline
from intaglio.passes.analyse import analyse
from intaglio.passes.budget import Request
from intaglio.passes.build import Fitted
from intaglio.passes.cache import Cache
from intaglio.passes.errors import InfeasibleError, InputError
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.pipeline import Outcome, compress_job, solve_and_build
from intaglio.passes.report import report
from intaglio.passes.search import Attempt
from intaglio.passes.tune import TuneResult
from intaglio.passes.tuning import asked_steps, lessons_of
from tests.models import classifier

STORAGES = ("int2", "int3", "int4", "float")


def job_of(**changes: object) -> Job:
    proto, data = classifier(400)
    return open_job(proto, data, replace(Settings(storages=STORAGES, decompositions=("dense",)), **changes))  # type: ignore[arg-type]


def compressed(**changes: object) -> Outcome:
    return compress_job(job_of(**changes), Request(size=0.09))


@pytest.mark.parametrize(("given", "steps"), [(None, None), (0, None), ("0", None), ("12", 12), (7, 7), ("auto", "auto")])
def test_what_the_option_says(given: object, steps: object) -> None:
    assert asked_steps(given) == steps  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["many", -1, "1.5"])
def test_what_the_option_cannot_say(given: object) -> None:
    with pytest.raises(InputError, match="expected a number of steps, or auto"):
        asked_steps(given)  # type: ignore[arg-type]


def test_samples_that_are_left_over_are_lessons_and_a_tenth_of_them_judges() -> None:
    job = job_of(samples=100)
    taught = lessons_of(job)
    assert (len(taught.splits.choose), len(taught.splits.fit)) == (len(job.splits.choose) + 30, len(job.splits.fit) + 270)
    parts = [set(part.tolist()) for part in (taught.splits.fit, taught.splits.choose, taught.splits.verify)]
    assert set.union(*parts) == set(range(400))
    assert sum(map(len, parts)) == 400
    assert set(job.splits.choose) <= parts[1]
    assert parts[2] == set(job.splits.verify.tolist())


def test_without_a_limit_all_samples_serve_as_before() -> None:
    job = job_of()
    assert all(np.array_equal(*pair) for pair in zip(astuple(lessons_of(job).splits), astuple(job.splits), strict=True))


def test_a_tuned_model_is_no_larger_and_nearer_to_the_original() -> None:
    plain, tuned = compressed(), compressed(tune=60)
    assert tuned.tuning is not None
    assert tuned.tuning.improved
    assert tuned.size_bytes == plain.size_bytes
    assert tuned.plan.forms == plain.plan.forms
    assert tuned.choose_divergence < 0.9 * plain.choose_divergence
    facts = report(tuned).tuning
    assert facts is not None
    assert facts.improved
    assert facts.steps == 40  # a third of them went to the blocks
    assert facts.blocks
    assert facts.history[0] == (0, None, facts.before)
    assert report(plain).tuning is None


def test_a_written_model_that_is_no_better_is_written_untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The student improved, as it says, but the model that was made of it did not."""

    def boasting(_: Job, __: object, fitted: Fitted, **___: object) -> TuneResult:
        return TuneResult(fitted, True, 1.0, 0.5, (), 5, 1e-3, 1.0)

    monkeypatch.setattr("intaglio.passes.tuning.tune", boasting)
    plain, spoilt = compressed(), compressed(tune=5)
    assert spoilt.tuning is not None
    assert (spoilt.tuning.improved, spoilt.tuning.after) == (False, spoilt.tuning.before)
    assert spoilt.choose_divergence == plain.choose_divergence
    assert spoilt.model.proto == plain.model.proto


def test_a_later_round_that_is_infeasible_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency is measured anew in every round, and may come out above its budget."""
    searched, rounds = pipeline.searched, []

    def once(*given: object) -> object:
        rounds.append(1)
        if len(rounds) > 1:
            raise InfeasibleError("no plan keeps the budgets as measured")
        return searched(*given)  # type: ignore[arg-type]

    def halved(_: object, attempt: Attempt, __: object) -> tuple[Attempt, TuneResult]:
        result = TuneResult(attempt.fitted, True, attempt.measured, attempt.measured / 2, (), 5, 1e-3, 1.0)
        return replace(attempt, measured=attempt.measured / 2), result

    job = job_of(tune=60)
    menu = analyse(job, Cache(None), latency=False)
    monkeypatch.setattr(pipeline, "searched", once)
    monkeypatch.setattr(pipeline, "taught", halved)  # so a second round is worth it
    outcome = solve_and_build(job, menu, Request(error=0.2))
    assert len(rounds) == 2
    assert outcome.meets
    assert outcome.tuning is not None


def test_an_error_budget_buys_a_smaller_model_with_tuning() -> None:
    job = job_of()
    menu = analyse(job, Cache(None), latency=False)
    plain = solve_and_build(job, menu, Request(error=0.02))
    tuned = solve_and_build(replace(job, settings=replace(job.settings, tune=60)), menu, Request(error=0.02))
    assert tuned.comparison.divergence <= 0.02
    assert tuned.size_bytes <= plain.size_bytes
