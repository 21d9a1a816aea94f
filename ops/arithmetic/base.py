"""What an arithmetic has to offer: how an operator computes once its weight is narrower than a float.

Storage says how a weight lies in the file; arithmetic says what it is when the operator runs. The two meet in `operand`, which turns
packed arrays into the values that the arithmetic's operators read. Everything up to there is folded when the model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from onnx import NodeProto

from ..emit import Array, Emitter, Spec
from ..families import Use
from ..storage import Storage


@dataclass(frozen=True)
class Operand:
    """A weight in the form in which an arithmetic reads it.

    Attributes:
        name: the value that a float operator reads in its place; only a mark where `lower` replaces every operator.
        values: names of what the arithmetic's own operators read instead, in an order that only the arithmetic knows.
        spec: shape and dtype of the float weight.
        axis: the axis with one scale per entry.
        storage: how the values are packed, for arithmetics that read them so; None where they are of the arithmetic's own making.
    """

    name: str
    values: tuple[str, ...]
    spec: Spec
    axis: int
    storage: Storage | None = None


class Arithmetic(Protocol):
    """One way to compute with narrow weights."""

    @property
    def name(self) -> str:
        """The name in plans and reports."""
        ...

    def domains(self, use: Use) -> tuple[str, ...]:
        """Domains of the operators that it emits for an operator, besides the default one: a target may lack them."""
        ...

    def partners(self, use: Use) -> tuple[int, ...]:
        """Inputs of the operator, besides this one, whose weights have to compute in this arithmetic too."""
        ...

    @property
    def coupled(self) -> bool:
        """Whether activations around the operator have to be quantized too, by the pass that places Quantize/DequantizeLinear pairs."""
        ...

    def declines(self, use: Use, opset: int) -> str | None:
        """None when the operator can run so, else the reason why not."""
        ...

    def accepts(self, storage: Storage, spec: Spec, axis: int) -> str | None:
        """None when an array of this shape in this storage can be an operand, else the reason why not."""
        ...

    def operand(
        self, emitter: Emitter, suffix: str, storage: Storage, packed: tuple[Array, ...], spec: Spec, axis: int, output: str | None = None
    ) -> Operand:
        """Add the packed initializers and the programs that make an operand of them.

        Args:
            emitter: collects them.
            suffix: of the initializers' names.
            storage: how the arrays are packed.
            packed: the arrays, or their specs.
            spec: shape and dtype of the float weight.
            axis: the axis with one scale per entry.
            output: the operand's name; None makes one up.
        """
        ...

    @property
    def product_reason(self) -> str | None:
        """None when a product of factors that is multiplied out at load can be an operand, else why not."""
        ...

    def from_value(self, emitter: Emitter, value: str, spec: Spec, axis: int, output: str | None = None) -> Operand | None:
        """An operand from a float value that is folded at load (a product of factors); None where the arithmetic takes no such value."""
        ...

    def lower(self, emitter: Emitter, node: NodeProto, index: int, operand: Operand) -> None:
        """Add the nodes that compute what `node` computes with `operand` as its input `index`; the last has the node's outputs.

        Args:
            emitter: collects them.
            node: a float operator of a family; not changed.
            index: which of its inputs the weight is.
            operand: from `operand` or `from_value`.
        """
        ...
