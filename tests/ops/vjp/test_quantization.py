"""Gradients through rounding to codes and back."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings

from intaglio.passes.differentiate import Differentiated, differentiate

from .checking import RUNTIME_TOLERANCE, model_of, relative_error, run_gradients, run_in_runtime

Array = np.ndarray

_EXACT = 1e-12
"""The same sums of a few dozen products in float64, in another order."""

_RANGES = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-(2**15), 2**15 - 1), "int4": (-8, 7), "uint4": (0, 15)}
_TYPES = {**{name: np.dtype(name) for name in ("int8", "uint8", "int16")}, "int4": ml_dtypes.int4, "uint4": ml_dtypes.uint4}


@dataclass(frozen=True)
class _Case:
    """A value that is rounded to codes: how its scales spread, and their type.

    Attributes:
        shape: of the value.
        scales: shape of the scales.
        attributes: of both operators, in ONNX text.
        column: shape in which the scales broadcast, but for blocks.
        block: the axis and the length of blocks.
    """

    shape: tuple[int, ...]
    scales: tuple[int, ...]
    attributes: str
    column: tuple[int, ...]
    block: tuple[int, int] | None = None

    def spread(self, array: Array) -> Array:
        if self.block is None:
            return np.broadcast_to(array.reshape(self.column), self.shape)
        axis, size = self.block
        return np.repeat(array, size, axis).take(range(self.shape[axis]), axis)

    def total(self, array: Array) -> Array:
        """The adjoint of `spread`."""
        result = np.zeros(self.scales)
        positions = self.spread(np.arange(int(np.prod(self.scales))).reshape(self.scales))
        np.add.at(result.reshape(-1), positions, array)
        return result


_TENSOR = _Case((3, 4), (), "", ())
_CASES = {
    "tensor": _TENSOR,
    "one": _Case((3, 4), (1,), "", ()),
    "default axis": _Case((3, 4, 2), (4,), "", (4, 1)),
    "first axis": _Case((3, 4), (3,), "<axis = 0>", (3, 1)),
    "last axis": _Case((2, 3, 4), (4,), "<axis = -1>", (4,)),
    "vector": _Case((4,), (4,), "<axis = 0>", (4,)),
    "blocks": _Case((3, 4), (3, 2), "<axis = 1, block_size = 2>", (), (1, 2)),
    "uneven blocks": _Case((5, 2, 3), (3, 2, 3), "<axis = -3, block_size = 2>", (), (0, 2)),
}


def _inputs(case: _Case, kind: str, zero: bool, seed: int) -> dict[str, Array]:
    """Values of which about a third lie beyond the codes, scales, and zero points in the middle half of the codes."""
    rng = np.random.default_rng(seed)
    low, high = _RANGES[kind]
    scale = rng.uniform(0.5, 2, case.scales)
    middle = rng.integers(low + (high - low) // 4, high - (high - low) // 4, case.scales) if zero else np.zeros(case.scales, int)
    codes = rng.uniform(low - (high - low) / 4, high + (high - low) / 4, case.shape)
    inputs = {"x": np.asarray((codes - case.spread(middle)) * case.spread(scale)), "s": np.asarray(scale)}
    return {**inputs, "z": np.asarray(middle).astype(_TYPES[kind])}


def _pair(case: _Case) -> list[onnx.NodeProto]:
    texts = (f"q = QuantizeLinear {case.attributes} (x, s, z)", f"y = DequantizeLinear {case.attributes} (q, s, z)")
    return [onnx.parser.parse_node(text) for text in texts]


def _learned_step_size(case: _Case, inputs: dict[str, Array], kind: str, dy: Array) -> dict[str, Array]:
    """Esser et al. 2020, equations 3 and 5, with the zero point."""
    low, high = _RANGES[kind]
    ratio, zero = inputs["x"] / case.spread(inputs["s"]), case.spread(inputs["z"].astype(np.int64))
    rounded = np.rint(ratio) + zero
    inside = (low <= rounded) & (rounded <= high)
    step = np.where(inside, np.rint(ratio) - ratio, np.clip(rounded, low, high) - zero)
    return {"x": dy * inside, "s": case.total(dy * step)}


def _found(nodes: list[onnx.NodeProto], inputs: dict[str, Array], wrt: tuple[str, ...], opset: int = 21) -> Differentiated:
    found = differentiate(model_of(nodes, inputs, ["y"], opset=opset), ["y"], wrt)
    assert not found.stops, [str(stop) for stop in found.stops]
    return found


def _single(inputs: dict[str, Array]) -> dict[str, Array]:
    return {name: array.astype(np.float32) if array.dtype == np.float64 else array for name, array in inputs.items()}


@settings(max_examples=60, deadline=None)
@given(case=st.sampled_from(list(_CASES.values())), kind=st.sampled_from(list(_RANGES)), zero=st.booleans(), seed=st.integers(0, 99))
def test_a_pair_is_a_clip_with_a_learned_step_size(case: _Case, kind: str, zero: bool, seed: int) -> None:
    inputs = _inputs(case, kind, zero, seed)
    dy = np.random.default_rng(seed + 1).standard_normal(case.shape)
    gradients = run_gradients(_found(_pair(case), inputs, ("x", "s")), inputs, {"y": dy})
    for name, expected in _learned_step_size(case, inputs, kind, dy).items():
        assert relative_error(gradients[name], expected) < _EXACT


@pytest.mark.parametrize("kind", ["int8", "uint8", "int4"])
@pytest.mark.parametrize("label", _CASES)
def test_a_pair_in_the_runtime(label: str, kind: str) -> None:
    case = _CASES[label]
    inputs = _single(_inputs(case, kind, True, 0))
    dy = np.random.default_rng(1).standard_normal(case.shape).astype(np.float32)
    proto = model_of(_pair(case), inputs, ["y"], opset=21, known=["z"])  # known, since ONNX Runtime is fed no 4-bit arrays
    found = differentiate(proto, ["y"], ["x", "s"])
    gradients = run_in_runtime(found, {"x": inputs["x"], "s": inputs["s"]}, {"y": dy})
    for name, expected in _learned_step_size(case, inputs, kind, dy).items():
        assert relative_error(gradients[name], expected) < RUNTIME_TOLERANCE


def test_a_pair_of_the_runtimes_own_operators() -> None:
    """com.microsoft had 16-bit codes before the standard did."""
    inputs = _inputs(_TENSOR, "int16", True, 0)
    texts = ("q = com.microsoft.QuantizeLinear(x, s, z)", "y = com.microsoft.DequantizeLinear(q, s, z)")
    inputs = _single(inputs)
    dy = np.random.default_rng(1).standard_normal(_TENSOR.shape).astype(np.float32)
    found = _found([onnx.parser.parse_node(text) for text in texts], inputs, ("x", "s"), opset=18)
    gradients = run_in_runtime(found, inputs, {"y": dy})
    for name, expected in _learned_step_size(_TENSOR, inputs, "int16", dy).items():
        assert relative_error(gradients[name], expected) < RUNTIME_TOLERANCE


def test_a_pair_of_opset_19_without_zero_points() -> None:
    inputs = _inputs(_TENSOR, "uint8", False, 0)
    nodes = [onnx.parser.parse_node(text) for text in ("q = QuantizeLinear(x, s)", "y = DequantizeLinear(q, s)")]
    del inputs["z"]
    dy = np.ones(_TENSOR.shape)
    gradients = run_gradients(_found(nodes, inputs, ("x", "s"), opset=19), inputs, {"y": dy})
    expected = _learned_step_size(_TENSOR, {**inputs, "z": np.zeros(())}, "uint8", dy)
    assert all(relative_error(gradients[name], expected[name]) < _EXACT for name in expected)


def test_codes_that_are_moved_between_the_two() -> None:
    inputs = _inputs(_TENSOR, "int8", True, 0)
    texts = ("q = QuantizeLinear(x, s, z)", "t = Transpose <perm = [1, 0]> (q)", "y = DequantizeLinear(t, s, z)")
    dy = np.random.default_rng(1).standard_normal((4, 3))
    gradients = run_gradients(_found([onnx.parser.parse_node(text) for text in texts], inputs, ("x", "s")), inputs, {"y": dy})
    for name, expected in _learned_step_size(_TENSOR, inputs, "int8", dy.T).items():
        assert relative_error(gradients[name], expected) < _EXACT


def test_codes_that_two_operators_read() -> None:
    """Gradients of the readers add up: the pair's result, twice."""
    inputs = _inputs(_TENSOR, "int8", True, 0)
    texts = ("q = QuantizeLinear(x, s, z)", "a = DequantizeLinear(q, s, z)", "b = DequantizeLinear(q, s, z)", "y = Add(a, b)")
    dy = np.random.default_rng(1).standard_normal(_TENSOR.shape)
    gradients = run_gradients(_found([onnx.parser.parse_node(text) for text in texts], inputs, ("x", "s")), inputs, {"y": dy})
    for name, expected in _learned_step_size(_TENSOR, inputs, "int8", 2 * dy).items():
        assert relative_error(gradients[name], expected) < _EXACT


