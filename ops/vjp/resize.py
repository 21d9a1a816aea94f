"""Resampling and the exchange of space for channels.

For given sizes Resize is linear in its input and works axis by axis, so that it is a product with one matrix per axis, the resize of the
identity, and its gradient a product with the transposes. Where every input is repeated a whole number of times the product is a sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from .base import Call, Gradients, Rules, Unsupported

_RELATIVE_MODES = ("align_corners", "tf_crop_and_resize", "half_pixel_symmetric")
"""Coordinate transformations that depend on lengths and not on scales alone."""

_TRIAL_LENGTHS = (3, 4)
"""Lengths on which a whole scale is tried where the true one is unknown."""


def _resize(call: Call) -> Gradients:
    if 0 not in call.wanted:
        raise Unsupported("only the resized values have a gradient")
    if call.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unsupported("keep_aspect_ratio_policy")
    matrices = _matrices(call)
    factors = {axis: _repeats(matrix) for axis, matrix in matrices.items()}
    if all(factor is not None for factor in factors.values()):
        return {0: _block_sum(call, {axis: factor for axis, factor in factors.items() if factor is not None})}
    if unknown := [axis for axis in matrices if call.x().shape is None or _length(call, axis) is None]:
        raise Unsupported(f"axis {unknown[0]} has an unknown length")
    gradient = call.dy
    for axis, matrix in matrices.items():
        gradient = _product(call, gradient, matrix.astype(call.x().dtype), axis)
    return {0: gradient}


def _matrices(call: Call) -> dict[int, NDArray[Any]]:
    """For every axis that changes, the matrix (new length, old length)."""
    rank = call.x().rank
    axes = [axis % rank for axis in call.attribute("axes") or range(rank)]
    by_scale = call.has_input(2) and call.x(2).static != (0,)
    amounts = call.known(2 if by_scale else 3)
    roi = call.known(1) if _coordinates(call) == "tf_crop_and_resize" else None
    found = {}
    for place, (axis, amount) in enumerate(zip(axes, amounts, strict=True)):
        length = _length(call, axis)
        region = None if roi is None else roi[[place, place + len(axes)]]
        if (amount == (1 if by_scale else length)) and (region is None or tuple(region) == (0, 1)):
            continue
        found[axis] = _matrix(call, length, amount, region, by_scale)
    return found


def _length(call: Call, axis: int) -> int | None:
    shape = call.x().shape
    return None if shape is None else shape[axis]


def _coordinates(call: Call) -> str:
    return str(call.attribute("coordinate_transformation_mode", "half_pixel"))


def _matrix(call: Call, length: int | None, amount: Any, region: NDArray[Any] | None, by_scale: bool) -> NDArray[Any]:
    if length is not None:
        if by_scale and _coordinates(call) in ("align_corners", "tf_crop_and_resize"):
            # These map the last output to the last input. ONNX Runtime has a whole last output, the reference evaluator length · scale.
            return _resized_identity(call, length, int(np.float32(length) * np.float32(amount)), region, False)
        return _resized_identity(call, length, amount, region, by_scale)
    mode = _coordinates(call)
    trials = [_resized_identity(call, length, amount, None, by_scale) for length in _TRIAL_LENGTHS] if by_scale else []
    if not trials or mode in _RELATIVE_MODES or any(_repeats(trial) is None for trial in trials):
        raise Unsupported("an axis of unknown length that is not repeated a whole number of times")
    return trials[0]


def _resized_identity(call: Call, length: int, amount: Any, region: NDArray[Any] | None, by_scale: bool) -> NDArray[Any]:
    """What the node makes of the columns of the identity, by the reference evaluator; values from outside count as constants, so as 0."""
    kept = [attribute for attribute in call.node.attribute if attribute.name not in ("axes", "extrapolation_value")]
    roi = "roi" if region is not None else ""
    node = helper.make_node("Resize", ["x", roi, "amount"] if by_scale else ["x", roi, "", "amount"], ["y"], axes=[0])
    node.attribute.extend(kept)
    feed: dict[str, NDArray[Any]] = {"x": np.eye(length), "amount": np.asarray([amount], np.float32 if by_scale else np.int64)}
    if region is not None:
        feed["roi"] = region.astype(np.float64)
    inputs = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), None) for name, array in feed.items()]
    graph = helper.make_graph([node], "resize", inputs, [helper.make_tensor_value_info("y", TensorProto.DOUBLE, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", call.opset)])
    results: Any = ReferenceEvaluator(model).run(None, feed)
    return np.asarray(results[0])


def _repeats(matrix: NDArray[Any]) -> int | None:
    """How often each input is repeated, if that is all the matrix does."""
    factor, rest = divmod(matrix.shape[0], matrix.shape[1])
    whole = factor > 0 and rest == 0 and np.array_equal(matrix, np.repeat(np.eye(matrix.shape[1]), factor, axis=0))
    return factor if whole else None


def _block_sum(call: Call, factors: dict[int, int]) -> str:
    """Sum over the copies of each input."""
    if not factors:
        return call.dy
    x, pieces, copies = call.x(), [], []
    for axis, length in enumerate(x.shape or ()):
        pieces.append(call.ints(length) if length is not None else call.op("Shape", x.name, start=axis, end=axis + 1))
        if axis in factors:
            copies.append(len(pieces))
            pieces.append(call.ints(factors[axis]))
    split = call.op("Reshape", call.dy, call.op("Concat", *pieces, axis=0))
    return call.op("ReduceSum", split, call.ints(*copies), keepdims=0)


def _product(call: Call, gradient: str, matrix: NDArray[Any], axis: int) -> str:
    """Multiply an axis with the transposed matrix."""
    rank = call.x().rank
    if axis == rank - 1:
        return call.op("MatMul", gradient, call.constant(matrix))
    if axis == rank - 2:
        return call.op("MatMul", call.constant(np.ascontiguousarray(matrix.T)), gradient)
    swap = [*range(rank)]
    swap[axis], swap[-1] = rank - 1, axis
    product = call.op("MatMul", call.op("Transpose", gradient, perm=swap), call.constant(matrix))
    return call.op("Transpose", product, perm=swap)


def _depth_to_space(call: Call) -> Gradients:
    size, x = call.attribute("blocksize"), call.x()
    packed = call.op("SpaceToDepth", call.dy, blocksize=size)
    if call.attribute("mode", "DCR") == "DCR":
        return {0: packed}
    if x.shape is None or x.shape[1] is None:
        raise Unsupported("mode CRD with an unknown number of channels")
    split = call.op("Reshape", packed, call.ints(0, size * size, x.shape[1] // size**2, -1))
    return {0: call.reshape_like(call.op("Transpose", split, perm=(0, 2, 1, 3)), x)}


def _space_to_depth(call: Call) -> Gradients:
    return {0: call.op("DepthToSpace", call.dy, blocksize=call.attribute("blocksize"), mode="DCR")}


RULES: Rules = {"DepthToSpace": _depth_to_space, "Resize": _resize, "SpaceToDepth": _space_to_depth}
