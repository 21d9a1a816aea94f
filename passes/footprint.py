"""How much memory a run of a model takes, from its graph alone.

Operators run one after the other in topological order, and a value is freed after its last reader, as ONNX Runtime does it. Scratch memory
of kernels and the runtime's rounding of blocks are not known, so this is a bound for choices, not for accounts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from onnx import ModelProto

from .graph import reads, topological
from .modernize import modernize
from .values import infer, nbytes
from .weights import WeightStore

SHARE = 0.5
"""Share of the machine's memory that a run may take: data, other sessions and other programs have the rest."""


def peak_bytes(proto: ModelProto, shapes: Mapping[str, Sequence[int]], weights: WeightStore | None = None) -> int:
    """Most bytes of values between operators that are in memory at once; weights and inputs are left out.

    Args:
        proto: the model.
        shapes: lengths of the inputs that it leaves open; other names are passed over.
        weights: reads small tensors in external data.

    Raises:
        InputError: the model has a cycle, or the shapes contradict it.
    """
    model = modernize(proto, weights).proto
    inputs = {value.name for value in model.graph.input}
    values = infer(model, (), {name: lengths for name, lengths in shapes.items() if name in inputs})
    sizes = {name: nbytes(value) for name, value in values.items() if value.constant is None}
    nodes = topological(model.graph.node)
    last = {name: position for position, node in enumerate(nodes) for name in reads(node)}
    last |= {value.name: len(nodes) for value in model.graph.output}
    leaving: dict[int, int] = {}
    alive = peak = 0
    for position, node in enumerate(nodes):
        for name in node.output:
            alive += sizes.get(name, 0)
            leaving[last.get(name, position)] = leaving.get(last.get(name, position), 0) + sizes.get(name, 0)
        peak = max(peak, alive)
        alive -= leaving.pop(position, 0)
    return peak


def affordable_bytes() -> float:
    """What one run may take on this machine; infinite where the system does not say how much memory it has."""
    try:
        return SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return float("inf")
