"""A labelled model whose weight holds a component that harms, so that leaving it out provably lowers the loss."""

from __future__ import annotations

import numpy as np
import onnx

from tests.models import Array, parse

SIDE = 24
TRUE_RANK = 8
"""The one rank that low rank is offered at this size."""

HARM = 3.0
"""Singular value of the harmful component: larger than any true one, so that energy says to keep it."""


def parts() -> tuple[Array, Array]:
    """The true weight, of rank `TRUE_RANK`, and the harmful component, (SIDE, SIDE) each, uncorrelated."""
    rng = np.random.default_rng(5)
    left, right = (np.linalg.qr(rng.standard_normal((SIDE, SIDE)))[0] for _ in range(2))
    values = np.linspace(1.6, 1.0, TRUE_RANK)
    true = (left[:, :TRUE_RANK] * values) @ right[:, :TRUE_RANK].T
    return true, HARM * np.outer(left[:, TRUE_RANK], right[:, TRUE_RANK])


def harmed(samples: int = 800) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """The model y = W x with W true + harmful, and data whose labels are those of the true weight: x (N, SIDE), labels (N, SIDE)."""
    true, harmful = parts()
    text = f"net (float[N, {SIDE}] x) => (float[N, {SIDE}] y) {{ y = Gemm <transB = 1> (x, w) }}"
    x = np.random.default_rng(6).standard_normal((samples, SIDE)).astype(np.float32)
    return parse(text, {"w": (true + harmful).astype(np.float32)}), {"x": x, "labels": (x @ true.T).astype(np.float32)}
