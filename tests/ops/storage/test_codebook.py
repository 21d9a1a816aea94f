"""k-means levels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intaglio.ops.emit import spec_of
from intaglio.ops.storage import STORAGES
from intaglio.ops.storage.codebook import CODEBOOKS, fit_levels
from tests.ops.running import Array, normal


def error(name: str, array: Array, importance: Array | None = None) -> float:
    storage = STORAGES[name]
    weights = 1.0 if importance is None else importance
    return float((weights * np.square(storage.decode(storage.encode(array, 0, importance), spec_of(array)) - array)).mean())


@pytest.mark.parametrize(("count", "distortion"), [(4, 0.1175), (8, 0.03454), (16, 0.009497)])
def test_levels_of_gaussian_values_are_those_of_max(count: int, distortion: float) -> None:
    values = normal(1, 200_000)
    levels = fit_levels(values, np.ones(values.shape), count).astype(np.float64)
    attained = np.square(values[:, None] - levels).min(axis=1).mean()
    # Max, "Quantizing for minimum distortion", 1960, table I; a sample of this size is off by about a percent
    assert attained == pytest.approx(distortion, rel=0.03)


@given(st.integers(0, 2**16), st.integers(1, 40))
def test_few_distinct_values_are_kept(seed: int, repeats: int) -> None:
    values = np.repeat(np.random.default_rng(seed).choice(64, 4, replace=False), repeats).astype(np.float32)
    levels = fit_levels(values, np.ones(values.shape), 4).astype(np.float64)
    # a histogram of 8192 bins over a range of at most 63 places a value to within 63/8192, float16 to 2⁻¹¹ of 64
    assert np.abs(values[:, None] - levels).min(axis=1).max() <= 16  # no level is farther than the widest gap lets Lloyd's method stray
    assert (np.diff(levels) >= 0).all()


@pytest.mark.parametrize("width", [4, 3, 2])
def test_k_means_beats_a_uniform_grid_on_laplacian_values(width: int) -> None:
    array = np.random.default_rng(2).laplace(size=(64, 512)).astype(np.float32)
    assert error(f"kmeans{width}", array) < 0.95 * error(f"int{width}", array)


def test_channels_share_levels_in_units_of_their_own_spread() -> None:
    array = normal(3, 8, 2000)
    scaled = array * np.geomspace(1e-12, 1e12, 8, dtype=np.float32)[:, None]
    storage = CODEBOOKS[0]
    decoded = np.asarray(storage.decode(storage.encode(scaled, 0), spec_of(scaled)), np.float64)
    relative = np.square(decoded / scaled - 1)[np.abs(array) > 0.5]
    assert relative.mean() < 0.03  # a level is off by a tenth of the spread, and the values are half of it or more
