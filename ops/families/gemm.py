"""Gemm and com.microsoft FusedGemm: y = alpha·A'·B' + beta·C."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from ..emit import Emitter
from ..view import MatrixView
from .base import Gram, GramRequest, Shape, Use, as_float32, outer_views, product, reduce_sum


@dataclass(frozen=True)
class Gemm:
    """The weight is A or B; alpha, beta, C and a fused activation stay on the last node."""

    name: str = "gemm"
    op_types: tuple[tuple[str, str], ...] = (("", "Gemm"), ("com.microsoft", "FusedGemm"))

    def view(self, node: NodeProto, index: int, shape: Shape) -> MatrixView | str:
        """Outputs first for B with transB = 1 and for A with transA = 0."""
        if index == 2:
            return "the bias of a Gemm"
        use = Use(node, index, MatrixView(shape, 1, shape[0], shape[1], True))
        outputs_first = bool(use.int("transB", 0)) if index == 1 else not use.int("transA", 0)
        m, n = shape if outputs_first else (shape[1], shape[0])
        return MatrixView(shape, 1, m, n, outputs_first)

    def activation(self, use: Use) -> tuple[str, bool]:
        """The other operand."""
        return use.node.input[1 - use.index], False

    def gram(self, emitter: Emitter, use: Use, value: str, request: GramRequest) -> Gram:
        """xᵀx or x xᵀ, whichever contracts the rows."""
        value = as_float32(emitter, value, request)
        rows_first = not use.int("transA", 0) if use.index == 1 else bool(use.int("transB", 0))
        total = product(emitter, value, value, trans_left=rows_first, trans_right=not rows_first)
        return Gram(total, value, reduce_sum(emitter, value, 0 if rows_first else 1), columns=not rows_first)

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
        """The first node is a plain product; the last keeps every attribute but the transposition of x."""
        other = 1 - use.index
        value, _ = self.activation(use)
        left, right = (first, value) if use.index == 0 else (value, first)
        hidden = product(emitter, left, right, trans_left=bool(use.int("transA", 0)), trans_right=bool(use.int("transB", 0)))
        emitter.copy(use.node, {use.index: last, other: hidden}, drop=("transB" if other == 1 else "transA",))

    def macs(self, use: Use, input_shape: Shape, output_shape: Shape) -> int:
        """Output elements times n."""
        return int(np.prod(output_shape)) * use.view.n


GEMM = Gemm()
