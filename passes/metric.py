"""Task metrics that need labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .errors import InputError

Score = Callable[[NDArray[np.generic], NDArray[np.generic]], NDArray[np.float64]]


def _accuracy(output: NDArray[np.generic], labels: NDArray[np.generic]) -> NDArray[np.float64]:
    scores = output.reshape(len(labels), -1)
    return np.asarray(100.0 * (scores.argmax(1) == labels.reshape(-1)), np.float64)


def _mean_squared_error(output: NDArray[np.generic], labels: NDArray[np.generic]) -> NDArray[np.float64]:
    difference = np.asarray(output, np.float64).reshape(len(labels), -1) - np.asarray(labels, np.float64).reshape(len(labels), -1)
    return np.asarray((difference**2).mean(1))


METRICS: dict[str, Score] = {"accuracy": _accuracy, "mse": _mean_squared_error}
"""Name → score of each sample from the first output; the metric is the mean. Accuracy is in percent."""


@dataclass
class Metric:
    """Accumulates a metric feed by feed."""

    name: str
    _scores: list[NDArray[np.float64]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.name not in METRICS:
            raise InputError(f"metric {self.name!r} is unknown; expected one of {', '.join(METRICS)}")

    def add(self, outputs: Sequence[NDArray[np.generic]], labels: NDArray[np.generic]) -> None:
        """Count one feed."""
        if len(outputs[0]) != len(labels):
            raise InputError(f"metric {self.name}: {len(labels)} labels for {len(outputs[0])} rows of output; give one label per row")
        self._scores.append(METRICS[self.name](outputs[0], labels))

    @property
    def value(self) -> float:
        """The mean over samples."""
        return float(np.concatenate(self._scores).mean()) if self._scores else float("nan")
