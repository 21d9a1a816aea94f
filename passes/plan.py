"""The plan: which form each site gets, why, and everything needed to solve again for another budget. Plain JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from intaglio.ops.arithmetic import ARITHMETICS
from intaglio.ops.decompositions import DECOMPOSITIONS
from intaglio.ops.form import CARRIED, PRUNED, UNCHANGED, Form
from intaglio.ops.storage import STORAGES
from intaglio.solver import Budget, Cost, Option, Problem, Solution, solve

from .errors import InfeasibleError, InputError

VERSION = 3
"""Of the file format; version 2 is read too, it had no linear terms."""

UNITS = ("kl_nats", "relative_mse")
"""Of divergences."""


@dataclass(frozen=True)
class Candidate:
    """A form of one site, or of an operator without a weight, with its price.

    Attributes:
        form: the form.
        size_bytes: change of the file's size against the unchanged site, shared resources not counted.
        latency_s: change of the latency of one run, shared resources not counted.
        divergence: predicted divergence of the outputs if only this weight changes.
        error: relative error of the layer's output.
        needs: shared resources that are paid once, however many candidates need them, and not at all if one provides them.
        provides: shared resources that nobody pays when it is chosen.
        requires: shared resources that the candidate chosen for another site has to provide.
        linear: what the form changes of the labelled loss to first order, over what a unit of divergence adds to it, which for a
            cross-entropy and nats is 1; 0 where no labels took part.
    """

    form: Form
    size_bytes: int
    latency_s: float
    divergence: float
    error: float
    needs: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    linear: float = 0.0


@dataclass(frozen=True)
class Menu:
    """Everything the solver chooses from.

    Attributes:
        model_sha256: identity of the model the menu was made for.
        candidates: by site name, "unchanged" first; operators without weights that may run in integers come after the sites.
        base: size, latency and divergence of the model with every site unchanged.
        shared: cost of each shared resource: decode programs, and what lies between operators in floats and in integers; numbers of
            channels, which layers around them have to agree on, cost nothing.
        unit: of divergence: "kl_nats" or "relative_mse".
        equalized: whether channels of the model were rescaled for integers before anything was priced.
        floors: by value, below which the model that was priced lifts the scores that a Softmax reads.
        target: name of the target, which says whose operators the rewritten model may use.
        integers: name of the variant that operators compute with in integers; see `passes.kernels`.
        lineage: digest of the rounds that the priced weights come from, as in `Job`; empty for the model's own.
    """

    model_sha256: str
    candidates: Mapping[str, tuple[Candidate, ...]]
    base: Cost
    shared: Mapping[str, Cost]
    unit: str
    equalized: bool = False
    lineage: str = ""
    floors: Mapping[str, float] = field(default_factory=dict)
    target: str = "cpu"
    integers: str = "full"


@dataclass(frozen=True)
class Correction:
    """What measurement said of the predictions so far: factors on divergence and on latency changes, and bytes to leave free."""

    divergence: float = 1.0
    latency: float = 1.0
    spare_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """A choice for every site, with its certificate.

    Attributes:
        menu: what it was chosen from.
        forms: by site name.
        budget: in absolute units.
        solution: the solver's answer; None for a plan that was edited by hand.
        correction: the correction that the answer took into account.
        joint: whether the change of the labelled loss was minimised in place of the divergence.
    """

    menu: Menu
    forms: Mapping[str, Form]
    budget: Budget
    solution: Solution | None
    correction: Correction
    joint: bool = False

    def candidate(self, site: str) -> Candidate | None:
        """The chosen candidate of a site; None where the form was written in by hand."""
        return next((c for c in self.menu.candidates.get(site, ()) if c.form == self.forms[site]), None)

    @property
    def divergence(self) -> float:
        """Predicted divergence of the whole plan, corrected."""
        return self.correction.divergence * (sum(c.divergence for c in self._chosen()) + sum(cost.divergence for cost in self._paid()))

    @property
    def linear(self) -> float:
        """Predicted change of the labelled loss to first order, in the divergence's unit."""
        return sum(c.linear for c in self._chosen())

    @property
    def loss_change(self) -> float:
        """Predicted change of the labelled loss: linear terms and divergence, in the divergence's unit."""
        return self.linear + self.divergence

    @property
    def size_bytes(self) -> int:
        """Predicted bytes of the whole plan, to within a few bytes of field lengths and of what quantized activations add."""
        return self.menu.base.size_bytes + sum(c.size_bytes for c in self._chosen()) + sum(cost.size_bytes for cost in self._paid())

    @property
    def latency_s(self) -> float:
        """Predicted latency of the whole plan, corrected."""
        change_s = sum(c.latency_s for c in self._chosen()) + sum(cost.latency_s for cost in self._paid())
        return self.menu.base.latency_s + self.correction.latency * change_s

    def _chosen(self) -> list[Candidate]:
        """The chosen candidates; forms that were written in by hand have none."""
        return [candidate for candidate in map(self.candidate, self.forms) if candidate is not None]

    def _paid(self) -> list[Cost]:
        """The shared resources that the choice pays for."""
        chosen = self._chosen()
        needed = dict.fromkeys(name for candidate in chosen for name in candidate.needs)
        provided = {name for candidate in chosen for name in candidate.provides}
        return [self.menu.shared[name] for name in needed if name not in provided]


