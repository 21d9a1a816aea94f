"""int8 codes from float weights, at load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.arithmetic.weight import integer_weight
from intaglio.ops.emit import spec_of
from intaglio.ops.storage import STORAGES, limited, requantize, requantized
from tests.ops.running import Array, assemble, emitter_for, normal, run, run_model


def outputs(array: Array, axis: int, opset: int, *, functions: bool, optimize: bool) -> list[Array]:
    emitter = emitter_for(opset, functions=functions)
    emitter.initializers["w"] = array
    weight = requantize(emitter, "w", spec_of(array), axis)
    assert weight.axis == axis
    emitter.node("Identity", [weight.codes], "codes")
    emitter.node("Identity", [weight.scale], "scale")
    return run(emitter, {}, ["codes", "scale"], optimize=optimize)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple), st.sampled_from([11, 13, 17, 18, 21]), st.integers(0, 99), st.data())
def test_the_program_is_the_reference(shape: tuple[int, ...], opset: int, seed: int, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    array = normal(seed, *shape)
    np.moveaxis(array, axis, 0)[0] = 0
    expected = requantized(array, axis)
    for functions in (True, False):
        for actual, reference in zip(outputs(array, axis, opset, functions=functions, optimize=seed % 2 == 0), expected, strict=True):
            np.testing.assert_array_equal(actual, reference)
            assert actual.dtype == reference.dtype


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("storage", ["int8", "kmeans4"])
def test_a_target_of_fewer_bits_gets_smaller_codes(storage: str, opset: int, tmp_path: Path) -> None:
    """A storage's own codes are chosen within them, what has none is rounded to them when it is loaded, which is folded."""
    array = normal(3, 12, 40)
    emitter = emitter_for(opset)
    emitter.target = replace(emitter.target, largest_code=63)
    packed = limited(STORAGES[storage], 63).encode(array, 0)
    weight = integer_weight(emitter, "", STORAGES[storage], packed, spec_of(array), 0)
    emitter.node("Gather", [weight.codes, "index"], "y")
    emitter.node("Gather", [weight.scale, "index"], "s")
    feed, path = {"index": np.arange(12)}, tmp_path / "optimized.onnx"
    codes, scale = run_model(assemble(emitter, feed, ["y", "s"]), feed, save_to=path)
    assert np.abs(codes.astype(int)).max() <= 63
    decoded = STORAGES[storage].decode(packed, spec_of(array))
    lost = 0 if storage == "int8" else 0.5
    assert (np.abs(codes * scale[:, None] - decoded) <= (lost + 1e-5) * scale[:, None]).all()  # float32 roundings of 2⁻²⁴ in 63 steps
    assert [node.op_type for node in onnx.load(path).graph.node] == ["Gather", "Gather"]


@pytest.mark.parametrize("storage", ["int8", "int8-pow2"])
def test_limited_storages_write_as_many_bytes_and_are_decoded_alike(storage: str) -> None:
    array, whole = normal(3, 12, 40), STORAGES[storage]
    within = limited(whole, 63)
    packed, spec = within.encode(array, 0), spec_of(array)
    assert within.layout(spec, 0) == whole.layout(spec, 0)
    assert int(np.abs(packed[0].astype(int)).max()) <= 63  # type: ignore[type-var]
    np.testing.assert_array_equal(within.decode(packed, spec), whole.decode(packed, spec))
    assert limited(whole, 127) is whole
    assert all(limited(other, 63) is other for name, other in STORAGES.items() if not name.startswith("int8"))


def test_codes_beyond_those_of_the_target_are_refused() -> None:
    array, emitter = normal(3, 12, 40), emitter_for(18)
    emitter.target = replace(emitter.target, largest_code=63)
    with pytest.raises(ValueError, match="a weight in int8 has codes beyond ±63; expected what the limited storage packs"):
        integer_weight(emitter, "", STORAGES["int8"], STORAGES["int8"].encode(array, 0), spec_of(array), 0)


def test_codes_are_off_by_half_a_step() -> None:
    array = normal(1, 20, 30)
    codes, scale = requantized(array, 1)
    assert np.abs(codes).max(axis=0).tolist() == [127] * 30
    assert (np.abs(codes * scale - array) <= 0.5 * scale * (1 + 1e-5)).all()  # 127 float32 roundings of 2⁻²⁴


@pytest.mark.parametrize("storage", ["int4-b32", "kmeans4", "planes3.0", "vq4x8"])
@pytest.mark.parametrize("opset", [13, 18, 25])
def test_it_is_folded_behind_a_storage(storage: str, opset: int, tmp_path: Path) -> None:
    array = normal(2, 12, 40)
    emitter = emitter_for(opset)
    packed = STORAGES[storage].encode(array, 0)
    name = STORAGES[storage].emit(emitter, "", packed, spec_of(array))
    weight = requantize(emitter, name, spec_of(array), 0)
    emitter.node("Gather", [weight.codes, "index"], "y")
    feed, path = {"index": np.arange(12)}, tmp_path / "optimized.onnx"
    (codes,) = run_model(assemble(emitter, feed, ["y"]), feed, save_to=path)
    np.testing.assert_array_equal(codes, requantized(STORAGES[storage].decode(packed, spec_of(array)), 0)[0])
    assert [node.op_type for node in onnx.load(path).graph.node] == ["Gather"]


def test_what_cannot_be_requantized() -> None:
    with pytest.raises(ValueError, match="opset 10 cannot round"):
        requantize(emitter_for(10), "w", spec_of(normal(1, 2, 2)), 0)
    with pytest.raises(ValueError, match="one axis"):
        requantize(emitter_for(18), "w", spec_of(normal(1, 2)), 0)
