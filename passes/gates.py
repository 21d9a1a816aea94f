"""Gates: a value that is there only once others are, at no cost in data.

ONNX Runtime orders nodes by dependencies alone, and frees a value after its last reader. A gate is a dependency where the mathematics has
none: a `Reshape` of the value to its own shape plus a zero, computed at run time from what it waits for. A `Reshape` moves no data. Since
the runtime does not know that the zero is one, it can neither remove a gate nor take values before and after it for the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from onnx import TensorProto, ValueInfoProto

from intaglio.ops.vjp import Tape, Value

from .values import typed


@dataclass(frozen=True)
class Gates:
    """Emits gates.

    Attributes:
        tape: takes the nodes.
        declared: types of the gated values, which the runtime cannot infer.
    """

    tape: Tape
    declared: list[ValueInfoProto] = field(default_factory=list)
    _zeros: dict[str, str] = field(default_factory=dict)

    def wait(self, name: str, like: Value | None, others: Sequence[str]) -> str:
        """The name of a value that equals `name` and is there once the others are.

        Args:
            name: a tensor.
            like: a value of the same type and shape, if one is known.
            others: names of float tensors, at least one; they may be empty or hold NaNs.
        """
        static = None if like is None else like.static
        shape = self._emit("Shape", name) if static is None else self._ints(*static)
        for other in others:
            shape = self._emit("Add", shape, self._zero(other))
        result = self._emit("Reshape", name, shape, allowzero=1)
        if like is not None:
            self.declared.append(typed(replace(like, name=result)))
        return result

    def _zero(self, name: str) -> str:
        """The truth of the first element, times zero, in int64; the sum over no element where there is none."""
        if name not in self._zeros:
            first = self._emit("Slice", self._emit("Reshape", name, self._ints(-1)), self._ints(0), self._ints(1))
            number = self._emit("Cast", self._emit("Cast", first, to=TensorProto.BOOL), to=TensorProto.INT64)
            self._zeros[name] = self._emit("ReduceSum", self._emit("Mul", number, self._ints(0)), keepdims=0)
        return self._zeros[name]

    def _emit(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        return self.tape.emit(op_type, inputs, 1, "gate", "", attributes)[0]

    def _ints(self, *numbers: int) -> str:
        return self.tape.constant(np.asarray(numbers, np.int64))
