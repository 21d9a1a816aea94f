"""Low rank in a metric: optimality, degenerate inputs, and both executions of every family."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.decompositions import CHANNEL_SVD, CHANNEL_SVD_DENSE, DECOMPOSITIONS, LOW_RANK, LOW_RANK_DENSE, rebuild
from intaglio.ops.decompositions.base import RIDGE
from intaglio.ops.decompositions.lowrank import LowRank, factorize, spectrum
from intaglio.ops.families import Use
from intaglio.ops.moment import Moment, relative_error
from tests.ops.decompositions.rewriting import check_degenerate, check_emitted, check_grid, check_refit, fitted, matrix_of
from tests.ops.running import Array, moment_of, normal, use_of

SIDES = st.integers(2, 9)
BOTH = pytest.mark.parametrize("decomposition", [LOW_RANK, LOW_RANK_DENSE], ids=lambda d: d.execution)
BOTH_CHANNEL = pytest.mark.parametrize("decomposition", [CHANNEL_SVD, CHANNEL_SVD_DENSE], ids=lambda d: d.execution)

PRECISION = 1e-9
"""Double precision through one eigenproblem of a squared matrix, relative to the whole energy."""


def linear(m: int, n: int) -> Use:
    return use_of("y = Gemm <transB = 1> (x, w)", (m, n))


def grouped(groups: int, m: int, n: int) -> Use:
    return use_of(f"y = Conv <group = {groups}> (x, w)", (groups * m, n, 1))


def roots(moment: Moment) -> Array:
    """The symmetric root of A per group."""
    if moment.diagonal:
        return np.sqrt(moment.matrix)[:, :, None] * np.eye(moment.matrix.shape[1])
    values, vectors = np.linalg.eigh(moment.matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))[:, None, :]) @ vectors.transpose(0, 2, 1)


@st.composite
def metrics(draw: st.DrawFn, groups: int, n: int) -> Moment:
    kind = draw(st.sampled_from(["full", "singular", "diagonal", "isotropic"]))
    seed = draw(st.integers(0, 2**16))
    if kind == "isotropic":
        return Moment.isotropic(groups, n)
    moment = moment_of(seed, groups, n, max(1, n // 2) if kind == "singular" else None)
    return Moment(moment.diag.copy(), moment.rows) if kind == "diagonal" else moment


@settings(max_examples=60)
@given(st.integers(1, 3), SIDES, SIDES, st.integers(0, 2**16), st.data())
def test_no_matrix_of_the_same_rank_is_better(groups: int, m: int, n: int, seed: int, data: st.DataObject) -> None:
    moment = data.draw(metrics(groups, n))
    weight = normal(seed, groups, m, n).astype(np.float64)
    rank = data.draw(st.integers(1, min(m, n)))
    squares = np.square(np.linalg.svd(weight @ roots(moment), compute_uv=False))
    np.testing.assert_allclose(spectrum(weight, moment), squares, atol=PRECISION * squares.max())
    first, last = factorize(weight, moment, rank)
    assert (first.shape, last.shape) == ((groups, rank, n), (groups, m, rank))
    best = squares[:, rank:].sum() / squares.sum()
    assert relative_error(weight, last @ first, moment) == pytest.approx(best, abs=PRECISION)


@settings(max_examples=30)
@given(SIDES, SIDES, st.integers(0, 2**16), st.data())
def test_predicted_errors_are_those_of_the_fit(m: int, n: int, seed: int, data: st.DataObject) -> None:
    moment = data.draw(metrics(1, n))
    use, weight = linear(m, n), normal(seed, m, n)
    ranks = [(r,) for r in range(1, min(m, n) + 1)]
    metric = moment.regularized(RIDGE)
    predicted = LOW_RANK.errors(matrix_of(use, weight), metric, use, ranks)
    plain = LOW_RANK.errors(matrix_of(use, weight), moment, use, ranks)
    assert predicted == sorted(predicted, reverse=True)
    for rank, error, bound in zip(ranks, predicted, plain, strict=True):
        approximation = rebuild(LOW_RANK, use, rank, LOW_RANK.fit(matrix_of(use, weight), moment, use, rank))
        assert relative_error(matrix_of(use, weight), approximation, metric) == pytest.approx(error, abs=PRECISION)
        assert relative_error(matrix_of(use, weight), approximation, moment) >= bound - PRECISION


@pytest.mark.parametrize(("m", "n"), [(6, 4), (4, 6), (5, 5)])
def test_errors_of_groups_add_up(m: int, n: int) -> None:
    use, moment = grouped(3, m, n), moment_of(1, 3, n)
    weight = matrix_of(use, normal(2, 3 * m, n, 1)) * np.array([1, 10, 0.1])[:, None, None]
    (predicted,) = LOW_RANK.errors(weight, moment.regularized(RIDGE), use, [(2,)])
    factors = LOW_RANK.fit(weight, moment, use, (2,))
    measured = relative_error(weight, rebuild(LOW_RANK, use, (2,), factors), moment.regularized(RIDGE))
    assert measured == pytest.approx(predicted, abs=PRECISION)


@pytest.mark.parametrize(("m", "n"), [(6, 4), (4, 6)])
def test_components_share_their_scale(m: int, n: int) -> None:
    first, last = factorize(normal(3, 2, m, n).astype(np.float64), moment_of(4, 2, n), 3)
    np.testing.assert_allclose(np.linalg.norm(first, axis=2), np.linalg.norm(last, axis=1), rtol=1e-9)


@BOTH
@pytest.mark.parametrize("ranks", [(1,), (3,), (6,)])
@pytest.mark.parametrize("opset", [7, 18])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("trans_a", "trans_b"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_gemm(decomposition: LowRank, index: int, trans_a: int, trans_b: int, opset: int, ranks: tuple[int]) -> None:
    outputs_first = bool(trans_b) if index else not trans_a
    text = f"[n] y = Gemm <transA = {trans_a}, transB = {trans_b}, alpha = 0.5, beta = 2.0> ({'x, w' if index else 'w, x'}, c)"
    use = use_of(text, (8, 6) if outputs_first else (6, 8), index)
    turned = trans_a if index else not trans_b
    feed = {"x": normal(5, 6, 4) if turned else normal(5, 4, 6)}
    check_emitted(decomposition, use, moment_of(6, 1, 6), ranks, feed, {"c": normal(7, 1)}, opset=opset)


@BOTH
@settings(max_examples=40)
@given(st.sampled_from([0, 1]), st.booleans(), st.booleans(), st.booleans(), st.integers(1, 6), st.integers(0, 2))
def test_matmul(decomposition: LowRank, index: int, fused: bool, trans_a: bool, trans_b: bool, rank: int, extra_axes: int) -> None:
    trans_a, trans_b = trans_a and fused, trans_b and fused
    attributes = f"<transA = {int(trans_a)}, transB = {int(trans_b)}, alpha = 0.5>" if fused else ""
    op_type = "com.microsoft.FusedMatMul" if fused else "MatMul"
    outputs_first = (trans_b if index else trans_a) == bool(index)
    use = use_of(f"[n] y = {op_type} {attributes} ({'x, w' if index else 'w, x'})", (8, 6) if outputs_first else (6, 8), index)
    last = bool(index) != (trans_a if index else trans_b)
    shape = (2, 3)[:extra_axes] + ((4, 6) if last else (6, 4))
    check_emitted(decomposition, use, moment_of(8, 1, 6), (rank,), {"x": normal(9, *shape)})


@BOTH
@pytest.mark.parametrize("ranks", [(2,), (6,)])
def test_fused_gemm(decomposition: LowRank, ranks: tuple[int]) -> None:
    use = use_of('[n] y = com.microsoft.FusedGemm <activation = "Relu", transA = 1, alpha = 2.0> (x, w, c)', (6, 8))
    check_emitted(decomposition, use, moment_of(10, 1, 6), ranks, {"x": normal(11, 6, 4)}, {"c": normal(12, 8)})


@BOTH
@pytest.mark.parametrize("ranks", [(1,), (4,)])
@pytest.mark.parametrize("attributes", ["", "strides = [2, 1]", "pads = [1, 0, 0, 2]", "kernel_shape = [1, 1], strides = [2, 2]"])
@pytest.mark.parametrize("groups", [1, 2])
def test_pointwise_conv(decomposition: LowRank, groups: int, attributes: str, ranks: tuple[int]) -> None:
    use = use_of(f"[n] y = Conv <group = {groups}, {attributes}> (x, w, b)".replace(", >", ">"), (6 * groups, 4, 1, 1))
    feed, bias = {"x": normal(13, 2, 4 * groups, 5, 4)}, {"b": normal(14, 6 * groups)}
    check_emitted(decomposition, use, moment_of(15, groups, 4), ranks, feed, bias)


@BOTH_CHANNEL
@settings(max_examples=30)
@given(st.integers(1, 3), st.sampled_from([1, 2]), st.sampled_from(["pads", "SAME_UPPER", "SAME_LOWER", "VALID"]), st.data())
def test_kernels(decomposition: LowRank, axes: int, groups: int, mode: str, data: st.DataObject) -> None:
    small = st.integers(1, 2)
    kernel = data.draw(st.lists(small, min_size=axes, max_size=axes).filter(lambda k: max(k) > 1))
    strides = data.draw(st.lists(small, min_size=axes, max_size=axes))
    pads = data.draw(st.lists(st.integers(0, 2), min_size=2 * axes, max_size=2 * axes))
    padding = f"pads = {pads}" if mode == "pads" else f'auto_pad = "{mode}"'
    shape = f", kernel_shape = {kernel}" if data.draw(st.booleans()) else ""
    use = use_of(f"[n] y = Conv <group = {groups}, strides = {strides}, {padding}{shape}> (x, w, b)", (6 * groups, 2, *kernel))
    ranks = (data.draw(st.integers(1, decomposition.full(use)[0])),)
    feed = {"x": normal(16, 2, 2 * groups, *(5, 4, 3)[:axes])}
    check_emitted(decomposition, use, moment_of(17, groups, use.view.n), ranks, feed, {"b": normal(18, 6 * groups)})


@pytest.mark.parametrize("ranks", [(2,), (8,)])
def test_fused_conv_keeps_its_activation_and_its_sum(ranks: tuple[int]) -> None:
    use = use_of('[n] y = com.microsoft.FusedConv <activation = "Relu", pads = [1, 1, 1, 1]> (x, w, b, z)', (8, 4, 3, 3))
    feed = {"x": normal(19, 2, 4, 5, 4), "z": normal(20, 2, 8, 5, 4)}
    check_emitted(CHANNEL_SVD, use, moment_of(21, 1, 36), ranks, feed, {"b": normal(22, 8)})


@BOTH
@pytest.mark.parametrize("ranks", [(2,), (5,)])
def test_transposed_conv(decomposition: LowRank, ranks: tuple[int]) -> None:
    text = "[n] y = ConvTranspose <strides = [2, 1], pads = [1, 0, 0, 1], output_padding = [1, 0]> (x, w, b)"
    feed = {"x": normal(23, 2, 5, 4, 3)}
    check_emitted(decomposition, use_of(text, (5, 3, 3, 2)), moment_of(24, 1, 5), ranks, feed, {"b": normal(25, 3)})


@BOTH
@pytest.mark.parametrize("ranks", [(2,), (4,)])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_gather(decomposition: LowRank, shape: tuple[int, ...], ranks: tuple[int]) -> None:
    counts = Moment(np.arange(9, dtype=np.float64)[None], 36)
    feed = {"x": np.random.default_rng(26).integers(-9, 9, shape)}
    check_emitted(decomposition, use_of("[n] y = Gather (w, x)", (9, 4), 0), counts, ranks, feed)


@BOTH
@pytest.mark.parametrize("ranks", [(2,), (5,)])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize(("op_type", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_input_weights_of_recurrent_layers(decomposition: LowRank, op_type: str, gates: int, direction: str, ranks: tuple[int]) -> None:
    directions = 2 if direction == "bidirectional" else 1
    text = f'[n] y, h = {op_type} <hidden_size = 6, direction = "{direction}"> (x, w, r, b)'
    use = use_of(text, (directions, gates * 6, 5))
    others = {"r": normal(27, directions, gates * 6, 6) / 3, "b": normal(28, directions, gates * 12)}
    check_emitted(decomposition, use, moment_of(29, 1, 5), ranks, {"x": normal(30, 4, 2, 5)}, others)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("ranks", [(2,), (6,)])
def test_recurrent_weights_are_multiplied_out(directions: int, ranks: tuple[int]) -> None:
    use = use_of("[n] y = LSTM <hidden_size = 6> (x, w, r)", (directions, 24, 6), 2)
    assert LOW_RANK.declines(use) == "the recurrent weight is applied inside the operator"
    check_emitted(LOW_RANK_DENSE, use, moment_of(31, directions, 6), ranks, {})


USES = {
    "tall": linear(9, 5),
    "wide": linear(5, 9),
    "groups": grouped(2, 4, 3),
    "table": use_of("y = Gather (w, x)", (9, 4), 0),
}


@BOTH
@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("ranks", [(1,), (3,)])
def test_degenerate_weights_and_metrics(decomposition: LowRank, use: Use, ranks: tuple[int]) -> None:
    check_degenerate(decomposition, use, ranks)


@BOTH
@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("rows", [3, 40])
def test_refitting_never_raises_the_error(decomposition: LowRank, use: Use, rows: int) -> None:
    moment = moment_of(32, use.view.groups, use.view.n, rows)
    check_refit(decomposition, use, normal(33, *use.view.shape), moment, (2,))


@given(st.integers(2, 600), st.integers(2, 600), st.sampled_from([1, 4]))
def test_grid(m: int, n: int, groups: int) -> None:
    for decomposition in (LOW_RANK, LOW_RANK_DENSE):
        check_grid(decomposition, grouped(groups, m, n))


def test_grid_of_a_square_layer() -> None:
    assert LOW_RANK.grid(linear(384, 384))[-1] == (176,)
    assert LOW_RANK.full(linear(384, 96)) == (96,)
    assert LOW_RANK.grid(linear(2, 2)) == []


@pytest.mark.parametrize(
    ("decomposition", "use", "reason"),
    [
        (LOW_RANK, use_of("y = Conv (x, w)", (8, 4, 3, 3)), "see channel_svd"),
        (CHANNEL_SVD, use_of("y = Conv (x, w)", (8, 4, 1, 1)), "not a convolution kernel"),
        (CHANNEL_SVD, linear(8, 4), "not a convolution kernel"),
        (LOW_RANK, linear(8, 1), "its rank is at most 1"),
        (CHANNEL_SVD, use_of("y = Conv <group = 4> (x, w)", (8, 1, 3, 3)), "depthwise: one input channel per group"),
        (CHANNEL_SVD_DENSE, use_of("y = Conv <group = 4> (x, w)", (8, 1, 3, 3)), None),
    ],
)
def test_weights_that_are_declined(decomposition: LowRank, use: Use, reason: str | None) -> None:
    assert decomposition.declines(use) == reason


def test_the_registry_lists_each_under_its_name_and_execution() -> None:
    assert all(key == (d.name, d.execution) for key, d in DECOMPOSITIONS.items())
    assert len(DECOMPOSITIONS) == 8


def test_factors_of_a_wide_metric_are_finite_in_float32() -> None:
    use = linear(12, 8)
    moment = Moment(np.diag(10.0 ** -np.arange(0, 24, 3))[None], 5)
    factors = fitted(LOW_RANK, use, normal(34, 12, 8), moment, (8,))
    rebuilt = rebuild(LOW_RANK, use, (8,), factors)
    np.testing.assert_allclose(rebuilt[0], normal(34, 12, 8), atol=1e-5)
