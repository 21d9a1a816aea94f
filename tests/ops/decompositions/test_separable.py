"""The separable form of a two-dimensional kernel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.decompositions import SEPARABLE, rebuild
from intaglio.ops.decompositions.base import RIDGE
from intaglio.ops.families import Use
from intaglio.ops.moment import Moment, relative_error
from tests.ops.decompositions.rewriting import TINY, check_degenerate, check_emitted, check_grid, check_refit, matrix_of
from tests.ops.running import moment_of, normal, use_of


def conv(m: int, c: int, rows: int, columns: int, attributes: str = "pads = [0, 0, 0, 0]", op: str = "Conv") -> Use:
    return use_of(f"[n] y = {op} <{attributes}> (x, w, b)", (m, c, rows, columns))


@settings(max_examples=40)
@given(
    st.integers(1, 4),
    st.integers(2, 3),
    st.integers(2, 3),
    st.sampled_from(["pads", "pads", "SAME_UPPER", "SAME_LOWER", "VALID"]),
    st.booleans(),
    st.data(),
)
def test_the_emitted_layers_apply_the_rebuilt_weight(
    m: int, rows: int, columns: int, mode: str, has_kernel_shape: bool, data: st.DataObject
) -> None:
    pair = st.lists(st.integers(1, 2), min_size=2, max_size=2)
    pads = data.draw(st.lists(st.integers(0, 2), min_size=4, max_size=4))
    attributes = f"strides = {data.draw(pair)}, " + (f"pads = {pads}" if mode == "pads" else f'auto_pad = "{mode}"')
    if not mode.startswith("SAME"):  # ONNX Runtime has no dilated SAME
        attributes += f", dilations = {data.draw(pair)}"
    if has_kernel_shape:
        attributes += f", kernel_shape = [{rows}, {columns}]"
    use = conv(m, 3, rows, columns, attributes)
    ranks = (data.draw(st.integers(1, SEPARABLE.full(use)[0])),)
    feed = {"x": normal(1, 2, 3, 7, 6)}
    for rank in (ranks, SEPARABLE.full(use)):
        check_emitted(SEPARABLE, use, moment_of(2, 1, use.view.n), rank, feed, {"b": normal(3, m)})


def test_fused_conv_keeps_its_activation() -> None:
    use = conv(6, 4, 3, 3, 'activation = "Relu", pads = [1, 1, 1, 1]', "com.microsoft.FusedConv")
    check_emitted(SEPARABLE, use, moment_of(4, 1, 36), SEPARABLE.full(use), {"x": normal(5, 2, 4, 5, 4)}, {"b": normal(6, 6)})


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(0, 1000), st.sampled_from([1, 12, 80]), st.booleans())
def test_the_fit_is_no_worse_than_predicted(rank: int, seed: int, rows: int, diagonal: bool) -> None:
    use, moment = conv(6, 4, 3, 2), moment_of(seed, 1, 24, rows)
    moment = Moment(moment.diag.copy(), rows) if diagonal else moment
    weight, metric = matrix_of(use, normal(seed, 6, 4, 3, 2)), moment.regularized(RIDGE)
    (predicted,) = SEPARABLE.errors(weight, metric, use, [(rank,)])
    measured = relative_error(weight, rebuild(SEPARABLE, use, (rank,), SEPARABLE.fit(weight, moment, use, (rank,))), metric)
    assert measured <= predicted + TINY
    assert measured >= 0.2 * predicted - TINY  # the bound means something


def test_without_a_metric_it_is_the_truncated_unfolding() -> None:
    use, weight = conv(5, 3, 3, 2), normal(7, 5, 3, 3, 2).astype(np.float64)
    squares = np.square(np.linalg.svd(weight.transpose(1, 2, 0, 3).reshape(9, 10), compute_uv=False))
    ranks = [(r,) for r in range(1, 10)]
    predicted = SEPARABLE.errors(weight.reshape(1, 5, 18), Moment.isotropic(1, 18), use, ranks)
    np.testing.assert_allclose(predicted, [squares[r:].sum() / squares.sum() for (r,) in ranks], atol=TINY)


def test_many_ranks_cost_what_each_costs_alone() -> None:
    use, moment = conv(6, 4, 3, 3), moment_of(8, 1, 36)
    weight = matrix_of(use, normal(9, 6, 4, 3, 3))
    together = SEPARABLE.errors(weight, moment, use, [(7,), (2,), (4,)])
    alone = [SEPARABLE.errors(weight, moment, use, [(r,)])[0] for r in (7, 2, 4)]
    np.testing.assert_allclose(together, alone, atol=TINY)
    assert SEPARABLE.errors(weight, moment, use, []) == []


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (2, 5, 3, 2), (5, 1, 2, 3)])
def test_degenerate_weights_and_metrics(shape: tuple[int, int, int, int]) -> None:
    for rank in (1, SEPARABLE.full(conv(*shape))[0]):
        check_degenerate(SEPARABLE, conv(*shape), (rank,))


@pytest.mark.parametrize("rows", [3, 80])
def test_refitting_never_raises_the_error(rows: int) -> None:
    check_refit(SEPARABLE, conv(6, 4, 3, 3), normal(10, 6, 4, 3, 3), moment_of(11, 1, 36, rows), (3,))


@given(st.integers(1, 600), st.integers(1, 600), st.integers(2, 7), st.integers(2, 7))
def test_grid(m: int, c: int, rows: int, columns: int) -> None:
    check_grid(SEPARABLE, conv(m, c, rows, columns))


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (use_of("y = Gemm (x, w)", (8, 4)), "not a convolution kernel"),
        (use_of("y = Conv (x, w)", (8, 4, 1, 1)), "a kernel of shape [1, 1] does not separate"),
        (use_of("y = Conv (x, w)", (8, 4, 1, 7)), "a kernel of shape [1, 7] does not separate"),
        (use_of("y = Conv (x, w)", (8, 4, 3)), "a kernel of shape [3] does not separate"),
        (use_of("y = Conv <group = 2> (x, w)", (8, 4, 3, 3)), "a grouped kernel"),
        (use_of("y = Conv (x, w)", (8, 4, 3, 3)), None),
    ],
)
def test_weights_that_are_declined(use: Use, reason: str | None) -> None:
    assert SEPARABLE.declines(use) == reason
