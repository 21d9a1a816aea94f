"""MatMul and FusedMatMul, with the weight on either side."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intaglio.ops.families.matmul import MATMUL
from intaglio.ops.view import MatrixView
from tests.ops.families.grams import SUMS, expected_gram, gram_of, outputs
from tests.ops.running import Array, assert_close, node_of, normal, run_node, use_of

M, N = 6, 5
LEADS = st.lists(st.integers(1, 3), max_size=3).map(tuple)


def arrange(rows: Array, lead: tuple[int, ...], last: bool) -> Array:
    """Rows (…, k, entries) with the entries along the last axis, or along the one before it."""
    value = rows.reshape(*lead, -1, rows.shape[-1])
    return value if last else np.swapaxes(value, -1, -2)


@given(LEADS, st.integers(1, 4), st.sampled_from([0, 1]), st.booleans(), st.booleans(), st.booleans())
def test_gram_is_the_sum_over_what_the_weight_multiplies(
    lead: tuple[int, ...], k: int, index: int, trans_a: bool, trans_b: bool, fused: bool
) -> None:
    trans_a, trans_b = trans_a and fused, trans_b and fused
    operands = "(x, w)" if index else "(w, x)"
    attributes = f"<transA = {int(trans_a)}, transB = {int(trans_b)}, alpha = 0.5>" if fused else ""
    weight_turned, value_turned = (trans_b, trans_a) if index else (trans_a, trans_b)
    outputs_first = weight_turned == bool(index)
    shape = (M, N) if outputs_first else (N, M)
    use = use_of(f"y = {'com.microsoft.FusedMatMul' if fused else 'MatMul'} {attributes} {operands}", shape, index)
    assert use.view == MatrixView(shape, 1, M, N, outputs_first)
    rows, weight = normal(1, int(np.prod(lead)) * k, N), normal(2, *shape)
    value = arrange(rows, lead, bool(index) != value_turned)
    (expected,) = run_node(use.node, {"x": value}, {"w": weight})
    scale = 0.5 if fused else 1
    assert_close(arrange(scale * outputs(use, weight, rows[None])[0], lead, bool(index)), expected, SUMS)
    total, count = gram_of(use, value)
    assert count == len(rows)
    assert_close(total, expected_gram(rows[None]), SUMS)


@pytest.mark.parametrize("index", [0, 1])
def test_a_vector_is_one_row(index: int) -> None:
    use = use_of("y = MatMul (x, w)" if index else "y = MatMul (w, x)", (N, M) if index else (M, N), index)
    vector = normal(3, N)
    total, count = gram_of(use, vector)
    assert count == 1
    assert_close(total, expected_gram(vector[None, None]), SUMS)


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 21])
def test_grams_run_in_every_opset(opset: int) -> None:
    use = use_of("y = MatMul (x, w)", (N, M))
    rows = normal(4, 3, 4, N)
    total, _ = gram_of(use, rows, opset=opset)
    assert_close(total, expected_gram(rows.reshape(1, -1, N)), SUMS)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_types_are_accumulated_in_single(dtype: type) -> None:
    rows = normal(5, 8, N).astype(dtype)
    total, _ = gram_of(use_of("y = MatMul (x, w)", (N, M)), rows)
    assert_close(total, expected_gram(rows[None]), SUMS)


@pytest.mark.parametrize(
    ("text", "shape", "reason"),
    [
        ("y = MatMul (x, w)", (2, 3, 4), "a batched weight of shape [2, 3, 4]: only two-dimensional weights are decomposed"),
        ("y = com.microsoft.FusedMatMul <transBatchA = 1> (x, w)", (3, 4), "FusedMatMul with a transposed batch axis"),
    ],
)
def test_weights_without_a_view(text: str, shape: tuple[int, ...], reason: str) -> None:
    assert MATMUL.view(node_of(text), 1, shape) == reason


def test_activation_axis_and_cost() -> None:
    right, left = use_of("y = MatMul (x, w)", (N, M)), use_of("y = MatMul (w, x)", (M, N), 0)
    assert MATMUL.activation(right) == MATMUL.activation(left) == ("x", False)
    assert (MATMUL.channel_axis(right), MATMUL.channel_axis(left)) == (1, 0)
    assert MATMUL.macs(right, (2, 3, N), (2, 3, M)) == 2 * 3 * M * N
    assert MATMUL.contract_reason(right) is None


def test_the_long_name_of_the_default_domain_is_the_default_domain() -> None:
    node = node_of("y = MatMul (x, w)")
    node.domain = "ai.onnx"
    use = use_of("y = MatMul (x, w)", (N, M))
    assert type(use)(node, 1, use.view).key == use.key == ("", "MatMul")
