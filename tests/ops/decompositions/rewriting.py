"""What every decomposition must hold to, on any use of a weight."""

from __future__ import annotations

import numpy as np
import pytest

from intaglio.ops.decompositions import Decomposition, rebuild, refit_last
from intaglio.ops.decompositions.base import RIDGE, Ranks
from intaglio.ops.families import Use
from intaglio.ops.moment import Moment, relative_error
from tests.ops.running import Array, Feed, assert_close, emitter_for, normal, run, run_node

EXACT = 2e-5
"""Float32 factors and sums instead of a float32 weight: some tens of units in the last place."""

SAME = 5e-6
"""The same factors, multiplied out before or while the layer runs: float32 sums in another order."""

TINY = 1e-7
"""What the relative ridge of a least-squares problem (1e-9), times the condition of a regularized metric, may cost."""


def matrix_of(use: Use, weight: Array) -> Array:
    """(groups, m, n) float64."""
    return use.view.matrix(weight)


def fitted(decomposition: Decomposition, use: Use, weight: Array, moment: Moment, ranks: Ranks) -> tuple[Array, ...]:
    """Factors in float32, of the shapes that were announced."""
    factors = decomposition.fit(matrix_of(use, weight), moment, use, ranks)
    assert tuple(factor.shape for factor in factors) == decomposition.shapes(use, ranks)
    assert len(decomposition.axes(use)) == len(factors)
    assert all(0 <= axis < factor.ndim for axis, factor in zip(decomposition.axes(use), factors, strict=True))
    return tuple(factor.astype(np.float32) for factor in factors)


def check_emitted(
    decomposition: Decomposition,
    use: Use,
    moment: Moment,
    ranks: Ranks,
    feed: Feed,
    constants: Feed | None = None,
    *,
    opset: int = 18,
) -> None:
    """The emitted graph applies `rebuild`, exactly W at full rank; `constants` are the node's other initializers."""
    constants = constants or {}
    assert decomposition.declines(use) is None
    weight = normal(11, *use.view.shape) / np.float32(use.view.n**0.5)
    factors = fitted(decomposition, use, weight, moment, ranks)
    rebuilt = use.view.stored(rebuild(decomposition, use, ranks, factors)).astype(np.float32)
    full = ranks == decomposition.full(use)
    if full:
        assert_close(rebuilt, weight, EXACT)
    emitter = emitter_for(opset)
    names = [emitter.constant(str(number), factor) for number, factor in enumerate(factors)]
    if decomposition.execution == "dense":
        decomposition.emit(emitter, use, names, "product")
        (product,) = run(emitter, {}, ["product"])
        assert product.shape == weight.shape
        assert_close(product, rebuilt, SAME)
        return
    decomposition.emit(emitter, use, names, "")
    emitter.initializers.update(constants)
    last = emitter.nodes[-1]
    assert (last.name, list(last.output)) == (use.node.name, list(use.node.output))
    outputs = [name for name in use.node.output if name]
    actual = run(emitter, feed, outputs)
    name = use.node.input[use.index]
    expected = run_node(use.node, feed, {**constants, name: rebuilt}, opset)
    original = run_node(use.node, feed, {**constants, name: weight}, opset)
    for a, b, c in zip(actual, expected, original, strict=True):
        assert_close(a, b, SAME)
        if full:
            assert_close(a, c, EXACT)


def check_refit(decomposition: Decomposition, use: Use, weight: Array, moment: Moment, ranks: Ranks) -> None:
    """Refitting the last factor never raises the error, whatever happened to the others, and undoes a wrong last factor."""
    matrix, metric = matrix_of(use, weight), moment.regularized(RIDGE)
    factors = list(decomposition.fit(matrix, moment, use, ranks))
    rough = [factor.astype(np.float16).astype(np.float64) for factor in factors[:-1]]
    for leading in (factors[:-1], rough):
        before = relative_error(matrix, rebuild(decomposition, use, ranks, [*leading, factors[-1]]), metric)
        last = refit_last(decomposition, matrix, moment, use, ranks, leading)
        assert last.shape == factors[-1].shape
        after = relative_error(matrix, rebuild(decomposition, use, ranks, [*leading, last]), metric)
        assert after <= before + TINY


def check_degenerate(decomposition: Decomposition, use: Use, ranks: Ranks) -> None:
    """Weights of zeros and of rank one, metrics of zeros and without full rank: finite factors that yield the weight."""
    groups, m, n = use.view.groups, use.view.m, use.view.n
    zero = np.zeros((groups, m, n))
    thin = matrix_of(use, one_component(use))
    metrics = [
        Moment.isotropic(groups, n),
        Moment(np.zeros((groups, n, n)), 5),
        Moment(np.ones((groups, n, n)), 5),
        Moment(np.eye(1, n)[None].repeat(groups, 0)[:, 0], 5),
    ]
    for moment in metrics:
        for weight in (zero, thin):
            factors = decomposition.fit(weight, moment, use, ranks)
            assert all(np.isfinite(factor).all() for factor in factors)
            error = np.abs(rebuild(decomposition, use, ranks, factors) - weight).max()
            assert error <= 1e-6 * np.abs(weight).max()
            (predicted,) = decomposition.errors(weight, moment, use, [ranks])
            assert predicted == pytest.approx(0, abs=1e-6)


def one_component(use: Use) -> Array:
    """A weight that every decomposition holds exactly at any rank: a product of vectors, one per axis (and of groups)."""
    weight = np.ones(use.view.shape)
    for axis, size in enumerate(use.view.shape):
        vector = 1 + np.arange(size) / size
        weight = weight * vector.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    return weight


def check_grid(decomposition: Decomposition, use: Use) -> None:
    """Every rank of the grid saves entries and suits hardware; the error falls along it."""
    grid = decomposition.grid(use)
    full = decomposition.full(use)
    assert len(grid) == len(set(grid))
    for ranks in grid:
        entries = sum(int(np.prod(shape)) for shape in decomposition.shapes(use, ranks))
        assert entries < int(np.prod(use.view.shape))
        for rank, limit in zip(ranks, full, strict=True):
            assert 0 < rank < limit
            assert rank % 8 == 0 or (limit <= 64 and rank in (1, 2, 4))
