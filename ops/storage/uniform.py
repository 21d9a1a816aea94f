"""Storages on a uniform grid: a packing of codes × a partition × a scale format × whether zero may lie anywhere.

The decode programs use operators that ONNX Runtime folds when the session is created (`DequantizeLinear` on constants would be kept).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..emit import Array, Emitter, Program, Spec, float_attribute
from .base import INTEGER_CODES, Expandable, IntegerWeight, Storage, refusal
from .grid import Grid, largest_of
from .packing import MODERN_OPSET, Bits, Bytes, Packing, Trits
from .scaling import BRAIN_FLOAT, LARGEST, Blocks, Channels, Double, Partition, PowerOfTwo, ScaleFormat, emit_flat_scale, emit_scaled
from .search import search_scales

_INTEGER_DIFFERENCES = Program(
    "IntegerDifferences",
    """<unit> (q, zero) => (c) {
        share = Constant <value: tensor = @unit> ()
        code = Cast <to = 3> (q)
        origin = Cast <to = 3> (zero)
        f = Cast <to = 1> (code)
        z = Cast <to = 1> (origin)
        d = Sub (f, z)
        v = Mul (d, share)
        c = Cast <to = 3> (v)
    }""",
)


@dataclass(frozen=True)
class Uniform(Expandable):
    """Codes of a fixed width on a grid with one step for each channel or block: the weight is (code − zero) · scale.

    Attributes:
        packing: how codes lie in bytes.
        label: the beginning of the name.
        block: the most entries of a channel that share a scale; None for all of them.
        scales: how scales are written.
        shifted: whether each scale has a zero point, packed like the codes; else zero is in the middle.
    """

    packing: Packing
    label: str
    block: int | None = None
    scales: ScaleFormat = BRAIN_FLOAT
    shifted: bool = False

    @property
    def name(self) -> str:
        """The parts that are not the usual ones, as in `int4-b32-asym`."""
        parts = [self.label]
        if self.block is not None:
            parts.append(f"b{self.block}")
        if self.scales.name:
            parts.append(self.scales.name)
        if self.shifted:
            parts.append("asym")
        return "-".join(parts)

    def min_opset(self, array: Spec) -> int:
        """Plain 8-bit codes, and even numbers of 4-bit codes, need no modern operator."""
        plain = self.block is None and not self.shifted
        return max(self.packing.min_opset(array.shape), self.scales.min_opset) if plain else MODERN_OPSET

    def accepts(self, array: Spec) -> str | None:
        """Arrays with at least one axis and one entry."""
        return refusal(array)

    def partition(self, shape: tuple[int, ...], axis: int) -> Partition:
        """Which entries of an array share a scale."""
        return Channels(shape, axis) if self.block is None else Blocks.of(shape, axis, self.block)

    def _partition_of(self, scales: tuple[int, ...], shape: tuple[int, ...]) -> Partition:
        """The partition of packed arrays, read off the shape of their scales."""
        return Channels.read(shape, scales) if self.block is None else Blocks.read(shape, scales)

    def layout(self, array: Spec, axis: int) -> tuple[Spec, ...]:
        """The codes, what the scale format needs, and the zero points if any."""
        partition = self.partition(array.shape, axis)
        zeros = (self.packing.layout(partition.scales),) if self.shifted else ()
        return (self.packing.layout(partition.layout), *self.scales.layout(partition.scales), *zeros)

    def grid(self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None = None) -> Grid:
        """Searched scales and zero points, as the decoder will see them."""
        partition, packing = self.partition(array.shape, axis), self.packing
        ideal, zero = search_scales(array, partition, packing.lowest, packing.highest, self._written, importance, self.shifted)
        stored = self.scales.encode(ideal / np.float32(packing.unit), largest_of(array.dtype) / self._largest)
        scale = self.scales.decode(stored) * np.float32(packing.unit)
        zeros = (packing.pack(zero.astype(np.int16)),) if self.shifted else ()
        spread = partition.spread(scale), partition.spread(zero) if self.shifted else np.zeros((1,) * array.ndim, np.float32)
        return Grid(*spread, packing.lowest, packing.highest, axis, (*stored, *zeros))

    @property
    def _largest(self) -> float:
        """The largest magnitude that a stored scale is multiplied by."""
        span = self.packing.highest - self.packing.lowest if self.shifted else -self.packing.lowest
        return float(span * self.packing.unit)

    def _written(self, scale: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scales as they can be written; those next to the end of float32 have room to be rounded up."""
        unit = np.float32(self.packing.unit)
        limited: NDArray[np.float32] = np.minimum(scale / unit, np.float32(LARGEST / 2) / unit)
        return self.scales.rounded(limited) * unit

    def pack(self, codes: NDArray[np.int16], grid: Grid) -> tuple[NDArray[np.generic], ...] | None:
        """The packed codes and what the grid holds; never None."""
        partition = self.partition(codes.shape, grid.axis)
        return (self.packing.pack(partition.split(codes)), *grid.stored)

    def encode(
        self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None = None
    ) -> tuple[NDArray[np.generic], ...]:
        """Round to nearest on the searched grid."""
        grid = self.grid(array, axis, importance)
        return (self.packing.pack(self.partition(array.shape, axis).split(grid.nearest(array))), *grid.stored)

    def decode(self, packed: tuple[NDArray[np.generic], ...], spec: Spec) -> NDArray[np.generic]:
        """(code − zero) · scale in float32, then the model's type."""
        partition = self._partition_of(packed[1].shape, spec.shape)
        values = self.packing.unpack(packed[0], partition.layout).astype(np.float32)
        if self.shifted:
            values -= self.packing.unpack(packed[-1], partition.scales).astype(np.float32)
        values *= self.scales.decode(packed[self._stored])
        return np.asarray(partition.join(values).astype(spec.dtype))

    def emit(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, output: str | None = None) -> str:
        """Two initializers and two program calls; more for block-wise or shifted grids and for other scale formats."""
        partition = self._partition_of(packed[1].shape, spec.shape)
        codes, zero = self._emit_codes(emitter, suffix, packed, partition)
        scale = self.scales.emit(emitter, suffix, packed[self._stored])
        return emit_scaled(emitter, codes, zero, scale, partition, spec.dtype, output)

    def emit_integer(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, axis: int) -> IntegerWeight | None:
        """The codes, less their zero points; None for blocks, and for shifted bytes, whose differences leave int8."""
        if self.block is not None or (self.shifted and self._largest / self.packing.unit > np.iinfo(np.int8).max):
            return None
        codes, zero = self._emit_codes(emitter, suffix, packed, self._partition_of(packed[1].shape, spec.shape))
        share = {"unit": float_attribute(1 / self.packing.unit)}
        if zero is not None:
            codes = emitter.call(_INTEGER_DIFFERENCES, [codes, zero], emitter.name("c"), share)
        elif self.packing.unit > 1:
            codes = emitter.call(INTEGER_CODES, [codes], emitter.name("c"), share)
        scale = self.scales.emit(emitter, suffix, packed[self._stored])
        return IntegerWeight(codes, emit_flat_scale(emitter, scale, self.packing.unit), axis)

    @property
    def _stored(self) -> slice:
        """Which of the packed arrays are the scale format's."""
        return slice(1, -1) if self.shifted else slice(1, None)

    def _emit_codes(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], partition: Partition) -> tuple[str, str | None]:
        codes = self.packing.emit(emitter, emitter.constant(f"{suffix}.q", packed[0]), partition.layout)
        if not self.shifted:
            return codes, None
        return codes, self.packing.emit(emitter, emitter.constant(f"{suffix}.z", packed[-1]), partition.scales)


