"""An LSTM in dynamic integers: `com.microsoft.DynamicQuantizeLSTM`, which ONNX Runtime has for processors only.

It takes both weights as integers, transposed against the standard operator: W (directions, input, 4·hidden) and R (directions, hidden,
4·hidden) int8, with scales and zero points (directions, 4·hidden) behind the standard inputs. X is rounded to uint8 with one scale per run,
the state with one scale per step. Weights are packed when the session is created if they are constants by then, folded ones included.

Each weight is a site of its own, so each makes a node that reads one weight in integers and the other one still in floats. No runtime takes
that; `join` makes one of the two.
"""

from __future__ import annotations

from onnx import NodeProto

from ..emit import Emitter, Spec
from ..families import Use
from ..storage import IntegerWeight
from .base import Operand
from .weight import zero_points

DOMAIN = "com.microsoft"
WEIGHTS = (1, 2)
"""Inputs W and R."""

_OPERATOR = "DynamicQuantizeLSTM"
_STANDARD_INPUTS = 8
_PARAMETERS = {1: 8, 2: 10}
"""Position of the scale of each weight; its zero point follows."""

_ATTRIBUTES = ("direction", "hidden_size", "activations", "activation_alpha", "activation_beta", "clip", "input_forget")
"""What the operator knows; `layout` is not among them."""


def lstm_reason(use: Use) -> str | None:
    """None when an LSTM can compute in dynamic integers, else the reason; it does all that ONNX Runtime's kernel for floats does."""
    if use.int("layout", 0):
        return f"{_OPERATOR} has no layout with the batch first"
    unknown = [attribute.name for attribute in use.node.attribute if attribute.name not in (*_ATTRIBUTES, "layout")]
    return f"{_OPERATOR} has no attribute {unknown[0]}" if unknown else None


def lstm_operand(emitter: Emitter, weight: IntegerWeight, spec: Spec, output: str | None) -> Operand:
    """Codes with one column per gate row, scales and zero points; no float operator finds the operand's name.

    Args:
        emitter: collects what makes them.
        weight: codes of shape (directions, 4·hidden, inputs), scales along axis 1, which all directions share.
        spec: of the float weight.
        output: the operand's name; None makes one up.
    """
    directions, rows, _ = spec.shape
    codes = emitter.node("Transpose", [weight.codes], attributes={"perm": [0, 2, 1]})
    scale = emitter.node("Expand", [weight.scale, emitter.ints("scales", [directions, rows])])
    return Operand(output or emitter.name("operand"), (codes, scale, zero_points(emitter, scale)), spec, weight.axis)


def lower_lstm(emitter: Emitter, node: NodeProto, index: int, operand: Operand) -> None:
    """Add the node that reads one weight in integers.

    Args:
        emitter: takes it.
        node: an LSTM for which `lstm_reason` is None.
        index: of the weight, 1 or 2.
        operand: from `lstm_operand`.
    """
    codes, scale, zero = operand.values
    inputs = [_input(node, position) for position in range(_STANDARD_INPUTS + 2 * len(_PARAMETERS))]
    inputs[index] = codes
    inputs[_PARAMETERS[index] : _PARAMETERS[index] + 2] = scale, zero
    lowered = NodeProto(op_type=_OPERATOR, domain=DOMAIN, name=node.name, output=node.output, doc_string=node.doc_string)
    lowered.input.extend(_trimmed(inputs))
    lowered.attribute.extend(attribute for attribute in node.attribute if attribute.name in _ATTRIBUTES)
    emitter.nodes.append(lowered)


def join(original: NodeProto, first: NodeProto, second: NodeProto) -> NodeProto:
    """The node that does what two did, each of which took the place of `original` for another of its weights.

    Args:
        original: the node of the model.
        first: what the fragment of one weight made of it.
        second: what the fragment of another made of it.

    Raises:
        ValueError: the two are different operators.
    """
    if (first.domain, first.op_type) != (second.domain, second.op_type):
        raise ValueError(f"{original.op_type} {original.output[0]!r} becomes {first.op_type} and {second.op_type}")
    joined = NodeProto()
    joined.CopyFrom(first)
    del joined.input[:]
    for position in range(max(len(first.input), len(second.input))):
        mine, old = _input(first, position), _input(original, position)
        joined.input.append(_input(second, position) if mine == old else mine)
    return joined


def _input(node: NodeProto, position: int) -> str:
    """Name of an input; empty where it is left out."""
    return node.input[position] if position < len(node.input) else ""


def _trimmed(names: list[str]) -> list[str]:
    """The names without those at the end that are empty."""
    return names[: max((position for position, name in enumerate(names) if name), default=-1) + 1]
