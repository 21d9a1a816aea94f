"""Gradients of matrix products."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from onnx import helper

from intaglio.passes.differentiate import Differentiated, differentiate

from .checking import (
    RUNTIME_TOLERANCE,
    TOLERANCE,
    gradient_error,
    hide_shapes,
    model_of,
    relative_error,
    run_gradients,
    run_in_runtime,
    runtime_error,
)

Array = np.ndarray

_STACKS = [((), ()), ((2,), ()), ((), (2,)), ((2,), (2,)), ((2, 3), (3,)), ((3,), (2, 1)), ((1,), (2,)), ((2, 1), (1, 3)), ((1,), ())]
"""Axes of the operands before the last two."""


def _normal(seed: int, *shape: int) -> Array:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape))


def _emitted(found: Differentiated) -> Counter[str]:
    """How many operators of each type the reverse pass has."""
    return Counter(node.op_type for node in found.proto.graph.node if node.output[0].startswith("grad."))


# --- MatMul


@settings(max_examples=60, deadline=None)
@given(
    stacks=st.sampled_from(_STACKS),
    rows=st.integers(1, 3),
    inner=st.integers(1, 3),
    columns=st.integers(1, 3),
    vectors=st.tuples(st.booleans(), st.booleans()),
    open_shapes=st.booleans(),
    seed=st.integers(0, 99),
)
def test_matmul(
    stacks: tuple[tuple[int, ...], tuple[int, ...]],
    rows: int,
    inner: int,
    columns: int,
    vectors: tuple[bool, bool],
    open_shapes: bool,
    seed: int,
) -> None:
    left = (inner,) if vectors[0] else (*stacks[0], rows, inner)
    right = (inner,) if vectors[1] else (*stacks[1], inner, columns)
    inputs = {"a": _normal(seed, *left), "b": _normal(seed + 1, *right)}
    assert gradient_error("y = MatMul(a, b)", inputs, ["a", "b"], open_shapes=open_shapes) < TOLERANCE


@pytest.mark.parametrize("open_shapes", [False, True])
@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((3, 4), (4, 2)),
        ((2, 3, 4), (4, 5)),
        ((3, 4), (2, 4, 5)),
        ((2, 1, 3, 4), (5, 4, 2)),
        ((4,), (4,)),
        ((4,), (2, 4, 3)),
        ((2, 3, 4), (4,)),
    ],
)
def test_matmul_in_the_runtime(left: tuple[int, ...], right: tuple[int, ...], open_shapes: bool) -> None:
    inputs = {"a": _normal(0, *left), "b": _normal(1, *right)}
    assert runtime_error("y = MatMul(a, b)", inputs, ["a", "b"], open_shapes=open_shapes) < RUNTIME_TOLERANCE


def test_an_empty_stack_in_the_runtime() -> None:
    inputs = {"a": np.zeros((0, 2, 3), np.float32), "b": np.ones((3, 4), np.float32)}
    found = differentiate(model_of("y = MatMul(a, b)", inputs, ["y"]), ["y"], ["a", "b"])
    gradients = run_in_runtime(found, inputs, {"y": np.zeros((0, 2, 4), np.float32)})
    assert gradients["a"].shape == (0, 2, 3)
    np.testing.assert_array_equal(gradients["b"], np.zeros((3, 4)))


def test_a_square() -> None:
    assert gradient_error("y = MatMul(a, a)", {"a": _normal(0, 2, 3, 3)}, ["a"]) < TOLERANCE


def test_the_gradient_of_a_weight_is_one_product_over_all_rows() -> None:
    proto = model_of("y = MatMul(a, b)", {"a": _normal(0, 2, 3, 4, 5), "b": _normal(1, 5, 6)}, ["y"])
    assert _emitted(differentiate(proto, ["y"], ["b"])) == {"Flatten": 2, "Gemm": 1}
    assert _emitted(differentiate(proto, ["y"], ["a"])) == {"Transpose": 1, "MatMul": 1}


def test_products_of_two_matrices_need_no_transposes() -> None:
    proto = model_of("y = MatMul(a, b)", {"a": _normal(0, 3, 4), "b": _normal(1, 4, 5)}, ["y"])
    assert _emitted(differentiate(proto, ["y"], ["a", "b"])) == {"Gemm": 2}


@pytest.mark.parametrize("right", [("batch", "heads", 5, "n"), ("k", "n")])
def test_lengths_of_one_name_need_no_sum(right: tuple[int | str, ...]) -> None:
    """Whether an operand was repeated is known without its lengths."""
    declared = {"a": ("batch", "heads", "m", 5), "b": right}
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["y"])],
        "open",
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in declared.items()],
        [onnx.ValueInfoProto(name="y")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    emitted = _emitted(differentiate(proto, ["y"], ["a", "b"]))
    assert not set(emitted) & {"ReduceSum", "Shape"}


# --- Gemm


@settings(max_examples=60, deadline=None)
@given(
    turned=st.tuples(st.booleans(), st.booleans()),
    bias=st.sampled_from([None, (), (1,), (4,), (1, 4), (2, 1), (2, 4), (1, 1)]),
    alpha=st.sampled_from([None, 0.5, -2.0]),
    beta=st.sampled_from([None, 0.5, 0.0]),
    open_shapes=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gemm(
    turned: tuple[bool, bool], bias: tuple[int, ...] | None, alpha: float | None, beta: float | None, open_shapes: bool, seed: int
) -> None:
    inputs, text = _gemm(seed, turned, bias, {"alpha": alpha, "beta": beta})
    assert gradient_error(text, inputs, list(inputs), open_shapes=open_shapes) < TOLERANCE


def _gemm(
    seed: int, turned: tuple[bool, bool], bias: tuple[int, ...] | None, given: dict[str, float | None]
) -> tuple[dict[str, Array], str]:
    """Operands of a product of shape (2, 4) and the node."""
    shapes = (3, 2) if turned[0] else (2, 3), (4, 3) if turned[1] else (3, 4)
    inputs = {"a": _normal(seed, *shapes[0]), "b": _normal(seed + 1, *shapes[1])}
    if bias is not None:
        inputs["c"] = _normal(seed + 2, *bias)
    flags = {"transA": int(turned[0]), "transB": int(turned[1])} | {name: value for name, value in given.items() if value is not None}
    return inputs, f"y = Gemm <{', '.join(f'{name} = {value}' for name, value in flags.items())}> ({', '.join(inputs)})"


@pytest.mark.parametrize("turned", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("bias", [(), (4,), (2, 1)])
def test_gemm_in_the_runtime(turned: tuple[bool, bool], bias: tuple[int, ...]) -> None:
    inputs, text = _gemm(0, turned, bias, {"alpha": 0.5, "beta": 2.0})
    assert runtime_error(text, inputs, list(inputs)) < RUNTIME_TOLERANCE


# --- operators of ONNX Runtime


def _runtime_difference(fused: str, plain: str, inputs: dict[str, Array], open_shapes: bool = False) -> float:
    """Gradients of an operator that only ONNX Runtime knows, in float32, against those of standard operators in float64.

    Args:
        fused: the operator.
        plain: one or more nodes that compute the same.
        inputs: float64 arrays, all differentiated.
        open_shapes: whether lengths are hidden.
    """
    results: list[dict[str, Array]] = []
    cotangent = np.zeros(())
    for text, dtype in ((plain, np.float64), (fused, np.float32)):
        fed = {name: array.astype(dtype) for name, array in inputs.items()}
        proto = model_of([onnx.parser.parse_node(node) for node in text.split(";")], fed, ["y"], opset=20)
        if open_shapes:
            hide_shapes(proto)
        if dtype is np.float64:
            (y,) = onnx.reference.ReferenceEvaluator(proto).run(["y"], fed)
            cotangent = _normal(9, *y.shape)
        else:
            shape = [None] * cotangent.ndim if open_shapes else cotangent.shape
            proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape))
        found = differentiate(proto, ["y"], list(inputs))
        assert not found.stops, [str(stop) for stop in found.stops]
        results.append((run_gradients if dtype is np.float64 else run_in_runtime)(found, fed, {"y": cotangent.astype(dtype)}))
    assert set(results[1]) == set(inputs)
    return max(relative_error(results[1][name], results[0][name]) for name in inputs)


@pytest.mark.parametrize("turned", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("stacks", [((), ()), ((2,), ()), ((), (2,)), ((2, 3), (3,))])
@pytest.mark.parametrize("open_shapes", [False, True])
def test_fused_matmul(turned: tuple[bool, bool], stacks: tuple[tuple[int, ...], tuple[int, ...]], open_shapes: bool) -> None:
    inputs = {"a": _normal(0, *stacks[0], 2, 3), "b": _normal(1, *stacks[1], 3, 4)}
    inputs = {name: array.swapaxes(-1, -2) if flag else array for (name, array), flag in zip(inputs.items(), turned, strict=True)}
    fused = f"y = com.microsoft.FusedMatMul <alpha = 0.5, transA = {int(turned[0])}, transB = {int(turned[1])}> (a, b)"
    plain = ["s = Constant <value_float = 0.5>()", "t = CastLike(s, a)", "u = Mul(a, t)"]
    for name, result, flag in (("u", "v", turned[0]), ("b", "w", turned[1])):
        rank = inputs["a" if name == "u" else "b"].ndim
        perm = [*range(rank - 2), rank - 1, rank - 2] if flag else [*range(rank)]
        plain.append(f"{result} = Transpose <perm = {perm}> ({name})")
    assert _runtime_difference(fused, ";".join([*plain, "y = MatMul(v, w)"]), inputs, open_shapes) < RUNTIME_TOLERANCE


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("open_shapes", [False, True])
def test_fused_matmul_that_turns_stacks(turned: bool, open_shapes: bool) -> None:
    """A stands as (rows, stack, columns), and its last two axes are swapped on top."""
    inputs = {"a": _normal(0, *((4, 2, 3) if turned else (3, 2, 4))), "b": _normal(1, 4, 2, 5)}
    fused = f"y = com.microsoft.FusedMatMul <transBatchA = 1, transBatchB = 1, transA = {int(turned)}> (a, b)"
    plain = f'y = Einsum <equation = "{"ksm" if turned else "msk"},ksn->smn"> (a, b)'
    assert _runtime_difference(fused, plain, inputs, open_shapes) < RUNTIME_TOLERANCE


@pytest.mark.parametrize(
    ("activation", "parameters", "plain"),
    [
        ("Relu", "", "Relu(z)"),
        ("Sigmoid", "", "Sigmoid(z)"),
        ("Tanh", "", "Tanh(z)"),
        ("LeakyRelu", ", activation_alpha = 0.1", "LeakyRelu <alpha = 0.1> (z)"),
        ("HardSigmoid", ", activation_alpha = 0.3, activation_beta = 0.4", "HardSigmoid <alpha = 0.3, beta = 0.4> (z)"),
    ],
)
def test_fused_gemm(activation: str, parameters: str, plain: str) -> None:
    inputs = {"a": _normal(0, 2, 3), "b": _normal(1, 4, 3), "c": _normal(2, 4)}
    fused = f'y = com.microsoft.FusedGemm <transB = 1, alpha = 0.7, activation = "{activation}"{parameters}> (a, b, c)'
    assert _runtime_difference(fused, f"z = Gemm <transB = 1, alpha = 0.7> (a, b, c);y = {plain}", inputs) < RUNTIME_TOLERANCE


@pytest.mark.parametrize("activation", ["Elu", "LeakyRelu"])
def test_an_activation_that_its_output_does_not_tell_stops_the_derivative(activation: str) -> None:
    """A leaky Relu of negative slope maps both signs to the same."""
    text = f'y = com.microsoft.FusedGemm <activation = "{activation}", activation_alpha = -0.5> (a, b)'
    proto = model_of(text, {"a": np.zeros((2, 3), np.float32), "b": np.zeros((3, 2), np.float32)}, ["y"])
    (stop,) = differentiate(proto, ["y"], ["a"]).stops
    assert stop.reason == f"the fused activation {activation} cannot be differentiated from its output"
