"""A course: its loss, its gradient, its examination, and how it makes do with the memory there is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from intaglio.ops.form import Form
from intaglio.passes import course as module
from intaglio.passes.course import open_course
from intaglio.passes.job import Settings, open_job
from intaglio.passes.student import make_student
from tests.models import classifier, normal, parse
from tests.passes.students import COARSE, OPTIONS, course_of, fitted, job, plan

LINEAR = "g (float[N, 16] x) => (float[N, 24] logits) { logits = MatMul (x, w) }"


def test_labels_and_values_between_take_part() -> None:
    for options in (replace(OPTIONS, labels=0.5), replace(OPTIONS, matched=("rc",), matching=0.1)):
        course = course_of(options=options)
        plain = course_of()
        assert course.learn(0) > plain.learn(0)
        assert not np.allclose(course.gradient, plain.gradient)


def test_the_gradient_is_the_slope_of_the_loss() -> None:
    """Of float factors, which nothing rounds; central differences of a float32 loss, along the gradient, give two digits or more."""
    form = Form("lowrank", (6,), "float", "contract")
    course = course_of(form=form)
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
    course = course_of(single)
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


def test_labels_in_a_column_are_labels() -> None:
    found = []
    for shape in ((40,), (40, 1)):
        data = {"x": normal(3, 40, 16), "labels": (np.arange(40) % 24).reshape(shape)}
        opened = open_job(parse(LINEAR, {"w": normal(1, 16, 24)}), data, Settings(labels="labels"))
        found.append(course_of(opened, options=replace(OPTIONS, labels=0.5)).learn(0))
    assert found[0] == found[1]


def test_an_examination_that_does_not_fit_in_memory_is_run_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    course = course_of()
    expected = course.divergence()
    assert course.divergence() == expected
    assert course._exam is not None
    monkeypatch.setattr("intaglio.passes.course.KEPT_BYTES", 1000)
    lean = course_of()
    assert [lean.divergence(), lean.divergence()] == [expected, expected]
    assert lean._exam is None


@pytest.mark.parametrize("loss", ["mse", "cosine", "cosine+mse"])
def test_values_have_the_loss_that_is_asked_for(loss: str) -> None:
    opened = open_job(parse(LINEAR.replace("logits", "y"), {"w": normal(1, 16, 24)}), {"x": normal(3, 200, 16)}, Settings())
    course = course_of(opened, options=replace(OPTIONS, loss=loss))
    (lesson,) = course.lessons.at(0)
    aim = lesson.answers["y"].astype(np.float64)
    ours = lesson.feed["x"] @ next(iter(course_weights(course))).astype(np.float64)
    error = np.square(ours - aim).sum() / np.square(aim).sum()
    cosine = 1 - (ours * aim).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(aim, axis=1)
    expected = {"mse": error, "cosine": cosine.mean(), "cosine+mse": error + cosine.mean()}[loss]
    np.testing.assert_allclose(course.learn(0), expected, rtol=1e-4)  # float32 sums of a few hundred terms, less a difference from one


def course_weights(course: module.Course) -> list[np.ndarray]:
    """What the parameters stand for at the start."""
    course.learner.project()
    return [course.learner._fed[name] for name in course.student.parameters]


# --- memory


def test_a_step_that_does_not_fit_is_made_of_smaller_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean gradient over parts of a batch is that of the batch, to float32 sums in another order."""
    whole = course_of()
    assert (whole.lessons.runs, len(whole.lessons.at(0)[0].indices)) == (1, 32)
    needed = module._run_bytes(whole.learner.slope, whole.lessons, 8, job())
    room = module._held_bytes(job(), whole.student) + needed
    monkeypatch.setattr(module, "affordable_bytes", lambda: room)
    lean = course_of()
    assert (lean.lessons.runs, len(lean.lessons.at(0)[0].indices)) == (4, 8)
    lean.lessons.at = lambda _: [  # type: ignore[method-assign]
        replace(lesson, feed={"x": lesson.feed["x"][part]}, answers={"logits": lesson.answers["logits"][part]})
        for lesson in whole.lessons.at(0)
        for part in (slice(0, 8), slice(8, 16), slice(16, 24), slice(24, 32))
    ]
    np.testing.assert_allclose(lean.learn(0), whole.learn(0), rtol=1e-5)
    np.testing.assert_allclose(lean.gradient, whole.gradient, rtol=1e-3, atol=1e-5 * np.abs(whole.gradient).max())


def test_a_fixed_batch_that_does_not_fit_computes_activations_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four wide layers on one narrow value each: the reverse pass keeps all of them, unless they are computed again."""
    layers = " ".join(f"w{i} = MatMul (h{i}, up) t{i} = Tanh (w{i}) h{i + 1} = MatMul (t{i}, down)" for i in range(6))
    text = f"g (float[64, 8] x) => (float[64, 8] y) {{ h0 = Identity (x) {layers} y = Identity (h6) }}"
    weights = {"up": normal(1, 8, 256), "down": normal(2, 256, 8)}
    opened = open_job(parse(text, weights), {"x": normal(3, 640, 8)}, Settings())
    plain = course_of(opened, options=replace(OPTIONS, batch=64))
    needed = module._run_bytes(plain.learner.slope, plain.lessons, 64, opened)
    monkeypatch.setattr(module, "affordable_bytes", lambda: module._held_bytes(opened, plain.student) + 0.9 * needed)
    lean = course_of(opened, options=replace(OPTIONS, batch=64))
    assert len(lean.learner.slope.proto.graph.node) > len(plain.learner.slope.proto.graph.node)
    np.testing.assert_allclose(lean.learn(0), plain.learn(0), rtol=1e-6)
    np.testing.assert_allclose(lean.gradient, plain.gradient, rtol=1e-4, atol=1e-6 * np.abs(plain.gradient).max())


def test_a_student_for_which_there_is_no_memory_is_not_taught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "affordable_bytes", lambda: 1000.0)
    found = open_course(job(), make_student(job(), plan(COARSE), fitted()), OPTIONS)
    assert "GB of memory, more than half of what there is" in str(found)


def test_arrays_in_floats_have_bases_and_codes_have_none() -> None:
    low = Form("lowrank", (4,), "float", "contract")
    course = course_of(form=low)
    assert [block.shape for block in course.blocks] == [
        parameter.latent.shape for name, parameter in course.student.parameters.items() if name in course.learner.trained
    ]
    coded = course_of(form=replace(low, storage="int4"))
    assert all(len(block.shape) == 1 for block in coded.blocks)  # biases
