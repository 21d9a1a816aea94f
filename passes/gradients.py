"""Gradients of the labelled loss with respect to every weight, in a few folds of the fit samples.

The loss is not at a minimum at the given weights, so a change Δ of a weight changes it to first order, by ⟨g, Δ⟩ with g = ∂L/∂W
("lossless" joint factorization, arXiv 2412.06867, its total differential). How much of that holds on other samples is seen from how far
folds agree: `ops.decompositions.joint.trusted` makes one number of what each fold says.

ONNX Runtime computes the gradients (`differentiate`), feed by feed; they are added up outside of the graph, in float32, one array a fold.

Must not fire on: sites in nested graphs, sites whose gradient is blocked by an operator without a rule, models that run in segments or
whose gradients do not fit in memory. Each gets its reason in `Gradients.declined`, and its forms no linear term.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .data import Feed
from .differentiate import Differentiated, differentiate
from .graph import MAIN
from .job import Job
from .loss import WithLoss
from .model import Model
from .session import Session, open_session, to_array, to_value
from .sites import Site
from .task import fed_with_labels, task_model

FOLDS = 4
"""Folds of the fit samples, where memory allows for that many gradients."""

FEWEST_FOLDS = 2
"""Without two folds nothing is known about their agreement."""

MEMORY_LIMIT_BYTES = 1 << 28
"""Most bytes of gradients held at once."""

Float32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Gradients:
    """What was measured.

    Attributes:
        folds: site name → gradient over each fold, (folds, *shape of the anchor) float32.
        declined: site name → why it has none.
        losses: mean loss of each fold, float64.
    """

    folds: Mapping[str, Float32] = field(default_factory=dict)
    declined: Mapping[str, str] = field(default_factory=dict)
    losses: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def matrices(self, site: Site) -> NDArray[np.float64] | None:
        """The gradients as the site's matrices, (folds, groups, m, n); None where there are none."""
        folds = self.folds.get(site.name)
        return None if folds is None else np.stack([site.matrix(fold) for fold in folds])


def measure_gradients(job: Job, model: Model | None = None, *, limit_bytes: int = MEMORY_LIMIT_BYTES) -> Gradients:
    """Gradients of the job's loss at a model's weights, over the fit samples.

    Args:
        job: names the loss, and holds labels.
        model: has the same anchors as the job's model, perhaps with other values; the job's model if None.
        limit_bytes: most bytes of gradients.

    Raises:
        InputError: the loss cannot be built on the model, or the labels do not fit it.
    """
    model = model or job.model
    main = [site for site in job.sites if site.scope == MAIN]
    declined = {site.name: "its weight lies in a nested graph" for site in job.sites if site.scope != MAIN}
    count = fold_count(main, len(job.splits.fit), limit_bytes)
    if count == 0 or not job.small:
        why = "gradients of all weights do not fit in memory" if count == 0 else "the model is too large to be differentiated in memory"
        return Gradients({}, {site.name: why for site in job.sites})
    built = task_model(job, model.proto, model)
    made = differentiate(built.proto, [built.loss], list(dict.fromkeys(site.anchor for site in main)), weights=model.weights)
    usable = [site for site in main if site.anchor in made.gradients and site.anchor not in made.partial]
    declined |= {site.name: _reason(site, made) for site in main if site not in usable}
    if not usable:
        return Gradients({}, declined)
    session = open_session(made.proto, weights=model.weights, threads=job.calibration.threads, providers=job.calibration.providers)
    runner = _Runner(job, built, made, session, tuple(dict.fromkeys(site.anchor for site in usable)))
    order = np.random.default_rng(job.settings.seed).permutation(job.splits.fit)
    found = [runner.mean(np.sort(part)) for part in np.array_split(order, count)]
    folds = {site.name: np.stack([gradients[site.anchor] for _, gradients in found]) for site in usable}
    broken = {name for name, array in folds.items() if not np.isfinite(array).all()}
    declined |= dict.fromkeys(broken, "its gradient is not finite")
    return Gradients({name: array for name, array in folds.items() if name not in broken}, declined, np.array([loss for loss, _ in found]))


def fold_count(sites: Sequence[Site], samples: int, limit_bytes: int) -> int:
    """How many folds there are: `FOLDS` if memory allows, else `FEWEST_FOLDS`; 0 where not even these can be held or filled."""
    own_bytes = 4 * sum(site.elements for site in sites)
    for count in (FOLDS, FEWEST_FOLDS):
        if samples >= count and count * own_bytes <= limit_bytes:
            return count
    return 0


def _reason(site: Site, made: Differentiated) -> str:
    """Why a site has no gradient, or one that lacks a part."""
    if made.stops:
        return str(made.stops[0]) if len(made.stops) == 1 else f"{made.stops[0]} (and {len(made.stops) - 1} more)"
    return "the loss does not depend on it"


@dataclass(frozen=True)
class _Runner:
    """Averages gradients over samples.

    Attributes:
        job: holds data and labels.
        built: the model with its loss.
        made: the same, differentiated.
        session: has it loaded.
        anchors: names of the values whose gradients are fetched.
    """

    job: Job
    built: WithLoss
    made: Differentiated
    session: Session
    anchors: tuple[str, ...]

    def mean(self, indices: NDArray[np.int64]) -> tuple[float, dict[str, Float32]]:
        """Mean loss over some samples, and its gradient by anchor."""
        total: dict[str, Float32] = {}
        loss, count = 0.0, 0
        for feed, rows in self.job.data.feeds(indices, self.job.calibration.batch):
            value, gradients = self._run(feed, rows)
            loss, count = loss + len(rows) * value, count + len(rows)
            for name, gradient in gradients.items():
                part = np.float32(len(rows)) * gradient
                if name in total:
                    total[name] += part
                else:
                    total[name] = part
        return loss / count, {name: gradient / np.float32(count) for name, gradient in total.items()}

    def _run(self, feed: Feed, rows: NDArray[np.int64]) -> tuple[float, dict[str, Float32]]:
        labels = self.job.data.labels(rows)
        assert labels is not None  # `check_task` saw them
        values: dict[str, NDArray[Any]] = dict(fed_with_labels(self.job, self.built, feed, labels))
        loss = next(value.type.tensor_type for value in self.built.proto.graph.output if value.name == self.built.loss)
        values[self.made.cotangents[self.built.loss]] = np.ones((), np.float32 if loss.elem_type == 1 else np.float64)
        fetches = [self.built.loss, *(self.made.gradients[anchor] for anchor in self.anchors)]
        results = [to_array(value) for value in self.session.run(fetches, {name: to_value(array) for name, array in values.items()})]
        return float(results[0]), {anchor: np.asarray(result, np.float32) for anchor, result in zip(self.anchors, results[1:], strict=True)}
