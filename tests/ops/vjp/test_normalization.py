"""Gradients of normalizations."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from onnx import TensorProto, helper

from intaglio.passes.differentiate import Differentiated, differentiate

from .checking import (
    RUNTIME_TOLERANCE,
    TOLERANCE,
    differences,
    gradient_error,
    model_error,
    model_of,
    relative_error,
    run_gradients,
    run_in_runtime,
    runtime_error,
)

Array = np.ndarray
_EPSILON = "epsilon = 0.1"
"""Large enough that a derivative which forgets it is wrong in the first digits."""


def _stop(text: str, inputs: dict[str, Array], outputs: Sequence[str] = ("y",), opset: int = 18) -> str:
    (stop,) = differentiate(model_of(text, inputs, outputs, opset=opset), outputs, list(inputs)).stops
    return stop.reason


# --- layers


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 4), data=st.data(), biased=st.booleans(), open_shapes=st.booleans(), seed=st.integers(0, 99))
def test_layer_normalization(rank: int, data: st.DataObject, biased: bool, open_shapes: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    axis = data.draw(st.integers(-rank, rank - 1))
    shape = rng.integers(2, 4, rank)
    inputs = {"x": rng.standard_normal(shape), "s": rng.standard_normal(shape[axis:]), "b": rng.standard_normal(shape[axis:])}
    if not biased:
        del inputs["b"]
    text = f"y = LayerNormalization <axis = {axis}, {_EPSILON}> ({', '.join(inputs)})"
    assert gradient_error(text, inputs, list(inputs), open_shapes=open_shapes) < TOLERANCE


def test_layer_normalization_with_defaults_and_a_scale_that_is_broadcast() -> None:
    rng = np.random.default_rng(0)
    inputs = {"x": rng.standard_normal((2, 3, 4)), "s": rng.standard_normal((3, 1))}
    assert gradient_error("y = LayerNormalization(x, s)", {**inputs, "s": inputs["s"][0]}, ["x", "s"]) < TOLERANCE
    assert gradient_error("y = LayerNormalization <axis = 1> (x, s)", inputs, ["x", "s"]) < TOLERANCE


@pytest.mark.parametrize("axis", [-1, 1])
def test_layer_normalization_in_the_runtime(axis: int) -> None:
    """In float32 the statistics are the node's own outputs, in float64 they are computed anew."""
    rng = np.random.default_rng(0)
    inputs = {"x": rng.standard_normal((2, 3, 4)), "s": rng.standard_normal((2, 3, 4)[axis:]), "b": rng.standard_normal((2, 3, 4)[axis:])}
    assert runtime_error(f"y = LayerNormalization <axis = {axis}, {_EPSILON}> (x, s, b)", inputs, list(inputs)) < RUNTIME_TOLERANCE


def test_layer_normalization_in_half_precision_is_differentiated_in_single() -> None:
    """Gradients are rounded to 11 bits once: their relative error is at most 2⁻¹¹; x̂ of the rounded mean adds about as much."""
    rng = np.random.default_rng(0)
    half = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in {"x": (3, 8), "s": (8,), "b": (8,)}.items()}
    dy = rng.standard_normal((3, 8)).astype(np.float16)
    text = "y = LayerNormalization(x, s, b)"
    found = differentiate(model_of(text, half, ["y"]), ["y"], list(half))
    gradients = run_in_runtime(found, half, {"y": dy})
    exact = {name: array.astype(np.float64) for name, array in half.items()}
    expected = run_gradients(differentiate(model_of(text, exact, ["y"]), ["y"], list(half)), exact, {"y": dy.astype(np.float64)})
    for name, gradient in gradients.items():
        assert gradient.dtype == np.float16
        assert relative_error(gradient.astype(np.float64), expected[name]) < 2e-3


