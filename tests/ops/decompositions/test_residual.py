"""A whole weight beside a thin product: folded at load, and as a branch that runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.decompositions import RESIDUAL, RESIDUAL_BESIDE, rebuild
from intaglio.ops.families import Use
from intaglio.ops.moment import Moment
from tests.ops.decompositions.rewriting import check_degenerate, check_emitted, matrix_of
from tests.ops.running import Array, emitter_for, moment_of, normal, use_of

EXACT = 1e-12
"""Double precision products of a few dozen terms."""

USES = {
    "matmul": use_of("[n] y = MatMul (x, w)", (12, 9)),
    "gemm": use_of("[n] y = Gemm <transB = 1> (x, w, b)", (9, 12)),
    "gemm weight first": use_of("[n] y = Gemm (w, x, b)", (9, 12), 0),
    "conv": use_of("[n] y = Conv (x, w, b)", (6, 4, 3, 2)),
    "grouped": use_of("[n] y = Conv <group = 3> (x, w, b)", (6, 4, 3, 2)),
    "transposed": use_of("[n] y = ConvTranspose (x, w)", (7, 3, 2, 2)),
    "gather": use_of("[n] y = Gather (w, x)", (14, 6), 0),
    "lstm": use_of("y, h, c = LSTM <hidden_size = 3> (x, w, r)", (1, 12, 5)),
}
EVERY = pytest.mark.parametrize("use", USES.values(), ids=USES)


@EVERY
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("opset", [7, 18])
def test_the_sum_is_the_rebuilt_weight(use: Use, full: bool, opset: int) -> None:
    ranks = RESIDUAL.full(use) if full else (2,)
    check_emitted(RESIDUAL, use, moment_of(1, use.view.groups, use.view.n), ranks, {}, opset=opset)


@EVERY
def test_any_rank_is_exact_until_it_is_rounded(use: Use) -> None:
    weight = normal(1, *use.view.shape).astype(np.float64)
    for moment in (moment_of(2, use.view.groups, use.view.n), Moment.isotropic(use.view.groups, use.view.n)):
        factors = RESIDUAL.fit(matrix_of(use, weight), moment, use, (1,))
        for whole in (rebuild(RESIDUAL, use, (1,), factors), RESIDUAL.whole(use, (1,), factors)):
            np.testing.assert_allclose(whole, matrix_of(use, weight), atol=EXACT)
    assert RESIDUAL.errors(matrix_of(use, weight), moment, use, [(1,), (2,)]) == [0.0, 0.0]


@EVERY
def test_both_ways_to_rebuild_agree_on_any_factors(use: Use) -> None:
    """As (I, L) times B on top of R, and as B + L·R; and (I, L) reads back as L."""
    factors = [normal(3 + i, *shape).astype(np.float64) for i, shape in enumerate(RESIDUAL.shapes(use, (2,)))]
    np.testing.assert_allclose(rebuild(RESIDUAL, use, (2,), factors), RESIDUAL.whole(use, (2,), factors), atol=EXACT)
    view = RESIDUAL.last_view(use, (2,))
    np.testing.assert_array_equal(view.stored(view.matrix(factors[2])), factors[2])


@pytest.mark.parametrize("name", ["matmul", "conv", "grouped"])
def test_degenerate_weights_and_metrics(name: str) -> None:
    check_degenerate(RESIDUAL, USES[name], (1,))


def test_only_the_base_is_in_few_bits() -> None:
    assert RESIDUAL.storages("int3", 3) == ("int3", "int8", "int8")
    assert RESIDUAL.storages("float", 3) == ("float", "float", "float")


@pytest.mark.parametrize(("shape", "expected"), [((384, 1536), [(3,)]), ((512, 512), [(3,)]), ((4096, 4096), [(25,)]), ((64, 64), [])])
def test_the_correction_is_small(shape: tuple[int, int], expected: list[tuple[int]]) -> None:
    """An eightieth of the weight's entries at most; none where that is less than one component."""
    use = use_of("y = Gemm <transB = 1> (x, w)", shape)
    assert RESIDUAL.grid(use) == expected
    for ranks in expected:
        assert sum(int(np.prod(each)) for each in RESIDUAL.shapes(use, ranks)[1:]) <= np.prod(shape) / 80


def test_vectors_are_declined() -> None:
    assert RESIDUAL.declines(use_of("y = Gemm <transB = 1> (x, w)", (1, 40))) == "its rank is at most 1"


BRANCHES: dict[str, tuple[Use, Array, dict[str, Array]]] = {
    "matmul": (use_of("[n] y = MatMul (x, w)", (12, 9)), normal(1, 2, 3, 12), {}),
    "matmul weight first": (use_of("[n] y = MatMul (w, x)", (9, 12), 0), normal(1, 2, 12, 3), {}),
    "gemm": (use_of("[n] y = Gemm <alpha = 0.5, beta = 2.0> (x, w, b)", (12, 9)), normal(1, 5, 12), {"b": normal(2, 9)}),
    "gemm transposed": (use_of("[n] y = Gemm <transA = 1, transB = 1> (x, w, b)", (9, 12)), normal(1, 12, 5), {"b": normal(2, 1)}),
    "gemm weight first": (use_of("[n] y = Gemm <transB = 1> (w, x, b)", (9, 12), 0), normal(1, 5, 12), {"b": normal(2, 9, 1)}),
    "gemm without c": (use_of("[n] y = Gemm <beta = 3.0> (x, w)", (12, 9)), normal(1, 5, 12), {}),
    "conv": (
        use_of("[n] y = Conv <strides = [2, 1], pads = [1, 0, 1, 1]> (x, w, b)", (6, 4, 3, 2)),
        normal(1, 2, 4, 7, 6),
        {"b": normal(2, 6)},
    ),
    "pointwise": (use_of("[n] y = Conv <kernel_shape = [1, 1]> (x, w)", (6, 4, 1, 1)), normal(1, 2, 4, 3, 3), {}),
    "grouped": (use_of("[n] y = Conv <group = 3> (x, w, b)", (6, 4, 3, 2)), normal(1, 2, 12, 4, 4), {"b": normal(2, 6)}),
}
"""A node, its input x, and its other constants."""


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("opset", [7, 18])
@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_is_added_to_what_the_base_yields(name: str, opset: int, full: bool) -> None:
    use, x, constants = BRANCHES[name]
    ranks = RESIDUAL_BESIDE.full(use) if full else (2,)
    if opset == 7 and name == "gemm without c":
        return  # a third input is not optional before opset 11
    check_emitted(RESIDUAL_BESIDE, use, moment_of(1, use.view.groups, use.view.n), ranks, {"x": x}, constants, opset=opset)


