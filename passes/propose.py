"""Propose candidates: every form that a site can take, with its relative local error, from a few spectra per site.

Errors are ‖(W − Ŵ)A½‖²/‖WA½‖². Truncation errors come from spectra (one per decomposition prices all its ranks). Rounding errors are
computed for some channels of the dense weight in each storage; those of factors are computed once per decomposition, in one storage at a
middle rank, those of a corrected weight in one storage at every rank, and follow the dense errors for other storages. What
error-compensated rounding gains is measured on a few outputs: once per site for uniform grids, as the share of the error that it takes away
hardly depends on the number of bits, once for codebooks of each length of runs, on the smallest, and for each storage that drops entries or
has few codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from intaglio.ops.arithmetic import ARITHMETICS
from intaglio.ops.decompositions import DECOMPOSITIONS, Decomposition
from intaglio.ops.decompositions.base import Ranks
from intaglio.ops.decompositions.residual import Residual
from intaglio.ops.emit import Emitter, Spec, Target
from intaglio.ops.form import PRUNED, UNCHANGED, Form
from intaglio.ops.moment import Moment
from intaglio.ops.rounding import Rounding
from intaglio.ops.storage import STORAGES, is_scalar, is_tabular, limited, readers, requantized
from intaglio.ops.storage.sparse import Sparse

from .fit import compensation_gain, fit_factors, form_error, importance, storage_gain, table_gain, uncorrected_share
from .kernels import INTEGERS
from .rewrite import array_specs, declines, reads_bytes
from .sites import Site

WORST_ERROR = 0.7
"""Forms that lose more of a layer's output than this are not worth pricing."""

SAMPLED_ENTRIES = 1 << 18
"""About how many entries of a weight its rounding errors are computed on."""

_COARSE_CODES = 4
"""Storages of so few codes at most have no room to compensate: errors of int2 and ternary are twice what the gain in four bits promises."""

_PROBE_STORAGE = "int4"
"""In which the rounding of factors is measured."""

_GAIN_STORAGES = {
    **dict.fromkeys(("kmeans4", "kmeans3", "kmeans2"), "kmeans2"),
    **dict.fromkeys(("vq2x8", "vq2x4"), "vq2x4"),
    **dict.fromkeys(("vq4x8", "vq4x4"), "vq4x4"),
}
"""In which the gain of compensated rounding is measured, for every storage whose values come from a table."""

_BRIEF = Rounding(thorough=False)
"""How: the ratio to what rounding does to the whole weight counts, which is estimated as briefly."""


@dataclass(frozen=True)
class Proposal:
    """A form with its predicted local error, split by cause.

    Attributes:
        form: the form.
        truncation: relative error of the decomposition.
        rounding: relative error of the storage.
    """

    form: Form
    truncation: float
    rounding: float


@dataclass(frozen=True)
class Allowed:
    """What the user and the target admit.

    Attributes:
        decompositions: names; "dense" stands for storing the whole weight in fewer bits, "pruned" for storing fewer channels.
        storages: names.
        executions: "dense" and "contract".
        arithmetics: "float" and names of `ops.arithmetic`.
        expand: whether stored weights may be expanded when the model is loaded.
        integers: name of the variant that operators compute with in integers; see `passes.kernels`.
    """

    decompositions: tuple[str, ...] = ("dense", *dict.fromkeys(name for name, _ in DECOMPOSITIONS))
    storages: tuple[str, ...] = tuple(STORAGES)
    executions: tuple[str, ...] = ("dense", "contract")
    arithmetics: tuple[str, ...] = ("float", *ARITHMETICS)
    expand: bool = True
    integers: str = "full"

    def admits(self, form: Form) -> bool:
        """Whether a form's arithmetic is allowed, and its expansion."""
        return form.arithmetic in self.arithmetics and (self.expand or not expands(form))


def expands(form: Form) -> bool:
    """Whether a form's weight takes more memory once the model is loaded than in the file; thin factors beside a base do not count."""
    packed = form.decomposition == "dense" or form.execution == "contract"
    native = readers(STORAGES[form.storage]) is not None or (form.arithmetic == "rows" and form.decomposition == "dense")
    whole_bytes = form.storage == "int8" and form.arithmetic in ("integer", "dynamic")
    return form != UNCHANGED and not (packed and (form.storage == "float" or native or whole_bytes))


