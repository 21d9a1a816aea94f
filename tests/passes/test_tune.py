"""Tuning lowers the divergence of a coarse model, never raises it, costs no byte, and goes on bit by bit where it was stopped."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intaglio.ops.form import CARRIED, UNCHANGED, Form
from intaglio.passes import adam, course
from intaglio.passes import tune as module
from intaglio.passes.blockwise import BlockPoint, Blockwise
from intaglio.passes.build import Fitted, finish, fit_forms
from intaglio.passes.checkpoint import Checkpoint
from intaglio.passes.course import Course
from intaglio.passes.errors import InputError
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.learner import Learner
from intaglio.passes.options import silent
from intaglio.passes.save import serialized_size
from intaglio.passes.student import Student, make_student
from intaglio.passes.tune import Point, TuneResult, tune
from intaglio.passes.verify import compare
from tests.models import normal, parse
from tests.passes.students import COARSE, OPTIONS, Stopper, assert_same, course_of, fitted, job, plan


@cache
def tuned() -> TuneResult:
    return tune(job(), plan(COARSE), fitted(), steps=60, options=OPTIONS)


def divergence(what: Fitted, forms: dict[str, Form], opened: Job | None = None) -> float:
    opened = opened or job()
    model = finish(opened, forms, what)
    return compare(opened.original, model, opened.data, opened.splits.choose, opened.calibration).divergence


def test_the_written_model_diverges_less_at_the_same_size_on_samples_that_were_not_trained_on() -> None:
    result, forms = tuned(), plan(COARSE)
    assert result.improved
    assert result.after < 0.8 * result.before  # three bits leave much to gain: a gradient of the wrong sign or size gains nothing
    before, after = divergence(fitted(), forms), divergence(result.fitted, forms)
    # What was measured on the student is what the written model does, to float32 sums in another order
    np.testing.assert_allclose((result.before, result.after), (before, after), rtol=1e-3)
    assert serialized_size(finish(job(), forms, result.fitted)) == serialized_size(finish(job(), forms, fitted()))


def test_the_history_says_what_happened() -> None:
    result = tuned()
    assert [point.step for point in result.history] == [0, 12, 24, 36, 48, 60]
    assert result.before == result.history[0].divergence
    assert result.after == min(point.divergence for point in result.history)
    assert (result.steps, result.rate, result.interrupted, dict(result.skipped)) == (60, 1e-2, False, {})
    assert result.steps_per_s > 0


def test_what_makes_nothing_better_is_not_taken() -> None:
    """A step of a thousand times each array's size."""
    result = tune(job(), plan(COARSE), fitted(), steps=4, options=replace(OPTIONS, rate=1e3))
    assert not result.improved
    assert result.fitted is fitted()
    assert result.after == result.before


def test_the_same_seed_gives_the_same_result() -> None:
    assert_same(tune(job(), plan(COARSE), fitted(), steps=60, options=OPTIONS), tuned())


@pytest.mark.parametrize("after", [0, 13])
def test_an_interrupted_run_keeps_its_best_and_goes_on_bit_by_bit(after: int, tmp_path: Path) -> None:
    cached = replace(job(), settings=replace(job().settings, cache=tmp_path))
    stopped = tune(cached, plan(COARSE), fitted(), steps=60, options=OPTIONS, progress=Stopper(after))
    assert (stopped.interrupted, stopped.steps) == (True, after)
    assert stopped.improved == any(point.divergence < stopped.before for point in stopped.history)
    resumed = tune(cached, plan(COARSE), fitted(), steps=60, options=OPTIONS)
    assert not resumed.interrupted
    assert_same(resumed, tuned())
    assert not list(tmp_path.iterdir())  # a run that came to its end leaves nothing to go on from


