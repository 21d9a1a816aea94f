"""What a storage has to offer."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..emit import Array, Emitter, Spec


class Storage(Protocol):
    """A way to write a float array with fewer bits, exactly priced before any array exists."""

    @property
    def name(self) -> str:
        """The name in plans and reports."""
        ...

    def accepts(self, array: Spec) -> str | None:
        """None when the storage can hold an array of this shape and dtype, else the reason why not."""
        ...

    def layout(self, array: Spec, axis: int) -> tuple[Spec, ...]:
        """Shapes and dtypes of the packed arrays; `axis` is the axis that carries one scale per entry."""
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
