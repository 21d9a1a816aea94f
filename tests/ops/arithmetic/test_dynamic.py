"""Dynamic integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.arithmetic import merge_quantizers
from intaglio.ops.arithmetic.dynamic import DYNAMIC
from intaglio.ops.emit import Spec, spec_of
from intaglio.ops.storage import STORAGES, readers
from intaglio.ops.storage.requantize import requantized
from tests.ops.arithmetic.lowering import FLOAT32, HALF_STEP, lower, optimized, reasons, tame
from tests.ops.running import Array, assemble, assert_close, emitter_for, node_of, normal, run, run_model

MATMUL = "y = MatMul (x, w)"
GEMM = "y = Gemm <transB = 1> (x, w, c)"
STORED = ["int8", "int4", "int4-b32"]


def step_of(x: Array) -> float:
    """The step of DynamicQuantizeLinear (ONNX operator specification): the range, zero included, over 255."""
    return float(max(x.max(), 0) - min(x.min(), 0)) / 255


def rounded(x: Array) -> Array:
    """What DynamicQuantizeLinear makes of x, as floats."""
    step = np.float32(step_of(x))
    zero = np.rint(-min(x.min(), np.float32(0)) / step)
    codes = np.clip(np.rint(x / step) + zero, 0, 255)
    return np.asarray((codes - zero) * np.float64(step))


@pytest.mark.parametrize("functions", [True, False])
@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize("shape", [(5, 64), (2, 5, 64), (64,)], ids=str)
def test_a_product_is_one_integer_kernel(storage: str, shape: tuple[int, ...], functions: bool, tmp_path: Path) -> None:
    x, weight = normal(1, *shape), tame(2, 64, 24, inputs=0)
    lowered = lower("dynamic", storage, MATMUL, weight, 1, functions=functions)
    operators, result = optimized(lowered.emitter, {"x": x}, tmp_path)
    assert operators == ["DynamicQuantizeMatMul"]
    stored = lowered.decoded
    if storage == "int4-b32":
        codes, scale = requantized(stored, 1)
        stored = codes * scale
    assert_close(result, rounded(x) @ stored, FLOAT32)


@pytest.mark.parametrize(
    ("storage", "opset"), [("int8", 11), ("int8", 21), ("int4", 11), ("int4", 18), ("int4-b32", 13), ("int4-b32", 18), ("int4-b32", 21)]
)
def test_a_gemm_with_a_constant_bias_is_one_integer_kernel(storage: str, opset: int, tmp_path: Path) -> None:
    x, weight, bias = normal(1, 5, 64), tame(2, 24, 64), normal(3, 24)
    lowered = lower("dynamic", storage, GEMM, weight, 0, opset=opset)
    lowered.emitter.initializers["c"] = bias
    operators, result = optimized(lowered.emitter, {"x": x}, tmp_path)
    assert operators == ["DynamicQuantizeMatMul"]
    step = np.abs(lowered.decoded).max(axis=1) / 127 if storage == "int4-b32" else np.zeros(24)
    slack = HALF_STEP * step * np.abs(rounded(x)).sum(axis=1, keepdims=True) + FLOAT32 * np.abs(result).max()
    assert (np.abs(result - (rounded(x) @ lowered.decoded.T + bias)) <= slack).all()


def test_a_gemm_without_bias_and_one_with_an_activation_as_bias(tmp_path: Path) -> None:
    x, weight, bias = normal(1, 5, 64), tame(2, 64, 24, inputs=0), normal(3, 5, 1)
    lowered = lower("dynamic", "int8", "y = Gemm (x, w)", weight, 1)
    operators, result = optimized(lowered.emitter, {"x": x}, tmp_path)
    assert operators == ["DynamicQuantizeMatMul"]
    assert_close(result, rounded(x) @ lowered.decoded, FLOAT32)
    lowered = lower("dynamic", "int8", "y = Gemm (x, w, c)", weight, 1)
    operators, result = optimized(lowered.emitter, {"x": x, "c": bias}, tmp_path)
    assert operators == ["DynamicQuantizeMatMul", "Add"]
    assert_close(result, rounded(x) @ lowered.decoded + bias, FLOAT32)


@pytest.mark.parametrize("storage", [name for name, storage in STORAGES.items() if readers(storage) is None])
def test_any_storage_will_do(storage: str, tmp_path: Path) -> None:
    x, weight = normal(1, 2, 5, 64), tame(2, 64, 24, inputs=0)
    opset = max(18, STORAGES[storage].min_opset(spec_of(weight)))
    lowered = lower("dynamic", storage, MATMUL, weight, 1, opset=opset)
    operators, result = optimized(lowered.emitter, {"x": x}, tmp_path)
    assert operators == ["DynamicQuantizeMatMul"]
    step = np.abs(lowered.decoded).max(axis=0) / 127  # of codes that are rounded once more; others are exact
    slack = HALF_STEP * step * np.abs(rounded(x)).sum(axis=-1, keepdims=True) + FLOAT32 * np.abs(result).max()
    assert (np.abs(result - rounded(x) @ lowered.decoded) <= slack).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 6), st.integers(2, 40), st.integers(1, 9), st.sampled_from(["positive", "mixed", "negative"]))
def test_each_activation_moves_by_half_a_step_at_most(seed: int, rows: int, n: int, m: int, sign: str) -> None:
    x, weight = normal(seed, rows, n), tame(seed + 1, n, m, inputs=0)
    x = x if sign == "mixed" else np.abs(x) * (1 if sign == "positive" else -1)
    lowered = lower("dynamic", "int8", MATMUL, weight, 1)
    (result,) = run(lowered.emitter, {"x": x}, ["y"])
    bound = HALF_STEP * step_of(x) * np.abs(lowered.decoded).sum(axis=0) + FLOAT32 * np.abs(x).sum(axis=1, keepdims=True) * 2
    assert (np.abs(result - x @ lowered.decoded) <= bound).all()


def test_a_product_of_factors_is_rounded_when_the_model_is_loaded(tmp_path: Path) -> None:
    x, first, last = normal(1, 5, 64), tame(2, 64, 3, inputs=0), normal(3, 3, 24)
    emitter = emitter_for()
    value = emitter.node("MatMul", [emitter.constant("0", first), emitter.constant("1", last)])
    operand = DYNAMIC.from_value(emitter, value, Spec((64, 24), np.dtype(np.float32)), 1)
    assert operand is not None
    DYNAMIC.lower(emitter, node_of(MATMUL), 1, operand)
    operators, result = optimized(emitter, {"x": x}, tmp_path)
    assert operators == ["DynamicQuantizeMatMul"]
    product = first @ last
    slack = HALF_STEP * np.abs(product).max(axis=0) / 127 * np.abs(rounded(x)).sum(axis=1, keepdims=True)
    assert (np.abs(result - rounded(x) @ product) <= slack + FLOAT32 * np.abs(result).max()).all()


def two_products(texts: tuple[str, str], outputs: tuple[str, ...]) -> onnx.ModelProto:
    """A model of two products with different weights."""
    emitter = emitter_for()
    for number, text in enumerate(texts):
        weight = tame(number, 16, 8, inputs=0)
        packed = STORAGES["int8"].encode(weight, 1)
        operand = DYNAMIC.operand(emitter, str(number), STORAGES["int8"], packed, spec_of(weight), 1)
        DYNAMIC.lower(emitter, node_of(text), 1, operand)
    return assemble(emitter, {"x": normal(1, 3, 16)}, outputs)


def counts(model: onnx.ModelProto) -> int:
    """DynamicQuantizeLinear nodes of the main graph."""
    return sum(node.op_type == "DynamicQuantizeLinear" for node in model.graph.node)


def test_readers_of_one_value_share_a_quantizer(tmp_path: Path) -> None:
    model = two_products(("y = MatMul (x, w)", "z = MatMul (x, w)"), ("y", "z"))
    feed = {"x": normal(1, 3, 16)}
    before = run_model(model, feed)
    assert counts(model) == 2
    merge_quantizers(model.graph)
    assert counts(model) == 1
    path = tmp_path / "optimized.onnx"
    for one, other in zip(before, run_model(model, feed, save_to=path), strict=True):
        assert_close(one, other, FLOAT32)
    assert sorted(node.op_type for node in onnx.load(path).graph.node) == [
        "DynamicQuantizeLinear", "MatMulIntegerToFloat", "MatMulIntegerToFloat",
    ]  # fmt: skip


def test_quantizers_of_different_values_stay() -> None:
    model = two_products(("y = MatMul (x, w)", "z = MatMul (v, w)"), ("y", "z"))
    merge_quantizers(model.graph)
    assert counts(model) == 2


def test_quantizers_whose_results_are_outputs_stay_and_nested_graphs_are_renamed() -> None:
    graph = onnx.parser.parse_graph(
        """g (float[4] x, bool b) => (float[4] y, uint8[4] e) {
            a, as, az = DynamicQuantizeLinear (x)
            c, cs, cz = DynamicQuantizeLinear (x)
            e, es, ez = DynamicQuantizeLinear (x)
            y = If (b) <
                then_branch = t () => (float[4] u) { u = DequantizeLinear (c, cs, cz) },
                else_branch = f () => (float[4] v) {
                    i, is, iz = DynamicQuantizeLinear (x)
                    j, js, jz = DynamicQuantizeLinear (x)
                    k = DequantizeLinear (i, is, iz)
                    l = DequantizeLinear (j, js, jz)
                    v = Add (k, l)
                }
            >
        }"""
    )
    merge_quantizers(graph)
    onnx.checker.check_graph(graph, _context())
    assert [list(node.output) for node in graph.node[:-1]] == [["a", "as", "az"], ["e", "es", "ez"]]
    then, other = (attribute.g for attribute in graph.node[-1].attribute)
    assert list(then.node[0].input) == ["a", "as", "az"]
    assert [list(node.input) for node in other.node] == [["x"], ["i", "is", "iz"], ["i", "is", "iz"], ["k", "l"]]


def _context() -> onnx.checker.C.CheckerContext:
    context = onnx.checker.C.CheckerContext()
    context.ir_version, context.opset_imports = 9, {"": 18}
    return context


@pytest.mark.parametrize(
    ("text", "shape", "index", "reason"),
    [
        ("y = MatMul (w, x)", (24, 64), 0, "the weight is the left factor of a MatMul"),
        ("y = Gemm <transA = 1> (x, w)", (64, 24), 1, "the activation is transposed"),
        ("y = Gemm <alpha = 0.5> (x, w)", (64, 24), 1, "alpha is not 1"),
        ("y = Gemm <beta = 0.5> (x, w, c)", (64, 24), 1, "beta is not 1"),
        ("y = com.microsoft.FusedMatMul (x, w)", (64, 24), 1, "FusedMatMul does not compute so: only Gemm, MatMul do"),
        ("y = Conv (x, w)", (8, 4, 1, 1), 1, "Conv does not compute so: only Gemm, MatMul do"),
        ("y = GRU <hidden_size = 6> (x, w, r)", (1, 18, 4), 1, "ONNX Runtime has no GRU in integers"),
        ("y = RNN <hidden_size = 6> (x, w, r)", (1, 6, 6), 2, "ONNX Runtime has no RNN in integers"),
    ],
)
def test_operators_that_compute_otherwise_are_declined(text: str, shape: tuple[int, ...], index: int, reason: str) -> None:
    assert reason in reasons("dynamic", "int8", text, normal(1, *shape), 0, index)


def test_beta_without_a_bias_means_nothing() -> None:
    assert reasons("dynamic", "int8", "y = Gemm <beta = 0.5> (x, w)", normal(1, 64, 24), 1) == []


def test_old_opsets_and_other_types_are_declined() -> None:
    weight = normal(1, 64, 24)
    assert reasons("dynamic", "int8", MATMUL, weight, 1, opset=10) == ["DynamicQuantizeLinear needs opset 11, the model has 10"]
    assert reasons("dynamic", "int8", MATMUL, weight.astype(np.float16), 1) == ["a weight of float16: DynamicQuantizeLinear takes float32"]


def test_lowering_another_operator_is_an_error() -> None:
    operand = lower("dynamic", "int8", MATMUL, normal(1, 64, 24), 1).operand
    with pytest.raises(ValueError, match="Conv with its weight as input 1 has no dynamic integers"):
        DYNAMIC.lower(emitter_for(), node_of("y = Conv (x, w)"), 1, operand)
