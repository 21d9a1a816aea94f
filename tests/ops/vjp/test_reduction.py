"""Gradients of reductions."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from intaglio.passes.differentiate import differentiate

from .checking import TOLERANCE, check_everywhere, gradient_error, model_of, run_in_runtime

_OPERATORS = [
    "ReduceSum",
    "ReduceMean",
    "ReduceMax",
    "ReduceMin",
    "ReduceProd",
    "ReduceL1",
    "ReduceL2",
    "ReduceSumSquare",
    "ReduceLogSum",
    "ReduceLogSumExp",
]


def _operand(op_type: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Elements at least 0.02 apart and away from 0, so that the step crosses no kink; positive for logarithms."""
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape))
    signs = 1 if op_type == "ReduceLogSum" else rng.choice([-1, 1], count)
    return ((0.5 + rng.permutation(count) / max(count, 50)) * signs).reshape(shape)


def _node(op_type: str, keepdims: int, noop: int, *, axes: bool = True) -> str:
    return f"y = {op_type}<keepdims={keepdims}, noop_with_empty_axes={noop}>(x{', axes' if axes else ''})"


@pytest.mark.parametrize("op_type", _OPERATORS)
@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 4)] * 3),
    axes=st.sampled_from([None, (), (0,), (-1,), (1, 2), (-1, 0), (0, 1, 2)]),
    keepdims=st.integers(0, 1),
    noop=st.integers(0, 1),
    open_shapes=st.booleans(),
)
def test_reductions(
    op_type: str, shape: tuple[int, ...], axes: tuple[int, ...] | None, keepdims: int, noop: int, open_shapes: bool
) -> None:
    inputs = {"x": _operand(op_type, shape)}
    if axes is not None:
        inputs["axes"] = np.array(axes, np.int64)
    node = _node(op_type, keepdims, noop, axes=axes is not None)
    known = ["axes"] if axes is not None else []
    assert gradient_error(node, inputs, ["x"], known=known, open_shapes=open_shapes) < TOLERANCE


@pytest.mark.parametrize("op_type", _OPERATORS)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("axes", "keepdims"), [((0,), 1), ((1, -1), 0), ((), 0), ((), 1)])
def test_reductions_in_the_runtime(op_type: str, axes: tuple[int, ...], keepdims: int, known: bool) -> None:
    inputs = {"x": _operand(op_type, (2, 3, 2)), "axes": np.array(axes, np.int64)}
    check_everywhere(_node(op_type, keepdims, 0), inputs, ["x"], known=["axes"] if known else [])


@pytest.mark.parametrize("op_type", _OPERATORS)
def test_no_axes_and_no_operation_in_the_runtime(op_type: str) -> None:
    check_everywhere(_node(op_type, 0, 1, axes=False), {"x": _operand(op_type, (2, 3))}, ["x"])


@pytest.mark.parametrize("op_type", ["ReduceSum", "ReduceMean", "ReduceL2", "ReduceMax"])
def test_a_reduced_scalar(op_type: str) -> None:
    check_everywhere(_node(op_type, 1, 0, axes=False), {"x": _operand(op_type, ())}, ["x"])


@pytest.mark.parametrize("op_type", ["ReduceMax", "ReduceMin"])
def test_newer_extremes(op_type: str) -> None:
    check_everywhere(f"y = {op_type}(x)", {"x": _operand(op_type, (2, 3))}, ["x"], opset=20)


def _gradient(node: str, x: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
    found = differentiate(model_of(node, {"x": x}, ["y"]), ["y"], ["x"])
    return run_in_runtime(found, {"x": x}, {"y": cotangent})["x"]


@pytest.mark.parametrize("op_type", ["ReduceMax", "ReduceMin"])
def test_equal_extremes_share(op_type: str) -> None:
    x = np.array([1, 3, 3, 1], np.float32)
    expected = np.array([0, 2, 2, 0] if op_type == "ReduceMax" else [2, 0, 0, 2])
    np.testing.assert_array_equal(_gradient(f"y = {op_type}(x)", x, np.array([4], np.float32)), expected)


@pytest.mark.parametrize("zeros", [0, 1, 2])
def test_zeros_in_a_product(zeros: int) -> None:
    """The product is linear in each factor, so that differences are exact."""
    x = _operand("ReduceProd", (2, 4))
    x[0, :zeros] = 0
    inputs = {"x": x, "axes": np.array([1], np.int64)}
    check_everywhere("y = ReduceProd(x, axes)", inputs, ["x"], known=["axes"])


@pytest.mark.parametrize("op_type", ["ReduceL1", "ReduceL2"])
def test_norms_at_zero_have_subgradient_zero(op_type: str) -> None:
    np.testing.assert_array_equal(_gradient(f"y = {op_type}(x)", np.zeros(3, np.float32), np.ones(1, np.float32)), np.zeros(3))


def test_log_sum_exp_of_large_and_of_no_terms() -> None:
    """The softmax of (1000, 1000) is (½, ½), which exp alone would miss; a row without finite terms has gradient 0.

    The output, near 1000, is rounded by up to 3e-5, which is then a relative error of the gradient.
    """
    x = np.array([[1000, 1000], [-np.inf, -np.inf]], np.float32)
    found = differentiate(model_of("y = ReduceLogSumExp(x, a)", {"x": x, "a": np.array([1])}, ["y"], known=["a"]), ["y"], ["x"])
    gradient = run_in_runtime(found, {"x": x}, {"y": np.ones((2, 1), np.float32)})["x"]
    np.testing.assert_allclose(gradient, [[0.5, 0.5], [0, 0]], rtol=1e-4)


def test_a_mean_of_more_terms_than_half_precision_counts() -> None:
    """Float16 ends at 65504; the weight 1/80000 is a subnormal with a spacing of 6e-8, an error of at most 0.3 %."""
    gradient = _gradient("y = ReduceMean(x)", np.zeros((80, 1000), np.float16), np.ones((1, 1), np.float16))
    np.testing.assert_allclose(gradient, 1 / 80000, rtol=3e-3)


@pytest.mark.parametrize("shapes", [[(2, 3)], [(2, 3), (3,)], [(2, 3), (2, 1), ()]])
def test_mean_of_several(shapes: list[tuple[int, ...]]) -> None:
    inputs = {f"x{index}": _operand("Mean", shape, index) for index, shape in enumerate(shapes)}
    check_everywhere(f"y = Mean({', '.join(inputs)})", inputs, list(inputs))


def test_sums_need_no_elements_of_the_operand() -> None:
    found = differentiate(model_of("y = ReduceMean(x)", {"x": np.zeros((2, 3))}, ["y"]), ["y"], ["x"])
    assert not any("x" in node.input for node in found.proto.graph.node[1:])
    assert [node.op_type for node in found.proto.graph.node] == ["ReduceMean", "Mul", "Expand", "Identity"]


def test_reductions_of_nothing() -> None:
    assert gradient_error("y = ReduceSum(x)", {"x": np.zeros((0, 3))}, ["x"]) == 0
