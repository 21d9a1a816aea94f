"""Which options an optimum may need: those that no other option of their group can replace in every choice.

Replacing b by a may make the others' resources dearer, and by how much is bounded without knowing the others: by the resources
that a needs and b does not, and by those that b provides and a does not. Where they cost nothing, this is the usual dominance of
the multiple-choice knapsack (Kellerer, Pferschy and Pisinger, "Knapsack Problems", 2004, section 11.2).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .budget import QUANTITIES, Budget, Cost
from .problem import Option, Problem

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_ROUNDING = 1e-12  # relative; far above that of a few sums, far below differences that matter


def undominated(problem: Problem, budget: Budget) -> tuple[tuple[int, ...], ...]:
    """Per group, the indices of the options that an optimum may need.

    An option is dominated if another of its group costs no more of any quantity that `budget` limits or minimizes, even if it
    has to pay for every resource that only it needs or that only the other provides; if it requires nothing that the other does
    not; and if it provides all that the other provides and any option requires. Of equivalent options the one with the smaller
    other costs, then the first, stays; but both stay if their resources may make a difference there.
    """
    relevant = [limit is not None or quantity == budget.minimize for quantity, limit in zip(QUANTITIES, budget.limits(), strict=True)]
    required = frozenset(name for group in problem.groups for option in group for name in option.requires)
    return tuple(_undominated_in(group, np.array(relevant), problem.shared, required) for group in problem.groups)


def _undominated_in(group: tuple[Option, ...], relevant: Mask, shared: Mapping[str, Cost], required: frozenset[str]) -> tuple[int, ...]:
    costs = np.array([option.costs() for option in group], dtype=np.float64)
    extra = _extra(group, shared)
    no_worse = _replaceable(group, required)  # [a, b]: a can replace b in any choice
    for i in np.flatnonzero(relevant):
        own, other = costs[:, i, None], costs[None, :, i]
        rounding = np.where(extra[i] > 0, _ROUNDING * (np.abs(own) + np.abs(other) + extra[i]), 0.0)
        no_worse &= own + extra[i] + rounding <= other
    rest = np.flatnonzero(~relevant)
    rank = np.empty(len(group), dtype=np.int64)
    rank[sorted(range(len(group)), key=lambda index: (*costs[index, rest], index))] = np.arange(len(group))
    preferred = (rank[:, None] < rank[None, :]) & (extra[rest] == 0).all(axis=0)
    dominated = (no_worse & (~no_worse.T | preferred)).any(axis=0)
    return tuple(np.flatnonzero(~dominated).tolist())


def _extra(group: tuple[Option, ...], shared: Mapping[str, Cost]) -> Floats:
    """(quantities, options, options), >= 0: the most that all resources together get dearer when [a] replaces [b]."""
    names = sorted({name for option in group for name in (*option.shared, *option.provides)})
    needs = _incidence([option.shared for option in group], names)
    provides = _incidence([option.provides for option in group], names)
    prices = np.array([shared[name].values() for name in names], dtype=np.float64).reshape(-1, len(QUANTITIES)).T[:, None, :]
    newly_needed = (needs * prices) @ (1 - needs).T
    no_longer_provided = (1 - needs - provides) @ (provides * prices).transpose(0, 2, 1)  # what a needs is counted already
    return np.asarray(newly_needed + no_longer_provided)


def _replaceable(group: tuple[Option, ...], required: frozenset[str]) -> Mask:
    """(options, options): whether [a] requires nothing that [b] does not, and provides what [b] does of `required`."""
    names = sorted(required.intersection(name for option in group for name in (*option.provides, *option.requires)))
    requires = _incidence([option.requires for option in group], names)
    provides = _incidence([option.provides for option in group], names)
    return np.asarray((requires @ (1 - requires).T == 0) & ((1 - provides) @ provides.T == 0))


def _incidence(named: list[tuple[str, ...]], names: list[str]) -> Floats:
    """(options, names): 1 where the option has the name, else 0."""
    position = {name: index for index, name in enumerate(names)}
    incidence = np.zeros((len(named), len(names)))
    for row, its in enumerate(named):
        incidence[row, [position[name] for name in its if name in position]] = 1
    return incidence
