"""Partitions and scale formats."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intaglio.ops.storage.scaling import LARGEST, Blocks, BrainFloat, Channels, Double, PowerOfTwo, ScaleFormat

SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=5).map(tuple)
FORMATS = [BrainFloat(), PowerOfTwo(), Double()]


@given(SHAPES, st.integers(1, 6), st.data())
def test_blocks_split_and_join(shape: tuple[int, ...], limit: int, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    blocks = Blocks.of(shape, axis, limit)
    array = np.arange(1, 1 + np.prod(shape)).reshape(shape)
    split = blocks.split(array)
    assert split.shape == blocks.layout
    assert blocks.layout[2] <= limit
    assert split.size - array.size < blocks.outer * blocks.inner * blocks.count  # less than one entry of padding to a block
    np.testing.assert_array_equal(blocks.join(split), array)
    assert Blocks.read(shape, blocks.scales) == blocks


@given(SHAPES, st.integers(1, 6), st.data())
def test_no_block_holds_entries_of_two_channels(shape: tuple[int, ...], limit: int, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    blocks = Blocks.of(shape, axis, limit)
    number = blocks.spread(np.arange(np.prod(blocks.scales)).reshape(blocks.scales))
    channel = np.broadcast_to(np.arange(shape[axis]).reshape(Channels(shape, axis).scales), shape)
    assert number.shape == shape
    assert all(len(set(channel[number == each])) == 1 for each in np.unique(number))


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e30])
def test_scales_of_any_magnitude_survive(form: ScaleFormat, unit: float) -> None:
    scale = (np.random.default_rng(1).uniform(0.5, 2, (3, 4, 1, 2)) * unit).astype(np.float32)
    stored = form.encode(scale, LARGEST / 8)
    assert [(part.shape, part.dtype) for part in stored] == [(spec.shape, spec.dtype) for spec in form.layout(scale.shape)]
    decoded = form.decode(stored)
    # half of the last of 8 bits; half an octave; half of the largest scale's 255th part, which the unit's rounding makes no more than 1/250
    tolerance = {"BrainFloat": 2**-8, "PowerOfTwo": 2**0.5 - 1, "Double": 2 * 2 / 250}[type(form).__name__]
    np.testing.assert_allclose(decoded, scale, rtol=tolerance * 1.001)


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: type(f).__name__)
def test_scales_stay_positive_and_products_finite(form: ScaleFormat) -> None:
    scale = np.array([0, 1e-45, 1, LARGEST], np.float32).reshape(4, 1, 1, 1)
    decoded = form.decode(form.encode(scale, LARGEST / 127))
    assert (decoded > 0).all()
    with np.errstate(over="raise"):
        assert np.isfinite(decoded * np.float32(127)).all()
