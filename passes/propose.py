"""Propose candidates: every form that a site can take, with its relative local error, from a few spectra per site.

Errors are ‖(W − Ŵ)A½‖²/‖WA½‖². Truncation errors come from spectra (one per decomposition prices all its ranks). Rounding
errors of the dense weight are computed; those of factors are computed once per decomposition and storage, at a middle rank, and
taken for the other ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from intaglio.ops.decompositions import DECOMPOSITIONS, Decomposition
from intaglio.ops.form import UNCHANGED, Form
from intaglio.ops.moment import Moment
from intaglio.ops.storage import STORAGES

from .fit import fit_factors, form_error
from .rewrite import declines
from .sites import Site

WORST_ERROR = 0.7
"""Forms that lose more of a layer's output than this are not worth pricing."""


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
        decompositions: names; "dense" stands for storing the whole weight in fewer bits.
        storages: names.
        executions: "dense" and "contract".
    """

    decompositions: tuple[str, ...] = ("dense", *dict.fromkeys(name for name, _ in DECOMPOSITIONS))
    storages: tuple[str, ...] = tuple(STORAGES)
    executions: tuple[str, ...] = ("dense", "contract")


def propose(site: Site, value: NDArray[np.generic], moment: Moment, allowed: Allowed) -> tuple[tuple[Proposal, ...], tuple[str, ...]]:
    """All forms of a site.

    Args:
        site: the site.
        value: its array.
        moment: second moment of its input.
        allowed: which forms may be proposed.

    Returns:
        The proposals, "unchanged" first, and why whole kinds of forms were declined.
    """
    weight = site.matrix(value)
    proposals = [Proposal(UNCHANGED, 0.0, 0.0)]
    reasons: list[str] = []
    if not np.isfinite(weight).all():
        return tuple(proposals), ("it holds values that are not finite",)
    for storage in allowed.storages:
        form = Form("dense", (), storage)
        reason = declines(site, form)
        if storage == "float" or "dense" not in allowed.decompositions:
            continue
        if reason:
            reasons.append(f"{form}: {reason}")
            continue
        proposals.append(Proposal(form, 0.0, form_error(site, form, value, weight, moment)))
    priced: dict[str, _Prices] = {}
    for (name, execution), decomposition in DECOMPOSITIONS.items():
        if name not in allowed.decompositions or execution not in allowed.executions:
            continue
        reason = decomposition.declines(site.use) or declines(site, Form(name, decomposition.full(site.use), "float", execution))
        if reason:
            reasons.append(f"{name}/{execution}: {reason}")
            continue
        if name not in priced:  # how the factors run changes neither what they leave out nor, to speak of, how they round
            priced[name] = _prices(site, decomposition, weight, value, moment, allowed.storages)
        prices = priced[name]
        forms = [(Form(name, rank, storage, execution), error) for storage in allowed.storages for rank, error in prices.truncation]
        proposals += [
            Proposal(form, error, prices.rounding[form.storage] * (1 - error)) for form, error in forms if declines(site, form) is None
        ]
    return tuple(p for p in proposals if p.truncation + p.rounding <= WORST_ERROR), tuple(reasons)


@dataclass(frozen=True)
class _Prices:
    """Errors of one decomposition of one site.

    Attributes:
        truncation: (ranks, relative error) over the grid.
        rounding: storage → relative error that storing the factors adds.
    """

    truncation: tuple[tuple[tuple[int, ...], float], ...]
    rounding: dict[str, float]


def _prices(
    site: Site,
    decomposition: Decomposition,
    weight: NDArray[np.float64],
    value: NDArray[np.generic],
    moment: Moment,
    storages: Sequence[str],
) -> _Prices:
    """Truncation at every rank of the grid, and rounding at the middle one."""
    ranks = decomposition.grid(site.use)
    rounding = dict.fromkeys(storages, 0.0)
    if not ranks:
        return _Prices((), rounding)
    errors = decomposition.errors(weight, moment, site.use, ranks)
    middle = len(ranks) // 2
    form = Form(decomposition.name, ranks[middle], "float", decomposition.execution)
    factors = fit_factors(site, form, weight, moment)
    exact = form_error(site, form, value, weight, moment, factors)
    for storage in storages:
        stored = replace(form, storage=storage)
        if storage != "float" and declines(site, stored) is None:
            total = form_error(site, stored, value, weight, moment, factors)
            rounding[storage] = max(0.0, total - exact) / max(1e-12, 1 - exact)
    return _Prices(tuple(zip(ranks, errors, strict=True)), rounding)
