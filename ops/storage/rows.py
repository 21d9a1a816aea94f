"""Four-bit matrices whose rows (or columns) can be unpacked one by one.

Planes run along each channel: byte i of a channel holds entry i of its first half in the low four bits and entry i of its second half
in the high four bits. So a row that is looked up is unpacked without its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from ..emit import Array, Emitter, Program, Spec, ints_attribute, onnx_type
from .base import Expandable, IntegerWeight, refusal
from .grid import Grid, largest_of
from .packing import MODERN_OPSET
from .scaling import BrainFloat, Channels
from .search import search_scales

_SCALES = BrainFloat()
_LOWEST, _HIGHEST = -8, 7

_PLANES = """
        sixteenth = Constant <value = float {0.0625}> ()
        sixteen = Constant <value = float {16.0}> ()
        offset = Constant <value = float {8.0}> ()
        f = Cast <to = 1> (q)
        shifted = Mul (f, sixteenth)
        high = Floor (shifted)
        weight = Mul (high, sixteen)
        low = Sub (f, weight)
        all = Concat <axis: int = @axis> (low, high)"""

_CROP = """
        start = Constant <value = int64[1] {0}> ()
        end = Constant <value: tensor = @length> ()
        axes = Constant <value: tensor = @along> ()
        u = Slice (all, start, end, axes)"""

_SCALE = """
        signed = Sub (u, offset)
        v = Mul (signed, scale)
        w = Cast <to: int = @to> (v)
    }"""

_UNPACK = Program("UnpackRows", "<axis, to> (q, scale) => (w) {" + _PLANES.replace("all =", "u =") + _SCALE)

_UNPACK_ODD = Program("UnpackOddRows", "<axis, along, length, to> (q, scale) => (w) {" + _PLANES + _CROP + _SCALE)
"""Channels of odd length: the last byte's high bits are padding."""


@dataclass(frozen=True)
class RowNibbles(Expandable):
    """Symmetric four-bit codes with one scale per channel; every byte belongs to one channel.

    Attributes:
        name: in plans and reports.
    """

    name: str = "int4-rows"

    def min_opset(self, array: Spec) -> int:
        """Negative axes of `Concat`, and scales in bfloat16."""
        return MODERN_OPSET

    def accepts(self, array: Spec) -> str | None:
        """Matrices."""
        return refusal(array) or (None if len(array.shape) == 2 else f"an array of shape {list(array.shape)}: only matrices")

    def layout(self, array: Spec, axis: int) -> tuple[Spec, ...]:
        """Bytes, the matrix's shape with the other axis halved; scales with that axis 1."""
        halved = tuple(size if i == axis else -(-size // 2) for i, size in enumerate(array.shape))
        return (Spec(halved, np.dtype(np.uint8)), *_SCALES.layout(Channels(array.shape, axis).scales))

    def grid(self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None = None) -> Grid:
        """Searched scales."""
        partition = Channels(array.shape, axis)
        ideal, zero = search_scales(array, partition, _LOWEST, _HIGHEST, _SCALES.rounded, importance, False)
        stored = _SCALES.encode(ideal, largest_of(array.dtype) / -_LOWEST)
        return Grid(_SCALES.decode(stored), np.zeros_like(zero), _LOWEST, _HIGHEST, axis, stored)

    def pack(self, codes: NDArray[np.int16], grid: Grid) -> tuple[NDArray[np.generic], ...] | None:
        """The packed codes and what the grid holds; never None."""
        return self._packed(codes, grid)

    def _packed(self, codes: NDArray[np.int16], grid: Grid) -> tuple[NDArray[np.generic], ...]:
        rows = (codes - _LOWEST).astype(np.uint8)
        rows = rows if grid.axis == 0 else rows.T
        half = -(-rows.shape[1] // 2)
        high = np.pad(rows[:, half:], ((0, 0), (0, 2 * half - rows.shape[1])))
        packed = rows[:, :half] | (high << 4)
        return (np.ascontiguousarray(packed if grid.axis == 0 else packed.T), *grid.stored)

    def encode(
        self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None = None
    ) -> tuple[NDArray[np.generic], ...]:
        """Round to nearest on the searched grid."""
        grid = self.grid(array, axis, importance)
        return self._packed(grid.nearest(array), grid)

    def decode(self, packed: tuple[NDArray[np.generic], ...], spec: Spec) -> NDArray[np.generic]:
        """code · scale in float32, then the model's type."""
        axis = self.axis_of(packed, spec)
        lines = np.asarray(packed[0], np.uint8)
        planes = np.concatenate([lines & 15, lines >> 4], axis=1 - axis)
        codes = np.take(planes, range(spec.shape[1 - axis]), axis=1 - axis).astype(np.float32) + np.float32(_LOWEST)
        return np.asarray((codes * _SCALES.decode(packed[1:])).astype(spec.dtype))

    def emit(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, output: str | None = None) -> str:
        """Two initializers, a `Cast` of the scales, and one call."""
        codes, scale = self.emit_packed(emitter, suffix, packed)
        return self.emit_unpacked(emitter, codes, scale, spec, self.axis_of(packed, spec), output)

    def emit_integer(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, axis: int) -> IntegerWeight | None:
        """None: the storage is for tables that are looked up."""
        return None

    def emit_packed(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...]) -> tuple[str, str]:
        """Add the initializers; names of the bytes and of float32 scales."""
        codes = emitter.constant(f"{suffix}.q", packed[0])
        return codes, emitter.node("Cast", [_SCALES.emit(emitter, suffix, packed[1:])], attributes={"to": 1})

    def emit_unpacked(self, emitter: Emitter, codes: str, scale: str, spec: Spec, axis: int, output: str | None) -> str:
        """Unpack all channels, or some that were looked up, where `axis` is 0.

        Args:
            emitter: collects nodes.
            codes: bytes; the last axis is the packed one for `axis` 0, the one before it for 1.
            scale: float32, with that axis 1.
            spec: shape and dtype of the whole matrix.
            axis: the channel axis.
            output: the result's name; None makes one up.
        """
        packed_axis, length = -1 - axis, spec.shape[1 - axis]
        attributes: dict[str, int | TensorProto] = {"axis": packed_axis, "to": onnx_type(spec.dtype)}
        if length % 2 == 0:
            return emitter.call(_UNPACK, [codes, scale], output, attributes)
        attributes |= {"along": ints_attribute([packed_axis]), "length": ints_attribute([length])}
        return emitter.call(_UNPACK_ODD, [codes, scale], output, attributes)

    def axis_of(self, packed: tuple[Array, ...], spec: Spec) -> int:
        """The channel axis that packed arrays of a matrix were made for."""
        return int(tuple(packed[1].shape) != (spec.shape[0], 1))


ROW_NIBBLES = RowNibbles()
