"""Gemm and FusedGemm."""

from __future__ import annotations

import numpy as np
import pytest

from intaglio.ops.families.gemm import GEMM
from intaglio.ops.view import MatrixView
from tests.ops.families.grams import SUMS, expected_gram, gram_of, outputs
from tests.ops.running import assert_close, node_of, normal, run_node, use_of

K, M, N = 7, 6, 5


@pytest.mark.parametrize("opset", [7, 10, 11, 18])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("index", [0, 1])
def test_gram_is_the_sum_over_what_the_weight_multiplies(index: int, trans_a: int, trans_b: int, opset: int) -> None:
    operands = "(x, w, c)" if index else "(w, x, c)"
    outputs_first = bool(trans_b) if index else not trans_a
    shape = (M, N) if outputs_first else (N, M)
    use = use_of(f"y = Gemm <transA = {trans_a}, transB = {trans_b}, alpha = 2.0, beta = 0.5> {operands}", shape, index)
    assert use.view == MatrixView(shape, 1, M, N, outputs_first)
    rows, weight, bias = normal(1, K, N), normal(2, *shape), normal(3, 1)
    value_turned = trans_a if index else not trans_b
    value = np.ascontiguousarray(rows.T) if value_turned else rows
    (actual,) = run_node(use.node, {"x": value}, {"w": weight, "c": bias}, opset)
    expected = 2 * outputs(use, weight, rows[None])[0] + 0.5 * bias
    assert_close(actual, expected if index else expected.T, SUMS)
    total, count = gram_of(use, value, opset=opset)
    assert count == K
    assert_close(total, expected_gram(rows[None]), SUMS)


def test_fused_gemm_is_a_gemm() -> None:
    use = use_of('y = com.microsoft.FusedGemm <activation = "Relu", transA = 1, transB = 1> (x, w, c)', (M, N))
    rows = normal(4, K, N)
    total, count = gram_of(use, np.ascontiguousarray(rows.T))
    assert count == K
    assert_close(total, expected_gram(rows[None]), SUMS)


def test_the_bias_has_no_view() -> None:
    assert GEMM.view(node_of("y = Gemm (x, w, c)"), 2, (1, 6)) == "the bias of a Gemm"


def test_activation_axis_and_cost() -> None:
    use = use_of("y = Gemm <transB = 1> (x, w)", (M, N))
    assert GEMM.activation(use) == ("x", False)
    assert GEMM.channel_axis(use) == 0
    assert GEMM.channel_axis(use_of("y = Gemm (x, w)", (N, M))) == 1
    assert GEMM.macs(use, (K, N), (K, M)) == K * M * N
    assert GEMM.contract_reason(use) is None
