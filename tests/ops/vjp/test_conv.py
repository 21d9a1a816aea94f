"""Gradients of convolutions.

ONNX's reference evaluator is wrong for grouped ConvTranspose, and for 1-D and 3-D ones; these cases run in ONNX Runtime in float32.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from onnx import helper

from intaglio.ops.vjp import conv
from intaglio.passes.differentiate import differentiate
from intaglio.passes.session import open_session

from .checking import RUNTIME_TOLERANCE, TOLERANCE, gradient_error, model_of, relative_error, run_in_runtime

Array = np.ndarray


@st.composite
def _convs(draw: st.DrawFn, ranks: tuple[int, ...] = (1, 2, 3)) -> tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]:
    """Attributes of a Conv, the shape of its input and of its weight; every window fits."""
    rank = draw(st.sampled_from(ranks))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(rank))  # noqa: E731
    kernel, strides, dilations = each(1, 3), each(1, 3), each(1, 2)
    auto = draw(st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if auto.startswith("SAME"):
        dilations = (1,) * rank  # ONNX Runtime has no others here
        strides = tuple(map(min, strides, kernel))  # padding is never negative then
    attributes: dict[str, Any] = {"strides": strides, "dilations": dilations, "kernel_shape": kernel, "auto_pad": auto}
    if auto == "NOTSET":
        attributes["pads"] = each(0, 2) + each(0, 2)
    group = draw(st.sampled_from([1, 1, 2, 3]))
    inner, outer = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    attributes["group"] = group
    lengths = tuple(d * (k - 1) + 1 + draw(st.integers(0, 3)) for d, k in zip(dilations, kernel, strict=True))
    return attributes, (draw(st.integers(1, 2)), inner * group, *lengths), (outer * group, inner, *kernel)


def _arrays(shapes: dict[str, tuple[int, ...]], seed: int = 0, dtype: type = np.float64) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def _node(op_type: str, inputs: list[str], **attributes: Any) -> list[onnx.NodeProto]:
    return [helper.make_node(op_type, inputs, ["y"], **attributes)]


def linear_error(nodes: list[onnx.NodeProto], inputs: dict[str, Array], *, opset: int = 18, open_shapes: bool = False) -> float:
    """The error of gradients under ONNX Runtime in float32, for outputs that are linear in each input.

    For such outputs ⟨c, f(v)⟩ − ⟨c, f(0)⟩ = ⟨gradient, v⟩ for every v, not only small ones; that is tested for three v per input.
    """
    proto = model_of(nodes, inputs, ["y"], opset=opset, known=["w"])
    if open_shapes:
        for value in proto.graph.input:
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if axis != 1:
                    dim.dim_param = f"{value.name}{axis}"
    found = differentiate(proto, ["y"], list(inputs))
    assert not found.stops, [str(stop) for stop in found.stops]

    def forward(changed: dict[str, Array]) -> Array:
        values = {**inputs, **changed}
        model = model_of(nodes, values, ["y"], opset=opset, known=["w"])
        result: Array = open_session(model).run(["y"], {name: array for name, array in values.items() if name != "w"})[0]
        return result.astype(np.float64)

    rng = np.random.default_rng(1)
    cotangent = rng.standard_normal(forward({}).shape).astype(np.float32)
    gradients = run_in_runtime(found, {name: array for name, array in inputs.items() if name != "w"}, {"y": cotangent})
    worst = 0.0
    for name, gradient in gradients.items():
        assert gradient.shape == inputs[name].shape
        for _ in range(3):
            direction = rng.standard_normal(gradient.shape).astype(np.float32)
            there, back = forward({name: direction}), forward({name: np.zeros_like(direction)})
            expected = float(np.sum(cotangent * (there - back)))
            scale = float(np.linalg.norm(cotangent) * np.linalg.norm(there - back)) + 1
            worst = max(worst, abs(float(np.sum(gradient.astype(np.float64) * direction)) - expected) / scale)
    assert set(gradients) == set(inputs)
    return worst


@settings(max_examples=25, deadline=None)
@given(case=_convs(ranks=(1, 2)), bias=st.booleans(), seed=st.integers(0, 99))
def test_conv_against_differences(case: Any, bias: bool, seed: int) -> None:
    attributes, x, w = case
    if attributes["group"] > 1 or len(x) == 3:  # no ConvTranspose then, see above
        attributes["strides"] = (1,) * len(attributes["strides"])
        if "pads" in attributes:
            reach = [d * (k - 1) for d, k in zip(attributes["dilations"], w[2:], strict=True)]
            attributes["pads"] = tuple(min(length, most) for length, most in zip(attributes["pads"], reach * 2, strict=True))
    shapes = {"x": x, "w": w, **({"b": w[:1]} if bias else {})}
    error = gradient_error(_node("Conv", list(shapes), **attributes), _arrays(shapes, seed), list(shapes), known=["w"])
    assert error < TOLERANCE


@settings(max_examples=60, deadline=None)
@given(case=_convs(), bias=st.booleans(), open_shapes=st.booleans())
def test_conv_in_the_runtime(case: Any, bias: bool, open_shapes: bool) -> None:
    attributes, x, w = case
    shapes = {"x": x, "w": w, **({"b": w[:1]} if bias else {})}
    open_shapes &= not attributes["auto_pad"].startswith("SAME")
    error = linear_error(_node("Conv", list(shapes), **attributes), _arrays(shapes, dtype=np.float32), open_shapes=open_shapes)
    assert error < RUNTIME_TOLERANCE


@settings(max_examples=40, deadline=None)
@given(case=_convs(), bias=st.booleans(), extra=st.booleans(), data=st.data())
def test_transposed_conv_in_the_runtime(case: Any, bias: bool, extra: bool, data: st.DataObject) -> None:
    attributes, x, w = case
    rank, group = len(x) - 2, attributes["group"]
    attributes["auto_pad"] = "NOTSET"
    attributes["pads"] = tuple(data.draw(st.integers(0, min(1, k - 1))) for k in w[2:] * 2)
    if extra:
        attributes["output_padding"] = tuple(data.draw(st.integers(0, s - 1)) for s in attributes["strides"])
    shapes = {"x": x, "w": (x[1], w[0] // group, *w[2:]), **({"b": w[:1]} if bias else {})}
    assert len(shapes["w"]) == 2 + rank
    assert linear_error(_node("ConvTranspose", list(shapes), **attributes), _arrays(shapes, dtype=np.float32)) < RUNTIME_TOLERANCE


@pytest.mark.parametrize(
    ("attributes", "x", "w"),
    [
        ({"pads": [1, 1, 1, 1]}, (2, 12, 5, 5), (4, 12, 3, 3)),  # the whole batch at once
        ({"pads": [1, 1, 1, 1], "strides": [2, 2]}, (2, 12, 5, 6), (4, 12, 3, 3)),
        ({}, (2, 3, 4, 5), (2, 3, 1, 1)),  # per sample
        ({"strides": [2, 2]}, (2, 3, 4, 5), (2, 3, 1, 1)),
        ({"strides": [2, 1], "pads": [1, 0, 1, 1]}, (2, 5, 8, 9), (3, 5, 4, 4)),  # swapped
        ({"dilations": [2, 1], "strides": [1, 2], "pads": [0, 1, 0, 1]}, (1, 7, 7, 7), (2, 7, 3, 4)),
        ({"pads": [3, 3, 3, 3]}, (1, 2, 2, 2), (2, 2, 3, 3)),  # more padding than the window reaches
    ],
)
def test_every_form_of_the_weight_gradient(attributes: dict[str, Any], x: tuple[int, ...], w: tuple[int, ...]) -> None:
    nodes = _node("Conv", ["x", "w"], **attributes)
    assert gradient_error(nodes, _arrays({"x": x, "w": w}), ["x", "w"]) < TOLERANCE
    assert linear_error(nodes, _arrays({"x": x, "w": w}, dtype=np.float32)) < RUNTIME_TOLERANCE


@pytest.mark.parametrize(
    ("attributes", "batch", "part"), [({"pads": [1, 1, 1, 1]}, 5, 600), ({"strides": [2, 1]}, 3, 1), ({"dilations": [1, 2]}, 1, 1)]
)
def test_batches_in_parts(attributes: dict[str, Any], batch: int, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "_PART", part)
    arrays = _arrays({"x": (batch, 9, 5, 6), "w": (2, 9, 3, 3)})
    nodes = _node("Conv", ["x", "w"], **attributes)
    products = [node for node in differentiate(model_of(nodes, arrays, ["y"]), ["y"], ["w"]).proto.graph.node if node.op_type == "MatMul"]
    assert len(products) == 9 * {600: 3, 1: batch}[part]
    assert gradient_error(nodes, arrays, ["x", "w"]) < TOLERANCE
    assert linear_error(nodes, {name: array.astype(np.float32) for name, array in arrays.items()}) < RUNTIME_TOLERANCE


def test_large_images_in_a_batch_of_unknown_size() -> None:
    arrays = _arrays({"x": (2, 8, 10, 9), "w": (2, 8, 3, 3)}, dtype=np.float32)
    proto = model_of(_node("Conv", ["x", "w"], pads=[1, 0, 1, 2]), arrays, ["y"], known=["w"])
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    exact = differentiate(model_of(_node("Conv", ["x", "w"], pads=[1, 0, 1, 2]), arrays, ["y"], known=["w"]), ["y"], ["w"])
    found = differentiate(proto, ["y"], ["w"])
    assert sum(node.op_type == "ReduceSum" for node in found.proto.graph.node) == 9  # one per position: products per sample
    cotangent = {"y": np.random.default_rng(1).standard_normal((2, 2, 10, 9)).astype(np.float32)}
    one, other = (run_in_runtime(way, {"x": arrays["x"]}, cotangent)["w"] for way in (found, exact))
    assert relative_error(one, other) < RUNTIME_TOLERANCE


@pytest.mark.parametrize("attributes", [{"pads": [1, 1, 1, 1]}, {"strides": [2, 2], "output_padding": [1, 0]}, {"dilations": [2, 1]}])
def test_transposed_conv_against_differences(attributes: dict[str, Any]) -> None:
    arrays = _arrays({"x": (2, 2, 3, 3), "w": (2, 3, 3, 2), "b": (3,)})
    assert gradient_error(_node("ConvTranspose", list(arrays), **attributes), arrays, list(arrays)) < TOLERANCE


@pytest.mark.parametrize("attributes", [{"output_shape": [7, 7], "strides": [2, 2]}, {"auto_pad": "SAME_UPPER", "strides": [1, 1]}])
def test_transposed_conv_that_pads_automatically(attributes: dict[str, Any]) -> None:
    arrays = _arrays({"x": (1, 2, 4, 4), "w": (2, 2, 3, 3)}, dtype=np.float32)
    if "output_shape" in attributes:
        attributes = {**attributes, "auto_pad": "SAME_UPPER"}
    assert linear_error(_node("ConvTranspose", list(arrays), **attributes), arrays) < RUNTIME_TOLERANCE


def test_a_value_that_two_convolutions_read() -> None:
    arrays = _arrays({"x": (1, 2, 4, 4), "w": (2, 2, 3, 3)})
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["h", "w"], ["k"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["h", "k"], ["y"]),
    ]
    assert gradient_error(nodes, arrays, ["x", "w"]) < TOLERANCE


@pytest.mark.parametrize(
    ("nodes", "x", "reason"),
    [
        (_node("ConvTranspose", ["x", "w"], dilations=[3, 3], output_padding=[1, 1]), (1, 2, 4, 4), "output padding"),
        (_node("ConvTranspose", ["x", "w"], strides=[2, 2], output_shape=[8, 8]), (1, 2, 4, 4), "odd or negative"),
    ],
)
def test_reasons(nodes: list[onnx.NodeProto], x: tuple[int, ...], reason: str) -> None:
    proto = model_of(nodes, _arrays({"x": x, "w": (2, 2, 3, 3)}), ["y"])
    (stop,) = differentiate(proto, ["y"], ["x", "w"]).stops
    assert reason in stop.reason


def test_automatic_padding_that_is_negative() -> None:
    proto = model_of(_node("Conv", ["x", "w"], strides=[3], auto_pad="SAME_UPPER"), _arrays({"x": (1, 1, 3), "w": (1, 1, 1)}), ["y"])
    (stop,) = differentiate(proto, ["y"], ["x", "w"]).stops
    assert "negative" in stop.reason


def test_automatic_padding_of_strides_needs_lengths() -> None:
    proto = model_of(
        _node("Conv", ["x", "w"], strides=[2, 2], auto_pad="SAME_UPPER"), _arrays({"x": (1, 2, 5, 5), "w": (2, 2, 3, 3)}), ["y"]
    )
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "h"
    (stop,) = differentiate(proto, ["y"], ["x", "w"]).stops
    assert "unknown length" in stop.reason