@settings(max_examples=30)
@given(st.data())
def test_random_gemms(data: st.DataObject) -> None:
    """Any orientation, factors and shape of C."""
    m, n, rows = (data.draw(st.integers(2, 9), name) for name in ("m", "n", "rows"))
    index, *turned = (data.draw(st.integers(0, 1), name) for name in ("index", "transA", "transB"))
    alpha, beta = (data.draw(st.sampled_from([1.0, 0.5, -2.0]), name) for name in ("alpha", "beta"))
    operands = "(x, w, b)" if index else "(w, x, b)"
    text = f"[n] y = Gemm <transA = {turned[0]}, transB = {turned[1]}, alpha = {alpha:f}, beta = {beta:f}> {operands}"
    inputs_first = bool(turned[index]) != bool(index)
    use = use_of(text, (n, m) if inputs_first else (m, n), index)
    feed = (n, rows) if bool(turned[1 - index]) == bool(index) else (rows, n)
    whole = (rows, m) if index else (m, rows)
    bias = data.draw(st.sampled_from([(1,), (whole[1],), (whole[0], 1), whole]), "C")
    ranks = (data.draw(st.integers(1, min(m, n)), "rank"),)
    check_emitted(RESIDUAL_BESIDE, use, moment_of(1, 1, n), ranks, {"x": normal(2, *feed)}, {"b": normal(3, *bias)})


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_is_two_thin_layers_and_the_base_keeps_the_bias(name: str) -> None:
    """A Gemm sums by itself; others with an Add."""
    use, _, constants = BRANCHES[name]
    emitter, kind = emitter_for(), use.node.op_type
    RESIDUAL_BESIDE.emit(emitter, use, ["base", "first", "last"], "")
    assert [each.op_type for each in emitter.nodes if each.op_type != "MatMul"] == {
        "MatMul": ["Add"],
        "Gemm": ["Gemm"] * (3 if "transposed" in name or "first" in name else 2),
        "Conv": ["Conv", "Conv", "Conv", "Add"],
    }[kind]
    base, *branch = emitter.nodes
    assert "base" in base.input
    assert base.input[2:] == list(constants)
    assert not any(set(constants) & set(each.input) for each in branch)
    assert [each.name for each in emitter.nodes] == ["", *[""] * (len(branch) - 1), "n"]


@pytest.mark.parametrize("name", ["matmul", "conv", "grouped"])
def test_degenerate_branches(name: str) -> None:
    check_degenerate(RESIDUAL_BESIDE, BRANCHES[name][0], (1,))


@pytest.mark.parametrize(
    ("shape", "expected"), [((384, 1536), [(8,), (16,), (32,)]), ((384, 384), [(8,), (16,)]), ((128, 128), [(8,)]), ((64, 64), [])]
)
def test_a_branch_is_thin(shape: tuple[int, int], expected: list[tuple[int]]) -> None:
    """An eighth of the weight's entries at most."""
    use = use_of("y = Gemm <transB = 1> (x, w)", shape)
    assert RESIDUAL_BESIDE.grid(use) == expected
    for ranks in expected:
        assert sum(int(np.prod(each)) for each in RESIDUAL_BESIDE.shapes(use, ranks)[1:]) <= np.prod(shape) / 8


def test_only_the_base_computes_in_narrow_numbers() -> None:
    assert RESIDUAL_BESIDE.narrow(3) == (True, False, False)


@pytest.mark.parametrize(
    ("text", "shape", "index", "reason"),
    [
        ("y = ConvTranspose (x, w)", (7, 3, 2, 2), 1, "no branch runs beside ConvTranspose: only beside Conv, Gemm, MatMul"),
        ("y = Gather (w, x)", (14, 6), 0, "no branch runs beside Gather: only beside Conv, Gemm, MatMul"),
        ('y = com.microsoft.FusedGemm <activation = "Relu"> (x, w)', (12, 9), 1, "no branch runs beside FusedGemm"),
        ("y = com.microsoft.FusedMatMul (x, w)", (12, 9), 1, "no branch runs beside FusedMatMul"),
        ("y = Conv <group = 6> (x, w)", (12, 1, 3, 3), 1, "depthwise: one input channel per group"),
        ("y = Gemm <transB = 1> (x, w)", (1, 40), 1, "its rank is at most 1"),
    ],
)
def test_operators_that_no_branch_runs_beside(text: str, shape: tuple[int, ...], index: int, reason: str) -> None:
    assert (RESIDUAL_BESIDE.declines(use_of(text, shape, index)) or "").startswith(reason)
