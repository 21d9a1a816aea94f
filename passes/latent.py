"""Arrays in training: what an optimizer may change of a stored array, and which values that can be written it stands for.

A *latent* is a flat array of floats. `project` gives the values that a model with the stored array would compute with, on exactly the
grid that will be written; `pull` carries a gradient with respect to these values back. Rounding is passed straight through (Bengio et
al., "Estimating or propagating gradients through stochastic neurons", 2013).

- On uniform grids codes change, and scales move (`passes.steps`). Codes of variable width never outgrow their bytes; where they would,
  those go towards zero that lose least for the bits they save.
- Sparse arrays keep their zeros where they are: no entry comes or goes, the others move between levels, across zero too.
- Levels of a scalar codebook and its scales move, and entries move between levels. Centroids of vectors move, and indices stay.
- Floats are what they are, half precision rounded.

Values are the array's entries, then levels and scales if these are trained. The code of an entry follows from the grid of the start: where
scales and levels move, all of their entries move along and none changes its code.

Must not fire on: weights of another type than float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from intaglio.ops.emit import Spec
from intaglio.ops.storage import Grid, ScalarStorage, Storage, is_scalar
from intaglio.ops.storage.codebook import Codebook
from intaglio.ops.storage.packing import Bits
from intaglio.ops.storage.planes import Planes
from intaglio.ops.storage.sparse import Sparse
from intaglio.ops.storage.vector import Vectors

from .shorten import shortened
from .steps import UNIT, Steps, channel_steps, grid_of, sparse_grid, steps_of

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

    @property
    def block(self) -> tuple[int, ...]:
        """Shape of the array that the first values form, whose gradients may be averaged in another basis; () for none."""
        ...

    def unit(self) -> float | Float32:
        """What counts as a large change of any value, or of each (n,): the root mean square at the start."""
        ...

    def project(self, values: Float32, out: Float32) -> None:
        """Write what the model would compute with.

        Args:
            values: (n,); those beyond the outermost level are brought back to it.
            out: `shape`.
        """
        ...

    def pull(self, values: Float32, array: Float32, gradient: Float32, out: Float32) -> None:
        """Write the gradient with respect to the values.

        Args:
            values: (n,), as `project` left them.
            array: `shape`, what the model computed with: the projection, perhaps rounded once more.
            gradient: `shape`, with respect to it.
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

    @property
    def block(self) -> tuple[int, ...]:
        """None: in another basis directions in which nothing is to be gained move too, and codes turn over for nothing."""
        return ()

    def unit(self) -> float | Float32:
        """Of the array."""
        return _size(self.array)

    def pull(self, values: Float32, array: Float32, gradient: Float32, out: Float32) -> None:
        """Straight through."""
        out[: self.array.size] = gradient.reshape(-1)


@dataclass(frozen=True, eq=False)
class Plain(_Whole):
    """Floats, written in a type that may be narrower.

    Attributes:
        dtype: that they are written in.
    """

    dtype: np.dtype[np.generic]

    @property
    def block(self) -> tuple[int, ...]:
        """The whole array."""
        return self.array.shape

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
    """Codes on a uniform grid, whose scales may move.

    Attributes:
        storage: of the codes.
        grid: that the array was stored on.
        steps: its scales; None where they stay.
    """

    storage: ScalarStorage
    grid: Grid
    steps: Steps | None = None

    @property
    def start(self) -> Float32:
        """The array itself, then the scales."""
        return np.concatenate([self.array.reshape(-1), *([] if self.steps is None else [self.steps.start])])

    def unit(self) -> float | Float32:
        """Of the array, and of each scale."""
        size = _size(self.array)
        return size if self.steps is None else np.concatenate([np.full(self.array.size, size, np.float32), self.steps.unit()])

    def project(self, values: Float32, out: Float32) -> None:
        """The nearest levels whose codes fit, on the scales as they are."""
        count = self.array.size
        codes = self.codes(values[:count])
        if self.steps is None:
            out[...] = self.grid.values(codes)
        else:
            np.multiply(codes - self.grid.zero, self.steps.spread(values[count:]), out=out)

    def codes(self, entries: Float32) -> NDArray[np.int16]:
        """The codes of the array's entries, of its shape."""
        grid, shaped = self.grid, entries.reshape(self.shape)
        np.clip(shaped, (grid.lowest - grid.zero) * grid.scale, (grid.highest - grid.zero) * grid.scale, out=shaped)
        codes = grid.nearest(shaped)
        return shortened(self.storage, grid, shaped, codes) if isinstance(self.storage, Planes) else codes

    def pull(self, values: Float32, array: Float32, gradient: Float32, out: Float32) -> None:
        """Straight through to entries; each scale gets the sum over those that it multiplies."""
        super().pull(values, array, gradient, out)
        count = self.array.size
        if self.steps is not None:
            self.steps.pull(values[count:], array, gradient, out[count:])

    def pack(self, values: Float32) -> Packed:
        """The codes with the scales."""
        count = self.array.size
        packed = self.storage.pack(self.codes(values[:count]), self.grid)
        assert packed is not None  # `codes` fit
        return packed if self.steps is None else self.steps.put(packed, values[count:])


