"""Build a plan: fit the chosen forms and rewrite the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from intaglio.ops.families import FAMILIES
from intaglio.ops.form import CARRIED, PRUNED, UNCHANGED, Form
from intaglio.ops.moment import Moment
from intaglio.ops.rounding import bias_shift

from .assemble import assemble, joined, nominal_ranges
from .bias import corrected, find_bias
from .calibrate import Pair, PairedSite, calibrate, calibrate_pairs, moment_parts
from .curvature import output_metrics
from .cuts import Cut
from .errors import InputError
from .fit import Arrays, rebuilt, store
from .floors import with_ceilings
from .frontier import Frontier
from .graph import MAIN, ValueIndex, all_names, downstream
from .integer import place
from .job import Job
from .match import FOLDS, levels, matchable, matched, mean_shift, pooled_moment
from .model import Model
from .options import Progress, silent
from .parallel import in_parallel, workers
from .partners import partners_of
from .price import packed_noise
from .ranges import METHODS, Range, collect
from .refit import channel_orders, channels_of, cut_weight, fit_pruned, kept_channels, match_pruned, original_moments
from .regions import Carrier
from .renormalize import renormalized
from .rewrite import Fragment, as_dense, declines, fragment, ghosts, spooled
from .sites import Site
from .targets import TARGETS
from .timing import as_run

FIT_STAGES = 6
"""Most stages of the sequential fit, unless memory asks for more: each recalibrates on the compressed prefix."""

MATCHED_STAGES = 64
"""Most stages where layers are matched. In deeper models only the first layers of each of the `FIT_STAGES` stages are."""

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

    def contents(self) -> list[NDArray[np.generic]]:
        """Every array that is kept, in an order that depends on names alone: what else they belong to is up to the forms."""
        packed = [array for name in sorted(self.packed) for packs in self.packed[name] for array in packs]
        changes = [array for name in sorted(self.fragments) for _, array in sorted(self.fragments[name].changes.items())]
        return [*packed, *changes, *(array for _, array in sorted(self.constants.items())), *(cut.kept for cut in self.cuts)]


def build(job: Job, forms: Mapping[str, Form], *, progress: Progress = silent) -> Model:
    """Fit the chosen forms, stage by stage on inputs from the compressed prefix against the original's outputs, and rewrite the model.

    Pruned sites are fitted on inputs from the original model first, as those have all channels there, so that a model without them runs.

    Raises:
        InputError: a form names an unknown site, or one that cannot take it.
    """
    return finish(job, forms, fit_forms(job, forms, progress=progress))


def fit_forms(job: Job, forms: Mapping[str, Form], *, keep: bool = False, match: bool = True, progress: Progress = silent) -> Fitted:
    """The first half of `build`: every chosen form with its arrays.

    Args:
        job: the job.
        forms: by site or carrier name.
        keep: whether packed arrays are kept in memory, for a pass that goes on changing them.
        match: whether layers are fitted to the original's outputs; else to their own weights. Models that do not fit in memory twice never
            match.
        progress: shows how far it is.

    Raises:
        InputError: a form names an unknown site, or one that cannot take it.
    """
    check(job, forms)
    fitting = _Fitting(job, forms, keep=keep, match=match and job.small)
    with job.clock.phase("fit"):
        fitting.cut()
    stages = _stages(job.model, fitting.chosen, match=fitting.match)
    for stage in progress(stages, "Fitting", len(stages)):
        with job.clock.phase("fit"):
            fitting.fit(stage)
    with job.clock.phase("fit"):
        return fitting.result()


def finish(job: Job, forms: Mapping[str, Form], fitted: Fitted) -> Model:
    """The second half of `build`: put what was fitted together, and calibrate the ranges of what runs in integers."""
    with job.clock.phase("fit"):
        chosen, ranges = chosen_sites(job, forms), partial(quantization_ranges, job)
        carried, domains = carried_nodes(job, forms), TARGETS[job.settings.target].domains
        return assemble(job.model, fitted.fragments, chosen, carried, ranges, fitted.cuts, fitted.constants, domains)


def check(job: Job, forms: Mapping[str, Form]) -> None:
    """Raise unless every form fits what it names.

    Raises:
        InputError: a form names an unknown site, or one that cannot take it, or is none of the target's, or layers disagree about their
            channels, or weights of one operator about its arithmetic.
    """
    target = TARGETS[job.settings.target]
    sites = {site.name: site for site in job.sites}
    carriers = {carrier.name for carrier in job.carriers}
    for name, form in forms.items():
        carried = name in carriers and form in (UNCHANGED, CARRIED)
        if not carried and name not in sites:
            raise InputError(f"plan: site {name!r} is not in the model; solve again for this model")
        reason = None if carried or form == UNCHANGED else declines(sites[name], form)
        reason = reason or target.declines(form)
        if reason:
            raise InputError(f"plan: site {name!r} cannot take {form}: {reason}; choose another form")
    partners_of(job).check(forms)
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


class _Fitting:
    """Fits the sites of a plan, the pruned ones on the original model and then all of them in the order of the graph.

    Attributes:
        chosen: the sites whose weights change.
    """

    def __init__(self, job: Job, forms: Mapping[str, Form], *, keep: bool, match: bool) -> None:
        self.job, self.forms, self.keep, self.match = job, forms, keep, match
        self.chosen = chosen_sites(job, forms)
        self._taken, self._index = frozenset(all_names(job.model.proto)), ValueIndex(job.model.proto)
        self._metrics = output_metrics(job)
        self._cuts = _cuts(job, forms)
        self._by_group = {cut.group.name: cut for cut in self._cuts}
        self._fragments: dict[str, Fragment] = {}
        self._packed: dict[str, Arrays] = {}
        self._starts: dict[str, NDArray[np.generic]] = {}
        self._current = job.model
        self._original, self._prefix = (Frontier(job.model, job.data, job.splits.fit, job.calibration) for _ in range(2))
        self._pending = {site.name: site for site in self.chosen}
        self._partners = partners_of(job)

    def result(self) -> Fitted:
        """What is fitted, with the statistics of normalizations behind it."""
        constants = renormalized(self.job, self._current, self._changed(), self._cuts) if self.match else {}
        return Fitted(self._fragments, self._cuts, self._packed, constants)

    def cut(self) -> None:
        """Fit the pruned sites on inputs from the original model; from here on the model has fewer channels."""
        sites = [site for site in self.chosen if self.forms[site.name].decomposition == PRUNED]
        for part in moment_parts(sites):
            moments = {name: moment.shrunk() for name, moment in original_moments(self.job, part).items()}
            for site in part if self.match else ():
                self._starts[site.name] = cut_weight(self.job.model, site, moments[site.name], channels_of(self.job), self._by_group)
            self._keep(part, partial(self._pruned, moments))
        self._rewrite()

    def fit(self, stage: Sequence[Site]) -> None:
        """Fit some sites on inputs from the model as it is: with the stages before and everything pruned in it."""
        job = self.job
        pairs = self._pairs(stage) if self.match else {}
        whole = [site for site in stage if self.forms[site.name].decomposition != PRUNED]
        rest = [site for site in whole if site.name not in pairs]
        moments = calibrate(self._current, rest, job.shapes, job.data, job.splits.fit, job.calibration, seed=job.settings.seed)
        moments |= {site.name: pooled_moment(pairs[site.name]) for site in whole if site.name in pairs}
        weighed = {name: self._metrics.weigh(name, moment).shrunk() for name, moment in moments.items()}
        self._keep(whole, partial(self._whole, weighed, pairs))
        self._keep([site for site in stage if site.name in pairs and site.name not in moments], partial(self._repruned, pairs))
        self._rewrite()
        for site in stage:
            del self._pending[site.name]

    def _keep(self, sites: Sequence[Site], fit: Callable[[Site], tuple[Fragment, Arrays]]) -> None:
        """Fit sites; their arrays go to the model's spool, if that has one, and are held only if they are to be kept."""

        def fitted(site: Site) -> tuple[Fragment, Arrays]:
            part, arrays = fit(site)
            return spooled(part, self.job.model.weights), arrays if self.keep else ()

        for site, (part, arrays) in zip(sites, in_parallel(fitted, sites, workers(sites)), strict=True):
            self._fragments[site.name] = part
            self._packed |= {site.name: arrays} if self.keep else {}

    def _rewrite(self) -> None:
        """Put in what is fitted so far, but for weights that wait for a partner."""
        ready = self._partners.fitted(self.forms, self._fragments)
        if ready:
            fragments = {name: part for name, part in self._fragments.items() if name in ready}
            self._current = joined(self.job.model, fragments, self.chosen, self._cuts, {})

    def _pairs(self, stage: Sequence[Site]) -> dict[str, tuple[Pair, ...]]:
        """How the inputs of those sites of a stage that what is fitted so far has changed go with the original's."""
        job, changed = self.job, self._changed()
        first, *_ = levels(job.model.proto, stage)
        moved = [site for site in first if matchable(site) and FAMILIES[site.use.key].activation(site.use)[0] in changed]
        paired = [self._paired(site) for site in moved]
        if not paired:
            return {}
        pending = self._unsettled()
        wanted = {FAMILIES[use.use.key].activation(use.use)[0] for site in self._pending.values() for use in site.uses}
        self._original.move(job.model, pending, wanted)
        self._prefix.move(self._current, pending, wanted)
        seed = job.settings.seed
        return calibrate_pairs(self._original, self._prefix, paired, job.shapes, job.calibration, seed=seed, folds=FOLDS)

    def _changed(self) -> set[str]:
        """Values of the main graph that what is fitted so far has changed."""
        fragments = self._fragments
        anchors = {site.anchor for site in self.chosen if site.name in fragments}
        return downstream(self.job.model.proto, anchors.union(*(part.changes for part in fragments.values())))

    def _unsettled(self) -> set[str]:
        """Values of the main graph that the sites yield which are still to be fitted, or that their fragments compute on the way.

        Pruned sites have fragments that are still to be fitted. Sites whose weights lie in nested graphs come after all others.
        """
        sites = self._pending.values()
        parts = [part for name, part in self._fragments.items() if name in self._pending]
        nodes = [use.use.node for site in sites for use in site.uses if use.scope == MAIN]
        nodes += [node for part in parts for node in (*part.weights, *chain.from_iterable(part.replacements))]
        return {site.anchor for site in sites}.union(*(node.output for node in nodes), *(part.changes for part in parts))

    def _paired(self, site: Site) -> PairedSite:
        """A site and what it is in the model as it is now."""
        _, _, kept = kept_channels(site, channels_of(self.job), self._by_group) if self._cuts else (None, 1, None)
        groups = kept if site.use.view.groups > 1 else None
        return PairedSite(site, as_dense(site, self.forms[site.name])[0], groups)

    def _pruned(self, moments: Mapping[str, Moment], site: Site) -> tuple[Fragment, Arrays]:
        """Fit a pruned site on the original model."""
        form, moment, channels = self.forms[site.name], moments[site.name], channels_of(self.job)
        return fit_pruned(self.job.model, site, form, moment, channels, self._by_group, self._taken, self._index, self.job.integers)

    def _repruned(self, pairs: Mapping[str, tuple[Pair, ...]], site: Site) -> tuple[Fragment, Arrays]:
        """Fit a pruned site once more, to what it says in the original."""
        form, start, channels = self.forms[site.name], self._starts[site.name], channels_of(self.job)
        folds = pairs[site.name]
        return match_pruned(self.job.model, site, form, start, folds, channels, self._by_group, self._taken, self._index, self.job.integers)

    def _whole(self, moments: Mapping[str, Moment], pairs: Mapping[str, tuple[Pair, ...]], site: Site) -> tuple[Fragment, Arrays]:
        """Fit a site that keeps all its channels."""
        model, form, moment = self.job.model, self.forms[site.name], moments[site.name]
        if form.decomposition in SLOPED:
            slope = self.job.slopes.get(site.name)
            moment = moment.with_slope(None if slope is None else slope.astype(np.float64))
        value, bias, folds = site.value(model), find_bias(model, site, self._index), pairs.get(site.name, ())
        weight = site.matrix(value)
        target = matched(weight, weight, folds, free_mean=bias is not None, outputs=moment.outputs)
        aim = (value, weight) if target is None else (site.stored(target), target)
        arrays, decoded = store(site, form, *aim, moment, self.job.integers)
        part = fragment(site, form, arrays, model.proto, self._taken, self.job.integers)
        if bias is None or moment.mean is None:
            return part, arrays
        approximation = rebuilt(site, form, decoded)
        shift = mean_shift(weight, approximation, folds) if folds else bias_shift(weight, approximation, moment)
        return replace(part, changes={bias.name: corrected(model, bias, shift)}), arrays


