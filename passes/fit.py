"""Fit a chosen form: from a weight and its metric to the packed arrays that will be written.

Factors are fitted from the input to the output: each leading factor is stored first, and the last one is then refitted by least squares on
what the stored ones really are, so it takes up their rounding errors. Integers are chosen in the metric of what they are multiplied with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from intaglio.ops.decompositions import DECOMPOSITIONS, rebuild, refit_last
from intaglio.ops.decompositions.lowrank import spectrum
from intaglio.ops.decompositions.residual import Residual
from intaglio.ops.emit import Spec
from intaglio.ops.form import Form
from intaglio.ops.moment import Moment, relative_error
from intaglio.ops.rounding import Problem, Rounding, compensates, compensation, encode, factor_input, feedback, fit_corrected
from intaglio.ops.rounding.corrected import TURNS, Write
from intaglio.ops.rounding.encoding import Packed
from intaglio.ops.storage import Storage, is_scalar, is_tabular
from intaglio.ops.view import MatrixView

from .kernels import INTEGERS, Integers
from .rewrite import array_specs, written_storages
from .sites import Site

_ERROR_ENTRIES = 1 << 22
"""Entries of a weight on which an error is computed, at least."""

_GAIN_INPUTS = 1536
_GAIN_OUTPUTS = 64
"""Size of the part of a weight on which the gain of compensated rounding is measured."""

Arrays = tuple[tuple[NDArray[np.generic], ...], ...]

COMPENSATED = Rounding()
"""How integers are chosen unless a caller says otherwise."""


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
    integers: Integers,
    factors: tuple[NDArray[np.float64], ...] | None = None,
    rounding: Rounding = COMPENSATED,
) -> tuple[Arrays, tuple[NDArray[np.generic], ...]]:
    """The packed arrays of a form, and what each of them decodes to.

    Args:
        site: the site.
        form: any but "unchanged".
        value: the anchor's array.
        weight: the same as the first use sees it, (groups, m, n) float64.
        moment: second moment of the site's input.
        integers: that operators compute with.
        factors: from `fit_factors`, where they are known already.
        rounding: how integers are chosen.
    """
    specs = array_specs(site, form)
    storages = written_storages(form, len(specs), integers)
    if form.decomposition == "dense":
        ((spec, axis),) = specs
        problem = Problem(value, axis, _AnchorReading(site), moment, importance(site, moment))
        packed = encode(storages[0], problem, rounding)
        return (packed,), (storages[0].decode(packed, spec),)
    decomposition = DECOMPOSITIONS[form.decomposition, form.execution]
    if isinstance(decomposition, Residual):
        every = _store_corrected(site, form, storages, decomposition, weight, moment, rounding)
        return every, tuple(storage.decode(packed, spec) for storage, packed, (spec, _) in zip(storages, every, specs, strict=True))
    leading = (fit_factors(site, form, weight, moment) if factors is None else factors)[:-1]
    # The last factor takes up what leading ones lose, so compensation within these can lose what it gained: the better way is kept.
    chosen = is_scalar(storages[0]) or is_tabular(storages[0])
    ways = (rounding, Rounding(compensate=False)) if rounding.compensate and chosen else (rounding,)
    found = [_store_factors(site, form, storages, weight, moment, leading, (way, rounding)) for way in ways]
    return min(found, key=lambda each: moment.energy(weight, rebuilt(site, form, each[1]))) if len(found) > 1 else found[0]


def _store_factors(
    site: Site,
    form: Form,
    storages: Sequence[Storage],
    weight: NDArray[np.float64],
    moment: Moment,
    leading: tuple[NDArray[np.float64], ...],
    roundings: tuple[Rounding, Rounding],
) -> tuple[Arrays, tuple[NDArray[np.generic], ...]]:
    """The packed arrays of leading factors and of the last one, which is fitted to them, and what each decodes to.

    Arguments as for `store`; `storages` write the arrays, `roundings` says how integers of leading factors and of the last one are chosen.
    """
    decomposition, specs = DECOMPOSITIONS[form.decomposition, form.execution], array_specs(site, form)
    packs: list[tuple[NDArray[np.generic], ...]] = []
    decoded: list[NDArray[np.generic]] = []
    for number, ((spec, axis), storage) in enumerate(zip(specs, storages, strict=True)):
        known = [np.asarray(array, np.float64) for array in decoded]
        last = number == len(leading)
        factor = refit_last(decomposition, weight, moment, site.use, form.ranks, known) if last else leading[number]
        view, metric = factor_input(decomposition, site.use, form.ranks, known, moment.with_outputs(None))
        problem = Problem(factor.astype(spec.dtype), axis, view, metric, _spread(view, metric))
        packs.append(encode(storage, problem, roundings[last]))
        decoded.append(storage.decode(packs[-1], spec))
    return tuple(packs), tuple(decoded)


def uncorrected_share(
    site: Site, ranks: Sequence[int], value: NDArray[np.generic], weight: NDArray[np.float64], moment: Moment, storage: str
) -> list[float]:
    """The share of the error of rounding that a correction of each rank leaves, from 0 to 1, from one spectrum of what a storage loses.

    It is what `fit_corrected` attains at its first turn, with exact factors: a bound that other turns and starts only lower.

    Args:
        site: the site.
        ranks: of corrections.
        value: the anchor's array.
        weight: the same as the first use sees it, (groups, m, n) float64.
        moment: second moment of the site's input.
        storage: in which the base is tried.
    """
    form = Form("dense", (), storage)
    rounded = rebuilt(site, form, store(site, form, value, weight, moment, INTEGERS["full"], rounding=Rounding(thorough=False))[1])
    energies = spectrum(weight - rounded, moment)
    total = float(energies.sum())
    return [float(energies[:, rank:].sum()) / total if total > 0 else 1.0 for rank in ranks]


def _store_corrected(
    site: Site,
    form: Form,
    storages: Sequence[Storage],
    decomposition: Residual,
    weight: NDArray[np.float64],
    moment: Moment,
    rounding: Rounding,
) -> Arrays:
    """The packed arrays of a base and its correction."""
    specs = array_specs(site, form)
    parts = None if moment.diagonal or not rounding.compensate else feedback(moment)

    def writer(number: int, view: MatrixView) -> Write:
        (spec, axis), storage = specs[number], storages[number]

        def write(matrix: NDArray[np.float64], metric: Moment) -> tuple[Packed, NDArray[np.float64]]:
            own = metric if number == 0 else metric.with_outputs(None)  # the outputs of factors are no outputs of the layer
            problem = Problem(view.stored(matrix).astype(spec.dtype), axis, view, own, _spread(view, own))
            packed = encode(storage, problem, rounding, parts if metric is moment else None)
            return packed, view.matrix(storage.decode(packed, spec))

        return write

    views = (site.use.view, *decomposition.product_views(site.use, form.ranks))
    base, first, last = (writer(number, view) for number, view in enumerate(views))
    return fit_corrected(weight, moment, form.ranks[0], (base, first, last), turns=TURNS if rounding.thorough else 1)


def rebuilt(site: Site, form: Form, decoded: tuple[NDArray[np.generic], ...]) -> NDArray[np.float64]:
    """Ŵ (groups, m, n) float64, the weight that a form's decoded arrays stand for."""
    if form.decomposition == "dense":
        return site.matrix(decoded[0])
    decomposition = DECOMPOSITIONS[form.decomposition, form.execution]
    arrays = [np.asarray(array, np.float64) for array in decoded]
    if isinstance(decomposition, Residual):
        return decomposition.whole(site.use, form.ranks, arrays)
    return rebuild(decomposition, site.use, form.ranks, arrays)


