"""Latents: at their start they are the stored array, and whatever they become can be written in as many bytes, exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.emit import Spec
from intaglio.ops.storage import STORAGES
from intaglio.ops.storage.planes import Planes
from intaglio.passes.latent import Latent, Levelled, Rounded, Supported, latent_of, scattered, settled, within_cells
from tests.models import Array, normal

SHAPES = ((6, 5, 3, 3), (7, 40), (40, 7), (33,))
SINGLE = np.dtype(np.float32)
PLANES = [name for name, storage in STORAGES.items() if isinstance(storage, Planes)]


def cases() -> list[tuple[str, tuple[int, ...], int]]:
    """Every storage, for each shape and end axis that it takes."""
    return [
        (name, shape, axis)
        for name, storage in STORAGES.items()
        for shape in SHAPES
        for axis in sorted({0, len(shape) - 1})
        if storage.accepts(Spec(shape, SINGLE)) is None
    ]


def stored(name: str, shape: tuple[int, ...], axis: int, seed: int = 0, *, scales: bool = True) -> tuple[Latent, tuple[Array, ...], Spec]:
    """A latent, the packed arrays that it was made of, and what they decode to."""
    array, spec = normal(seed, *shape), Spec(shape, SINGLE)
    packed = STORAGES[name].encode(array, axis)
    latent = latent_of(STORAGES[name], packed, spec, axis, scales=scales)
    assert not isinstance(latent, str), latent
    return latent, packed, spec


def projected(latent: Latent, values: Array) -> Array:
    out = np.full(latent.shape, np.nan, np.float32)
    latent.project(values, out)
    return out


def pulled(latent: Latent, values: Array, gradient: Array) -> Array:
    """The gradient with respect to values, which are brought back in place."""
    out = np.full(len(values), np.nan, np.float32)
    latent.pull(values, projected(latent, values), gradient, out)
    return out


@pytest.mark.parametrize(("name", "shape", "axis"), cases())
def test_the_start_is_the_stored_array_bit_by_bit(name: str, shape: tuple[int, ...], axis: int) -> None:
    latent, packed, spec = stored(name, shape, axis)
    expected = STORAGES[name].decode(packed, spec)
    np.testing.assert_array_equal(projected(latent, latent.start.copy()), expected)
    np.testing.assert_array_equal(STORAGES[name].decode(latent.pack(latent.start.copy()), spec), expected)


@pytest.mark.parametrize(("name", "shape", "axis"), cases())
def test_what_it_becomes_is_written_exactly_in_as_many_bytes(name: str, shape: tuple[int, ...], axis: int) -> None:
    latent, packed, spec = stored(name, shape, axis)
    moved = latent.start + 3 * np.float32(latent.unit()) * normal(1, len(latent.start))
    value, written = projected(latent, moved), latent.pack(moved)
    assert [(part.shape, part.dtype) for part in written] == [(part.shape, part.dtype) for part in packed]
    np.testing.assert_array_equal(STORAGES[name].decode(written, spec), value)
    assert not np.array_equal(value, STORAGES[name].decode(packed, spec))


@pytest.mark.parametrize("name", [name for name, storage in STORAGES.items() if storage.accepts(Spec((6, 20), SINGLE)) is None])
def test_projecting_what_was_projected_changes_nothing(name: str) -> None:
    """Values are brought back to the outermost level once, and codes that were shortened fit."""
    latent, _, _ = stored(name, (6, 20), 0)
    moved = latent.start + np.float32(latent.unit()) * normal(1, len(latent.start))
    first = projected(latent, moved)
    np.testing.assert_array_equal(projected(latent, moved), first)


@pytest.mark.parametrize("name", ["int4", "int3-b32-asym", "nbits4-b32-asym"])
def test_every_entry_goes_to_the_nearest_level(name: str) -> None:
    latent, _, _ = stored(name, (6, 40), 0, scales=False)
    assert isinstance(latent, Rounded)
    moved = latent.start + np.float32(latent.unit()) * normal(1, len(latent.start))
    value = projected(latent, moved)  # `moved` now lies within the grid
    # Half a step, and two roundings of float32 in a value of up to 2^4 steps
    assert (np.abs(value - moved.reshape(value.shape)) <= latent.grid.scale * (0.5 + 2.0**-18)).all()


@pytest.mark.parametrize("name", ["int8", "planes3.0", "kmeans4", "fp16", "float"])
def test_gradients_pass_rounding_unchanged(name: str) -> None:
    latent, _, _ = stored(name, (6, 5, 3, 3), 0)
    gradient = normal(2, *latent.shape)
    np.testing.assert_array_equal(pulled(latent, latent.start.copy(), gradient)[: gradient.size], gradient.reshape(-1))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["vq2x8", "vq4x4"])
def test_the_gradient_of_a_centroid_is_that_of_the_array_along_it(name: str, axis: int) -> None:
    """The array is linear in the table, so a difference of two tables, both exact in half precision, is the derivative."""
    latent, _, _ = stored(name, (8, 16), axis)
    gradient = normal(2, *latent.shape)
    out = pulled(latent, latent.start.copy(), gradient)
    low = latent.start * 0
    for entry in range(0, len(low), 7):
        high = low.copy()
        high[entry] = 0.125  # less than the largest entry of any table of unit channels
        change = projected(latent, high) - projected(latent, low)
        np.testing.assert_allclose(out[entry] * 0.125, np.sum(gradient * change), rtol=1e-5, atol=1e-6)  # float32 sums of 128 terms


@given(st.sampled_from(PLANES), st.integers(0, 1000), st.floats(0, 4))
@settings(max_examples=25)
def test_codes_of_variable_width_never_outgrow_their_bytes(name: str, seed: int, spread: float) -> None:
    """Values three times as wide need more bits than there are."""
    latent, packed, spec = stored(name, (8, 30), 0, seed)
    assert isinstance(latent, Rounded)
    moved = latent.start + np.float32(spread * latent.unit()) * normal(seed + 1, len(latent.start))
    written = latent.pack(moved)
    assert len(written[0]) == len(packed[0])
    np.testing.assert_array_equal(STORAGES[name].decode(written, spec), projected(latent, moved))


def test_the_codes_that_are_shortened_lose_least_for_the_bits_they_save() -> None:
    """One code that lies all but between two levels goes first, before codes in the middle of their levels."""
    latent, _, _ = stored("planes3.0", (8, 30), 0)
    assert isinstance(latent, Rounded)
    storage, grid = latent.storage, latent.grid
    assert isinstance(storage, Planes)
    room = 8 * storage.capacity((8, 30)) - 1
    codes = np.zeros(240, np.int16)
    count = 0
    while storage.code.bits(codes) <= room:  # larger and larger codes until they do not fit
        codes[count % 240] += 1
        count += 1
    values = codes.reshape(8, 30) * grid.scale
    place = int(np.flatnonzero(codes == codes.max())[3])
    values[np.unravel_index(place, (8, 30))] -= 0.49 * grid.scale[place // 30, 0]
    found = latent.codes(values.reshape(-1)).reshape(-1)
    assert list(np.flatnonzero(found != codes)) == [place]


@pytest.mark.parametrize("name", ["sparse50-int3", "sparse75-int1", "sparse90-int4"])
def test_zeros_of_sparse_arrays_stay_zeros_and_nothing_joins_them(name: str) -> None:
    """Wherever values go; gradients reach the others alone."""
    latent, packed, spec = stored(name, (6, 5, 3, 3), 0)
    assert isinstance(latent, Supported)
    zero = STORAGES[name].decode(packed, spec) == 0
    start = latent.start
    for spread in (0.0, 3.0):
        moved = start + np.float32(spread) * latent.unit() * normal(1, len(start))
        moved[: zero.size] *= np.float32(bool(spread))
        np.testing.assert_array_equal(projected(latent, moved) == 0, zero)
    gradient, out = normal(2, *latent.shape), np.empty(len(start), np.float32)
    latent.pull(start, latent.array, gradient, out)
    np.testing.assert_array_equal(out[: zero.size].reshape(spec.shape), np.where(zero, 0, gradient))


def test_other_types_than_float32_are_left_alone() -> None:
    spec = Spec((4, 4), np.dtype(np.float16))
    packed = STORAGES["int8"].encode(normal(0, 4, 4).astype(np.float16), 0)
    assert latent_of(STORAGES["int8"], packed, spec, 0) == "a weight of float16: only float32 is tuned"


@pytest.mark.parametrize("name", ["int4", "int3-b32-asym", "planes2.0", "sparse75-int2", "kmeans3", "nbits4-b32"])
def test_a_start_within_the_cells_is_as_stored_and_nearer_to_the_aim(name: str) -> None:
    latent, packed, spec = stored(name, (6, 40), 0)
    assert isinstance(latent, (Rounded, Levelled))
    for aim in (normal(0, 6, 40).reshape(-1), scattered(latent, np.random.default_rng(0))):
        start = within_cells(latent, aim)
        assert len(start) == len(latent.start)
        np.testing.assert_array_equal(projected(latent, start.copy()), STORAGES[name].decode(packed, spec))
        entries = latent.array.reshape(-1)
        assert np.linalg.norm(start[: len(aim)] - aim) < 0.7 * np.linalg.norm(entries - aim)
        np.testing.assert_array_equal(start[len(aim) :], latent.start[len(aim) :])


@pytest.mark.parametrize("name", ["int3", "int4-b32-asym", "kmeans3", "planes2.5"])
@given(st.integers(0, 50))
@settings(max_examples=5, deadline=None)
def test_settled_entries_keep_their_levels_and_leave_the_borders(name: str, seed: int) -> None:
    """Whether their scales and levels have moved or not: these stay where they are."""
    latent, _, _ = stored(name, (6, 40), 0)
    assert isinstance(latent, (Rounded, Levelled))
    count = latent.array.size
    start = within_cells(latent, latent.array.reshape(-1))
    moved = start + np.float32(0.8) * latent.unit() * normal(seed, len(start))
    levels = projected(latent, moved).reshape(-1)
    found = settled(latent, moved, start)
    np.testing.assert_array_equal(projected(latent, found.copy()).reshape(-1), levels)
    np.testing.assert_array_equal(found[count:], moved[count:])
    back = np.concatenate([moved[:count], start[count:]])
    cells = projected(latent, back).reshape(-1)  # where scales had stayed
    stayed = cells == projected(latent, start.copy()).reshape(-1)
    assert stayed.any()
    assert not stayed.all()
    assert np.mean(found[:count][stayed] == start[:count][stayed]) > 0.6  # not where codes of variable width would outgrow their bytes
    assert np.abs(found[:count] - cells).sum() < np.abs(moved[:count] - cells).sum()


def test_floats_have_no_borders_to_leave() -> None:
    latent, _, _ = stored("float", (6, 40), 0)
    moved = latent.start + 1
    np.testing.assert_array_equal(settled(latent, moved, latent.start), moved)


# --- scales and levels


SCALED = ("int8", "int4", "int3-b32-asym", "int2-b64", "int4-b32-dq", "ternary", "planes2.5", "nbits4-b32-asym", "int4-rows", "kmeans3")


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", SCALED)
def test_the_gradient_of_a_scale_is_that_of_the_array_along_it(name: str, axis: int) -> None:
    """The array is linear in each scale, so the difference between a scale and twice that, both exact in any float, is the derivative."""
    latent, _, _ = stored(name, (8, 70), axis)
    assert isinstance(latent, (Rounded, Levelled))
    assert latent.steps is not None
    start, gradient = latent.start.copy(), normal(2, *latent.shape)
    out, before = pulled(latent, start, gradient), projected(latent, start)
    reached = np.zeros(latent.shape, bool)
    for place in range(len(start) - len(latent.steps.start), len(start)):
        other = start.copy()
        other[place] *= 2
        change = projected(latent, other) - before
        reached |= change != 0
        size = np.abs(gradient * change).sum()
        np.testing.assert_allclose(out[place] * start[place], np.sum(gradient * change), rtol=0, atol=1e-6 * size)  # float32 sums
    np.testing.assert_array_equal(reached, before != 0)


def test_the_gradient_of_a_level_is_that_of_the_array_along_it() -> None:
    """Entries keep their cells, so the array is linear in each level; a sixteenth is exact in half precision."""
    latent, _, _ = stored("kmeans3", (8, 70), 0)
    start, gradient = latent.start.copy(), normal(2, *latent.shape)
    start[560:568] = np.arange(-4, 4)  # whole numbers, which no change of a sixteenth brings out of order
    out, before = pulled(latent, start, gradient), projected(latent, start)
    for place in range(560, 568):
        other = start.copy()
        other[place] += 0.0625
        change = projected(latent, other) - before
        assert (change != 0).any()
        size = np.abs(gradient * change).sum()
        np.testing.assert_allclose(out[place] / 16, np.sum(gradient * change), rtol=0, atol=1e-5 * size)  # differences of float32


@pytest.mark.parametrize("name", SCALED)
@given(st.integers(0, 1000), st.floats(0, 3))
@settings(max_examples=5, deadline=None)
def test_scales_stay_positive_and_levels_in_order(name: str, seed: int, spread: float) -> None:
    """So that an array which is stored again, and tuned again, starts as it is."""
    latent, packed, spec = stored(name, (6, 40), 0, seed % 7)
    assert isinstance(latent, (Rounded, Levelled))
    assert latent.steps is not None
    moved = latent.start + np.float32(spread) * latent.unit() * normal(seed, len(latent.start))
    written = latent.pack(moved)
    scales = written[latent.steps.number].astype(np.float32)
    ratio = scales / packed[latent.steps.number].astype(np.float32)
    assert (ratio >= 0.24).all()  # a quarter, rounded to bfloat16
    assert (ratio <= 4.02).all()
    again = latent_of(STORAGES[name], written, spec, 0)
    assert not isinstance(again, str)
    np.testing.assert_array_equal(projected(again, again.start.copy()), projected(latent, moved))


@pytest.mark.parametrize("name", ["int4-pow2", "int8-pow2"])
def test_powers_of_two_stay(name: str) -> None:
    latent, _, _ = stored(name, (6, 40), 0)
    assert isinstance(latent, Rounded)
    assert latent.steps is None
    assert len(latent.start) == 240


@pytest.mark.parametrize("name", ["int3", "kmeans2", "planes3.0", "nbits4-b32"])
def test_scales_and_levels_stay_if_that_is_asked_for(name: str) -> None:
    latent, packed, _ = stored(name, (6, 40), 0, scales=False)
    assert len(latent.start) == 240
    written = latent.pack(latent.start + np.float32(latent.unit()) * normal(1, 240))
    for before, after in zip(packed[1:], written[1:], strict=True):
        if before.dtype.kind != "u":  # not where the planes of other codes start
            np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("name", SCALED)
def test_weights_near_the_ends_of_float32_stay_finite(name: str, size: float) -> None:
    array, spec = normal(0, 6, 40) * np.float32(size), Spec((6, 40), SINGLE)
    latent = latent_of(STORAGES[name], STORAGES[name].encode(array, 0), spec, 0)
    assert isinstance(latent, (Rounded, Levelled))
    value = projected(latent, latent.start * 100)
    assert np.isfinite(value).all()
    assert (value != 0).any()
    np.testing.assert_array_equal(STORAGES[name].decode(latent.pack(latent.start * 100), spec), value)
