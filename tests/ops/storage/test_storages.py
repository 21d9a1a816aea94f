"""What holds for every storage that packs, over random shapes, axes, types and values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.emit import Spec, spec_of
from intaglio.ops.storage import Storage, is_scalar
from intaglio.ops.storage.codebook import CODEBOOKS
from intaglio.ops.storage.native import INT4_NATIVE
from intaglio.ops.storage.planes import PLANES
from intaglio.ops.storage.sparse import SPARSE
from intaglio.ops.storage.uniform import UNIFORM
from intaglio.ops.storage.vector import VECTORS
from tests.ops.running import Array, emitter_for, normal, run
from tests.ops.storage.round_trip import DTYPES, check_folds, check_integers, check_layout, check_round_trip

PACKED: tuple[Storage, ...] = (*UNIFORM, INT4_NATIVE, *PLANES, *SPARSE, *CODEBOOKS, *VECTORS)
SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=5).map(tuple)
SEEDS = st.integers(0, 2**16)


def drawn(seed: int, shape: tuple[int, ...], dtype: np.dtype, density: float, sign: int) -> Array:
    """Values with heavy tails, some of them zero, of one sign or of both."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(3, shape) * (rng.random(shape) < density)
    return (np.abs(values) * sign if sign else values).astype(dtype)


@settings(max_examples=120)
@given(st.sampled_from(PACKED), SHAPES, st.sampled_from(DTYPES), st.sampled_from([0.0, 0.5, 1.0]), st.integers(-1, 1), SEEDS, st.data())
def test_onnx_runtime_yields_what_the_reference_says(
    storage: Storage, shape: tuple[int, ...], dtype: np.dtype, density: float, sign: int, seed: int, data: st.DataObject
) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    array = drawn(seed, shape, dtype, density, sign)
    check_layout(storage, array, axis)
    check_round_trip(storage, array, axis)


@pytest.mark.parametrize("storage", PACKED, ids=lambda s: s.name)
@pytest.mark.parametrize(("shape", "axis"), [((8, 70), 0), ((70, 9), 1), ((6, 5, 3, 3), 0), ((6, 5, 3, 3), 1)])
def test_the_program_is_folded_when_the_model_is_loaded(storage: Storage, shape: tuple[int, ...], axis: int, tmp_path: Path) -> None:
    array = normal(6, *shape)
    check_folds(storage, array, axis, tmp_path)
    check_round_trip(storage, array, axis)


@pytest.mark.parametrize("storage", PACKED, ids=lambda s: s.name)
@pytest.mark.parametrize("opset", [7, 10, 13, 17, 21, 25])
def test_every_opset_from_the_lowest_on_computes_the_same(storage: Storage, opset: int) -> None:
    array = normal(7, 6, 35)
    packed = storage.encode(array, 0)
    if storage.min_opset(spec_of(array)) > opset:
        assert storage.name not in ("int8", "int4")  # these have to hold even numbers of entries in any model
        return
    for functions in (True, False):
        emitter = emitter_for(opset, functions=functions)
        emitter.node("Add", ["x", storage.emit(emitter, "", packed, spec_of(array))], "y")
        (actual,) = run(emitter, {"x": np.zeros_like(array)}, ["y"])
        np.testing.assert_array_equal(actual, storage.decode(packed, spec_of(array)))


@pytest.mark.parametrize("storage", PACKED, ids=lambda s: s.name)
def test_integers_times_scales_are_the_weight(storage: Storage) -> None:
    array = normal(8, 5, 6, 3)
    emitter = emitter_for(21)
    layout = storage.layout(spec_of(array), 1)
    if storage.emit_integer(emitter, "", layout, spec_of(array), 1) is None:
        assert "-b" in storage.name or storage.name.startswith(("kmeans", "vq"))
        assert emitter.nodes == []
        assert emitter.initializers == {}
    else:
        check_integers(storage, array, 1)


@pytest.mark.parametrize("storage", PACKED, ids=lambda s: s.name)
@pytest.mark.parametrize(("shape", "reason"), [((), "a scalar has no channels"), ((0, 3), "an empty array"), ((2, 0), "an empty array")])
def test_arrays_that_cannot_be_held(storage: Storage, shape: tuple[int, ...], reason: str) -> None:
    assert storage.accepts(Spec(shape, np.dtype(np.float32))) == reason


