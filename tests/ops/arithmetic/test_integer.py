"""Static integers, between pairs of QuantizeLinear and DequantizeLinear that the tests place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from intaglio.ops.arithmetic import ARITHMETICS
from intaglio.ops.arithmetic.integer import INTEGER
from intaglio.ops.emit import Emitter, Spec, spec_of
from intaglio.ops.storage import STORAGES, readers
from tests.ops.arithmetic.lowering import FLOAT32, HALF_STEP, reasons, tame
from tests.ops.running import Array, assemble, assert_close, emitter_for, node_of, normal, run, run_model, use_of

CONV = "y = Conv <pads = [1, 1, 1, 1]> (x, w)"
BIASED_CONV = "y = Conv <pads = [1, 1, 1, 1]> (x, w, c)"
GEMM = "y = Gemm <transB = 1> (x, w)"
BIASED_GEMM = "y = Gemm <transB = 1> (x, w, c)"
MATMUL = "y = MatMul (x, w)"
STORED = ["int8", "int4", "int3-asym", "int4-b32"]
"""Storages with int8 codes of their own, and one whose values are rounded to int8 when the model is loaded."""

ZERO = 128
LAYOUT = ["QuantizeLinear", "DequantizeLinear", "Transpose"]
"""What may stand around an integer kernel: the ends of the region, and the axes' order that it likes."""


class Region:
    """One operator whose activations are quantized: what a later pass makes of the arithmetic's result.

    Attributes:
        emitter: holds everything.
        x: the activation.
        weight: as its int8 codes decode.
        bias: as its int32 codes decode.
    """

    def __init__(
        self, storage: str, text: str, weight: Array, x: Array, axis: int, *, output: bool = True, opset: int = 18, functions: bool = True
    ) -> None:
        assert not reasons("integer", storage, text, weight, axis, opset=opset)
        self.emitter, self.x, self.output = emitter_for(opset, functions=functions), x, output
        self.x_scale, self.y_scale = np.float32(np.abs(x).max() / 127), np.float32(0.25)
        packed, spec = STORAGES[storage].encode(weight, axis), spec_of(weight)
        operand = INTEGER.operand(self.emitter, "", STORAGES[storage], packed, spec, axis, "w")
        assert operand.name == "w"
        codes, scale = run(self.emitter, {}, operand.values[:2])
        self.weight = codes * np.expand_dims(scale, tuple(i for i in range(weight.ndim) if i != axis))
        own = STORAGES[storage].emit_integer(emitter_for(opset), "", packed, spec, axis)
        rounding = FLOAT32 if own else HALF_STEP * scale.max()
        assert_close(self.weight, np.asarray(STORAGES[storage].decode(packed, spec)), rounding / np.abs(self.weight).max())
        node = node_of(text)
        node.input[0] = self._pair("x", self.x_scale)
        node.output[0] = "f" if output else "y"
        self.bias = np.zeros(len(scale))
        if len(node.input) > 2:
            bias = np.arange(len(scale), dtype=np.int32) * 100
            self.bias = bias * np.float64(self.x_scale) * scale
            self._bias(bias, operand.values[1])
        INTEGER.lower(self.emitter, node, 1, operand)
        if output:
            self._pair("f", self.y_scale, "y")

    def _pair(self, value: str, scale: np.float32, result: str | None = None) -> str:
        parameters = [self.emitter.constant("s", np.asarray(scale)), self.emitter.constant("z", np.asarray(ZERO, np.uint8))]
        quantized = self.emitter.node("QuantizeLinear", [value, *parameters])
        return self.emitter.node("DequantizeLinear", [quantized, *parameters], result)

    def _bias(self, codes: Array, weight_scale: str) -> None:
        step = self.emitter.node("Mul", [self.emitter.constant("s", np.asarray(self.x_scale)), weight_scale])
        zeros = self.emitter.constant("z", np.zeros(len(codes), np.int32))
        self.emitter.node("DequantizeLinear", [self.emitter.constant("b", codes), step, zeros], "c", attributes={"axis": 0})

    def rounded(self) -> Array:
        """The activation as the operator sees it."""
        codes = np.clip(np.rint(self.x / self.x_scale) + ZERO, 0, 255) - ZERO
        return np.asarray(codes * np.float64(self.x_scale))

    def check(self, product: Array, kernel: str, folder: Path) -> None:
        """The kernel runs, and yields the product, rounded once more where the output is quantized."""
        model, path = assemble(self.emitter, {"x": self.x}, ["y"]), folder / "optimized.onnx"
        (plain,) = run_model(model, {"x": self.x}, optimize=False)
        (result,) = run_model(model, {"x": self.x}, save_to=path)
        assert [name for name in operators(path) if name not in LAYOUT] == [kernel]
        step = float(self.y_scale) if self.output else 0.0
        slack = FLOAT32 * float(np.abs(product).max())
        expected = np.clip(product, -ZERO * step, (255 - ZERO) * step) if self.output else product
        assert np.abs(result - plain).max() <= step * 1.0001 + slack  # a sum next to a rounding boundary falls on either side
        assert np.abs(result - expected).max() <= HALF_STEP * step + slack


