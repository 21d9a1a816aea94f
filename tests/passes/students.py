"""A small classifier whose coarse plan leaves much to be taught."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import TypeVar

import numpy as np

from intaglio.ops.form import UNCHANGED, Form
from intaglio.passes.build import Fitted, fit_forms
from intaglio.passes.course import Course, open_course
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.rewrite import declines
from intaglio.passes.student import make_student
from intaglio.passes.tune import TuneResult
from intaglio.passes.tune_options import TuneOptions
from tests.models import classifier

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
    return fit_forms(job(), plan(form), keep=True, match=False)  # so that tuning has something to gain


def course_of(opened: Job | None = None, form: Form = COARSE, options: TuneOptions = OPTIONS) -> Course:
    """A course on a plan in which every weight that can has one form."""
    forms = plan(form, opened)
    what = fitted(form) if opened is None else fit_forms(opened, forms, keep=True)
    course = open_course(opened or job(), make_student(opened or job(), forms, what), options)
    assert isinstance(course, Course)
    return course


def arrays(result: TuneResult) -> list[np.ndarray]:
    packs = [array for name in sorted(result.fitted.packed) for packs in result.fitted.packed[name] for array in packs]
    return packs + [result.fitted.constants[name] for name in sorted(result.fitted.constants)]


def assert_same(one: TuneResult, other: TuneResult) -> None:
    for a, b in zip(arrays(one), arrays(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [(p.step, p.divergence) for p in one.history] == [(p.step, p.divergence) for p in other.history]


class Stopper:
    """Progress that the user stops."""

    def __init__(self, after: int, what: str = "Tuning") -> None:
        self.after, self.what = after, what

    def __call__(self, items: Iterable[T], what: str, count: int) -> Iterator[T]:
        for number, item in enumerate(items):
            if number == self.after and what == self.what:
                raise KeyboardInterrupt
            yield item
