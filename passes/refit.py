"""Which channels of each group stay, what that costs the layers that read them, and the pruned weights themselves.

All of it comes from the original model: there the inputs of every layer still have all channels, and a model in which one layer of a group
is pruned and another is not cannot run. Channels are chosen once per job, by all layers that read them together (`ops.pruning`). A layer
that reads fewer channels is refitted to predict its output from those that stay; what the dropped ones leave out of the output's mean goes
into the layer's bias. Once all are cut and the model runs, each can be refitted to what it reads there (`match_pruned`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from intaglio.ops.form import Form
from intaglio.ops.moment import Moment
from intaglio.ops.pruning import block_indices, channel_order, pruning_errors, refit, spread
from intaglio.ops.rounding import bias_shift

from .bias import corrected, find_bias
from .calibrate import Pair, calibrate, moment_parts
from .cuts import Cut, pruned_weight
from .fit import Arrays, store
from .graph import ValueIndex
from .groups import ChannelGroup
from .job import Job
from .kernels import Integers
from .match import matched, mean_shift, pooled_moment
from .model import Model
from .parallel import in_parallel, workers
from .prune import Channels, Orders
from .rewrite import Fragment, as_dense, channel_axes, fragment
from .sites import Site

MAX_MODEL_BYTES = 512 << 20
"""Larger models keep their channels: a group needs the moments of all its readers at once."""

WORST_TRUNCATION = 0.3
"""Forms that lose more of a layer's output than this to dropped channels are hopeless."""

Pruned = tuple[tuple[int, int], float]
"""Ranks of a pruned form, and the relative error of the layer's output."""

_found: WeakKeyDictionary[Job, Channels] = WeakKeyDictionary()
_orders: WeakKeyDictionary[Job, dict[str, NDArray[np.int64]]] = WeakKeyDictionary()


def channels_of(job: Job) -> Channels:
    """The groups of a job's model that may be cut; found once per job."""
    if job not in _found:
        usable = job.original.size_bytes <= MAX_MODEL_BYTES
        excluded = [skip.name for skip in job.excluded]
        _found[job] = Channels.find(job.model, job.sites.sites, excluded) if usable else Channels()
    return _found[job]


def channel_orders(job: Job, names: frozenset[str] | None = None) -> Orders:
    """In which order each group gives up its channels, by the group's name; each is computed once per job.

    Args:
        job: the job.
        names: of the groups that are wanted; None for all.
    """
    channels = channels_of(job)
    known = _orders.setdefault(job, {})
    wanted = [group for name, group in channels.groups.items() if name not in known and (names is None or name in names)]

    def ordered(read: tuple[ChannelGroup, dict[str, Moment]]) -> NDArray[np.int64]:
        group, moments = read
        sites = channels.sites
        return channel_order(
            [(sites[r.site].matrix(sites[r.site].value(job.model)), moments[r.site].shrunk(), r.block) for r in group.consumers]
        )

    if wanted:
        readers = [channels.sites[reader.site] for group in wanted for reader in group.consumers]
        with job.clock.phase("propose"):
            found = in_parallel(ordered, _moments(job, channels, wanted), workers(readers))
            known.update(zip((group.name for group in wanted), found, strict=True))
    return known


def _moments(job: Job, channels: Channels, groups: list[ChannelGroup]) -> Iterator[tuple[ChannelGroup, dict[str, Moment]]]:
    """Every group with the moments of its consumers, held no longer than until the next group's are there."""
    consumers = {group.name: [reader.site for reader in group.consumers] for group in groups}
    waiting = list(groups)
    held: dict[str, Moment] = {}
    for part in moment_parts([channels.sites[name] for names in consumers.values() for name in names]):
        held |= original_moments(job, part)
        while waiting and all(name in held for name in consumers[waiting[0].name]):
            group = waiting.pop(0)
            yield group, {name: held.pop(name) for name in consumers[group.name]}


def original_moments(job: Job, sites: list[Site]) -> dict[str, Moment]:
    """Second moments of the inputs of sites in the original model, by site name."""
    return calibrate(job.model, sites, job.shapes, job.data, job.splits.fit, job.calibration, seed=job.settings.seed)


