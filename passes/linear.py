"""Linear terms: what each form of a site changes of the labelled loss to first order, and which components low ranks keep for it.

⟨g, Ŵ − W⟩ is computed for every truncation (all ranks of a decomposition at once, `ops.decompositions.joint`) and for every storage (from
the decoded array, on the same sample of channels that prices its error); a product of both adds them up. Of what the gradient promises only
as much counts as

- its folds agree on, form by form, less some doubt for gains (`trusted`): what one half of the samples gains and the other loses is noise;
- the curvature admits: the quadratic model holds near the given weights, so a form's gain is at most `MOST_GAIN` times what its divergence
  costs. So no form looks better than leaving the weight alone, and labels decide between forms that cost alike.

Low ranks keep the components whose loss would cost most in all, not those with most energy, where that raises the prediction at no rank of
the grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from intaglio.ops.decompositions import DECOMPOSITIONS
from intaglio.ops.decompositions.joint import agreement, first_order, removals, significant, trusted
from intaglio.ops.decompositions.lowrank import LowRank, components
from intaglio.ops.emit import Spec
from intaglio.ops.form import PRUNED, UNCHANGED, Form
from intaglio.ops.moment import Moment
from intaglio.ops.storage import STORAGES

from .fit import importance
from .propose import SAMPLED_ENTRIES, Proposal
from .recall import Finding
from .rewrite import array_specs
from .sites import Site

MOST_GAIN = 0.5
"""Most that a form may gain to first order, as a multiple of what its divergence costs.

With 1 or more the forms that change most look best: with 1.1 a CIFAR ResNet at 0.4 of its size took on four times the divergence, and its
held-out loss rose by as much as without labels (0.008). With a half, at 0.07 to 0.1 of its size in all forms, it rose by 0.0007 to 0.0011,
without labels by 0.0020 to 0.0052 (896 held-out samples, paired standard errors about 0.001).
"""

DOUBT = 2.0
"""Standard errors by which a form's gain is discounted."""

SURE = 3.0
"""Standard errors by which the first-order term of a component has to differ from 0 to change the order in which components are kept.

With less, the order follows noise: at the best of what one set of samples says, a CIFAR ResNet at 0.4 of its size lost 9 points.
"""

_TYPICAL_ERROR = 0.05
"""Relative truncation error at which the curvature is read off a site's curve."""

Float64 = NDArray[np.float64]
Truncation = tuple[str, tuple[int, ...]]
"""Name and ranks of a decomposition."""


@dataclass(frozen=True, eq=False)
class JointFinding:
    """A finding with its linear terms.

    Attributes:
        finding: the site's, with other truncation errors where other components are kept.
        linear: of each form, in the unit of the divergence.
        slope: by which low ranks choose their components, (groups, m, n) as in `Moment.slope`; None for by energy.
        agreement: how far folds agree about the whole gradient, from 0 to 1.
    """

    finding: Finding
    linear: Mapping[Form, float]
    slope: NDArray[np.float32] | None
    agreement: float


def joint_finding(site: Site, value: NDArray[np.generic], moment: Moment, finding: Finding, gradients: Float64) -> JointFinding:
    """Linear terms of all forms of a site.

    Args:
        site: the site.
        value: the anchor's array.
        moment: the metric that the finding's errors are in.
        finding: from the analysis.
        gradients: (folds, groups, m, n) float64, of the loss over what a unit of divergence adds to it.
    """
    weight = site.matrix(value)
    known = _truncations(finding.proposals)
    common = agreement(gradients)
    plain, errors = _first_orders(site, weight, moment, known, gradients), known
    slope = _slope(finding, weight, moment, gradients) if any(isinstance(_decomposition(key), LowRank) for key in known) else None
    kept: NDArray[np.float32] | None = None
    if slope is not None:
        steep = moment.with_slope(slope)
        low = {key: error for key, error in known.items() if isinstance(_decomposition(key), LowRank)}
        moved, moved_errors = _first_orders(site, weight, steep, low, gradients), _errors(site, weight, steep, low)
        curve = finding.curves.truncation
        gains = [curve(low[key]) - curve(moved_errors[key]) + plain[key] - moved[key] for key in low]
        if min(gains) >= 0 < max(gains):
            plain, errors, kept = plain | moved, known | moved_errors, slope.astype(np.float32)
    rounding = _roundings(site, value, moment, finding.proposals, gradients)
    proposals = tuple(_moved(proposal, errors) for proposal in finding.proposals)
    linear = {}
    for proposal in proposals:
        form = proposal.form
        if form in (UNCHANGED,) or form.decomposition == PRUNED:
            continue
        term = plain.get((form.decomposition, form.ranks), 0.0) + rounding.get(form.storage, 0.0)
        divergence = finding.curves.truncation(proposal.truncation) + finding.curves.rounding(proposal.rounding)
        linear[form] = max(term, -MOST_GAIN * divergence) if np.isfinite(divergence) else 0.0
    return JointFinding(replace(finding, proposals=proposals), linear, kept, common)


