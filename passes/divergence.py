"""How far a model's outputs are from the reference's: KL in nats for class scores, relative mean square error otherwise.

An output counts as class scores where the graph shows it: it comes from Softmax (probabilities) or LogSoftmax, or its name says logits.
The user's word wins (`kind`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import scipy.special
from numpy.typing import NDArray
from onnx import ModelProto

from .errors import InputError

_TINY = 1e-12
"""Probabilities below this are taken as this, so that a confident zero costs a finite number of nats."""

_NARROW_FLOATS = frozenset({"bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"})
"""Floats that NumPy itself does not know as such."""

_PASSING = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Cast", "Dropout", "Transpose"})


class Kind(str, Enum):
    """What an output holds."""

    LOGITS = "logits"
    PROBABILITIES = "probabilities"
    LOG_PROBABILITIES = "log-probabilities"
    VALUES = "values"


def output_kinds(proto: ModelProto, kind: str = "auto") -> tuple[Kind, ...]:
    """What each graph output holds.

    Args:
        proto: the model.
        kind: "auto", or a `Kind` value that the first output is declared to be.

    Raises:
        InputError: `kind` is unknown, or an output is no tensor.
    """
    producers = {name: node for node in proto.graph.node for name in node.output}
    kinds = []
    for value in proto.graph.output:
        kind_of_type = value.type.WhichOneof("value")
        if kind_of_type not in (None, "tensor_type"):
            raise InputError(
                f"model: output {value.name!r} has type {kind_of_type.removesuffix('_type').replace('_', ' ')}, "
                "but only tensors can be compared; leave it out or make it a tensor"
            )
        node = producers.get(value.name)
        while node is not None and node.op_type in _PASSING and node.input:
            node = producers.get(node.input[0])
        op_type = node.op_type if node is not None else ""
        if op_type == "Softmax":
            kinds.append(Kind.PROBABILITIES)
        elif op_type == "LogSoftmax":
            kinds.append(Kind.LOG_PROBABILITIES)
        elif "logit" in value.name.lower():
            kinds.append(Kind.LOGITS)
        else:
            kinds.append(Kind.VALUES)
    if kind != "auto":
        allowed = [k.value for k in Kind]
        if kind not in allowed:
            raise InputError(f"output kind {kind!r} is unknown; expected auto, {', '.join(allowed)}")
        kinds[0] = Kind(kind)
    return tuple(kinds)


@dataclass
class Divergence:
    """Accumulates the divergence of a candidate from a reference, feed by feed.

    Attributes:
        kinds: what each output holds.
        samples: how many were compared.
    """

    kinds: tuple[Kind, ...]
    _sums: list[float] = field(default_factory=list)
    _weights: list[float] = field(default_factory=list)
    _rows: int = 0
    _agreements: int = 0
    samples: int = 0

    @property
    def unit(self) -> str:
        """ "kl_nats" when every output holds class scores, else "relative_mse"."""
        return "relative_mse" if Kind.VALUES in self.kinds else "kl_nats"

    def add(self, reference: Sequence[NDArray[np.generic]], candidate: Sequence[NDArray[np.generic]]) -> None:
        """Count one feed: every output of the reference and of the candidate.

        Raises:
            InputError: an output's shape differs.
        """
        if not self._sums:
            self._sums, self._weights = [0.0] * len(self.kinds), [0.0] * len(self.kinds)
        for number, (kind, a, b) in enumerate(zip(self.kinds, reference, candidate, strict=True)):
            if a.shape != b.shape:
                raise InputError(
                    f"output {number}: shape {list(b.shape)}, expected {list(a.shape)} as in the reference; compare like models"
                )
            error, weight = _compare(kind, a, b)
            self._sums[number] += error
            self._weights[number] += weight
        first, other = reference[0], candidate[0]
        self.samples += len(first) if first.ndim else 1
        if self.kinds[0] != Kind.VALUES:
            agree = _classes(first).argmax(1) == _classes(other).argmax(1)
            self._rows += len(agree)
            self._agreements += int(agree.sum())

    @property
    def value(self) -> float:
        """Mean over outputs: nats per row of scores, or squared error over squared reference."""
        parts = [s / w if w > 0 else float(s > 0) for s, w in zip(self._sums, self._weights, strict=True)]
        return float(np.mean(parts)) if parts else 0.0

    @property
    def agreement(self) -> float | None:
        """Share of rows of the first output (samples, or their positions) with the same top class; None without class scores."""
        return self._agreements / self._rows if self._rows else None


def _classes(scores: NDArray[np.generic]) -> NDArray[np.float64]:
    """(rows, classes): classes are axis 1 of images and of what has one position; the last axis of sequences."""
    values = np.asarray(scores, np.float64)
    if values.ndim <= 1:
        return values.reshape(1, -1)
    if values.ndim > 3 or values.size == values.shape[0] * values.shape[1]:
        values = np.moveaxis(values, 1, -1)
    return values.reshape(-1, values.shape[-1])


def _compare(kind: Kind, reference: NDArray[np.generic], candidate: NDArray[np.generic]) -> tuple[float, float]:
    """Summed divergence and what to divide it by."""
    if kind == Kind.VALUES:
        if reference.dtype.kind not in "fc" and reference.dtype.name not in _NARROW_FLOATS:
            return float((reference != candidate).sum()), float(reference.size)
        a, b = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
        finite = np.isfinite(a)
        if a.size and not finite.any():
            raise InputError("the reference's output holds no finite value on this data; check the model and the data's scale")
        a, b = a[finite], b[finite]
        return (float(((a - b) ** 2).sum()), float((a**2).sum())) if np.isfinite(b).all() else (np.inf, 1.0)
    a, b = log_probabilities(kind, reference), log_probabilities(kind, candidate)
    count, possible = float(len(a)), np.isfinite(a)  # a class ruled out by the reference, with a score of −∞, weighs nothing
    a, b = a[possible], b[possible]
    return (float((np.exp(a) * (a - b)).sum()), count) if np.isfinite(b).all() else (np.inf, 1.0)


def log_probabilities(kind: Kind, scores: NDArray[np.generic]) -> NDArray[np.float64]:
    """Log-probabilities of class scores, (rows, classes)."""
    values = _classes(scores)
    if kind == Kind.PROBABILITIES:
        return np.asarray(np.log(np.maximum(values, _TINY)))
    return np.asarray(scipy.special.log_softmax(values, axis=1)) if kind == Kind.LOGITS else values
