"""What an operator family has to say about a weight that one of its nodes reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from onnx import NodeProto

from ..emit import Emitter
from ..view import MatrixView

Shape = tuple[int, ...]

GEMM_WITHOUT_C = 11
"""The opset from which Gemm's third input is optional."""

AXES_AS_INPUT = 13
"""The opset from which ReduceSum takes its axes as an input."""


@dataclass(frozen=True)
class Use:
    """One node that reads a weight.

    Attributes:
        node: the node.
        index: which of the node's inputs the weight is.
        view: how the weight reads as matrices there.
    """

    node: NodeProto
    index: int
    view: MatrixView

    @property
    def key(self) -> tuple[str, str]:
        """(domain, op_type); "ai.onnx" is another way to write the default domain."""
        return "" if self.node.domain == "ai.onnx" else self.node.domain, self.node.op_type

    def ints(self, name: str, default: list[int]) -> list[int]:
        """An integer-list attribute."""
        return list(next((a.ints for a in self.node.attribute if a.name == name), default))

    def int(self, name: str, default: int) -> int:
        """An integer attribute."""
        return next((a.i for a in self.node.attribute if a.name == name), default)

    def has(self, name: str) -> bool:
        """Whether the attribute is set."""
        return any(a.name == name for a in self.node.attribute)

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        return next((a.s.decode() for a in self.node.attribute if a.name == name), default)


@dataclass(frozen=True)
class GramRequest:
    """How to accumulate an input's second moment inside the graph.

    Attributes:
        rank: number of axes of the layer's input.
        cast: whether the input must be cast to float32 first.
        positions: how many output positions of a Conv to sample per feed; None for all.
        seed: of the sampled positions.
    """

    rank: int
    cast: bool
    positions: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Gram:
    """Names of the emitted values.

    Attributes:
        total: the sum of x xᵀ over rows, groups·n·n float32 values; for one-hot inputs the indices themselves, int64.
        rows: a value with groups·n entries per row (one entry for one-hot inputs), from whose size the number of rows follows.
        sums: the sum of x over rows, groups·n float32 values; None for one-hot inputs.
        columns: whether `rows` holds a row's n entries along the axis before the last, (n, rows), in place of (rows, n).
        grouped: whether `rows` has an axis of groups before these two.
    """

    total: str
    rows: str
    sums: str | None = None
    columns: bool = False
    grouped: bool = False


class Family(Protocol):
    """One operator family: where its weight is, what multiplies it, and how two factors take its place."""

    @property
    def name(self) -> str:
        """The family's name."""
        ...

    def view(self, node: NodeProto, index: int, shape: Shape) -> MatrixView | str:
        """The matrices in the weight at input `index`, or why there are none that can be decomposed."""
        ...

    def activation(self, use: Use) -> tuple[str, bool]:
        """The value whose second moment is the weight's metric, and whether it is an output of the node (recurrent state)."""
        ...

    def gram(self, emitter: Emitter, use: Use, value: str, request: GramRequest) -> Gram:
        """Emit nodes that sum x xᵀ over rows."""
        ...

    def channel_axis(self, use: Use) -> int:
        """The axis of the stored weight that gets one quantization scale per entry."""
        ...

    def contract_reason(self, use: Use) -> str | None:
        """None when activations can flow through two factors of this weight, else why not."""
        ...

    def split_views(self, use: Use, rank: int) -> tuple[MatrixView, MatrixView]:
        """How the first factor (r, n), nearer the input, and the last (m, r) are stored when the layer is split."""
        ...

    def split_axes(self, use: Use) -> tuple[int, int]:
        """Scale axes of the two stored factors."""
        ...

    def emit_split(self, emitter: Emitter, use: Use, first: str, last: str) -> None:
        """Replace the node by two: the first applies `first`; the last is the original node with `last` as its weight."""
        ...

    def macs(self, use: Use, input_shape: Shape, output_shape: Shape) -> int:
        """Multiply-accumulates of the node for one feed."""
        ...


def outer_views(view: MatrixView, rank: int) -> tuple[MatrixView, MatrixView]:
    """Two-dimensional factors of a weight with one group, in the orientation of the weight itself."""
    if view.outputs_first:
        return MatrixView((rank, view.n), 1, rank, view.n, True), MatrixView((view.m, rank), 1, view.m, rank, True)
    return MatrixView((view.n, rank), 1, rank, view.n, False), MatrixView((rank, view.m), 1, view.m, rank, False)


def as_float32(emitter: Emitter, value: str, request: GramRequest) -> str:
    """The value itself, or a cast of it."""
    return emitter.node("Cast", [value], attributes={"to": 1}) if request.cast else value


def product(emitter: Emitter, left: str, right: str, *, trans_left: bool = False, trans_right: bool = False) -> str:
    """left·right of two matrices, either read transposed; without `Gemm` where that still needs a third input."""
    if emitter.target.opset >= GEMM_WITHOUT_C and (trans_left or trans_right):
        return emitter.node("Gemm", [left, right], attributes={"transA": int(trans_left), "transB": int(trans_right)})
    sides = [
        emitter.node("Transpose", [side], attributes={"perm": [1, 0]}) if transposed else side
        for side, transposed in ((left, trans_left), (right, trans_right))
    ]
    return emitter.node("MatMul", sides)


def row_gram(emitter: Emitter, rows: str) -> Gram:
    """(k, n) → (n, n): the sum of x xᵀ over rows."""
    return Gram(product(emitter, rows, rows, trans_left=True), rows, reduce_sum(emitter, rows, 0))


def column_gram(emitter: Emitter, columns: str) -> Gram:
    """(groups, n, k) → (groups, n, n): the sum of x xᵀ over columns."""
    rows = emitter.node("Transpose", [columns], attributes={"perm": [0, 2, 1]})
    return Gram(emitter.node("MatMul", [columns, rows]), columns, reduce_sum(emitter, columns, 2), columns=True, grouped=True)


def cross_gram(emitter: Emitter, first: Gram, second: Gram) -> str:
    """The sum of x zᵀ over the rows x of one value and the rows z of another, which a family has read alike: (groups, p, n) or (p, n).

    Args:
        emitter: takes the nodes.
        first: of p entries a row, from `Family.gram`.
        second: of n entries a row, from the same family with as many groups and rows.
    """
    if not second.grouped:
        return product(emitter, first.rows, second.rows, trans_left=not first.columns, trans_right=second.columns)
    turned = emitter.node("Transpose", [second.rows], attributes={"perm": [0, 2, 1]})
    return emitter.node("MatMul", [first.rows, turned])


def reduce_sum(emitter: Emitter, value: str, axis: int) -> str:
    """The sum over one axis, which is dropped; axes became an input with opset 13."""
    if emitter.target.opset < AXES_AS_INPUT:
        return emitter.node("ReduceSum", [value], attributes={"axes": [axis], "keepdims": 0})
    return emitter.node("ReduceSum", [value, emitter.ints("axes", [axis])], attributes={"keepdims": 0})


def reshape(emitter: Emitter, value: str, shape: list[int]) -> str:
    """Reshape to a constant shape (0 copies, −1 infers)."""
    return emitter.node("Reshape", [value, emitter.ints("shape", shape)])
