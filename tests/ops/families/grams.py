"""Running a family's gram program, and the sums that it must yield."""

from __future__ import annotations

import itertools

import numpy as np

from intaglio.ops.families import FAMILIES, GramRequest, Use
from tests.ops.running import Array, emitter_for, run

SUMS = 1e-5
"""Float32 sums of at most some thousand products."""


def gram_of(use: Use, value: Array, request: GramRequest | None = None, *, opset: int = 18) -> tuple[Array, int]:
    """The sum of x xᵀ as ONNX Runtime accumulates it, (groups, n, n), and the number of rows behind it."""
    emitter = emitter_for(opset, functions=False, stem="gram")
    request = request or GramRequest(value.ndim, value.dtype != np.float32)
    gram = FAMILIES[use.key].gram(emitter, use, "value", request)
    total, rows = run(emitter, {"value": value}, [gram.total, gram.rows])
    groups, n = use.view.groups, use.view.n
    assert rows.size % (groups * n) == 0
    assert total.dtype == np.float32
    return total.reshape(groups, n, n), rows.size // (groups * n)


def expected_gram(rows: Array) -> Array:
    """Σ x xᵀ of rows (groups, k, n)."""
    exact = rows.astype(np.float64)
    return exact.transpose(0, 2, 1) @ exact


def windows(use: Use, image: Array) -> Array:
    """The patch at every output position of a Conv, as the operator's specification says: (groups, batch·positions, n).

    Positions run fastest, then samples; a patch is in (channel, kernel position) order.
    """
    kernel = use.view.shape[2:]
    axes = len(kernel)
    strides, dilations = use.ints("strides", [1] * axes), use.ints("dilations", [1] * axes)
    mode = use.text("auto_pad", "NOTSET")
    pads = use.ints("pads", [0] * 2 * axes)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    if mode == "VALID":
        pads = [0] * 2 * axes
    if mode.startswith("SAME"):
        sizes = image.shape[2:]
        total = [max((-(-size // s) - 1) * s + r - size, 0) for size, s, r in zip(sizes, strides, reach, strict=True)]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = [*small, *large] if mode == "SAME_UPPER" else [*large, *small]
    padded = np.pad(image, [(0, 0), (0, 0), *((pads[i], pads[i + axes]) for i in range(axes))])
    counts = [(size - r) // s + 1 for size, r, s in zip(padded.shape[2:], reach, strides, strict=True)]
    patches = []
    for position in itertools.product(*(range(count) for count in counts)):
        where = tuple(slice(p * s, p * s + r, d) for p, s, r, d in zip(position, strides, reach, dilations, strict=True))
        patches.append(padded[(slice(None), slice(None), *where)].reshape(len(image), use.view.groups, use.view.n))
    stacked = np.stack(patches)  # positions, batch, groups, n
    return stacked.transpose(2, 1, 0, 3).reshape(use.view.groups, -1, use.view.n)


def outputs(use: Use, weight: Array, rows: Array) -> Array:
    """W·x of every row: (groups, k, m)."""
    return rows @ use.view.matrix(weight).transpose(0, 2, 1)
