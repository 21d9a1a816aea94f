"""The decoded model has the original's operators and computes what the compressed one does, channels that are cut included."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from intaglio.ops.form import PRUNED, UNCHANGED, Form
from intaglio.passes.build import finish, fit_forms
from intaglio.passes.decoded import decoded_model
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.learner import units_of
from intaglio.passes.rewrite import declines
from intaglio.passes.sites import find_sites
from intaglio.passes.student import make_student
from tests.models import assert_close, classifier, normal, operators, run
from tests.passes.pruning import pruned_plan
from tests.passes.test_match import pruned, pruned_job


@cache
def job() -> Job:
    return open_job(*classifier(), Settings())


def alike(form: Form) -> dict[str, Form]:
    return {site.name: form if declines(site, form) is None else UNCHANGED for site in job().sites}


PLANS = {
    "stored": lambda: (job(), alike(Form("dense", (), "int3"))),
    "product": lambda: (job(), alike(Form("lowrank", (6,), "int4", "dense"))),
    "chain": lambda: (job(), alike(Form("lowrank", (6,), "int4", "contract"))),
    "pruned": lambda: (job(), pruned_plan(job(), "c2")),
    "pruned with biases and a depthwise layer": lambda: (
        pruned_job(),
        {
            "c1": pruned(4, 8, storage="int4"),
            "c2": pruned(8, 16, storage="int4"),
            "dw": pruned(1, 16, storage="int4"),
            "c3": pruned(16, 12, storage="int4"),
            "head": pruned(12, 12, storage="int4"),
        },
    ),
}


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_it_computes_what_the_compressed_model_does(plan: str, tuned: bool) -> None:
    opened, forms = PLANS[plan]()
    fitted = fit_forms(opened, forms, keep=True)
    if tuned:
        student = make_student(opened, forms, fitted)
        fitted = student.taught(student.start() + 0.3 * units_of(student.parameters, student.count) * normal(3, student.count))
        assert fitted.constants
    whole, compressed = decoded_model(opened, forms, fitted), finish(opened, forms, fitted)
    feed = opened.data.first(40)
    ours, theirs, original = (run(model.proto, feed) for model in (whole, compressed, opened.model))
    assert_close(ours, theirs, 1e-4)  # float32 products in another order
    assert np.abs(ours[0] - original[0]).max() > 1e-3 * np.abs(original[0]).max()  # or the test says nothing
    assert operators(whole.proto) == operators(opened.model.proto)


def test_pruned_channels_are_zeros() -> None:
    forms = pruned_plan(job(), "c2")
    whole = decoded_model(job(), forms, fit_forms(job(), forms, keep=True))
    site = next(site for site in find_sites(whole) if site.name == "c2")
    assert forms["c2"].decomposition == PRUNED
    rows = np.abs(site.value(whole)).reshape(site.shape[0], -1).max(1)
    assert (rows > 0).sum() == forms["c2"].ranks[1] < site.shape[0]
