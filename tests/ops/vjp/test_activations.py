"""Gradients of activation functions."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from scipy.special import erf

from intaglio.passes.differentiate import differentiate

from .checking import (
    RUNTIME_TOLERANCE,
    TOLERANCE,
    differences,
    gradient_error,
    model_of,
    relative_error,
    run_gradients,
    run_in_runtime,
    runtime_error,
)

Array = np.ndarray

_ACTIVATIONS = [
    ("Celu", "", 18),
    ("Celu", "<alpha = 0.7>", 18),
    ("Celu", "<alpha = 2.5>", 18),
    ("Elu", "", 18),
    ("Elu", "<alpha = 1.7>", 18),
    ("Elu", "<alpha = 0.3>", 22),
    ("Gelu", '<approximate = "tanh">', 20),
    ("HardSigmoid", "", 18),
    ("HardSigmoid", "<alpha = 0.6, beta = 0.3>", 18),
    ("HardSigmoid", "<alpha = 1.0>", 18),
    ("HardSwish", "", 18),
    ("LeakyRelu", "", 18),
    ("LeakyRelu", "<alpha = 0.3>", 18),
    ("LeakyRelu", "<alpha = -0.5>", 18),
    ("Mish", "", 18),
    ("Relu", "", 18),
    ("Selu", "", 18),
    ("Selu", "<alpha = 1.3, gamma = 0.8>", 18),
    ("Shrink", "", 18),
    ("Shrink", "<bias = 0.3, lambd = 1.2>", 18),
    ("Sigmoid", "", 18),
    ("Softplus", "", 18),
    ("Softsign", "", 18),
    ("Swish", "", 24),
    ("Swish", "<alpha = 1.4>", 24),
    ("ThresholdedRelu", "", 18),
    ("ThresholdedRelu", "<alpha = 0.4>", 18),
]
"""Operator, attributes, opset."""


def _normal(seed: int, shape: tuple[int, ...]) -> Array:
    return np.asarray(3 * np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize(("op_type", "attributes", "opset"), _ACTIVATIONS)
@settings(max_examples=8, deadline=None)
@given(shape=st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple), open_shapes=st.booleans(), seed=st.integers(0, 99))
def test_activations(op_type: str, attributes: str, opset: int, shape: tuple[int, ...], open_shapes: bool, seed: int) -> None:
    inputs = {"x": _normal(seed, shape)}
    assert gradient_error(f"y = {op_type} {attributes} (x)", inputs, ["x"], opset=opset, open_shapes=open_shapes) < TOLERANCE


@pytest.mark.parametrize(("op_type", "attributes", "opset"), _ACTIVATIONS)
def test_activations_in_the_runtime(op_type: str, attributes: str, opset: int) -> None:
    inputs = {"x": _normal(0, (3, 5))}
    assert runtime_error(f"y = {op_type} {attributes} (x)", inputs, ["x"], opset=opset) < RUNTIME_TOLERANCE


def test_gelu() -> None:
    """The reference evaluator computes Erf in float32, so SciPy's stands in for the forward pass."""
    x, cotangent = _normal(0, (3, 4)), _normal(1, (3, 4))
    found = differentiate(model_of("y = Gelu(x)", {"x": x}, ["y"], opset=20), ["y"], ["x"])
    expected = differences(lambda at: float(np.sum(cotangent * at * (1 + erf(at / np.sqrt(2))) / 2)), x)
    assert relative_error(run_gradients(found, {"x": x}, {"y": cotangent})["x"], expected) < TOLERANCE
    assert runtime_error("y = Gelu(x)", {"x": x}, ["x"], opset=20) < RUNTIME_TOLERANCE


@settings(max_examples=20, deadline=None)
@given(
    shapes=st.sampled_from([((2, 3, 4), (3, 1)), ((2, 3), (3,)), ((2, 3), (2, 3)), ((2, 3), ()), ((3,), (1,))]),
    open_shapes=st.booleans(),
    seed=st.integers(0, 99),
)
def test_prelu(shapes: tuple[tuple[int, ...], tuple[int, ...]], open_shapes: bool, seed: int) -> None:
    inputs = {"x": _normal(seed, shapes[0]), "s": _normal(seed + 1, shapes[1])}
    assert gradient_error("y = PRelu(x, s)", inputs, ["x", "s"], open_shapes=open_shapes) < TOLERANCE


