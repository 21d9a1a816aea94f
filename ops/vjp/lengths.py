"""Lengths that are numbers where they are known and emitted values where only a run tells, and what rules build from them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TypeAlias

import numpy as np

from .base import Call, Unsupported, Value

Length: TypeAlias = int | str
"""A number, or the name of an int64 value of shape (1,)."""

INT64_MAX = int(np.iinfo(np.int64).max)
INT64_MIN = int(np.iinfo(np.int64).min)


def positive_axis(axis: int, rank: int) -> int:
    """The axis counted from the front."""
    return axis + rank if axis < 0 else axis


def length(call: Call, value: Value, axis: int) -> Length:
    """The value's length along an axis ≥ 0."""
    known = value.shape[axis] if value.shape is not None else None
    return call.op("Shape", value.name, start=axis, end=axis + 1) if known is None else known


def lengths(call: Call, value: Value) -> list[Length]:
    """All lengths of the value.

    Raises:
        Unsupported: its rank is unknown.
    """
    return [length(call, value, axis) for axis in range(value.rank)]


def size(call: Call, value: Value) -> Length:
    """The value's number of elements."""
    if value.static is not None:
        return int(np.prod(value.static, dtype=np.int64))
    return call.op("Reshape", call.op("Size", value.name), call.ints(1))


def entry(call: Call, value: Value, index: int) -> Length:
    """An entry of a one-dimensional integer value."""
    if value.constant is not None:
        return int(value.constant.reshape(-1)[index])
    return call.cast(call.op("Gather", value.name, call.ints(index)), np.dtype(np.int64))


def entries(call: Call, value: Value) -> list[Length]:
    """All entries of a one-dimensional integer value.

    Raises:
        Unsupported: their number is unknown.
    """
    count = value.constant.size if value.constant is not None else (value.shape or (None,))[0]
    if count is None:
        raise Unsupported(f"the length of '{value.name}' is unknown")
    return [entry(call, value, index) for index in range(count)]


def total(call: Call, terms: Sequence[Length]) -> Length:
    """The sum of lengths."""
    number = sum(term for term in terms if isinstance(term, int))
    names = [term for term in terms if isinstance(term, str)]
    if not names:
        return number
    return reduce(lambda a, b: call.op("Add", a, b), [*names, call.ints(number)] if number else names)


def difference(call: Call, left: Length, *right: Length) -> Length:
    """The left length minus all of the right ones."""
    taken = total(call, right)
    if isinstance(left, int) and isinstance(taken, int):
        return left - taken
    return left if taken == 0 else call.op("Sub", emitted(call, left), emitted(call, taken))


def product(call: Call, factors: Sequence[Length]) -> Length:
    """The product of lengths."""
    number = int(np.prod([factor for factor in factors if isinstance(factor, int)], dtype=np.int64))
    names = [factor for factor in factors if isinstance(factor, str)]
    if not names or number == 0:
        return number
    return reduce(lambda a, b: call.op("Mul", a, b), [*names, call.ints(number)] if number != 1 else names)


def least(call: Call, left: Length, right: Length) -> Length:
    """The smaller one."""
    if isinstance(left, int) and isinstance(right, int):
        return min(left, right)
    return call.op("Min", emitted(call, left), emitted(call, right))


def greatest(call: Call, left: Length, right: Length) -> Length:
    """The larger one."""
    if isinstance(left, int) and isinstance(right, int):
        return max(left, right)
    return call.op("Max", emitted(call, left), emitted(call, right))


def emitted(call: Call, one: Length) -> str:
    """The length as an int64 value of shape (1,)."""
    return call.ints(one) if isinstance(one, int) else one


def vector(call: Call, many: Sequence[Length]) -> str:
    """Lengths as one int64 value of shape (count,): a constant if all are known."""
    numbers = [one for one in many if isinstance(one, int)]
    if len(numbers) == len(many):
        return call.ints(*numbers)
    return call.op("Concat", *(emitted(call, one) for one in many), axis=0)


def reshape(call: Call, value: str, shape: Sequence[Length]) -> str:
    """The elements of a value in another shape, in which zeros stand for themselves."""
    return call.op("Reshape", value, vector(call, shape), allowzero=1)


def pad(call: Call, value: str, axes: Sequence[int], before: Sequence[Length], after: Sequence[Length]) -> str:
    """The value with zeros before and after it along axes."""
    padded = [(axis, lead, trail) for axis, lead, trail in zip(axes, before, after, strict=True) if (lead, trail) != (0, 0)]
    if not padded:
        return value
    kept, leads, trails = zip(*padded, strict=True)
    return call.op("Pad", value, vector(call, [*leads, *trails]), "", call.ints(*kept))


def flip(call: Call, value: str, axes: Sequence[int]) -> str:
    """The value in reverse order along axes."""
    if not axes:
        return value
    ones = [-1] * len(axes)
    return call.op("Slice", value, call.ints(*ones), call.ints(*[INT64_MIN] * len(axes)), call.ints(*axes), call.ints(*ones))