def test_floats_go_on_in_the_bases_that_they_had(tmp_path: Path) -> None:
    low = Form("lowrank", (4,), "float", "contract")
    cached = replace(job(), settings=replace(job().settings, cache=tmp_path))
    whole = tune(job(), plan(low), fitted(low), steps=60, options=OPTIONS)
    assert whole.improved
    assert tune(cached, plan(low), fitted(low), steps=60, options=OPTIONS, progress=Stopper(27)).steps == 27
    (path,) = tmp_path.iterdir()
    with np.load(path) as stored:
        assert len(stored["adam.vectors"]) > 0
    assert_same(tune(cached, plan(low), fitted(low), steps=60, options=OPTIONS), whole)


@pytest.mark.parametrize(("steps", "expected"), [(100, 1e-4), (200, 1e-3)], ids=["short", "long"])
def test_long_runs_make_good_what_a_rate_loses_at_first(steps: int, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials take 12 and 13 steps here."""
    opened = course_of(options=replace(OPTIONS, rates=(1e-4, 1e-3, 1e-2)))
    run = module._Run(opened, steps, None)
    run.history.append(Point(0, 0.5, 1.0, 0.0))
    after = iter((1.05, 1.25, 1.4))
    monkeypatch.setattr(opened, "learn", lambda _: 0.5)
    monkeypatch.setattr(opened, "divergence", lambda: next(after))
    assert run._best_rate(silent) == expected


def test_a_gentle_run_takes_the_rate_that_is_best_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = course_of(options=replace(OPTIONS, rates=(1e-5, 1e-4, 1e-3, 1e-2), bold=False))
    run = module._Run(opened, 200, None)
    run.history.append(Point(0, 0.5, 1.0, 0.0))
    after = iter((0.99, 0.95, 0.97, float("nan")))
    monkeypatch.setattr(opened, "learn", lambda _: 0.5)
    monkeypatch.setattr(opened, "divergence", lambda: next(after))
    assert run._best_rate(silent) == 1e-4


def test_the_best_of_several_rates_is_found_and_leaves_no_trace() -> None:
    options = replace(OPTIONS, rates=(1e-9, 1e-2, 1e3), rate=None)
    result = tune(job(), plan(COARSE), fitted(), steps=60, options=options)
    assert result.rate == 1e-2
    assert_same(result, tuned())


def test_patience_ends_a_run_that_gets_no_better() -> None:
    result = tune(job(), plan(COARSE), fitted(), steps=50, options=replace(OPTIONS, rate=1e3, evaluations=50, patience=3))
    assert result.steps == 3


@pytest.mark.parametrize(
    "form",
    [
        Form("lowrank", (6,), "int4", "contract"),
        Form("dense", (), "planes2.5"),
        Form("dense", (), "vq4x4"),
        Form("dense", (), "kmeans3"),
        Form("separable", (3,), "float", "contract"),
    ],
    ids=str,
)
def test_every_kind_of_array_learns(form: Form) -> None:
    result = tune(job(), plan(form), fitted(form), steps=60, options=replace(OPTIONS, constants=False, rate=3e-3))
    assert result.after < 0.95 * result.before
    assert divergence(result.fitted, plan(form)) < 0.95 * divergence(fitted(form), plan(form))


def test_a_model_in_integers_learns_about_its_rounded_activations() -> None:
    form = Form("dense", (), "int3", "dense", "integer")
    forms = plan(form) | {carrier.name: CARRIED for carrier in job().carriers}
    start = fit_forms(job(), forms, keep=True)
    result = tune(job(), forms, start, steps=40, options=OPTIONS)
    assert result.improved
    assert divergence(result.fitted, forms) < 0.7 * divergence(start, forms)


def test_outputs_that_are_values_are_matched_by_their_squares() -> None:
    text = "g (float[N, S, 16] x) => (float[N, S, 16] y) { h = MatMul (x, w) r = Relu (h) y = MatMul (r, v) }"
    proto = parse(text, {"w": normal(1, 16, 24), "v": normal(2, 24, 16)})
    opened = open_job(proto, {"x": normal(3, 100, 5, 16) * 8}, Settings())
    forms = plan(Form("lowrank", (6,), "int8", "contract"), opened)
    result = tune(opened, forms, fit_forms(opened, forms, keep=True), steps=60, options=OPTIONS)
    assert result.after < 0.95 * result.before


def test_bad_requests_are_refused_with_a_remedy() -> None:
    for steps, options, message in ((0, OPTIONS, "0 steps"), (1, replace(OPTIONS, augmentations=("spin",)), "'spin' is unknown")):
        with pytest.raises(InputError, match=message):
            tune(job(), plan(COARSE), fitted(), steps=steps, options=options)


UNTAUGHT = {
    "g (float[N, 16] x) => (float[N, 24] y) { h = MatMul (x, w) s = Sign (h) y = Mul (s, s) }": "no gradient reaches any parameter",
    "g (float[N, 16] x) => (int64[N, 24] y) { h = MatMul (x, w) y = Cast <to = 7> (h) }": "no output of the model holds floats",
}


@pytest.mark.parametrize("text", UNTAUGHT)
def test_what_cannot_be_taught_stays_as_it_is_and_says_why(text: str) -> None:
    opened = open_job(parse(text, {"w": normal(1, 16, 24)}), {"x": normal(3, 40, 16)}, Settings())
    forms = plan(COARSE, opened)
    start = fit_forms(opened, forms, keep=True)
    result = tune(opened, forms, start, steps=1, options=OPTIONS)
    assert UNTAUGHT[text] in str(result.reason)
    assert (result.improved, result.steps, result.history, result.fitted) == (False, 0, (), start)


def test_a_plan_with_nothing_to_tune_says_so() -> None:
    forms = dict.fromkeys(plan(COARSE), UNCHANGED)
    result = tune(job(), forms, fit_forms(job(), forms, keep=True), steps=1, options=replace(OPTIONS, constants=False))
    assert (result.improved, result.reason) == (False, "the plan leaves nothing to be tuned")


def test_a_runtime_that_gives_up_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for want of memory in the midst of a run."""
    learn = Learner.learn

    def failing(learner: Learner, feeds: Any) -> float:
        if learner.steps_left == 0:  # type: ignore[attr-defined]
            raise InputError("model 'net' fails when run: out of memory")
        learner.steps_left -= 1  # type: ignore[attr-defined]
        return learn(learner, feeds)

    monkeypatch.setattr(Learner, "steps_left", 30, raising=False)
    monkeypatch.setattr(Learner, "learn", failing)
    result = tune(job(), plan(COARSE), fitted(), steps=60, options=OPTIONS)
    assert (result.steps, result.interrupted) == (30, False)
    assert "out of memory" in str(result.reason)
    assert [point.divergence for point in result.history] == [point.divergence for point in tuned().history[:3]]


# --- checkpoints that do not fit, interrupts between a step and its measurement


def test_a_run_that_was_stopped_while_it_measured_makes_up_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last measurement, after which no step is left."""
    cached = replace(job(), settings=replace(job().settings, cache=tmp_path))
    measure, calls = Course.divergence, []

    def stopping(course: Course) -> float:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return measure(course)

    with monkeypatch.context() as patch:
        patch.setattr(Course, "divergence", stopping)
        stopped = tune(cached, plan(COARSE), fitted(), steps=60, options=OPTIONS)
    assert (stopped.interrupted, stopped.steps, stopped.history[-1].step) == (True, 60, 48)
    assert_same(tune(cached, plan(COARSE), fitted(), steps=60, options=OPTIONS), tuned())


@pytest.mark.parametrize("change", ["missing", "no bases", "longer", "strings", "empty history"])
def test_a_checkpoint_of_another_version_is_not_used(change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cached = replace(job(), settings=replace(job().settings, cache=tmp_path))
    tune(cached, plan(COARSE), fitted(), steps=60, options=OPTIONS, progress=Stopper(13))
    (path,) = tmp_path.iterdir()
    with np.load(path) as stored:
        state = dict(stored)
    if change == "missing":
        del state["adam.mean"]
    elif change == "no bases":
        del state["adam.moments"], state["adam.vectors"]
    elif change == "longer":
        state["best"] = np.append(state["best"], np.float32(0))
    elif change == "strings":
        state["rate"] = np.asarray("fast")
    else:
        state["history"] = np.zeros((0, 4))
    np.savez(path, **state)
    assert_same(tune(cached, plan(COARSE), fitted(), steps=60, options=OPTIONS), tuned())
    assert "state of another run" in caplog.text


def test_a_run_with_other_parameters_does_not_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    cached = replace(job(), settings=replace(job().settings, cache=tmp_path))
    frozen = replace(OPTIONS, scales=False)
    tune(cached, plan(COARSE), fitted(), steps=60, options=frozen, progress=Stopper(20))
    assert list(tmp_path.glob("tune-*.npz"))
    assert_same(tune(cached, plan(COARSE), fitted(), steps=60, options=OPTIONS), tuned())


def test_scales_are_learnt_and_written() -> None:
    """And only where that is asked for."""
    alone = replace(OPTIONS, constants=False)
    result = tune(job(), plan(COARSE), fitted(), steps=40, options=alone)
    assert result.improved
    before, after = ({name: arrays[0][1].astype(np.float32) for name, arrays in what.packed.items()} for what in (fitted(), result.fitted))
    assert all((before[name] != after[name]).any() for name in before)
    stayed = tune(job(), plan(COARSE), fitted(), steps=40, options=replace(alone, scales=False)).fitted.packed
    for name, scale in before.items():
        np.testing.assert_array_equal(stayed[name][0][1].astype(np.float32), scale)


def test_other_labels_do_not_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    """The data's digest leaves labels out."""
    cached = replace(job(), settings=replace(job().settings, cache=tmp_path))
    other = replace(cached, data=replace(cached.data, label_values=cached.data.label_values[::-1]))  # type: ignore[index]
    for opened in (cached, other):
        tune(opened, plan(COARSE), fitted(), steps=2, options=replace(OPTIONS, labels=0.5), progress=Stopper(1))
    assert len(list(tmp_path.iterdir())) == 2


def test_steps_without_a_finite_gradient_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam leaves them out; a run that goes on must not make them again."""
    cached = replace(job(), settings=replace(job().settings, cache=tmp_path))
    learn = Course.learn

    def broken(course: Course, step: int) -> float:
        loss = learn(course, step)
        if step % 2:
            course.gradient[0] = np.nan
        return loss

    monkeypatch.setattr(Course, "learn", broken)
    whole = tune(job(), plan(COARSE), fitted(), steps=12, options=OPTIONS)
    tune(cached, plan(COARSE), fitted(), steps=12, options=OPTIONS, progress=Stopper(5))
    resumed = tune(cached, plan(COARSE), fitted(), steps=12, options=OPTIONS)
    assert (whole.steps, resumed.steps) == (12, 12)
    assert_same(resumed, whole)


# --- Ctrl-C at any time


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where tests run in the background and it would be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupting(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """The function, in the midst of one call of which Ctrl-C is pressed."""
    calls = []

    def interrupted(*given: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return function(*given, **options)

    return interrupted


PLACES = {
    "a student that is built": (module, "make_student", 1),
    "a model that is differentiated": (course, "slope_of", 1),
    "the first measurement": (Course, "divergence", 1),
    "a step's gradient": (Learner, "_collect", 20),
    "a step's average of gradients": (adam, "_average", 40),
    "a step's average of squares": (adam, "_average", 41),
    "a later measurement": (Course, "divergence", 3),
    "a result that is kept": (module._Run, "_consider", 2),
    "a checkpoint": (Checkpoint, "save", 7),
    "the result": (Student, "taught", 1),
}


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("place", PLACES)
def test_an_interrupt_loses_nothing_wherever_it_comes(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = replace(job(), settings=replace(job().settings, cache=tmp_path))
    options = replace(OPTIONS, save_s=0)
    owner, name, call = PLACES[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupting(getattr(owner, name), call))
        stopped = tune(cached, plan(COARSE), fitted(), steps=60, options=options)
    assert stopped.interrupted
    best = min((point.divergence for point in stopped.history), default=np.nan)
    np.testing.assert_array_equal(stopped.after, best)
    resumed = tune(cached, plan(COARSE), fitted(), steps=60, options=options)
    assert_same(resumed, tuned())


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("call", [2, 9, 30])
def test_an_interrupt_between_rates_puts_everything_back(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = replace(job(), settings=replace(job().settings, cache=tmp_path))
    options = replace(OPTIONS, rates=(1e-9, 1e-2, 1e3), rate=None)
    with monkeypatch.context() as patch:
        patch.setattr(adam, "_average", interrupting(adam._average, call))
        stopped = tune(cached, plan(COARSE), fitted(), steps=60, options=options)
    assert (stopped.interrupted, stopped.steps) == (True, 0)
    assert stopped.improved == (stopped.after < stopped.before)
    assert_same(tune(cached, plan(COARSE), fitted(), steps=60, options=options), tuned())


@pytest.mark.usefixtures("interruptible")
def test_blocks_are_taught_first_and_go_on_where_they_were_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = replace(job(), settings=replace(job().settings, cache=tmp_path))
    options = replace(OPTIONS, block_steps=100, block_rate=3e-3)
    whole = tune(job(), plan(COARSE), fitted(), steps=20, options=options)
    assert len(whole.blocks) == 5
    assert all(point.after <= point.before for point in whole.blocks)
    assert [point.step for point in whole.history[:3]] == [0, 0, 4]
    with monkeypatch.context() as patch:
        patch.setattr(adam, "_average", interrupting(adam._average, 2 * 350))
        stopped = tune(cached, plan(COARSE), fitted(), steps=20, options=options)
    assert (stopped.interrupted, len(stopped.blocks)) == (True, 3)
    resumed = tune(cached, plan(COARSE), fitted(), steps=20, options=options)
    assert resumed.blocks == whole.blocks
    assert_same(resumed, whole)


def test_blocks_that_make_it_worse_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that boast of what they have reached, with parameters far from anything."""

    def boasting(blocks: Blockwise, _: object, __: int) -> Iterator[tuple[BlockPoint, np.ndarray]]:
        yield BlockPoint("a", 1.0, 0.5), np.zeros_like(blocks._course.flat)

    monkeypatch.setattr(Blockwise, "teach", boasting)
    result = tune(job(), plan(COARSE), fitted(), steps=60, options=replace(OPTIONS, block_steps=1))
    assert result.history[1].divergence > result.before
    assert [(p.step, p.divergence) for p in result.history[2:]] == [(p.step, p.divergence) for p in tuned().history[1:]]


# --- data of every kind


@pytest.mark.parametrize(
    ("text", "inputs"),
    [
        ("g (double[N, 16] x) => (double[N, 24] y) { a = Cast <to = 1> (x) h = MatMul (a, w) y = Cast <to = 11> (h) }", "double"),
        ("g (float[N, 16] x, string[N] s) => (float[N, 24] y, string[N] t) { y = MatMul (x, w) t = Identity (s) }", "strings"),
    ],
)
def test_types_that_are_not_float32_pass_by(text: str, inputs: str) -> None:
    data: dict[str, np.ndarray] = {"x": normal(3, 40, 16, dtype=np.float64 if inputs == "double" else np.float32)}
    if inputs == "strings":
        data["s"] = np.array(["a"] * 40, object)
    opened = open_job(parse(text, {"w": normal(1, 16, 24)}), data, Settings())
    forms = plan(COARSE, opened)
    result = tune(opened, forms, fit_forms(opened, forms, keep=True), steps=10, options=OPTIONS)
    assert len(result.history) > 1
    assert result.history[-1].divergence != result.before


def test_more_lessons_leave_the_student_as_finish_calibrates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of activations come from the job's own fit samples."""
    seen = []
    made = make_student

    def spy(opened: Job, *given: object, **options: object) -> object:
        seen.append(opened)
        return made(opened, *given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("intaglio.passes.tune.make_student", spy)
    taught = replace(job(), splits=replace(job().splits, fit=job().splits.fit[:40]))
    result = tune(job(), plan(COARSE), fitted(), steps=3, options=OPTIONS, lessons=taught)
    assert seen == [job()]
    assert result.steps == 3