def operators(path: Path) -> list[str]:
    """Operators of a saved model."""
    return [node.op_type for node in onnx.load(path).graph.node]


def correlate(x: Array, weight: Array, group: int = 1) -> Array:
    """Convolution of images (batch, channels, h, w) with 3×3 kernels, padded by 1."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    parts = zip(np.split(windows, group, axis=1), np.split(weight, group, axis=0), strict=True)
    return np.concatenate([np.einsum("bchwij,ocij->bohw", part, kernel) for part, kernel in parts], axis=1)


@pytest.mark.parametrize("functions", [True, False])
@pytest.mark.parametrize("text", [CONV, BIASED_CONV], ids=["plain", "biased"])
@pytest.mark.parametrize("storage", STORED)
def test_a_convolution_is_one_integer_kernel(storage: str, text: str, functions: bool, tmp_path: Path) -> None:
    region = Region(storage, text, tame(1, 8, 4, 3, 3), normal(2, 1, 4, 6, 6), 0, functions=functions)
    region.check(correlate(region.rounded(), region.weight) + region.bias[:, None, None], "QLinearConv", tmp_path)


def test_a_depthwise_convolution_is_one_integer_kernel(tmp_path: Path) -> None:
    region = Region("int8", "y = Conv <pads = [1, 1, 1, 1], group = 4> (x, w)", normal(1, 4, 1, 3, 3), normal(2, 1, 4, 6, 6), 0)
    region.check(correlate(region.rounded(), region.weight, 4), "QLinearConv", tmp_path)


@pytest.mark.parametrize("output", [True, False])
@pytest.mark.parametrize("text", [GEMM, BIASED_GEMM], ids=["plain", "biased"])
@pytest.mark.parametrize("storage", STORED)
def test_a_gemm_is_one_integer_kernel(storage: str, text: str, output: bool, tmp_path: Path) -> None:
    region = Region(storage, text, tame(1, 12, 32), normal(2, 5, 32), 0, output=output)
    region.check(region.rounded() @ region.weight.T + region.bias, "QGemm", tmp_path)


@pytest.mark.parametrize("shape", [(5, 32), (2, 5, 32)], ids=str)
@pytest.mark.parametrize("storage", STORED)
def test_a_product_is_one_integer_kernel(storage: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    for output, kernel in ((True, "QLinearMatMul"), (False, "MatMulIntegerToFloat")):
        region = Region(storage, MATMUL, tame(1, 32, 12, inputs=0), normal(2, *shape), 1, output=output)
        region.check(region.rounded() @ region.weight, kernel, tmp_path)


@pytest.mark.parametrize("opset", [13, 21, 23])
def test_every_opset_with_scales_per_channel_will_do(opset: int, tmp_path: Path) -> None:
    region = Region("int4-b32", BIASED_GEMM, tame(1, 12, 32), normal(2, 5, 32), 0, opset=opset)
    region.check(region.rounded() @ region.weight.T + region.bias, "QGemm", tmp_path)


@pytest.mark.parametrize("storage", [name for name, storage in STORAGES.items() if readers(storage) is None])
def test_any_storage_of_kernels_will_do(storage: str, tmp_path: Path) -> None:
    weight, x = tame(1, 8, 4, 3, 3), normal(2, 1, 4, 6, 6)
    if STORAGES[storage].accepts(spec_of(weight)):  # a storage for matrices
        region = Region(storage, GEMM, tame(1, 12, 32), normal(2, 5, 32), 0)
        region.check(region.rounded() @ region.weight.T, "QGemm", tmp_path)
        return
    region = Region(storage, CONV, weight, x, 0, opset=max(18, STORAGES[storage].min_opset(spec_of(weight))))
    region.check(correlate(region.rounded(), region.weight), "QLinearConv", tmp_path)


def product_of_factors(emitter: Emitter) -> tuple[str, Array]:
    """A weight (12, 32) that is multiplied out at load."""
    first, last = normal(3, 4, 32), normal(4, 12, 4)
    return emitter.node("MatMul", [emitter.constant("1", last), emitter.constant("0", first)]), last @ first


def test_a_product_of_factors_is_rounded_when_the_model_is_loaded(tmp_path: Path) -> None:
    emitter = emitter_for()
    value, product = product_of_factors(emitter)
    operand = INTEGER.from_value(emitter, value, Spec((12, 32), np.dtype(np.float32)), 0, "w")
    assert operand is not None
    INTEGER.lower(emitter, node_of("y = Gemm <transB = 1> (x, w)"), 1, operand)
    x = np.eye(32, dtype=np.float32)
    path = tmp_path / "optimized.onnx"
    (result,) = run_model(assemble(emitter, {"x": x}, ["y"]), {"x": x}, save_to=path)
    assert operators(path) == ["DequantizeLinear", "Gemm"]  # nothing but the weight's own: its activation is not quantized yet
    step = np.abs(product).max(axis=1, keepdims=True) / 127
    assert (np.abs(result.T - product) <= HALF_STEP * step).all()


def test_no_zero_point_is_stored() -> None:
    emitter = emitter_for()
    weight = normal(1, 12, 32)
    packed = STORAGES["int8"].encode(weight, 0)
    operand = INTEGER.operand(emitter, "", STORAGES["int8"], packed, spec_of(weight), 0)
    assert sum(np.asarray(array).nbytes for array in emitter.initializers.values()) == sum(part.nbytes for part in packed)
    assert len(operand.values) == 3


@pytest.mark.parametrize(
    ("text", "shape", "index", "reason"),
    [
        ("y = MatMul (w, x)", (24, 64), 0, "the weight is the left factor of a MatMul"),
        ("y = Gemm <transA = 1> (x, w)", (64, 24), 1, "the activation is transposed"),
        ("y = Gemm <alpha = 0.5> (x, w)", (64, 24), 1, "alpha is not 1"),
        ("y = com.microsoft.FusedConv (x, w)", (8, 4, 3, 3), 1, "FusedConv does not compute so: only Conv, Gemm, MatMul do"),
        ("y = ConvTranspose (x, w)", (4, 8, 3, 3), 1, "ConvTranspose does not compute so: only Conv, Gemm, MatMul do"),
        ("y = Gather (w, i)", (24, 64), 0, "Gather does not compute so: only Conv, Gemm, MatMul do"),
    ],
)
def test_operators_that_compute_otherwise_are_declined(text: str, shape: tuple[int, ...], index: int, reason: str) -> None:
    assert reason in reasons("integer", "int8", text, normal(1, *shape), 0, index)


def test_old_opsets_other_types_and_other_axes_are_declined() -> None:
    weight = normal(1, 8, 4, 3, 3)
    assert reasons("integer", "int8", CONV, weight, 0, opset=12) == ["one scale per channel needs opset 13, the model has 12"]
    expected = "a weight of float16: integers are dequantized to float32"
    assert reasons("integer", "int8", CONV, weight.astype(np.float16), 0) == [expected]
    assert reasons("integer", "int8", CONV, weight, 1) == ["a kernel whose scales do not lie along its outputs"]


def test_every_arithmetic_is_listed_under_its_own_name() -> None:
    assert [arithmetic.name for arithmetic in ARITHMETICS.values()] == list(ARITHMETICS) == ["integer", "dynamic", "nbits", "rows"]
    assert [name for name, arithmetic in ARITHMETICS.items() if arithmetic.coupled] == ["integer"]
    domains = {name: arithmetic.domains(use_of("y = MatMul (x, w)", (4, 4))) for name, arithmetic in ARITHMETICS.items()}
    assert domains == {"integer": (), "dynamic": (), "nbits": ("com.microsoft",), "rows": ()}
    assert not any(arithmetic.partners(use_of("y = MatMul (x, w)", (4, 4))) for arithmetic in ARITHMETICS.values())
