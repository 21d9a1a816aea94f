"""Four-bit matrices whose channels can be unpacked one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.emit import Spec, spec_of
from intaglio.ops.storage import STORAGES
from intaglio.ops.storage.rows import ROW_NIBBLES
from tests.ops.running import normal
from tests.ops.storage.round_trip import DTYPES, check_folds, check_layout, check_round_trip

FLOAT32 = np.dtype(np.float32)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 1), st.sampled_from(DTYPES), st.integers(0, 2**16))
def test_onnx_runtime_yields_what_the_reference_says(rows: int, columns: int, axis: int, dtype: np.dtype, seed: int) -> None:
    array = normal(seed, rows, columns).astype(dtype)
    check_layout(ROW_NIBBLES, array, axis)
    check_round_trip(ROW_NIBBLES, array, axis)


@pytest.mark.parametrize("shape", [(8, 6), (8, 7)])
def test_it_is_folded_when_the_model_is_loaded(shape: tuple[int, ...], tmp_path: Path) -> None:
    check_folds(ROW_NIBBLES, normal(3, *shape), 0, tmp_path)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1), st.integers(0, 2**16))
def test_a_grid_holds_what_is_packed(rows: int, columns: int, axis: int, seed: int) -> None:
    array = normal(seed, rows, columns)
    grid = ROW_NIBBLES.grid(array, axis)
    codes = np.random.default_rng(seed).integers(grid.lowest, grid.highest + 1, array.shape).astype(np.int16)
    packed = ROW_NIBBLES.pack(codes, grid)
    assert packed is not None
    np.testing.assert_array_equal(ROW_NIBBLES.decode(packed, spec_of(array)), grid.values(codes))


def test_a_row_is_unpacked_without_its_neighbours() -> None:
    array = normal(1, 6, 9)
    codes, scale = (np.asarray(part) for part in ROW_NIBBLES.encode(array, 0))
    whole = np.asarray(ROW_NIBBLES.decode((codes, scale), spec_of(array)))
    for row in range(6):
        alone = ROW_NIBBLES.decode((codes[row : row + 1], scale[row : row + 1]), Spec((1, 9), FLOAT32))
        np.testing.assert_array_equal(alone, whole[row : row + 1])


def test_it_loses_what_int4_loses_and_takes_as_much() -> None:
    array = normal(2, 32, 64)
    other = STORAGES["int4"]
    np.testing.assert_array_equal(
        ROW_NIBBLES.decode(ROW_NIBBLES.encode(array, 0), spec_of(array)), other.decode(other.encode(array, 0), spec_of(array))
    )
    sizes = [sum(spec.nbytes for spec in each.layout(spec_of(array), 0)) for each in (ROW_NIBBLES, other)]
    assert sizes[0] == sizes[1]


def test_what_it_cannot_hold() -> None:
    assert ROW_NIBBLES.accepts(Spec((4, 8, 1), FLOAT32)) == "an array of shape [4, 8, 1]: only matrices"
    assert ROW_NIBBLES.accepts(Spec((4, 0), FLOAT32)) == "an empty array"
    assert ROW_NIBBLES.accepts(Spec((4, 7), np.dtype(np.float16))) is None