def propose(
    site: Site, value: NDArray[np.generic], moment: Moment, allowed: Allowed, pruned: Sequence[tuple[tuple[int, int], float]] = ()
) -> tuple[tuple[Proposal, ...], tuple[str, ...]]:
    """All forms of a site.

    Args:
        site: the site.
        value: its array.
        moment: second moment of its input, perhaps with a metric of its outputs, which all errors are measured in then.
        allowed: which forms may be proposed.
        pruned: ranks of pruned forms, each with the relative error of the refitted weight.

    Returns:
        The proposals, "unchanged" first, and why whole kinds of forms were declined.
    """
    weight = site.matrix(value)
    if not np.isfinite(weight).all():
        return (Proposal(UNCHANGED, 0.0, 0.0),), ("it holds values that are not finite",)
    reasons: list[str] = []
    integers = INTEGERS[allowed.integers]
    limits = {name: integers.largest_code(name) for name in ("integer", "dynamic")}
    errors = _rounding_errors(site, value, weight, moment, allowed.storages, reasons, frozenset(limits.values()))
    rounding = errors.stored
    proposals = [
        Proposal(Form("dense", (), storage), 0.0, error)
        for storage, error in rounding.items()
        if "dense" in allowed.decompositions and storage != "float"
    ]
    taking: dict[str, list[Decomposition]] = {}
    for (name, execution), decomposition in DECOMPOSITIONS.items():
        if name not in allowed.decompositions or execution not in allowed.executions:
            continue
        reason = decomposition.declines(site.use) or declines(site, Form(name, decomposition.full(site.use), "float", execution))
        if reason:
            reasons.append(f"{name}/{execution}: {reason}")
        else:
            taking.setdefault(name, []).append(decomposition)
    for name, executions in taking.items():
        prices = _prices(site, executions, weight, value, moment, rounding.get(_PROBE_STORAGE, 0.0))
        proposals += [
            Proposal(Form(name, ranks, storage, each.execution), prices[ranks].truncation, prices[ranks].rounded(error))
            for each in executions
            for storage, error in rounding.items()
            for ranks in each.grid(site.use)
        ]
    proposals += [
        Proposal(Form(PRUNED, ranks, storage, "contract"), error, each * (1 - error))
        for storage, each in rounding.items()
        for ranks, error in pruned
    ]
    every = [variant for proposal in proposals for variant in _variants(site, proposal, allowed, limits, errors)]
    return (Proposal(UNCHANGED, 0.0, 0.0), *every), tuple(reasons)


def _variants(site: Site, proposal: Proposal, allowed: Allowed, limits: Mapping[str, int], errors: _Errors) -> Iterator[Proposal]:
    """The proposal in every arithmetic that admits it; `limits`: of codes, for those in bytes."""
    if proposal.truncation + proposal.rounding > WORST_ERROR:
        return
    for arithmetic in allowed.arithmetics:
        form = replace(proposal.form, arithmetic=arithmetic)
        if form.arithmetic != "float" and form.storage in ("float", "fp16"):
            continue
        if _folds(form):
            continue
        if allowed.admits(form) and declines(site, form) is None:
            rounding = proposal.rounding
            if arithmetic in limits:
                largest = limits[arithmetic]
                if not reads_bytes(form) or not _has_integers(site, form.storage):
                    rounding += errors.again[largest]
                elif errors.stored[form.storage] > 0:
                    rounding *= errors.limited.get((form.storage, largest), errors.stored[form.storage]) / errors.stored[form.storage]
            yield replace(proposal, form=form, rounding=rounding)


def _folds(form: Form) -> bool:
    """Whether what runs beside a base could be added to it when the model is loaded: that is as small and faster.

    Where eight bits are left the sum is rounded once more, by which bases of fewer bits lose little.
    """
    beside = form.execution == "contract" and isinstance(DECOMPOSITIONS.get((form.decomposition, form.execution)), Residual)
    return beside and (form.arithmetic == "float" or ARITHMETICS[form.arithmetic].product_reason is None)


def _has_integers(site: Site, storage: str) -> bool:
    """Whether a storage holds the site's weight as integers with one scale per channel: integer kernels can read them as they are."""
    ((spec, axis),) = array_specs(site, Form("dense"))
    scratch = Emitter(Target(site.opset, False, "scratch"))
    return STORAGES[storage].emit_integer(scratch, "", STORAGES[storage].layout(spec, axis), spec, axis) is not None


@dataclass(frozen=True)
class _Errors:
    """Relative errors of rounding the dense weight.

    Attributes:
        stored: in each storage that can hold it.
        limited: by storage and largest code, where operators in int8 admit no larger one but the storage has some.
        again: by largest code, of rounding to the nearest such code when the model is loaded.
    """

    stored: dict[str, float]
    limited: dict[tuple[str, int], float]
    again: dict[int, float]


