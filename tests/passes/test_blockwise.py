"""Blocks: cut where one value carries everything on, put together they are the student, and taught they err less at their exits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.form import Form
from intaglio.passes import blockwise as module
from intaglio.passes.blockwise import Blockwise, extracted, find_blocks, single_cuts
from intaglio.passes.build import fit_forms
from intaglio.passes.course import Course, open_course
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.options import silent
from intaglio.passes.session import open_session, to_array, to_value
from intaglio.passes.student import Student, make_student
from tests.models import Array, normal, parse
from tests.passes.pruning import pruned_plan
from tests.passes.students import COARSE, OPTIONS, course_of, job, plan

RESIDUAL = """g (float[N, 16] x, float[N] mask) => (float[N, 16] y) {
    u = Unsqueeze (mask, one)
    a = MatMul (x, w1) ra = Relu (a) b = MatMul (ra, w2) mb = Mul (b, u) s = Add (x, mb)
    c = MatMul (s, w3) rc = Relu (c) d = MatMul (rc, w4) t = Add (s, d)
    y = MatMul (t, w5) }"""
WEIGHTS = {f"w{number}": normal(number, 16, 16) for number in range(1, 6)} | {"one": np.array([1])}


def residual(text: str = RESIDUAL, weights: Mapping[str, Array] = WEIGHTS, samples: int = 200) -> Job:
    data = {"x": normal(9, samples, 16), "mask": np.ones(samples, np.float32)}
    return open_job(parse(text, weights), data, Settings())


def student_of(opened: Job, form: Form = COARSE) -> Student:
    forms = plan(form, opened)
    return make_student(opened, forms, fit_forms(opened, forms, keep=True))


def run_block(student: Student, block: module.Block, feed: Mapping[str, Array]) -> dict[str, Array]:
    """A block's exits at the start."""
    values = {}
    for name, parameter in student.parameters.items():
        values[name] = np.zeros(parameter.latent.shape, np.float32)
        parameter.project(student.start(), values[name])
    session = open_session(extracted(student, block), weights=student.job.model.weights)
    fed = {name: to_value(array) for name, array in {**values, **feed}.items()}
    return dict(zip(block.exits, map(to_array, session.run(block.exits, fed)), strict=True))


def test_parameters_keep_the_students_order() -> None:
    """Sums of gradients depend on it, and the order of a set on the process."""
    course = course_of(residual())
    (block,) = find_blocks(course.student, course.job.reference, course.learner.trained, 1)
    workshop = module._Workshop(course, block, frozenset(), is_last=True)
    assert list(workshop._known) == [name for name in course.student.parameters if name in block.parameters]
    assert len(workshop._known) >= 5


# --- where to cut


def test_cuts_lie_where_nothing_passes_by() -> None:
    """Inside a residual block the stream passes by; around the first one it is the input, which is everywhere. A mask counts for none."""
    proto = parse(RESIDUAL, WEIGHTS)
    assert single_cuts(proto, {f"w{number}": None for number in range(1, 6)}) == ["a", "ra", "b", "mb", "s", "t", "y"]
    assert single_cuts(proto, {"w5": None}) == ["y"]


def test_what_parameters_alone_make_passes_by_for_nothing() -> None:
    text = "g (float[N, 16] x) => (float[N, 16] y) { p = MatMul (u, v) a = MatMul (x, w) b = Relu (a) y = MatMul (b, p) }"
    assert single_cuts(parse(text), {"u": None, "v": None, "w": None}) == ["a", "b", "y"]


def test_blocks_have_parameters_and_are_no_more_than_asked_for() -> None:
    opened = residual()
    student = student_of(opened)
    blocks = find_blocks(student, opened.model, list(student.parameters))
    assert [len(block.parameters) for block in blocks] == [1, 1, 2, 1]
    assert [block.entry for block in blocks] == [None, *(block.exits[0] for block in blocks[:-1])]
    few = find_blocks(student, opened.model, list(student.parameters), most=2)
    assert [len(block.parameters) for block in few] in ([2, 3], [3, 2])
    assert few[-1].exits == ("y",)


def test_a_cut_through_pruned_channels_is_none() -> None:
    """The original has more of them there."""
    forms = pruned_plan(job(), "c2")
    student = make_student(job(), forms, fit_forms(job(), forms, keep=True))
    exits = [block.exits[0] for block in find_blocks(student, job().model, list(student.parameters))]
    assert exits == ["a", "c", "h", "logits"]


@settings(max_examples=4, deadline=None)
@given(st.integers(1, 5))
def test_blocks_one_after_the_other_are_the_student(most: int) -> None:
    opened = residual()
    student = student_of(opened)
    feed = {"x": normal(5, 7, 16), "mask": normal(6, 7)}
    (whole,) = run_block(student, find_blocks(student, opened.model, [], 1)[0], feed).values()
    handed: dict[str, Array] = {}
    for block in find_blocks(student, opened.model, list(student.parameters), most):
        handed = run_block(student, block, {**feed, **handed})
    np.testing.assert_allclose(handed["y"], whole, rtol=1e-5, atol=1e-5 * np.abs(whole).max())  # the same sums, fused differently


# --- teaching


def test_blocks_err_less_where_they_end_and_are_kept_only_then() -> None:
    course = course_of()
    points = []
    for point, flat in Blockwise(course, 150, 3e-3).teach(silent):
        moved = not np.array_equal(flat, course.flat)
        assert moved == (point.after < point.before)
        course.flat[...] = flat
        points.append(point)
    assert [point.exit for point in points] == ["a", "b", "c", "h", "logits"]
    assert points[-1].after < points[-1].before
    # The last block's error on samples held back is the divergence of the outputs, to rounding that flips no code
    np.testing.assert_allclose(course.divergence(), points[-1].after, rtol=1e-4)


def test_a_block_of_several_layers_gains() -> None:
    """Its layers were rounded one by one; together they can do better."""
    opened = residual(samples=1000)
    forms = plan(COARSE, opened)
    student = make_student(opened, forms, fit_forms(opened, forms, keep=True, match=False))  # so that there is something to gain
    course = open_course(opened, student, OPTIONS)
    assert isinstance(course, Course)
    blocks = Blockwise(course, 150, 3e-3)
    blocks.blocks = find_blocks(course.student, opened.model, course.learner.trained, most=2)
    reached = [point for point, _ in blocks.teach(silent)]
    assert min(point.after / point.before for point in reached) < 0.95


def test_tied_parameters_stay() -> None:
    text = "g (float[N, 16] x, float[N] mask) => (float[N, 16] y) { a = MatMul (x, w1) r = Relu (a) b = MatMul (r, w2) y = MatMul (b, w1) }"
    course = course_of(residual(text, {name: WEIGHTS[name] for name in ("w1", "w2")}))
    for _, flat in Blockwise(course, 20, 1e-2).teach(silent):
        part = course.student.parameters["w1"].part
        np.testing.assert_array_equal(flat[part], course.student.start()[part])


def test_few_samples_are_kept_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", 1)
    course = course_of()
    lessons, exams = Blockwise(course, 1, 1e-3)._samples()
    assert (len(lessons), len(exams)) == (1, 1)


def test_a_model_of_one_block_is_left_to_the_whole() -> None:
    proto = parse("g (float[N, 16] x) => (float[N, 16] y) { y = MatMul (x, w) }", {"w": normal(1, 16, 16)})
    course = course_of(open_job(proto, {"x": normal(2, 80, 16)}, Settings()))
    assert list(Blockwise(course, 10, 1e-3).teach(silent)) == []
