"""Gather along axis 0 of a table: an embedding, a matrix product with one-hot rows."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto

from ..emit import Emitter
from ..view import MatrixView
from .base import Gram, GramRequest, Shape, Use, outer_views, reshape


@dataclass(frozen=True)
class Gather:
    """Table (n rows, m); its metric is diagonal: how often each row is looked up."""

    name: str = "gather"
    op_types: tuple[tuple[str, str], ...] = (("", "Gather"),)

    def view(self, node: NodeProto, index: int, shape: Shape) -> MatrixView | str:
        """Inputs (rows) first."""
        if index != 0:
            return "constant indices of a Gather"
        if len(shape) != 2:
            return f"a table of shape {list(shape)}: only two-dimensional tables are decomposed"
        view = MatrixView(shape, 1, shape[1], shape[0], False)
        axis = Use(node, index, view).int("axis", 0)
        return view if axis in (0, -2) else f"Gather along axis {axis}"

    def activation(self, use: Use) -> tuple[str, bool]:
        """The indices."""
        return use.node.input[1], False

    def gram(self, emitter: Emitter, use: Use, value: str, request: GramRequest) -> Gram:
        """The indices themselves: they are counted outside."""
        indices = reshape(emitter, emitter.node("Cast", [value], attributes={"to": 7}), [-1])
        return Gram(indices, indices)

    def channel_axis(self, use: Use) -> int:
        """One scale per row, because rows differ in length more than columns do."""
        return 0

    def contract_reason(self, use: Use) -> str | None:
        """Always possible."""
        return None

    def split_views(self, use: Use, rank: int) -> tuple[MatrixView, MatrixView]:
        """A narrow table, then a matrix."""
        return outer_views(use.view, rank)

    def split_axes(self, use: Use) -> tuple[int, int]:
        """Rows of the table, columns of the matrix."""
        return 0, 1

    def emit_split(self, emitter: Emitter, use: Use, first: str, last: str) -> None:
        """Gather narrow rows, then widen them; the MatMul takes over the original's name and output."""
        hidden = emitter.node("Gather", [first, use.node.input[1]], attributes={"axis": 0})
        emitter.node("MatMul", [hidden, last], use.node.output[0])
        emitter.nodes[-1].name = use.node.name

    def macs(self, use: Use, input_shape: Shape, output_shape: Shape) -> int:
        """A look-up multiplies nothing."""
        return 0


GATHER = Gather()
