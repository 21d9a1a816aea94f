"""Presets: joint beats energy where labels prove it, and steps are kept only if the held-out loss does not rise."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from intaglio.passes import presets
from intaglio.passes.budget import Request
from intaglio.passes.cache import Cache
from intaglio.passes.errors import InfeasibleError, InputError, VerificationError
from intaglio.passes.gradients import Gradients
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.options import silent
from intaglio.passes.pipeline import Outcome
from intaglio.passes.plan import Correction, read_plan, to_json
from intaglio.passes.presets import Attempt, Goal, Search, compress, corrected, goal_of, job_with_more_judges
from intaglio.passes.report import report
from intaglio.passes.save import save
from intaglio.passes.task import Change, Standing, stand
from tests.models import classifier
from tests.passes.labelled import HARM, harmed


@pytest.fixture(autouse=True)
def _untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are not timed, which no preset looks at and which takes most of the time."""
    monkeypatch.setattr(Job, "times", lambda *_: False)


def classified(count: int, **settings: Any) -> Job:
    proto, arrays = classifier(count)
    return open_job(proto, arrays, Settings(labels="labels", decompositions=("dense",), storages=("int8", "int4", "int2"), **settings))


@cache
def searched() -> Search:
    """A search whose analysis is done only once."""
    return replace(Search.begin(classified(48), silent), cache=Cache(None))


@cache
def lossless() -> Outcome:
    """The harmed model at a size that holds only the low rank."""
    proto, arrays = harmed()
    settings = Settings(labels="labels", loss="mse", metric="mse", decompositions=("lowrank",), storages=("float",))
    return compress(open_job(proto, arrays, settings), Request(size=0.9, preset="lossless"))


@cache
def compact() -> Outcome:
    return compress(classified(240), Request(drop=2.0))


def test_joint_finds_the_component_that_harms() -> None:
    outcome = lossless()
    assert outcome.task is not None
    plain, joint = outcome.task.steps[:2]
    assert (plain.gradients, joint.gradients) == ("none", "original")
    assert plain.loss.mean > 0 > joint.loss.mean  # energy keeps the harm and drops what is true
    assert joint.kept
    # The original's loss is all of the harm, HARM² a sample over 24 outputs; without it nothing is left but float32.
    job = outcome.job
    before, after = (stand(job, model, job.splits.verify).loss for model in (job.original, outcome.model))
    assert before == pytest.approx(HARM**2 / 24, rel=0.5)  # a mean of 200 squares of normal values is within a tenth, mostly
    assert after < 0.2 * before  # components in the metric of 400 samples are mixed, by about √(24 ∕ 400) between neighbours
    assert outcome.task.loss.mean == pytest.approx(after - before)
    assert outcome.task.metric.mean == pytest.approx(before - after)


def test_the_report_shows_linear_and_quadratic_parts() -> None:
    outcome = lossless()
    facts = report(outcome)
    assert facts.task is not None
    assert facts.task.preset == "lossless"
    assert facts.task.predicted_linear < 0 < facts.task.predicted_quadratic
    assert [site.predicted_linear for site in facts.sites] == pytest.approx([outcome.plan.linear])
    assert facts.task.predicted_linear == pytest.approx(outcome.task.unit_loss * outcome.plan.linear)  # type: ignore[union-attr]
    assert len(facts.task.steps) == len(outcome.task.steps)  # type: ignore[union-attr]


def test_a_joint_plan_survives_its_file(tmp_path: Path) -> None:
    plan = lossless().plan
    path = tmp_path / "plan.json"
    path.write_text(to_json(plan), encoding="utf-8")
    again = read_plan(path)
    assert again.joint
    assert again.menu == plan.menu
    assert again.linear == plan.linear
    assert again.solution is not None
    assert again.solution.objective == pytest.approx(plan.loss_change)


def test_compact_keeps_the_metric_with_fewer_bytes(tmp_path: Path) -> None:
    outcome = compact()
    assert outcome.task is not None
    assert outcome.size_bytes < 0.3 * outcome.job.original.size_bytes
    assert outcome.task.metric.mean >= -2.0
    assert outcome.comparison.candidate_metric is not None
    assert outcome.comparison.reference_metric is not None
    assert outcome.comparison.candidate_metric - outcome.comparison.reference_metric == pytest.approx(outcome.task.metric.mean, abs=1e-4)
    kept = [step for step in outcome.task.steps if step.kept]
    assert kept[-1].size_bytes == outcome.size_bytes  # the smallest that passed is the one that was written
    assert all(step.size_bytes >= outcome.size_bytes for step in kept)
    assert save(outcome.model, tmp_path / "small.onnx", source=None) == outcome.size_bytes


# --- the step rule


def standing(losses: list[float], scores: list[float]) -> Standing:
    return Standing(np.array(losses), np.array(scores), np.arange(len(losses)))


def search_with(original: Standing, metric: str = "accuracy") -> Search:
    """A search that can only judge."""
    job = SimpleNamespace(settings=Settings(metric=metric))
    return Search(cast(Job, job), cast(Any, None), cast(Any, None), 1.0, original, silent)


def judged(losses: list[float], scores: list[float]) -> Attempt:
    return cast(Attempt, SimpleNamespace(standing=standing(losses, scores)))


