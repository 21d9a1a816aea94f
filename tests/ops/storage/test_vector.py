"""Vector quantization."""

from __future__ import annotations

import numpy as np
import pytest

from intaglio.ops.emit import Spec, spec_of
from intaglio.ops.storage.vector import VECTORS, Vectors, fit_centroids, nearest
from tests.ops.running import Array, normal

BY_NAME = {storage.name: storage for storage in VECTORS}


def decoded(storage: Vectors, array: Array, axis: int) -> Array:
    return np.asarray(storage.decode(storage.encode(array, axis), spec_of(array)))


def test_the_nearest_centroid_is_the_nearest() -> None:
    vectors, centroids = normal(1, 500, 3), normal(2, 16, 3)
    weights = np.random.default_rng(3).random((500, 3)).astype(np.float32)
    distance = (weights[:, None] * np.square(vectors[:, None] - centroids)).sum(axis=2)
    found = distance[np.arange(500), nearest(vectors, weights, centroids)]
    np.testing.assert_allclose(found, distance.min(axis=1), atol=1e-5)  # float32 sums of terms up to about 30


def test_centroids_find_clusters() -> None:
    centres = np.random.default_rng(4).uniform(-10, 10, (16, 2)).astype(np.float32)
    vectors = np.repeat(centres, 50, axis=0) + 1e-3 * normal(5, 800, 2)
    centroids = fit_centroids(vectors, np.ones_like(vectors), 16)
    assert np.abs(centres[:, None] - centroids).max(axis=2).min(axis=1).max() < 0.01


def test_a_fit_is_reproducible() -> None:
    vectors = normal(6, 3000, 4)
    first, second = (fit_centroids(vectors, np.ones_like(vectors), 256) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("storage", VECTORS, ids=lambda s: s.name)
@pytest.mark.parametrize("axis", [0, 1])
def test_few_distinct_runs_are_kept(storage: Vectors, axis: int) -> None:
    runs = np.array([[1, 2, 3, 4], [-1, 1, -2, 2], [0.5, 0, 0, -3]], np.float32)
    rows = runs[np.random.default_rng(7).integers(0, 3, (6, 10))].reshape(6, 40)
    rows = np.concatenate([rows, np.roll(rows, 4, axis=1)])
    array = rows if axis == 0 else np.ascontiguousarray(rows.T)
    # float16 centroids in units of the channel's spread: runs of one kind differ by the spreads of 12 channels
    assert np.square(decoded(storage, array, axis) - array).mean() < (0.06 if storage.width == 4 else 0.01) * np.square(array).mean()


def test_runs_beat_single_levels_at_the_same_rate() -> None:
    array = normal(8, 128, 512)
    two_bits = [np.square(decoded(BY_NAME[name], array, 0) - array).mean() for name in ("vq4x8", "vq2x4")]
    # Max's four levels attain 0.1175; longer runs fill space better
    assert two_bits[0] < two_bits[1] < 0.1175


@pytest.mark.parametrize(("name", "bits"), [("vq2x8", 4), ("vq4x8", 2), ("vq2x4", 2), ("vq4x4", 1)])
def test_payload(name: str, bits: int) -> None:
    storage = BY_NAME[name]
    indices, table, scales = storage.layout(Spec((256, 96), np.dtype(np.float32)), 0)
    assert 8 * indices.nbytes == bits * 256 * 96
    assert table.shape == (1 << storage.width, storage.entries)
    assert scales.nbytes == 512
