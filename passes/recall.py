"""What the analysis found out about each site, kept in the cache: an interrupted run goes on where it stopped, and another budget
costs no second analysis.

A finding depends on the model, the data, the settings that choose samples and forms, and the software; the key names them all. It
holds no arrays. Latencies are cached by themselves, by structure (see `MicroBench`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any, cast

from intaglio import __version__
from intaglio.ops.form import Form

from .cache import Cache, Json, digest
from .job import Job
from .latency import machine
from .propose import Allowed, Proposal
from .sensitivity import Curve, Sensitivity
from .session import RUNTIME_VERSION

REVISION = 16
"""Counts up whenever proposals or curves come out differently for the same model and data."""

_NAMESPACE = "analysis"


@dataclass(frozen=True)
class Finding:
    """The forms that a site can take, and what its errors cost at the outputs."""

    proposals: tuple[Proposal, ...]
    curves: Sensitivity


class Findings:
    """The findings of one job by site name, in a cache."""

    def __init__(self, job: Job, allowed: Allowed, cache: Cache) -> None:
        """Use what is known about `job` when these forms are allowed; hashes the data once."""
        self._cache = cache
        self._key = digest(
            [REVISION, __version__, RUNTIME_VERSION, machine()],
            [job.original.sha256, job.data.digest, [site.name for site in job.sites], [kind.value for kind in job.kinds]],
            [job.settings.seed, job.settings.samples, job.settings.target],
            [astuple(allowed), astuple(job.calibration), job.equalized, job.settings.curvature],
            [job.lineage, *sorted(job.floors.items())] if job.floors else job.lineage,
        )

    def get(self, site: str) -> Finding | None:
        """What `put` stored, or None."""
        known = self._cache.get_json(_NAMESPACE, digest(self._key, site))
        return None if known is None else _finding(known)

    def put(self, site: str, finding: Finding) -> None:
        """Store a site's finding."""
        self._cache.put_json(_NAMESPACE, digest(self._key, site), _plain(finding))

    def activations(self) -> dict[str, float] | None:
        """What `put_activations` stored, or None."""
        known = self._cache.get_json(_NAMESPACE, digest(self._key, "activations"))
        return None if known is None else {name: float(cost) for name, cost in cast(dict[str, Any], known).items()}

    def put_activations(self, divergence: Mapping[str, float]) -> None:
        """Store what rounding each activation costs at the outputs."""
        self._cache.put_json(_NAMESPACE, digest(self._key, "activations"), dict(divergence))


def _plain(finding: Finding) -> Json:
    return {
        "proposals": [
            [p.form.decomposition, list(p.form.ranks), p.form.storage, p.form.execution, p.form.arithmetic, p.truncation, p.rounding]
            for p in finding.proposals
        ],
        "rounding": [list(point) for point in finding.curves.rounding.points],
        "truncation": [list(point) for point in finding.curves.truncation.points],
        "pruning": [list(point) for point in finding.curves.pruning.points],
    }


def _finding(plain: Json) -> Finding:
    known = cast(dict[str, Any], plain)
    curves = (Curve(tuple((error, value) for error, value in known[name])) for name in ("rounding", "truncation", "pruning"))
    return Finding(
        tuple(
            Proposal(Form(decomposition, tuple(ranks), storage, execution, arithmetic), left_out, rounded)
            for decomposition, ranks, storage, execution, arithmetic, left_out, rounded in known["proposals"]
        ),
        Sensitivity(*curves),
    )
