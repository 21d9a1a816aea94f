"""A learner of some of the parameters computes what one of all does."""

from __future__ import annotations

import numpy as np

from intaglio.passes.learner import Learner, compact, slope_of, units_of
from intaglio.passes.loss import SquaredError
from intaglio.passes.student import Parameter
from tests.passes.students import course_of, job


def some(names: tuple[str, ...]) -> tuple[Learner, dict[str, Parameter]]:
    """A learner whose flat array holds some parameters alone; the others are fed as they are."""
    course = course_of()
    parameters = course.student.parameters
    slope = slope_of(course.student.model.proto, [SquaredError("logits")], names, job().model.weights)
    packed = compact(parameters)
    flat = np.concatenate([parameters[name].start for name in packed])
    return Learner(slope, packed, flat, job().calibration, job().model.weights), packed


def test_parts_lie_side_by_side() -> None:
    parameters = course_of().student.parameters
    chosen = {name: parameters[name] for name in sorted(parameters)[1::2]}
    found = compact(chosen)
    ends = [0, *(parameter.part.stop for parameter in found.values())]
    assert [parameter.part.start for parameter in found.values()] == ends[:-1]
    assert ends[-1] == sum(len(parameter.start) for parameter in chosen.values())
    units = units_of(found, ends[-1] + 1)
    for parameter in found.values():
        assert (units[parameter.part] == np.float32(parameter.latent.unit())).all()
    assert units[-1] == 1


def test_the_gradient_of_some_parameters_is_their_part_of_the_whole() -> None:
    names = tuple(course_of().student.parameters)
    course = course_of()
    (lesson,) = course.lessons.at(0)
    feed = {**lesson.feed, "teacher": lesson.answers["logits"]}
    (whole, parts), (few, _) = some(names), some(names[2:4])
    assert few.trained == tuple(name for name in names if name in names[2:4])
    np.testing.assert_allclose(few.learn([feed]), whole.learn([feed]), rtol=1e-6)
    for name, parameter in parts.items():
        expected = whole.gradient[parameter.part] if name in few.trained else 0.0
        # float32 sums; ONNX Runtime may fuse two graphs differently
        np.testing.assert_allclose(few.gradient[parameter.part], expected, rtol=1e-4, atol=1e-6 * np.abs(whole.gradient).max())


def test_feeds_are_averaged() -> None:
    learner, _ = some(tuple(course_of().student.parameters))
    course = course_of()
    feeds = [{**lesson.feed, "teacher": lesson.answers["logits"]} for step in range(3) for lesson in course.lessons.at(step)]
    losses, gradients = [], []
    for feed in feeds:
        losses.append(learner.learn([feed]))
        gradients.append(learner.gradient.copy())
    np.testing.assert_allclose(learner.learn(feeds), np.mean(losses), rtol=1e-12)
    mean = np.mean(gradients, 0)
    np.testing.assert_allclose(learner.gradient, mean, rtol=1e-5, atol=1e-6 * np.abs(mean).max())  # float32 sums