def test_prelu_in_the_runtime() -> None:
    assert runtime_error("y = PRelu(x, s)", {"x": _normal(0, (2, 3, 4)), "s": _normal(1, (3, 1))}, ["x", "s"]) < RUNTIME_TOLERANCE


@pytest.mark.parametrize(
    ("op_type", "x", "low", "high"),
    [("Relu", 0, 0, 1), ("LeakyRelu", 0, 0.01, 1), ("Elu", 0, 1, 1), ("HardSigmoid", 2.5, 0, 0.2), ("HardSwish", -3, -0.5, 0)],
)
def test_slopes_at_kinks_lie_between_those_of_the_sides(op_type: str, x: float, low: float, high: float) -> None:
    array = np.array([x], np.float64)
    found = differentiate(model_of(f"y = {op_type}(x)", {"x": array}, ["y"]), ["y"], ["x"])
    (gradient,) = run_gradients(found, {"x": array}, {"y": np.ones(1)})["x"]
    assert low <= np.float32(gradient) <= np.float32(high)  # alphas are float32


@pytest.mark.parametrize(
    ("op_type", "opset", "ends"),
    [
        ("Mish", 18, (0, 1)),
        ("Gelu", 20, (0, 1)),
        ("Swish", 24, (0, 1)),
        ("Softplus", 18, (0, 1)),
        ("Elu", 18, (0, 1)),
        ("Softsign", 18, (0, 0)),
    ],
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_slopes_far_out(op_type: str, opset: int, ends: tuple[int, int], dtype: type[np.floating]) -> None:
    """At ±60 they are those of the asymptotes to one part in a thousand, and nothing overflows, in half precision neither."""
    x = np.array([-60, 60], dtype)
    found = differentiate(model_of(f"y = {op_type}(x)", {"x": x}, ["y"], opset=opset), ["y"], ["x"])
    np.testing.assert_allclose(run_in_runtime(found, {"x": x}, {"y": np.ones(2, dtype)})["x"], ends, atol=1e-3)


# --- operators of ONNX Runtime

_PAIRS = [
    ("y = com.microsoft.Gelu(x)", "y = Gelu(x)"),
    ("y = com.microsoft.FastGelu(x)", 'y = Gelu <approximate = "tanh"> (x)'),
    ("y = com.microsoft.QuickGelu(x)", "y = Swish <alpha = 1.702> (x)"),
    ("y = com.microsoft.QuickGelu <alpha = 1.0> (x)", "y = Swish(x)"),
    ("y = com.microsoft.BiasGelu(x, b)", "z = Add(x, b) y = Gelu(z)"),
    ("y = com.microsoft.FastGelu(x, b)", 'z = Add(x, b) y = Gelu <approximate = "tanh"> (z)'),
]


@pytest.mark.parametrize("open_shapes", [False, True])
@pytest.mark.parametrize(("fused", "plain"), _PAIRS)
def test_fused_gelus_have_the_gradients_of_what_they_stand_for(fused: str, plain: str, open_shapes: bool) -> None:
    """Only ONNX Runtime knows them: its gradients in float32 against those of standard operators in float64."""
    inputs = {"x": _normal(0, (2, 3, 4)), "b": _normal(1, (4,))}
    wrt = ["x", "b"] if "b)" in fused else ["x"]
    assert _difference(fused, plain, {name: inputs[name] for name in wrt}, open_shapes) < RUNTIME_TOLERANCE


def _difference(fused: str, plain: str, inputs: dict[str, Array], open_shapes: bool) -> float:
    lengths = {name: [f"{name}{axis}" for axis in range(array.ndim)] if open_shapes else array.shape for name, array in inputs.items()}
    cotangent = _normal(9, inputs["x"].shape)
    results = []
    for body, dtype, word in ((plain, np.float64, "double"), (fused, np.float32, "float")):
        arguments = ", ".join(f"{word}[{', '.join(map(str, lengths[name]))}] {name}" for name in inputs)
        proto = onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["": 24, "com.microsoft": 1]> checked ({arguments}) => ({word} y) {{ {body} }}'
        )
        proto.graph.output[0].type.tensor_type.ClearField("shape")
        found = differentiate(proto, ["y"], list(inputs))
        assert not found.stops
        fed = {name: array.astype(dtype) for name, array in inputs.items()}
        run = run_gradients if dtype is np.float64 else run_in_runtime
        results.append(run(found, fed, {"y": cotangent.astype(dtype)}))
    assert set(results[1]) == set(inputs)
    return max(relative_error(results[1][name], results[0][name]) for name in inputs)
