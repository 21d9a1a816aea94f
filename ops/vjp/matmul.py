"""Matrix products.

For Y = A B with cotangent G: dA = G Bᵀ and dB = Aᵀ G, summed over what was broadcast. Products of two matrices become `Gemm`, which
transposes for free; stacks of matrices become `Transpose` and `MatMul`, which ONNX Runtime fuses. The gradient of a weight that multiplies
every row of a stack is one product over all rows, not a sum of products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .activations import before_activation
from .base import Call, Gradients, Rules, Value


@dataclass(frozen=True)
class _Operand:
    """An operand as a stack of matrices.

    Attributes:
        value: at least of rank 2, as it enters the product but for `transposed`.
        transposed: whether its last two axes are swapped before the product.
        restore: brings a gradient shaped like `value` into the shape of the node's input.
    """

    value: Value
    transposed: bool
    restore: Callable[[str], str]


@dataclass(frozen=True)
class _Factor:
    """A stack of matrices in a product.

    Attributes:
        value: at least of rank 2.
        transposed: whether its last two axes are swapped.
    """

    value: Value
    transposed: bool

    @property
    def flipped(self) -> _Factor:
        """Its transpose."""
        return _Factor(self.value, not self.transposed)


@dataclass(frozen=True)
class _Product:
    """Y = α A B, with transposes where the operands say so.

    Attributes:
        call: the node.
        operands: A and B.
        dy: the cotangent G, at least of rank 2.
        alpha: α.
    """

    call: Call
    operands: tuple[_Operand, _Operand]
    dy: Value
    alpha: float

    def gradient(self, index: int) -> str:
        """The gradient of A (0) or B (1), shaped like the node's input."""
        own, other = self.operands[index], self.operands[1 - index]
        back, through = _Factor(self.dy, False), _Factor(other.value, not other.transposed)
        left, right = (back, through) if index == 0 else (through, back)
        if own.transposed:
            left, right = right.flipped, left.flipped
        if own.value.rank == 2 and left.transposed and not right.transposed:
            # Both sum over their rows: over all rows of the stack at once.
            left, right = (_Factor(self._flat(factor.value), factor.transposed) for factor in (left, right))
        return own.restore(self._multiplied(left, right, own.value))

    def _multiplied(self, left: _Factor, right: _Factor, like: Value) -> str:
        """α times the product, summed to the shape of an operand."""
        call = self.call
        if left.value.rank == right.value.rank == 2:
            names = left.value.name, right.value.name
            return call.op("Gemm", *names, alpha=self.alpha, transA=int(left.transposed), transB=int(right.transposed))
        name = call.op("MatMul", self._turned(left), self._turned(right))
        # The last two axes agree by construction, also where their lengths are unknown.
        product = _described(like, name, (*self.dy.lengths[:-2], "rows", "columns"))
        total = call.sum_to(name, _described(like, like.name, (*like.lengths[:-2], "rows", "columns")), product)
        return total if self.alpha == 1 else call.op("Mul", total, call.scalar(self.alpha))

    def _flat(self, value: Value) -> Value:
        """The rows of a stack as one matrix."""
        if value.rank == 2:
            return value
        return _described(value, self.call.op("Flatten", value.name, axis=value.rank - 1), (None, value.lengths[-1]))

    def _turned(self, factor: _Factor) -> str:
        rank = factor.value.rank
        if not factor.transposed:
            return factor.value.name
        return self.call.op("Transpose", factor.value.name, perm=(*range(rank - 2), rank - 1, rank - 2))


def _matmul(call: Call) -> Gradients:
    product = _Product(call, (_plain(call, 0), _plain(call, 1)), _stacked(call), 1.0)
    return {index: product.gradient(index) for index in call.wanted}


def _fused_matmul(call: Call) -> Gradients:
    """With a factor, and transposes of matrices and of the axes before."""
    operands = _turnable(call, 0, "A"), _turnable(call, 1, "B")
    product = _Product(call, operands, _stacked(call), call.attribute("alpha", 1.0))
    return {index: product.gradient(index) for index in call.wanted}


def _gemm(call: Call) -> Gradients:
    """Y = α A B + β C."""
    operands = (
        replace(_plain(call, 0), transposed=bool(call.attribute("transA", 0))),
        replace(_plain(call, 1), transposed=bool(call.attribute("transB", 0))),
    )
    dy = _described(call.x(0), call.dy, (None, None))
    product = _Product(call, operands, dy, call.attribute("alpha", 1.0))
    gradients = {index: product.gradient(index) for index in call.wanted & {0, 1}}
    beta = call.attribute("beta", 1.0)
    if 2 in call.wanted and beta != 0:
        total = call.sum_to(call.dy, call.x(2))
        gradients[2] = total if beta == 1 else call.op("Mul", total, call.scalar(beta))
    return gradients


def _fused_gemm(call: Call) -> Gradients:
    """A Gemm with an activation behind it."""
    given = [call.attribute(f"activation_{name}") for name in ("alpha", "beta", "gamma")]
    dy = before_activation(call, call.attribute("activation", ""), [value for value in given if value is not None])
    return _gemm(replace(call, cotangents=(dy,)))


# --- operands as stacks of matrices


def _plain(call: Call, index: int) -> _Operand:
    """An operand that is not transposed; a vector becomes a row on the left and a column on the right."""
    value = call.x(index)
    if value.rank > 1:
        return _Operand(value, False, lambda gradient: gradient)
    axis = call.ints(index)
    lengths = (1, *value.lengths) if index == 0 else (*value.lengths, 1)
    matrix = _described(value, call.op("Unsqueeze", value.name, axis), lengths)
    return _Operand(matrix, False, lambda gradient: call.op("Squeeze", gradient, axis))


def _turnable(call: Call, index: int, letter: str) -> _Operand:
    """An operand of `FusedMatMul`. Vectors are never transposed; `transBatch` moves the first axis to the place before the last."""
    operand = _plain(call, index)
    rank = call.x(index).rank
    operand = replace(operand, transposed=rank > 1 and bool(call.attribute(f"trans{letter}", 0)))
    if rank < 3 or not call.attribute(f"transBatch{letter}", 0):
        return operand
    there, back = (*range(1, rank - 1), 0, rank - 1), (rank - 2, *range(rank - 2), rank - 1)
    name = call.op("Transpose", operand.value.name, perm=there)
    moved = _described(operand.value, name, [operand.value.lengths[axis] for axis in there])
    return replace(operand, value=moved, restore=lambda gradient: call.op("Transpose", gradient, perm=back))


def _stacked(call: Call) -> Value:
    """The cotangent of Y, with an axis of length 1 for each operand that is a vector."""
    y, vectors = call.y(), [call.x(index).rank == 1 for index in (0, 1)]
    stack = y.lengths[: y.rank - 2 + sum(vectors)]
    axes = [axis for axis, vector in zip((-2, -1), vectors, strict=True) if vector]
    name = call.op("Unsqueeze", call.dy, call.ints(*axes)) if axes else call.dy
    return _described(y, name, (*stack, None, None))


def _described(like: Value, name: str, lengths: Sequence[int | str | None]) -> Value:
    """A value of the type of another, with these lengths and names of lengths."""
    shape = tuple(length if isinstance(length, int) else None for length in lengths)
    return Value(name, like.dtype, shape, symbols=tuple(length if isinstance(length, str) else None for length in lengths))


RULES: Rules = {
    "Gemm": _gemm,
    "MatMul": _matmul,
    "com.microsoft::FusedGemm": _fused_gemm,
    "com.microsoft::FusedMatMul": _fused_matmul,
}