@dataclass(frozen=True, eq=False)
class Supported(Rounded):
    """Codes on a uniform grid with a support, which stays: what is zero remains so, and what is not never becomes so."""

    def pull(self, values: Float32, array: Float32, gradient: Float32, out: Float32) -> None:
        """Straight through within the support; entries outside of it do not move."""
        super().pull(values, array, gradient, out)
        assert self.grid.support is not None
        out[: self.array.size] *= self.grid.support.reshape(-1)


@dataclass(frozen=True, eq=False)
class Levelled(_Whole):
    """Entries on the levels of a codebook, which may move with its scales.

    Attributes:
        storage: the codebook.
        packed: as stored: indices, ascending levels, scales.
        steps: the scales; None where they and the levels stay.
    """

    storage: Codebook
    packed: Packed
    steps: Steps | None = None

    @property
    def start(self) -> Float32:
        """The array itself, then levels, then scales."""
        return np.concatenate([self.array.reshape(-1), *([] if self.steps is None else [self.levels, self.steps.start])])

    @property
    def levels(self) -> Float32:
        """As stored."""
        return self.packed[1].astype(np.float32)

    @property
    def scale(self) -> Float32:
        """Of each channel as stored, broadcastable to the array."""
        return self.packed[2].astype(np.float32)

    def unit(self) -> float | Float32:
        """Of the array, a share of that of the levels, and of each scale."""
        size = _size(self.array)
        if self.steps is None:
            return size
        sizes = ((self.array.size, size), (len(self.levels), UNIT * _size(self.levels)))
        return np.concatenate([*(np.full(count, each, np.float32) for count, each in sizes), self.steps.unit()])

    def project(self, values: Float32, out: Float32) -> None:
        """The nearest levels, as they are."""
        entries, levels, scales = self._parts(values)
        shaped, scale, stored = entries.reshape(self.shape), self.scale, self.levels
        np.clip(shaped, stored[0] * scale, stored[-1] * scale, out=shaped)
        multiplier = scale if self.steps is None else self.steps.spread(scales)
        np.multiply(levels.astype(np.float32)[self._index(entries)], multiplier, out=out)

    def pull(self, values: Float32, array: Float32, gradient: Float32, out: Float32) -> None:
        """Straight through to entries; each level, and each scale, gets the sum over those that it stands for."""
        super().pull(values, array, gradient, out)
        if self.steps is not None:
            entries, levels, scales = self._parts(values)
            _, of_levels, of_scales = np.split(out, self._ends)
            product = gradient * self.steps.spread(scales)
            of_levels[...] = np.bincount(self._index(entries).reshape(-1), product.reshape(-1), len(levels))
            self.steps.pull(scales, array, gradient, of_scales)

    def pack(self, values: Float32) -> Packed:
        """Indices, levels and scales."""
        entries, levels, scales = self._parts(values)
        packed = (Bits(self.storage.width).pack(self._index(entries).astype(np.int16)), levels, *self.packed[2:])
        return packed if self.steps is None else self.steps.put(packed, scales)

    @property
    def _ends(self) -> tuple[int, int]:
        """Where entries and levels end."""
        return self.array.size, self.array.size + len(self.packed[1])

    def _parts(self, values: Float32) -> tuple[Float32, NDArray[np.float16], Float32]:
        """Entries, levels as they are written, and scales.

        Levels that pass another are brought back to it, and those larger than twice the largest at the start to that.
        """
        entries, levels, scales = np.split(values, self._ends)
        if self.steps is None:
            return entries, np.asarray(self.packed[1], np.float16), scales
        limit = 2 * np.abs(self.levels).max()
        np.maximum.accumulate(np.clip(levels, -limit, limit, out=levels), out=levels)
        return entries, levels.astype(np.float16), scales

    def _index(self, entries: Float32) -> NDArray[np.int64]:
        """The nearest levels at the start, of the array's shape."""
        levels = self.levels
        return np.searchsorted((levels[1:] + levels[:-1]) / 2, entries.reshape(self.shape) / self.scale)


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

    @property
    def block(self) -> tuple[int, ...]:
        """None: entries of a table lie in no order."""
        return ()

    def unit(self) -> float:
        """Of the table."""
        return _size(self.start)

    def project(self, values: Float32, out: Float32) -> None:
        """Look each entry up in the table as it can be written."""
        table = self._written(values).astype(np.float32).reshape(-1)
        np.multiply(table[self.places], self.scale, out=out)

    def pull(self, values: Float32, array: Float32, gradient: Float32, out: Float32) -> None:
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