def pruned_forms(channels: Channels, site: Site, value: NDArray[np.generic], moment: Moment, orders: Orders) -> list[Pruned]:
    """The pruned forms that a site is offered: ranks, and relative error of the refitted weight.

    Args:
        channels: of the site's model.
        site: the site.
        value: its weight.
        moment: second moment of its input.
        orders: from `channel_orders`.
    """
    ranks = list(channels.ranks(site))
    if site.name not in channels.reads or not ranks:
        return [(each, 0.0) for each in ranks]
    name, block = channels.reads[site.name]
    group = channels.groups[name]
    levels = channels.levels(name)
    errors = dict(zip(levels, pruning_errors(site.matrix(value), moment, block, orders[name], levels), strict=True))
    size = site.shape[channel_axes(site)[0]]
    priced = [((inputs, outputs), errors[inputs * group.size // size] if inputs < size else 0.0) for inputs, outputs in ranks]
    return [(each, error) for each, error in priced if error <= WORST_TRUNCATION]


def pruning_trials(
    channels: Channels, site: Site, value: NDArray[np.generic], moment: Moment, orders: Orders
) -> list[tuple[float, NDArray[np.generic]]]:
    """A few weights of the original shape that predict what pruned forms do to the outputs: relative error, and array.

    Inputs are dropped and the others refitted; arguments as for `pruned_forms`.
    """
    if site.name not in channels.reads:
        return []
    name, block = channels.reads[site.name]
    levels = channels.levels(name)[1:]
    levels = tuple(dict.fromkeys((levels[(len(levels) - 1) // 2], levels[-1])))
    weight, size = site.matrix(value), channels.groups[name].size
    trials = []
    for level, error in zip(levels, pruning_errors(weight, moment, block, orders[name], levels), strict=True):
        kept = np.sort(orders[name][size - level :])
        whole = spread(refit(weight, moment, block, kept), block, kept, size)
        trials.append((error, site.stored(whole)))
    return trials


def fit_pruned(
    model: Model,
    site: Site,
    form: Form,
    moment: Moment,
    channels: Channels,
    cuts: Mapping[str, Cut],
    taken: frozenset[str],
    index: ValueIndex,
    integers: Integers,
) -> tuple[Fragment, Arrays]:
    """What a site becomes in a pruned form, and its packed arrays.

    Args:
        model: the original model.
        site: the site.
        form: its pruned form.
        moment: second moment of its input there, regularized.
        channels: of the model.
        cuts: by group name; those of the site's groups.
        taken: names that exist in the model.
        index: of the model's values.
        integers: that operators compute with.
    """
    kept_in, block, kept_out = kept_channels(site, channels, cuts)
    value, smaller, cut = site.value(model), as_dense(site, form), cut_weight(model, site, moment, channels, cuts)
    rows = kept_rows(site, kept_out)
    if site.use.view.groups > 1:
        metric = _of_groups(moment, rows)
    else:
        metric = moment if kept_in is None else _of_inputs(moment, block_indices(kept_in, block))
    arrays, (decoded,) = store(*smaller, cut, smaller[0].matrix(cut), metric, integers)
    part = fragment(site, form, arrays, model.proto, taken, integers)
    bias = find_bias(model, site, index)
    if bias is None or moment.mean is None:
        return part, arrays
    outputs, rebuilt, seen = _outputs(site, rows), smaller[0].matrix(decoded), metric
    if site.use.view.groups == 1:  # what dropped inputs leave out of the mean counts too
        seen = moment
        rebuilt = rebuilt if kept_in is None else spread(rebuilt, block, kept_in, site.use.view.n // block)
    return _shifted(model, site, part, bias, outputs, bias_shift(site.matrix(value)[outputs], rebuilt, seen)), arrays


def _outputs(site: Site, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64] | slice, NDArray[np.int64] | slice]:
    """Where `kept_rows` lie in the matrix view, (groups, m, n)."""
    return (rows, slice(None)) if site.use.view.groups > 1 else (slice(None), rows)


def _shifted(
    model: Model,
    site: Site,
    part: Fragment,
    bias: TensorProto,
    outputs: tuple[NDArray[np.int64] | slice, NDArray[np.int64] | slice],
    shift: NDArray[np.float64],
) -> Fragment:
    """A fragment whose bias takes up a shift of the mean at the outputs that stay."""
    whole = np.zeros((site.use.view.groups, site.use.view.m))
    whole[outputs] = shift
    return replace(part, changes={bias.name: corrected(model, bias, whole)})


def cut_weight(model: Model, site: Site, moment: Moment, channels: Channels, cuts: Mapping[str, Cut]) -> NDArray[np.generic]:
    """A site's weight with the channels that stay, refitted to them where it reads fewer; arguments as for `fit_pruned`."""
    kept_in, block, kept_out = kept_channels(site, channels, cuts)
    value = site.value(model)
    if site.use.view.groups > 1:
        return np.take(value, kept_rows(site, kept_out), 0)
    return pruned_weight(site, value, moment, block, kept_in, kept_out)


def match_pruned(
    model: Model,
    site: Site,
    form: Form,
    start: NDArray[np.generic],
    folds: Sequence[Pair],
    channels: Channels,
    cuts: Mapping[str, Cut],
    taken: frozenset[str],
    index: ValueIndex,
    integers: Integers,
) -> tuple[Fragment, Arrays]:
    """What a site becomes in a pruned form once the model around it runs: nearest to its own outputs in the original.

    Args:
        model: the original model.
        site: the site.
        form: its pruned form.
        start: from `cut_weight`.
        folds: its inputs in the cut model and in the original.
        channels: of the model.
        cuts: by group name; those of the site's groups.
        taken: names that exist in the model.
        index: of the model's values.
    """
    _, _, kept_out = kept_channels(site, channels, cuts)
    smaller, rows, bias = as_dense(site, form), kept_rows(site, kept_out), find_bias(model, site, index)
    outputs = _outputs(site, rows)
    weight = site.matrix(site.value(model))[outputs]
    target = matched(weight, smaller[0].matrix(start), folds, free_mean=bias is not None)
    aim = (start, smaller[0].matrix(start)) if target is None else (smaller[0].stored(target), target)
    arrays, (decoded,) = store(*smaller, *aim, pooled_moment(folds).shrunk(), integers)
    part = fragment(site, form, arrays, model.proto, taken, integers)
    if bias is None:
        return part, arrays
    return _shifted(model, site, part, bias, outputs, mean_shift(weight, smaller[0].matrix(decoded), folds)), arrays


def kept_channels(
    site: Site, channels: Channels, cuts: Mapping[str, Cut]
) -> tuple[NDArray[np.int64] | None, int, NDArray[np.int64] | None]:
    """Channels that a site reads, its inputs per channel, and channels that it writes; None where all stay."""
    name, block = channels.reads.get(site.name, ("", 1))
    read, written = cuts.get(name), cuts.get(channels.writes.get(site.name, ""))
    return None if read is None else read.kept, block, None if written is None else written.kept


def kept_rows(site: Site, kept: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Rows of the matrix view that stay; of a depthwise layer the groups."""
    view = site.use.view
    if view.groups > 1:
        return np.arange(view.groups) if kept is None else kept
    channels = site.shape[channel_axes(site)[1]]
    return block_indices(np.arange(channels) if kept is None else kept, view.m // channels)


def _of_inputs(moment: Moment, inputs: NDArray[np.int64]) -> Moment:
    """The moment of some of a layer's inputs."""
    mean = None if moment.mean is None else moment.mean[:, inputs]
    matrix = moment.matrix[:, inputs] if moment.diagonal else moment.matrix[np.ix_(np.arange(len(moment.matrix)), inputs, inputs)]
    return Moment(matrix, moment.rows, mean)


def _of_groups(moment: Moment, groups: NDArray[np.int64]) -> Moment:
    """The moment of some of a layer's groups."""
    return Moment(moment.matrix[groups], moment.rows, None if moment.mean is None else moment.mean[groups])
