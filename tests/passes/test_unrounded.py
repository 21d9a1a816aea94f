"""What forms leave out is taught in floats first, then rounded, and kept only if the written model is better for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pytest

from intaglio.ops.form import CARRIED, PRUNED, UNCHANGED, Form
from intaglio.passes import search, unrounded
from intaglio.passes.budget import Request
from intaglio.passes.build import fit_forms
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.options import silent
from intaglio.passes.pipeline import Outcome, compress_job
from intaglio.passes.report import report
from intaglio.passes.rewrite import declines
from intaglio.passes.tune import TuneResult
from intaglio.passes.tuning import _GENTLE_RATES
from intaglio.passes.unrounded import UNROUNDED_SHARE, leaves_out, taught_unrounded
from intaglio.passes.verify import compare
from tests.models import classifier

T = TypeVar("T")

STEPS = 150
SIZE = 0.2
LOW = Form("lowrank", (4,), "int4", "contract")

LAST_BITS = 1e-5
"""How far divergences of equal models may be apart: sums of floats depend on where arrays lie in memory, and on who shares the cores."""


@pytest.fixture(autouse=True)
def _untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are not timed, which takes most of the time."""
    monkeypatch.setattr(Job, "times", lambda *_: False)


def job_of(**changes: object) -> Job:
    settings = Settings(storages=("int4", "float"), decompositions=("lowrank",), tune=STEPS)
    return open_job(*classifier(400), replace(settings, **changes))  # type: ignore[arg-type]


def compressed(**changes: object) -> Outcome:
    return compress_job(job_of(**changes), Request(size=SIZE))


def low(job: Job) -> dict[str, Form]:
    return {
        site.name: LOW if declines(site, LOW) is None and min(site.use.view.m, site.use.view.n) > 8 else UNCHANGED for site in job.sites
    }


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (Form("lowrank", (4,), "int4", "contract", "integer"), Form("lowrank", (4,), "float", "contract")),
        (Form("tucker2", (8, 4), "planes3.0", "contract"), Form("tucker2", (8, 4), "float", "contract")),
        (Form(PRUNED, (8, 4), "int4", "contract", "integer"), Form(PRUNED, (8, 4), "float", "contract")),
        (Form("dense", (), "nbits4-b32", "dense", "nbits"), Form("dense", (), "float")),
        (Form("residual", (4,), "int3"), Form("dense", (), "float")),
        (CARRIED, UNCHANGED),
        (UNCHANGED, UNCHANGED),
    ],
)
def test_forms_in_floats(form: Form, expected: Form) -> None:
    assert unrounded.unrounded({"w": form}) == {"w": expected}
    assert leaves_out(form) == (form.decomposition in ("lowrank", "tucker2", PRUNED))


