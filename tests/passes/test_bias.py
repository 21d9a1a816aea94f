"""Bias correction: the mean of a layer's output stays what it was, and nothing else that reads a value is disturbed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from intaglio.ops.form import Form
from intaglio.ops.rounding import bias_shift
from intaglio.passes.bias import corrected, find_bias
from intaglio.passes.build import build
from intaglio.passes.graph import ValueIndex
from intaglio.passes.job import Settings, open_job
from intaglio.passes.sites import find_sites
from tests.models import CASES, Array, moments, normal, parse, run, site_of
from tests.passes.test_sites import nested

COARSE = Form("dense", (), "int2")
"""Loses so much that the mean of the outputs would move clearly."""


def found(proto: onnx.ModelProto, name: str = "w") -> str | None:
    """Name of the bias that belongs to a site."""
    model, site = site_of(proto, name)
    bias = find_bias(model, site, ValueIndex(model.proto))
    return None if bias is None else bias.name


MATMUL = {"w": normal(1, 16, 24), "b": normal(2, 24)}


@pytest.mark.parametrize("name", ["matmul", "gemm", "conv1d", "conv2d", "conv2d_groups", "conv3d", "fused_conv"])
def test_the_bias_of_a_layer_is_found(name: str) -> None:
    assert found(CASES[name].proto()) == "b"


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("g (float[N, 16] x) => (float[N, 24] y) { h = MatMul (x, w) y = Add (b, h) }", MATMUL),
        ("g (float[N, 16] x) => (float[N, 24] y) { y = Gemm <transB = 1> (x, w, b) }", {"w": normal(1, 24, 16), "b": normal(2, 1, 24)}),
        ("g (float[N, S, 16] x) => (float[N, S, 24] y) { h = MatMul (x, w) y = Add (h, b) }", MATMUL | {"b": normal(2, 1, 1, 24)}),
    ],
    ids=["swapped", "row", "rows"],
)
def test_a_bias_is_found_however_it_is_written(text: str, weights: Mapping[str, Array]) -> None:
    assert found(parse(text, weights)) == "b"


NOT_A_BIAS = {
    "a scalar": (
        "g (float[N, 256] x) => (float[N, 1] y) { h = MatMul (x, w) y = Add (h, b) }",
        {"w": normal(1, 256, 1), "b": np.array(0.5, np.float32)},
    ),
    "no bias": ("g (float[N, 16] x) => (float[N, 24] y) { y = MatMul (x, w) }", MATMUL),
    "an omitted bias": ("g (float[N, 16] x) => (float[N, 24] y) { y = Gemm (x, w) }", MATMUL),
    "added to something else first": (
        "g (float[N, 16] x) => (float[N, 24] y) { h = MatMul (x, w) r = Relu (h) y = Add (r, b) }",
        MATMUL,
    ),
    "read by two nodes": (
        "g (float[N, 16] x) => (float[N, 24] y, float[N, 24] z) { h = MatMul (x, w) y = Add (h, b) z = Mul (y, b) }",
        MATMUL,
    ),
    "read twice by one node": ("g (float[N, 16] x) => (float[N, 24] y) { h = MatMul (x, w) d = Add (b, b) y = Add (h, d) }", MATMUL),
    "a product with several readers": (
        "g (float[N, 16] x) => (float[N, 24] y, float[N, 24] z) { h = MatMul (x, w) y = Add (h, b) z = Relu (h) }",
        MATMUL,
    ),
    "an activation": ("g (float[N, 16] x, float[24] b) => (float[N, 24] y) { h = MatMul (x, w) y = Add (h, b) }", {"w": MATMUL["w"]}),
    "a default of an input": ("g (float[N, 16] x, float[24] b) => (float[N, 24] y) { h = MatMul (x, w) y = Add (h, b) }", MATMUL),
    "an output": ("g (float[N, 16] x) => (float[N, 24] y, float[24] b) { h = MatMul (x, w) y = Add (h, b) }", MATMUL),
    "one number for all": ("g (float[N, 16] x) => (float[N, 24] y) { h = MatMul (x, w) y = Add (h, b) }", MATMUL | {"b": normal(2, 1)}),
    "a column": ("g (float[24, 16] x) => (float[24, 24] y) { h = MatMul (x, w) y = Add (h, b) }", MATMUL | {"b": normal(2, 24, 1)}),
    "a column of a Gemm": ("g (float[24, 16] x) => (float[24, 24] y) { y = Gemm (x, w, b) }", MATMUL | {"b": normal(2, 24, 1)}),
    "a scaled Gemm": ("g (float[N, 16] x) => (float[N, 24] y) { y = Gemm <beta = 2.0> (x, w, b) }", MATMUL),
    "a scaled product": ("g (float[N, 16] x) => (float[N, 24] y) { y = Gemm <alpha = 0.5> (x, w, b) }", MATMUL),
    "a weight on the left": (
        "g (float[16, N] x) => (float[24, N] y) { h = MatMul (w, x) y = Add (h, b) }",
        MATMUL | {"w": normal(1, 24, 16)},
    ),
    "a transposed convolution": (CASES["conv_transpose"].text, CASES["conv_transpose"].weights),
    "a transposed convolution of one entry": (
        "g (float[N, 16, 4, 4] x) => (float[N, 24, P, Q] y) { y = ConvTranspose <strides = [2, 2]> (x, w, b) }",
        {"w": normal(1, 16, 24, 1, 1), "b": normal(2, 24)},
    ),
    "a weight with two uses": (
        "g (float[N, 16] x, float[N, 16] z) => (float[N, 24] y, float[N, 24] u) { h = MatMul (x, w) y = Add (h, b) u = MatMul (z, w) }",
        MATMUL,
    ),
    "another type": (
        "g (float16[N, 16] x) => (float16[N, 24] y) { h = MatMul (x, w) y = Add (h, b) }",
        {name: array.astype(np.float16) for name, array in MATMUL.items()},
    ),
}


@pytest.mark.parametrize(("text", "weights"), NOT_A_BIAS.values(), ids=NOT_A_BIAS)
def test_what_is_not_the_bias_of_one_layer_alone_is_left_alone(text: str, weights: Mapping[str, Array]) -> None:
    assert found(parse(text, weights)) is None


def test_models_that_list_initializers_as_inputs_let_callers_override_a_bias() -> None:
    assert found(CASES["gemm"].proto(opset=8, ir_version=3)) is None


def test_nested_graphs_are_left_alone() -> None:
    assert found(nested(), "w") is None


@pytest.mark.parametrize("name", ["matmul", "gemm", "conv2d", "conv2d_groups", "conv2d_asymmetric", "fused_conv"])
def test_the_mean_of_the_output_is_preserved(name: str) -> None:
    """Exactly but for float32: 1e-5 of the largest mean. Without the correction it would move a thousand times as much."""
    case = CASES[name]
    proto = case.proto()
    if name == "fused_conv":  # before the activation
        del proto.graph.node[0].attribute[1]
    model, site = site_of(proto)
    moment = moments(model, find_sites(model), case.data())["w"]
    weight = site.matrix(site.value(model))
    approximation = weight + 0.2 * np.random.default_rng(3).standard_normal(weight.shape)
    bias = find_bias(model, site, ValueIndex(model.proto))
    assert bias is not None
    assert moment.mean is not None
    shift = bias_shift(weight, approximation, moment)
    moved = replaced(proto, {"w": site.stored(approximation)})
    mended = replaced(moved, {"b": corrected(model, bias, shift)})
    before, without, after = (channel_means(run(each, case.inputs)[0], name) for each in (proto, moved, mended))
    scale = np.abs(before).max()
    assert np.abs(after - before).max() <= 1e-5 * scale
    assert np.abs(without - before).max() > 1e-2 * scale


def replaced(proto: onnx.ModelProto, arrays: Mapping[str, Array]) -> onnx.ModelProto:
    """A copy with other initializers."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for tensor in copy.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(arrays[tensor.name], np.float32), tensor.name))
    return copy


