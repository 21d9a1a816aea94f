"""Fit a chosen form: from a weight and its metric to the packed arrays that will be written.

Factors are fitted from the input to the output: each leading factor is stored first, and the last one is then refitted by least squares on
what the stored ones really are, so it takes up their rounding errors.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from intaglio.ops.decompositions import DECOMPOSITIONS, rebuild, refit_last
from intaglio.ops.form import Form
from intaglio.ops.moment import Moment, relative_error
from intaglio.ops.storage import STORAGES

from .rewrite import array_specs
from .sites import Site

_ERROR_ENTRIES = 1 << 22
"""Entries of a weight on which an error is computed, at least."""

Arrays = tuple[tuple[NDArray[np.generic], ...], ...]


def fit_factors(site: Site, form: Form, weight: NDArray[np.float64], moment: Moment) -> tuple[NDArray[np.float64], ...]:
    """The float factors of a form, in stored layout; none for a dense form, whose only array is the weight itself.

    Args:
        site: the site.
        form: any but "unchanged".
        weight: (groups, m, n), as the first use sees it.
        moment: second moment of the site's input.
    """
    if form.decomposition == "dense":
        return ()
    return DECOMPOSITIONS[form.decomposition, form.execution].fit(weight, moment, site.use, form.ranks)


def store(
    site: Site,
    form: Form,
    value: NDArray[np.generic],
    weight: NDArray[np.float64],
    moment: Moment,
    factors: tuple[NDArray[np.float64], ...] | None = None,
) -> tuple[Arrays, tuple[NDArray[np.generic], ...]]:
    """The packed arrays of a form, and what each of them decodes to.

    Args:
        site: the site.
        form: any but "unchanged".
        value: the anchor's array.
        weight: the same as the first use sees it, (groups, m, n) float64.
        moment: second moment of the site's input.
        factors: from `fit_factors`, where they are known already.
    """
    specs, storage = array_specs(site, form), STORAGES[form.storage]
    if form.decomposition == "dense":
        ((spec, axis),) = specs
        packed = storage.encode(value, axis, _importance(site, moment))
        return (packed,), (storage.decode(packed, spec),)
    decomposition = DECOMPOSITIONS[form.decomposition, form.execution]
    leading = (fit_factors(site, form, weight, moment) if factors is None else factors)[:-1]
    every: list[tuple[NDArray[np.generic], ...]] = []
    decoded: list[NDArray[np.generic]] = []
    for number, (spec, axis) in enumerate(specs):
        if number < len(leading):
            factor = leading[number]
        else:
            known = [np.asarray(array, np.float64) for array in decoded]
            factor = refit_last(decomposition, weight, moment, site.use, form.ranks, known)
        every.append(storage.encode(factor.astype(spec.dtype), axis))
        decoded.append(storage.decode(every[-1], spec))
    return tuple(every), tuple(decoded)


def rebuilt(site: Site, form: Form, decoded: tuple[NDArray[np.generic], ...]) -> NDArray[np.float64]:
    """Ŵ (groups, m, n) float64, the weight that a form's decoded arrays stand for."""
    if form.decomposition == "dense":
        return site.matrix(decoded[0])
    decomposition = DECOMPOSITIONS[form.decomposition, form.execution]
    return rebuild(decomposition, site.use, form.ranks, [np.asarray(array, np.float64) for array in decoded])


def pack(site: Site, form: Form, value: NDArray[np.generic], moment: Moment) -> tuple[Arrays, NDArray[np.float64]]:
    """`store` and `rebuilt` in one: the packed arrays of a form, and the weight that they stand for."""
    arrays, decoded = store(site, form, value, site.matrix(value), moment)
    return arrays, rebuilt(site, form, decoded)


def form_error(
    site: Site,
    form: Form,
    value: NDArray[np.generic],
    weight: NDArray[np.float64],
    moment: Moment,
    factors: tuple[NDArray[np.float64], ...] | None = None,
) -> float:
    """Relative output error of a form as it would be stored, on every k-th output of a large weight; arguments as for `store`."""
    approximation = rebuilt(site, form, store(site, form, value, weight, moment, factors)[1])
    step = -(-site.elements // _ERROR_ENTRIES)
    return relative_error(weight[:, ::step], approximation[:, ::step], moment)


def _importance(site: Site, moment: Moment) -> NDArray[np.float64]:
    """diag(A) at every entry of the anchor: how much a squared error there costs; broadcastable where no chain turns the weight."""
    diagonal = moment.diag + 0.01 * moment.diag.mean(1, keepdims=True) + np.finfo(np.float64).tiny
    view = site.use.view
    if site.order is None and view.groups == 1:
        trailing = view.shape[1:] if int(np.prod(view.shape[1:])) == view.n else (*(1,) * (len(view.shape) - 2), view.n)
        return np.reshape(diagonal, (1, *trailing) if view.outputs_first else (view.n, *(1,) * (len(view.shape) - 1)))
    return site.stored_float64(np.broadcast_to(diagonal[:, None, :], (view.groups, view.m, view.n)))
