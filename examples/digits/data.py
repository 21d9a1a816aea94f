"""Scikit-learn's bundled handwritten digits, split the same way for training and for judging.

1797 grey images of 8 x 8 pixels. Every third image of each class is the test part, so the split needs no random
generator, keeps the class balance and is the same on every machine. Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

CLASSES = 10
IMAGE_SHAPE = (1, 8, 8)
TEST_EVERY = 3


@dataclass(frozen=True)
class Part:
    """One part of the data set.

    Attributes:
        image: (samples, 1, 8, 8), float32 in 0..1, brighter where there is ink.
        label: (samples,), int64 in 0..9.
    """

    image: NDArray[np.float32]
    label: NDArray[np.int64]


def load_parts() -> tuple[Part, Part]:
    """The train and the test part, disjoint; two thirds and one third of every class."""
    digits = load_digits()
    image = (digits.data / 16).astype(np.float32).reshape(-1, *IMAGE_SHAPE)
    label = digits.target.astype(np.int64)

    test = np.zeros(len(label), dtype=bool)
    for digit in range(CLASSES):
        test[np.flatnonzero(label == digit)[::TEST_EVERY]] = True
    return Part(image[~test], label[~test]), Part(image[test], label[test])
