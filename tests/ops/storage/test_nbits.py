"""Matrices as MatMulNBits reads them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.emit import Spec, spec_of
from intaglio.ops.storage import STORAGES, is_scalar
from intaglio.ops.storage.nbits import NBITS, NBits
from tests.ops.running import Array, emitter_for, normal
from tests.ops.storage.round_trip import check_layout

FLOAT32 = np.dtype(np.float32)
STORED = st.sampled_from(NBITS)


def bits_of(codes: Array, bits: int) -> Array:
    """Unsigned codes from bytes along the last axis, low-order bits first: how MatMulNBits documents it."""
    flat = np.unpackbits(codes, axis=-1, bitorder="little").reshape(*codes.shape[:-1], -1, bits)
    return np.asarray((flat * (1 << np.arange(bits))).sum(axis=-1))


@settings(max_examples=60, deadline=None)
@given(STORED, st.integers(1, 5), st.integers(1, 150), st.integers(0, 1), st.integers(0, 2**16))
def test_codes_zeros_and_scales_lie_as_the_operator_documents(storage: NBits, channels: int, length: int, axis: int, seed: int) -> None:
    array = normal(seed, channels, length) + np.float32(storage.shifted)
    array = array if axis == 0 else np.ascontiguousarray(array.T)
    check_layout(storage, array, axis)
    packed = [np.asarray(part) for part in storage.encode(array, axis)]
    blocks = -(-length // storage.block)
    assert packed[0].shape == (channels, blocks, storage.block * storage.bits // 8)
    zeros = bits_of(packed[2], storage.bits)[:, :blocks] if storage.shifted else np.full((channels, blocks), 1 << (storage.bits - 1))
    values = (bits_of(packed[0], storage.bits) - zeros[..., None]).astype(np.float32) * packed[1].reshape(channels, blocks, 1)
    rows = values.reshape(channels, -1)[:, :length]
    np.testing.assert_array_equal(storage.decode(tuple(packed), spec_of(array)), rows if axis == 0 else rows.T)


@settings(max_examples=40, deadline=None)
@given(STORED, st.integers(1, 70), st.integers(1, 70), st.integers(0, 1), st.integers(0, 2**16))
def test_a_grid_holds_what_is_packed(storage: NBits, rows: int, columns: int, axis: int, seed: int) -> None:
    assert is_scalar(storage)
    array = normal(seed, rows, columns)
    grid = storage.grid(array, axis)
    codes = np.random.default_rng(seed).integers(grid.lowest, grid.highest + 1, array.shape).astype(np.int16)
    packed = storage.pack(codes, grid)
    assert packed is not None
    np.testing.assert_array_equal(storage.decode(packed, spec_of(array)), grid.values(codes))


def error(name: str, array: Array, importance: Array | None = None) -> float:
    """Mean squared error."""
    storage = STORAGES[name]
    difference = np.asarray(storage.decode(storage.encode(array, 1, importance), spec_of(array))) - array
    return float(np.mean((1.0 if importance is None else importance) * np.square(difference)))


def test_more_bits_smaller_blocks_and_zero_points_lose_less() -> None:
    array = np.random.default_rng(1).standard_t(4, (256, 24)).astype(np.float32)
    assert error("nbits8-b32", array) < 0.05 * error("nbits4-b32", array) < 0.05 * error("nbits2-b32", array)
    assert error("nbits4-b32", array) < error("nbits4-b64", array) < error("nbits4-b128", array)
    assert error("nbits4-b32-asym", np.abs(array)) < 0.5 * error("nbits4-b32", np.abs(array))


def test_importance_moves_the_scales() -> None:
    array = np.random.default_rng(1).standard_t(3, (256, 24)).astype(np.float32)
    importance = np.random.default_rng(2).random((256, 1)) ** 8
    plain = STORAGES["nbits2-b64"].encode(array, 1)
    difference = np.asarray(STORAGES["nbits2-b64"].decode(plain, spec_of(array))) - array
    assert error("nbits2-b64", array, importance) < float(np.mean(importance * np.square(difference)))


@pytest.mark.parametrize("storage", NBITS, ids=lambda storage: storage.name)
def test_zeros_and_extremes_stay_finite(storage: NBits) -> None:
    assert not np.asarray(storage.decode(storage.encode(np.zeros((3, 40), np.float32), 0), Spec((3, 40), FLOAT32))).any()
    array = np.array([[3e38, -3e38, 0, 1e38] * 10, [1e-38, -2e-38, 0, 1e-40] * 10], np.float32)
    decoded = np.asarray(storage.decode(storage.encode(array, 0), spec_of(array)))
    assert np.isfinite(decoded).all()


def test_payload() -> None:
    sizes = {storage.name: [spec.nbytes for spec in storage.layout(Spec((70, 10), FLOAT32), 1)] for storage in NBITS}
    assert sizes["nbits4-b32"] == [10 * 3 * 16, 10 * 3 * 4]
    assert sizes["nbits4-b32-asym"] == [10 * 3 * 16, 10 * 3 * 4, 10 * 2]
    assert sizes["nbits8-b128"] == [10 * 128, 10 * 4]


def test_what_it_cannot_hold_and_what_cannot_read_it() -> None:
    storage = STORAGES["nbits4-b32"]
    assert storage.accepts(Spec((4, 8), FLOAT32)) is None
    assert storage.accepts(Spec((4, 8, 1), FLOAT32)) == "an array of shape [4, 8, 1]: only matrices"
    assert storage.accepts(Spec((0, 8), FLOAT32)) == "an empty array"
    assert storage.accepts(Spec((4, 8), np.dtype(np.float16))) == "a weight of float16: block-wise operators are emitted for float32"
    packed, spec = storage.encode(normal(1, 4, 8), 0), Spec((4, 8), FLOAT32)
    assert storage.emit_integer(emitter_for(), "", packed, spec, 0) is None
    with pytest.raises(TypeError, match="nbits4-b32 is read packed"):
        storage.emit(emitter_for(), "", packed, spec)
