"""Teach what a plan leaves out in floats first, and round it afterwards.

Before: the forms of an attempt. After: the job on weights that the original has taught while nothing was rounded; the attempt's forms are
then fitted to these.

Codes are chosen so that their errors cancel (`ops.rounding`). An optimizer that moves them through the straight-through estimator loses
that first, and earns it back only with many steps. What a low rank, a small kernel or lost channels take away has nothing to do with grids:
it is learnt in floats, and rounding what was learnt, compensated, costs what it cost before.

Must not fire where no form leaves anything out but by rounding (the student would be the original), with few steps, or where two models do
not fit in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from intaglio.ops.form import PRUNED, UNCHANGED, Form

from .build import fit_forms
from .decoded import continued
from .job import Job
from .options import Progress
from .tune import TuneResult
from .tuning import fewest_steps, tuned

UNROUNDED_SHARE = 2 / 3
"""Share of the steps that are made in floats, where any are."""

_LEAST_STEPS = 100
"""Fewer steps in all are not worth two more fits."""


@dataclass(frozen=True, eq=False)
class Unrounded:
    """What was learnt in floats.

    Attributes:
        job: on the weights that were taught; None where nothing was learnt.
        result: of the tuning.
    """

    job: Job | None
    result: TuneResult


def taught_unrounded(job: Job, forms: Mapping[str, Form], progress: Progress) -> Unrounded | None:
    """Teach forms in floats as the settings say; None where nothing would be learnt.

    Args:
        job: the job that the forms were chosen for.
        forms: of the plan.
        progress: shows how far it is.
    """
    if fewest_steps(job.settings.tune) < _LEAST_STEPS or not job.small or not any(map(leaves_out, forms.values())):
        return None
    loose = unrounded(forms)
    fitted = fit_forms(job, loose, keep=True, progress=progress)
    result = tuned(job, loose, fitted, share=UNROUNDED_SHARE, progress=progress)
    assert result is not None  # the settings ask for steps
    return Unrounded(continued(job, loose, result.fitted) if result.improved else None, result)


def leaves_out(form: Form) -> bool:
    """Whether a form lacks more of its weight than rounding takes."""
    return form.decomposition == PRUNED or (bool(form.ranks) and form.decomposition != "residual")


def unrounded(forms: Mapping[str, Form]) -> dict[str, Form]:
    """The forms in floats; what does not change, and operators without weights, stay as in the original."""
    return {name: _unrounded(form) for name, form in forms.items()}


def _unrounded(form: Form) -> Form:
    if form.decomposition == UNCHANGED.decomposition:
        return UNCHANGED
    return replace(form, storage="float", arithmetic="float") if leaves_out(form) else Form("dense", (), "float")
