"""What may be emitted for a target, as a table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from intaglio.ops.decompositions import DECOMPOSITIONS
from intaglio.ops.storage import STORAGES

from .errors import InputError
from .propose import Allowed
from .sites import Sites, Skip


@dataclass(frozen=True)
class Target:
    """Forms that a kind of runtime can load.

    Attributes:
        name: as given to --target.
        storages: which storages its loader expands at load.
    """

    name: str
    storages: tuple[str, ...]

    def allowed(self, decompositions: Sequence[str], storages: Sequence[str]) -> Allowed:
        """The user's choice within the target's.

        Raises:
            InputError: a name is unknown, or the target lacks it.
        """
        names = ("dense", *dict.fromkeys(name for name, _ in DECOMPOSITIONS))
        for name in decompositions:
            if name not in names:
                raise InputError(f"--decompositions {name}: unknown; expected some of {', '.join(names)}")
        for name in storages:
            if name not in self.storages:
                raise InputError(f"--storages {name}: not available for target {self.name}; expected some of {', '.join(self.storages)}")
        return Allowed(tuple(decompositions) or names, tuple(storages) or self.storages)

    def select(self, sites: Sites, include: Sequence[str], exclude: Sequence[str]) -> tuple[Sites, tuple[Skip, ...]]:
        """The sites that the user's expressions leave, and the others as skips.

        Raises:
            InputError: an expression is malformed or matches nothing.
        """
        chosen = {site.name for site in sites}
        if include:
            chosen = set().union(*(_matching("--include", expression, sites) for expression in include))
        for expression in exclude:
            chosen -= _matching("--exclude", expression, sites)
        kept = tuple(site for site in sites if site.name in chosen)
        left = tuple(
            Skip(site.name, "excluded by --include/--exclude", site.op_type, site.shape, site.elements * site.dtype.itemsize)
            for site in sites
            if site.name not in chosen
        )
        return Sites(kept, sites.skipped), left


def _matching(option: str, expression: str, sites: Sites) -> set[str]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise InputError(f"{option} {expression!r}: not a regular expression ({error})") from error
    found = {site.name for site in sites if pattern.search(site.name)}
    if not found:
        some = ", ".join(site.name for site in list(sites)[:3])
        raise InputError(f"{option} {expression!r}: matches none of the {len(sites)} sites; names look like {some}")
    return found


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("cpu", tuple(STORAGES)),
        Target("cuda", tuple(STORAGES)),
        Target("mobile", tuple(STORAGES)),
        Target("web", tuple(STORAGES)),
    )
}
"""Every target, by name."""
