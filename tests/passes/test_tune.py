"""Tuning lowers the divergence of a coarse model, never raises it, costs no byte, and goes on bit by bit where it was stopped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import pytest

from intaglio.ops.form import CARRIED, UNCHANGED, Form
from intaglio.passes.build import Fitted, finish, fit_forms
from intaglio.passes.errors import InputError
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.rewrite import declines
from intaglio.passes.save import serialized_size
from intaglio.passes.student import make_student
from intaglio.passes.tune import TuneOptions, TuneResult, _Course, tune
from intaglio.passes.verify import compare
from tests.models import classifier, normal, parse

T = TypeVar("T")

OPTIONS = TuneOptions(batch=32, rate=1e-2, evaluations=5)
COARSE = Form("dense", (), "int3")


@cache
def job() -> Job:
    proto, data = classifier(400)
    return open_job(proto, {"x": data["x"], "labels": data["labels"]}, Settings(labels="labels"))


def plan(form: Form, opened: Job | None = None) -> dict[str, Form]:
    return {site.name: form if declines(site, form) is None else UNCHANGED for site in (opened or job()).sites}


@cache
def fitted(form: Form = COARSE) -> Fitted:
    return fit_forms(job(), plan(form), keep=True)


@cache
def tuned() -> TuneResult:
    return tune(job(), plan(COARSE), fitted(), steps=60, options=OPTIONS)


def divergence(what: Fitted, forms: dict[str, Form], opened: Job | None = None) -> float:
    opened = opened or job()
    model = finish(opened, forms, what)
    return compare(opened.original, model, opened.data, opened.splits.choose, opened.calibration).divergence


def arrays(result: TuneResult) -> list[np.ndarray]:
    packs = [array for name in sorted(result.fitted.packed) for packs in result.fitted.packed[name] for array in packs]
    return packs + [result.fitted.constants[name] for name in sorted(result.fitted.constants)]


def assert_same(one: TuneResult, other: TuneResult) -> None:
    for a, b in zip(arrays(one), arrays(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [(p.step, p.divergence) for p in one.history] == [(p.step, p.divergence) for p in other.history]


class Stopper:
    """Progress that the user stops."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, items: Iterable[T], what: str, count: int) -> Iterator[T]:
        for number, item in enumerate(items):
            if number == self.after:
                raise KeyboardInterrupt
            yield item


def test_the_written_model_diverges_less_at_the_same_size_on_samples_that_were_not_trained_on() -> None:
    result, forms = tuned(), plan(COARSE)
    assert result.improved
    assert result.after < 0.7 * result.before  # three bits leave much to gain: a gradient of the wrong sign or size gains nothing
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
    again = tune(cached, plan(COARSE), fitted(), steps=60, options=OPTIONS, progress=Stopper(0))  # nothing is left to do
    assert_same(again, tuned())


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
    assert result.after < 0.9 * result.before
    assert divergence(result.fitted, plan(form)) < 0.95 * divergence(fitted(form), plan(form))


def test_a_model_in_integers_learns_about_its_rounded_activations() -> None:
    form = Form("dense", (), "int3", "dense", "integer")
    forms = plan(form) | {carrier.name: CARRIED for carrier in job().carriers}
    start = fit_forms(job(), forms, keep=True)
    result = tune(job(), forms, start, steps=40, options=OPTIONS)
    assert result.improved
    assert divergence(result.fitted, forms) < 0.7 * divergence(start, forms)


def test_labels_and_values_between_take_part() -> None:
    for options in (replace(OPTIONS, labels=0.5), replace(OPTIONS, matched=("rc",), matching=0.1)):
        course = _Course(job(), make_student(job(), plan(COARSE), fitted()), options)
        plain = _Course(job(), make_student(job(), plan(COARSE), fitted()), OPTIONS)
        assert course.learn(0) > plain.learn(0)
        assert not np.allclose(course.gradient, plain.gradient)