@settings(max_examples=20, deadline=None)
@given(rank=st.integers(1, 3), data=st.data(), open_shapes=st.booleans(), seed=st.integers(0, 99))
def test_root_mean_square_normalization(rank: int, data: st.DataObject, open_shapes: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    axis = data.draw(st.integers(-rank, rank - 1))
    shape = rng.integers(2, 4, rank)
    inputs = {"x": rng.standard_normal(shape), "s": rng.standard_normal(shape[axis:])}
    text = f"y = RMSNormalization <axis = {axis}, {_EPSILON}> (x, s)"
    assert gradient_error(text, inputs, ["x", "s"], opset=23, open_shapes=open_shapes) < TOLERANCE


def test_root_mean_square_normalization_in_the_runtime() -> None:
    rng = np.random.default_rng(0)
    inputs = {"x": rng.standard_normal((2, 3, 4)), "s": rng.standard_normal(4)}
    assert runtime_error(f"y = RMSNormalization <{_EPSILON}> (x, s)", inputs, ["x", "s"], opset=23) < RUNTIME_TOLERANCE


def test_statistics_that_the_loss_reads_stop_the_derivative() -> None:
    inputs = {"x": np.ones((2, 3), np.float32), "s": np.ones(3, np.float32)}
    assert _stop("y, m = LayerNormalization(x, s)", inputs, ["y", "m"]) == "the loss depends on the statistics that it outputs"


# --- what only ONNX Runtime has: compared with the same in standard operators


def _typed(text: str, inputs: dict[str, Array], outputs: Sequence[str], hidden: Sequence[str] = ()) -> onnx.ModelProto:
    """A model whose values are typed, since onnx knows no types of com.microsoft; all are shaped like x."""
    proto = model_of(text, inputs, outputs)
    shape = inputs["x"].shape
    for value in proto.graph.output:
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape))
    proto.graph.value_info.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in hidden)
    return proto


def _differs(found: Differentiated, expected: onnx.ModelProto, inputs: dict[str, Array], outputs: Sequence[str]) -> float:
    """The largest relative error of gradients in float32 under ONNX Runtime against those of another model in float64."""
    assert not found.stops, [str(stop) for stop in found.stops]
    rng = np.random.default_rng(5)
    cotangents = {name: rng.standard_normal(inputs["x"].shape).astype(np.float32) for name in outputs}
    gradients = run_in_runtime(found, inputs, cotangents)
    wide = {name: array.astype(np.float64) for name, array in inputs.items()}
    wide_cotangents = {name: array.astype(np.float64) for name, array in cotangents.items()}
    references = run_gradients(differentiate(expected, list(outputs), list(inputs)), wide, wide_cotangents)
    assert gradients.keys() == references.keys()
    return max(relative_error(gradients[name], references[name]) for name in references)


def _single(**shapes: tuple[int, ...]) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _nodes(text: str) -> list[onnx.NodeProto]:
    return [onnx.parser.parse_node(line) for line in text.strip().splitlines()]


@pytest.mark.parametrize("outputs", [("y",), ("y", "z"), ("z",)])
@pytest.mark.parametrize("skip", [(2, 3, 4), (1, 3, 4)])
def test_skip_layer_normalization(outputs: tuple[str, ...], skip: tuple[int, ...]) -> None:
    inputs = _single(x=(2, 3, 4), k=skip, s=(4,), b=(4,), c=(4,))
    kept = ", , , z" if "z" in outputs else ""
    text = f"y{kept} = com.microsoft.SkipLayerNormalization <{_EPSILON}> (x, k, s, b, c)"
    found = differentiate(_typed(text, inputs, outputs, ["y"]), list(outputs), list(inputs))
    plain = _nodes(f"z = Sum(x, k, c)\ny = LayerNormalization <{_EPSILON}> (z, s, b)")
    wide = {name: array.astype(np.float64) for name, array in inputs.items()}
    assert _differs(found, model_of(plain, wide, outputs), inputs, outputs) < RUNTIME_TOLERANCE


