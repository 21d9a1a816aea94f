"""Build a plan: fit the chosen forms and rewrite the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from intaglio.ops.form import CARRIED, PRUNED, UNCHANGED, Form
from intaglio.ops.moment import Moment
from intaglio.ops.rounding import bias_shift

from .assemble import assemble, nominal_ranges
from .bias import corrected, find_bias
from .calibrate import calibrate, moment_parts
from .curvature import output_metrics
from .cuts import Cut
from .errors import InputError
from .fit import Arrays, rebuilt, store
from .graph import ValueIndex, all_names
from .integer import place
from .job import Job
from .model import Model
from .options import Progress, silent
from .parallel import in_parallel, workers
from .price import noise
from .ranges import METHODS, Range, collect
from .refit import channel_orders, channels_of, fit_pruned, original_moments
from .regions import Carrier
from .rewrite import Fragment, declines, fragment, ghosts, rewrite, spooled
from .sites import Site
from .timing import as_run

FIT_STAGES = 6
"""Most stages of the sequential fit, unless memory asks for more: each recalibrates on the compressed prefix."""

SLOPED = ("lowrank", "channel_svd")
"""Decompositions that keep the components which the labelled loss says, where a job has slopes."""

RANGE_SAMPLES = 256
"""Fit samples from which the ranges of activations are taken."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """The chosen forms with what they hold, not yet put together.

    Attributes:
        fragments: by site name; their arrays may lie in the model's spool.
        cuts: the channel groups that pruned sites have cut, with the channels that stay.
        packed: by site name, the arrays that each form's storages wrote, one tuple per array of the form; empty unless asked for.
        constants: new contents of initializers that stay, in the shape that they have once channels are cut; they go before what
            fragments change.
    """

    fragments: Mapping[str, Fragment]
    cuts: tuple[Cut, ...] = ()
    packed: Mapping[str, Arrays] = field(default_factory=dict)
    constants: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


def build(job: Job, forms: Mapping[str, Form], *, progress: Progress = silent) -> Model:
    """Fit the chosen forms, stage by stage on inputs from the compressed prefix, and rewrite the model.

    Pruned sites are fitted on inputs from the original model, as those have all channels there.

    Raises:
        InputError: a form names an unknown site, or one that cannot take it.
    """
    return finish(job, forms, fit_forms(job, forms, progress=progress))


def fit_forms(job: Job, forms: Mapping[str, Form], *, keep: bool = False, progress: Progress = silent) -> Fitted:
    """The first half of `build`: every chosen form with its arrays.

    Args:
        job: the job.
        forms: by site or carrier name.
        keep: whether packed arrays are kept in memory, for a pass that goes on changing them.
        progress: shows how far it is.

    Raises:
        InputError: a form names an unknown site, or one that cannot take it.
    """
    check(job, forms)
    chosen = chosen_sites(job, forms)
    taken = frozenset(all_names(job.model.proto))
    index = ValueIndex(job.model.proto)
    fragments: dict[str, Fragment] = {}
    packed: dict[str, Arrays] = {}
    current, metrics = job.model, output_metrics(job)
    stages = _stages([site for site in chosen if forms[site.name].decomposition != PRUNED])
    for stage in progress(stages, "Fitting", len(stages)):
        with job.clock.phase("fit"):
            moments = calibrate(current, stage, job.shapes, job.data, job.splits.fit, job.calibration, seed=job.settings.seed)
            moments = {name: metrics.weigh(name, moment) for name, moment in moments.items()}
            fit = partial(_fitted, job, forms, moments, taken, index, keep)
            for site, (part, arrays) in zip(stage, in_parallel(fit, stage, workers(stage)), strict=True):
                fragments[site.name] = part
                packed |= {site.name: arrays} if keep else {}
            current = rewrite(job.model, fragments, chosen)
    cuts = _cuts(job, forms)
    with job.clock.phase("fit"):
        for name, (part, arrays) in _pruned(job, forms, [site for site in chosen if site.name not in fragments], cuts, taken, index, keep):
            fragments[name] = part
            packed |= {name: arrays} if keep else {}
    return Fitted(fragments, cuts, packed)


def finish(job: Job, forms: Mapping[str, Form], fitted: Fitted) -> Model:
    """The second half of `build`: put what was fitted together, and calibrate the ranges of what runs in integers."""
    with job.clock.phase("fit"):
        chosen, ranges = chosen_sites(job, forms), partial(quantization_ranges, job)
        return assemble(job.model, fitted.fragments, chosen, carried_nodes(job, forms), ranges, fitted.cuts, fitted.constants)


def check(job: Job, forms: Mapping[str, Form]) -> None:
    """Raise unless every form fits what it names.

    Raises:
        InputError: a form names an unknown site, or one that cannot take it, or layers disagree about their channels.
    """
    sites = {site.name: site for site in job.sites}
    carriers = {carrier.name for carrier in job.carriers}
    for name, form in forms.items():
        if name in carriers and form in (UNCHANGED, CARRIED):
            continue
        if name not in sites:
            raise InputError(f"plan: site {name!r} is not in the model; solve again for this model")
        reason = None if form == UNCHANGED else declines(sites[name], form)
        if reason:
            raise InputError(f"plan: site {name!r} cannot take {form}: {reason}; choose another form")
    _placeholders(job, forms)


def chosen_sites(job: Job, forms: Mapping[str, Form]) -> list[Site]:
    """The sites whose weights change."""
    return [site for site in job.sites if forms.get(site.name, UNCHANGED) != UNCHANGED]


def carried_nodes(job: Job, forms: Mapping[str, Form]) -> list[Carrier]:
    """The operators without weights that run in integers."""
    return [carrier for carrier in job.carriers if forms.get(carrier.name, UNCHANGED) == CARRIED]


def _placeholders(job: Job, forms: Mapping[str, Form]) -> tuple[Cut, ...]:
    """The groups that forms cut, before it is known which channels stay; none of them is looked for where nothing is pruned."""
    return channels_of(job).cuts(forms) if any(form.decomposition == PRUNED for form in forms.values()) else ()


def _cuts(job: Job, forms: Mapping[str, Form]) -> tuple[Cut, ...]:
    """The groups that forms cut, with the channels that stay."""
    names = frozenset(cut.group.name for cut in _placeholders(job, forms))
    return channels_of(job).cuts(forms, channel_orders(job, names)) if names else ()


def _pruned(
    job: Job,
    forms: Mapping[str, Form],
    sites: Sequence[Site],
    cuts: Sequence[Cut],
    taken: frozenset[str],
    index: ValueIndex,
    keep: bool,
) -> Iterator[tuple[str, tuple[Fragment, Arrays]]]:
    """Fit the pruned sites: name, and what `_fitted` returns of it."""
    by_group = {cut.group.name: cut for cut in cuts}
    for part in moment_parts(sites):
        moments = original_moments(job, part)

        def fit(site: Site, moments: Mapping[str, Moment] = moments) -> tuple[Fragment, Arrays]:
            moment, channels = moments[site.name].shrunk(), channels_of(job)
            fitted, arrays = fit_pruned(job.model, site, forms[site.name], moment, channels, by_group, taken, index)
            return spooled(fitted, job.model.weights), arrays if keep else ()

        yield from zip((site.name for site in part), in_parallel(fit, part, workers(part)), strict=True)


def _fitted(
    job: Job,
    forms: Mapping[str, Form],
    moments: Mapping[str, Moment],
    taken: frozenset[str],
    index: ValueIndex,
    keep: bool,
    site: Site,
) -> tuple[Fragment, Arrays]:
    """Fit one site; its arrays go to the model's spool, if that has one, and are returned only if they are to be kept."""
    form, moment = forms[site.name], moments[site.name].shrunk()
    if form.decomposition in SLOPED:
        slope = job.slopes.get(site.name)
        moment = moment.with_slope(None if slope is None else slope.astype(np.float64))
    value = site.value(job.model)
    arrays, decoded = store(site, form, value, site.matrix(value), moment)
    part = fragment(site, form, arrays, job.model.proto, taken)
    bias = find_bias(job.model, site, index)
    if bias is not None and moment.mean is not None:
        shift = bias_shift(site.matrix(value), rebuilt(site, form, decoded), moment)
        part = replace(part, changes={bias.name: corrected(job.model, bias, shift)})
    return spooled(part, job.model.weights), arrays if keep else ()


