"""Put a price on a site's local error: how much the model's outputs diverge when this weight alone is damaged.

A few trial forms per site are written into the model, one at a time, and the outputs are compared with the original's on some of the fit
samples. Local error and divergence of the trials give a curve per site, one for rounding (spread over all directions) and one for
truncation (the weakest directions), from which every other form is priced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from .data import Dataset
from .divergence import Divergence, Kind
from .execute import Executor
from .model import Model
from .options import Runtime
from .rewrite import Fragment, rewrite
from .sites import Site

PROBE_SAMPLES = 48
"""Samples on which damage is measured."""


@dataclass(frozen=True)
class Curve:
    """Divergence as a function of relative local error: straight lines between trials on a log-log scale, proportional beyond them.

    Attributes:
        points: (error, divergence) of the trials, both positive, by ascending error.
    """

    points: tuple[tuple[float, float], ...]

    def __call__(self, error: float) -> float:
        """Predicted divergence at a relative error."""
        if error <= 0 or not self.points:
            return 0.0 if error <= 0 else error
        errors = np.array([e for e, _ in self.points])
        divergences = np.array([d for _, d in self.points])
        if error <= errors[0]:
            return float(divergences[0] * error / errors[0])
        if error >= errors[-1]:
            return float(divergences[-1] * error / errors[-1])
        return float(np.exp(np.interp(np.log(error), np.log(errors), np.log(divergences))))

    @staticmethod
    def through(points: Sequence[tuple[float, float]]) -> Curve:
        """A curve that never falls: of trials out of order the larger divergence counts."""
        kept: list[tuple[float, float]] = []
        for error, divergence in sorted(p for p in points if p[0] > 0):
            kept.append((error, max([divergence, 1e-15, *(d for _, d in kept)])))
        return Curve(tuple(kept))


@dataclass(frozen=True)
class Sensitivity:
    """The curves of a site, one for each kind of error; dropped channels harm more than a low rank of the same error does."""

    rounding: Curve
    truncation: Curve
    pruning: Curve = Curve(())


class Probe:
    """Measures how far outputs move when one weight is replaced.

    Attributes:
        segmented: the model is too large to be held at once, so that every measurement reads all of its file.
    """

    segmented: bool

    def __init__(self, model: Model, kinds: tuple[Kind, ...], data: Dataset, indices: NDArray[np.int64], runtime: Runtime) -> None:
        """Run the original once and keep its outputs."""
        self._model, self._kinds, self._runtime = model, kinds, runtime
        self._feeds = [feed for feed, _ in data.feeds(indices, runtime.batch)]
        self._outputs = [value.name for value in model.proto.graph.output]
        executor = self._executor(model.proto)
        self.segmented = executor.segment_count > 1
        self._reference = list(executor.run(self._feeds))

    def _executor(self, proto: ModelProto) -> Executor:
        return Executor.of(replace(self._model, proto=proto), self._outputs, self._runtime)

    def divergence(self, proto: ModelProto) -> float:
        """Divergence of a model with the same inputs and outputs."""
        total = Divergence(self._kinds)
        for reference, candidate in zip(self._reference, self._executor(proto).run(self._feeds), strict=True):
            total.add(reference, candidate)
        return total.value

    def replaced(self, site: Site, value: NDArray[np.generic]) -> float:
        """Divergence when the site's anchor holds another array."""
        fragment = Fragment((), (), {site.anchor: value}, {})
        return self.divergence(rewrite(self._model, {site.name: fragment}, [site]).proto)