def quantization_ranges(job: Job, model: Model, operators: Sequence[str], values: Sequence[str]) -> dict[str, Range]:
    """Ranges of the activations that are quantized: by the method that the settings name, or that harms the outputs least."""
    histograms = collect(model, values, job.data, job.splits.fit[: job.data.enough(RANGE_SAMPLES)], job.calibration)
    usable = {name: each for name, each in histograms.items() if each.reason is None}
    methods = METHODS if job.settings.ranges == "auto" else (job.settings.ranges,)
    found = [
        {name: Range.spanning(*METHODS[method](each), job.integers.activations) for name, each in usable.items()} for method in methods
    ]
    if len(found) == 1:
        return found[0]
    probe = replace(job, model=job.reference).probe()  # of the outputs only: the original judges
    return min(found, key=lambda ranges: probe.divergence(place(model, operators, ranges).proto))


def mock(job: Job, forms: Mapping[str, Form]) -> Model:
    """A model as fast as the rewritten one, with noise in place of fitted arrays and without what is folded when a model is loaded."""
    rng, taken = np.random.default_rng(job.settings.seed), frozenset(all_names(job.model.proto))
    run = {site.name: as_run(forms.get(site.name, UNCHANGED)) for site in job.sites}
    chosen = chosen_sites(job, run)
    fragments = {}
    for site in chosen:
        arrays = tuple(packed_noise(packed, rng) for packed in ghosts(site, run[site.name]))
        fragments[site.name] = fragment(site, run[site.name], arrays, job.model.proto, taken, job.integers)
    cuts, domains = _placeholders(job, forms), TARGETS[job.settings.target].domains
    nominal = partial(nominal_ranges, dtype=job.integers.activations)
    model = assemble(job.model, fragments, chosen, carried_nodes(job, forms), nominal, cuts, domains=domains)
    return with_ceilings(model, job.floors)


def _stages(model: Model, sites: Sequence[Site], *, match: bool) -> list[list[Site]]:
    """Consecutive sites that are fitted on the same prefix: levels of the graph where they are matched and not too many, else about
    `FIT_STAGES` stages; more of them where their moments need the memory."""
    share = max(1, -(-len(sites) // FIT_STAGES))
    runs = levels(model.proto, sites) if match else []
    if not match or len(runs) > MATCHED_STAGES:
        runs = [list(sites[start : start + share]) for start in range(0, len(sites), share)]
    return [part for run in runs for part in moment_parts(run)]
