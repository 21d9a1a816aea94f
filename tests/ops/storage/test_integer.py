"""Integer storage: int8 and packed int4."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.emit import Spec, spec_of
from intaglio.ops.storage.integer import INT4, INT8, Int4, Int8, quantize, search_scales
from tests.ops.running import Array, normal
from tests.ops.storage.round_trip import DTYPES, check_folds, check_layout, check_round_trip

STORAGES = st.sampled_from([INT8, INT4])
SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)
SEEDS = st.integers(0, 2**16)

FLOAT32 = 1e-4
"""Scales are searched in float32: a value is off by up to 127·2⁻²⁴ steps, its error squared by a few times that."""


def plain(array: Array, axis: int, largest: int) -> Array:
    """Rounded under the scale that maps the largest magnitude to the largest integer."""
    others = tuple(i for i in range(array.ndim) if i != axis)
    scale = np.abs(array).max(axis=others, keepdims=True) / largest
    scale[scale == 0] = 1
    return np.rint(array / scale) * scale


@settings(max_examples=60)
@given(STORAGES, SHAPES, st.sampled_from(DTYPES), SEEDS, st.data())
def test_onnx_runtime_yields_what_the_reference_says(
    storage: Int8 | Int4, shape: tuple[int, ...], dtype: np.dtype, seed: int, data: st.DataObject
) -> None:
    if storage.accepts(Spec(shape, dtype)) is not None:
        assert storage is INT4
        assert all(size % 2 for size in shape)
        return
    axis = data.draw(st.integers(0, len(shape) - 1))
    array = normal(seed, *shape).astype(dtype)
    check_layout(storage, array, axis)
    check_round_trip(storage, array, axis)


@given(STORAGES, SHAPES, SEEDS, st.booleans(), st.data())
def test_searched_scales_are_never_worse_than_plain_ones(
    storage: Int8 | Int4, shape: tuple[int, ...], seed: int, weighted: bool, data: st.DataObject
) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    array = np.random.default_rng(seed).standard_t(2, shape)
    importance = np.random.default_rng(seed + 1).random(shape[-1:]) if weighted else None
    integers, scales = quantize(array, axis, storage.largest, importance)
    assert np.abs(integers).max() <= storage.largest
    weights = 1.0 if importance is None else importance
    others = tuple(i for i in range(array.ndim) if i != axis)
    searched = (weights * np.square(integers * scales - array)).sum(axis=others)
    unsearched = (weights * np.square(plain(array, axis, storage.largest) - array)).sum(axis=others)
    floor = (weights * np.square(array)).sum(axis=others)
    assert (searched <= unsearched + FLOAT32 * unsearched + 1e-12 * floor).all()


def test_the_search_clips_an_outlier_unless_it_is_important() -> None:
    array = np.concatenate([normal(1, 1, 4000), [[6.0]]], axis=1)
    importance = np.ones_like(array, np.float64)
    clipped = search_scales(array, 0, 7, importance)
    importance[0, -1] = 1e6
    kept = search_scales(array, 0, 7, importance)
    assert clipped[0, 0] < 0.9 * kept[0, 0]
    assert kept[0, 0] == pytest.approx(6 / 7, rel=1e-6)


@given(SHAPES, SEEDS)
def test_int4_packs_every_value_of_its_range(shape: tuple[int, ...], seed: int) -> None:
    if INT4.accepts(Spec(shape, np.dtype(np.float32))) is not None:
        with pytest.raises(ValueError, match="even length"):
            INT4.pack(np.zeros(shape, np.int8))
        return
    integers = np.random.default_rng(seed).integers(-8, 8, shape).astype(np.int8)
    packed = INT4.pack(integers)
    assert packed.dtype == np.uint8
    assert 2 * packed.size == integers.size
    scale = np.ones((1,) * len(shape), np.float32)
    np.testing.assert_array_equal(INT4.decode((packed, scale), Spec(shape, np.dtype(np.float32))), integers)


@pytest.mark.parametrize("storage", [INT8, INT4], ids=lambda s: s.name)
def test_payload(storage: Int8 | Int4) -> None:
    layout = storage.layout(Spec((10, 7, 3), np.dtype(np.float32)), 1)
    assert [spec.nbytes for spec in layout] == [210 // (2 if storage is INT4 else 1), 28]


@pytest.mark.parametrize("storage", [INT8, INT4], ids=lambda s: s.name)
def test_every_entry_is_within_half_a_step_unless_clipped(storage: Int8 | Int4) -> None:
    array = normal(4, 6, 50)
    packed = storage.encode(array, 0)
    scale = np.asarray(packed[1], np.float64)
    decoded = np.asarray(storage.decode(packed, spec_of(array)), np.float64)
    inside = np.abs(array) <= (storage.largest + 0.5) * scale
    assert (np.abs(decoded - array)[inside] <= (0.5 * scale * np.ones_like(array))[inside] * (1 + 1e-5)).all()
    np.testing.assert_allclose(np.abs(decoded[~inside]), (storage.largest * scale * np.ones_like(array))[~inside], rtol=1e-6)


@pytest.mark.parametrize("storage", [INT8, INT4], ids=lambda s: s.name)
def test_channels_of_zeros_stay_zero(storage: Int8 | Int4) -> None:
    array = normal(5, 4, 6)
    array[1] = 0
    packed = storage.encode(array, 0)
    assert (np.asarray(packed[1]) > 0).all()
    decoded = np.asarray(storage.decode(packed, spec_of(array)))
    assert (decoded[1] == 0).all()
    assert decoded[0].any()
    check_round_trip(storage, array, 0)


@pytest.mark.parametrize("storage", [INT8, INT4], ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values_never_become_infinite(storage: Int8 | Int4, dtype: np.dtype) -> None:
    limits = np.finfo(dtype) if dtype.kind == "f" else None
    largest = float(limits.max) if limits else 3.3895e38
    smallest = float(limits.smallest_subnormal) if limits else 9.2e-41
    array = np.array([[largest, -largest, 0, largest / 2], [smallest, -smallest, 0, smallest], [1, -1, 0, 0.5]]).astype(dtype)
    packed = storage.encode(array, 0)
    decoded = np.asarray(storage.decode(packed, spec_of(array)), np.float64)
    assert np.isfinite(decoded).all()
    assert np.isfinite(np.asarray(packed[1])).all()
    np.testing.assert_allclose(decoded[2], [1, -1, 0, 0.5], atol=0.08)
    if dtype != np.float64:  # the program computes in float32: doubles beyond it saturate
        np.testing.assert_allclose(decoded[0, :2], [largest, -largest], rtol=0.5 / storage.largest)


@pytest.mark.parametrize("storage", [INT8, INT4], ids=lambda s: s.name)
@pytest.mark.parametrize("shape", [(8, 6), (5, 4), (6, 3, 3, 3)])
def test_the_program_is_folded_when_the_model_is_loaded(storage: Int8 | Int4, shape: tuple[int, ...], tmp_path: Path) -> None:
    check_folds(storage, normal(6, *shape), 0, tmp_path)


@pytest.mark.parametrize(
    ("storage", "shape", "reason"),
    [
        (INT8, (), "a scalar has no channels"),
        (INT8, (0, 3), "an empty array"),
        (INT4, (2, 0), "an empty array"),
        (INT4, (3, 5), "no axis of even length in shape (3, 5)"),
    ],
)
def test_arrays_that_cannot_be_held(storage: Int8 | Int4, shape: tuple[int, ...], reason: str) -> None:
    assert storage.accepts(Spec(shape, np.dtype(np.float32))) == reason


def test_large_arrays_are_worked_on_in_parts() -> None:
    array = normal(7, 700, 400)
    integers, scales = quantize(array, 0, 127, None)
    for rows in (slice(0, 5), slice(325, 335), slice(695, 700)):
        part = quantize(array[rows], 0, 127, None)
        np.testing.assert_array_equal(part[0], integers[rows])
        np.testing.assert_array_equal(part[1], scales[rows])
