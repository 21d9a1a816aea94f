"""MatMul and com.microsoft FusedMatMul, with the weight on either side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from ..emit import Emitter
from ..view import MatrixView
from .base import Gram, GramRequest, Shape, Use, as_float32, outer_views, reshape, row_gram

_TRANSPOSES = ("transA", "transB", "transBatchA", "transBatchB")


@dataclass(frozen=True)
class MatMul:
    """y = x·W or y = W·x, W two-dimensional; alpha of the fused form stays on the last node."""

    name: str = "matmul"
    op_types: tuple[tuple[str, str], ...] = (("", "MatMul"), ("com.microsoft", "FusedMatMul"))

    def view(self, node: NodeProto, index: int, shape: Shape) -> MatrixView | str:
        """Inputs first on the right, outputs first on the left; the fused form's transA/transB turns either round."""
        if len(shape) != 2:
            return f"a batched weight of shape {list(shape)}: only two-dimensional weights are decomposed"
        use = Use(node, index, MatrixView(shape, 1, shape[0], shape[1], True))
        if use.int("transBatchA", 0) or use.int("transBatchB", 0):
            return "FusedMatMul with a transposed batch axis"
        outputs_first = bool(use.int("transB", 0)) if index == 1 else not use.int("transA", 0)
        m, n = shape if outputs_first else (shape[1], shape[0])
        return MatrixView(shape, 1, m, n, outputs_first)

    def activation(self, use: Use) -> tuple[str, bool]:
        """The other operand."""
        return use.node.input[1 - use.index], False

    def _columns(self, use: Use) -> bool:
        """Whether the activation holds its n entries along the second-to-last axis."""
        transposed = bool(use.int("transA" if use.index == 1 else "transB", 0))
        return transposed == (use.index == 1)

    def gram(self, emitter: Emitter, use: Use, value: str, request: GramRequest) -> Gram:
        """Every leading axis is a row axis."""
        value, rank = as_float32(emitter, value, request), request.rank
        if self._columns(use) and rank > 1:
            order = [*range(rank - 2), rank - 1, rank - 2]
            value = emitter.node("Transpose", [value], attributes={"perm": order})
        return row_gram(emitter, reshape(emitter, value, [-1, use.view.n]))

    def channel_axis(self, use: Use) -> int:
        """The output axis."""
        return 0 if use.view.outputs_first else 1

    def contract_reason(self, use: Use) -> str | None:
        """Always possible."""
        return None

    def split_views(self, use: Use, rank: int) -> tuple[MatrixView, MatrixView]:
        """In the weight's own orientation."""
        return outer_views(use.view, rank)

    def split_axes(self, use: Use) -> tuple[int, int]:
        """Each factor's output axis."""
        return (0, 0) if use.view.outputs_first else (1, 1)

    def emit_split(self, emitter: Emitter, use: Use, first: str, last: str) -> None:
        """x·W → (x·V)·U, with the transposition of x left to the first node."""
        other = 1 - use.index
        value, _ = self.activation(use)
        operands = [first, value] if use.index == 0 else [value, first]
        domain, op_type = use.key
        kept = {k: use.int(k, 0) for k in _TRANSPOSES if use.has(k)}
        hidden = emitter.node(op_type, operands, domain=domain, attributes=kept)
        emitter.copy(use.node, {use.index: last, other: hidden}, drop=("transB" if other == 1 else "transA",))

    def macs(self, use: Use, input_shape: Shape, output_shape: Shape) -> int:
        """Output elements times n."""
        return int(np.prod(output_shape)) * use.view.n


MATMUL = MatMul()