@settings(max_examples=30, deadline=None)
@given(case=st.sampled_from(list(_CASES.values())), kind=st.sampled_from(list(_RANGES)), zero=st.booleans(), seed=st.integers(0, 99))
def test_scales_of_constant_codes(case: _Case, kind: str, zero: bool, seed: int) -> None:
    """y = (q − zero) scale is linear in the scale."""
    inputs = _inputs(case, kind, True, seed)
    low, high = _RANGES[kind]
    codes = np.random.default_rng(seed + 2).integers(low, high + 1, case.shape)
    inputs = {"q": codes.astype(_TYPES[kind]), "s": inputs["s"], "z": inputs["z"]}
    if not zero:
        del inputs["z"]
    dy = np.random.default_rng(seed + 1).standard_normal(case.shape)
    node = onnx.parser.parse_node(f"y = DequantizeLinear {case.attributes} ({', '.join(inputs)})")
    gradients = run_gradients(_found([node], inputs, ("s",)), inputs, {"y": dy})
    offset = case.spread(inputs["z"].astype(np.int64)) if zero else 0
    assert relative_error(gradients["s"], case.total(dy * (codes - offset))) < _EXACT


@pytest.mark.parametrize("label", ["tensor", "first axis", "uneven blocks"])
@pytest.mark.parametrize("kind", ["int8", "uint4"])
def test_scales_of_constant_codes_in_the_runtime(label: str, kind: str) -> None:
    case, (low, high) = _CASES[label], _RANGES[kind]
    codes = np.random.default_rng(2).integers(low, high + 1, case.shape)
    inputs = {"q": codes.astype(_TYPES[kind]), "s": _single(_inputs(case, kind, False, 0))["s"]}
    dy = np.random.default_rng(1).standard_normal(case.shape).astype(np.float32)
    proto = model_of(f"y = DequantizeLinear {case.attributes} (q, s)", inputs, ["y"], opset=21, known=["q"])
    gradients = run_in_runtime(differentiate(proto, ["y"], ["s"]), {"s": inputs["s"]}, {"y": dy})
    assert relative_error(gradients["s"], case.total(dy * codes)) < RUNTIME_TOLERANCE


