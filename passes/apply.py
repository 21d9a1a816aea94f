"""Rewrite a model by a plan: fit the plan's forms, verify, report. Nothing is chosen.

A plan as the solver made it must keep its own budget. One whose forms were edited by hand is the user's choice: its outcome
says whether the budget still holds.
"""

from __future__ import annotations

from dataclasses import replace

from .build import build
from .job import Job
from .options import Progress, silent
from .pipeline import Outcome, verified
from .plan import Plan
from .prepare import equalized
from .replan import check_model
from .scores import with_known_floors
from .verify import compare


def apply_plan(job: Job, plan: Plan, *, progress: Progress = silent) -> Outcome:
    """Fit and rewrite.

    Args:
        job: the model that the plan was made for, with data.
        plan: from `read_plan`, perhaps edited.
        progress: shows how far it is.

    Raises:
        InputError: the plan is another model's, or a form does not fit its site or is none of the target's.
        VerificationError: the plan, as it was solved, does not keep its budget on held-out data.
    """
    check_model(job.original, plan)
    job = replace(job, settings=replace(job.settings, target=plan.menu.target, integers=plan.menu.integers))
    if plan.menu.floors:
        job = with_known_floors(job, plan.menu.floors)
    if plan.menu.equalized:
        job = equalized(job, always=True)
    model = build(job, plan.forms, progress=progress)
    with job.clock.phase("verify"):
        measured = compare(job.original, model, job.data, job.splits.choose, job.calibration, kind=job.settings.kind).divergence
    predicted = job.sizes().total(plan.forms)
    return verified(
        job,
        plan,
        plan.budget,
        model,
        measured,
        predicted,
        timed=job.times(plan.budget),
        enforce=plan.solution is not None,
    )
