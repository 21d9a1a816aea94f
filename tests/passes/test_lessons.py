"""Lessons: every sample once per epoch, batches that follow from the step alone, and answers that are the original model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from intaglio.passes import lessons as module
from intaglio.passes.execute import Executor
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.lessons import Arrays, Lessons
from tests.models import classifier, normal, parse, run


@cache
def job() -> Job:
    return open_job(classifier()[0], {"x": classifier()[1]["x"]}, Settings())


@cache
def sequences() -> Job:
    """A mask that cuts samples to different lengths."""
    text = """g (int64[N, S] input_ids, int64[N, S] attention_mask) => (float[N, S, 16] y) {
        e = Gather (t, input_ids) m = Cast <to = 1> (attention_mask) u = Unsqueeze (m, axis) h = Mul (e, u) y = MatMul (h, w)
    }"""
    proto = parse(text, {"t": normal(1, 30, 16), "w": normal(2, 16, 16), "axis": np.array([2])})
    rng = np.random.default_rng(0)
    mask = (np.arange(12) < rng.choice([4, 7, 12], (80, 1))).astype(np.int64)
    return open_job(proto, {"input_ids": rng.integers(0, 30, (80, 12)), "attention_mask": mask}, Settings())


def test_an_epoch_shows_every_sample_in_another_order_each_time() -> None:
    course = Lessons(job(), ["logits"], 15)
    steps = course.epoch
    epochs = [[index for step in range(steps) for index in course.at(epoch * steps + step)[0].indices] for epoch in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(job().splits.fit)] * 2
    assert epochs[0] != epochs[1]


def test_a_step_is_the_same_whatever_was_shown_before() -> None:
    one, other = (Lessons(job(), ["logits"], 16, ("flip", "shift")) for _ in range(2))
    for step in (7, 0, 3):
        one.at(step)
    (first,), (second,) = one.at(5), other.at(5)
    np.testing.assert_array_equal(first.indices, second.indices)
    np.testing.assert_array_equal(first.feed["x"], second.feed["x"])
    np.testing.assert_array_equal(first.answers["logits"], second.answers["logits"])


def test_changed_lessons_are_the_same_from_any_step_on() -> None:
    """In a second showing too: whoever resumes there has seen no first one."""
    course = Lessons(job(), ["logits"], 16, ("shift",))
    forward = [course.at(step)[0] for step in range(4 * course.epoch)]
    for step in reversed(range(4 * course.epoch)):
        (lesson,) = Lessons(job(), ["logits"], 16, ("shift",)).at(step)
        np.testing.assert_array_equal(lesson.indices, forward[step].indices)
        np.testing.assert_array_equal(lesson.feed["x"], forward[step].feed["x"])
        np.testing.assert_array_equal(lesson.answers["logits"], forward[step].answers["logits"])


def test_answers_are_the_original_models_kept_or_not() -> None:
    """Also of images that were changed at random; rows of another batch agree to float32 sums in another order."""
    kept, changed = Lessons(job(), ["logits", "rc"], 16), Lessons(job(), ["logits"], 16, ("shift",))
    for step in range(2 * kept.epoch):  # the second epoch is answered from memory
        for course in (kept, changed):
            (lesson,) = course.at(step)
            (expected,) = run(job().original.proto, lesson.feed)
            np.testing.assert_allclose(lesson.answers["logits"], expected, rtol=1e-4, atol=1e-4)


def test_changed_batches_are_shown_again_before_samples_are_changed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original is asked once for both showings, whose order differs."""
    course = Lessons(job(), ["logits"], 16, ("flip",))
    asked, chances = 0, []
    run_feed, augmented = Executor.run_feed, module.augmented

    def counted(self: Executor, feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        nonlocal asked
        asked += 1
        return run_feed(self, feed)

    def noted(feed: Arrays, names: Sequence[str], rng: np.random.Generator) -> Arrays:
        chances.append(str(rng.bit_generator.state))
        return augmented(feed, names, rng)

    monkeypatch.setattr(Executor, "run_feed", counted)
    monkeypatch.setattr(module, "augmented", noted)
    epochs = [[course.at(epoch * course.epoch + step)[0] for step in range(course.epoch)] for epoch in range(module.SHOWINGS + 1)]
    assert asked == 2 * course.epoch
    shown = [[lesson.feed["x"].tobytes() for lesson in epoch] for epoch in epochs]
    assert sorted(shown[0]) == sorted(shown[1])
    assert shown[0] != shown[1]
    first, second, third = (set(chances[start : start + course.epoch]) for start in range(0, 3 * course.epoch, course.epoch))
    assert first == second
    assert len(first | third) == 2 * course.epoch
    for lesson in epochs[0]:
        again = epochs[1][shown[1].index(lesson.feed["x"].tobytes())]
        np.testing.assert_array_equal(lesson.answers["logits"], again.answers["logits"])


def test_no_step_holds_a_changed_batch_twice() -> None:
    course = Lessons(job(), ["logits"], 128, ("shift",))
    course.limit(8)
    assert course.runs > course.epoch
    shown = [lesson.feed["x"].tobytes() for lesson in course.at(0)]
    assert len(set(shown)) == course.runs


def test_no_step_in_which_two_showings_meet_holds_a_changed_batch_twice() -> None:
    course = Lessons(job(), ["logits"], 24, ("shift",))
    course.limit(8)
    assert 1 < course.runs <= course.epoch // 2
    assert course.epoch % course.runs
    shown = [lesson.feed["x"].tobytes() for step in range(4 * course.epoch) for lesson in course.at(step)]
    for step in range(4 * course.epoch):
        assert len(set(shown[step * course.runs : (step + 1) * course.runs])) == course.runs
    assert len(set(shown)) == len(shown) // 2


def test_answers_that_do_not_fit_in_memory_are_asked_for_again(monkeypatch) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", 100)
    course = Lessons(job(), ["logits"], 16)
    np.testing.assert_array_equal(course.at(0)[0].answers["logits"], course.at(0)[0].answers["logits"])
    assert course._kept is None
    changed = Lessons(job(), ["logits"], 16, ("flip",))
    np.testing.assert_array_equal(changed.at(0)[0].answers["logits"], changed.at(0)[0].answers["logits"])
    assert not changed._changed


def test_a_batch_holds_samples_of_one_length_without_their_padding() -> None:
    course = Lessons(sequences(), ["y"], 8)
    shown = [course.at(step)[0] for step in range(course.epoch)]
    assert {lesson.feed["input_ids"].shape[1] for lesson in shown} == {4, 7, 12}
    assert {int(index) for lesson in shown for index in lesson.indices} == set(sequences().splits.fit.tolist())
    assert all(lesson.answers["y"].shape[:2] == lesson.feed["input_ids"].shape for lesson in shown)


def test_a_limited_course_shows_as_many_samples_per_step_in_more_lessons() -> None:
    course = Lessons(job(), ["logits"], 16)
    course.limit(4)
    assert course.runs == 4
    assert [len(lesson.indices) for lesson in course.at(3)] == [4] * 4
    shown = [index for number in range(course.epoch // 4) for lesson in course.at(number) for index in lesson.indices]
    assert len(set(shown)) == len(shown) <= len(job().splits.fit)


def test_the_widest_lesson_holds_the_largest_arrays() -> None:
    lesson = Lessons(sequences(), ["y"], 8).widest(4)
    assert lesson.feed["input_ids"].shape == (4, 12)
    assert lesson.answers["y"].shape == (4, 12, 16)
