"""Codes in bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intaglio.ops.storage.packing import Bits, Bytes, Packing, Trits

PACKINGS = [Bytes(), *(Bits(width) for width in (1, 2, 3, 4, 5, 6)), Trits()]


@given(st.sampled_from(PACKINGS), st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple), st.integers(0, 2**16))
def test_every_code_comes_back(packing: Packing, shape: tuple[int, ...], seed: int) -> None:
    codes = np.random.default_rng(seed).integers(packing.lowest, packing.highest + 1, shape).astype(np.int16)
    packed = packing.pack(codes)
    assert (packed.shape, packed.dtype) == (packing.layout(shape).shape, packing.layout(shape).dtype)
    np.testing.assert_array_equal(packing.unpack(packed, shape).astype(np.int64), codes.astype(np.int64) * packing.unit)


@pytest.mark.parametrize(
    ("packing", "count", "size"),
    [
        (Bytes(), 9, 9),
        (Bits(4), 9, 5),
        (Bits(2), 9, 3),
        (Bits(1), 9, 2),
        (Bits(3), 16, 6),
        (Bits(3), 17, 9),
        (Bits(5), 24, 15),
        (Bits(6), 8, 6),
        (Trits(), 10, 2),
        (Trits(), 11, 3),
    ],
)
def test_bytes_of_a_count_of_codes(packing: Packing, count: int, size: int) -> None:
    assert packing.layout((count,)).nbytes == size


def test_fields_lie_in_planes() -> None:
    assert Bits(4).pack(np.array([1, -1, 2, -2], np.int16)).tolist() == [0x12, 0xFE]
    assert Trits().pack(np.array([-1, 0, 1, -1, 0], np.int16)).tolist() == [0 + 3 * 1 + 9 * 2 + 27 * 0 + 81 * 1]
