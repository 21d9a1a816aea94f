"""Analyse a job: price every form of every site. Everything that is expensive and does not depend on a budget happens here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from intaglio.ops.arithmetic import ARITHMETICS
from intaglio.ops.form import CARRIED, PRUNED, UNCHANGED, Form
from intaglio.ops.moment import Moment
from intaglio.solver import Cost

from .activations import Activations, measure_activations
from .build import mock
from .cache import Cache
from .calibrate import calibrate, moment_parts
from .coupling import Coupling, Terms, ValuePrice, couple
from .curvature import output_metrics
from .divergence import Kind
from .fit import pack
from .job import Job
from .latency import MicroBench, compare_models
from .options import Progress, silent
from .parallel import in_parallel, workers
from .partners import Group, Partners, partners_of
from .plan import Candidate, Menu
from .price import SizePricer
from .propose import Allowed, Proposal, propose
from .prune import Channels
from .recall import Finding, Findings
from .refit import channel_orders, channels_of, pruned_forms, pruning_trials
from .rewrite import ghosts
from .sensitivity import Curve, Probe, Sensitivity
from .session import open_session
from .sites import Site
from .timing import LatencyPricer, changes_latency

TRIAL_ERRORS = (0.02, 0.15)
"""Relative truncation errors near which each site's curve is measured."""

TRIAL_ROUNDINGS = (0.004, 0.05)
"""Relative rounding errors near which each site's curve is measured."""

SLOWER = 0.02
"""Share of an operator's time that a form may add where nobody asked for time: noise. The product of the same factors adds none."""

_TIMING_S = 0.04
"""Seconds spent on timing one form against the original operator."""


Linear = Mapping[str, Mapping[Form, float]]
"""Linear terms by site and form."""

Joint = Callable[[Mapping[str, Finding]], tuple[Mapping[str, Finding], Linear]]
"""What labels say of findings: the findings, truncations perhaps changed, and linear terms."""


def analyse(job: Job, cache: Cache, *, latency: bool, progress: Progress = silent, joint: Joint | None = None) -> Menu:
    """Price every form of every site.

    Args:
        job: from `open_job`.
        cache: of latencies, and of what was found out about each site.
        latency: whether forms are timed; without, only those that no other form beats in size and divergence are.
        progress: shows how far the analysis is.
        joint: what labels say of the findings, where they take part.
    """
    sizes = job.sizes()
    allowed = _allowed(job, latency)
    channels = channels_of(job) if PRUNED in allowed.decompositions else Channels()
    partners = partners_of(job)
    known = Findings(job, allowed, cache)
    findings: Mapping[str, Finding] = _find(job, allowed, channels, partners, known, progress)
    linear: Linear = {}
    if joint is not None:
        findings, linear = joint(findings)
    with job.clock.phase("price"):
        timer, base_s = _timer(job, cache, latency)
        narrow = latency and timer is not None
        activations = Activations()
        if timer is not None and narrow:
            activations = measure_activations(job, findings, known, timer.worthwhile)
        rows = {site.name: _priced(site, findings[site.name], sizes, linear.get(site.name, {})) for site in job.sites}
        if timer is not None and narrow:
            _calibrate_integers(job, rows, activations, timer)
        coupling = _coupling(activations, sizes, timer)
        groups = dict.fromkeys(partners.groups.values()) if narrow else ()
        overlaps = {group: sizes.overlap_bytes({site.name: group.form for site in group.sites}) for group in groups}
        candidates = {}
        for site in progress(job.sites.sites, "Timing", len(job.sites)):
            offered = _offered(site, rows[site.name], activations, coupling, partners, timer, latency)
            candidates[site.name] = _agreeing(site, channels, partners, overlaps, offered)
        for carrier in activations.carriers:
            if timer is not None:
                candidates[carrier.name] = _carrier_candidates(carrier.name, timer.carry(carrier), coupling)
    shared = {
        **coupling.resources,
        **channels.resources(),
        **partners.resources(),
        **activations.dynamic_costs(),
        **{name: Cost(size) for name, size in sizes.shared.items()},
    }
    unit = "relative_mse" if Kind.VALUES in job.kinds else "kl_nats"
    base = Cost(sizes.base_bytes, base_s, 0.0)
    made = (job.equalized, job.lineage, job.floors, job.settings.target, job.settings.integers)
    return Menu(job.original.sha256, candidates, base, shared, unit, *made)


