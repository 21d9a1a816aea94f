"""ONNX's own four-bit type, which opset 21 brings: the codes need no program but a `Cast`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..emit import Emitter, Spec
from .uniform import Uniform

NATIVE_OPSET = 21
"""The opset from which `Cast` reads INT4; models of it have IR version 10 or newer."""

INT4_TYPE: np.dtype[Any] = np.dtype(ml_dtypes.int4)


@dataclass(frozen=True)
class Native4:
    """INT4 initializers of the codes' shape. In memory each code takes a byte; in the file, half of one, at any count."""

    lowest: int = -8
    highest: int = 7
    unit: int = 1

    def min_opset(self, shape: tuple[int, ...]) -> int:
        """That of the type."""
        return NATIVE_OPSET

    def layout(self, shape: tuple[int, ...]) -> Spec:
        """int4 of the same shape."""
        return Spec(shape, INT4_TYPE)

    def pack(self, codes: NDArray[np.int16]) -> NDArray[np.generic]:
        """The codes as they are."""
        return np.asarray(codes.astype(INT4_TYPE))

    def unpack(self, packed: NDArray[np.generic], shape: tuple[int, ...]) -> NDArray[np.int8]:
        """Widen."""
        return packed.astype(np.int8)

    def emit(self, emitter: Emitter, packed: str, shape: tuple[int, ...]) -> str:
        """One `Cast`."""
        return emitter.node("Cast", [packed], emitter.name("u"), attributes={"to": 3})


INT4_NATIVE = Uniform(Native4(), "int4-native")
