"""Prepare a job for integers: rescale channels where that makes rounding cheaper.

`equalize` does not change what a model computes, but whether it helps depends on the model, so it is judged by measurement: weights and
activations are rounded crudely in the model before and after, and the outputs are compared with the original's.
"""

from __future__ import annotations

from dataclasses import replace

from intaglio.ops.families import FAMILIES
from intaglio.ops.form import Form
from intaglio.ops.moment import Moment
from intaglio.ops.rounding import Rounding

from .analyse import measured_sites
from .equalize import equalize
from .fit import pack
from .graph import MAIN
from .integer import fake_quantized
from .job import Job
from .model import Model
from .ranges import calibrated
from .regions import MIN_OPSET, find_carriers
from .rewrite import Fragment, declines, rewrite
from .sites import Sites, find_sites

CLEARLY_LESS = 0.9
"""Divergence after equalization, relative to that before, below which it is kept."""

RANGE_SAMPLES = 64
"""Fit samples from which ranges are taken."""

_CRUDE = Form("dense", (), "int4")
_NARROW = frozenset(("integer", "dynamic"))


def equalized(job: Job, *, always: bool = False) -> Job:
    """The job with an equalized model, where equalization clearly helps integers; otherwise the job itself.

    Args:
        job: from `open_job`.
        always: equalize whether it helps or not, as a plan says that was made so.
    """
    if not (always or (job.small and _NARROW.intersection(job.settings.allowed().arithmetics))):
        return job
    moments = {site.name: moment for site, moment in measured_sites(job)}
    with job.clock.phase("canonicalize"):
        model, _ = equalize(job.model, job.sites, moments)
        if model is job.model:
            return job
        twin = replace(reopened(job, model), equalized=True)
        if not always:
            before, after = _rounded_divergence(job, moments), _rounded_divergence(twin, moments)
            if after >= CLEARLY_LESS * before:
                return job
    return twin


def reopened(job: Job, model: Model) -> Job:
    """The job on another model with the same sites and values."""
    found = {site.name: site for site in find_sites(model)}
    sites = Sites(tuple(found[site.name] for site in job.sites), job.sites.skipped)
    return replace(job, model=model, sites=sites, carriers=find_carriers(model) if job.carriers else ())


def _rounded_divergence(job: Job, moments: dict[str, Moment]) -> float:
    """Divergence of the outputs when every weight goes to four bits and every activation that a weight reads to eight, crudely."""
    fragments, values = {}, []
    for site in job.sites:
        if site.uses[0].scope != MAIN or site.opset < MIN_OPSET or declines(site, _CRUDE):
            continue
        _, weight = pack(site, _CRUDE, site.value(job.model), moments[site.name].shrunk(), Rounding(compensate=False))
        fragments[site.name] = Fragment((), (), {site.anchor: site.stored(weight)}, {})
        if site.op_type != "Gather":
            values.append(FAMILIES[site.use.key].activation(site.use)[0])
    rounded = rewrite(job.model, fragments, job.sites.sites)
    values = list(dict.fromkeys(values))
    ranges = calibrated(rounded, values, job.data, job.splits.fit[: job.data.enough(RANGE_SAMPLES)], job.calibration, "mse")
    return job.probe().divergence(fake_quantized(rounded, list(ranges), ranges).proto)
