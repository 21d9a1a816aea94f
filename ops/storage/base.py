"""What a storage has to offer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from ..emit import Array, Emitter, Program, Spec
from .grid import Grid
from .scaling import Blocks
from .table import Table


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as integers, for operators that compute in int8: weight = codes · scale along `axis`.

    Attributes:
        codes: name of an int8 value of the weight's shape; its zero point is 0.
        scale: name of a float32 value of one dimension, one entry per entry of `axis`, all positive.
        axis: the weight's axis that the scales lie on.
    """

    codes: str
    scale: str
    axis: int


class Storage(Protocol):
    """A way to write a float array with fewer bits, exactly priced before any array exists."""

    @property
    def name(self) -> str:
        """The name in plans and reports."""
        ...

    @property
    def arithmetics(self) -> tuple[str, ...] | None:
        """Names of the only arithmetics that read it, because it cannot be expanded to floats; None where any can."""
        ...

    def min_opset(self, array: Spec) -> int:
        """The lowest version of the default domain whose models can hold an array of this shape and dtype in this storage."""
        ...

    def accepts(self, array: Spec) -> str | None:
        """None when the storage can hold an array of this shape and dtype, else the reason why not."""
        ...

    def layout(self, array: Spec, axis: int) -> tuple[Spec, ...]:
        """Shapes and dtypes of the packed arrays; `axis` is the channel axis: scales differ along it."""
        ...

    def encode(
        self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None = None
    ) -> tuple[NDArray[np.generic], ...]:
        """Pack the values; `importance` broadcasts against the array and weighs squared errors when scales are searched."""
        ...

    def decode(self, packed: tuple[NDArray[np.generic], ...], spec: Spec) -> NDArray[np.generic]:
        """The values that the emitted program yields, of shape and dtype `spec`: the NumPy reference."""
        ...

    def emit(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, output: str | None = None) -> str:
        """Add the packed initializers and the program that yields an array of shape and dtype `spec`.

        Args:
            emitter: collects them.
            suffix: of the initializers' names.
            packed: from `encode`, or the specs of `layout`.
            spec: shape and dtype of the result.
            output: the result's name; None makes one up.

        Returns:
            The result's name.
        """
        ...

    def emit_integer(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, axis: int) -> IntegerWeight | None:
        """Add the packed initializers and the programs that yield the same weight as int8 codes and float32 scales.

        Args:
            emitter: collects them; unchanged when the answer is None.
            suffix: of the initializers' names.
            packed: from `encode`, or the specs of `layout`.
            spec: shape and dtype of the weight.
            axis: as given to `layout`.

        Returns:
            Names of what was emitted; None where the values are not int8 times one scale per channel. `requantize` then rounds
            what `emit` yields.
        """
        ...


class Expandable:
    """What storages share whose program yields floats: any arithmetic can read them."""

    arithmetics: ClassVar[tuple[str, ...] | None] = None


class ScalarStorage(Storage, Protocol):
    """A storage whose values lie on a uniform grid, so that codes may be chosen by anyone: `encode` is `pack` of the nearest ones."""

    def grid(self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None = None) -> Grid:
        """The grid that minimises the (weighted) squared error of rounding to nearest; arguments as for `encode`."""
        ...

    def pack(self, codes: NDArray[np.int16], grid: Grid) -> tuple[NDArray[np.generic], ...] | None:
        """Packed arrays of codes within `lowest`…`highest` on a grid that `grid` or `Grid.coarser` returned.

        None where the codes take more room than `layout` gives them, which only storages of variable width do. Ask again with
        the codes of `Grid.coarser`.
        """
        ...


def is_scalar(storage: Storage) -> TypeGuard[ScalarStorage]:
    """Whether a storage's values lie on a uniform grid."""
    return callable(getattr(storage, "grid", None)) and callable(getattr(storage, "pack", None))


class TableStorage(Storage, Protocol):
    """A storage whose values come from a table, so that indices may be chosen by anyone: `encode` writes the nearest ones."""

    def runs(self, shape: tuple[int, ...], axis: int) -> Blocks:
        """Which entries of an array one index stands for; the indices count through (outer, count, inner)."""
        ...

    def table(self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None = None) -> Table:
        """Centroids that minimise the (weighted) squared error of the nearest ones; arguments as for `encode`."""
        ...

    def write(self, index: NDArray[np.int16], table: Table) -> tuple[NDArray[np.generic], ...]:
        """Packed arrays of an index for each run, (outer, count, inner) in any shape, and of what `table` or `Table.moved` returned."""
        ...


def is_tabular(storage: Storage) -> TypeGuard[TableStorage]:
    """Whether a storage's values come from a table."""
    return callable(getattr(storage, "table", None)) and callable(getattr(storage, "write", None))


def readers(storage: Storage) -> tuple[str, ...] | None:
    """Names of the only arithmetics that read a storage, because it cannot be expanded to floats; None where any can."""
    return storage.arithmetics


def refusal(array: Spec) -> str | None:
    """Why no packed storage can hold an array: it is empty, or has no axis; None otherwise."""
    if 0 in array.shape:
        return "an empty array"
    return None if array.shape else "a scalar has no channels"


INTEGER_CODES = Program(
    "IntegerCodes",
    """<unit> (q) => (c) {
        share = Constant <value: tensor = @unit> ()
        code = Cast <to = 3> (q)
        f = Cast <to = 1> (code)
        v = Mul (f, share)
        c = Cast <to = 3> (v)
    }""",
)
"""int8 codes, or bytes that are read as such, times a share that leaves them whole."""
