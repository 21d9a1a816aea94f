"""A base in few bits with a correction of low rank, fitted in turns."""

from __future__ import annotations

import numpy as np
import pytest

from intaglio.ops.decompositions.base import RIDGE
from intaglio.ops.decompositions.lowrank import spectrum
from intaglio.ops.emit import Spec
from intaglio.ops.moment import Float64, Moment
from intaglio.ops.rounding import Problem, Rounding, encode, fit_corrected
from intaglio.ops.rounding.corrected import Write
from intaglio.ops.rounding.encoding import Packed
from intaglio.ops.storage import STORAGES
from intaglio.ops.view import MatrixView
from tests.ops.running import Array, moment_of, normal


def writer(name: str, rounding: Rounding = Rounding()) -> Write:  # noqa: B008
    """Stores (1, m, n) with a scale per output."""

    def write(matrix: Float64, metric: Moment) -> tuple[Packed, Float64]:
        view = MatrixView(matrix.shape[1:], 1, *matrix.shape[1:], True)
        array = view.stored(matrix).astype(np.float32)
        packed = encode(STORAGES[name], Problem(array, 0, view, metric, metric.diag + 1e-9), rounding)
        return packed, view.matrix(STORAGES[name].decode(packed, Spec(array.shape, array.dtype)))

    return write


def value(name: str, packed: Packed, *shape: int) -> Array:
    return np.asarray(STORAGES[name].decode(packed, Spec(shape, np.dtype(np.float32))), np.float64)[None]


def spiked(m: int, n: int, spikes: int, size: float) -> Array:
    """Noise, and a few directions that are much larger."""
    left, right = normal(1, m, spikes).astype(np.float64), normal(2, spikes, n).astype(np.float64)
    return (normal(3, m, n) + size * left @ right / spikes**0.5)[None]


def nbytes(*packs: Packed) -> int:
    return sum(array.nbytes for packed in packs for array in packed)


def test_it_beats_plain_rounding_at_equal_bytes_where_a_few_directions_are_large() -> None:
    """Three bits and a correction in int8 take no more bytes than four bits, and lose less than half."""
    weight, moment = spiked(64, 96, 3, 12.0), moment_of(4, 1, 96)
    packed = fit_corrected(weight, moment, 3, (writer("int3"), writer("int8"), writer("int8")))
    plain, other = writer("int4")(weight, moment)
    assert nbytes(*packed) <= nbytes(plain)
    base, first, last = value("int3", packed[0], 64, 96), value("int8", packed[1], 3, 96), value("int8", packed[2], 64, 3)
    assert moment.energy(weight, base + last @ first) < 0.5 * moment.energy(weight, other)


@pytest.mark.parametrize("compensate", [True, False])
def test_it_is_no_worse_than_the_base_alone(compensate: bool) -> None:
    """On noise, which has no large directions, the correction takes up a part of what the base loses."""
    weight, moment, rounding = normal(5, 1, 32, 48).astype(np.float64), moment_of(6, 1, 48), Rounding(compensate)
    packed = fit_corrected(weight, moment, 4, (writer("int2", rounding), writer("int8"), writer("int8")))
    base, first, last = value("int2", packed[0], 32, 48), value("int8", packed[1], 4, 48), value("int8", packed[2], 32, 4)
    alone = moment.energy(weight, writer("int2", rounding)(weight, moment)[1])
    assert moment.energy(weight, base + last @ first) < alone


def test_the_correction_is_the_best_of_its_rank_for_its_base() -> None:
    """Within what int8 factors and the ridge cost: a twentieth of the optimum."""
    weight, moment = normal(7, 1, 24, 32).astype(np.float64), moment_of(8, 1, 32)
    packed = fit_corrected(weight, moment, 3, (writer("int2"), writer("int8"), writer("int8")))
    base, first, last = value("int2", packed[0], 24, 32), value("int8", packed[1], 3, 32), value("int8", packed[2], 24, 3)
    metric = moment.regularized(RIDGE)
    optimum = spectrum(weight - base, metric)[0, 3:].sum()
    assert optimum <= metric.energy(weight, base + last @ first) <= 1.05 * optimum


@pytest.mark.parametrize("moment", [Moment.isotropic(1, 12), Moment(np.zeros((1, 12, 12)), 3), Moment(np.ones((1, 12, 12)), 3)])
def test_zeros_and_metrics_without_full_rank(moment: Moment) -> None:
    for weight in (np.zeros((1, 6, 12)), normal(1, 1, 6, 12).astype(np.float64)):
        packed = fit_corrected(weight, moment, 2, (writer("int4"), writer("int8"), writer("int8")))
        product = value("int8", packed[2], 6, 2) @ value("int8", packed[1], 2, 12)
        error = moment.energy(weight, value("int4", packed[0], 6, 12) + product)
        assert error <= 0.02 * moment.energy(weight)  # int4 alone loses less than that of normal values
