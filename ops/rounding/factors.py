"""What each factor of a decomposition is multiplied with, once the factors before it are stored.

The second factor's input is the first factor's output, and the first factor is stored in integers by then, so the metric of the second
factor's errors is that of the stored first factor's outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..decompositions import Decomposition
from ..decompositions.base import Ranks
from ..decompositions.lowrank import LowRank
from ..families import Use
from ..moment import Float64, Moment
from ..view import MatrixView


def factor_input(
    decomposition: Decomposition, use: Use, ranks: Ranks, known: Sequence[Float64], moment: Moment
) -> tuple[MatrixView, Moment]:
    """How the next stored factor reads as matrices, and the second moment of what they are multiplied with.

    Args:
        decomposition: whose factors they are.
        use: the node that reads the weight.
        ranks: of the decomposition.
        known: the factors before it, as they are stored.
        moment: of the weight's input.
    """
    shapes = decomposition.shapes(use, ranks)
    number = len(known)
    if number == len(shapes) - 1:
        return decomposition.last_view(use, ranks), projected(moment, decomposition.prefix(use, known))
    if isinstance(decomposition, LowRank):
        return decomposition.views(use, ranks[0])[0], moment
    shape = shapes[number]
    view = MatrixView(shape, 1, shape[0], int(np.prod(shape[1:])), True)
    if number == 0:
        return view, summed(moment, view.n)
    whole = np.eye(view.n).reshape(view.n, *shape[1:])  # as this factor, it lets through what the factors before yield
    return view, projected(moment, decomposition.prefix(use, [*known, whole]))


def projected(moment: Moment, prefix: Float64) -> Moment:
    """P A Pᵀ, the moment of P·x, for a prefix (groups, q, n)."""
    mean = None if moment.mean is None else np.einsum("gqn,gn->gq", prefix, moment.mean)
    return Moment(moment.output_gram(prefix), moment.rows, mean)


def summed(moment: Moment, inner: int) -> Moment:
    """The moment of an input (inner, position) of one group, summed over positions: what a factor meets that leaves them alone."""
    if moment.diagonal:
        return Moment(moment.matrix.reshape(1, inner, -1).sum(2), moment.rows)
    positions = moment.matrix.shape[1] // inner
    if positions == 1:
        return moment
    matrix = np.einsum("ikjk->ij", moment.matrix.reshape(inner, positions, inner, positions))
    return Moment(np.ascontiguousarray(matrix)[None], moment.rows)
