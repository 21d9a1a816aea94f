"""Seeded knapsack problems shaped like compression: per group, smaller options with larger divergence, some sharing a decoder."""

from __future__ import annotations

import numpy as np

from intaglio.solver import Cost, Option, Problem


def network(groups: int, options: int, seed: int) -> Problem:
    """One group per layer; option 0 leaves the layer unchanged, the others shrink it with noise in every quantity."""
    rng = np.random.default_rng(seed)
    decoders = {f"decoder{index}": int(size) for index, size in enumerate(rng.integers(200, 5000, 6))}
    layers = []
    for _ in range(groups):
        size_bytes = 4 * int(rng.lognormal(11, 1))
        latency_s = size_bytes * 2.5e-10
        sensitivity = rng.lognormal(-9, 1.5)
        layer = [Option(size_bytes, latency_s, 0.0)]
        for ratio in rng.uniform(0.03, 1.0, options - 1):
            divergence = sensitivity * np.exp(-6 * ratio) * rng.lognormal(0, 0.5)
            shared = (f"decoder{rng.integers(6)}",) if rng.random() < 0.8 else ()
            layer.append(Option(round(size_bytes * ratio), latency_s * rng.uniform(0.3, 1.4), float(divergence), shared))
        layers.append(tuple(layer))
    return Problem(tuple(layers), Cost(10_000, 1e-4, 0.0), decoders)