def pack(
    site: Site,
    form: Form,
    value: NDArray[np.generic],
    moment: Moment,
    rounding: Rounding = COMPENSATED,
    integers: Integers = INTEGERS["full"],
) -> tuple[Arrays, NDArray[np.float64]]:
    """`store` and `rebuilt` in one: the packed arrays of a form, and the weight that they stand for."""
    arrays, decoded = store(site, form, value, site.matrix(value), moment, integers, rounding=rounding)
    return arrays, rebuilt(site, form, decoded)


def form_error(
    site: Site,
    form: Form,
    value: NDArray[np.generic],
    weight: NDArray[np.float64],
    moment: Moment,
    factors: tuple[NDArray[np.float64], ...] | None = None,
    rounding: Rounding = COMPENSATED,
    integers: Integers = INTEGERS["full"],
) -> float:
    """Relative output error of a form as it would be stored, on every k-th output of a large weight; arguments as for `store`."""
    approximation = rebuilt(site, form, store(site, form, value, weight, moment, integers, factors, rounding)[1])
    step = -(-site.elements // _ERROR_ENTRIES)
    return relative_error(weight[:, ::step], approximation[:, ::step], moment.of_outputs(slice(None, None, step)))


def compensation_gain(site: Site, weight: NDArray[np.float64], moment: Moment) -> float:
    """What compensated rounding leaves of the error of rounding to nearest, from 0 to 1, measured on a part of the weight.

    Args:
        site: the site.
        weight: (groups, m, n), as the first use sees it.
        moment: second moment of its input.
    """
    return 1.0 if moment.diagonal else compensation(*_part(site, weight, moment))


def table_gain(storage: Storage, site: Site, value: NDArray[np.generic], weight: NDArray[np.float64], moment: Moment) -> float:
    """The same of a storage whose values come from a table.

    Args:
        storage: accepts the weight.
        site: the site.
        value: its array.
        weight: (groups, m, n), as the first use sees it.
        moment: second moment of its input.
    """
    ((_, axis),) = array_specs(site, Form("dense"))
    if moment.diagonal or not compensates(storage, Problem(value, axis, _AnchorReading(site), moment, np.ones(1))):
        return 1.0
    part, problem = _part_problem(site, weight, moment, value.dtype)
    nearest, found = (
        problem.moment.energy(part, _decoded(storage, problem, encode(storage, problem, Rounding(each)))) for each in (False, True)
    )
    return min(1.0, found / nearest) if nearest > 0 else 1.0


def _part(site: Site, weight: NDArray[np.float64], moment: Moment) -> tuple[NDArray[np.float64], Moment]:
    """Some outputs and the first inputs of a weight, and the moment of these inputs."""
    some = Moment(moment.matrix[:, :_GAIN_INPUTS, :_GAIN_INPUTS], moment.rows)
    return weight[:, :: max(1, site.use.view.m // _GAIN_OUTPUTS), :_GAIN_INPUTS], some


def _part_problem(
    site: Site, weight: NDArray[np.float64], moment: Moment, dtype: np.dtype[np.generic]
) -> tuple[NDArray[np.float64], Problem]:
    """The same part (groups, m, n), and as one matrix (groups·m, n) of a type that is to be stored."""
    part, some = _part(site, weight, moment)
    groups, m, n = part.shape
    view = MatrixView((groups * m, n), groups, m, n, True)
    return part, Problem(view.stored(part).astype(dtype), 0, view, some, _spread(view, some))


def _decoded(storage: Storage, problem: Problem, packed: Packed) -> NDArray[np.float64]:
    """The matrices that packed arrays of a problem stand for."""
    return problem.reading.matrix(storage.decode(packed, Spec(problem.array.shape, problem.array.dtype)))


def storage_gain(storage: Storage, site: Site, weight: NDArray[np.float64], moment: Moment) -> float:
    """The error of a storage after compensated rounding, over that of its own encoding were inputs unrelated, measured on the same part.

    For storages that drop entries or have few codes: what they lose is no matter of a step's size alone. It can be more than 1.

    Args:
        storage: accepts float32 matrices.
        site: the site.
        weight: (groups, m, n), as the first use sees it.
        moment: second moment of its input.
    """
    if moment.diagonal:
        return 1.0
    part, problem = _part_problem(site, weight, moment, np.dtype(np.float32))
    some = problem.moment
    packs = (storage.encode(problem.array, 0, problem.importance), encode(storage, problem, COMPENSATED))
    plain, found = (_decoded(storage, problem, packed) for packed in packs)
    unrelated = Moment(some.diag, some.rows).energy(part, plain)
    return some.energy(part, found) / unrelated if unrelated > 0 else 1.0


@dataclass(frozen=True, eq=False)
class _AnchorReading:
    """How a site's anchor reads as matrices, whatever chain of nodes turns it round."""

    site: Site

    def matrix(self, stored: NDArray[np.generic]) -> NDArray[np.float64]:
        return self.site.matrix(stored)

    def stored(self, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.site.stored_float64(matrix)


def importance(site: Site, moment: Moment) -> NDArray[np.float64]:
    """diag(A), times diag(G) if outputs have a metric, at every entry of the anchor: how much a squared error there costs.

    Broadcastable where all outputs count alike and no chain turns the weight.
    """
    return _spread(site.use.view, moment) if site.order is None else site.stored_float64(_costs(site.use.view, moment))


def _spread(view: MatrixView, moment: Moment) -> NDArray[np.float64]:
    """The same at every entry of a stored array of one view, broadcastable where that has one group and outputs count alike."""
    if view.groups > 1 or moment.outputs is not None:
        return view.stored(_costs(view, moment))
    diagonal = _diagonal(moment)
    trailing = view.shape[1:] if int(np.prod(view.shape[1:])) == view.n else (*(1,) * (len(view.shape) - 2), view.n)
    return np.reshape(diagonal, (1, *trailing) if view.outputs_first else (view.n, *(1,) * (len(view.shape) - 1)))


def _costs(view: MatrixView, moment: Moment) -> NDArray[np.float64]:
    """diag(A), times diag(G) if outputs have a metric, at every entry of a view's matrices: (groups, m, n)."""
    costs = np.broadcast_to(_diagonal(moment)[:, None, :], (view.groups, view.m, view.n))
    return costs if moment.outputs is None else costs * moment.outputs.diag[:, :, None]


def _diagonal(moment: Moment) -> NDArray[np.float64]:
    """diag(A), (groups, n), positive."""
    return np.asarray(moment.diag + 0.01 * moment.diag.mean(1, keepdims=True) + np.finfo(np.float64).tiny)
