"""Softmax, its logarithm, and the losses on classes that are built on them.

Let p be probabilities along an axis and g the cotangent. Softmax: dx = p ⊙ (g − Σ p ⊙ g); LogSoftmax: dx = g − p Σ g. A loss that picks the
logarithm at the target class t with weight w: d(log p) = −w g at t and 0 elsewhere.
"""

from __future__ import annotations

import numpy as np

from .base import Call, Gradients, Rules, Unsupported


def _softmax(call: Call) -> Gradients:
    axis = call.ints(call.attribute("axis", -1))
    share = call.op("Mul", call.dy, call.y().name)
    total = call.op("ReduceSum", share, axis, keepdims=1)
    return {0: call.op("Sub", share, call.op("Mul", call.y().name, total))}


def _log_softmax(call: Call) -> Gradients:
    return {0: _through_logarithm(call, call.dy, call.y().name, call.attribute("axis", -1))}


def _hardmax(call: Call) -> Gradients:
    """Constant wherever the largest entry is unique; zero is taken at ties too."""
    return {}


def _negative_log_likelihood(call: Call) -> Gradients:
    _only_scores(call)
    return {0: _at_target(call, call.op("Neg", _per_target(call)), None)}


def _softmax_cross_entropy(call: Call) -> Gradients:
    """dx = w g (p − e_t), and what comes through the output of log-probabilities."""
    _only_scores(call)
    log_p = call.add_output(1)
    gradients = []
    if call.cotangents[0] is not None:
        per_target = _per_target(call)
        p = call.op("Exp", log_p)
        weighted = call.op("Mul", p, call.op("Unsqueeze", per_target, call.ints(1)))
        gradients.append(_at_target(call, per_target, weighted))
    if len(call.cotangents) > 1 and call.cotangents[1] is not None:
        gradients.append(_through_logarithm(call, call.cotangents[1], log_p, 1))
    return {0: gradients[0] if len(gradients) == 1 else call.op("Add", *gradients)}


def _through_logarithm(call: Call, gradient: str, log_p: str, axis: int) -> str:
    """The gradient of scores from that of their log-probabilities."""
    total = call.op("ReduceSum", gradient, call.ints(axis), keepdims=1)
    return call.op("Sub", gradient, call.op("Mul", call.op("Exp", log_p), total))


def _only_scores(call: Call) -> None:
    if 2 in call.wanted:
        raise Unsupported("the weights of the classes are not differentiated")


def _per_target(call: Call) -> str:
    """How much each target's term counts, times the cotangent; shaped like the targets (N, d1, …).

    Targets equal to `ignore_index` count nothing. A mean divides by the sum of all counts.
    """
    target, ignored = call.x(1), call.attribute("ignore_index")
    counts = None
    kept, index = "", target.name
    if ignored is not None:
        number = call.scalar(ignored, target.dtype)
        kept = call.op("Not", call.op("Equal", target.name, number))
        index = call.op("Where", kept, target.name, call.scalar(0, target.dtype))
    if call.has_input(2):
        counts = call.op("Gather", call.x(2).name, index)
        if kept:
            counts = call.op("Where", kept, counts, call.scalar(0))
    elif kept:
        counts = call.cast(kept, call.x().dtype)
    reduction = call.attribute("reduction", "mean")
    gradient = call.dy
    if reduction == "mean":
        total = call.op("ReduceSum", counts, keepdims=0) if counts else call.cast(call.op("Size", target.name), call.x().dtype)
        gradient = call.op("Div", gradient, total)
    if counts:
        return call.op("Mul", gradient, counts)
    return gradient if reduction == "none" else call.op("Expand", gradient, call.shape(target))


def _at_target(call: Call, per_target: str, elsewhere: str | None) -> str:
    """Shaped like the scores (N, C, d1, …): `elsewhere` (zero if None), minus `per_target` at the target class; plus it if None."""
    scores = call.x()
    shape = (-1,) + (1,) * (scores.rank - 2)
    if scores.shape is not None and scores.shape[1] is not None:
        classes = call.constant(np.arange(scores.shape[1], dtype=call.x(1).dtype).reshape(shape))
    else:
        count = call.op("Squeeze", call.op("Shape", scores.name, start=1, end=2))
        counted = call.op("Range", call.scalar(0, np.dtype(np.int64)), count, call.scalar(1, np.dtype(np.int64)))
        classes = call.op("Reshape", call.cast(counted, call.x(1).dtype), call.ints(*shape))
    here = call.op("Equal", call.op("Unsqueeze", call.x(1).name, call.ints(1)), classes)
    value = call.op("Unsqueeze", per_target, call.ints(1))
    if elsewhere is None:
        return call.op("Where", here, value, call.scalar(0))
    return call.op("Where", here, call.op("Sub", elsewhere, value), elsewhere)


RULES: Rules = {
    "Softmax": _softmax,
    "LogSoftmax": _log_softmax,
    "Hardmax": _hardmax,
    "NegativeLogLikelihoodLoss": _negative_log_likelihood,
    "SoftmaxCrossEntropyLoss": _softmax_cross_entropy,
}
