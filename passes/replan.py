"""Solve without building: a plan for a model with data, or an existing plan's menu for another budget.

The second needs neither data nor measurements: everything that the choice depends on is in the plan.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx

from .analyse import analyse
from .budget import Request, resolve
from .cache import Cache
from .canonicalize import canonicalize
from .errors import InfeasibleError, InputError
from .floors import with_floors
from .job import Job
from .kernels import INTEGERS
from .load import load
from .model import Model
from .options import Progress, silent
from .plan import Correction, Plan
from .prepare import equalized
from .price import SizePricer
from .scores import floored
from .targets import TARGETS
from .within import choose_within, plan_within

ROUNDS = 4
"""Most times that a plan is solved again because its exact bytes are over the sum of its candidates'."""


def plan_job(job: Job, request: Request, *, progress: Progress = silent) -> Plan:
    """Choose a form for every site; every form is timed, so that the plan's menu serves any later budget.

    Raises:
        InputError: the budget is malformed.
        InfeasibleError: no choice meets it.
    """
    job = equalized(floored(job))
    menu = analyse(job, Cache(job.settings.cache), latency=True, progress=progress)
    budget = resolve(request, job.original.size_bytes, menu.base)
    return plan_within(job, menu, budget, Correction(), job.sizes())


def replan(source: str | Path | onnx.ModelProto, plan: Plan, request: Request) -> Plan:
    """Choose again from a plan's menu.

    Args:
        source: the model that the plan was made for.
        plan: has the menu, and the corrections learned from measurements.
        request: the new budget.

    Raises:
        InputError: the plan is another model's or was made in rounds, or the budget is malformed.
        InfeasibleError: no choice meets it.
    """
    original = load(source)
    check_model(original, plan)
    if plan.menu.lineage:
        raise InputError("plan: it was made in rounds, and prices weights that only these had; solve again with `intaglio plan`")
    budget = resolve(request, original.size_bytes, plan.menu.base)
    model, _ = canonicalize(original)
    model = with_floors(model, plan.menu.floors)
    domains, integers = TARGETS[plan.menu.target].domains, INTEGERS[plan.menu.integers]
    sizes = SizePricer(model, integers, external=bool(original.weights.files), domains=domains)
    correction = replace(plan.correction, spare_bytes=0)
    for _ in range(ROUNDS):
        solved = choose_within(plan.menu, budget, correction)
        excess = 0 if budget.size_bytes is None else sizes.total(solved.forms) - int(budget.size_bytes)
        if excess <= 0:
            return solved
        correction = replace(correction, spare_bytes=correction.spare_bytes + excess + 16)
    raise InfeasibleError(f"no plan of at most {budget.size_bytes:,.0f} B was found in {ROUNDS} rounds; relax --size by 1 %")


def check_model(model: Model, plan: Plan) -> None:
    """Raise unless a plan was made for this model, and for a target that is known.

    Raises:
        InputError: it was not.
    """
    if model.sha256 != plan.menu.model_sha256:
        raise InputError(
            f"plan: it was made for the model with SHA-256 {plan.menu.model_sha256[:12]}…, not for {model.path or 'this one'} "
            f"({model.sha256[:12]}…); solve again with `intaglio plan`"
        )
    if plan.menu.target not in TARGETS:
        raise InputError(f"plan: target {plan.menu.target!r} is unknown; expected one of {', '.join(TARGETS)}")
    if plan.menu.integers not in INTEGERS:
        raise InputError(f"plan: integers {plan.menu.integers!r} are unknown; expected one of {', '.join(INTEGERS)}")