def _allowed(job: Job, latency: bool) -> Allowed:
    """The forms that race: fewer channels by default only where latency counts, as they make the analysis longer."""
    allowed = job.settings.allowed()
    if not latency or job.settings.decompositions:
        return allowed
    return replace(allowed, decompositions=(*allowed.decompositions, PRUNED))


def _find(job: Job, allowed: Allowed, channels: Channels, partners: Partners, known: Findings, progress: Progress) -> dict[str, Finding]:
    """The finding of every site: as known, or made and noted at once, so that an interrupted analysis goes on where it stopped."""
    found = {site.name: finding for site in job.sites if (finding := known.get(site.name)) is not None}
    wanted = [site for site in job.sites if site.name not in found]
    if not wanted:
        return found
    probe = job.probe()
    orders = channel_orders(job) if channels.groups else {}
    metrics = output_metrics(job)

    def look(measured: tuple[Site, Moment]) -> tuple[Site, Moment, tuple[Proposal, ...]]:
        site, moment = measured[0], measured[1].shrunk()
        with job.clock.phase("propose"):
            value = site.value(job.model)
            pruned = pruned_forms(channels, site, value, moment, orders)
            moment = metrics.weigh(site.name, moment)
            return site, moment, propose(site, value, moment, partners.admitted(site.name, allowed), pruned)[0]

    looked = in_parallel(look, measured_sites(job, wanted), workers(wanted))
    for site, moment, proposals in progress(looked, "Analysing", len(wanted)):
        with job.clock.phase("price"):
            value = site.value(job.model)
            trials = pruning_trials(channels, site, value, moment, orders)
            curves = _sensitivity(site, value, moment, proposals, probe, trials)
        found[site.name] = Finding(proposals, curves)
        known.put(site.name, found[site.name])
    return found


def _timer(job: Job, cache: Cache, latency: bool) -> tuple[LatencyPricer | None, float]:
    """What times forms, and seconds of one run of the model; nothing and 0 for a model that is too large to be held only for that.

    Where floors make the model faster than the original, the seconds are the original's: budgets refer to those.
    """
    if not latency and not job.small:
        return None, 0.0
    runtime = job.settings.runtime
    session = open_session(job.model.proto, weights=job.model.weights, threads=runtime.threads, providers=runtime.providers)
    bench = MicroBench(cache, runtime.providers, runtime.threads, budget_s=_TIMING_S)
    timer = LatencyPricer(job.model, job.shapes, bench, job.value_shapes, partners_of(job), job.integers)
    base_s = timer.calibrate(job.sites.sites, session.bind(job.data.first(1)))
    if job.floors and not job.lineage:
        original = open_session(job.original.proto, weights=job.original.weights, threads=runtime.threads, providers=runtime.providers)
        base_s /= compare_models(original, session, job.data.first(1), pairs=25).ratio
    return timer, base_s


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