def test_a_scale_of_zero_has_a_finite_gradient() -> None:
    inputs = {"q": np.array([1, -2, 3], np.int8), "s": np.array(0.0)}
    found = _found([onnx.parser.parse_node("y = DequantizeLinear(q, s)")], inputs, ("s",))
    np.testing.assert_array_equal(run_gradients(found, inputs, {"y": np.array([1.0, 1.0, 2.0])})["s"], 5)


def test_the_value_that_rounds_to_the_last_code_is_not_clipped() -> None:
    inputs = {"x": np.array([126.6, 127.0, 127.4, 127.6, -128.4, -128.6]), "s": np.array(1.0), "z": np.array(0, np.int8)}
    gradients = run_gradients(_found(_pair(_TENSOR), inputs, ("x",)), inputs, {"y": np.ones(6)})
    np.testing.assert_array_equal(gradients["x"], [1, 1, 1, 0, 1, 0])


def test_float_codes_stop_the_derivative() -> None:
    inputs = {"x": np.ones(3, np.float32), "s": np.array(1, np.float32), "z": np.array(0, ml_dtypes.float8_e4m3fn)}
    (stop,) = differentiate(model_of(_pair(_TENSOR), inputs, ["y"], opset=21), ["y"], ["x"]).stops
    assert stop.reason == "codes of type float8_e4m3fn are not integers"


def test_blocks_of_unknown_lengths_stop_the_derivative() -> None:
    case = _CASES["blocks"]
    proto = model_of(_pair(case), _single(_inputs(case, "int8", True, 0)), ["y"], opset=21)
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "n"
    stops = differentiate(proto, ["y"], ["x"]).stops
    assert {stop.reason for stop in stops} == {"blocks of a value whose lengths are unknown"}