def choose(menu: Menu, budget: Budget, correction: Correction = Correction(), usable: float = 1.0, *, joint: bool = False) -> Plan:
    """Solve for a budget.

    A joint choice minimises the predicted change of the labelled loss, linear terms and divergence, where another minimises the divergence.
    The solver's divergences are at least 0, so each group's are moved up by what its best option gains. That is the same for every choice;
    the solution's objective and bound have it taken off again, its gap refers to the sum with it.

    Args:
        menu: what to choose from.
        budget: limits and what to minimize; the divergence decides between choices of the same least latency.
        correction: of the menu's predictions.
        usable: share of the latency and divergence budgets that the choice may use.
        joint: whether the labelled loss counts; a limit on the divergence then has no meaning.

    Raises:
        InfeasibleError: no choice meets it; the message names the nearest feasible values.
        ValueError: a joint choice has a limit on the divergence.
    """
    if joint and budget.divergence is not None:
        raise ValueError("a joint choice minimises the loss; limit its divergence by solving without")
    tightened = Budget(
        None if budget.size_bytes is None else budget.size_bytes - correction.spare_bytes,
        None if budget.latency_s is None else budget.latency_s * usable,
        None if budget.divergence is None else budget.divergence * usable,
        budget.minimize,
    )
    problem, moved = _problem(menu, correction, joint)
    solution = solve(problem, tightened)
    if solution.cost is None:
        raise InfeasibleError(infeasible_message(menu, budget, solution, correction.spare_bytes, usable))
    if budget.minimize == "latency":
        solution = _gentlest(problem, tightened, solution)
    if moved > 0 and budget.minimize == "error":
        solution = replace(solution, objective=solution.objective - moved, bound=solution.bound - moved)
    forms = {name: options[i].form for (name, options), i in zip(menu.candidates.items(), solution.choice, strict=True)}
    return Plan(menu, forms, budget, solution, correction, joint)


def _gentlest(problem: Problem, budget: Budget, fastest: Solution) -> Solution:
    """Of the choices that are as fast as the fastest, the one with the least divergence: many forms run alike, but not all harm alike."""
    gentle = solve(problem, replace(budget, latency_s=fastest.objective, minimize="error"))
    if gentle.cost is None:
        return fastest
    return replace(fastest, choice=gentle.choice, cost=gentle.cost, seconds=fastest.seconds + gentle.seconds)


def _problem(menu: Menu, correction: Correction, joint: bool = False) -> tuple[Problem, float]:
    """The menu as the solver sees it, and by how much all choices look worse than they are.

    Raises:
        ValueError: a cost is not finite, or a candidate shares an unknown resource.
    """
    seconds, divergence = correction.latency, correction.divergence
    groups, moved = [], 0.0
    for candidates in menu.candidates.values():
        prices = [divergence * c.divergence + (c.linear if joint else 0.0) for c in candidates]
        gain = max(0.0, -min(prices, default=0.0))
        moved += gain
        groups.append(
            tuple(
                Option(c.size_bytes, seconds * c.latency_s, price + gain, c.needs, c.provides, c.requires)
                for c, price in zip(candidates, prices, strict=True)
            )
        )
    shared = {name: Cost(cost.size_bytes, seconds * cost.latency_s, divergence * cost.divergence) for name, cost in menu.shared.items()}
    return Problem(tuple(groups), menu.base, shared), moved


