"""Build a plan: fit the chosen forms and rewrite the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from intaglio.ops.form import UNCHANGED, Form
from intaglio.ops.moment import Moment

from .calibrate import calibrate, moment_parts
from .errors import InputError
from .fit import store
from .graph import all_names
from .job import Job
from .model import Model
from .options import Progress, silent
from .parallel import in_parallel, workers
from .price import noise
from .rewrite import Fragment, declines, fragment, ghosts, rewrite, spooled
from .sites import Site

FIT_STAGES = 6
"""Most stages of the sequential fit, unless memory asks for more: each recalibrates on the compressed prefix."""


def build(job: Job, forms: Mapping[str, Form], *, progress: Progress = silent) -> Model:
    """Fit the chosen forms, stage by stage on inputs from the compressed prefix, and rewrite the model.

    Raises:
        InputError: a form names an unknown site, or one that cannot take it.
    """
    sites = {site.name: site for site in job.sites}
    for name, form in forms.items():
        if name not in sites:
            raise InputError(f"plan: site {name!r} is not in the model; solve again for this model")
        reason = None if form == UNCHANGED else declines(sites[name], form)
        if reason:
            raise InputError(f"plan: site {name!r} cannot take {form}: {reason}; choose another form")
    chosen = [site for site in job.sites if forms.get(site.name, UNCHANGED) != UNCHANGED]
    taken = frozenset(all_names(job.model.proto))
    fragments: dict[str, Fragment] = {}
    current = job.model
    stages = _stages(chosen)
    for stage in progress(stages, "Fitting", len(stages)):
        with job.clock.phase("fit"):
            moments = calibrate(current, stage, job.shapes, job.data, job.splits.fit, job.calibration, seed=job.settings.seed)
            for site, part in zip(stage, in_parallel(partial(_fitted, job, forms, moments, taken), stage, workers(stage)), strict=True):
                fragments[site.name] = part
            current = rewrite(job.model, fragments, chosen)
    return current


def _fitted(job: Job, forms: Mapping[str, Form], moments: Mapping[str, Moment], taken: frozenset[str], site: Site) -> Fragment:
    """Fit one site; its arrays go to the model's spool, if that has one, and not into memory."""
    value, form = site.value(job.model), forms[site.name]
    arrays, _ = store(site, form, value, site.matrix(value), moments[site.name].shrunk())
    return spooled(fragment(site, form, arrays, job.model.proto, taken), job.model.weights)


def mock(job: Job, forms: Mapping[str, Form]) -> Model:
    """The rewritten model with noise in place of fitted arrays: as large and as fast as the real one."""
    rng, taken = np.random.default_rng(job.settings.seed), frozenset(all_names(job.model.proto))
    chosen = [site for site in job.sites if forms.get(site.name, UNCHANGED) != UNCHANGED]
    fragments = {}
    for site in chosen:
        arrays = tuple(tuple(noise(array, rng) for array in packed) for packed in ghosts(site, forms[site.name]))
        fragments[site.name] = fragment(site, forms[site.name], arrays, job.model.proto, taken)
    return rewrite(job.model, fragments, chosen)


def _stages(sites: Sequence[Site]) -> list[list[Site]]:
    """Consecutive sites, in about `FIT_STAGES` stages or as many as their moments' memory needs."""
    stages: list[list[Site]] = []
    share = -(-len(sites) // FIT_STAGES)
    for start in range(0, len(sites), max(1, share)):
        stages += moment_parts(sites[start : start + share])
    return stages
