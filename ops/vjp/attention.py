"""Attention by its definition: the scores are computed anew, so that the forward node need not keep them.

With S = scale Q Kᵀ, S′ = softcap(S) + bias, P = softmax(S′), Y = P V and cotangent G: dV = Pᵀ G, dS′ = P ⊙ (G Vᵀ − rowsum(G ⊙ Y)), and
dQ and dK are products of dS = dS′ ⊙ softcap′(S) (Dao et al. 2022, FlashAttention, algorithm 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import helper

from .base import Call, Gradients, Rules, Unsupported, Value

_INT64: np.dtype[Any] = np.dtype(np.int64)


@dataclass(frozen=True)
class _Heads:
    """How values split into heads.

    Attributes:
        call: the node.
        query: number of heads of queries.
        shared: number of heads of keys and values; each serves query/shared consecutive heads of queries.
    """

    call: Call
    query: int
    shared: int

    @property
    def split(self) -> bool:
        """Whether heads have no axis of their own: (batch, length, heads · size)."""
        return self.call.x().rank == 3

    @property
    def size(self) -> int:
        """Length of a query."""
        shape = self.call.x().shape
        length = shape[-1] if shape else None
        if length is None:
            raise Unsupported("the size of the heads is unknown")
        return length // self.query if self.split else length

    def apart(self, name: str, count: int) -> str:
        """(batch, heads, length, size)."""
        if not self.split:
            return name
        return self.call.op("Transpose", self.call.op("Reshape", name, self.call.ints(0, 0, count, -1)), perm=(0, 2, 1, 3))

    def together(self, name: str) -> str:
        """The layout of the inputs again."""
        if not self.split:
            return name
        return self.call.op("Reshape", self.call.op("Transpose", name, perm=(0, 2, 1, 3)), self.call.ints(0, 0, -1))

    def repeated(self, name: str) -> str:
        """Keys or values, (batch, query heads, length, size)."""
        apart = self.apart(name, self.shared)
        if self.query == self.shared:
            return apart
        return self.call.op("Gather", apart, self.call.ints(*(np.arange(self.query) // (self.query // self.shared)).tolist()), axis=1)

    def collected(self, name: str, value: Value) -> str:
        """The gradient of a value from that of its repetition, shaped like the input."""
        if self.query != self.shared:
            call = self.call
            grouped = call.op("Shape", name)
            heads = call.ints(self.shared, self.query // self.shared)
            batch, rest = call.op("Slice", grouped, call.ints(0), call.ints(1)), call.op("Slice", grouped, call.ints(2), call.ints(4))
            name = call.op("Reshape", name, call.op("Concat", batch, heads, rest, axis=0))
            name = call.op("ReduceSum", name, call.ints(2), keepdims=0)
        return self.together(name)


@dataclass(frozen=True)
class _Scores:
    """The first half of attention.

    Attributes:
        query: scale · Q, (batch, heads, n, size).
        key: (batch, heads, m, size).
        probability: P, (batch, heads, n, m).
        slope: derivative of the soft cap, shaped like P; None without one.
    """

    query: str
    key: str
    probability: str
    slope: str | None


def _attention(call: Call) -> Gradients:
    _check(call)
    heads = _heads(call)
    scale = call.attribute("scale") or heads.size**-0.5
    scores = _scores(call, heads, scale)
    dy = heads.apart(call.dy, heads.query)
    gradients = {}
    if 2 in call.wanted:
        gradients[2] = heads.collected(call.op("MatMul", _transposed(call, scores.probability), dy), call.x(2))
    if not call.wanted & {0, 1, 3}:
        return gradients
    per_key = call.op("MatMul", dy, _transposed(call, heads.repeated(call.x(2).name)))
    along = call.op("ReduceSum", call.op("Mul", dy, heads.apart(call.y().name, heads.query)), call.ints(-1), keepdims=1)
    ds = call.op("Mul", scores.probability, call.op("Sub", per_key, along))
    if 3 in call.wanted:
        gradients[3] = _mask_gradient(call, heads, ds)
    if scores.slope is not None:
        ds = call.op("Mul", ds, scores.slope)
    if 0 in call.wanted:
        gradients[0] = heads.together(call.op("Mul", call.op("MatMul", ds, scores.key), call.scalar(scale)))
    if 1 in call.wanted:
        gradients[1] = heads.collected(call.op("MatMul", _transposed(call, ds), scores.query), call.x(1))
    return gradients


def _check(call: Call) -> None:
    if any(cotangent is not None for cotangent in call.cotangents[1:]):
        raise Unsupported("the loss depends on the cache or the scores that it outputs")
    if call.has_input(4) or call.has_input(5):
        raise Unsupported("it has a cache of past keys and values")
    if call.has_input(6):
        raise Unsupported("it has lengths of a padded cache")


def _heads(call: Call) -> _Heads:
    query, shared = call.attribute("q_num_heads"), call.attribute("kv_num_heads")
    if call.x().rank == 4:
        shapes = call.x(0).shape, call.x(1).shape
        query, shared = (shape[1] if shape is not None else None for shape in shapes)
    if not query or not shared:
        raise Unsupported("the number of heads is unknown")
    return _Heads(call, query, shared)


def _scores(call: Call, heads: _Heads, scale: float) -> _Scores:
    query = call.op("Mul", heads.apart(call.x(0).name, heads.query), call.scalar(scale))
    key = heads.repeated(call.x(1).name)
    scores = call.op("MatMul", query, _transposed(call, key))
    slope = None
    if cap := call.attribute("softcap", 0.0):
        bent = call.op("Tanh", call.op("Div", scores, call.scalar(cap)))
        slope = call.op("Sub", call.scalar(1), call.op("Mul", bent, bent))
        scores = call.op("Mul", bent, call.scalar(cap))
    bias = _bias(call, query, key)
    if bias is not None:
        scores = call.op("Add", scores, bias)
    probability = _softmax(call, scores)
    if bias is not None:  # a query that may look at nothing gives zero
        blind = call.op("Equal", call.op("ReduceMax", bias, call.ints(-1), keepdims=1), call.scalar(-np.inf))
        probability = call.op("Where", blind, call.scalar(0), probability)
    return _Scores(query, key, probability, slope)


def _softmax(call: Call, scores: str) -> str:
    precision = call.attribute("softmax_precision")
    if precision is None or helper.tensor_dtype_to_np_dtype(precision) == call.x().dtype:
        return call.op("Softmax", scores, axis=-1)
    return call.cast(call.op("Softmax", call.op("Cast", scores, to=precision), axis=-1), call.x().dtype)


def _transposed(call: Call, name: str) -> str:
    return call.op("Transpose", name, perm=(0, 1, 3, 2))


# --- masks


def _bias(call: Call, query: str, key: str) -> str | None:
    """What is added to the scores: 0 or −∞, or the mask itself; broadcasts to (batch, heads, n, m)."""
    terms = []
    if call.has_input(3):
        mask = call.x(3)
        terms.append(_barred(call, mask.name) if mask.dtype == np.bool_ else mask.name)
        if not _spans_keys(call):
            terms[0] = _padded(call, terms[0], mask, key)
    if (allowed := _in_sight(call, query, key)) is not None:
        terms.append(_barred(call, allowed))
    return call.op("Add", *terms) if len(terms) == 2 else next(iter(terms), None)


def _barred(call: Call, allowed: str) -> str:
    return call.op("Where", allowed, call.scalar(0), call.scalar(-np.inf))


def _in_sight(call: Call, query: str, key: str) -> str | None:
    """Which keys a query may look at because of how far it is ahead of them, (n, m); None if all."""
    bounds = [("left_window_size", "LessOrEqual", 1), ("right_window_size", "GreaterOrEqual", -1)]
    windows = [(op, sign * size) for name, op, sign in bounds if (size := call.attribute(name, -1)) >= 0]
    if call.attribute("is_causal", 0):
        windows.append(("GreaterOrEqual", 0))
    if not windows:
        return None
    rows = call.op("Unsqueeze", _positions(call, query), call.ints(1))
    ahead = call.op("Sub", rows, _positions(call, key))
    limits = [call.op(op, ahead, call.scalar(limit, _INT64)) for op, limit in windows]
    allowed = limits[0]
    for limit in limits[1:]:
        allowed = call.op("And", allowed, limit)
    return allowed


def _positions(call: Call, name: str) -> str:
    """0, 1, … along axis 2."""
    length = call.op("Squeeze", call.op("Shape", name, start=2, end=3))
    return call.op("Range", call.scalar(0, _INT64), length, call.scalar(1, _INT64))


def _spans_keys(call: Call) -> bool:
    """Whether the mask is known to have an entry for each key."""
    entries, keys = call.x(3).lengths[-1], call.x(1).lengths[-2]
    return entries is not None and entries == keys


def _padded(call: Call, bias: str, mask: Value, key: str) -> str:
    """Keys beyond the end of the mask are masked."""
    keys, entries = call.op("Shape", key, start=2, end=3), call.op("Shape", bias, start=-1)
    missing = call.op("Concat", call.ints(*(0,) * (2 * mask.rank - 1)), call.op("Sub", keys, entries), axis=0)
    return call.op("Pad", bias, missing, call.scalar(-np.inf))


def _mask_gradient(call: Call, heads: _Heads, ds: str) -> str:
    if not _spans_keys(call):
        raise Unsupported("the mask may be shorter than the keys")
    lengths = call.x().lengths
    scores = (lengths[0], heads.query, lengths[1 if heads.split else 2], call.x(1).lengths[-2])
    numbers = tuple(length if isinstance(length, int) else None for length in scores)
    symbols = tuple(length if isinstance(length, str) else None for length in scores)
    return call.sum_to(ds, call.x(3), Value(ds, call.x().dtype, numbers, symbols=symbols))


RULES: Rules = {"Attention": _attention}
