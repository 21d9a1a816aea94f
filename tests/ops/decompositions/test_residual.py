"""A whole weight beside a thin product."""

from __future__ import annotations

import numpy as np
import pytest

from intaglio.ops.decompositions import RESIDUAL, rebuild
from intaglio.ops.families import Use
from intaglio.ops.moment import Moment
from tests.ops.decompositions.rewriting import check_degenerate, check_emitted, matrix_of
from tests.ops.running import moment_of, normal, use_of

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
