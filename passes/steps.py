"""Steps of a grid: which numbers of a stored array are its scales, what they multiply, and how they are trained.

A scalar storage packs an array's codes with scales: floats, one for each channel or block. In training they are further values behind the
array (Esser et al., "Learned step size quantization", 2020), and what the model computes with are scales of the type that is written.

Must not fire on: powers of two, between which nothing can be written. They stay, and so do zero points and the multiples of
double-quantized scales, whose units move.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from intaglio.ops.emit import Spec
from intaglio.ops.storage import Grid, ScalarStorage
from intaglio.ops.storage.planes import Planes
from intaglio.ops.storage.scaling import BFLOAT16, SMALLEST
from intaglio.ops.storage.sparse import Sparse

Float32 = NDArray[np.float32]
Packed = tuple[NDArray[np.generic], ...]
_Entry = TypeVar("_Entry", bound=np.generic)

UNIT = 0.1
"""What counts as a large change of a scale, as a share of it."""

_REACH = 4.0
"""Scales grow and shrink at most by this factor."""

_SAFE = 2.0**100
"""Scales that grow stay below: far from the end of float32, whatever they are multiplied by."""

_MOST = 1 << 22
"""Scales whose places can be told from products of float32."""


@dataclass(frozen=True, eq=False)
class Steps:
    """The scales of a stored array.

    Attributes:
        number: place of their array among the packed ones.
        stored: that array: positive, of bfloat16 or float32.
        places: for each entry of the array, broadcastable to it, the flat place of its scale.
        factor: float32, broadcastable to the array: what the decoder multiplies the scale by before the code.
    """

    number: int
    stored: NDArray[np.generic]
    places: NDArray[np.int32]
    factor: Float32

    @property
    def start(self) -> Float32:
        """(k,): as stored."""
        return self.stored.astype(np.float32).reshape(-1)

    def unit(self) -> Float32:
        """(k,): a share of each."""
        return np.float32(UNIT) * self.start

    def written(self, values: Float32) -> NDArray[np.generic]:
        """The scales as they are packed.

        Args:
            values: (k,); those out of reach are brought back.
        """
        start = self.start
        low = np.minimum(start, np.maximum(start / np.float32(_REACH), np.float32(SMALLEST)))
        np.clip(values, low, np.maximum(start, np.minimum(start * np.float32(_REACH), np.float32(_SAFE))), out=values)
        return values.reshape(self.stored.shape).astype(self.stored.dtype)

    def spread(self, values: Float32) -> Float32:
        """The steps, broadcastable to the array: exactly what the decoder multiplies codes by.

        Args:
            values: (k,); those out of reach are brought back.
        """
        return np.asarray(self.written(values).astype(np.float32).reshape(-1)[self.places] * self.factor, np.float32)

    def put(self, packed: Packed, values: Float32) -> Packed:
        """Packed arrays with the scales in place of those that were stored."""
        return (*packed[: self.number], self.written(values), *packed[self.number + 1 :])

    def pull(self, values: Float32, array: Float32, gradient: Float32, out: Float32) -> None:
        """Write the gradient with respect to the scales: their entries are proportional to them.

        Args:
            values: (k,), of the projection.
            array: projected.
            gradient: with respect to it.
            out: (k,).
        """
        product = array * gradient
        single = tuple(i for i, length in enumerate(self.places.shape) if length == 1)
        sums = np.bincount(self.places.reshape(-1), product.sum(axis=single).reshape(-1), len(out))
        out[...] = sums / self.written(values).astype(np.float32).reshape(-1)


def channel_steps(packed: Packed, number: int) -> Steps:
    """Scales that are broadcastable to the array.

    Args:
        packed: as stored.
        number: place of the scales among the packed arrays.
    """
    stored = packed[number]
    places = np.arange(stored.size, dtype=np.int32).reshape(stored.shape)
    return Steps(number, stored, places, np.ones((1,) * stored.ndim, np.float32))


def steps_of(storage: ScalarStorage, packed: Packed, spec: Spec, axis: int) -> Steps | None:
    """The scales that can be trained; None where there are none.

    Args:
        storage: of the codes.
        packed: as it wrote them.
        spec: what they decode to.
        axis: the channel axis.
    """
    numbers = [number for number, part in enumerate(packed) if part.dtype in (np.float32, BFLOAT16)]
    if len(numbers) != 1 or packed[numbers[0]].size > _MOST:
        return None
    (number,) = numbers
    stored = packed[number]
    if isinstance(storage, Planes):
        return channel_steps(packed, number)

    def step(numbers: Float32) -> Float32:
        other = (*packed[:number], numbers.reshape(stored.shape), *packed[number + 1 :])
        return _one_step(storage, other, spec, axis, zero)

    zero = _zero_points(storage, packed, spec, axis)
    factor = step(np.ones(stored.size, np.float32))
    places = np.rint(step(np.arange(stored.size, dtype=np.float32)) / factor).astype(np.int32)
    return Steps(number, stored, _narrowed(places, axis), _narrowed(factor, axis))


def grid_of(storage: ScalarStorage, packed: Packed, spec: Spec, axis: int) -> Grid:
    """The grid that packed arrays lie on."""
    tiny = _tiny(storage, spec)
    if isinstance(storage, Planes):
        scale = packed[2].astype(np.float32)
        return Grid(scale, np.zeros((1,) * scale.ndim, np.float32), tiny.lowest, tiny.highest, axis, packed[2:])
    zero = _zero_points(storage, packed, spec, axis)
    steps, zeros = (_narrowed(part.astype(np.float32), axis) for part in (_one_step(storage, packed, spec, axis, zero), zero))
    return Grid(steps, zeros, tiny.lowest, tiny.highest, axis, packed[1:])


def sparse_grid(storage: Sparse, packed: Packed, spec: Spec, axis: int) -> Grid:
    """The grid of a sparse array, with its support, read off what was packed."""
    least, scale, zero = int(packed[-2][0]), packed[-1].astype(np.float32), np.zeros((1,) * len(spec.shape), np.float32)
    support = storage.codes(packed, spec.shape) != 0
    most = storage.highest(least)
    return Grid(scale, zero, -most, most, axis, packed[-2:], support=support, least=least)


def _tiny(storage: ScalarStorage, spec: Spec) -> Grid:
    """A grid of one entry: it tells the codes."""
    return storage.grid(np.zeros((1,) * len(spec.shape), np.float32), 0)


def _level(storage: ScalarStorage, packed: Packed, spec: Spec, axis: int, codes: NDArray[np.int16]) -> Float32:
    """What other codes decode to: packed arrays of fixed width are codes and then what the grid holds."""
    written = storage.pack(codes, replace(_tiny(storage, spec), stored=packed[1:], axis=axis))
    assert written is not None  # codes of fixed width always fit
    return np.asarray(storage.decode(written, spec), np.float32)


def _zero_points(storage: ScalarStorage, packed: Packed, spec: Spec, axis: int) -> NDArray[np.int16]:
    """Of each entry: two levels tell them."""
    low, high = (_level(storage, packed, spec, axis, np.full(spec.shape, code, np.int16)) for code in (0, 1))
    return np.rint(low / (low - high)).astype(np.int16)


def _one_step(storage: ScalarStorage, packed: Packed, spec: Spec, axis: int, zero: NDArray[np.int16]) -> Float32:
    """One step from zero, of each entry: exactly what the decoder multiplies by."""
    side = np.where(zero < _tiny(storage, spec).highest, np.int16(1), np.int16(-1))
    return _level(storage, packed, spec, axis, zero + side) * side


def _narrowed(part: NDArray[_Entry], axis: int) -> NDArray[_Entry]:
    """The same with length 1 along every axis but the given one, if it is constant there."""
    first = part[tuple(slice(None) if i == axis else slice(1) for i in range(part.ndim))]
    return np.ascontiguousarray(first if (part == first).all() else part)
