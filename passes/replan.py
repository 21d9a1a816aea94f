"""Solve without building: a plan for a model with data, or an existing plan's menu for another budget.

The second needs neither data nor measurements: everything that the choice depends on is in the plan.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx

from intaglio.solver import Budget

from .analyse import analyse
from .budget import Request, resolve
from .cache import Cache
from .canonicalize import canonicalize
from .errors import InfeasibleError, InputError
from .job import Job
from .load import load
from .model import Model
from .options import Progress, silent
from .pipeline import choose_within
from .plan import Correction, Menu, Plan
from .price import SizePricer

ROUNDS = 4
"""Most times that a plan is solved again because its exact bytes are over the sum of its candidates'."""


def plan_job(job: Job, request: Request, *, progress: Progress = silent) -> Plan:
    """Choose a form for every site; every form is timed, so that the plan's menu serves any later budget.

    Raises:
        InputError: the budget is malformed.
        InfeasibleError: no choice meets it.
    """
    menu = analyse(job, Cache(job.settings.cache), latency=True, progress=progress)
    budget = resolve(request, job.original.size_bytes, menu.base)
    with job.clock.phase("solve"):
        return _solved(menu, budget, Correction(), SizePricer(job.model, external=job.external))


def replan(source: str | Path | onnx.ModelProto, plan: Plan, request: Request) -> Plan:
    """Choose again from a plan's menu.

    Args:
        source: the model that the plan was made for.
        plan: has the menu, and the corrections learned from measurements.
        request: the new budget.

    Raises:
        InputError: the plan is another model's, or the budget is malformed.
        InfeasibleError: no choice meets it.
    """
    original = load(source)
    check_model(original, plan)
    budget = resolve(request, original.size_bytes, plan.menu.base)
    model, _ = canonicalize(original)
    sizes = SizePricer(model, external=bool(original.weights.files))
    return _solved(plan.menu, budget, replace(plan.correction, spare_bytes=0), sizes)


def check_model(model: Model, plan: Plan) -> None:
    """Raise unless a plan was made for this model.

    Raises:
        InputError: it was not.
    """
    if model.sha256 != plan.menu.model_sha256:
        raise InputError(
            f"plan: it was made for the model with SHA-256 {plan.menu.model_sha256[:12]}…, not for {model.path or 'this one'} "
            f"({model.sha256[:12]}…); solve again with `intaglio plan`"
        )


def _solved(menu: Menu, budget: Budget, correction: Correction, sizes: SizePricer) -> Plan:
    """A plan whose exact bytes keep the size budget."""
    for _ in range(ROUNDS):
        plan = choose_within(menu, budget, correction)
        over = 0 if budget.size_bytes is None else int(sizes.total(plan.forms) - budget.size_bytes)
        if over <= 0:
            return plan
        correction = replace(correction, spare_bytes=correction.spare_bytes + over + 16)
    raise InfeasibleError(f"no plan of at most {budget.size_bytes:,.0f} B was found in {ROUNDS} rounds; relax --size by 1 %")
