"""Codes of variable width that fit their bytes: what is shortened where they would not."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from intaglio.ops.storage import Grid
from intaglio.ops.storage.planes import Code, Planes

Float32 = NDArray[np.float32]


def shortened(storage: Planes, grid: Grid, values: Float32, codes: NDArray[np.int16]) -> NDArray[np.int16]:
    """Codes that fit the storage's bytes: those that lose least per bit go to the next shorter code towards zero.

    Args:
        storage: says how many bytes there are.
        grid: of the codes.
        values: that they stand for, of any shape.
        codes: the nearest ones; not changed.
    """
    room = 8 * storage.capacity(codes.shape) - 1
    codes = codes.copy()
    lengths, lowest, shorter = storage.code.lengths, storage.code.lowest, _shorter(storage.code)
    flat, exact = codes.reshape(-1), (values / grid.scale).reshape(-1)
    while (excess := storage.code.bits(codes) - room) > 0:
        places = np.flatnonzero(flat != shorter[flat - lowest])
        here = flat[places]
        nearer = shorter[here - lowest]
        saved = lengths[here - lowest] - lengths[nearer - lowest]
        lost = (np.square(exact[places] - nearer) - np.square(exact[places] - here)) / saved
        few = np.argpartition(lost, min(excess, len(lost)) - 1)[:excess]
        few = few[np.argsort(lost[few], kind="stable")]
        enough = int(np.searchsorted(np.cumsum(saved[few]), excess)) + 1
        flat[places[few[:enough]]] = nearer[few[:enough]]
    return codes


def _shorter(code: Code) -> NDArray[np.int16]:
    """For each level from `lowest` on the next one towards zero that has fewer bits; itself where there is none."""
    found = []
    for level in range(code.lowest, code.highest + 1):
        towards = range(level, 0, -1) if level > 0 else range(level, 0)
        bits = code.lengths[level - code.lowest]
        less = (each - int(np.sign(level)) for each in towards)
        found.append(next((each for each in less if code.lengths[each - code.lowest] < bits), level))
    return np.array(found, np.int16)
