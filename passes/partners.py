"""Weights that one operator reads together: where its kernel for integers wants all of them as integers, their forms have to agree.

Each weight is a site, and its form a choice of its own. The solver sees the agreement as required resources, as it does for channels: a
form in such an arithmetic provides ``arithmetic:site`` for itself and requires that of each partner, so that either all of an operator's
weights compute so or none does. Storage and decomposition stay free. What the operator takes or saves in a run is counted for the first of
them, and what all their prices count twice of the rewritten node is taken off there.

A weight declines such an arithmetic where a partner is no site or cannot take it, and wherever the target lacks the operator.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product

from intaglio.ops.arithmetic import ARITHMETICS
from intaglio.ops.form import UNCHANGED, Form
from intaglio.solver import Cost

from .coupling import Terms
from .errors import InputError
from .job import Job
from .propose import Allowed
from .rewrite import declines
from .sites import Site, Skip
from .targets import TARGETS


@dataclass(frozen=True, eq=False)
class Group:
    """The weights of one operator that agree about an arithmetic.

    Attributes:
        arithmetic: its name.
        sites: in the order of the operator's inputs; the first stands for the operator.
    """

    arithmetic: str
    sites: tuple[Site, ...]

    @property
    def name(self) -> str:
        """Names the group in resources and caches."""
        return "+".join(site.name for site in self.sites)

    @property
    def form(self) -> Form:
        """A form that each of them can take."""
        return plain_form(self.arithmetic)


@dataclass(frozen=True, eq=False)
class Partners:
    """Which weights of a model agree about which arithmetic, and which cannot take one although their operator could.

    Attributes:
        groups: by the name of each of their sites.
        reasons: (site name, arithmetic) → why it cannot be.
    """

    groups: Mapping[str, Group] = field(default_factory=dict)
    reasons: Mapping[tuple[str, str], str] = field(default_factory=dict)

    @staticmethod
    def find(sites: Iterable[Site], skipped: Iterable[Skip] = (), domains: Collection[str] | None = None) -> Partners:
        """Look at every site.

        Args:
            sites: that may change.
            skipped: those that may not.
            domains: of operators that the target has besides the standard ones; None for all.
        """
        sites, against = tuple(sites), {skip.name: skip.reason for skip in skipped}
        readers = {(id(site_use.use.node), site_use.use.index): site for site in sites for site_use in site.uses}
        groups: dict[str, Group] = {}
        reasons: dict[tuple[str, str], str] = {}
        for site, (name, arithmetic) in product(sites, ARITHMETICS.items()):
            inputs = arithmetic.partners(site.use)
            if not inputs or declines(site, plain_form(name)) is not None:
                continue
            lacking = [] if domains is None else [each for each in arithmetic.domains(site.use) if each not in domains]
            found = [_partner(site, index, name, readers, against) for index in inputs]
            reason = next((each for each in found if isinstance(each, str)), None)
            if lacking or reason:
                reasons[site.name, name] = f"the target has no operators of {lacking[0]}" if lacking else str(reason)
                continue
            members = sorted((site, *(each for each in found if isinstance(each, Site))), key=lambda member: member.use.index)
            groups[site.name] = groups.get(members[0].name) or Group(name, tuple(members))
        return Partners(groups, reasons)

    def group(self, site: str, form: Form) -> Group | None:
        """The group that a form of a site puts into its arithmetic; None for one that needs no partners."""
        group = self.groups.get(site)
        return group if group is not None and group.arithmetic == form.arithmetic else None

    def admitted(self, site: str, allowed: Allowed) -> Allowed:
        """What is allowed, without the arithmetics that a site cannot take."""
        return replace(allowed, arithmetics=tuple(name for name in allowed.arithmetics if (site, name) not in self.reasons))

    def check(self, forms: Mapping[str, Form]) -> None:
        """Raise unless the weights of every operator agree.

        Raises:
            InputError: one of them computes in integers and another does not, or cannot.
        """
        for name, form in forms.items():
            reason = self.reasons.get((name, form.arithmetic))
            if reason:
                raise InputError(f"plan: site {name!r} cannot take {form}: {reason}; choose another form")
            group = self.group(name, form)
            for other in () if group is None else group.sites:
                if forms.get(other.name, UNCHANGED).arithmetic != form.arithmetic:
                    raise InputError(
                        f"plan: {name!r} and {other.name!r} are weights of one {other.op_type}, and only the first has arithmetic "
                        f"{form.arithmetic!r}; give it to both or to neither"
                    )

    def fitted(self, forms: Mapping[str, Form], names: Collection[str]) -> set[str]:
        """Those of the named sites whose forms can go into the model: the partners of the others are still to come."""
        groups = {name: self.group(name, forms[name]) for name in names}
        return {name for name, group in groups.items() if group is None or all(site.name in names for site in group.sites)}

    def terms(self, site: str, form: Form) -> Terms:
        """What an option of a site provides and requires."""
        group = self.group(site, form)
        if group is None:
            return Terms()
        return Terms((), (_resource(site),), tuple(_resource(other.name) for other in group.sites if other.name != site))

    def resources(self) -> dict[str, Cost]:
        """All names that `terms` uses; nobody pays for them."""
        return {_resource(name): Cost(0, 0.0, 0.0) for name in self.groups}


def partners_of(job: Job) -> Partners:
    """Those of a job's model, for its target."""
    return Partners.find(job.sites, (*job.sites.skipped, *job.excluded), TARGETS[job.settings.target].domains)


def plain_form(arithmetic: str) -> Form:
    """A whole weight in bytes."""
    return Form("dense", (), "int8", "dense", arithmetic)


def _partner(site: Site, index: int, arithmetic: str, readers: Mapping[tuple[int, int], Site], against: Mapping[str, str]) -> Site | str:
    """The site behind another input of a site's operator, or why it cannot agree.

    Args:
        site: the site.
        index: of the other input.
        arithmetic: name of the arithmetic.
        readers: (identity of a node, input) → site.
        against: name → why it is no site.
    """
    node = site.use.node
    name = node.input[index] if index < len(node.input) else ""
    other = readers.get((id(node), index))
    if other is None:
        return f"its {node.op_type} reads {name!r} too, which stays as it is: {against.get(name, 'no constant weight')}"
    tied = next((each for each in (site, other) if len(each.uses) > 1), None)
    if tied is not None:
        return f"{tied.name!r} is tied: several operators read it, each beside another weight"
    reason = declines(other, plain_form(arithmetic))
    return other if reason is None else f"its {node.op_type} reads {name!r} too, which cannot: {reason}"


def _resource(site: str) -> str:
    return f"arithmetic:{site}"