def _truncations(proposals: Sequence[Proposal]) -> dict[Truncation, float]:
    """The decompositions and ranks that were proposed, with their errors."""
    return {
        (p.form.decomposition, p.form.ranks): p.truncation
        for p in proposals
        if any(name == p.form.decomposition for name, _ in DECOMPOSITIONS)
    }


def _decomposition(key: Truncation) -> Any:
    """Either execution of a decomposition: both leave out the same."""
    return next(decomposition for (name, _), decomposition in DECOMPOSITIONS.items() if name == key[0])


def _first_orders(
    site: Site, weight: Float64, moment: Moment, known: Mapping[Truncation, float], gradients: Float64
) -> dict[Truncation, float]:
    """The trusted linear term of every truncation."""
    found: dict[Truncation, float] = {}
    for name in dict.fromkeys(name for name, _ in known):
        keys = [key for key in known if key[0] == name]
        folds = first_order(_decomposition(keys[0]), weight, moment, site.use, [ranks for _, ranks in keys], gradients)
        found |= zip(keys, map(float, trusted(folds, DOUBT)), strict=True)
    return found


def _errors(site: Site, weight: Float64, moment: Moment, known: Mapping[Truncation, float]) -> dict[Truncation, float]:
    """The relative error of every truncation."""
    found: dict[Truncation, float] = {}
    for name in dict.fromkeys(name for name, _ in known):
        keys = [key for key in known if key[0] == name]
        found |= zip(keys, _decomposition(keys[0]).errors(weight, moment, site.use, [ranks for _, ranks in keys]), strict=True)
    return found


def _slope(finding: Finding, weight: Float64, moment: Moment, gradients: Float64) -> Float64 | None:
    """What `Moment.slope` holds: what leaving out components changes, where that is sure, over the curvature; None where nothing is."""
    steepness = finding.curves.truncation(_TYPICAL_ERROR) / _TYPICAL_ERROR
    if not 0 < steepness < np.inf:
        return None
    parts = components(weight, moment)
    changes = significant(removals(parts, gradients), SURE)
    return parts.slope(changes / steepness) if changes.any() else None


def _roundings(
    site: Site, value: NDArray[np.generic], moment: Moment, proposals: Sequence[Proposal], gradients: Float64
) -> dict[str, float]:
    """The trusted linear term of storing the dense weight in each storage, from every k-th channel of a large one."""
    ((spec, axis),) = array_specs(site, Form("dense"))
    step = max(1, site.elements // SAMPLED_ENTRIES)
    channels = np.arange(0, spec.shape[axis], step)
    part = np.take(value, channels, axis)
    weights = importance(site, moment)
    weights = weights if weights.shape[axis] == 1 else np.take(weights, channels, axis)
    slopes = [np.take(site.stored_float64(gradient), channels, axis) for gradient in gradients]
    found: dict[str, float] = {}
    for name in dict.fromkeys(p.form.storage for p in proposals if p.form not in (UNCHANGED,) and p.form.storage != "float"):
        storage, sampled = STORAGES[name], Spec(part.shape, part.dtype)
        if storage.accepts(sampled) is not None:
            continue
        change = np.asarray(storage.decode(storage.encode(part, axis, weights), sampled), np.float64) - np.asarray(part, np.float64)
        folds = np.array([float(np.vdot(slope, change)) for slope in slopes])
        found[name] = float(trusted(folds, DOUBT)) * spec.shape[axis] / len(channels)
    return found


def _moved(proposal: Proposal, errors: Mapping[Truncation, float]) -> Proposal:
    """The proposal with the error of what its decomposition keeps now."""
    key = (proposal.form.decomposition, proposal.form.ranks)
    return replace(proposal, truncation=errors[key]) if key in errors else proposal
