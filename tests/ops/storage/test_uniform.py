"""Uniform grids: rounding, searched scales and zero points."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intaglio.ops.emit import Spec, spec_of
from intaglio.ops.storage.grid import Grid
from intaglio.ops.storage.scaling import LARGEST
from intaglio.ops.storage.uniform import INT2, INT3, INT4, INT8, UNIFORM, Uniform
from tests.ops.running import Array, normal

BY_NAME = {storage.name: storage for storage in UNIFORM}
SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)

FLOAT32 = 1e-4
"""Scales are searched in float32: a value is off by up to 127·2⁻²⁴ steps, its error squared by a few times that."""


def error(storage: Uniform, array: Array, axis: int = 0) -> float:
    return float(np.square(storage.decode(storage.encode(array, axis), spec_of(array)) - array).mean())


@given(st.sampled_from([INT8, INT4, INT3, INT2]), SHAPES, st.integers(0, 2**16), st.booleans(), st.data())
def test_searched_scales_are_never_worse_than_plain_ones(
    storage: Uniform, shape: tuple[int, ...], seed: int, weighted: bool, data: st.DataObject
) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    array = np.random.default_rng(seed).standard_t(2, shape)
    weights = np.random.default_rng(seed + 1).random(shape[-1:]) if weighted else None
    others = tuple(i for i in range(array.ndim) if i != axis)
    grid = storage.grid(array, axis, weights)
    ideal = (np.abs(array).max(axis=others, keepdims=True) / storage.packing.highest).astype(np.float32)
    plain = Grid(storage.scales.decode(storage.scales.encode(ideal, LARGEST)), grid.zero, grid.lowest, grid.highest)
    share = 1.0 if weights is None else weights
    searched, unsearched = ((share * np.square(g.values(g.nearest(array)) - array)).sum(axis=others) for g in (grid, plain))
    floor = (share * np.square(array)).sum(axis=others)
    assert (searched <= unsearched * (1 + FLOAT32) + 1e-10 * floor).all()


def test_the_search_clips_an_outlier_unless_it_is_important() -> None:
    array = np.concatenate([normal(1, 1, 4000), [[6.0]]], axis=1)
    importance = np.ones_like(array, np.float64)
    clipped = INT4.grid(array, 0, importance).scale
    importance[0, -1] = 1e6
    kept = INT4.grid(array, 0, importance).scale
    assert clipped[0, 0] < 0.9 * kept[0, 0]
    assert kept[0, 0] == pytest.approx(6 / 7, rel=0.05)  # the grid of ratios is 3 % wide, and bfloat16 adds 0.4 %


@pytest.mark.parametrize("storage", UNIFORM, ids=lambda s: s.name)
def test_every_entry_is_within_half_a_step_unless_clipped(storage: Uniform) -> None:
    array = normal(4, 6, 50)
    grid = storage.grid(array, 0)
    decoded = np.asarray(storage.decode(storage.encode(array, 0), spec_of(array)))
    low, high = (np.broadcast_to((end - grid.zero) * grid.scale, array.shape) for end in (grid.lowest, grid.highest))
    inside = np.clip(array, low, high)
    # codes and values are one float32 rounding each
    assert (np.abs(decoded - inside) <= np.broadcast_to(0.5 * grid.scale, array.shape) * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", ["int4", "int3", "int2", "int4-b32", "int3-b32", "int2-b32"])
def test_zero_points_pay_where_values_are_shifted(name: str) -> None:
    array = normal(5, 16, 128) + 2
    shifted = BY_NAME[f"{name}-asym"]
    assert error(shifted, array) < 0.5 * error(BY_NAME[name], array)


@pytest.mark.parametrize("storage", UNIFORM, ids=lambda s: s.name)
def test_channels_of_zeros_stay_zero(storage: Uniform) -> None:
    array = normal(5, 4, 40)
    array[1] = 0
    decoded = np.asarray(storage.decode(storage.encode(array, 0), spec_of(array)))
    assert (decoded[1] == 0).all()
    assert decoded[0].any()


@pytest.mark.parametrize(
    ("name", "size_bytes"),
    [
        ("int8", 256 * 96 + 2 * 256),
        ("int4", 256 * 48 + 2 * 256),
        ("int4-pow2", 256 * 48 + 256),
        ("int4-b32", 256 * 48 + 2 * 256 * 3),
        ("int4-b32-dq", 256 * 48 + 256 * 3 + 2 * 256),
        ("int4-asym", 256 * 48 + 2 * 256 + 128),
        ("int4-b32-asym", 256 * 48 + 2 * 256 * 3 + 128 * 3),
        ("int3", 256 * 36 + 2 * 256),
        ("ternary", -(-256 * 96 // 5) + 2 * 256),
    ],
)
def test_payload(name: str, size_bytes: int) -> None:
    for shape, axis in (((256, 96), 0), ((96, 256), 1)):
        assert sum(spec.nbytes for spec in BY_NAME[name].layout(Spec(shape, np.dtype(np.float32)), axis)) == size_bytes


def test_names_say_what_a_storage_is_made_of() -> None:
    assert len(BY_NAME) == len(UNIFORM)
    assert {"int8", "int6", "int5", "int4", "int3", "int2", "ternary", "int4-asym", "int2-b64-asym", "int4-b128", "int4-b32-dq"} <= set(
        BY_NAME
    )


def test_large_arrays_are_worked_on_in_parts() -> None:
    array = normal(7, 700, 400)
    for name in ("int8", "int4-b32", "int4-asym"):
        whole = BY_NAME[name].grid(array, 0)
        for rows in (slice(0, 5), slice(325, 335), slice(695, 700)):
            part = BY_NAME[name].grid(array[rows], 0)
            np.testing.assert_array_equal(part.scale, whole.scale[rows])
            np.testing.assert_array_equal(part.nearest(array[rows]), whole.nearest(array)[rows])


def test_a_fixed_width_has_no_coarser_grid() -> None:
    with pytest.raises(ValueError, match="always fit"):
        INT4.grid(normal(1, 2, 3), 0).coarser()
