"""Bias correction: the mean that a layer's output loses when its weight is approximated."""

from __future__ import annotations

import numpy as np

from ..moment import Float64, Moment


def bias_shift(weight: Float64, approximation: Float64, moment: Moment) -> Float64:
    """(W − Ŵ)·E[x], (groups, m): added to the layer's output, it leaves the output's mean as it was (Nagel et al. 2019, arXiv 1906.04721).

    Args:
        weight: (groups, m, n).
        approximation: of the same shape.
        moment: of the layer's input.

    Returns:
        Zeros where the mean of the input is not known.
    """
    if moment.mean is None:
        return np.zeros(weight.shape[:2])
    return np.asarray(np.einsum("gmn,gn->gm", weight, moment.mean) - np.einsum("gmn,gn->gm", approximation, moment.mean))