def _rounding_errors(
    site: Site,
    value: NDArray[np.generic],
    weight: NDArray[np.float64],
    moment: Moment,
    storages: Sequence[str],
    reasons: list[str],
    limits: frozenset[int],
) -> _Errors:
    """Relative errors of the dense weight in each storage that can hold it, and within limits of codes; `reasons` takes up why the others
    cannot.

    Rounding errors of different entries are unrelated, so diag(A) alone prices them, and diag(G) where outputs have a metric; compensated
    rounding turns them towards directions in which A is weak, which `compensation_gain` and `table_gain` measure, and `storage_gain` where
    entries are dropped or codes hit the ends of their grid.
    """
    ((spec, axis),) = array_specs(site, Form("dense"))
    count = spec.shape[axis]
    step = max(1, site.elements // SAMPLED_ENTRIES)
    channels = np.arange(0, count, step)
    part = np.take(value, channels, axis)
    weights = importance(site, moment)
    weights = weights if weights.shape[axis] == 1 else np.take(weights, channels, axis)
    energy = moment.energy(weight)
    exact = np.asarray(part, np.float64)
    whole = moment.separate_energy(weight) / energy if energy > 0 else 0.0  # of the diagonal, relative to that of A itself
    scale = whole / max(float((weights * exact**2).sum()), np.finfo(np.float64).tiny)
    uniform, of_tables = compensation_gain(site, weight, moment), dict[str, float]()
    sampled = Spec(part.shape, part.dtype)

    def lost(decoded: NDArray[np.generic]) -> float:
        return scale * float((weights * (exact - np.asarray(decoded, np.float64)) ** 2).sum())

    stored, narrow = dict[str, float](), dict[tuple[str, int], float]()
    for name in storages:
        storage = STORAGES[name]
        reason = storage.accepts(spec) or storage.accepts(sampled)
        if reason is None and storage.min_opset(spec) > site.opset:
            reason = f"needs opset {storage.min_opset(spec)}, the model has {site.opset}"
        if reason:
            reasons.append(f"{name}: {reason}")
            continue
        if is_tabular(storage) and (stand_in := _GAIN_STORAGES[name]) not in of_tables:
            of_tables[stand_in] = table_gain(STORAGES[stand_in], site, value, weight, moment)
        if isinstance(storage, Sparse) or _is_coarse(name):
            gain = storage_gain(storage, site, weight, moment)
        else:
            gain = uniform if is_scalar(storage) else of_tables[_GAIN_STORAGES[name]] if is_tabular(storage) else 1.0
        stored[name] = gain * lost(storage.decode(storage.encode(part, axis, weights), sampled))
        for limit in limits:
            if (within := limited(storage, limit)) is not storage:
                narrow[name, limit] = gain * lost(within.decode(within.encode(part, axis, weights), sampled))
    return _Errors(stored, narrow, {limit: lost(_nearest(part, axis, limit)) for limit in limits})


@cache
def _is_coarse(name: str) -> bool:
    """Whether a storage's values lie on a uniform grid of so few codes that most are at its ends."""
    storage = STORAGES[name]
    if not is_scalar(storage):
        return False
    grid = storage.grid(np.zeros((1, 1), np.float32), 0)
    return grid.highest - grid.lowest < _COARSE_CODES


def _nearest(array: NDArray[np.generic], axis: int, largest: int) -> NDArray[np.float32]:
    """What is left of an array when it is rounded to int8 at load."""
    codes, scale = requantized(array, axis, largest)
    return codes * scale.reshape([-1 if i == axis else 1 for i in range(array.ndim)])


@dataclass(frozen=True)
class _Price:
    """Errors of a decomposition at some ranks.

    Attributes:
        truncation: relative error.
        share: error of rounding the factors, over that of rounding the dense weight in the same storage.
    """

    truncation: float
    share: float

    def rounded(self, error: float) -> float:
        """The relative error of rounding, from that of the dense weight."""
        return self.share * error * (1 - self.truncation)


def _prices(
    site: Site,
    executions: Sequence[Decomposition],
    weight: NDArray[np.float64],
    value: NDArray[np.generic],
    moment: Moment,
    dense: float,
) -> dict[Ranks, _Price]:
    """Prices at every rank of the grids of one decomposition in several executions.

    How the factors run changes neither what they leave out nor, to speak of, how they round. The latter is measured at the middle rank, but
    for a corrected weight: what is left of its rounding depends on the rank first of all.
    """
    decomposition = executions[0]
    ranks = list(dict.fromkeys(each for execution in executions for each in execution.grid(site.use)))
    if not ranks:
        return {}
    if isinstance(decomposition, Residual):
        if declines(site, Form("dense", (), _PROBE_STORAGE)) is not None:
            return {each: _Price(0.0, 1.0) for each in ranks}
        shares = uncorrected_share(site, [rank for (rank,) in ranks], value, weight, moment, _PROBE_STORAGE)
        return {each: _Price(0.0, share) for each, share in zip(ranks, shares, strict=True)}
    errors = decomposition.errors(weight, moment, site.use, ranks)
    form = Form(decomposition.name, ranks[len(ranks) // 2], "float", decomposition.execution)
    stored = replace(form, storage=_PROBE_STORAGE)
    rounding = 0.0
    if declines(site, stored) is None:
        factors = fit_factors(site, form, weight, moment)
        exact = form_error(site, form, value, weight, moment, factors, _BRIEF)
        total = form_error(site, stored, value, weight, moment, factors, _BRIEF)
        rounding = max(0.0, total - exact) / max(1e-12, 1 - exact)
    share = rounding / dense if dense else 1.0
    return {each: _Price(error, share) for each, error in zip(ranks, errors, strict=True)}
