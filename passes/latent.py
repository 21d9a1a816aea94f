"""Arrays in training: what an optimizer may change of a stored array, and which values that can be written it stands for.

A *latent* is a flat array of floats. `project` gives the values that a model with the stored array would compute with, on exactly the
grid that will be written; `pull` carries a gradient with respect to these values back. Rounding is passed straight through (Bengio et
al., "Estimating or propagating gradients through stochastic neurons", 2013).

- Uniform grids keep their steps: codes change, scales do not. Codes of variable width never outgrow their bytes; where they would, those go
  towards zero that lose least for the bits they save.
- Sparse arrays keep their zeros where they are: no entry comes or goes, the others move between levels, across zero too.
- Levels of a scalar codebook stay, and entries move between them. Centroids of vectors move, and indices stay.
- Floats are what they are, half precision rounded.

Must not fire on: weights of another type than float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from intaglio.ops.emit import Spec
from intaglio.ops.storage import STORAGES, Grid, ScalarStorage, is_scalar
from intaglio.ops.storage.codebook import Codebook
from intaglio.ops.storage.packing import Bits
from intaglio.ops.storage.planes import Code, Planes
from intaglio.ops.storage.sparse import Sparse
from intaglio.ops.storage.vector import Vectors

Float32 = NDArray[np.float32]
Packed = tuple[NDArray[np.generic], ...]

_LEAST_UNIT = 1e-2
"""The unit of constants that are all but zero, as a share of what values in a network usually are: one."""


_HALVINGS = 30
"""Most times that the way from a level to an aim is halved."""


class Latent(Protocol):
    """One array in training. Nothing but the flat values changes."""

    @property
    def start(self) -> Float32:
        """(n,): values whose projection is the array as it was stored."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the projection."""
        ...

    def unit(self) -> float:
        """What counts as a large change of one value: the root mean square at the start."""
        ...

    def project(self, values: Float32, out: Float32) -> None:
        """Write what the model would compute with.

        Args:
            values: (n,); those beyond the outermost level are brought back to it.
            out: `shape`.
        """
        ...

    def pull(self, gradient: Float32, out: Float32) -> None:
        """Write the gradient with respect to the values.

        Args:
            gradient: `shape`.
            out: (n,).
        """
        ...

    def pack(self, values: Float32) -> Packed:
        """The arrays to be written for the values, as the storage packs them."""
        ...


