"""Embeddings that stay packed: a row and its scale are looked up, and only that row is decoded.

Standard operators. The result is that of decoding the whole table first, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto

from ..emit import Array, Emitter, Spec, onnx_type
from ..families import Use
from ..storage import Storage
from ..storage.rows import RowNibbles
from .base import Operand

MIN_OPSET = 13
"""The opset from which `Cast` reads the scales' bfloat16."""

_BYTES = "int8"


@dataclass(frozen=True)
class Rows:
    """Gather in a table of bytes or nibbles with one scale per row; a second factor, which is multiplied with, is decoded at load."""

    name: str = "rows"
    coupled: bool = False
    product_reason: str | None = "a product of factors has no packed rows"

    def domains(self, use: Use) -> tuple[str, ...]:
        """Standard operators."""
        return ()

    def partners(self, use: Use) -> tuple[int, ...]:
        """None: an operator has one weight."""
        return ()

    def declines(self, use: Use, opset: int) -> str | None:
        """Gather in a table, from opset 13 on."""
        if opset < MIN_OPSET:
            return f"scales of rows need opset {MIN_OPSET}, the model has {opset}"
        return None if use.key == ("", "Gather") else f"{use.node.op_type} looks no rows up"

    def accepts(self, storage: Storage, spec: Spec, axis: int) -> str | None:
        """Tables in storages whose rows can be unpacked by themselves; anything for an array that is not looked up."""
        if axis != 0 or storage.name == _BYTES or isinstance(storage, RowNibbles):
            return storage.accepts(spec)
        return f"rows of storage {storage.name} cannot be unpacked by themselves"

    def operand(
        self, emitter: Emitter, suffix: str, storage: Storage, packed: tuple[Array, ...], spec: Spec, axis: int, output: str | None = None
    ) -> Operand:
        """Packed rows and their scales; a float value where channels are columns.

        Raises:
            TypeError: rows of the storage cannot be unpacked by themselves.
        """
        if axis != 0:
            return Operand(storage.emit(emitter, suffix, packed, spec, output), (), spec, axis, storage)
        if isinstance(storage, RowNibbles):
            values = storage.emit_packed(emitter, suffix, packed)
        elif storage.name == _BYTES:
            codes, stored = (emitter.constant(f"{suffix}.{letter}", part) for letter, part in zip("qs", packed, strict=True))
            values = codes, emitter.node("Cast", [stored], attributes={"to": 1})
        else:
            raise TypeError(f"rows of storage {storage.name} cannot be unpacked by themselves")
        return Operand(output or emitter.name("operand"), values, spec, axis, storage)

    def from_value(self, emitter: Emitter, value: str, spec: Spec, axis: int, output: str | None = None) -> Operand | None:
        """None: nothing packs at load."""
        return None

    def lower(self, emitter: Emitter, node: NodeProto, index: int, operand: Operand) -> None:
        """Two look-ups and the storage's decoding; a node that reads a float value stays as it is.

        Raises:
            ValueError: the node does not look up packed rows.
        """
        if not operand.values:
            emitter.copy(node, {index: operand.name})
            return
        if (node.op_type, index) != ("Gather", 0):
            raise ValueError(f"{node.op_type} with its weight as input {index} looks no rows up")
        codes, scale = (emitter.node("Gather", [value, node.input[1]], attributes={"axis": 0}) for value in operand.values)
        if isinstance(operand.storage, RowNibbles):
            operand.storage.emit_unpacked(emitter, codes, scale, operand.spec, 0, node.output[0])
        else:
            _scaled(emitter, codes, scale, operand.spec, node.output[0])
        emitter.nodes[-1].name = node.name


def _scaled(emitter: Emitter, codes: str, scale: str, spec: Spec, output: str) -> None:
    """int8 codes times scales, in float32 and then in the model's type, as the storage decodes a whole table."""
    floats = emitter.node("Cast", [codes], attributes={"to": 1})
    if onnx_type(spec.dtype) == 1:
        emitter.node("Mul", [floats, scale], output)
    else:
        emitter.node("Cast", [emitter.node("Mul", [floats, scale])], output, attributes={"to": onnx_type(spec.dtype)})


ROWS = Rows()