def test_the_gradient_is_the_slope_of_the_loss() -> None:
    """Of float factors, which nothing rounds; central differences of a float32 loss, along the gradient, give two digits or more."""
    form = Form("lowrank", (6,), "float", "contract")
    course = _Course(job(), make_student(job(), plan(form), fitted(form)), OPTIONS)
    start = course.flat.copy()
    course.learn(0)
    gradient = course.gradient.copy()
    for parameter in course.student.parameters.values():
        direction = np.zeros_like(gradient)
        direction[parameter.part] = gradient[parameter.part] / np.linalg.norm(gradient[parameter.part])
        size, losses = np.float32(1e-3 * parameter.latent.unit()), []
        for side in (size, -size):
            course.flat[...] = start + side * direction
            losses.append(course.learn(0))
        np.testing.assert_allclose((losses[0] - losses[1]) / (2 * size), gradient @ direction, rtol=1e-2)


def test_a_model_of_a_fixed_batch_sees_a_whole_batch_per_step() -> None:
    """The mean gradient over single samples is the gradient of the batch, to float32 sums in another order."""
    opened = job()
    fixed = onnx.ModelProto()
    fixed.CopyFrom(opened.original.proto)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    x = classifier(400)[1]["x"][:40]
    single = open_job(fixed, {"x": x}, Settings())
    forms = plan(COARSE, single)
    course = _Course(single, make_student(single, forms, fit_forms(single, forms, keep=True)), OPTIONS)
    assert course.lessons.runs == 32
    shown = np.concatenate([lesson.indices for lesson in course.lessons.at(0)])
    assert len(shown) == 32
    course.learn(0)
    found, total = course.gradient.copy(), np.zeros_like(course.gradient)
    lessons = course.lessons.at(0)
    for lesson in lessons:
        course.lessons.at = lambda _, lesson=lesson: [lesson]  # type: ignore[method-assign,misc]
        course.learn(0)
        total += course.gradient
    np.testing.assert_allclose(found, total / len(lessons), rtol=1e-4, atol=1e-6 * np.abs(total).max())


def test_outputs_that_are_values_are_matched_by_their_squares() -> None:
    text = "g (float[N, S, 16] x) => (float[N, S, 16] y) { h = MatMul (x, w) r = Relu (h) y = MatMul (r, v) }"
    proto = parse(text, {"w": normal(1, 16, 24), "v": normal(2, 24, 16)})
    opened = open_job(proto, {"x": normal(3, 100, 5, 16) * 8}, Settings())
    forms = plan(Form("lowrank", (6,), "int8", "contract"), opened)
    result = tune(opened, forms, fit_forms(opened, forms, keep=True), steps=60, options=OPTIONS)
    assert result.after < 0.95 * result.before


def test_bad_requests_are_refused_with_a_remedy() -> None:
    bare = open_job(classifier()[0], {"x": classifier()[1]["x"]}, Settings())
    requests: list[tuple[Job, int, TuneOptions, str]] = [
        (job(), 0, OPTIONS, "0 steps"),
        (job(), 1, replace(OPTIONS, augmentations=("spin",)), "'spin' is unknown"),
        (job(), 1, replace(OPTIONS, labels=1.0, augmentations=("mixup",)), "mixed samples have no label"),
        (bare, 1, replace(OPTIONS, labels=1.0), "the data has none"),
    ]
    for opened, steps, options, message in requests:
        with pytest.raises(InputError, match=message):
            tune(opened, plan(COARSE), fitted(), steps=steps, options=options)


def test_a_model_without_gradients_is_refused() -> None:
    text = "g (float[N, 16] x) => (float[N, 24] y) { h = MatMul (x, w) s = Sign (h) y = Mul (s, s) }"
    opened = open_job(parse(text, {"w": normal(1, 16, 24)}), {"x": normal(3, 40, 16)}, Settings())
    forms = plan(COARSE, opened)
    with pytest.raises(InputError, match="no gradient reaches any parameter"):
        tune(opened, forms, fit_forms(opened, forms, keep=True), steps=1, options=OPTIONS)


# --- checkpoints that do not fit, interrupts between a step and its measurement


