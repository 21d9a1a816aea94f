"""Floating-point storage: the model's own type, or half precision widened at load."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..emit import Array, Emitter, Spec, onnx_type
from .base import Expandable, IntegerWeight

_MAX_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Same(Expandable):
    """The array as it is: exact."""

    name: str = "float"

    def min_opset(self, array: Spec) -> int:
        """Any that the product reads."""
        return 7

    def accepts(self, array: Spec) -> str | None:
        """Always."""
        return None

    def layout(self, array: Spec, axis: int) -> tuple[Spec, ...]:
        """The array itself."""
        return (array,)

    def encode(
        self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None = None
    ) -> tuple[NDArray[np.generic], ...]:
        """The array itself."""
        return (array,)

    def decode(self, packed: tuple[NDArray[np.generic], ...], spec: Spec) -> NDArray[np.generic]:
        """The array itself."""
        return packed[0]

    def emit(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, output: str | None = None) -> str:
        """A plain initializer."""
        if output is None:
            return emitter.constant(suffix, packed[0])
        emitter.initializers[output] = packed[0]
        return output

    def emit_integer(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, axis: int) -> IntegerWeight | None:
        """None: these are no integers."""
        return None


@dataclass(frozen=True)
class Half(Expandable):
    """IEEE half precision behind one `Cast`, which ONNX Runtime folds when it loads the model."""

    name: str = "fp16"

    def min_opset(self, array: Spec) -> int:
        """Any that the product reads."""
        return 7

    def accepts(self, array: Spec) -> str | None:
        """Only types wider than two bytes gain anything."""
        return None if array.dtype.itemsize > 2 else f"already {array.dtype}"

    def layout(self, array: Spec, axis: int) -> tuple[Spec, ...]:
        """The same shape in float16."""
        return (Spec(array.shape, np.dtype(np.float16)),)

    def encode(
        self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None = None
    ) -> tuple[NDArray[np.generic], ...]:
        """Round to nearest; values beyond the range of half precision saturate."""
        return (np.clip(array, array.dtype.type(-_MAX_HALF), array.dtype.type(_MAX_HALF)).astype(np.float16),)

    def decode(self, packed: tuple[NDArray[np.generic], ...], spec: Spec) -> NDArray[np.generic]:
        """Widen."""
        return packed[0].astype(spec.dtype)

    def emit(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, output: str | None = None) -> str:
        """One initializer and one `Cast`."""
        return emitter.node("Cast", [emitter.constant(f"{suffix}.h", packed[0])], output, attributes={"to": onnx_type(spec.dtype)})

    def emit_integer(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, axis: int) -> IntegerWeight | None:
        """None: these are no integers."""
        return None


SAME = Same()
HALF = Half()
