"""The multiple-choice knapsack: one option per group, coupled by resources, any mix of limits and objective.

    minimize    primary(x, y)
    subject to  sum of x over a group = 1                   exactly one option per group
                need(g, f) - provide(g, f) <= y_f           a resource is paid once, unless it is provided
                require(g, f) - provide(g, f) <= 0          what is required is provided
                quantity(x, y) <= limit                     for every limited quantity
                x, y binary

need(g, f) and require(g, f) are the sums of x over the options of group g that need or require resource f, provide(g, f) is the
sum over the options of all other groups that provide it.

The binary program is a vectorized cvxpy model solved by HiGHS, on a *core* of the options: the linear relaxation's multipliers
give a Lagrangian bound L and, for every option, the least that choosing it adds to L (its reduced cost). A choice that uses any
option of reduced cost above t costs at least L + t, so what is proved on the options below t holds for all of them up to L + t
(the core concept of Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", EJOR 83, 1995).

Near ties (relative differences below `gap / 100`) go to the smaller other quantities. Same input, same answer, as long as the
time limit does not strike.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import cvxpy as cp
import highspy
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from .budget import QUANTITIES, Budget, Cost, Nearest, Quantity
from .dominance import undominated
from .problem import Problem, total_cost

_GREETING = threading.Lock()

Status = Literal["optimal", "feasible", "infeasible", "unknown"]
Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]

_ROW_SCALE = 1e3  # largest coefficient of a limit's row: HiGHS's feasibility tolerance of 1e-6 is then 1e-9 of what is at stake
_MAX_CUTS = 20  # choices over a limit by less than the tolerance that are forbidden one by one before the limits are tightened
_MARGIN = 2e-6  # by which the scaled limits are tightened then: twice the tolerance
_TIE_WEIGHT = 0.01  # share of the gap that all the other quantities may cost the primary one, each
_FEASIBLE = 2  # HighsInfo.primal_solution_status, kSolutionStatusFeasible


@dataclass(frozen=True)
class Solution:
    """What was found and what was proved.

    Attributes:
        status: `optimal`: the choice keeps every limit and `gap` is within the requested gap; `feasible`: it keeps every limit,
            but the proof ended with a larger gap (time limit); `infeasible`: it is proved that no choice keeps the limits
            and has all that its options require;
            `unknown`: neither a choice nor a proof within the time limit.
        choice: index of the chosen option, per group; empty when infeasible or unknown.
        objective: total of the minimized quantity, in its own unit; inf without a choice.
        bound: no choice within the limits has a smaller objective (up to the solver's tolerance, 1e-7); inf when infeasible.
        gap: (objective - bound) / |objective|, 0 when they agree; inf without a choice. Costs of both signs that cancel out to
            nearly nothing leave a large one.
        seconds: wall time of the search, the report on an infeasible budget included.
        candidates: number of options before any was discarded.
        nearest: what could be promised instead; only when infeasible. None then, too, if the budget limits nothing, if the options'
            requirements contradict each other whatever the budget, or if nothing was found in time.
        cost: total of the choice, recomputed exactly from the options; None without a choice.
    """

    status: Status
    choice: tuple[int, ...]
    objective: float
    bound: float
    gap: float
    seconds: float
    candidates: int
    nearest: Nearest | None
    cost: Cost | None


def solve(problem: Problem, budget: Budget, *, gap: float = 1e-4, time_limit_s: float = 10.0) -> Solution:
    """Choose one option per group.

    Args:
        problem: the options.
        budget: limits on the totals (base included) and the quantity to minimize.
        gap: relative gap between objective and bound at which the search stops.
        time_limit_s: wall-clock limit of the search; explaining an infeasible budget may take as long again for each limit.

    Raises:
        ValueError: `gap` is negative or `time_limit_s` is not positive.
    """
    if not (gap >= 0 and time_limit_s > 0):
        raise ValueError(f"gap={gap}, time_limit_s={time_limit_s}: expected gap >= 0 and time_limit_s > 0")
    start_s = time.perf_counter()
    solution = _search(problem, budget, gap, time_limit_s)
    if solution.status == "infeasible":
        solution = replace(solution, nearest=_nearest(problem, budget, gap, time_limit_s))
    return replace(solution, seconds=time.perf_counter() - start_s)


@dataclass(frozen=True)
class _Program:
    """The binary program over columns [options of all groups..., resources..., one constant fixed at 1].

    Every group's smallest cost is moved to the constant, so that the other columns are >= 0 and the solver's relative gap is
    that of the whole cost.

    Attributes:
        problem, budget: what it was built for.
        costs: (3, columns), rows in the order of `QUANTITIES`; the last column holds base and group minima.
        group: (options,), the group of each option column.
        option: (options,), the index of each option column in its group.
        partition: (groups + 1, columns), equals 1.
        coupling: (couplings, columns), at most 0: what the options of a group need or require, less what others provide or pay.
        limits: (limits, columns), at most `rhs`, which excludes the constant; scaled to coefficients of at most `_ROW_SCALE`.
        rhs: (limits,).
    """

    problem: Problem
    budget: Budget
    costs: Floats
    group: Indices
    option: Indices
    partition: sp.csr_array
    coupling: sp.csr_array
    limits: Floats
    rhs: Floats

    @property
    def minimized(self) -> int:
        """Index of the minimized quantity."""
        return QUANTITIES.index(self.budget.minimize)

    def choice(self, taken: Mask) -> tuple[int, ...]:
        """The first taken option of each group; `taken` (options,) holds at least one per group."""
        columns = np.flatnonzero(taken)
        _, firsts = np.unique(self.group[columns], return_index=True)
        return tuple(self.option[columns[firsts]].tolist())

    def admits(self, choice: tuple[int, ...]) -> bool:
        """Whether `choice` has what it requires, and its exact cost keeps every limit."""
        return self.problem.allows(choice) and self.budget.admits(total_cost(self.problem, choice))

    def objective(self, choice: tuple[int, ...]) -> float:
        """The exact total of the minimized quantity."""
        return total_cost(self.problem, choice).values()[self.minimized]


@dataclass(frozen=True)
class _Multipliers:
    """Prices of the rows of a program's `coupling` (couplings,) and `limits` (limits,), in units of the primary cost."""

    coupling: Floats
    limits: Floats


def _program(problem: Problem, budget: Budget) -> _Program | None:
    """The program for a budget; None when a limit is below the sum of smallest costs or excludes every option of a group."""
    kept = undominated(problem, budget)
    group = np.repeat(np.arange(len(kept)), [len(indices) for indices in kept])
    option = np.array([index for indices in kept for index in indices], dtype=np.int64)
    chosen = [problem.groups[g][i] for g, i in zip(group, option, strict=True)]
    costs = np.array([candidate.costs() for candidate in chosen], dtype=np.float64).reshape(-1, len(QUANTITIES)).T
    minima = np.stack([_per_group(np.minimum, cost, group) for cost in costs])
    spread = costs - minima[:, group]
    constant = np.array([math.fsum([base, *least]) for base, least in zip(problem.base.values(), minima, strict=True)])

    needed = {name for candidate in chosen for name in candidate.shared}
    names = [name for name, cost in problem.shared.items() if name in needed and any(cost.values())]
    resources = np.array([problem.shared[name].values() for name in names], dtype=np.float64).reshape(-1, len(QUANTITIES)).T
    rooms = _rooms(budget, constant)
    possible, payable = _affordable(spread, rooms), _affordable(resources, rooms)
    group, option, spread = group[possible], option[possible], spread[:, possible]
    if len(np.unique(group)) < len(kept) or not _affordable(np.zeros((len(QUANTITIES), 1)), rooms).all():
        return None

    resources = resources[:, payable]
    paid = [name for name, affordable in zip(names, payable, strict=True) if affordable]
    unpaid = frozenset(names).difference(paid)
    columns = np.concatenate([spread, resources, constant[:, None]], axis=1)
    rows = np.concatenate([spread, resources, np.zeros((len(QUANTITIES), 1))], axis=1)[list(rooms)]
    least_peak = [1e-7 * total for _, total in rooms.values()]  # keeps the rounding of the sums below the solver's tolerance
    peak = np.maximum(rows.max(axis=1, initial=0.0), least_peak)
    unit = np.where(peak > 0, peak, 1.0)
    return _Program(
        problem=problem,
        budget=budget,
        costs=columns,
        group=group,
        option=option,
        partition=_partition(group, columns.shape[1], len(kept)),
        coupling=_coupling(problem, group, option, paid, unpaid),
        limits=rows / unit[:, None] * _ROW_SCALE,  # in this order, because 1 / unit may overflow
        rhs=np.array([room for room, _ in rooms.values()]) / unit * _ROW_SCALE,
    )


def _rooms(budget: Budget, constant: Floats) -> dict[int, tuple[float, float]]:
    """By index of the limited quantity: what its limit leaves above `constant` (3,), and the magnitude that their rounding goes with."""
    limits = {i: limit for i, limit in enumerate(budget.limits()) if limit is not None}
    return {i: (float(limit - constant[i]), float(max(abs(limit), abs(constant[i])))) for i, limit in limits.items()}


def _affordable(costs: Floats, rooms: Mapping[int, tuple[float, float]]) -> Mask:
    """(columns,): whether each of `costs` (3, columns) fits into every room; a limit may be attained exactly, sums are rounded."""
    fits = [costs[i] <= room + 1e-12 * magnitude for i, (room, magnitude) in rooms.items()]
    return np.all(fits, axis=0) if fits else np.ones(costs.shape[1], dtype=np.bool_)


def _partition(group: Indices, columns: int, groups: int) -> sp.csr_array:
    """(groups + 1, columns): the options of each group, and the constant."""
    row = np.append(group, groups)
    column = np.append(np.arange(len(group)), columns - 1)
    return sp.csr_array((np.ones(len(row)), (row, column)), shape=(groups + 1, columns))


def _coupling(problem: Problem, group: Indices, option: Indices, paid: list[str], unpaid: frozenset[str]) -> sp.csr_array:
    """(couplings, columns): for each group, the options that need a resource less those of other groups that provide it.

    If the resource is one of `paid`, which have a column each, less the resource as well. What is in `unpaid` is beyond some
    limit: to need it is to require it. Whatever else is needed costs nothing.
    """
    position = {name: len(group) + index for index, name in enumerate(paid)}
    demands: dict[tuple[int, str, bool], list[int]] = {}  # group, resource, whether it may be paid → columns
    providers: dict[str, list[int]] = {}
    for column, (g, i) in enumerate(zip(group.tolist(), option.tolist(), strict=True)):
        candidate = problem.groups[g][i]
        required = unpaid.intersection(candidate.shared).union(candidate.requires)
        for name in sorted(required):
            demands.setdefault((g, name, False), []).append(column)
        for name in sorted(position.keys() & set(candidate.shared) - required):
            demands.setdefault((g, name, True), []).append(column)
        for name in set(candidate.provides):
            providers.setdefault(name, []).append(column)
    entries: list[tuple[int, int, float]] = []
    for row, ((g, name, payable), columns) in enumerate(demands.items()):
        entries += [(row, column, 1.0) for column in columns]
        entries += [(row, column, -1.0) for column in providers.get(name, []) if group[column] != g]
        entries += [(row, position[name], -1.0)] if payable else []
    row_index, column_index = np.array([entry[:2] for entry in entries], dtype=np.int64).reshape(-1, 2).T
    value = np.array([entry[2] for entry in entries])
    return sp.csr_array((value, (row_index, column_index)), shape=(len(demands), len(group) + len(paid) + 1))


def _search(problem: Problem, budget: Budget, gap: float, time_limit_s: float) -> Solution:
    """Solve on growing cores until the gap is proved, the budget is proved infeasible, or time is up."""
    deadline_s = time.perf_counter() + time_limit_s
    program = _program(problem, budget)
    if program is None:
        return _report(problem, budget, None, math.inf, gap)
    multipliers = _relax(program, deadline_s)
    if multipliers is None:
        return _report(problem, budget, None, math.inf, gap)
    least, reduced = _lagrangian(program, multipliers)

    bound = max(least, float(program.costs[program.minimized, -1]))
    found = [choice for choice in [program.choice(reduced == 0)] if program.admits(choice)]
    radius = 10 * gap * abs(least)
    while True:
        core = reduced <= radius
        choice, proved = _solve_core(program, core, least, gap, deadline_s)
        bound = max(bound, proved if core.all() else min(proved, least + radius))
        found += [] if choice is None else [choice]
        best = min(reversed(found), key=program.objective, default=None)
        solution = _report(problem, budget, best, bound, gap)
        if solution.status in ("optimal", "infeasible") or core.all() or time.perf_counter() >= deadline_s:
            return solution
        radius = solution.objective - least if solution.objective - least > radius else math.inf


def _report(problem: Problem, budget: Budget, choice: tuple[int, ...] | None, bound: float, gap: float) -> Solution:
    """The solution for what is known so far; `seconds` and `nearest` are left to the caller."""
    candidates = sum(len(group) for group in problem.groups)
    if choice is None:
        status: Status = "infeasible" if bound == math.inf else "unknown"
        return Solution(status, (), math.inf, bound, math.inf, 0.0, candidates, None, None)
    cost = total_cost(problem, choice)
    objective = cost.values()[QUANTITIES.index(budget.minimize)]
    bound = min(bound, objective)
    reached = 0.0 if bound == objective else (objective - bound) / abs(objective) if objective else math.inf
    return Solution("optimal" if reached <= gap else "feasible", choice, objective, bound, reached, 0.0, candidates, None, cost)


def _nearest(problem: Problem, budget: Budget, gap: float, time_limit_s: float) -> Nearest | None:
    """What each limit would have to be, the others kept if that is possible; None if no value was found."""
    attained: list[float | None] = []
    alone: list[Quantity] = []
    for index, (quantity, limit) in enumerate(zip(QUANTITIES, budget.limits(), strict=True)):
        if limit is None:
            attained.append(None)
            continue
        solution = _search(problem, budget.relaxed(quantity), gap, time_limit_s)
        if solution.cost is None:
            alone.append(quantity)
            solution = _search(problem, Budget(minimize=quantity), gap, time_limit_s)
        attained.append(None if solution.cost is None else solution.cost.values()[index])
    if all(value is None for value in attained):
        return None
    size_bytes, latency_s, divergence = attained
    return Nearest(None if size_bytes is None else int(size_bytes), latency_s, divergence, tuple(alone))


def _relax(program: _Program, deadline_s: float) -> _Multipliers | None:
    """Multipliers of the linear relaxation; None when it is infeasible. Zeros when time is up."""
    primary = program.costs[program.minimized]
    x = cp.Variable(len(primary), bounds=[0, 1])
    partition: list[cp.Constraint] = [rows == 1 for rows in _rows(program.partition, x)]
    coupling: list[cp.Constraint] = [rows <= 0 for rows in _rows(program.coupling, x)]
    limits: list[cp.Constraint] = [rows <= program.rhs for rows in _rows(program.limits, x)]
    unit = float(np.abs(primary).max()) or 1.0
    model = cp.Problem(cp.Minimize((primary / unit) @ x), [*partition, *coupling, *limits])
    if _run(model, deadline_s, {}) is None:
        return None
    return _Multipliers(_duals(coupling, unit), _duals(limits, unit))


def _rows(matrix: Any, x: cp.Variable) -> list[cp.Expression]:
    """matrix·x, as a list of one; empty where the matrix has no rows, which not every version of cvxpy takes."""
    return [cp.Constant(matrix) @ x] if matrix.shape[0] else []


def _duals(constraints: list[cp.Constraint], unit: float) -> Floats:
    """The constraints' multipliers, times `unit`; zeros when time was up before there were any."""
    found = [np.zeros(rows.shape) if rows.dual_value is None else rows.dual_value * unit for rows in constraints]
    return np.concatenate([np.zeros(0), *found])


def _lagrangian(program: _Program, multipliers: _Multipliers) -> tuple[float, Floats]:
    """Bound on the primary cost for any multipliers >= 0, and the (options,) least increase of it when an option is chosen.

    Plain arithmetic on the data: valid whatever the accuracy of the solver that proposed the multipliers.
    """
    primary = program.costs[program.minimized]
    coupling, limits = np.maximum(multipliers.coupling, 0.0), np.maximum(multipliers.limits, 0.0)
    priced = primary + program.coupling.T @ coupling + program.limits.T @ limits
    options = len(program.group)
    cheapest = _per_group(np.minimum, priced[:options], program.group)
    resources = np.minimum(priced[options:-1], 0.0)
    bound = math.fsum([*cheapest, *resources, primary[-1], *(-limits * program.rhs)])
    return bound, priced[:options] - cheapest[program.group]


def _solve_core(program: _Program, core: Mask, least: float, gap: float, deadline_s: float) -> tuple[tuple[int, ...] | None, float]:
    """The best choice of options in the core, None if none was found, and a bound on the primary cost over the core."""
    columns = np.flatnonzero(np.append(core, np.ones(program.costs.shape[1] - len(core), dtype=np.bool_)))
    objective, unit, slack = _objective(program, columns, least, _TIE_WEIGHT * gap)
    x = cp.Variable(len(columns), boolean=True)
    partition, coupling, limits = (_rows(m[:, columns], x) for m in (program.partition, program.coupling, program.limits))
    rows: list[cp.Constraint] = [*(row == 1 for row in partition), *(row <= 0 for row in coupling)]
    options = {"mip_rel_gap": (1 - 10 * _TIE_WEIGHT) * gap, "mip_abs_gap": 0.0}
    bound = -math.inf
    for attempt in range(_MAX_CUTS + 1):
        margin = _MARGIN if attempt == _MAX_CUTS else 0.0
        model = cp.Problem(cp.Minimize(objective @ x), [*rows, *(row <= program.rhs - margin for row in limits)])
        info = _run(model, deadline_s, options)
        if not margin:
            bound = max(bound, math.inf if info is None else (info.mip_dual_bound - slack) * unit)
        if info is None or info.primal_solution_status != _FEASIBLE:
            break
        taken = np.zeros(len(core), dtype=np.bool_)
        taken[core] = np.asarray(x.value)[: core.sum()] > 0.5
        choice = program.choice(taken)
        if program.admits(choice):
            return choice, bound
        rows.append(cp.Constant(np.ones(taken.sum())) @ x[np.flatnonzero(taken[core])] <= taken.sum() - 1)
    return None, bound


def _objective(program: _Program, columns: Indices, least: float, tie_weight: float) -> tuple[Floats, float, float]:
    """Coefficients of `columns`, the primary cost of one unit of them, and the most that the tie-breaking terms add, in units.

    The unit is the bound `least`, so that the optimum is near one, unless the coefficients would be too far apart.
    """
    primary = program.costs[program.minimized, columns]
    peak = float(np.abs(primary).max()) or 1.0
    unit = abs(least) if abs(least) > 1e-6 * peak else peak
    coefficients = primary / unit
    options = columns[columns < len(program.group)]
    for index, cost in enumerate(program.costs):
        most = _per_group(np.maximum, cost[options], program.group[options]).sum() + cost[len(program.group) : -1].sum()
        if index != program.minimized and most > 0:
            coefficients[:-1] += cost[columns[:-1]] / most * tie_weight
    return coefficients, unit, (len(QUANTITIES) - 1) * tie_weight


def _per_group(reduce: np.ufunc, values: Floats, group: Indices) -> Floats:
    """(groups,): `values` (options,) reduced over each run of equal `group`."""
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    return np.asarray(reduce.reduceat(values, starts)) if len(starts) else np.zeros(0)


@cache
def _greeted() -> None:
    """Let HiGHS greet: since 1.16 the first object of a process does so on its standard output, which `--json` promises to one document."""
    with contextlib.suppress(OSError):  # there may be no standard output
        kept = os.dup(1)
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 1)
            highspy.Highs()  # type: ignore[no-untyped-call]
        finally:
            os.dup2(kept, 1)
            os.close(kept)


def _run(model: cp.Problem, deadline_s: float, options: Mapping[str, float]) -> Any:
    """Solve with HiGHS; its `HighsInfo`, or None when the model is infeasible (every variable is bounded: never unbounded)."""
    with _GREETING:
        _greeted()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # cvxpy's advice at a time limit; `HighsInfo` says what there is
        model.solve(solver=cp.HIGHS, time_limit=max(deadline_s - time.perf_counter(), 0.01), **options)  # type: ignore[no-untyped-call]
    if model.status in (cp.INFEASIBLE, cp.settings.INFEASIBLE_OR_UNBOUNDED):
        return None
    return model.solver_stats.extra_stats