def test_a_run_that_was_stopped_while_it_measured_makes_up_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last measurement, after which no step is left."""
    cached = replace(job(), settings=replace(job().settings, cache=tmp_path))
    measure, calls = _Course.divergence, []

    def stopping(course: _Course) -> float:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return measure(course)

    with monkeypatch.context() as patch:
        patch.setattr(_Course, "divergence", stopping)
        stopped = tune(cached, plan(COARSE), fitted(), steps=60, options=OPTIONS)
    assert (stopped.interrupted, stopped.steps, stopped.history[-1].step) == (True, 60, 48)
    assert_same(tune(cached, plan(COARSE), fitted(), steps=60, options=OPTIONS), tuned())


@pytest.mark.parametrize("change", ["missing", "longer", "strings", "empty history"])
def test_a_checkpoint_of_another_version_is_not_used(change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cached = replace(job(), settings=replace(job().settings, cache=tmp_path))
    tune(cached, plan(COARSE), fitted(), steps=60, options=OPTIONS, progress=Stopper(13))
    (path,) = tmp_path.iterdir()
    with np.load(path) as stored:
        state = dict(stored)
    if change == "missing":
        del state["adam.mean"]
    elif change == "longer":
        state["best"] = np.append(state["best"], np.float32(0))
    elif change == "strings":
        state["rate"] = np.asarray("fast")
    else:
        state["history"] = np.zeros((0, 4))
    np.savez(path, **state)
    assert_same(tune(cached, plan(COARSE), fitted(), steps=60, options=OPTIONS), tuned())
    assert "state of another run" in caplog.text


def test_other_labels_do_not_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    """The data's digest leaves labels out."""
    cached = replace(job(), settings=replace(job().settings, cache=tmp_path))
    other = replace(cached, data=replace(cached.data, label_values=cached.data.label_values[::-1]))  # type: ignore[index]
    for opened in (cached, other):
        tune(opened, plan(COARSE), fitted(), steps=1, options=replace(OPTIONS, labels=0.5))
    assert len(list(tmp_path.iterdir())) == 2


def test_steps_without_a_finite_gradient_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam leaves them out; a run that goes on must not make them again."""
    cached = replace(job(), settings=replace(job().settings, cache=tmp_path))
    learn = _Course.learn

    def broken(course: _Course, step: int) -> float:
        loss = learn(course, step)
        if step % 2:
            course.gradient[0] = np.nan
        return loss

    monkeypatch.setattr(_Course, "learn", broken)
    whole = tune(job(), plan(COARSE), fitted(), steps=12, options=OPTIONS)
    tune(cached, plan(COARSE), fitted(), steps=12, options=OPTIONS, progress=Stopper(5))
    resumed = tune(cached, plan(COARSE), fitted(), steps=12, options=OPTIONS)
    assert (whole.steps, resumed.steps) == (12, 12)
    assert_same(resumed, whole)


# --- data of every kind

LINEAR = "g (float[N, 16] x) => (float[N, 24] logits) { logits = MatMul (x, w) }"


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


def test_labels_in_a_column_are_labels() -> None:
    found = []
    for shape in ((40,), (40, 1)):
        data = {"x": normal(3, 40, 16), "labels": (np.arange(40) % 24).reshape(shape)}
        opened = open_job(parse(LINEAR, {"w": normal(1, 16, 24)}), data, Settings(labels="labels"))
        forms = plan(COARSE, opened)
        student = make_student(opened, forms, fit_forms(opened, forms, keep=True))
        found.append(_Course(opened, student, replace(OPTIONS, labels=0.5)).learn(0))
    assert found[0] == found[1]


def test_an_examination_that_does_not_fit_in_memory_is_run_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    course = _Course(job(), make_student(job(), plan(COARSE), fitted()), OPTIONS)
    expected = course.divergence()
    assert course.divergence() == expected
    assert course._exam is not None
    monkeypatch.setattr("intaglio.passes.tune.KEPT_BYTES", 1000)
    lean = _Course(job(), make_student(job(), plan(COARSE), fitted()), OPTIONS)
    assert [lean.divergence(), lean.divergence()] == [expected, expected]
    assert lean._exam is None


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