def limited(storage: Storage, largest: int) -> Storage:
    """The storage with codes within ±largest, in as many bytes; itself where codes that operators read as they are are no larger anyway.

    What one of both packs, the other decodes.
    """
    if isinstance(storage, Uniform) and isinstance(storage.packing, Bytes) and storage.packing.highest > largest:
        return replace(storage, packing=Bytes(-largest, largest))
    return storage


INT8 = Uniform(Bytes(), "int8")
INT6, INT5, INT4, INT3, INT2 = (Uniform(Bits(width), f"int{width}") for width in (6, 5, 4, 3, 2))
TERNARY = Uniform(Trits(), "ternary")

UNIFORM: tuple[Uniform, ...] = (
    *(INT8, INT6, INT5, INT4, INT3, INT2, TERNARY),
    *(replace(storage, shifted=True) for storage in (INT4, INT3, INT2)),
    *(replace(storage, block=block) for storage in (INT4, INT3, INT2) for block in (32, 64, 128)),
    *(replace(storage, block=block, shifted=True) for storage in (INT4, INT3, INT2) for block in (32, 64)),
    *(replace(storage, scales=PowerOfTwo()) for storage in (INT8, INT4)),
    *(replace(storage, block=32, scales=Double()) for storage in (INT4, INT3, INT2)),
)
"""Every storage on a uniform grid that has a name."""
