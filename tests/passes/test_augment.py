"""Augmentations change images only in the ways that they say, and from their generator alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intaglio.passes.augment import AUGMENTATIONS, augmented, crop, flip, mixup, shift
from intaglio.passes.errors import InputError
from tests.models import Array

names = pytest.mark.parametrize("name", AUGMENTATIONS)


def images(count: int = 8, channels: int = 3, rows: int = 16, columns: int = 24) -> Array:
    return np.random.default_rng(1).standard_normal((count, channels, rows, columns)).astype(np.float32)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@names
@given(st.integers(0, 100))
def test_shape_type_and_range_stay_and_the_images_given_are_not_changed(name: str, seed: int) -> None:
    given_images = images()
    kept = given_images.copy()
    found = AUGMENTATIONS[name](given_images, rng(seed))
    assert (found.shape, found.dtype) == (kept.shape, kept.dtype)
    np.testing.assert_array_equal(given_images, kept)
    slack = 1e-6 * np.abs(kept).max()  # weights of a mean sum to one but for rounding
    assert kept.min() - slack <= found.min() <= found.max() <= kept.max() + slack


@names
def test_the_same_seed_gives_the_same_images_and_another_one_others(name: str) -> None:
    one, same, other = (AUGMENTATIONS[name](images(), rng(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_flip_mirrors_some_images_and_leaves_the_others() -> None:
    before, after = images(64), flip(images(64), rng())
    mirrored = [np.array_equal(b[..., ::-1], a) for b, a in zip(before, after, strict=True)]
    kept = [np.array_equal(b, a) for b, a in zip(before, after, strict=True)]
    assert [m != k for m, k in zip(mirrored, kept, strict=True)] == [True] * 64
    assert 16 < sum(mirrored) < 48  # four standard deviations either way


@given(st.integers(0, 100))
def test_shift_moves_each_image_by_whole_pixels_and_reflects_the_rest(seed: int) -> None:
    before, after = images(), shift(images(), rng(seed))
    for b, a in zip(before, after, strict=True):
        padded = np.pad(b, ((0, 0), (2, 2), (3, 3)), mode="reflect")
        moves = [padded[:, y : y + 16, x : x + 24] for y in range(5) for x in range(7)]
        assert sum(np.array_equal(move, a) for move in moves) == 1


def test_crop_stretches_a_part() -> None:
    """Of a picture whose rows or columns are numbered, linear interpolation gives evenly spaced numbers."""
    numbered = np.broadcast_to(np.arange(16, dtype=np.float32)[:, None], (8, 3, 16, 24))
    found = crop(numbered, rng())
    steps = np.diff(found, axis=2)
    np.testing.assert_allclose(steps, np.broadcast_to(steps[:, :1, :1, :1], steps.shape), atol=1e-5)  # float32 of numbers up to 15
    assert (steps > 0.75 - 1e-5).all()
    assert (steps <= 1 + 1e-5).all()
    assert np.ptp(steps[:, 0, 0, 0]) > 0.05  # each image has its own


def test_mixup_lies_between_an_image_and_another_nearer_to_the_first() -> None:
    before, after = images(), mixup(images(), rng())
    for number, mixed in enumerate(after):
        shares = []
        for other in range(len(before)):
            towards = before[other] - before[number]
            share = float((mixed - before[number]).ravel() @ towards.ravel()) / max(float(towards.ravel() @ towards.ravel()), 1e-9)
            if np.allclose(before[number] + share * towards, mixed, atol=1e-5):
                shares.append(share)
        assert len(shares) >= 1
        assert all(-1e-6 <= share <= 0.5 + 1e-6 for share in shares)


def test_channels_last_are_recognized() -> None:
    picture = images(4, 3, 16, 24)
    feed = {"x": np.moveaxis(picture, 1, 3).copy()}
    for name in ("flip", "shift"):
        last = augmented(feed, [name], rng())["x"]
        np.testing.assert_array_equal(np.moveaxis(last, 3, 1), AUGMENTATIONS[name](picture, rng()))


def test_only_the_images_of_a_feed_change() -> None:
    feed = {"ids": np.arange(8), "x": images()}
    found = augmented(feed, ["flip", "shift"], rng())
    assert found["ids"] is feed["ids"]
    assert not np.array_equal(found["x"], feed["x"])
    assert augmented(feed, [], rng()) is feed


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(InputError, match="'spin' is unknown; expected one of flip, shift, crop, mixup"):
        augmented({"x": images()}, ["spin"], rng())
    with pytest.raises(InputError, match="needs one input of images"):
        augmented({"x": images()[0]}, ["flip"], rng())