def quantization_ranges(job: Job, model: Model, operators: Sequence[str], values: Sequence[str]) -> dict[str, Range]:
    """Ranges of the activations that are quantized: by the method that the settings name, or that harms the outputs least."""
    histograms = collect(model, values, job.data, job.splits.fit[: job.data.enough(RANGE_SAMPLES)], job.calibration)
    usable = {name: each for name, each in histograms.items() if each.reason is None}
    methods = METHODS if job.settings.ranges == "auto" else (job.settings.ranges,)
    found = [{name: Range.spanning(*METHODS[method](each)) for name, each in usable.items()} for method in methods]
    if len(found) == 1:
        return found[0]
    probe = job.probe()
    return min(found, key=lambda ranges: probe.divergence(place(model, operators, ranges).proto))


def mock(job: Job, forms: Mapping[str, Form]) -> Model:
    """A model as fast as the rewritten one, with noise in place of fitted arrays and without what is folded when a model is loaded."""
    rng, taken = np.random.default_rng(job.settings.seed), frozenset(all_names(job.model.proto))
    run = {site.name: as_run(forms.get(site.name, UNCHANGED)) for site in job.sites}
    chosen = chosen_sites(job, run)
    fragments = {}
    for site in chosen:
        arrays = tuple(tuple(noise(array, rng) for array in packed) for packed in ghosts(site, run[site.name]))
        fragments[site.name] = fragment(site, run[site.name], arrays, job.model.proto, taken)
    return assemble(job.model, fragments, chosen, carried_nodes(job, forms), nominal_ranges, _placeholders(job, forms))


def _stages(sites: Sequence[Site]) -> list[list[Site]]:
    """Consecutive sites, in about `FIT_STAGES` stages or as many as their moments' memory needs."""
    stages: list[list[Site]] = []
    share = -(-len(sites) // FIT_STAGES)
    for start in range(0, len(sites), max(1, share)):
        stages += moment_parts(sites[start : start + share])
    return stages
