"""LSTM, GRU and RNN.

The input weight W is (directions, gates·hidden, input), the recurrent weight R (directions, gates·hidden, hidden).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from ..emit import Emitter
from ..view import MatrixView
from .base import Gram, GramRequest, Shape, Use, as_float32, column_gram, reshape, row_gram


@dataclass(frozen=True)
class Recurrent:
    """W reads the sequence, R the layer's own output of the step before."""

    name: str = "recurrent"
    op_types: tuple[tuple[str, str], ...] = (("", "LSTM"), ("", "GRU"), ("", "RNN"))

    def view(self, node: NodeProto, index: int, shape: Shape) -> MatrixView | str:
        """Both directions of W see the same input and form one matrix; those of R are separate groups."""
        directions, rows, columns = shape if len(shape) == 3 else (0, 0, 0)
        if index == 1:
            return MatrixView(shape, 1, directions * rows, columns, True)
        if index == 2:
            return MatrixView(shape, directions, rows, columns, True)
        return "biases or peepholes of a recurrent layer"

    def activation(self, use: Use) -> tuple[str, bool]:
        """X for W; the output Y for R."""
        return (use.node.input[0], False) if use.index == 1 else (use.node.output[0], True)

    def gram(self, emitter: Emitter, use: Use, value: str, request: GramRequest) -> Gram:
        """X is (·, ·, n); Y is (steps, directions, batch, n), or (batch, steps, directions, n) with layout 1."""
        value = as_float32(emitter, value, request)
        if use.index == 1:
            return row_gram(emitter, reshape(emitter, value, [-1, use.view.n]))
        order = [2, 3, 0, 1] if use.int("layout", 0) else [1, 3, 0, 2]
        columns = reshape(emitter, emitter.node("Transpose", [value], attributes={"perm": order}), [use.view.groups, use.view.n, -1])
        return column_gram(emitter, columns)

    def channel_axis(self, use: Use) -> int:
        """Gate rows."""
        return 1

    def contract_reason(self, use: Use) -> str | None:
        """R is applied inside the operator."""
        return None if use.index == 1 else "the recurrent weight is applied inside the operator"

    def split_views(self, use: Use, rank: int) -> tuple[MatrixView, MatrixView]:
        """A matrix in front of the layer, and a layer that reads `rank` inputs."""
        view = use.view
        return MatrixView((view.n, rank), 1, rank, view.n, False), MatrixView((*view.shape[:2], rank), 1, view.m, rank, True)

    def split_axes(self, use: Use) -> tuple[int, int]:
        """Columns of the matrix, gate rows of the layer."""
        return 1, 1

    def emit_split(self, emitter: Emitter, use: Use, first: str, last: str) -> None:
        """MatMul over the whole sequence, then the original layer."""
        hidden = emitter.node("MatMul", [use.node.input[0], first])
        emitter.copy(use.node, {0: hidden, 1: last})

    def macs(self, use: Use, input_shape: Shape, output_shape: Shape) -> int:
        """Steps times batch times the weight's size; the input shape of R is that of Y."""
        rows = int(np.prod(input_shape)) // (use.view.n if use.index == 1 else use.view.n * use.view.groups)
        return rows * use.view.groups * use.view.m * use.view.n


RECURRENT = Recurrent()