def _sensitivity(
    site: Site,
    value: NDArray[Any],
    moment: Moment,
    proposals: Sequence[Proposal],
    probe: Probe,
    pruned: Sequence[tuple[float, NDArray[Any]]] = (),
) -> Sensitivity:
    """Measure a site's curves on a few trial forms that are folded at load, in floats, and on weights without some of their inputs."""
    whole = [p for p in proposals if p.form.execution == "dense" and p.form.arithmetic == "float"]
    dense = [p for p in whole if p.form.decomposition == "dense" and p.rounding > 1e-6]
    lowrank = [p for p in whole if p.form.storage == "float" and p.form.ranks and p.truncation > 0]

    def measured(trials: Iterable[Proposal]) -> list[tuple[float, float]]:
        points = []
        for trial in trials:
            _, weight = pack(site, trial.form, value, moment)
            points.append((trial.truncation + trial.rounding, probe.replaced(site, site.stored(weight))))
        return points

    def rounded(trials: Sequence[Proposal]) -> list[tuple[float, float]]:
        """The trials; where outputs overflow in all of them, finer ones too, down to one that they do not overflow in."""
        points = measured(trials)
        finer = sorted((p for p in dense if p.rounding < min(t.rounding for t in trials)), key=lambda p: -p.rounding) if trials else []
        while finer and not any(np.isfinite(divergence) for _, divergence in points):
            points += measured([finer.pop(0)])
        return points

    def finite(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [point for point in points if np.isfinite(point[1])] or points

    rounding = rounded(_nearest(dense, TRIAL_ROUNDINGS[1:] if probe.segmented else TRIAL_ROUNDINGS))
    if probe.segmented and rounding:
        lowrank = []  # every trial reads the whole file: one has to do
    truncation = finite(measured(_nearest(lowrank, TRIAL_ERRORS)))
    pruning = finite([(error, probe.replaced(site, weight)) for error, weight in pruned])
    curves = (rounding or truncation or pruning, truncation or rounding or pruning, pruning or truncation or rounding)
    return Sensitivity(*map(Curve.through, curves))


def _divergence(curves: Sensitivity, proposal: Proposal) -> float:
    """What a form does to the outputs, as predicted by the curves of its site."""
    left_out = curves.pruning if proposal.form.decomposition == PRUNED else curves.truncation
    return left_out(proposal.truncation) + curves.rounding(proposal.rounding)


def _nearest(proposals: Sequence[Proposal], errors: Sequence[float]) -> list[Proposal]:
    """The proposals whose errors are nearest, each once."""
    if not proposals:
        return []
    nearest = (min(proposals, key=lambda p: abs(np.log((p.truncation + p.rounding) / error))) for error in errors)
    return list({proposal.form: proposal for proposal in nearest}.values())


def _priced(site: Site, finding: Finding, sizes: SizePricer, linear: Mapping[Form, float]) -> list[Candidate]:
    """Sizes, divergences and linear terms of the forms that no other form of the same operators beats in both."""
    rows, curves = [], finding.curves
    for proposal in _worthwhile(site, finding, linear):
        size = sizes.price(site, proposal.form)
        divergence = _divergence(curves, proposal)
        error, term = proposal.truncation + proposal.rounding, linear.get(proposal.form, 0.0)
        rows.append(Candidate(proposal.form, size.size_bytes, 0.0, divergence, error, size.shared, linear=term))
    return [row for row in rows if np.isfinite(row.divergence)]


def _worthwhile(site: Site, finding: Finding, linear: Mapping[Form, float]) -> Iterator[Proposal]:
    """Of the forms that run alike, those on the frontier of payload bytes and divergence, linear terms included."""
    curves = finding.curves
    alike: dict[object, list[tuple[int, float, Proposal]]] = {}
    for proposal in finding.proposals:
        form = proposal.form
        if form == UNCHANGED:
            yield proposal
            continue
        payload = sum(array.nbytes for packed in ghosts(site, form) for array in packed)
        divergence = _divergence(curves, proposal) + linear.get(form, 0.0)
        runs = (form.decomposition, form.ranks) if form.execution == "contract" else ()
        native = form.storage if form.arithmetic in ("nbits", "rows") else ""
        alike.setdefault((form.arithmetic, form.execution, runs, native), []).append((payload, divergence, proposal))
    for rows in alike.values():
        least = np.inf
        for _, divergence, proposal in sorted(rows, key=lambda row: row[:2]):
            if divergence < least:
                least = divergence
                yield proposal


def _calibrate_integers(job: Job, rows: Mapping[str, Sequence[Candidate]], activations: Activations, timer: LatencyPricer) -> None:
    """Agree with the whole model at its most integer: how much that saves is measured, not summed up."""
    forms = {}
    for site in job.sites:
        if site.name in activations.units:
            form = Form("dense", (), "int8", "dense", "integer")
            forms[site.name] = form if any(row.form == form for row in rows[site.name]) else UNCHANGED
    forms = {name: form for name, form in forms.items() if form != UNCHANGED}
    if not forms:
        return
    sites = {site.name: site for site in job.sites}
    changes = {name: timer.change(sites[name], form) for name, form in forms.items()}
    changes |= {carrier.name: timer.carry(carrier) for carrier in activations.carriers}
    carried = {carrier.name: CARRIED for carrier in activations.carriers}
    runtime = job.settings.runtime
    sessions = [
        open_session(each.proto, weights=each.weights, threads=runtime.threads, providers=runtime.providers)
        for each in (job.model, mock(job, forms | carried))
    ]
    latency = compare_models(sessions[0], sessions[1], job.data.first(1), pairs=25)
    timer.calibrate_integers(changes, latency.candidate_s - latency.reference_s)


def _coupling(activations: Activations, sizes: SizePricer, timer: LatencyPricer | None) -> Coupling:
    """What lies between operators in floats and in integers."""
    if timer is None or not activations.units:
        return Coupling()
    values = dict.fromkeys(name for unit in activations.units.values() for name in (*unit.inputs, *unit.outputs))
    prices = {value: ValuePrice(sizes.pair_bytes(value), *timer.boundary(value), activations.divergence[value]) for value in values}
    return couple(activations.units, prices, activations.outside)


def _offered(
    site: Site,
    rows: Sequence[Candidate],
    activations: Activations,
    coupling: Coupling,
    partners: Partners,
    timer: LatencyPricer | None,
    latency: bool,
) -> tuple[Candidate, ...]:
    """The candidates of a site: with the latencies of those that may matter, and coupled to their neighbours.

    Where weights of one operator change together, its latency counts for the first of them.
    """
    dense = [row for row in rows if not changes_latency(row.form)]
    kept = []
    for row in rows:
        form = row.form
        terms = coupling.terms(site.name, integer=form.arithmetic == "integer")
        if form.arithmetic == "dynamic":
            terms = Terms(activations.dynamic_needs(site))
        row = replace(row, needs=(*row.needs, *terms.needs), provides=terms.provides)
        if not changes_latency(form):
            kept.append(row)
            continue
        group = partners.group(site.name, form)
        first = site if group is None else group.sites[0]
        if timer is None or not timer.measurable(first) or (group is not None and site.name not in activations.inputs):
            continue
        if form.arithmetic != "float" and (not latency or (ARITHMETICS[form.arithmetic].coupled and site.name not in activations.units)):
            continue
        beaten = any(other.size_bytes <= row.size_bytes and _harm(other) <= _harm(row) for other in dense)
        if not latency and beaten:
            continue
        change_s = timer.change(site, form) if first is site else 0.0
        if latency or change_s <= SLOWER * timer.reference(site):
            kept.append(replace(row, latency_s=change_s))
    return tuple(kept)


def _harm(candidate: Candidate) -> float:
    """Divergence, or where labels take part what it and the linear term say of the loss."""
    return candidate.divergence + candidate.linear


def _agreeing(
    site: Site, channels: Channels, partners: Partners, overlaps: Mapping[Group, int], rows: Sequence[Candidate]
) -> tuple[Candidate, ...]:
    """The candidates of a site, coupled to those of the layers that share channels with it, and of the weights beside it.

    Args:
        site: the site.
        channels: of the model.
        partners: of the model.
        overlaps: bytes that the prices of a group's sites count twice; they are taken off the first one's.
        rows: its candidates.
    """
    coupled = []
    for row in rows:
        shared, beside = channels.terms(site, row.form), partners.terms(site.name, row.form)
        group = partners.group(site.name, row.form)
        saved = shared.saved_bytes + (overlaps[group] if group is not None and group.sites[0] is site else 0)
        provides, requires = (*row.provides, *shared.provides, *beside.provides), (*shared.requires, *beside.requires)
        coupled.append(replace(row, size_bytes=row.size_bytes - saved, provides=provides, requires=requires))
    return tuple(coupled)


def _carrier_candidates(name: str, change_s: float, coupling: Coupling) -> tuple[Candidate, ...]:
    """In floats as before, or in integers."""
    floats, integers = coupling.terms(name, integer=False), coupling.terms(name, integer=True)
    return (
        Candidate(UNCHANGED, 0, 0.0, 0.0, 0.0, floats.needs, floats.provides),
        Candidate(CARRIED, 0, change_s, 0.0, 0.0, integers.needs, integers.provides, integers.requires),
    )