@dataclass(frozen=True, eq=False)
class _Whole:
    """A latent for every entry of the array, to which gradients pass straight through.

    Attributes:
        array: float32, as stored.
    """

    array: Float32

    @property
    def start(self) -> Float32:
        """The array itself."""
        return self.array.reshape(-1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.array.shape

    def unit(self) -> float:
        """Of the array."""
        return _size(self.array)

    def pull(self, gradient: Float32, out: Float32) -> None:
        """Straight through."""
        out[...] = gradient.reshape(-1)


@dataclass(frozen=True, eq=False)
class Plain(_Whole):
    """Floats, written in a type that may be narrower.

    Attributes:
        dtype: that they are written in.
    """

    dtype: np.dtype[np.generic]

    def project(self, values: Float32, out: Float32) -> None:
        """Round to the type; values beyond its range saturate."""
        limit = float(np.finfo(np.float16 if self.dtype == np.float16 else np.float32).max)
        np.clip(values, -limit, limit, out=values)
        out.reshape(-1)[...] = values.astype(self.dtype)

    def pack(self, values: Float32) -> Packed:
        """One array."""
        return (values.reshape(self.shape).astype(self.dtype),)


@dataclass(frozen=True, eq=False)
class Rounded(_Whole):
    """Codes on a uniform grid that stays as it is.

    Attributes:
        storage: of the codes.
        grid: that they lie on.
    """

    storage: ScalarStorage
    grid: Grid

    def project(self, values: Float32, out: Float32) -> None:
        """The nearest levels whose codes fit."""
        out[...] = self.grid.values(self.codes(values))

    def codes(self, values: Float32) -> NDArray[np.int16]:
        """The codes of the values, of the array's shape."""
        grid, shaped = self.grid, values.reshape(self.shape)
        np.clip(shaped, (grid.lowest - grid.zero) * grid.scale, (grid.highest - grid.zero) * grid.scale, out=shaped)
        codes = grid.nearest(shaped)
        return shortened(self.storage, grid, shaped, codes) if isinstance(self.storage, Planes) else codes

    def pack(self, values: Float32) -> Packed:
        """The codes with the grid's scales."""
        packed = self.storage.pack(self.codes(values), self.grid)
        assert packed is not None  # `codes` fit
        return packed


@dataclass(frozen=True, eq=False)
class Supported(Rounded):
    """Codes on a uniform grid with a support, which stays: what is zero remains so, and what is not never becomes so."""

    def pull(self, gradient: Float32, out: Float32) -> None:
        """Straight through within the support; entries outside of it do not move."""
        support = self.grid.support
        assert support is not None
        np.multiply(gradient, support, out=out.reshape(self.shape))


@dataclass(frozen=True, eq=False)
class Levelled(_Whole):
    """Entries on the levels of a codebook, which stay.

    Attributes:
        storage: the codebook.
        packed: as stored.
        scale: of each channel, broadcastable to the array.
    """

    storage: Codebook
    packed: Packed
    scale: Float32

    def project(self, values: Float32, out: Float32) -> None:
        """The nearest levels."""
        levels = self.packed[1].astype(np.float32)
        shaped = values.reshape(self.shape)
        np.clip(shaped, levels[0] * self.scale, levels[-1] * self.scale, out=shaped)
        np.multiply(levels[self._index(shaped)], self.scale, out=out)

    def pack(self, values: Float32) -> Packed:
        """Indices; levels and scales as they were."""
        codes = self._index(values.reshape(self.shape)).astype(np.int16)
        return Bits(self.storage.width).pack(codes), *self.packed[1:]

    def _index(self, values: Float32) -> NDArray[np.int64]:
        levels = self.packed[1].astype(np.float32)
        return np.searchsorted((levels[1:] + levels[:-1]) / 2, values / self.scale)


@dataclass(frozen=True, eq=False)
class Tabled:
    """Entries of a table of centroids, which move; the indices stay.

    Attributes:
        packed: as stored: indices, centroids, scales.
        places: flat place in the table of each entry of the array.
        scale: of each entry of the array.
    """

    packed: Packed
    places: NDArray[np.int64]
    scale: Float32

    @property
    def start(self) -> Float32:
        """The table."""
        return self.packed[1].astype(np.float32).reshape(-1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.places.shape

    def unit(self) -> float:
        """Of the table."""
        return _size(self.start)

    def project(self, values: Float32, out: Float32) -> None:
        """Look each entry up in the table as it can be written."""
        table = self._written(values).astype(np.float32).reshape(-1)
        np.multiply(table[self.places], self.scale, out=out)

    def pull(self, gradient: Float32, out: Float32) -> None:
        """Each centroid gets the sum over the entries that it stands for."""
        out[...] = np.bincount(self.places.reshape(-1), (gradient * self.scale).reshape(-1), len(out))

    def pack(self, values: Float32) -> Packed:
        """The table; indices and scales as they were."""
        return self.packed[0], self._written(values), *self.packed[2:]

    def _written(self, values: Float32) -> NDArray[np.float16]:
        """The table in half precision, no entry larger than the largest was: scales were limited for that."""
        table = self.packed[1]
        limit = np.abs(table).max().astype(np.float32)
        np.clip(values, -limit, limit, out=values)
        return values.reshape(table.shape).astype(np.float16)


def latent_of(name: str, packed: Packed, spec: Spec, axis: int) -> Latent | str:
    """What can be trained of a stored array, or the reason why nothing can.

    Args:
        name: of its storage.
        packed: as the storage wrote it.
        spec: what it decodes to.
        axis: its channel axis.
    """
    if spec.dtype != np.float32:
        return f"a weight of {spec.dtype}: only float32 is tuned"
    storage = STORAGES[name]
    array = np.asarray(storage.decode(packed, spec), np.float32)
    if isinstance(storage, Sparse):
        return Supported(array, storage, sparse_grid(storage, packed, spec, axis))
    if is_scalar(storage):
        return Rounded(array, storage, grid_of(storage, packed, spec, axis))
    if isinstance(storage, Codebook):
        return Levelled(array, storage, packed, packed[2].astype(np.float32))
    if isinstance(storage, Vectors):
        return _tabled(storage, packed, spec)
    if len(packed) == 1 and packed[0].dtype.kind == "f":
        return Plain(array, packed[0].dtype)
    return f"storage {name} cannot be tuned"


def within_cells(latent: Latent, aim: Float32, stored: Float32 | None = None) -> Float32:
    """Values as near to an aim as the array's levels allow: their projection is the array as it was stored, or another.

    An optimizer that starts from the levels themselves moves nothing until, all at once, entries have gone half a step. So entries start
    where they would be without rounding, or as far that way as their level reaches.

    Args:
        latent: of entries that go to levels.
        aim: (n,).
        stored: (n,), a projection; that of `latent.start` if None.
    """
    stored, out = latent.start if stored is None else stored, np.empty(latent.shape, np.float32)
    values = np.array(aim, np.float32)
    for _ in range(_HALVINGS):
        latent.project(values, out)
        off = out.reshape(-1) != stored
        if not off.any():
            return values
        values[off] = (values[off] + stored[off]) / 2
    return stored.copy()


def settled(latent: Latent, values: Float32, start: Float32) -> Float32:
    """Values with the same projection that lie well within their cells: a place to begin anew.

    An optimizer that has come to rest leaves entries that were torn between two levels right on the border, where the first large step
    would turn over all of them at once. Entries that are on the level where they began go back to where they began, others half the way
    to their level.

    Args:
        latent: of any kind; only entries that go to levels are moved.
        values: (n,).
        start: (n,), where entries began.
    """
    if not isinstance(latent, (Rounded, Levelled)):
        return values
    here, before = (_projected(latent, each) for each in (values, start))
    return within_cells(latent, np.where(here == before, start, (values + here) / 2), here)


def _projected(latent: Latent, values: Float32) -> Float32:
    """(n,): the projection, without a change to the values."""
    out = np.empty(latent.shape, np.float32)
    latent.project(values.copy(), out)
    return out.reshape(-1)


def scattered(latent: Rounded | Levelled, rng: np.random.Generator) -> Float32:
    """An aim for an array whose entries before rounding are not known: anywhere within half a step, or half a unit."""
    step = latent.grid.scale if isinstance(latent, Rounded) else np.float32(latent.unit())
    away = rng.uniform(-0.5, 0.5, latent.shape).astype(np.float32)
    return (latent.array + away * step).reshape(-1)


def grid_of(storage: ScalarStorage, packed: Packed, spec: Spec, axis: int) -> Grid:
    """The grid that packed arrays lie on.

    Packed arrays are codes and then what the grid holds. So other codes are packed with it: those of all zeros and all ones decode to two
    levels, which tell the steps and the zero points.
    """
    tiny = storage.grid(np.zeros((1,) * len(spec.shape), np.float32), 0)
    if isinstance(storage, Planes):
        scale = packed[2].astype(np.float32)
        return Grid(scale, np.zeros((1,) * scale.ndim, np.float32), tiny.lowest, tiny.highest, axis, packed[2:])
    holding = replace(tiny, stored=packed[1:], axis=axis)

    def level(codes: NDArray[np.int16]) -> Float32:
        written = storage.pack(codes, holding)
        assert written is not None  # codes of fixed width always fit
        return np.asarray(storage.decode(written, spec), np.float32)

    low, high = (level(np.full(spec.shape, code, np.int16)) for code in (0, 1))
    zero = np.rint(low / (low - high)).astype(np.int16)
    side = np.where(zero < tiny.highest, np.int16(1), np.int16(-1))
    scale = level(zero + side) * side  # one step from zero: exactly what the decoder multiplies by
    steps, zeros = (_narrowed(part.astype(np.float32), axis) for part in (scale, zero))
    return Grid(steps, zeros, tiny.lowest, tiny.highest, axis, packed[1:])


def sparse_grid(storage: Sparse, packed: Packed, spec: Spec, axis: int) -> Grid:
    """The grid of a sparse array, with its support, read off what was packed."""
    least, scale, zero = int(packed[-2][0]), packed[-1].astype(np.float32), np.zeros((1,) * len(spec.shape), np.float32)
    support = storage.codes(packed, spec.shape) != 0
    most = storage.highest(least)
    return Grid(scale, zero, -most, most, axis, packed[-2:], support=support, least=least)


def _narrowed(part: Float32, axis: int) -> Float32:
    """The same with length 1 along every axis but the given one, if it is constant there."""
    first = part[tuple(slice(None) if i == axis else slice(1) for i in range(part.ndim))]
    return np.ascontiguousarray(first if (part == first).all() else part)


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


def _tabled(storage: Vectors, packed: Packed, spec: Spec) -> Tabled:
    """Where in the table each entry is looked up, and by what it is multiplied: decoded from tables of numbers and of ones.

    Tables have at most 1024 entries, and half precision holds whole numbers up to 2048.
    """
    table = packed[1]
    numbers = np.arange(table.size, dtype=np.float16).reshape(table.shape)
    places = storage.decode((packed[0], numbers, np.ones_like(packed[2])), spec)
    scale = storage.decode((packed[0], np.ones_like(table), packed[2]), spec)
    return Tabled(packed, places.astype(np.int64), np.asarray(scale, np.float32))


def _size(values: Float32) -> float:
    """The root mean square, and `_LEAST_UNIT` at least."""
    return max(float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))), 0.0) or _LEAST_UNIT
