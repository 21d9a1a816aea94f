"""Gradients of pools.

ONNX's reference evaluator has no Indices for some windows and another reading of padding with `ceil_mode`, so strided windows and
paddings are tested in ONNX Runtime, which pools in float64 too.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from onnx import helper

from intaglio.passes.differentiate import differentiate
from intaglio.passes.session import open_session

from .checking import RUNTIME_TOLERANCE, TOLERANCE, gradient_error, model_of, relative_error, run_in_runtime, runtime_error

Array = np.ndarray


@st.composite
def _pools(draw: st.DrawFn, *, dilated: bool = True) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Attributes of a pool and the shape of its input."""
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    strides = draw(st.sampled_from([kernel, (1,) * rank, tuple(draw(st.integers(1, 3)) for _ in range(rank))]))
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": strides}
    dilations = (1,) * rank
    auto = draw(st.sampled_from(["NOTSET", "NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if auto == "NOTSET":
        if dilated:
            dilations = attributes["dilations"] = tuple(draw(st.integers(1, 2)) for _ in range(rank))
        attributes["pads"] = tuple(draw(st.integers(0, k - 1)) for k in kernel * 2) if draw(st.booleans()) else (0,) * (2 * rank)
        attributes["ceil_mode"] = draw(st.integers(0, 1))
    else:
        attributes["auto_pad"] = auto
        if auto != "VALID":
            attributes["strides"] = tuple(map(min, strides, kernel))  # padding is never negative then
    lengths = tuple(d * (k - 1) + 1 + draw(st.integers(0, 4)) for d, k in zip(dilations, kernel, strict=True))
    return attributes, (draw(st.integers(1, 2)), draw(st.integers(1, 2)), *lengths)


def _node(op_type: str, **attributes: Any) -> list[onnx.NodeProto]:
    return [helper.make_node(op_type, ["x"], ["y"], **attributes)]


def _distinct(shape: tuple[int, ...], seed: int = 0) -> Array:
    """Values without ties, far from zero and from each other, in random order."""
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape))
    values = (1 + rng.permutation(count)) / count * rng.choice([-1, 1], count)
    result: Array = values.reshape(shape)
    return result


def difference_error(nodes: list[onnx.NodeProto], x: Array, step: float, *, opset: int = 22, open_shapes: bool = False) -> float:
    """`gradient_error` with ONNX Runtime for forward and backward, in the type of x."""
    proto = model_of(nodes, {"x": x}, ["y"], opset=opset)
    if open_shapes:
        for axis, dim in enumerate(proto.graph.input[0].type.tensor_type.shape.dim):
            dim.dim_param = f"x{axis}"
    found = differentiate(proto, ["y"], ["x"])
    assert not found.stops, [str(stop) for stop in found.stops]
    session = open_session(model_of(nodes, {"x": x}, ["y"], opset=opset))
    base = session.run(["y"], {"x": x})[0]
    cotangent = np.random.default_rng(1).standard_normal(base.shape).astype(x.dtype)
    numeric = np.zeros(x.shape)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        change = session.run(["y"], {"x": up})[0].astype(np.float64) - session.run(["y"], {"x": down})[0]
        numeric[index] = np.sum(cotangent * change) / (2 * step)
    return relative_error(run_in_runtime(found, {"x": x}, {"y": cotangent})["x"], numeric)


LINEAR = 1e-4
"""Pools that are linear as far as the step reaches have no truncation error: rounding (6e-8 of sums up to 10) over a step of 1e-2."""


@settings(max_examples=60, deadline=None)
@given(case=_pools(), double=st.booleans(), open_shapes=st.booleans(), seed=st.integers(0, 9))
def test_max_pool(case: Any, double: bool, open_shapes: bool, seed: int) -> None:
    attributes, shape = case
    open_shapes &= not attributes.get("auto_pad", "NOTSET").startswith("SAME")
    step = 0.2 / np.prod(shape)  # values are at least 1 / size apart
    x = _distinct(shape, seed).astype(np.float64 if double else np.float32)
    error = difference_error(_node("MaxPool", **attributes), x, step, open_shapes=open_shapes)
    assert error < (TOLERANCE if double else 3e-3)  # rounding of 1 by 6e-8 over a step of 1e-4


@settings(max_examples=60, deadline=None)
@given(case=_pools(), include=st.integers(0, 1), open_shapes=st.booleans())
def test_average_pool(case: Any, include: int, open_shapes: bool) -> None:
    attributes, shape = case
    open_shapes &= not attributes.get("auto_pad", "NOTSET").startswith("SAME") and not attributes.get("ceil_mode")
    x = _distinct(shape).astype(np.float32)
    error = difference_error(_node("AveragePool", count_include_pad=include, **attributes), x, 1e-2, open_shapes=open_shapes)
    assert error < LINEAR


@settings(max_examples=30, deadline=None)
@given(case=_pools(dilated=False), p=st.integers(1, 3))
def test_lp_pool(case: Any, p: int) -> None:
    attributes, shape = case
    x = (np.abs(_distinct(shape)) + 0.5).astype(np.float32) * np.where(np.arange(np.prod(shape)).reshape(shape) % 2, 1, -1).astype(
        np.float32
    )
    assert difference_error(_node("LpPool", p=p, **attributes), x, 1e-2) < 1e-3  # third derivatives below 10, times step²


@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [
        ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("MaxPool", {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]}),
        ("AveragePool", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
        ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
        ("AveragePool", {"kernel_shape": [3, 2], "strides": [2, 2]}),
        ("LpPool", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("LpPool", {"kernel_shape": [3, 2], "p": 3}),
        ("GlobalAveragePool", {}),
        ("GlobalMaxPool", {}),
    ],
)
def test_against_differences_and_in_the_runtime(op_type: str, attributes: dict[str, Any]) -> None:
    x = _distinct((2, 2, 5, 4))
    nodes = _node(op_type, **attributes)
    assert gradient_error(nodes, {"x": x}, ["x"]) < TOLERANCE
    assert runtime_error(nodes, {"x": x}, ["x"]) < RUNTIME_TOLERANCE


@pytest.mark.parametrize("p", [1, 2, 3])
def test_global_lp_pool(p: int) -> None:
    assert difference_error(_node("GlobalLpPool", p=p), _distinct((2, 2, 3, 3)).astype(np.float32), 1e-2, opset=18) < 1e-2


@pytest.mark.parametrize("op_type", ["GlobalAveragePool", "GlobalMaxPool"])
@pytest.mark.parametrize("open_shapes", [False, True])
def test_global_pools(op_type: str, open_shapes: bool) -> None:
    assert gradient_error(_node(op_type), {"x": _distinct((2, 3, 2, 3))}, ["x"], open_shapes=open_shapes) < TOLERANCE


@pytest.mark.parametrize("op_type", ["GlobalAveragePool", "GlobalMaxPool"])
def test_global_pools_of_volumes(op_type: str) -> None:
    x = _distinct((2, 1, 2, 3, 2)).astype(np.float32)
    assert difference_error(_node(op_type), x, 5e-3) < LINEAR


@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [
        ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("MaxPool", {"kernel_shape": [2, 2]}),
        ("GlobalMaxPool", {}),
    ],
)
def test_equal_maxima_get_the_cotangent_once(op_type: str, attributes: dict[str, Any]) -> None:
    x = np.ones((1, 2, 4, 4), np.float32)
    found = differentiate(model_of(_node(op_type, **attributes), {"x": x}, ["y"]), ["y"], ["x"])
    shape = open_session(found.proto).run(["y"], {"x": x, found.cotangents["y"]: _cotangent(op_type, attributes)})[0].shape
    gradient = run_in_runtime(found, {"x": x}, {"y": np.ones(shape, np.float32)})["x"]
    assert gradient.sum() == np.prod(shape)


