"""Random changes of images that leave open what a network says about them: the original model is asked again on each changed image.

Images are 4-D: (samples, channels, rows, columns), or channels last where only that axis can be one of colours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError

_COLOURS = (1, 3, 4)
"""Numbers of channels that pictures have."""

_REACH = 0.125
"""Farthest shift, as a share of each side."""

_LEAST_SIDE = 0.75
"""Shortest side of a crop, as a share of the image's."""

_MIXING = 0.4
"""Parameter of the Beta distribution of shares in a mixture."""

Images = NDArray[Any]
Augmentation = Callable[[Images, np.random.Generator], Images]
"""(n, channels, rows, columns) → the same shape and dtype; the argument is not changed."""


def flip(images: Images, rng: np.random.Generator) -> Images:
    """Every other image, at random, mirrored left to right."""
    mirrored = rng.random(len(images)) < 0.5
    return np.where(mirrored[:, None, None, None], images[..., ::-1], images)


def shift(images: Images, rng: np.random.Generator) -> Images:
    """Each image moved by whole pixels, up to `_REACH` of a side, and continued by reflection."""
    rows, columns = (np.arange(size) + _offsets(len(images), size, rng) for size in images.shape[2:])
    return _picked(images, _reflected(rows, images.shape[2]), _reflected(columns, images.shape[3]))


def crop(images: Images, rng: np.random.Generator) -> Images:
    """A part of each image, at least `_LEAST_SIDE` as high and as wide, stretched to the full size; linear between pixels."""
    for axis, size in ((2, images.shape[2]), (3, images.shape[3])):
        share = rng.uniform(_LEAST_SIDE, 1, (len(images), 1))
        start = rng.uniform(0, 1, (len(images), 1)) * (1 - share) * (size - 1)
        images = _between(images, start + np.linspace(0, 1, size) * share * (size - 1), axis)
    return images


def mixup(images: Images, rng: np.random.Generator) -> Images:
    """Each image mixed with another of the batch: Zhang et al., "mixup: beyond empirical risk minimization" (2018), equation 1."""
    share = rng.beta(_MIXING, _MIXING, (len(images), 1, 1, 1))
    share = np.maximum(share, 1 - share).astype(images.dtype)
    return np.asarray(share * images + (1 - share) * images[rng.permutation(len(images))])


AUGMENTATIONS: Mapping[str, Augmentation] = {"flip": flip, "shift": shift, "crop": crop, "mixup": mixup}
"""Every augmentation, by the name that users give; applied in the order that they give."""


def augmented(feed: Mapping[str, NDArray[np.generic]], names: Sequence[str], rng: np.random.Generator) -> Mapping[str, NDArray[np.generic]]:
    """A feed whose images are changed at random; the feed given is not changed.

    Args:
        feed: by input name.
        names: of `AUGMENTATIONS`.
        rng: the only source of chance.

    Raises:
        InputError: a name is unknown, or the feed does not hold exactly one array of images.
    """
    unknown = [name for name in names if name not in AUGMENTATIONS]
    if unknown:
        raise InputError(f"augmentation {unknown[0]!r} is unknown; expected one of {', '.join(AUGMENTATIONS)}")
    if not names:
        return feed
    image = image_input(feed, names[0])
    changed = feed[image]
    last = changed.shape[1] not in _COLOURS and changed.shape[3] in _COLOURS
    changed = np.moveaxis(changed, 3, 1) if last else changed
    for name in names:
        changed = AUGMENTATIONS[name](changed, rng)
    return {**feed, image: np.ascontiguousarray(np.moveaxis(changed, 1, 3) if last else changed)}


def image_input(feed: Mapping[str, NDArray[np.generic]], augmentation: str) -> str:
    """The name of the one array of images in a feed.

    Args:
        feed: by input name.
        augmentation: that needs it.

    Raises:
        InputError: there is none, or more than one.
    """
    images = [name for name, array in feed.items() if array.ndim == 4 and array.dtype.kind == "f"]
    if len(images) != 1:
        raise InputError(
            f"augmentation {augmentation!r} needs one input of images (4-D, of float16, float32 or float64), the data has {len(images)}; "
            "leave it out"
        )
    return images[0]


def _offsets(count: int, size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(count, 1) whole pixels, as far as `_REACH` either way."""
    reach = int(size * _REACH)
    return rng.integers(-reach, reach + 1, (count, 1))


def _reflected(places: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Places less than `size` beyond either end, reflected at the outermost pixels, which are not repeated."""
    places = np.abs(places)
    return np.where(places >= size, 2 * (size - 1) - places, places)


def _picked(images: Images, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Images:
    """The pixels of rows (n, r) and columns (n, c) of each image: (n, channels, r, c)."""
    n, channels = np.ogrid[: images.shape[0], : images.shape[1]]
    return images[n[..., None, None], channels[..., None, None], rows[:, None, :, None], columns[:, None, None, :]]


def _between(images: Images, places: NDArray[np.float64], axis: int) -> Images:
    """Values at places (n, size) along an axis, between pixels by linear interpolation."""
    low = np.minimum(places.astype(np.int64), images.shape[axis] - 1)
    high = np.minimum(low + 1, images.shape[axis] - 1)
    shape = [len(images), 1, 1, 1]
    shape[axis] = places.shape[1]
    share = (places - low).astype(images.dtype).reshape(shape)
    first, second = (np.take_along_axis(images, index.reshape(shape), axis) for index in (low, high))
    return np.asarray(first + share * (second - first))
