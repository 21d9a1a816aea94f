"""Tucker-2 of a convolution kernel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.decompositions import TUCKER2, rebuild
from intaglio.ops.decompositions.base import RIDGE
from intaglio.ops.families import Use
from intaglio.ops.moment import Moment, relative_error
from tests.ops.decompositions.rewriting import TINY, check_degenerate, check_emitted, check_grid, check_refit, matrix_of
from tests.ops.running import moment_of, normal, use_of


def conv(shape: tuple[int, ...], attributes: str = 'auto_pad = "VALID"', op: str = "Conv") -> Use:
    return use_of(f"[n] y = {op} <{attributes}> (x, w, b)", shape)


@settings(max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(2, 6),
    st.integers(2, 4),
    st.sampled_from(["pads", "pads", "SAME_UPPER", "SAME_LOWER", "VALID"]),
    st.booleans(),
    st.data(),
)
def test_the_emitted_layers_apply_the_rebuilt_weight(
    axes: int, m: int, c: int, mode: str, has_kernel_shape: bool, data: st.DataObject
) -> None:
    def small(top: int, count: int = axes, bottom: int = 1) -> list[int]:
        return data.draw(st.lists(st.integers(bottom, top), min_size=count, max_size=count))

    kernel = small(2)
    kernel[0] = 2
    attributes = f"strides = {small(2)}, " + (f"pads = {small(2, 2 * axes, 0)}" if mode == "pads" else f'auto_pad = "{mode}"')
    if not mode.startswith("SAME"):  # ONNX Runtime has no dilated SAME
        attributes += f", dilations = {small(2)}"
    if has_kernel_shape:
        attributes += f", kernel_shape = {kernel}"
    use = conv((m, c, *kernel), attributes)
    full = TUCKER2.full(use)
    ranks = data.draw(st.tuples(st.integers(1, full[0]), st.integers(1, full[1])))
    feed = {"x": normal(1, 2, c, *(5, 4, 3)[:axes])}
    for pair in (ranks, full):
        check_emitted(TUCKER2, use, moment_of(2, 1, use.view.n), pair, feed, {"b": normal(3, m)})


def test_fused_conv_keeps_its_activation() -> None:
    use = conv((6, 4, 3, 3), 'activation = "Relu", pads = [1, 1, 1, 1]', "com.microsoft.FusedConv")
    check_emitted(TUCKER2, use, moment_of(4, 1, 36), (4, 6), {"x": normal(5, 2, 4, 5, 4)}, {"b": normal(6, 6)})


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 1000), st.sampled_from([1, 12, 80]), st.booleans())
def test_the_fit_is_no_worse_than_predicted(r1: int, r2: int, seed: int, rows: int, diagonal: bool) -> None:
    use, moment = conv((6, 4, 3, 2)), moment_of(seed, 1, 24, rows)
    moment = Moment(moment.diag.copy(), rows) if diagonal else moment
    weight, metric = matrix_of(use, normal(seed, 6, 4, 3, 2)), moment.regularized(RIDGE)
    (predicted,) = TUCKER2.errors(weight, metric, use, [(r1, r2)])
    measured = relative_error(weight, rebuild(TUCKER2, use, (r1, r2), TUCKER2.fit(weight, moment, use, (r1, r2))), metric)
    assert measured <= predicted + TINY
    assert measured >= 0.2 * predicted - TINY  # the bound means something


def test_at_full_input_rank_it_is_the_optimal_low_rank_form() -> None:
    use, moment, weight = conv((6, 4, 3, 2)), moment_of(7, 1, 24), normal(8, 6, 4, 3, 2)
    root = np.linalg.cholesky(moment.matrix[0])
    squares = np.square(np.linalg.svd(matrix_of(use, weight)[0] @ root, compute_uv=False))
    predicted = TUCKER2.errors(matrix_of(use, weight), moment, use, [(4, r) for r in range(1, 7)])
    np.testing.assert_allclose(predicted, [squares[r:].sum() / squares.sum() for r in range(1, 7)], atol=TINY)


def test_many_ranks_cost_what_each_costs_alone() -> None:
    use, moment = conv((6, 4, 3, 3)), moment_of(9, 1, 36)
    weight, ranks = matrix_of(use, normal(10, 6, 4, 3, 3)), [(3, 4), (1, 2), (3, 1)]
    together = TUCKER2.errors(weight, moment, use, ranks)
    np.testing.assert_allclose(together, [TUCKER2.errors(weight, moment, use, [pair])[0] for pair in ranks], atol=TINY)
    assert TUCKER2.errors(weight, moment, use, []) == []


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (2, 9, 2), (9, 2, 1, 2, 2)])
def test_degenerate_weights_and_metrics(shape: tuple[int, ...]) -> None:
    for ranks in ((1, 1), TUCKER2.full(conv(shape))):
        check_degenerate(TUCKER2, conv(shape), ranks)


def test_full_ranks_stop_at_what_the_other_axes_allow() -> None:
    assert TUCKER2.full(conv((2, 9, 2))) == (4, 2)
    assert TUCKER2.full(conv((9, 2, 2))) == (2, 4)


@pytest.mark.parametrize("rows", [3, 80])
def test_refitting_never_raises_the_error(rows: int) -> None:
    check_refit(TUCKER2, conv((6, 4, 3, 3)), normal(11, 6, 4, 3, 3), moment_of(12, 1, 36, rows), (2, 3))


@given(st.integers(2, 600), st.integers(2, 600), st.sampled_from([(3,), (3, 3), (1, 7), (2, 2, 2)]))
def test_grid(m: int, c: int, kernel: tuple[int, ...]) -> None:
    check_grid(TUCKER2, conv((m, c, *kernel)))


def test_grid_of_a_usual_kernel() -> None:
    grid = TUCKER2.grid(conv((64, 64, 3, 3)))
    assert (8, 8) in grid
    assert 5 <= len(grid) <= 20


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (use_of("y = Gemm (x, w)", (8, 4)), "not a convolution kernel"),
        (use_of("y = Conv (x, w)", (8, 4, 1, 1)), "a 1×1 kernel: see lowrank"),
        (use_of("y = Conv <group = 2> (x, w)", (8, 4, 3, 3)), "a grouped kernel"),
        (use_of("y = Conv (x, w)", (8, 1, 3, 3)), "fewer than two channels"),
        (use_of("y = Conv (x, w)", (8, 4, 3)), None),
    ],
)
def test_weights_that_are_declined(use: Use, reason: str | None) -> None:
    assert TUCKER2.declines(use) == reason
