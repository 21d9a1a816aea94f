"""The multiple-choice knapsack: one option per group, resources paid once, any mix of limits and objective.

    minimize    primary(x, y)
    subject to  sum of x over a group = 1           exactly one option per group
                sum of a group's x that use f <= y_f    a shared resource is paid once
                quantity(x, y) <= limit             for every limited quantity
                x, y binary

The binary program is a vectorized cvxpy model solved by HiGHS, on a *core* of the options: the linear relaxation's multipliers
give a Lagrangian bound L and, for every option, the least that choosing it adds to L (its reduced cost). A choice that uses any
option of reduced cost above t costs at least L + t, so what is proved on the options below t holds for all of them up to L + t
(the core concept of Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", EJOR 83, 1995).

Near ties (relative differences below `gap / 100`) go to the smaller other quantities. Same input, same answer, as long as the
time limit does not strike.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from .budget import QUANTITIES, Budget, Cost, Nearest, Quantity

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
class Option:
    """One candidate of a group.

    Attributes:
        size_bytes: bytes of its own; may be negative when costs are differences.
        latency_s: seconds; may be negative when costs are differences.
        divergence: what it adds to the output divergence, >= 0.
        shared: resources of the problem that it needs; each is paid once however many options use it.
    """

    size_bytes: int
    latency_s: float
    divergence: float
    shared: tuple[str, ...] = ()

    def costs(self) -> tuple[int, float, float]:
        """Its own costs in the order of `QUANTITIES`."""
        return self.size_bytes, self.latency_s, self.divergence


@dataclass(frozen=True)
class Problem:
    """Groups of options, exactly one option of each to be chosen.

    Attributes:
        groups: at least one option each.
        base: the cost of everything that is not decided.
        shared: bytes of each shared resource, >= 0.

    Raises:
        ValueError: an empty group, a cost that is not finite, a negative divergence or resource, or an unknown resource.
    """

    groups: tuple[tuple[Option, ...], ...]
    base: Cost
    shared: Mapping[str, int]

    def __post_init__(self) -> None:
        for name, size_bytes in self.shared.items():
            if size_bytes < 0:
                raise ValueError(f"shared resource {name!r}: {size_bytes} bytes, expected at least 0")
        for index, group in enumerate(self.groups):
            if not group:
                raise ValueError(f"group {index}: no options, expected at least one")
            for option in group:
                if not (all(map(math.isfinite, option.costs())) and option.divergence >= 0):
                    raise ValueError(f"group {index}: {option}, expected finite costs and divergence >= 0")
                for name in option.shared:
                    if name not in self.shared:
                        raise ValueError(f"group {index}: unknown shared resource {name!r}, add its bytes to `shared`")


@dataclass(frozen=True)
class Solution:
    """What was found and what was proved.

    Attributes:
        status: `optimal`: the choice keeps every limit and `gap` is within the requested gap; `feasible`: it keeps every limit,
            but the proof ended with a larger gap (time limit); `infeasible`: it is proved that no choice keeps the limits;
            `unknown`: neither a choice nor a proof within the time limit.
        choice: index of the chosen option, per group; empty when infeasible or unknown.
        objective: total of the minimized quantity, in its own unit; inf without a choice.
        bound: no choice within the limits has a smaller objective (up to the solver's tolerance, 1e-7); inf when infeasible.
        gap: (objective - bound) / |objective|, 0 when they agree; inf without a choice. Costs of both signs that cancel out to
            nearly nothing leave a large one.
        seconds: wall time of the search, the report on an infeasible budget included.
        candidates: number of options before any was discarded.
        nearest: what could be promised instead; only when infeasible.
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


def total_cost(problem: Problem, choice: Sequence[int]) -> Cost:
    """The cost of a choice (one option index per group): sizes in exact integers, the rest correctly rounded sums."""
    options = [group[index] for group, index in zip(problem.groups, choice, strict=True)]
    used = {name for option in options for name in option.shared}
    return Cost(
        problem.base.size_bytes + sum(option.size_bytes for option in options) + sum(problem.shared[name] for name in used),
        math.fsum([problem.base.latency_s, *(option.latency_s for option in options)]),
        math.fsum([problem.base.divergence, *(option.divergence for option in options)]),
    )


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


def undominated(problem: Problem, budget: Budget) -> tuple[tuple[int, ...], ...]:
    """Per group, the indices of the options that an optimum may need.

    An option is dominated if another of its group costs no more of any quantity that `budget` limits or minimizes, even if it
    has to pay for the shared resources that only it uses. Of equivalent options the one with the smaller other costs, then the
    first, stays.
    """
    relevant = _relevant(budget)
    return tuple(_undominated_in(group, relevant, problem.shared) for group in problem.groups)


def _relevant(budget: Budget) -> list[int]:
    """Indices of the quantities that are limited or minimized."""
    return [i for i, limit in enumerate(budget.limits()) if limit is not None or QUANTITIES[i] == budget.minimize]


def _undominated_in(group: tuple[Option, ...], relevant: list[int], shared: Mapping[str, int]) -> tuple[int, ...]:
    costs = np.array([option.costs() for option in group], dtype=np.float64)
    names = sorted({name for option in group for name in option.shared})
    uses = np.array([[name in option.shared for name in names] for option in group], dtype=np.float64)
    resource_bytes = np.array([shared[name] for name in names], dtype=np.float64)
    extra_bytes = (uses * resource_bytes) @ (1 - uses).T  # [a, b]: what choosing a instead of b may cost in resources
    no_worse = np.ones((len(group), len(group)), dtype=np.bool_)  # [a, b]: a can replace b in any choice
    for i in relevant:
        column = costs[:, i]
        no_worse &= column[:, None] + (extra_bytes if QUANTITIES[i] == "size" else 0.0) <= column[None, :]
    rest = [i for i in range(len(QUANTITIES)) if i not in relevant]
    rank = np.empty(len(group), dtype=np.int64)
    rank[sorted(range(len(group)), key=lambda index: (*costs[index, rest], index))] = np.arange(len(group))
    dominated = (no_worse & (~no_worse.T | (rank[:, None] < rank[None, :]))).any(axis=0)
    return tuple(np.flatnonzero(~dominated).tolist())


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
        sharing: (pairs, columns), at most 0.
        limits: (limits, columns), at most `rhs`, which excludes the constant; scaled to coefficients of at most `_ROW_SCALE`.
        rhs: (limits,).
    """

    problem: Problem
    budget: Budget
    costs: Floats
    group: Indices
    option: Indices
    partition: sp.csr_array
    sharing: sp.csr_array
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
        """Whether the exact cost of `choice` keeps every limit."""
        return self.budget.admits(total_cost(self.problem, choice))

    def objective(self, choice: tuple[int, ...]) -> float:
        """The exact total of the minimized quantity."""
        return total_cost(self.problem, choice).values()[self.minimized]


@dataclass(frozen=True)
class _Multipliers:
    """Prices of the rows of a program's `sharing` (pairs,) and `limits` (limits,), in units of the primary cost."""

    sharing: Floats
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

    possible = np.ones(len(chosen), dtype=np.bool_)
    rooms: list[tuple[int, float, float]] = []
    for i, limit in enumerate(budget.limits()):
        if limit is not None:
            room = limit - constant[i]
            total = max(abs(limit), abs(constant[i]))
            noise = 1e-12 * total  # rounding of the sums: a limit may be attained exactly
            if room < -noise:
                return None
            possible &= spread[i] <= room + noise
            rooms.append((i, room, total))
    group, option, spread = group[possible], option[possible], spread[:, possible]
    if len(np.unique(group)) < len(kept):
        return None

    names = [name for name, size_bytes in problem.shared.items() if size_bytes > 0]
    resources = np.zeros((len(QUANTITIES), len(names)))
    resources[0] = [problem.shared[name] for name in names]
    columns = np.concatenate([spread, resources, constant[:, None]], axis=1)
    rows = np.concatenate([spread, resources, np.zeros((len(QUANTITIES), 1))], axis=1)[[i for i, _, _ in rooms]]
    least_peak = [1e-7 * total for _, _, total in rooms]  # keeps the rounding of the sums below the solver's tolerance
    peak = np.maximum(rows.max(axis=1, initial=0.0), least_peak)
    scale = _ROW_SCALE / np.where(peak > 0, peak, _ROW_SCALE)
    return _Program(
        problem=problem,
        budget=budget,
        costs=columns,
        group=group,
        option=option,
        partition=_partition(group, columns.shape[1], len(kept)),
        sharing=_sharing(problem, group, option, names),
        limits=rows * scale[:, None],
        rhs=np.array([room for _, room, _ in rooms]) * scale,
    )


def _partition(group: Indices, columns: int, groups: int) -> sp.csr_array:
    """(groups + 1, columns): the options of each group, and the constant."""
    row = np.append(group, groups)
    column = np.append(np.arange(len(group)), columns - 1)
    return sp.csr_array((np.ones(len(row)), (row, column)), shape=(groups + 1, columns))


def _sharing(problem: Problem, group: Indices, option: Indices, names: list[str]) -> sp.csr_array:
    """(pairs, columns): for each used pair of group and resource, the group's options that use it minus the resource."""
    position = {name: index for index, name in enumerate(names)}
    pairs: dict[tuple[int, int], int] = {}
    entries: list[tuple[int, int, float]] = []
    for column, (g, i) in enumerate(zip(group.tolist(), option.tolist(), strict=True)):
        for name in sorted(set(problem.groups[g][i].shared) & position.keys()):
            pair = (g, position[name])
            if pair not in pairs:
                pairs[pair] = len(pairs)
                entries.append((pairs[pair], len(group) + pair[1], -1.0))
            entries.append((pairs[pair], column, 1.0))
    row, column_index, value = zip(*entries, strict=True) if entries else ((), (), ())
    return sp.csr_array((value, (row, column_index)), shape=(len(pairs), len(group) + len(names) + 1), dtype=np.float64)


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


def _nearest(problem: Problem, budget: Budget, gap: float, time_limit_s: float) -> Nearest:
    """What each limit would have to be, the others kept if that is possible."""
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
        attained.append(total_cost(problem, solution.choice).values()[index])
    size_bytes, latency_s, divergence = attained
    return Nearest(None if size_bytes is None else int(size_bytes), latency_s, divergence, tuple(alone))


def _relax(program: _Program, deadline_s: float) -> _Multipliers | None:
    """Multipliers of the linear relaxation; None when it is infeasible. Zeros when time is up."""
    primary = program.costs[program.minimized]
    x = cp.Variable(len(primary), bounds=[0, 1])
    partition: list[cp.Constraint] = [rows == 1 for rows in _rows(program.partition, x)]
    sharing: list[cp.Constraint] = [rows <= 0 for rows in _rows(program.sharing, x)]
    limits: list[cp.Constraint] = [rows <= program.rhs for rows in _rows(program.limits, x)]
    unit = float(np.abs(primary).max()) or 1.0
    model = cp.Problem(cp.Minimize((primary / unit) @ x), [*partition, *sharing, *limits])
    if _run(model, deadline_s, {}) is None:
        return None
    return _Multipliers(_duals(sharing, unit), _duals(limits, unit))


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
    sharing, limits = np.maximum(multipliers.sharing, 0.0), np.maximum(multipliers.limits, 0.0)
    priced = primary + program.sharing.T @ sharing + program.limits.T @ limits
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
    partition, sharing, limits = (_rows(m[:, columns], x) for m in (program.partition, program.sharing, program.limits))
    rows: list[cp.Constraint] = [*(row == 1 for row in partition), *(row <= 0 for row in sharing)]
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
            coefficients[:-1] += cost[columns[:-1]] * (tie_weight / most)
    return coefficients, unit, (len(QUANTITIES) - 1) * tie_weight


def _per_group(reduce: np.ufunc, values: Floats, group: Indices) -> Floats:
    """(groups,): `values` (options,) reduced over each run of equal `group`."""
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    return np.asarray(reduce.reduceat(values, starts)) if len(starts) else np.zeros(0)


def _run(model: cp.Problem, deadline_s: float, options: Mapping[str, float]) -> Any:
    """Solve with HiGHS; its `HighsInfo`, or None when the model is infeasible (every variable is bounded: never unbounded)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # cvxpy's advice at a time limit; `HighsInfo` says what there is
        model.solve(solver=cp.HIGHS, time_limit=max(deadline_s - time.perf_counter(), 0.01), **options)  # type: ignore[no-untyped-call]
    if model.status in (cp.INFEASIBLE, cp.settings.INFEASIBLE_OR_UNBOUNDED):
        return None
    return model.solver_stats.extra_stats
