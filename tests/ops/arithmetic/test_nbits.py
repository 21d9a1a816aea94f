"""Weights that stay packed while MatMulNBits and GatherBlockQuantized run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from intaglio.ops.arithmetic.nbits import NBITS
from intaglio.ops.emit import spec_of
from intaglio.ops.storage import STORAGES
from intaglio.ops.storage.nbits import NBits
from tests.ops.arithmetic.lowering import FLOAT32, HALF_STEP, lower, optimized, reasons
from tests.ops.running import Array, assemble, emitter_for, node_of, normal, run_model

MATMUL = "y = MatMul (x, w)"
GEMM = "y = Gemm <transB = 1> (x, w, c)"
GATHER = "y = Gather (w, i)"
STORED = ["nbits8-b32", "nbits4-b32", "nbits4-b64", "nbits2-b64", "nbits4-b32-asym", "nbits2-b32-asym"]
LENGTHS = [64, 70, 7]
"""Of channels: whole blocks, a short one at the end, and fewer than a block, with a byte that is not full."""


def rounded(x: Array, block: int) -> Array:
    """Activations as accuracy level 4 rounds them: int8, one scale for each block of a row."""
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)])
    blocks = padded.reshape(*x.shape[:-1], -1, block)
    step = np.maximum(np.abs(blocks).max(axis=-1, keepdims=True), 1e-30) / 127
    return np.asarray((np.rint(blocks / step) * step).reshape(padded.shape)[..., : x.shape[-1]])


def check_product(result: Array, x: Array, weight: Array, block: int) -> None:
    """One of two: activations were rounded, or the processor has no kernel for that and they were not.

    An activation near the middle between two codes may fall on the other side: hence one step of one weight on top.
    """
    step = np.abs(x).max() / 127 * np.abs(weight).max()
    slack = step + FLOAT32 * float(np.abs(result).max())
    assert min(np.abs(result - each @ weight).max() for each in (rounded(x, block), x)) <= slack
    assert np.abs(result - x @ weight).max() <= HALF_STEP * np.abs(x).max() / 127 * np.abs(weight).sum(axis=0).max() + slack


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("storage", STORED)
def test_a_product_runs_on_packed_blocks(storage: str, length: int, tmp_path: Path) -> None:
    for x in (normal(1, 3, length), normal(1, 2, 3, length)):
        lowered = lower("nbits", storage, MATMUL, normal(2, length, 12), 1)
        operators, result = optimized(lowered.emitter, {"x": x}, tmp_path)
        assert operators == ["MatMulNBits"]
        check_product(result, x, lowered.decoded, _blocks(storage).block)


@pytest.mark.parametrize("functions", [True, False])
@pytest.mark.parametrize("storage", STORED)
def test_a_gemm_runs_on_packed_blocks_and_adds_its_bias(storage: str, functions: bool, tmp_path: Path) -> None:
    x, bias = normal(1, 3, 64), normal(3, 1, 64)
    lowered = lower("nbits", storage, GEMM, normal(2, 64, 64), 0, functions=functions)
    operators, result = optimized(lowered.emitter, {"x": x, "c": bias}, tmp_path)
    assert operators == ["MatMulNBits", "Add"]
    check_product(result - bias, x, lowered.decoded.T, _blocks(storage).block)
    lowered = lower("nbits", storage, "y = Gemm (x, w)", normal(2, 64, 64), 1)
    operators, result = optimized(lowered.emitter, {"x": x}, tmp_path)
    assert operators == ["MatMulNBits"]
    check_product(result, x, lowered.decoded, _blocks(storage).block)


@pytest.mark.parametrize("width", LENGTHS)
@pytest.mark.parametrize("storage", STORED)
def test_rows_are_looked_up_packed(storage: str, width: int, tmp_path: Path) -> None:
    indices = np.array([[1, 2, 1], [8, -1, 0]])
    lowered = lower("nbits", storage, GATHER, normal(2, 9, width), 0, 0)
    operators, result = optimized(lowered.emitter, {"i": indices}, tmp_path)
    assert operators == (["GatherBlockQuantized"] if width % _blocks(storage).block == 0 else ["GatherBlockQuantized", "Slice"])
    np.testing.assert_array_equal(result, lowered.decoded[indices])


def _blocks(name: str) -> NBits:
    storage = STORAGES[name]
    assert isinstance(storage, NBits)
    return storage


def test_activations_may_be_rounded() -> None:
    node = lower("nbits", "nbits4-b32", MATMUL, normal(2, 64, 12), 1).emitter.nodes[-1]
    attributes = {a.name: a.i for a in node.attribute}
    assert attributes == {"N": 12, "K": 64, "bits": 4, "block_size": 32, "accuracy_level": 4}


def test_both_factors_of_a_table_stay_packed(tmp_path: Path) -> None:
    table, matrix = normal(1, 9, 32), normal(2, 32, 48)
    emitter, storage = emitter_for(), STORAGES["nbits4-b32"]
    packed = [storage.encode(part, axis) for part, axis in ((table, 0), (matrix, 1))]
    operands = [
        NBITS.operand(emitter, str(number), storage, part, spec_of(array), number)
        for number, (part, array) in enumerate(zip(packed, (table, matrix), strict=True))
    ]
    NBITS.lower(emitter, node_of("h = Gather (w, i)"), 0, operands[0])
    NBITS.lower(emitter, node_of("y = MatMul (h, w)"), 1, operands[1])
    indices = np.array([3, 0])
    operators, result = optimized(emitter, {"i": indices}, tmp_path)
    assert operators == ["GatherBlockQuantized", "MatMulNBits"]
    decoded = [np.asarray(storage.decode(part, spec_of(array))) for part, array in zip(packed, (table, matrix), strict=True)]
    check_product(result, decoded[0][indices], decoded[1], 32)


def test_nothing_is_expanded_when_the_model_is_loaded(tmp_path: Path) -> None:
    lowered = lower("nbits", "nbits4-b32", MATMUL, normal(2, 64, 12), 1)
    path, feed = tmp_path / "optimized.onnx", {"x": normal(1, 3, 64)}
    run_model(assemble(lowered.emitter, feed, ["y"]), feed, save_to=path)
    kept = sorted((tuple(tensor.dims), tensor.data_type) for tensor in onnx.load(path).graph.initializer)
    assert kept == [((12, 2, 16), onnx.TensorProto.UINT8), ((24,), onnx.TensorProto.FLOAT)]


@pytest.mark.parametrize(
    ("text", "shape", "index", "reason"),
    [
        ("y = MatMul (w, x)", (24, 64), 0, "the weight is the left factor of a MatMul"),
        ("y = Gemm <alpha = 0.5> (x, w)", (64, 24), 1, "alpha is not 1"),
        ("y = Conv (x, w)", (8, 4, 1, 1), 1, "Conv does not compute so: only Gather, Gemm, MatMul do"),
    ],
)
def test_operators_that_compute_otherwise_are_declined(text: str, shape: tuple[int, ...], index: int, reason: str) -> None:
    assert reason in reasons("nbits", "nbits4-b32", text, normal(1, *shape), 0, index)


def test_other_storages_types_and_opsets_are_declined() -> None:
    weight = normal(1, 64, 24)
    assert reasons("nbits", "int4", MATMUL, weight, 1) == ["storage int4 is not packed for MatMulNBits"]
    half = "a weight of float16: block-wise operators are emitted for float32"
    assert reasons("nbits", "nbits4-b32", MATMUL, weight.astype(np.float16), 1) == [half]
    assert reasons("nbits", "nbits4-b32", MATMUL, weight, 1, opset=9) == ["packed blocks need opset 10, the model has 9"]
    assert NBITS.product_reason == "a product of factors is not packed when the model is loaded"
    assert NBITS.from_value(emitter_for(), "v", spec_of(weight), 1) is None


def test_lowering_what_was_declined_is_an_error() -> None:
    weight = normal(1, 64, 24)
    with pytest.raises(TypeError, match="storage int8 is not packed"):
        NBITS.operand(emitter_for(), "", STORAGES["int8"], STORAGES["int8"].encode(weight, 1), spec_of(weight), 1)
    operand = lower("nbits", "nbits4-b32", MATMUL, weight, 1).operand
    with pytest.raises(ValueError, match="MatMul with its weight as input 0 does not read packed blocks"):
        NBITS.lower(emitter_for(), node_of("y = MatMul (w, x)"), 0, operand)