def infeasible_message(menu: Menu, budget: Budget, solution: Solution, spare_bytes: int = 0, usable: float = 1.0) -> str:
    """One line that names the budget and the nearest feasible one, of which a share is usable and some bytes stay free."""
    asked = []
    if budget.size_bytes is not None:
        asked.append(f"size {budget.size_bytes:,.0f} B")
    if budget.latency_s is not None:
        asked.append(f"latency {budget.latency_s * 1e3:.3g} ms")
    if budget.divergence is not None:
        asked.append(f"error {budget.divergence:.3g} {menu.unit}")
    near = solution.nearest
    offers = []
    if near is not None:
        if near.size_bytes is not None:
            offers.append(f"--size {near.size_bytes + spare_bytes}B" + (" (without the other budgets)" if "size" in near.alone else ""))
        if near.latency_s is not None:
            offers.append(
                f"--latency {_up(near.latency_s / usable * 1e3)}ms" + (" (without the other budgets)" if "latency" in near.alone else "")
            )
        if near.divergence is not None:
            offers.append(f"--error {_up(near.divergence / usable)}" + (" (without the other budgets)" if "error" in near.alone else ""))
    nearest = f"nearest feasible: {' or '.join(offers) or 'unknown'}"
    remedy = "relax a budget or --exclude less" if menu.candidates else "no weight of this model may change, `intaglio inspect` says why"
    return f"no plan meets {', '.join(asked) or 'the budget'}; {nearest}; {remedy}"


