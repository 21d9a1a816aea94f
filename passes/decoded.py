"""What a plan's arrays stand for, in the original's own graph: every weight as its form decodes it, with the same operators around it.

Before: a plan's forms, fitted. After: the job's model with other weights. Channels that are pruned are still there: their producers write
constants and their consumers multiply these by zero, so the outputs are those of the pruned model. Activations stay floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from intaglio.ops.form import PRUNED, UNCHANGED, Form
from intaglio.ops.pruning import block_indices
from intaglio.ops.storage import STORAGES

from .assemble import joined
from .build import Fitted
from .checkpoint import fingerprint
from .cuts import Cut
from .fit import rebuilt
from .job import Job
from .model import Model
from .prepare import reopened
from .refit import channels_of, kept_channels, kept_rows
from .rewrite import Fragment, array_specs, array_storages, as_dense
from .sites import Site


def decoded_model(job: Job, forms: Mapping[str, Form], fitted: Fitted) -> Model:
    """The job's model with every weight as its form decodes it, and every constant as it was tuned.

    Args:
        job: the job.
        forms: by site name.
        fitted: from `fit_forms` with `keep`.
    """
    cuts = {cut.group.name: cut for cut in fitted.cuts}
    fragments = {}
    for site in job.sites:
        form = forms.get(site.name, UNCHANGED)
        if form == UNCHANGED:
            continue
        weight = _whole(job, site, form, fitted, cuts) if form.decomposition == PRUNED else decoded_weight(site, form, fitted)
        changes = fitted.fragments[site.name].changes
        fragments[site.name] = Fragment((), (), {site.anchor: site.stored(weight)}, {}, changes=changes)
    constants = {name: _uncut(job.model, fitted.cuts, name, value) for name, value in fitted.constants.items()}
    return joined(job.model, fragments, job.sites.sites, (), constants)


def continued(job: Job, forms: Mapping[str, Form], fitted: Fitted) -> Job:
    """The job on what fitted forms stand for; the original goes on teaching and judging.

    Args:
        job: the job that they were fitted to.
        forms: by site name.
        fitted: from `fit_forms` with `keep`.
    """
    lineage = fingerprint([job.lineage, *(f"{name}={form}" for name, form in sorted(forms.items()))], fitted.contents())
    return replace(reopened(job, decoded_model(job, forms, fitted)), teacher=job.reference, lineage=lineage)


def decoded_weight(site: Site, form: Form, fitted: Fitted) -> NDArray[np.float64]:
    """Ŵ, (groups, m, n): the weight that a form's packed arrays stand for; of a pruned form, with the channels that are left."""
    smaller, dense = as_dense(site, form)
    specs = array_specs(site, form)
    packs = zip(fitted.packed[site.name], specs, array_storages(form, len(specs)), strict=True)
    return rebuilt(smaller, dense, tuple(STORAGES[name].decode(packed, spec) for packed, (spec, _), name in packs))


def _whole(job: Job, site: Site, form: Form, fitted: Fitted, cuts: Mapping[str, Cut]) -> NDArray[np.float64]:
    """The weight of a pruned site with zeros for the channels that are gone."""
    view = site.use.view
    kept_in, block, kept_out = kept_channels(site, channels_of(job), cuts)
    rows = kept_rows(site, kept_out)
    whole, left = np.zeros((view.groups, view.m, view.n)), decoded_weight(site, form, fitted)
    if view.groups > 1:
        whole[rows] = left
    else:
        columns = np.arange(view.n) if kept_in is None else block_indices(kept_in, block)
        whole[0, rows[:, None], columns] = left[0]
    return whole


def _uncut(model: Model, cuts: tuple[Cut, ...], name: str, value: NDArray[np.float32]) -> NDArray[np.float32]:
    """A constant with the entries of all channels; those of channels that are gone are the original's."""
    tensor = next(tensor for tensor in model.proto.graph.initializer if tensor.name == name)
    whole = np.array(model.weights.read(tensor), np.float32)
    if whole.shape == value.shape:
        return value
    cut, part = next((cut, part) for cut in cuts for part in cut.group.slices if part.initializer == name)
    np.moveaxis(whole, part.axis, 0)[block_indices(cut.kept, part.block)] = np.moveaxis(value, part.axis, 0)
    return whole