def channel_means(output: Array, name: str) -> Array:
    """Mean per channel over samples and positions."""
    axis = 1 if "conv" in name else output.ndim - 1
    return np.asarray(np.moveaxis(output.astype(np.float64), axis, 0).reshape(output.shape[axis], -1).mean(1))


@pytest.mark.parametrize("name", ["matmul", "gemm", "conv2d"])
def test_a_built_model_keeps_the_mean_over_the_samples_that_it_was_fitted_on(name: str) -> None:
    """Statistics come from the fit samples, all positions of them: the mean over these is exact but for float32 and the folded weight."""
    case = CASES[name]
    images = {"x": np.concatenate([case.inputs["x"] + shift for shift in (0.0, 0.5, 1.0)]).astype(np.float32)}
    job = open_job(case.proto(), images, Settings())
    feed = {"x": images["x"][job.splits.fit]}
    forms = {site.name: COARSE for site in job.sites}
    built = build(job, forms).proto
    original_bias = next(numpy_helper.to_array(tensor) for tensor in job.model.proto.graph.initializer if tensor.name == "b")
    without = replaced(built, {"b": original_bias})
    before, after, moved = (channel_means(run(proto, feed)[0], name) for proto in (job.model.proto, built, without))
    scale = np.abs(before).max()
    assert np.abs(after - before).max() <= 1e-4 * scale
    assert np.abs(moved - before).max() > 1e-2 * scale