def test_skip_layer_normalization_without_biases() -> None:
    inputs = _single(x=(2, 3, 4), k=(2, 3, 4), s=(4,))
    found = differentiate(_typed("y = com.microsoft.SkipLayerNormalization(x, k, s)", inputs, ["y"]), ["y"], list(inputs))
    wide = {name: array.astype(np.float64) for name, array in inputs.items()}
    plain = model_of(_nodes("z = Add(x, k)\ny = LayerNormalization <epsilon = 1e-12> (z, s)"), wide, ["y"])
    assert _differs(found, plain, inputs, ["y"]) < RUNTIME_TOLERANCE


def test_skip_simplified_layer_normalization() -> None:
    inputs = _single(x=(2, 3, 4), k=(2, 3, 4), s=(4,), c=(4,))
    text = f"y = com.microsoft.SkipSimplifiedLayerNormalization <{_EPSILON}> (x, k, s, c)"
    found = differentiate(_typed(text, inputs, ["y"]), ["y"], list(inputs))
    wide = {name: array.astype(np.float64) for name, array in inputs.items()}
    plain = model_of(_nodes(f"z = Sum(x, k, c)\ny = RMSNormalization <{_EPSILON}> (z, s)"), wide, ["y"], opset=23)
    assert _differs(found, plain, inputs, ["y"]) < RUNTIME_TOLERANCE


def test_simplified_layer_normalization() -> None:
    inputs = _single(x=(2, 3, 4), s=(4,))
    found = differentiate(_typed(f"y = SimplifiedLayerNormalization <{_EPSILON}> (x, s)", inputs, ["y"]), ["y"], list(inputs))
    wide = {name: array.astype(np.float64) for name, array in inputs.items()}
    plain = model_of(f"y = RMSNormalization <{_EPSILON}> (x, s)", wide, ["y"], opset=23)
    assert _differs(found, plain, inputs, ["y"]) < RUNTIME_TOLERANCE


# --- channels


def _batch(seed: int, shape: tuple[int, ...]) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    channels = shape[1]
    vectors = {name: rng.standard_normal(channels) for name in ("s", "b", "m")}
    return {"x": rng.standard_normal(shape), **vectors, "v": rng.uniform(0.2, 2, channels)}


@settings(max_examples=15, deadline=None)
@given(shape=st.sampled_from([(3, 2), (2, 3, 4), (2, 3, 2, 2)]), open_shapes=st.booleans(), seed=st.integers(0, 99))
def test_batch_normalization(shape: tuple[int, ...], open_shapes: bool, seed: int) -> None:
    inputs = _batch(seed, shape)
    text = f"y = BatchNormalization <{_EPSILON}> (x, s, b, m, v)"
    assert gradient_error(text, inputs, list(inputs), open_shapes=open_shapes) < TOLERANCE


@pytest.mark.parametrize("name", ["x", "s", "b", "m", "v"])
def test_each_input_of_batch_normalization_by_itself(name: str) -> None:
    assert gradient_error("y = BatchNormalization(x, s, b, m, v)", _batch(0, (2, 3, 2)), [name]) < TOLERANCE


def test_batch_normalization_in_the_runtime() -> None:
    inputs = _batch(0, (2, 3, 2, 2))
    assert runtime_error("y = BatchNormalization(x, s, b, m, v)", inputs, list(inputs)) < RUNTIME_TOLERANCE


def test_batch_normalization_that_is_trained_stops_the_derivative() -> None:
    text = "y, n, w = BatchNormalization <training_mode = 1> (x, s, b, m, v)"
    assert _stop(text, _batch(0, (2, 3))) == "training_mode=1 normalizes by statistics of the batch; only inference is differentiated"