def test_a_size_passes_by_metric_doubt_and_loss() -> None:
    search = search_with(standing([1.0] * 4, [100.0, 100.0, 100.0, 0.0]))
    assert search.keeps(judged([1.0] * 4, [100.0, 100.0, 100.0, 0.0]), 0.0)  # nothing changed
    assert not search.keeps(judged([1.0] * 4, [100.0, 100.0, 0.0, 0.0]), 0.0)  # one fewer is right
    assert search.keeps(judged([1.0] * 4, [100.0, 100.0, 0.0, 0.0]), 75.0)  # 25 points, with an error of 25
    assert not search.keeps(judged([1.0] * 4, [100.0, 100.0, 0.0, 0.0]), 74.0)
    assert not search.keeps(judged([1.0] * 4, [100.0, 0.0, 100.0, 100.0]), 0.0)  # one for another: no fall, but an error
    assert not search.keeps(judged([2.0] * 4, [100.0, 100.0, 100.0, 0.0]), 0.0)  # every loss rises
    assert search.keeps(judged([1.005] * 4, [100.0, 100.0, 100.0, 0.0]), 0.0)  # but not noticeably
    assert search.keeps(judged([2.0] * 4, [100.0, 100.0, 100.0, 0.0]), 1.0)  # which counts only where nothing may fall
    assert search.keeps(judged([5.0, 0.0, 0.0, 0.0], [100.0, 100.0, 100.0, 0.0]), 0.0)  # a rise that may be chance


def test_a_step_is_kept_only_if_the_held_out_loss_does_not_rise(monkeypatch: pytest.MonkeyPatch) -> None:
    search = searched()
    true = Search.attempt
    taken: list[str] = []

    def worse(self: Search, *arguments: Any) -> Attempt:
        found = true(self, *arguments)
        taken.append(found.gradients)
        return found if found.gradients == "none" else replace(found, standing=replace(found.standing, losses=found.standing.losses + 1))

    monkeypatch.setattr(Search, "attempt", worse)
    outcome = search.lossless(Goal("lossless", 0.3, 0.0))
    assert outcome.task is not None
    assert [step.kept for step in outcome.task.steps] == [True, False, False]
    assert taken == ["none", "original", "previous"]
    assert not outcome.plan.joint


def test_a_metric_that_does_not_hold_is_said_and_nothing_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    search = searched()
    monkeypatch.setattr(presets, "BISECTIONS", 1)
    monkeypatch.setattr(presets, "gain", lambda *_: Change(-3.0, 0.5, 12))
    monkeypatch.setattr(Search, "keeps", lambda *_: True)
    said = r"accuracy is 3\.00 ± 0\.50 points worse on 12 samples, over --drop 1; nearest: --drop 3\.01"
    with pytest.raises(VerificationError, match=said):
        search.compact(Goal("compact", None, 1.0))


def test_no_smaller_model_is_infeasible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Search, "keeps", lambda *_: False)
    monkeypatch.setattr(presets, "BISECTIONS", 1)
    with pytest.raises(InfeasibleError, match="no smaller model keeps the metric to within 0 points"):
        compress(classified(48), Request(drop=0.0))


def test_without_gradients_the_reason_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    declined = {"c1": "because"}
    monkeypatch.setattr(presets, "measure_gradients", lambda *_: Gradients({}, declined))
    monkeypatch.setattr(presets, "BISECTIONS", 2)
    outcome = compress(classified(48), Request(drop=20.0))
    assert outcome.task is not None
    assert outcome.task.declined == declined
    assert outcome.plan.linear == 0.0


@pytest.mark.parametrize(("measured", "expected"), [(0.04, 4.0), (0.02, 2.0), (0.001, 1.0), (float("inf"), 2e6)])
def test_corrections_only_raise_divergences(measured: float, expected: float) -> None:
    plan = SimpleNamespace(divergence=0.02, correction=Correction(divergence=2.0))
    assert corrected(cast(Attempt, SimpleNamespace(plan=plan, divergence=measured))).divergence == pytest.approx(expected)


# --- goals and splits


def test_goals() -> None:
    assert goal_of(Request(size=0.5)) is None
    assert goal_of(Request(drop="0.5")) == Goal("compact", None, 0.5)
    assert goal_of(Request(preset="compact")) == Goal("compact", None, 0.0)
    assert goal_of(Request(preset="lossless", size="25%")) == Goal("lossless", "25%", 0.0)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request(preset="tiny"), "--preset tiny: unknown; expected lossless or compact"),
        (Request(preset="lossless"), "it needs a size"),
        (Request(preset="lossless", size=0.5, drop=1), "it belongs to --preset compact"),
        (Request(preset="compact", size=0.5), "leave --size out"),
        (Request(drop=1, latency=0.5), "does not go with --latency"),
        (Request(drop=-1), "--drop -1: expected points"),
        (Request(drop="few"), "--drop few: expected points"),
        (Request(drop="nan"), "--drop nan: expected points"),
    ],
)
def test_goals_that_make_no_sense(request_: Request, said: str) -> None:
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        goal_of(request_)


def test_samples_that_are_left_over_judge() -> None:
    job = classified(48, samples=16)
    more = job_with_more_judges(job)
    assert more.splits.fit.tolist() == job.splits.fit.tolist()
    assert set(job.splits.choose) <= set(more.splits.choose)
    assert set(job.splits.verify) <= set(more.splits.verify)
    parts = (more.splits.fit, more.splits.choose, more.splits.verify)
    assert sorted(np.concatenate(parts).tolist()) == list(range(48))
    assert job_with_more_judges(more).splits.choose.tolist() == more.splits.choose.tolist()
