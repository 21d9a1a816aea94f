"""Gradients of resampling and of the exchange of space for channels."""

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

from .checking import RUNTIME_TOLERANCE, TOLERANCE, gradient_error, model_of, run_in_runtime, runtime_error

Array = np.ndarray

_COORDINATES = ["half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric"]
_MODES: list[dict[str, Any]] = [
    {"mode": "nearest"},
    {"mode": "nearest", "nearest_mode": "floor"},
    {"mode": "nearest", "nearest_mode": "ceil"},
    {"mode": "linear"},
    {"mode": "cubic"},
    {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1},
]


def _resize(amount: str, **attributes: Any) -> list[onnx.NodeProto]:
    places = {"scales": ["x", "", "scales"], "sizes": ["x", "", "", "sizes"]}
    return [helper.make_node("Resize", places[amount], ["y"], **attributes)]


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(_MODES),
    coordinates=st.sampled_from(_COORDINATES),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 4), st.integers(2, 4)),
    scales=st.tuples(*[st.sampled_from([0.5, 0.75, 1.0, 1.5, 2.0, 2.6, 3.0])] * 2),
    by_size=st.booleans(),
)
def test_resize(mode: dict[str, Any], coordinates: str, shape: tuple[int, ...], scales: tuple[float, ...], by_size: bool) -> None:
    sizes = [max(1, int(length * scale)) for length, scale in zip(shape[2:], scales, strict=True)]
    if coordinates == "align_corners" or not all(int(length * scale) for length, scale in zip(shape[2:], scales, strict=True)):
        by_size = True
    # The reference evaluator maps corners by length · scale, ONNX Runtime by whole lengths: see the test of the adjoint.
    amount = np.array([*shape[:2], *sizes]) if by_size else np.array([1, 1, *scales], np.float32)
    name = "sizes" if by_size else "scales"
    nodes = _resize(name, coordinate_transformation_mode=coordinates, **mode)
    x = np.random.default_rng(0).standard_normal(shape)
    assert gradient_error(nodes, {"x": x, name: amount}, ["x"], known=[name]) < TOLERANCE


@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("sizes", [[1, 2, 8, 12], [1, 2, 2, 9]])
def test_in_the_runtime(mode: dict[str, Any], sizes: list[int]) -> None:
    inputs = {"x": np.random.default_rng(0).standard_normal((1, 2, 4, 6)), "sizes": np.array(sizes)}
    assert runtime_error(_resize("sizes", **mode), inputs, ["x"], known=["sizes"]) < RUNTIME_TOLERANCE


