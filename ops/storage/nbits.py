"""Matrices as MatMulNBits and GatherBlockQuantized of ONNX Runtime (com.microsoft) read them: packed while they run, never expanded.

Each channel's entries lie one after the other in blocks of fixed size, the last one padded, and each block has a scale. Codes are unsigned;
the first of a byte lies in its lowest bits. Scales are float32 initializers: at accuracy level 4, ONNX Runtime 1.31 silently yields zeros
for scales that it first has to compute, as it does where constant folding is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..emit import Array, Emitter, Spec
from .base import IntegerWeight, refusal
from .grid import Grid, single
from .scaling import LARGEST, SMALLEST, Channels
from .search import search_scales

_Entry = TypeVar("_Entry", bound=np.generic)

_SINGLE: np.dtype[np.generic] = np.dtype(np.float32)


@dataclass(frozen=True)
class NBits:
    """(code − zero) · scale with one scale, and perhaps one zero, per block of a channel.

    Attributes:
        bits: per code: 2, 4 or 8.
        block: entries of a channel that share a scale, a power of two from 16 on.
        shifted: whether each block has a zero point; else zero is in the middle.
        arithmetics: the only ones that read it.
    """

    bits: int
    block: int
    shifted: bool = False
    arithmetics: ClassVar[tuple[str, ...] | None] = ("nbits",)

    @property
    def name(self) -> str:
        """For example nbits4-b32."""
        return f"nbits{self.bits}-b{self.block}" + ("-asym" if self.shifted else "")

    @property
    def _offset(self) -> int:
        """What is added to signed codes, for there are no others in the file."""
        return 1 << (self.bits - 1)

    def min_opset(self, array: Spec) -> int:
        """Any: its operators have a domain of their own."""
        return 7

    def accepts(self, array: Spec) -> str | None:
        """float32 matrices."""
        if array.dtype != np.float32:
            return f"a weight of {array.dtype}: block-wise operators are emitted for float32"
        return refusal(array) or (None if len(array.shape) == 2 else f"an array of shape {list(array.shape)}: only matrices")

    def layout(self, array: Spec, axis: int) -> tuple[Spec, ...]:
        """Codes (channels, blocks, bytes of a block); scales (channels, blocks), or in one line where `axis` is 1; zeros (channels, bytes).

        Both shapes of scales suit MatMulNBits; which it is tells `decode` where the channels are, even if the matrix is square.
        """
        channels, blocks = array.shape[axis], -(-array.shape[1 - axis] // self.block)
        codes = Spec((channels, blocks, self.block * self.bits // 8), np.dtype(np.uint8))
        scales = Spec((channels, blocks) if axis == 0 else (channels * blocks,), _SINGLE)
        zeros = (Spec((channels, -(-blocks * self.bits // 8)), np.dtype(np.uint8)),) if self.shifted else ()
        return (codes, scales, *zeros)

    def grid(self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None = None) -> Grid:
        """Searched scales and zero points, block by block."""
        flat = self._split(single(array), axis).reshape(-1, self.block)
        weights = None if importance is None else self._split(np.broadcast_to(importance, array.shape), axis).reshape(flat.shape)
        lowest, highest = -self._offset, self._offset - 1
        found, zero = search_scales(flat, Channels(flat.shape, 0), lowest, highest, _as_is, weights, self.shifted)
        positive = np.where(found > 0, found, np.float32(1))
        scale = np.clip(positive, SMALLEST, LARGEST / (2 * self._offset)).astype(np.float32).reshape(array.shape[axis], -1)
        zero = zero.reshape(scale.shape)
        stored: tuple[NDArray[np.generic], ...] = (scale if axis == 0 else scale.reshape(-1),)
        if self.shifted:
            stored += (self._pack(zero),)
        return Grid(self._spread(scale, array.shape, axis), self._spread(zero, array.shape, axis), lowest, highest, axis, stored)

    def pack(self, codes: NDArray[np.int16], grid: Grid) -> tuple[NDArray[np.generic], ...] | None:
        """The packed codes and what the grid holds; never None."""
        return self._packed(codes, grid)

    def _packed(self, codes: NDArray[np.int16], grid: Grid) -> tuple[NDArray[np.generic], ...]:
        return (self._pack(self._split(codes, grid.axis)), *grid.stored)

    def encode(
        self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None = None
    ) -> tuple[NDArray[np.generic], ...]:
        """Round to nearest on the searched grid."""
        grid = self.grid(array, axis, importance)
        return self._packed(grid.nearest(array), grid)

    def decode(self, packed: tuple[NDArray[np.generic], ...], spec: Spec) -> NDArray[np.generic]:
        """(code − zero) · scale in float32: the weight that the operators compute with, up to their own rounding."""
        codes, stored = packed[:2]
        axis, scale = 2 - stored.ndim, np.asarray(stored, np.float32).reshape(*codes.shape[:2])
        values = self._unpack(codes, self.block).astype(np.float32)
        if self.shifted:
            values -= self._unpack(packed[2], scale.shape[1])[..., None].astype(np.float32)
        values *= scale[..., None]
        rows = values.reshape(len(values), -1)[:, : spec.shape[1 - axis]]
        return np.ascontiguousarray(rows if axis == 0 else rows.T)

    def emit(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, output: str | None = None) -> str:
        """Not offered.

        Raises:
            TypeError: always; `arithmetics` says who reads this storage.
        """
        raise TypeError(f"{self.name} is read packed, by arithmetic {self.arithmetics}; it has no float value")

    def emit_integer(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, axis: int) -> IntegerWeight | None:
        """None: one scale per block."""
        return None

    def emit_blocks(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...]) -> tuple[str, ...]:
        """Add the initializers.

        Returns:
            Names of the codes, of the scales and, of shifted codes, of their zeros.
        """
        return tuple(emitter.constant(f"{suffix}.{letter}", part) for letter, part in zip("qsz", packed, strict=False))

    def _split(self, array: NDArray[_Entry], axis: int) -> NDArray[_Entry]:
        """(channels, blocks, entries) with zeros as padding."""
        rows = array if axis == 0 else array.T
        padded = np.pad(rows, ((0, 0), (0, -array.shape[1 - axis] % self.block)))
        return padded.reshape(array.shape[axis], -1, self.block)

    def _spread(self, part: NDArray[np.float32], shape: tuple[int, ...], axis: int) -> NDArray[np.float32]:
        """(channels, blocks) → one value for every entry of the matrix."""
        rows = np.repeat(part, self.block, axis=1)[:, : shape[1 - axis]]
        return np.ascontiguousarray(rows if axis == 0 else rows.T)

    def _pack(self, codes: NDArray[np.generic]) -> NDArray[np.uint8]:
        """Signed codes along the last axis → bytes; a last byte is filled up with zeros."""
        per_byte = 8 // self.bits
        fields = (codes.astype(np.int16) + self._offset).astype(np.uint8)
        lacking = -fields.shape[-1] % per_byte
        fields = np.pad(fields, [(0, 0)] * (fields.ndim - 1) + [(0, lacking)])
        fields = fields.reshape(*fields.shape[:-1], -1, per_byte) << (self.bits * np.arange(per_byte, dtype=np.uint8))
        return np.asarray(np.bitwise_or.reduce(fields, axis=-1), np.uint8)

    def _unpack(self, packed: NDArray[np.generic], count: int) -> NDArray[np.int16]:
        """The first `count` signed codes along the last axis."""
        shifts = self.bits * np.arange(8 // self.bits, dtype=np.uint8)
        fields = (np.asarray(packed, np.uint8)[..., None] >> shifts) & np.uint8((1 << self.bits) - 1)
        return fields.reshape(*packed.shape[:-1], -1)[..., :count].astype(np.int16) - np.int16(self._offset)


def _as_is(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scales are written in full."""
    return scale


NBITS: tuple[NBits, ...] = (
    *(NBits(bits, block) for bits in (8, 4, 2) for block in (32, 64, 128)),
    *(NBits(bits, block, shifted=True) for bits in (4, 2) for block in (32, 64, 128)),
)
"""Every such storage that has a name."""
