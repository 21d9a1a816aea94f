"""Floating-point storage."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from intaglio.ops.emit import Spec, spec_of
from intaglio.ops.storage import STORAGES
from intaglio.ops.storage.floating import HALF, SAME
from tests.ops.running import emitter_for, normal
from tests.ops.storage.round_trip import BFLOAT16, DTYPES, check_folds, check_layout, check_round_trip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3,), (2, 5), (3, 2, 1, 4)])
def test_float_is_exact(dtype: np.dtype, shape: tuple[int, ...]) -> None:
    array = normal(1, *shape).astype(dtype)
    check_layout(SAME, array, 0)
    check_round_trip(SAME, array, 0)
    np.testing.assert_array_equal(SAME.decode(SAME.encode(array, 0), spec_of(array)), array)


def test_float_replaces_the_initializer_itself() -> None:
    emitter = emitter_for()
    array = normal(1, 2, 3)
    assert SAME.emit(emitter, "", (array,), spec_of(array), "w") == "w"
    assert list(emitter.initializers) == ["w"]
    assert emitter.nodes == []


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64)], ids=str)
@pytest.mark.parametrize("shape", [(3,), (2, 5), (3, 2, 1, 4)])
def test_fp16_yields_what_the_reference_says(dtype: np.dtype, shape: tuple[int, ...]) -> None:
    array = normal(2, *shape).astype(dtype)
    check_layout(HALF, array, 0)
    check_round_trip(HALF, array, 0)
    np.testing.assert_allclose(HALF.decode(HALF.encode(array, 0), spec_of(array)), array, rtol=2**-11, atol=2**-25)


def test_fp16_saturates_instead_of_overflowing() -> None:
    array = np.array([[1e30, -1e30, 65504.0, 1e-30]])
    decoded = HALF.decode(HALF.encode(array, 0), spec_of(array))
    np.testing.assert_array_equal(decoded, [[65504.0, -65504.0, 65504.0, 0.0]])


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
def test_fp16_declines_types_that_are_as_narrow(dtype: np.dtype) -> None:
    assert HALF.accepts(Spec((2, 2), dtype)) == f"already {dtype}"
    assert SAME.accepts(Spec((2, 2), dtype)) is None


def test_fp16_is_folded_when_the_model_is_loaded(tmp_path: object) -> None:
    check_folds(HALF, normal(3, 8, 6), 0, tmp_path)  # type: ignore[arg-type]


def test_every_storage_is_listed_under_its_own_name() -> None:
    assert {name: storage.name for name, storage in STORAGES.items()} == {name: name for name in STORAGES}
    assert ml_dtypes.bfloat16 == BFLOAT16