@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("coordinates", _COORDINATES)
@pytest.mark.parametrize(("name", "amount"), [("sizes", np.array([1, 2, 7, 8])), ("scales", np.array([1, 1, 1.5, 2], np.float32))])
def test_adjoint_of_what_the_runtime_computes(mode: dict[str, Any], coordinates: str, name: str, amount: Array) -> None:
    """⟨c, resize(x)⟩ = ⟨gradient, x⟩, as there is nothing but a linear map."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 2, 5, 4)).astype(np.float32)
    proto = model_of(_resize(name, coordinate_transformation_mode=coordinates, **mode), {"x": x, name: amount}, ["y"], known=[name])
    found = differentiate(proto, ["y"], ["x"])
    cotangent = rng.standard_normal((1, 2, 7, 8)).astype(np.float32)
    y = open_session(found.proto).run(["y"], {"x": x, found.cotangents["y"]: cotangent})[0]
    gradient = run_in_runtime(found, {"x": x}, {"y": cotangent})["x"]
    expected = float(np.sum(cotangent.astype(np.float64) * y))
    assert abs(float(np.sum(gradient.astype(np.float64) * x)) - expected) < 1e-4 * np.linalg.norm(cotangent) * np.linalg.norm(y)


@pytest.mark.parametrize("opset", [18, 19])
def test_some_axes(opset: int) -> None:
    inputs = {"x": np.random.default_rng(0).standard_normal((2, 3, 4)), "sizes": np.array([5, 4])}
    nodes = _resize("sizes", mode="linear", axes=[2, 0])
    assert gradient_error(nodes, inputs, ["x"], known=["sizes"], opset=opset) < TOLERANCE


def test_antialias() -> None:
    inputs = {"x": np.random.default_rng(0).standard_normal((1, 1, 6, 7)), "sizes": np.array([1, 1, 3, 3])}
    assert gradient_error(_resize("sizes", mode="linear", antialias=1), inputs, ["x"], known=["sizes"]) < TOLERANCE


def test_a_region() -> None:
    nodes = [
        helper.make_node(
            "Resize",
            ["x", "roi", "", "sizes"],
            ["y"],
            mode="linear",
            coordinate_transformation_mode="tf_crop_and_resize",
            extrapolation_value=10.0,
        )
    ]
    inputs = {
        "x": np.random.default_rng(0).standard_normal((1, 1, 4, 4)),
        "roi": np.array([0, 0, 0.2, -0.2, 1, 1, 0.7, 1.1]),
        "sizes": np.array([1, 1, 3, 5]),
    }
    assert gradient_error(nodes, inputs, ["x"], known=["roi", "sizes"]) < TOLERANCE


def test_whole_scales_of_unknown_lengths() -> None:
    inputs = {"x": np.random.default_rng(0).standard_normal((1, 2, 3, 4)), "scales": np.array([1, 1, 2, 3], np.float32)}
    nodes = _resize("scales", mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    assert gradient_error(nodes, inputs, ["x"], known=["scales"], open_shapes=True) < TOLERANCE


def test_a_value_that_is_resized_twice() -> None:
    nodes = [helper.make_node("Resize", ["x", "", "scales"], [name], mode=mode) for name, mode in (("a", "nearest"), ("b", "linear"))]
    nodes.append(helper.make_node("Mul", ["a", "b"], ["y"]))
    inputs = {"x": np.random.default_rng(0).standard_normal((1, 2, 3, 4)), "scales": np.array([1, 1, 2, 2], np.float32)}
    assert gradient_error(nodes, inputs, ["x"], known=["scales"]) < TOLERANCE


@pytest.mark.parametrize(
    ("attributes", "known", "open_shapes", "reason"),
    [
        ({"keep_aspect_ratio_policy": "not_larger"}, True, False, "keep_aspect_ratio_policy"),
        ({}, False, False, "not constant"),
        ({"mode": "linear"}, True, True, "unknown length"),
    ],
)
def test_reasons(attributes: dict[str, Any], known: bool, open_shapes: bool, reason: str) -> None:
    inputs = {"x": np.zeros((1, 1, 2, 2)), "sizes": np.array([1, 1, 5, 5])}
    proto = model_of(_resize("sizes", **attributes), inputs, ["y"], known=["sizes"] if known else [])
    proto.graph.output[0].type.CopyFrom(helper.make_tensor_type_proto(onnx.TensorProto.DOUBLE, ["a", "b", "c", "d"]))
    if open_shapes:
        proto.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "w"
    (stop,) = differentiate(proto, ["y"], ["x"]).stops
    assert reason in stop.reason


@settings(max_examples=20, deadline=None)
@given(
    size=st.integers(1, 3),
    mode=st.sampled_from(["DCR", "CRD"]),
    shape=st.tuples(*[st.integers(1, 2)] * 4),
)
def test_depth_to_space(size: int, mode: str, shape: tuple[int, ...]) -> None:
    batch, channels, height, width = shape
    x = np.random.default_rng(0).standard_normal((batch, channels * size**2, height, width))
    node = [helper.make_node("DepthToSpace", ["x"], ["y"], blocksize=size, mode=mode)]
    assert gradient_error(node, {"x": x}, ["x"]) < TOLERANCE
    assert runtime_error(node, {"x": x}, ["x"]) < RUNTIME_TOLERANCE


@settings(max_examples=10, deadline=None)
@given(size=st.integers(1, 3), shape=st.tuples(*[st.integers(1, 2)] * 4), open_shapes=st.booleans())
def test_space_to_depth(size: int, shape: tuple[int, ...], open_shapes: bool) -> None:
    x = np.random.default_rng(0).standard_normal((*shape[:2], shape[2] * size, shape[3] * size))
    node = f"y = SpaceToDepth<blocksize = {size}>(x)"
    assert gradient_error(node, {"x": x}, ["x"], open_shapes=open_shapes) < TOLERANCE
    assert runtime_error(node, {"x": x}, ["x"]) < RUNTIME_TOLERANCE


def test_rearranged_channels_of_unknown_number() -> None:
    proto = model_of('y = DepthToSpace<blocksize = 2, mode = "CRD">(x)', {"x": np.zeros((1, 4, 2, 2))}, ["y"])
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "c"
    (stop,) = differentiate(proto, ["y"], ["x"]).stops
    assert "unknown number" in stop.reason