@pytest.mark.parametrize("storage", PACKED, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values_never_become_infinite(storage: Storage, dtype: np.dtype) -> None:
    limits = np.finfo(dtype) if dtype.kind == "f" else None
    largest = float(limits.max) if limits else 3.3895e38
    smallest = float(limits.smallest_subnormal) if limits else 9.2e-41
    array = np.array([[largest, -largest, 0, largest / 2], [smallest, -smallest, 0, smallest], [0, 0, 0, 0]]).astype(dtype)
    for axis in (0, 1):
        packed = storage.encode(array, axis)
        decoded = np.asarray(storage.decode(packed, spec_of(array)), np.float64)
        assert np.isfinite(decoded).all()
        assert (decoded[2] == 0).all() or storage.name.startswith(("kmeans", "vq"))  # these need not have a level at zero


@pytest.mark.parametrize("storage", PACKED, ids=lambda s: s.name)
@pytest.mark.parametrize("power", [-66, 66])
def test_tiny_and_huge_weights_fare_like_others(storage: Storage, power: int) -> None:
    array = normal(11, 6, 40)
    decoded, scaled = (np.asarray(storage.decode(storage.encode(a, 0), spec_of(a))) for a in (array, np.ldexp(array, power)))
    np.testing.assert_array_equal(np.ldexp(decoded, power), scaled)  # a power of two moves exponents alone


@given(st.sampled_from([storage for storage in PACKED if is_scalar(storage)]), SHAPES, SEEDS, st.data())
def test_encoding_is_packing_the_nearest_codes(storage: Storage, shape: tuple[int, ...], seed: int, data: st.DataObject) -> None:
    assert is_scalar(storage)
    axis = data.draw(st.integers(0, len(shape) - 1))
    array = drawn(seed, shape, np.dtype(np.float32), 0.9, 0)
    grid = storage.grid(array, axis)
    codes = grid.nearest(array)
    while (packed := storage.pack(codes, grid)) is None:
        grid = grid.coarser()
        codes = grid.nearest(array)
    for ours, theirs in zip(packed, storage.encode(array, axis), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(storage.decode(packed, spec_of(array)), grid.values(codes))
    assert np.broadcast_shapes(grid.scale.shape, grid.zero.shape, shape) == shape
    assert (grid.scale > 0).all()
    assert codes.min() >= grid.lowest
    assert codes.max() <= grid.highest


def error(storage: Storage, array: Array, axis: int = 0) -> float:
    return float(np.square(storage.decode(storage.encode(array, axis), spec_of(array)) - array).mean())


def test_more_bits_are_more_accurate() -> None:
    by_name = {storage.name: storage for storage in PACKED}
    array = normal(9, 32, 512)
    for chain in (
        ["int8", "int6", "int5", "int4", "int3", "int2", "ternary"],
        ["planes4.0", "planes3.5", "planes3.0", "planes2.5", "planes2.0"],
        ["kmeans4", "kmeans3", "kmeans2"],
        ["vq2x8", "vq4x8", "vq2x4", "vq4x4"],
        ["int4-b32", "int4-b64", "int4-b128", "int4"],
        ["int4", "int4-pow2"],
    ):
        errors = [error(by_name[name], array) for name in chain]
        assert errors == sorted(errors), chain
        assert errors[0] < errors[-1]


@pytest.mark.parametrize("storage", PACKED, ids=lambda s: s.name)
def test_important_entries_are_kept_better(storage: Storage) -> None:
    array = np.random.default_rng(10).standard_t(3, (4, 600)).astype(np.float32)
    importance = np.where(np.arange(600) % 6 == 0, 1.0, 1e-3)[None]
    plain, weighted = (storage.decode(storage.encode(array, 0, each), spec_of(array)) for each in (None, importance))
    loss = [float((importance * np.square(np.asarray(decoded) - array)).sum()) for decoded in (plain, weighted)]
    # bfloat16 and double scales are rounded after the search, by up to 2⁻⁸ and half a unit of 1/255
    assert loss[1] <= loss[0] * 1.02