def latent_of(storage: Storage, packed: Packed, spec: Spec, axis: int, *, scales: bool = True) -> Latent | str:
    """What can be trained of a stored array, or the reason why nothing can.

    Args:
        storage: that it is written in.
        packed: as the storage wrote it.
        spec: what it decodes to.
        axis: its channel axis.
        scales: whether scales, and levels of scalar codebooks, are trained too.
    """
    if spec.dtype != np.float32:
        return f"a weight of {spec.dtype}: only float32 is tuned"
    array = np.asarray(storage.decode(packed, spec), np.float32)
    if isinstance(storage, Sparse):
        steps = channel_steps(packed, len(packed) - 1) if scales else None
        return Supported(array, storage, sparse_grid(storage, packed, spec, axis), steps)
    if is_scalar(storage):
        steps = steps_of(storage, packed, spec, axis) if scales else None
        return Rounded(array, storage, grid_of(storage, packed, spec, axis), steps)
    if isinstance(storage, Codebook):
        return Levelled(array, storage, packed, channel_steps(packed, 2) if scales else None)
    if isinstance(storage, Vectors):
        return _tabled(storage, packed, spec)
    if len(packed) == 1 and packed[0].dtype.kind == "f":
        return Plain(array, packed[0].dtype)
    return f"storage {storage.name} cannot be tuned"


def within_cells(latent: Rounded | Levelled, aim: Float32, stored: Float32 | None = None) -> Float32:
    """Values with entries as near to an aim as the array's levels allow: their projection is the array as it was stored, or another.

    An optimizer that starts from the levels themselves moves nothing until, all at once, entries have gone half a step. So entries start
    where they would be without rounding, or as far that way as their level reaches.

    Args:
        latent: of entries that go to levels.
        aim: (entries,).
        stored: (entries,), a projection with scales and levels of the start; the array as it was stored if None.
    """
    start, out = latent.start, np.empty(latent.shape, np.float32)
    stored = start[: out.size] if stored is None else stored
    values = np.concatenate([aim, start[out.size :]])
    entries = values[: out.size]
    for _ in range(_HALVINGS):
        latent.project(values, out)
        off = out.reshape(-1) != stored
        if not off.any():
            return values
        entries[off] = (entries[off] + stored[off]) / 2
    entries[...] = stored
    return values


def settled(latent: Latent, values: Float32, start: Float32) -> Float32:
    """Values with the same projection that lie well within their cells: a place to begin anew.

    An optimizer that has come to rest leaves entries that were torn between two levels right on the border, where the first large step
    would turn over all of them at once. Entries that are on the level where they began go back to where they began, others half the way
    to their level. Scales and levels stay where they are.

    Args:
        latent: of any kind; only entries that go to levels are moved.
        values: (n,).
        start: (n,), where values began.
    """
    if not isinstance(latent, (Rounded, Levelled)):
        return values
    count, found = latent.array.size, values.copy()
    here, before = (_cells(latent, each[:count]) for each in (values, start))
    found[:count] = within_cells(latent, np.where(here == before, start[:count], (values[:count] + here) / 2), here)[:count]
    return found


def _cells(latent: Rounded | Levelled, entries: Float32) -> Float32:
    """(entries,): the projection with scales and levels of the start, without a change to the entries."""
    out = np.empty(latent.shape, np.float32)
    latent.project(np.concatenate([entries, latent.start[out.size :]]), out)
    return out.reshape(-1)


def scattered(latent: Rounded | Levelled, rng: np.random.Generator) -> Float32:
    """An aim for an array whose entries before rounding are not known: anywhere within half a step, or half a unit."""
    step = latent.grid.scale if isinstance(latent, Rounded) else np.float32(_size(latent.array))
    away = rng.uniform(-0.5, 0.5, latent.shape).astype(np.float32)
    return (latent.array + away * step).reshape(-1)


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