def _up(value: float) -> str:
    """Four digits, rounded up, so that a limit that was attained stays attainable."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3) if value > 0 else 1.0
    return f"{math.ceil(value * (1 + 1e-9) / unit) * unit:.4g}"


def to_json(plan: Plan) -> str:
    """The plan as an indented JSON document."""
    solution = plan.solution
    return json.dumps(
        {
            "intaglio_plan": VERSION,
            "model_sha256": plan.menu.model_sha256,
            "unit": plan.menu.unit,
            "equalized": plan.menu.equalized,
            "lineage": plan.menu.lineage,
            "floors": dict(plan.menu.floors),
            "target": plan.menu.target,
            "integers": plan.menu.integers,
            "joint": plan.joint,
            "budget": {
                "size_bytes": plan.budget.size_bytes,
                "latency_s": plan.budget.latency_s,
                "divergence": plan.budget.divergence,
                "minimize": plan.budget.minimize,
            },
            "base": _cost_json(plan.menu.base),
            "shared": {name: list(cost.values()) for name, cost in plan.menu.shared.items()},
            "correction": {
                "divergence": plan.correction.divergence,
                "latency": plan.correction.latency,
                "spare_bytes": plan.correction.spare_bytes,
            },
            "solver": None
            if solution is None
            else {
                "status": solution.status,
                "objective": float(solution.objective),
                "bound": solution.bound,
                "gap": solution.gap,
                "seconds": solution.seconds,
                "candidates": solution.candidates,
                "choice": list(solution.choice),
            },
            "sites": {name: _form_json(form) for name, form in plan.forms.items()},
            "candidates": {
                name: [
                    [*_form_json(c.form).values(), c.size_bytes, c.latency_s, c.divergence, c.error, *map(list, _shared_names(c)), c.linear]
                    for c in candidates
                ]
                for name, candidates in plan.menu.candidates.items()
            },
        },
        indent=1,
    )


def _shared_names(candidate: Candidate) -> tuple[tuple[str, ...], ...]:
    return candidate.needs, candidate.provides, candidate.requires


def _form_json(form: Form) -> dict[str, object]:
    return {
        "decomposition": form.decomposition,
        "ranks": list(form.ranks),
        "storage": form.storage,
        "execution": form.execution,
        "arithmetic": form.arithmetic,
    }


def _cost_json(cost: Cost) -> dict[str, float]:
    return {"size_bytes": cost.size_bytes, "latency_s": cost.latency_s, "divergence": cost.divergence}


def _unnoted_target(candidates: Mapping[str, Sequence[Candidate]]) -> str:
    """What a plan from before targets were noted is for: standard operators run anywhere, others on processors."""
    named = any(each.form.arithmetic == "nbits" for every in candidates.values() for each in every)
    return "cpu" if named else "web"


def _form(decomposition: object, ranks: object, storage: object, execution: object, arithmetic: object, where: str) -> Form:
    if not all(isinstance(word, str) for word in (decomposition, storage, execution, arithmetic)) or not isinstance(ranks, list):
        raise InputError(
            f"{where}: expected decomposition, ranks, storage, execution and arithmetic; see a plan that `intaglio plan` wrote"
        )
    decomposition, storage, execution, arithmetic = map(str, (decomposition, storage, execution, arithmetic))
    if not all(type(r) is int and r > 0 for r in ranks):
        raise InputError(f"{where}: ranks {ranks} are not positive whole numbers; write for example [64]")
    form = Form(decomposition, tuple(ranks), storage, execution, arithmetic)
    known = {("unchanged", "dense"), ("dense", "dense"), (PRUNED, "contract"), *DECOMPOSITIONS}
    if (decomposition, execution) not in known:
        raise InputError(
            f"{where}: unknown form {decomposition}/{execution}; expected one of {', '.join('/'.join(k) for k in sorted(known))}"
        )
    if storage not in STORAGES:
        raise InputError(f"{where}: unknown storage {storage!r}; expected one of {', '.join(STORAGES)}")
    if arithmetic not in ("float", *ARITHMETICS):
        raise InputError(f"{where}: unknown arithmetic {arithmetic!r}; expected one of float, {', '.join(ARITHMETICS)}")
    if decomposition == "unchanged":
        return CARRIED if arithmetic == CARRIED.arithmetic else UNCHANGED
    return form


def read_plan(path: Path) -> Plan:
    """Read a plan that `to_json` wrote, possibly edited.

    Raises:
        InputError: the file is missing, no plan, or names an unknown form.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"plan {path}: {error.strerror}; give a file that `intaglio plan` wrote") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"plan {path}: not JSON ({error}); give a file that `intaglio plan` wrote") from error
    try:
        if document["intaglio_plan"] not in (VERSION - 1, VERSION):
            raise InputError(f"plan {path}: version {document['intaglio_plan']}, expected {VERSION}; solve again with `intaglio plan`")
        candidates = {
            name: tuple(
                Candidate(
                    _form(row[0], row[1], row[2], row[3], row[4], f"plan {path}, candidate of {name}"),
                    int(row[5]),
                    float(row[6]),
                    float(row[7]),
                    float(row[8]),
                    tuple(row[9]),
                    tuple(row[10]),
                    tuple(row[11]),
                    float(row[12]) if len(row) > 12 else 0.0,
                )
                for row in rows
            )
            for name, rows in document["candidates"].items()
        }
        base = document["base"]
        menu = Menu(
            str(document["model_sha256"]),
            candidates,
            Cost(int(base["size_bytes"]), float(base["latency_s"]), float(base["divergence"])),
            {name: Cost(int(cost[0]), float(cost[1]), float(cost[2])) for name, cost in document["shared"].items()},
            document["unit"],
            bool(document["equalized"]),
            str(document.get("lineage", "")),
            {str(name): float(floor) for name, floor in document.get("floors", {}).items()},
            str(document.get("target") or _unnoted_target(candidates)),
            str(document.get("integers", "full")),
        )
        if menu.unit not in UNITS:
            raise ValueError("unit")
        if not all(map(math.isfinite, menu.floors.values())):
            raise ValueError("floors")
        limits = document["budget"]
        budget = Budget(limits["size_bytes"], limits["latency_s"], limits["divergence"], limits["minimize"])
        forms = {
            name: _form(f["decomposition"], f["ranks"], f["storage"], f["execution"], f["arithmetic"], f"plan {path}, site {name}")
            for name, f in document["sites"].items()
        }
        known = document["correction"]
        correction = Correction(float(known["divergence"]), float(known["latency"]), int(known["spare_bytes"]))
        _problem(menu, correction)
        solution = _solution(document["solver"], menu, forms)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise InputError(f"plan {path}: field {error} is missing or malformed; give a file that `intaglio plan` wrote") from error
    return Plan(menu, forms, budget, solution, correction, bool(document.get("joint", False)))


def _solution(solver: Mapping[str, Any] | None, menu: Menu, forms: Mapping[str, Form]) -> Solution | None:
    """The solver's answer, as far as a plan holds it; None where the forms are not the ones that it chose."""
    if solver is None:
        return None
    choice = tuple(int(index) for index in solver["choice"])
    chosen = {name: options[index].form for (name, options), index in zip(menu.candidates.items(), choice, strict=True)}
    if chosen != dict(forms):
        return None
    objective, bound, gap, seconds = (float(solver[name]) for name in ("objective", "bound", "gap", "seconds"))
    return Solution(solver["status"], choice, objective, bound, gap, seconds, int(solver["candidates"]), None, None)
