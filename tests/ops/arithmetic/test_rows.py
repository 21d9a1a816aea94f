"""Embeddings whose rows are decoded one by one."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.arithmetic.rows import ROWS
from intaglio.ops.emit import Spec, spec_of
from intaglio.ops.storage import STORAGES
from tests.ops.arithmetic.lowering import Lowered, lower, reasons
from tests.ops.running import Array, assemble, emitter_for, node_of, normal, run, run_model

GATHER = "y = Gather (w, i)"
STORED = ["int8", "int4-rows"]
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.float64), np.dtype(ml_dtypes.bfloat16)]
INDICES = np.array([[1, 2, 1], [8, -1, 0]])
LOOK_UP = {
    "int8": ["Cast", "Gather", "Gather", "Mul"],
    "int4-rows": ["Cast", "Concat", "Floor", "Gather", "Gather", "Mul", "Mul", "Mul", "Sub", "Sub"],
}
"""What runs for every look-up."""


def looked_up(lowered: Lowered, indices: Array, *, optimize: bool) -> Array:
    """The rows; bfloat16 as float32, because NumPy, and so ONNX Runtime's Python interface, has no such type."""
    output = "y"
    if lowered.decoded.dtype == DTYPES[-1]:
        output = lowered.emitter.node("Cast", ["y"], attributes={"to": 1})
    (rows,) = run(lowered.emitter, {"i": indices}, [output], optimize=optimize)
    return rows


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(STORED), st.sampled_from(DTYPES), st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**16), st.booleans())
def test_rows_are_those_of_the_decoded_table(storage: str, dtype: np.dtype, rows: int, width: int, seed: int, optimize: bool) -> None:
    rng = np.random.default_rng(seed)
    table = normal(seed, rows, width).astype(dtype)
    indices = rng.integers(-rows, rows, rng.integers(1, 4, rng.integers(0, 3)))
    lowered = lower("rows", storage, GATHER, table, 0, 0, functions=bool(seed % 2))
    expected = lowered.decoded[indices]
    actual = looked_up(lowered, indices, optimize=optimize)
    np.testing.assert_array_equal(actual, expected.astype(np.float32) if dtype == DTYPES[-1] else expected)


@pytest.mark.parametrize("storage", STORED)
def test_the_table_stays_packed(storage: str, tmp_path: Path) -> None:
    lowered = lower("rows", storage, "h = Gather (w, i)", normal(1, 9, 64), 0, 0)
    lowered.emitter.node("Neg", ["h"], "y")
    path = tmp_path / "optimized.onnx"
    run_model(assemble(lowered.emitter, {"i": INDICES}, ["y"]), {"i": INDICES}, save_to=path)
    graph = onnx.load(path).graph
    assert sorted(node.op_type for node in graph.node) == sorted([*LOOK_UP[storage], "Neg"])
    assert {tuple(tensor.dims) for tensor in graph.initializer if tensor.dims} == {lowered.packed[0].shape, (9, 1)}


@pytest.mark.parametrize("storage", STORED)
def test_the_second_factor_of_a_table_is_decoded_when_the_model_is_loaded(storage: str, tmp_path: Path) -> None:
    table, matrix, emitter = normal(1, 9, 4), normal(2, 4, 6), emitter_for()
    packed = [STORAGES[storage].encode(part, axis) for axis, part in enumerate((table, matrix))]
    operands = [
        ROWS.operand(emitter, str(axis), STORAGES[storage], part, spec_of(array), axis)
        for axis, (part, array) in enumerate(zip(packed, (table, matrix), strict=True))
    ]
    ROWS.lower(emitter, node_of("h = Gather (w, i)"), 0, operands[0])
    ROWS.lower(emitter, node_of("y = MatMul (h, w)"), 1, operands[1])
    path = tmp_path / "optimized.onnx"
    (result,) = run_model(assemble(emitter, {"i": INDICES}, ["y"]), {"i": INDICES}, save_to=path)
    assert sorted(node.op_type for node in onnx.load(path).graph.node) == sorted([*LOOK_UP[storage], "MatMul"])
    decoded = [np.asarray(STORAGES[storage].decode(p, spec_of(a)), np.float64) for p, a in zip(packed, (table, matrix), strict=True)]
    np.testing.assert_allclose(result, decoded[0][INDICES] @ decoded[1], atol=1e-5)  # four float32 products of magnitude 1


def test_other_operators_storages_and_opsets_are_declined() -> None:
    table = normal(1, 9, 64)
    assert reasons("rows", "int8", "y = MatMul (x, w)", table, 0) == ["MatMul looks no rows up"]
    assert reasons("rows", "int4", GATHER, table, 0, 0) == ["rows of storage int4 cannot be unpacked by themselves"]
    assert reasons("rows", "int8", GATHER, table, 0, 0, opset=12) == ["scales of rows need opset 13, the model has 12"]
    assert ROWS.accepts(STORAGES["int4"], Spec((4, 64), np.dtype(np.float32)), 1) is None
    assert ROWS.product_reason == "a product of factors has no packed rows"
    assert ROWS.from_value(emitter_for(), "v", spec_of(table), 0) is None


def test_lowering_what_was_declined_is_an_error() -> None:
    table = normal(1, 9, 64)
    with pytest.raises(TypeError, match="rows of storage int4 cannot be unpacked"):
        ROWS.operand(emitter_for(), "", STORAGES["int4"], STORAGES["int4"].encode(table, 0), spec_of(table), 0)
    operand = lower("rows", "int8", GATHER, table, 0, 0).operand
    with pytest.raises(ValueError, match="MatMul with its weight as input 1 looks no rows up"):
        ROWS.lower(emitter_for(), node_of("y = MatMul (x, w)"), 1, operand)
