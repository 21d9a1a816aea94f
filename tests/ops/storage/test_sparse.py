"""Sparse arrays: how many entries stay, which ones, where they are written, and what they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intaglio.ops.emit import Spec, spec_of
from intaglio.ops.storage.grid import Grid
from intaglio.ops.storage.packing import Bits
from intaglio.ops.storage.sparse import SPARSE, Sparse
from tests.ops.running import Array, emitter_for, normal, run

BY_NAME = {storage.name: storage for storage in SPARSE}
SINGLE = np.dtype(np.float32)


def bits(storage: Sparse, *shape: int) -> float:
    return 8 * sum(spec.nbytes for spec in storage.layout(Spec(shape, SINGLE), 0)) / np.prod(shape)


def codes_of(storage: Sparse, shape: tuple[int, ...], count: int, least: int, seed: int) -> Array:
    """Random codes, so many of which are not zero."""
    rng = np.random.default_rng(seed)
    codes = np.zeros(int(np.prod(shape)), np.int16)
    places = rng.choice(len(codes), count, replace=False)
    codes[places] = rng.integers(least, storage.highest(least) + 1, count) * rng.choice([-1, 1], count)
    return codes.reshape(shape)


def grid_of(storage: Sparse, least: int, scale: float = 0.5) -> Grid:
    """A grid of one step, made as the storage makes it, with the given smallest magnitude."""
    made = storage.grid(normal(0, 4, 64), 0)
    most = storage.highest(least)
    ahead = np.arange(least, most + 1)
    table = np.concatenate([ahead, -ahead]).astype(np.int8).view(np.uint8)
    step = np.full((1, 1), scale, np.float32)
    return Grid(step, np.zeros((1, 1), np.float32), -most, most, 0, (table, step.astype(made.stored[1].dtype)), least=least)


@given(st.sampled_from(SPARSE), st.integers(1, 400), st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 6), st.integers(0, 2**16))
def test_any_codes_come_back(storage: Sparse, size: int, share: float, least: int, seed: int) -> None:
    """Fewer than there is room for, and as many; the reference, and ONNX Runtime."""
    shape = (1, size)
    codes = codes_of(storage, shape, round(share * storage.count(shape)), least, seed)
    packed = storage.pack(codes, grid_of(storage, least))
    assert packed is not None
    assert tuple(spec_of(part) for part in packed) == storage.layout(Spec(shape, SINGLE), 0)
    np.testing.assert_array_equal(storage.codes(packed, shape), codes)
    emitter = emitter_for(18)
    emitter.node("Add", ["x", storage.emit(emitter, "", packed, Spec(shape, SINGLE))], "y")
    (found,) = run(emitter, {"x": np.zeros(shape, np.float32)}, ["y"])
    np.testing.assert_array_equal(found, codes * np.float32(0.5))


@pytest.mark.parametrize("storage", SPARSE, ids=lambda s: s.name)
def test_the_last_entries_are_places_like_others(storage: Sparse) -> None:
    """All that stay lie at the end, next to the cell for places that are not needed."""
    for fewer in (0, 1):
        codes = np.zeros((8, 32), np.int16)
        codes.reshape(-1)[256 - storage.count((8, 32)) + fewer :] = -1
        packed = storage.pack(codes, grid_of(storage, 1))
        assert packed is not None
        np.testing.assert_array_equal(storage.codes(packed, codes.shape), codes)


def test_bytes_are_those_of_the_documented_example() -> None:
    storage = BY_NAME["sparse75-int2"]
    packed = storage.pack(np.array([[0, 0, 2, 0, 0, -1, 0, 0]], np.int16), grid_of(storage, 1))
    assert packed is not None
    assert [part.tobytes().hex() for part in packed[:3]] == ["24", "60", "0102fffe"]


def test_places_split_into_high_and_low_bits() -> None:
    """Of 3, 9 and 31 below 32 the low two bits, 3, 1 and 3, and in unary the high ones: 0, 2 + 1, 7 + 2."""
    storage = BY_NAME["sparse90-int2"]
    assert (storage.count((1, 32)), storage.low_bits((1, 32))) == (3, 2)
    codes = np.zeros((1, 32), np.int16)
    codes[0, [3, 9, 31]] = 1
    packed = storage.pack(codes, grid_of(storage, 1))
    assert packed is not None
    np.testing.assert_array_equal(np.flatnonzero(Bits(1).unpack(packed[0], (12,))), [0, 3, 9])
    np.testing.assert_array_equal(Bits(2).unpack(packed[1], (3,)).view(np.uint8) >> 6, [3, 1, 3])


@pytest.mark.parametrize("storage", SPARSE, ids=lambda s: s.name)
def test_one_code_too_many_does_not_fit(storage: Sparse) -> None:
    shape = (8, 32)
    grid = grid_of(storage, 1)
    assert storage.pack(codes_of(storage, shape, storage.count(shape), 1, 0), grid) is not None
    assert storage.pack(codes_of(storage, shape, storage.count(shape) + 1, 1, 0), grid) is None


@pytest.mark.parametrize("storage", SPARSE, ids=lambda s: s.name)
def test_all_that_may_stay_does(storage: Sparse) -> None:
    array = normal(1, 32, 128)
    codes = storage.codes(storage.encode(array, 0), array.shape)
    assert np.count_nonzero(codes) == storage.count(array.shape) == round(array.size * (1 - storage.sparsity / 100))


def test_a_mask_until_places_are_smaller() -> None:
    assert [storage.low_bits((256, 256)) is None for storage in SPARSE] == [storage.sparsity <= 75 for storage in SPARSE]


@pytest.mark.parametrize("storage", SPARSE, ids=lambda s: s.name)
def test_where_entries_are_takes_little_more_than_the_entropy(storage: Sparse) -> None:
    density = 1 - storage.sparsity / 100
    entropy = -density * np.log2(density) - (1 - density) * np.log2(1 - density)
    where = bits(storage, 512, 512) - storage.width * density - 16 / 512  # less codes and scales
    # Elias and Fano: less than 2 + log₂(1/density) bits for each, 0.56 more than the entropy; a mask of a quarter is 0.76 more
    assert entropy <= where < entropy + 0.8 * density


@pytest.mark.parametrize("storage", SPARSE, ids=lambda s: s.name)
def test_the_largest_entries_of_a_channel_stay(storage: Sparse) -> None:
    """Where errors cost alike: the order of what levels take away from the error is that of magnitudes."""
    array = np.random.default_rng(2).permutation(np.linspace(-1, 1, 600, dtype=np.float32))[None]
    kept = storage.codes(storage.encode(array, 0), array.shape) != 0
    assert np.abs(array[kept]).min() >= np.abs(array[~kept]).max() - 1e-6  # of either sign, values lie in pairs


def test_entries_that_cost_more_stay_first() -> None:
    array = normal(3, 8, 200)
    importance = np.where(np.arange(200) < 100, 100.0, 1.0)[None]
    storage = BY_NAME["sparse75-int2"]
    kept = storage.codes(storage.encode(array, 0, importance), array.shape) != 0
    assert kept[:, :100].mean() > 3 * kept[:, 100:].mean()


@pytest.mark.parametrize("storage", SPARSE, ids=lambda s: s.name)
def test_no_code_stands_for_zero(storage: Sparse) -> None:
    """2^width levels, half of them positive, one step apart but for the gap around zero."""
    array = normal(4, 16, 256)
    packed = storage.encode(array, 0)
    levels = packed[-2].view(np.int8)
    assert len(set(levels.tolist())) == 1 << storage.width
    assert 0 not in levels
    assert set(np.unique(storage.codes(packed, array.shape)).tolist()) == {0, *levels.tolist()}


def test_levels_of_few_gaussian_entries_are_far_from_zero() -> None:
    """Of a tenth, all are beyond 1.6 standard deviations; levels from 0 on would leave some without a weight."""
    assert BY_NAME["sparse90-int4"].grid(normal(5, 16, 1024), 0).least > 1


def test_more_codes_and_more_entries_are_more_accurate() -> None:
    array = normal(6, 32, 512)

    def error(name: str) -> float:
        storage = BY_NAME[name]
        return float(np.square(storage.decode(storage.encode(array, 0), spec_of(array)) - array).mean())

    for chain in (
        ["sparse50-int4", "sparse50-int3", "sparse50-int2", "sparse50-int1"],
        ["sparse50-int2", "sparse75-int2", "sparse90-int2"],
    ):
        errors = [error(name) for name in chain]
        assert errors == sorted(errors), chain


def test_half_of_gaussian_entries_lose_what_theory_says() -> None:
    """Zeros lose 1 − E[x²; |x| > t] with P(|x| > t) = ½: 0.0716; four bits for the others add little to it."""
    array = normal(7, 64, 4096)
    storage = BY_NAME["sparse50-int4"]
    error = float(np.square(storage.decode(storage.encode(array, 0), spec_of(array)) - array).mean())
    assert 0.068 < error < 0.085
