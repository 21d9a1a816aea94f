"""Analyse a job: price every form of every site. Everything that is expensive and does not depend on a budget happens here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from intaglio.ops.moment import Moment
from intaglio.solver import Cost

from .cache import Cache
from .calibrate import calibrate, moment_parts
from .divergence import Kind
from .fit import pack
from .job import Job
from .latency import MicroBench
from .options import Progress, silent
from .parallel import in_parallel, workers
from .plan import Candidate, Menu
from .price import LatencyPricer, SizePricer
from .propose import Allowed, Proposal, propose
from .recall import Finding, Findings
from .sensitivity import Curve, Probe, Sensitivity
from .session import open_session
from .sites import Site
from .targets import TARGETS

PROBE_SAMPLES = 48
"""Fit samples on which trial forms are measured."""

TRIAL_ERRORS = (0.02, 0.15)
"""Relative truncation errors near which each site's curve is measured."""

_TIMING_S = 0.04
"""Seconds spent on timing one form against the original operator."""


def analyse(job: Job, cache: Cache, *, latency: bool, progress: Progress = silent) -> Menu:
    """Price every form of every site.

    Args:
        job: from `open_job`.
        cache: of latencies, and of what was found out about each site.
        latency: whether forms are timed; without, only those that no other form beats in size and divergence are.
        progress: shows how far the analysis is.
    """
    settings = job.settings
    sizes = job.sizes()
    target = TARGETS[settings.target]
    allowed = target.allowed(settings.decompositions, settings.storages)
    findings = _find(job, allowed, Findings(job, allowed, cache), progress)
    with job.clock.phase("price"):
        timer, base_s = _timer(job, cache, latency)
        candidates = {
            site.name: _priced(site, findings[site.name], sizes, timer, latency)
            for site in progress(job.sites.sites, "Timing", len(job.sites))
        }
    unit = "relative_mse" if Kind.VALUES in job.kinds else "kl_nats"
    return Menu(job.original.sha256, candidates, Cost(sizes.base_bytes, base_s, 0.0), sizes.shared, unit)


def _find(job: Job, allowed: Allowed, known: Findings, progress: Progress) -> dict[str, Finding]:
    """The finding of every site: as known, or made and noted at once, so that an interrupted analysis goes on where it stopped."""
    found = {site.name: finding for site in job.sites if (finding := known.get(site.name)) is not None}
    wanted = [site for site in job.sites if site.name not in found]
    if not wanted:
        return found
    rng = np.random.default_rng(job.settings.seed)
    count = min(PROBE_SAMPLES, len(job.splits.fit))
    probe = Probe(job.model, job.kinds, job.data, np.sort(rng.choice(job.splits.fit, count, replace=False)), job.calibration)

    def look(measured: tuple[Site, Moment]) -> tuple[Site, Moment, tuple[Proposal, ...]]:
        site, moment = measured[0], measured[1].shrunk()
        with job.clock.phase("propose"):
            return site, moment, propose(site, site.value(job.model), moment, allowed)[0]

    looked = in_parallel(look, measured_sites(job, wanted), workers(wanted))
    for site, moment, proposals in progress(looked, "Analysing", len(wanted)):
        with job.clock.phase("price"):
            curves = _sensitivity(site, site.value(job.model), moment, proposals, probe)
        found[site.name] = Finding(proposals, curves)
        known.put(site.name, found[site.name])
    return found


def _timer(job: Job, cache: Cache, latency: bool) -> tuple[LatencyPricer | None, float]:
    """What times forms, and seconds of one run of the model; nothing and 0 for a model that is too large to be held only for that."""
    if not latency and not job.small:
        return None, 0.0
    runtime = job.settings.runtime
    session = open_session(job.model.proto, weights=job.model.weights, threads=runtime.threads, providers=runtime.providers)
    bench = MicroBench(cache, runtime.providers, runtime.threads, budget_s=_TIMING_S)
    timer = LatencyPricer(job.model, job.shapes, bench)
    return timer, timer.calibrate(job.sites.sites, session.bind(job.data.first(1)))


def measured_sites(job: Job, wanted: Sequence[Site] | None = None) -> Iterator[tuple[Site, Moment]]:
    """Every site with the second moment of its input; or the wanted ones, whose moments do not depend on which others are wanted."""
    wanted = job.sites.sites if wanted is None else wanted
    for sites in moment_parts(job.sites.sites):
        if not any(site in wanted for site in sites):
            continue
        with job.clock.phase("calibrate"):
            moments = calibrate(job.model, sites, job.shapes, job.data, job.splits.fit, job.calibration, seed=job.settings.seed)
        for site in sites:
            if site in wanted:
                yield site, moments[site.name]


def _sensitivity(site: Site, value: NDArray[Any], moment: Moment, proposals: Sequence[Proposal], probe: Probe) -> Sensitivity:
    """Measure a site's curves on a few trial forms: for rounding the coarsest storage, or the coarsest whose outputs are finite."""
    rounding: list[tuple[float, float]] = []
    dense = [p for p in proposals if p.form.decomposition == "dense" and p.rounding > 1e-6]
    for proposal in sorted(dense, key=lambda p: -p.rounding):
        _, weight = pack(site, proposal.form, value, moment)
        rounding.append((proposal.rounding, probe.replaced(site, site.stored(weight))))
        if np.isfinite(rounding[-1][1]):
            break
    truncation: list[tuple[float, float]] = []
    lowrank = [p for p in proposals if p.form.storage == "float" and p.form.execution == "dense" and p.form.ranks and p.truncation > 0]
    if probe.segmented and rounding:
        lowrank = []  # every trial reads the whole file: one has to do
    trials = {min(lowrank, key=lambda p: abs(np.log(p.truncation / error))).form: None for error in TRIAL_ERRORS if lowrank}
    for form in trials:
        error = next(p.truncation for p in lowrank if p.form == form)
        _, weight = pack(site, form, value, moment)
        truncation.append((error, probe.replaced(site, site.stored(weight))))
    return Sensitivity(Curve.through(rounding or truncation), Curve.through(truncation or rounding))


def _priced(site: Site, finding: Finding, sizes: SizePricer, timer: LatencyPricer | None, latency: bool) -> tuple[Candidate, ...]:
    """Sizes and divergences of all forms, latencies of those that may matter."""
    rows, curves = [], finding.curves
    for proposal in finding.proposals:
        size = sizes.price(site, proposal.form)
        divergence = curves.truncation(proposal.truncation) + curves.rounding(proposal.rounding)
        rows.append(Candidate(proposal.form, size.size_bytes, 0.0, divergence, proposal.truncation + proposal.rounding, size.shared))
    kept = []
    for row in (row for row in rows if np.isfinite(row.divergence)):
        contract = row.form.execution == "contract"
        beaten = any(
            other.size_bytes <= row.size_bytes and other.divergence <= row.divergence and other != row and other.form.execution == "dense"
            for other in rows
        )
        if not contract:
            kept.append(row)
        elif timer is not None and timer.measurable(site) and (latency or not beaten):
            kept.append(replace(row, latency_s=timer.change(site, row.form)))
    return tuple(kept)
