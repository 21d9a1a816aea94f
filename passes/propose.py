"""Propose candidates: every form that a site can take, with its relative local error, from a few spectra per site.

Errors are ‖(W − Ŵ)A½‖²/‖WA½‖². Truncation errors come from spectra (one per decomposition prices all its ranks). Rounding errors of the
dense weight are computed; those of factors are computed once per storage at a middle rank and taken for the other ranks too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from intaglio.ops.decompositions import DECOMPOSITIONS, Decomposition
from intaglio.ops.form import UNCHANGED, Form
from intaglio.ops.moment import Moment, relative_error
from intaglio.ops.storage import STORAGES

from .fit import pack
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
    for storage in allowed.storages:
        form = Form("dense", (), storage)
        reason = declines(site, form)
        if storage == "float" or "dense" not in allowed.decompositions:
            continue
        if reason:
            reasons.append(f"{form}: {reason}")
            continue
        proposals.append(Proposal(form, 0.0, _dense_error(site, form, value, weight, moment)))
    rounding: dict[str, float] = {}
    for (name, execution), decomposition in DECOMPOSITIONS.items():
        if name not in allowed.decompositions or execution not in allowed.executions:
            continue
        reason = decomposition.declines(site.use) or declines(site, Form(name, decomposition.full(site.use), "float", execution))
        if reason:
            reasons.append(f"{name}/{execution}: {reason}")
            continue
        proposals += _factored(site, decomposition, weight, value, moment, allowed.storages, rounding)
    return tuple(p for p in proposals if p.truncation + p.rounding <= WORST_ERROR), tuple(reasons)


def _dense_error(site: Site, form: Form, value: NDArray[np.generic], weight: NDArray[np.float64], moment: Moment) -> float:
    return relative_error(weight, pack(site, form, value, moment)[1], moment)


def _factored(
    site: Site,
    decomposition: Decomposition,
    weight: NDArray[np.float64],
    value: NDArray[np.generic],
    moment: Moment,
    storages: Sequence[str],
    rounding: dict[str, float],
) -> list[Proposal]:
    ranks = decomposition.grid(site.use)
    if not ranks:
        return []
    errors = decomposition.errors(weight, moment, site.use, ranks)
    found = []
    for storage in storages:
        if storage not in rounding:
            rounding[storage] = _factor_rounding(site, storage, value, weight, moment, decomposition)
        share = 1.5 if len(decomposition.shapes(site.use, ranks[0])) > 2 else 1.0
        for rank, error in zip(ranks, errors, strict=True):
            form = Form(decomposition.name, rank, storage, decomposition.execution)
            if declines(site, form) is None:
                found.append(Proposal(form, error, share * rounding[storage] * (1 - error)))
    return found


def _factor_rounding(
    site: Site, storage: str, value: NDArray[np.generic], weight: NDArray[np.float64], moment: Moment, decomposition: Decomposition
) -> float:
    """Relative error that storing both factors of a low-rank form adds, at a middle rank."""
    if storage == "float":
        return 0.0
    name = decomposition.name if decomposition.name in ("lowrank", "channel_svd") else "channel_svd"
    simple = DECOMPOSITIONS[name, "dense"]
    ranks = simple.grid(site.use)
    if not ranks:
        return 0.0
    middle = ranks[len(ranks) // 2]
    form = Form(name, middle, storage, "dense")
    if declines(site, form):
        form = Form(name, middle, storage, "contract")
    if declines(site, form):
        return 0.0
    exact = simple.errors(weight, moment, site.use, [middle])[0]
    total = relative_error(weight, pack(site, form, value, moment)[1], moment)
    return max(0.0, total - exact) / max(1e-12, 1 - exact)