def _cotangent(op_type: str, attributes: dict[str, Any]) -> Array:
    side = 1 if op_type.startswith("Global") else 2 if "strides" in attributes else 3
    return np.ones((1, 2, side, side), np.float32)


@pytest.mark.parametrize("op_type", ["LpPool", "GlobalLpPool"])
def test_a_norm_of_zero_has_gradient_zero(op_type: str) -> None:
    x = np.zeros((1, 1, 2, 2))
    attributes = {"kernel_shape": [2, 2]} if op_type == "LpPool" else {}
    found = differentiate(model_of(_node(op_type, **attributes), {"x": x.astype(np.float32)}, ["y"]), ["y"], ["x"])
    gradient = run_in_runtime(found, {"x": x.astype(np.float32)}, {"y": np.ones((1, 1, 1, 1), np.float32)})["x"]
    assert np.array_equal(gradient, x)


def test_a_pool_that_is_read_twice() -> None:
    nodes = [*_node("MaxPool", kernel_shape=[2, 2], strides=[2, 2]), helper.make_node("Mul", ["y", "y"], ["z"])]
    assert gradient_error(nodes, {"x": _distinct((1, 2, 4, 4))}, ["x"], ["z", "y"]) < TOLERANCE


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"kernel_shape": [2, 2], "storage_order": 1}, "column-major"),
        ({"kernel_shape": [2, 2], "dilations": [2, 2], "auto_pad": "SAME_UPPER"}, "dilated"),
    ],
)
def test_reasons(attributes: dict[str, Any], reason: str) -> None:
    proto = model_of(_node("MaxPool", **attributes), {"x": np.zeros((1, 1, 4, 4))}, ["y"])
    (stop,) = differentiate(proto, ["y"], ["x"]).stops
    assert reason in stop.reason


def test_means_that_reach_beyond_an_unknown_length() -> None:
    proto = model_of(_node("AveragePool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1), {"x": np.zeros((1, 1, 5, 5))}, ["y"])
    proto.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "w"
    (stop,) = differentiate(proto, ["y"], ["x"]).stops
    assert "unknown length" in stop.reason
