"""Gathers and scatters: what one picks up, the gradient of it puts down.

Several picks of one entry must sum. ScatterND with reduction "add" loses terms in ONNX Runtime when positions repeat and it runs on several
threads, so sums go through ScatterElements, or, where positions are known, through a gather of all copies of each entry.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .base import Call, Gradients, Rules, Unsupported, Value
from .lengths import Length, difference, emitted, length, lengths, pad, positive_axis, product, reshape, size, vector

_GROWTH = 4
"""Entries of a table of copies per position, up to which reading copies is preferred to adding them up one by one."""


def _put(call: Call, base: str, axis: int, rank: int, positions: str, entries: str, *, add: bool) -> str:
    """Write entries into `base` along an axis.

    Args:
        call: where to emit.
        base: of shape (…, d, …) and of this rank.
        axis: the axis of length d, ≥ 0.
        rank: of `base`.
        positions: int64 or int32 of shape (n,).
        entries: (…, n, …).
        add: whether entries are added up, as they must be if positions repeat; else they replace what is there.
    """
    column = call.op("Reshape", positions, call.ints(*(-1 if other == axis else 1 for other in range(rank))))
    everywhere = call.op("Expand", column, call.op("Shape", entries))
    return call.op("ScatterElements", base, everywhere, entries, axis=axis, reduction="add" if add else "none")


# --- Gather and Compress: whole slices along one axis


def _gather(call: Call) -> Gradients:
    x, indices = call.x(), call.x(1)
    axis = positive_axis(call.attribute("axis", 0), x.rank)
    entries = call.dy
    if indices.rank == 0:
        entries = call.op("Unsqueeze", entries, call.ints(axis))
    elif indices.rank > 1:
        shape = lengths(call, x)
        shape[axis] = size(call, indices)
        entries = reshape(call, entries, shape)
    if indices.constant is not None:
        found = _put_known(call, x, axis, indices.constant.reshape(-1), entries)
        if found is not None:
            return {0: found}
    positions = call.op("Reshape", indices.name, call.ints(-1)) if indices.rank != 1 else indices.name
    return {0: _put(call, call.zeros_like(x), axis, x.rank, positions, entries, add=True)}


def _put_known(call: Call, x: Value, axis: int, positions: NDArray[np.integer], entries: str) -> str | None:
    """Sum entries (…, n, …) into zeros shaped like `x` at known positions; None if adding them up one by one is better."""
    if positions.size == 0:
        return call.zeros_like(x)
    whole, first = length(call, x, axis), int(positions[0])
    if isinstance(whole, int):
        positions = np.where(positions < 0, positions + whole, positions)
        first = int(positions[0])
    consecutive = np.array_equal(positions, np.arange(first, first + positions.size))
    if consecutive and (first >= 0 or first + positions.size <= 0):
        from_end = difference(call, whole, -first) if first < 0 else first
        return pad(call, entries, [axis], [from_end], [difference(call, whole, from_end, positions.size)])
    if isinstance(whole, str):
        return None
    copies = _copies(positions, whole)
    if copies.size > _GROWTH * positions.size:
        return None
    if np.any(copies == positions.size):
        entries = pad(call, entries, [axis], [0], [1])
    if copies.shape[1] == 1:
        return call.op("Gather", entries, call.constant(copies[:, 0]), axis=axis)
    return call.op("ReduceSum", call.op("Gather", entries, call.constant(copies), axis=axis), call.ints(axis + 1), keepdims=0)


def _copies(positions: NDArray[np.integer], whole: int) -> NDArray[np.int64]:
    """For each of `whole` entries, where in `positions` (n,) it occurs, filled up with n: (whole, largest number of occurrences)."""
    order = np.argsort(positions, kind="stable")
    counts = np.bincount(positions, minlength=whole)
    table = np.full((whole, int(counts.max())), positions.size, np.int64)
    occurrence = np.arange(positions.size) - np.repeat(np.cumsum(counts) - counts, counts)
    table[positions[order], occurrence] = order
    return table


def _compress(call: Call) -> Gradients:
    x, axis = call.x(), call.attribute("axis")
    positions = call.op("Reshape", call.op("NonZero", call.x(1).name), call.ints(-1))
    if axis is not None:
        return {0: _put(call, call.zeros_like(x), positive_axis(axis, x.rank), x.rank, positions, call.dy, add=False)}
    flat = call.op("Reshape", call.zeros_like(x), call.ints(-1))
    return {0: call.reshape_like(call.op("ScatterElements", flat, positions, call.dy, axis=0), x)}


# --- single elements along one axis


def _gather_elements(call: Call) -> Gradients:
    zeros, axis = call.zeros_like(call.x()), call.attribute("axis", 0)
    return {0: call.op("ScatterElements", zeros, call.x(1).name, call.dy, axis=axis, reduction="add")}


def _topk(call: Call) -> Gradients:
    """Values go back where they were found; their positions differ."""
    indices = call.add_output(1)
    return {0: call.op("ScatterElements", call.zeros_like(call.x()), indices, call.dy, axis=call.attribute("axis", -1))}


# --- slices at tuples of positions


def _gather_nd(call: Call) -> Gradients:
    """Tuples of positions are turned into positions along one axis, into which the indexed axes of the input are merged."""
    x, indices = call.x(), call.x(1)
    batch = call.attribute("batch_dims", 0)
    depth = indices.shape[-1] if indices.shape else None
    if depth is None:
        raise Unsupported(f"the number of coordinates in '{indices.name}' is unknown")
    shape = lengths(call, x)
    indexed, rest = shape[: batch + depth], shape[batch + depth :]
    rows = _rows(call, indices, batch, indexed)
    count = product(call, lengths(call, indices)[:-1])
    zeros = reshape(call, call.zeros_like(x), [product(call, indexed), *rest])
    gradient = _put(call, zeros, 0, 1 + len(rest), rows, reshape(call, call.dy, [count, *rest]), add=True)
    return {0: call.reshape_like(gradient, x)}


def _rows(call: Call, indices: Value, batch: int, indexed: list[Length]) -> str:
    """Positions along the merged axes `indexed`, of which `batch` lead: (number of tuples,), int64."""
    own = indexed[batch:]
    strides = [product(call, own[axis + 1 :]) for axis in range(len(own))]
    counted = call.op("Mod", indices.name, vector(call, own))
    rows = call.op("ReduceSum", call.op("Mul", counted, vector(call, strides)), call.ints(-1), keepdims=0)
    if batch:
        blocks = product(call, indexed[:batch])
        each = product(call, lengths(call, indices)[batch:-1])
        starts = call.op("Mul", _upto(call, blocks), emitted(call, product(call, own)))
        rows = call.op("Add", reshape(call, rows, [blocks, each]), call.op("Unsqueeze", starts, call.ints(1)))
    return call.op("Reshape", rows, call.ints(-1))


def _upto(call: Call, count: Length) -> str:
    """0, 1, … below the count, int64."""
    if isinstance(count, int):
        return call.ints(*range(count))
    ends = [call.scalar(0, np.dtype(np.int64)), call.op("Squeeze", count), call.scalar(1, np.dtype(np.int64))]
    return call.op("Range", *ends)


# --- scatters


def _scatter_nd(call: Call) -> Gradients:
    """See `_scatter`. Products and extremes at positions that repeat are not covered, for want of a ScatterND that adds up there."""
    reduction = call.attribute("reduction", "none")
    if reduction in ("mul", "max", "min") and not _distinct_tuples(call.x(1).constant, call.x().shape):
        raise Unsupported(f"reduction '{reduction}' at positions that repeat, or may do so")
    indices = call.x(1).name
    return _scatter(
        call,
        reduction,
        lambda data: call.op("GatherND", data, indices),
        lambda data, updates, how: call.op("ScatterND", data, indices, updates, reduction=how),
    )


def _scatter_elements(call: Call) -> Gradients:
    reduction = call.attribute("reduction", "none")
    axis = positive_axis(call.attribute("axis", 0), call.x().rank)
    if reduction == "mul" and 2 in call.wanted and not _distinct_elements(call.x(1).constant, call.x().shape, axis):
        raise Unsupported("reduction 'mul' at positions that repeat, or may do so")
    indices = call.x(1).name
    return _scatter(
        call,
        reduction,
        lambda data: call.op("GatherElements", data, indices, axis=axis),
        lambda data, updates, how: call.op("ScatterElements", data, indices, updates, axis=axis, reduction=how),
    )


def _scatter(
    call: Call,
    reduction: str,
    gather: Callable[[str], str],
    scatter: Callable[[str, str, str], str],
) -> Gradients:
    """Gradients of a scatter, given the same scatter of other arrays and the gather at its positions.

    Without a reduction, positions must differ, as the operator's specification demands. Of equal extremes each gets an equal share.
    """
    if reduction == "add":
        return {index: call.dy if index == 0 else gather(call.dy) for index in call.wanted}
    data, updates = call.x(0), call.x(2)
    if reduction == "none":
        rules = {0: lambda: scatter(call.dy, call.zeros_like(updates), "none"), 2: lambda: gather(call.dy)}
    elif reduction == "mul":
        rules = {
            0: lambda: scatter(call.dy, updates.name, "mul"),
            2: lambda: gather(call.op("Mul", call.dy, data.name)),
        }
    elif reduction in ("max", "min"):
        kept, taken = (
            call.cast(call.op("Equal", value.name, result), data.dtype)
            for value, result in ((data, call.y().name), (updates, gather(call.y().name)))
        )
        share = call.op("Div", call.dy, scatter(kept, taken, "add"))
        rules = {0: lambda: call.op("Mul", share, kept), 2: lambda: call.op("Mul", gather(share), taken)}
    else:
        raise Unsupported(f"reduction '{reduction}'")
    return {index: rules[index]() for index in call.wanted}


def _distinct_tuples(indices: NDArray[np.integer] | None, shape: tuple[int | None, ...] | None) -> bool:
    """Whether tuples of positions (…, k) are known and no two of them mean the same."""
    if indices is None or shape is None:
        return False
    tuples = indices.reshape(-1, indices.shape[-1])
    columns = [_counted(column, whole) for column, whole in zip(tuples.T, shape, strict=False)]
    known = [column for column in columns if column is not None]
    return len(known) == len(columns) and len(np.unique(np.stack(known, axis=1), axis=0)) == len(tuples)


def _distinct_elements(indices: NDArray[np.integer] | None, shape: tuple[int | None, ...] | None, axis: int) -> bool:
    """Whether positions along an axis are known and no two in one line mean the same."""
    if indices is None or shape is None:
        return False
    counted = _counted(indices, shape[axis])
    return counted is not None and bool(np.all(np.diff(np.sort(counted, axis=axis), axis=axis)))


def _counted(positions: NDArray[np.integer], whole: int | None) -> NDArray[np.integer] | None:
    """Positions such that equal ones mean the same; None if that takes a length that is unknown."""
    if whole is not None:
        return np.where(positions < 0, positions + whole, positions)
    return positions if np.all(positions < 0) or np.all(positions >= 0) else None


# --- OneHot


def _one_hot(call: Call) -> Gradients:
    """The gradients of both values: sums over the entries that hold them."""
    axis = call.attribute("axis", -1)
    sums = []
    for marks in ((1, 0), (0, 1)):
        held = call.op("OneHot", call.x(0).name, call.x(1).name, call.constant(np.array(marks, call.x(2).dtype)), axis=axis)
        sums.append(call.op("ReduceSum", call.op("Mul", call.dy, held), keepdims=0))
    return {2: call.op("Concat", *(call.op("Reshape", one, call.ints(1)) for one in sums), axis=0)}


RULES: Rules = {
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Compress": _compress,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "TopK": _topk,
    "OneHot": _one_hot,
}