def test_a_low_rank_learns_more_in_floats_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same steps, forms and bytes; and the report says what was done where."""
    outcome = compressed()
    found = outcome.tuning
    assert found is not None
    assert found.unrounded is not None
    assert found.unrounded.improved
    assert found.unrounded.steps + len(found.unrounded.blocks) >= STEPS * UNROUNDED_SHARE * 2 / 3
    assert found.unrounded.after < 0.9 * found.unrounded.before
    assert (found.steps, found.blocks) == (round(STEPS * (1 - UNROUNDED_SHARE)), ())  # the whole model, gently
    assert found.rate in _GENTLE_RATES
    facts = report(outcome).tuning
    assert facts is not None
    assert facts.unrounded is not None
    assert facts.unrounded.after == found.unrounded.after
    monkeypatch.setattr(search, "taught_unrounded", lambda *_: None)
    plain = compressed()
    assert plain.tuning is not None
    assert plain.tuning.unrounded is None
    assert outcome.plan.forms == plain.plan.forms
    assert outcome.size_bytes == plain.size_bytes == outcome.predicted_bytes
    assert outcome.choose_divergence < plain.choose_divergence


@pytest.mark.parametrize(
    ("changes", "form"),
    [({}, Form("dense", (), "int4")), ({"tune": 99}, LOW), ({"tune": None}, LOW)],
    ids=["nothing is left out", "few steps", "no tuning"],
)
def test_where_it_must_not_fire(changes: dict[str, object], form: Form) -> None:
    job = job_of(**changes)
    forms = {name: form if each == LOW else each for name, each in low(job).items()}
    assert taught_unrounded(job, forms, silent) is None


def test_what_was_learnt_is_in_the_jobs_model_and_the_original_still_judges() -> None:
    job = job_of()
    learnt = taught_unrounded(job, low(job), silent)
    assert learnt is not None
    assert learnt.job.reference is job.model
    assert learnt.job.lineage
    found = compare(learnt.job.reference, learnt.job.model, job.data, job.splits.choose, job.calibration).divergence
    assert 0 < found < learnt.result.before
    for site in learnt.job.sites:
        if low(job)[site.name] == LOW:
            assert np.linalg.matrix_rank(site.matrix(site.value(learnt.job.model))[0], tol=1e-4) <= 4


def test_it_is_dropped_where_the_written_model_is_no_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it had learnt nonsense."""

    def nonsense(job: Job, forms: dict[str, Form], *_: object) -> unrounded.Unrounded:
        fitted = fit_forms(job, {name: replace(form, ranks=(1,)) if form.ranks else form for name, form in forms.items()}, keep=True)
        spoilt = unrounded.continued(job, {name: replace(form, ranks=(1,)) if form.ranks else form for name, form in forms.items()}, fitted)
        return unrounded.Unrounded(spoilt, TuneResult(fitted, True, 1.0, 0.5, (), 5, 1e-3, 1.0))

    monkeypatch.setattr(search, "taught_unrounded", nonsense)
    found = compressed()
    assert found.tuning is not None
    assert found.tuning.unrounded is not None
    assert not found.tuning.unrounded.improved
    assert found.tuning.steps == STEPS - STEPS // 3  # all of them, less those of blocks
    assert found.tuning.rate not in _GENTLE_RATES[:1]
    monkeypatch.setattr(search, "taught_unrounded", lambda *_: None)
    assert found.choose_divergence <= (1 + LAST_BITS) * compressed(tune=None).choose_divergence


class Once:
    """Progress that the user stops, once: at an item of the given number of the first loop of that name."""

    def __init__(self, what: str, after: int) -> None:
        self.what, self.after, self.done = what, after, False

    def __call__(self, items: Iterable[T], what: str, count: int) -> Iterator[T]:
        for number, item in enumerate(items):
            if what == self.what and number == self.after and not self.done:
                self.done = True
                raise KeyboardInterrupt
            yield item


@pytest.mark.parametrize(("what", "after"), [("Tuning", 30), ("Tuning", 0), ("Trying rates", 1), ("Tuning blocks", 1)])
def test_an_interrupt_ends_tuning_with_what_there_is(what: str, after: int) -> None:
    """One, wherever it comes: no loop goes on as if nothing had happened."""
    stopper = Once(what, after)
    outcome = compress_job(job_of(), Request(size=SIZE), progress=stopper)
    assert stopper.done
    assert outcome.tuning is not None
    assert outcome.tuning.interrupted
    assert outcome.tuning.steps == 0
    assert outcome.size_bytes <= SIZE * outcome.job.original.size_bytes
    assert outcome.choose_divergence <= (1 + LAST_BITS) * compressed(tune=None).choose_divergence


def test_an_interrupt_while_it_is_rounded_keeps_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "_rounded", stopped)
    outcome = compressed()
    assert outcome.tuning is not None
    assert outcome.tuning.interrupted
    assert not outcome.tuning.improved
    assert outcome.choose_divergence == pytest.approx(compressed(tune=None).choose_divergence, rel=LAST_BITS)
