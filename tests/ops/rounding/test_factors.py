"""The metric of a factor: what its stored array is multiplied with."""

from __future__ import annotations

import numpy as np
import pytest

from intaglio.ops.decompositions import DECOMPOSITIONS, Decomposition, rebuild
from intaglio.ops.families import Use
from intaglio.ops.moment import Moment
from intaglio.ops.rounding import factor_input
from intaglio.ops.rounding.factors import projected, summed
from tests.ops.running import Array, moment_of, normal, use_of

CLOSE = 1e-9
"""Double precision sums of a few hundred terms."""

USES = {
    "gemm": use_of("y = Gemm <transB = 1> (x, w)", (9, 12)),
    "matmul": use_of("y = MatMul (x, w)", (12, 9)),
    "pointwise": use_of("y = Conv <group = 2> (x, w)", (8, 6, 1, 1)),
    "kernel": use_of("y = Conv (x, w)", (6, 4, 3, 2)),
}
FORMS = [
    pytest.param(USES[use], DECOMPOSITIONS[key], ranks, id=f"{use}-{'-'.join(key)}")
    for use, key, ranks in (
        ("gemm", ("lowrank", "contract"), (4,)),
        ("gemm", ("lowrank", "dense"), (4,)),
        ("matmul", ("lowrank", "contract"), (4,)),
        ("pointwise", ("lowrank", "contract"), (3,)),
        ("kernel", ("channel_svd", "contract"), (3,)),
        ("kernel", ("separable", "contract"), (5,)),
        ("kernel", ("tucker2", "contract"), (3, 4)),
    )
]


@pytest.mark.parametrize(("use", "decomposition", "ranks"), FORMS)
def test_errors_of_the_last_factor_cost_what_its_metric_says(use: Use, decomposition: Decomposition, ranks: tuple[int, ...]) -> None:
    """‖(L − L̂)·P·A½‖² is the change of the output, exactly."""
    moment = moment_of(1, use.view.groups, use.view.n)
    factors = [normal(2 + i, *shape).astype(np.float64) for i, shape in enumerate(decomposition.shapes(use, ranks))]
    view, metric = factor_input(decomposition, use, ranks, factors[:-1], moment)
    other = factors[-1] + normal(9, *factors[-1].shape)
    expected = moment.energy(rebuild(decomposition, use, ranks, factors), rebuild(decomposition, use, ranks, [*factors[:-1], other]))
    assert metric.energy(view.matrix(factors[-1]), view.matrix(other)) == pytest.approx(expected, rel=CLOSE)


@pytest.mark.parametrize(("use", "decomposition", "ranks"), FORMS)
def test_errors_of_a_leading_factor_cost_what_its_metric_says(use: Use, decomposition: Decomposition, ranks: tuple[int, ...]) -> None:
    """‖(P − P̂)·A½‖² is the change of what the factor hands on, exactly, for every factor but the last."""
    moment = moment_of(1, use.view.groups, use.view.n)
    factors = [normal(2 + i, *shape).astype(np.float64) for i, shape in enumerate(decomposition.shapes(use, ranks))]
    for number in range(len(factors) - 1):
        view, metric = factor_input(decomposition, use, ranks, factors[:number], moment)
        other = factors[number] + normal(9, *factors[number].shape)
        handed = [_handed(decomposition, use, [*factors[:number], each], number, len(factors)) for each in (factors[number], other)]
        assert metric.energy(view.matrix(factors[number]), view.matrix(other)) == pytest.approx(moment.energy(*handed), rel=CLOSE)


def _handed(decomposition: Decomposition, use: Use, factors: list[Array], number: int, count: int) -> Array:
    """What the first factors yield, (groups, q, n): a core that lets everything through stands for those between them and the last."""
    if number < count - 2:
        rank, kernel = len(factors[-1]), use.view.shape[2:]
        size = int(np.prod(kernel))
        factors = [*factors, np.eye(rank * size).reshape(rank * size, rank, *kernel)]
    return decomposition.prefix(use, factors)


def test_embeddings_have_a_full_metric_behind_the_first_factor() -> None:
    use, decomposition = use_of("y = Gather (w, x)", (12, 9), 0), DECOMPOSITIONS["lowrank", "dense"]
    moment = Moment(np.arange(1.0, 13)[None], 5)
    shapes = decomposition.shapes(use, (4,))
    first = normal(1, *shapes[0]).astype(np.float64)
    view, metric = factor_input(decomposition, use, (4,), [], moment)
    assert (view.n, metric.diagonal) == (12, True)
    view, metric = factor_input(decomposition, use, (4,), [first], moment)
    np.testing.assert_allclose(metric.matrix[0], first.T @ (moment.matrix[0][:, None] * first), rtol=CLOSE)


def test_means_follow() -> None:
    prefix, mean = normal(1, 2, 3, 5).astype(np.float64), normal(2, 2, 5).astype(np.float64)
    moment = moment_of(3, 2, 5)
    assert projected(moment, prefix).mean is None
    found = projected(Moment(moment.matrix, moment.rows, mean), prefix).mean
    assert found is not None
    np.testing.assert_allclose(found, np.stack([p @ x for p, x in zip(prefix, mean, strict=True)]), rtol=CLOSE)


def test_positions_are_summed() -> None:
    moment = moment_of(1, 1, 6)
    blocks = moment.matrix[0].reshape(3, 2, 3, 2)
    np.testing.assert_allclose(summed(moment, 3).matrix[0], blocks[:, 0, :, 0] + blocks[:, 1, :, 1], rtol=CLOSE)
    diagonal = Moment(moment.diag.copy(), 5)
    np.testing.assert_allclose(summed(diagonal, 3).matrix[0], np.diagonal(summed(moment, 3).matrix[0]), rtol=CLOSE)
    assert summed(moment, 6) is moment