def _channels(seed: int, shape: tuple[int, ...], scales: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {"x": rng.standard_normal(shape), "s": rng.standard_normal(scales), "b": rng.standard_normal(scales)}


@settings(max_examples=15, deadline=None)
@given(shape=st.sampled_from([(2, 3, 4), (1, 2, 2, 3), (2, 2, 1, 2, 2)]), open_shapes=st.booleans(), seed=st.integers(0, 99))
def test_instance_normalization(shape: tuple[int, ...], open_shapes: bool, seed: int) -> None:
    inputs = _channels(seed, shape, shape[1])
    text = f"y = InstanceNormalization <{_EPSILON}> (x, s, b)"
    assert gradient_error(text, inputs, list(inputs), open_shapes=open_shapes) < TOLERANCE


@pytest.mark.parametrize("name", ["x", "s", "b"])
def test_each_input_of_instance_normalization_by_itself(name: str) -> None:
    assert gradient_error("y = InstanceNormalization(x, s, b)", _channels(0, (2, 3, 4), 3), [name]) < TOLERANCE


def test_instance_normalization_in_the_runtime() -> None:
    inputs = _channels(0, (2, 3, 4, 2), 3)
    assert runtime_error("y = InstanceNormalization(x, s, b)", inputs, list(inputs)) < RUNTIME_TOLERANCE


def _grouped(inputs: dict[str, Array], groups: int, opset: int, open_shapes: bool = False) -> onnx.ModelProto:
    """onnx infers no type of the result; statistics are float32, also of doubles, unless another type is asked for."""
    double = ", stash_type = 11" if opset >= 21 and inputs["x"].dtype == np.float64 else ""
    proto = model_of(f"y = GroupNormalization <num_groups = {groups}, {_EPSILON}{double}> (x, s, b)", inputs, ["y"], opset=opset)
    if open_shapes:
        for axis, dim in enumerate(proto.graph.input[0].type.tensor_type.shape.dim):
            dim.dim_param = f"x{axis}"
    proto.graph.output[0].type.CopyFrom(proto.graph.input[0].type)
    return proto


@settings(max_examples=20, deadline=None)
@given(
    shape=st.sampled_from([(2, 4, 3), (1, 6, 2, 2), (2, 4)]),
    groups=st.sampled_from([1, 2]),
    opset=st.sampled_from([18, 20, 21]),
    open_shapes=st.booleans(),
    seed=st.integers(0, 99),
)
def test_group_normalization(shape: tuple[int, ...], groups: int, opset: int, open_shapes: bool, seed: int) -> None:
    inputs = _channels(seed, shape, groups if opset < 21 else shape[1])
    assert model_error(_grouped(inputs, groups, opset, open_shapes), inputs, list(inputs)) < TOLERANCE


@pytest.mark.parametrize("opset", [18, 21])
def test_group_normalization_in_the_runtime(opset: int) -> None:
    inputs = {name: array.astype(np.float32) for name, array in _channels(0, (2, 6, 2, 3), 2 if opset < 21 else 6).items()}
    wide = {name: array.astype(np.float64) for name, array in inputs.items()}
    found = differentiate(_grouped(inputs, 2, opset), ["y"], list(inputs))
    assert _differs(found, _grouped(wide, 2, opset), inputs, ["y"]) < RUNTIME_TOLERANCE


@pytest.mark.parametrize("axes", [None, (0, 1), (-1,)])
def test_mean_variance_normalization(axes: tuple[int, ...] | None) -> None:
    """The reference evaluator expands it to a function that computes in float32 only: differences are taken of its formula."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 3, 2, 2)).astype(np.float32), rng.standard_normal((2, 3, 2, 2)).astype(np.float32)
    text = f"y = MeanVarianceNormalization {f'<axes = {list(axes)}>' if axes else ''} (x)"
    found = differentiate(model_of(text, {"x": x}, ["y"]), ["y"], ["x"])
    over = axes or (0, 2, 3)

    def loss(at: Array) -> float:
        normal = (at - at.mean(over, keepdims=True)) / (at.std(over, keepdims=True) + 1e-9)
        return float(np.sum(dy * normal))

    gradient = run_in_runtime(found, {"x": x}, {"y": dy})["x"]
    assert relative_error(gradient, differences(loss, x.astype(np.float64))) < 5 * RUNTIME_TOLERANCE  # pairs of nearly equal entries


# --- norms


@settings(max_examples=20, deadline=None)
@given(rank=st.integers(1, 3), order=st.sampled_from([None, 1, 2]), data=st.data(), open_shapes=st.booleans(), seed=st.integers(0, 99))
def test_lp_normalization(rank: int, order: int | None, data: st.DataObject, open_shapes: bool, seed: int) -> None:
    """For the sum of magnitudes on positive entries: the reference evaluator leaves the magnitudes out."""
    rng = np.random.default_rng(seed)
    axis = data.draw(st.integers(-rank, rank - 1).filter(bool))  # and it takes axis 0 for the default
    x = rng.uniform(0.5, 2, rng.integers(2, 4, rank))
    text = f"y = LpNormalization <axis = {axis}{'' if order is None else f', p = {order}'}> (x)"
    signs = 1 if order == 1 else rng.choice([-1, 1], x.shape)
    assert gradient_error(text, {"x": x * signs}, ["x"], opset=22, open_shapes=open_shapes) < TOLERANCE


@pytest.mark.parametrize("order", [1, 2])
def test_lp_normalization_in_the_runtime(order: int) -> None:
    """Against d/dx of x/‖x‖ in closed form: (g − n Σ g y)/‖x‖."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 3, 4)).astype(np.float32), rng.standard_normal((2, 3, 4)).astype(np.float32)
    found = differentiate(model_of(f"y = LpNormalization <axis = 1, p = {order}> (x)", {"x": x}, ["y"], opset=22), ["y"], ["x"])
    norm = np.linalg.norm(x.astype(np.float64), order, axis=1, keepdims=True)
    slope = np.sign(x) if order == 1 else x / norm
    expected = (dy - slope * np.sum(dy * x / norm, axis=1, keepdims=True)) / norm
    assert relative_error(run_in_runtime(found, {"x": x}, {"y": dy})["x"], expected) < RUNTIME_TOLERANCE


def test_a_row_of_zeros_has_no_gradient() -> None:
    x = np.array([[0.0, 0.0], [3.0, 4.0]])
    found = differentiate(model_of("y = LpNormalization(x)", {"x": x}, ["y"], opset=22), ["y"], ["x"])
    with np.errstate(all="ignore"):  # the evaluator divides before it selects
        gradient = run_gradients(found, {"x": x}, {"y": np.ones((2, 2))})["x"]
    np.testing.assert_allclose(gradient, [[0, 0], [(1 - 0.6 * 1.4) / 5, (1 - 0.8 * 1.4) / 5]], atol=1e-15)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("alpha", [None, 0.7])
def test_local_response_normalization(size: int, alpha: float | None) -> None:
    """As many samples as channels, for the reference evaluator confuses the two."""
    x = np.random.default_rng(size).standard_normal((4, 4, 1, 2))
    others = "" if alpha is None else f", alpha = {alpha}, beta = 0.6, bias = 1.5"
    text = f"y = LRN <size = {size}{others}> (x)"
    assert gradient_error(text, {"x": x}, ["x"]) < TOLERANCE
    if size % 2:  # ONNX Runtime has no others
        assert runtime_error(text, {"x": x}, ["x"]) < RUNTIME_TOLERANCE


def test_local_response_of_unknown_channels_stops_the_derivative() -> None:
    proto = model_of("y = LRN <size = 3> (x)", {"x": np.zeros((1, 2, 3, 3), np.float32)}, ["y"])
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "c"
    (stop,) = differentiate(proto, ["y"], ["x"]).stops
    assert stop.reason == "the number of channels is unknown"
