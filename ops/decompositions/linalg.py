"""Linear algebra on second moments, which are positive semidefinite in theory only."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def lower_root(gram: Float64, ridge: float = 0.0) -> Float64:
    """Lower-triangular L with L·Lᵀ = gram + ridge·mean(diag)·I; the ridge grows until the sum is positive definite.

    Args:
        gram: (q, q), symmetric up to rounding.
        ridge: relative to the mean of the diagonal, or absolute where that is zero.
    """
    mean = float(np.trace(gram)) / len(gram)
    while True:
        shifted = gram.copy()
        np.fill_diagonal(shifted, np.diagonal(gram) + ridge * (mean if mean > 0 else 1.0))
        try:
            return np.asarray(scipy.linalg.cholesky(shifted, lower=True, overwrite_a=True))
        except np.linalg.LinAlgError:
            ridge = max(1e-10, 100 * ridge)


def solve_lower(root: Float64, right: Float64, *, transposed: bool = False) -> Float64:
    """L⁻¹·right, or L⁻ᵀ·right, for a lower-triangular L."""
    return np.asarray(scipy.linalg.solve_triangular(root, right, lower=True, trans=int(transposed)))


def balance(first: Float64, last: Float64) -> Float64:
    """What to multiply each component of the first factor with, and divide the last's by, for equal norms; 1 where one is 0.

    Args:
        first: norms of the first factor's components.
        last: norms of the last factor's components, of the same shape.
    """
    both = (first > 0) & (last > 0)
    return np.asarray(np.sqrt(np.divide(last, first, out=np.ones_like(first), where=both)))
