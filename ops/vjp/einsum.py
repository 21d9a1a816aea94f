"""Einstein sums.

The gradient of an operand is an Einstein sum of the cotangent and the other operands, with the operand's indices as its result. An index
that stands in one operand only was summed over, so its gradient is repeated along it. An index whose length is 1 in one operand is
repeated to its length in the others, as ONNX Runtime and NumPy do.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .base import Call, Gradients, Rules, Unsupported, Value

_DOTS = "..."


@dataclass(frozen=True)
class _Equation:
    """An equation whose result is explicit.

    Attributes:
        terms: indices of each operand; an ellipsis counts as one and stands for the same number of axes everywhere.
        result: indices of the result.
    """

    terms: tuple[tuple[str, ...], ...]
    result: tuple[str, ...]


def _einsum(call: Call) -> Gradients:
    equation = _parsed(call.attribute("equation"))
    if any(_DOTS in term for term in equation.terms) and _DOTS not in equation.result:
        raise Unsupported("the result lacks the ellipsis of the operands")
    for index in call.wanted:
        if len(set(equation.terms[index])) < len(equation.terms[index]):
            raise Unsupported(f"an index is repeated inside operand {index}")
    lengths = _lengths(call, equation)
    return {index: _gradient(call, equation, lengths, index) for index in call.wanted}


def _gradient(call: Call, equation: _Equation, lengths: dict[str, int | str | None], index: int) -> str:
    own, x = equation.terms[index], call.x(index)
    others = [i for i in range(len(equation.terms)) if i != index]
    factors = [(call.dy, equation.result), *((call.x(i).name, equation.terms[i]) for i in others)]
    found = {letter for _, term in factors for letter in term}
    kept = tuple(letter for letter in own if letter in found)
    summed = _DOTS in found and _DOTS not in own  # an equation cannot say so
    gradient = _contracted(call, factors, (_DOTS, *kept) if summed else kept)
    if summed and (count := sum(label.startswith(_DOTS) for label in lengths)):
        gradient = call.op("ReduceSum", gradient, call.ints(*range(count)), keepdims=0)
    gradient = _repeated(call, equation, lengths, index, gradient)
    full = [lengths[label] for label in _labels(own, x)]
    shape = tuple(length if isinstance(length, int) else None for length in full)
    symbols = tuple(length if isinstance(length, str) else None for length in full)
    return call.sum_to(gradient, x, Value(gradient, x.dtype, shape, symbols=symbols))


def _repeated(call: Call, equation: _Equation, lengths: dict[str, int | str | None], index: int, gradient: str) -> str:
    """Give a gradient the axes over which only its operand was summed, and its lengths where the factors have 1.

    Args:
        index: the operand's.
        gradient: lacks the axes that are in no factor.
    """
    own, x = equation.terms[index], call.x(index)
    given = _lengths(call, equation, without=index)
    labels = _labels(own, x)
    lonely = [axis for axis, label in enumerate(labels) if label in own and label not in given and label not in equation.result]
    if lonely:
        gradient = call.op("Unsqueeze", gradient, call.ints(*lonely))
    summed = [label for label in labels if label in own and label not in equation.result]
    if all(label in given and given[label] == lengths[label] is not None for label in summed):
        return gradient
    return call.op("Expand", gradient, call.shape(x))


def _contracted(call: Call, factors: list[tuple[str, tuple[str, ...]]], result: tuple[str, ...]) -> str:
    """An Einstein sum of values with their indices."""
    if len(factors) == 1 and factors[0][1] == result:
        return factors[0][0]
    equation = ",".join("".join(term) for _, term in factors) + "->" + "".join(result)
    return call.op("Einsum", *(name for name, _ in factors), equation=equation)


# --- what an equation says


def _parsed(text: str) -> _Equation:
    left, arrow, right = text.replace(" ", "").partition("->")
    terms = tuple(_indices(term) for term in left.split(","))
    if arrow:
        return _Equation(terms, _indices(right))
    counts = Counter(index for term in terms for index in term)
    once = sorted(index for index, count in counts.items() if count == 1 and index != _DOTS)
    return _Equation(terms, ((_DOTS,) if _DOTS in counts else ()) + tuple(once))


def _indices(term: str) -> tuple[str, ...]:
    """Letters, and dots as one, in order."""
    before, dots, after = term.partition(_DOTS)
    return (*before, *([dots] if dots else []), *after)


def _labels(term: tuple[str, ...], value: Value) -> list[str]:
    """A label for each axis of an operand: its letter, or its place within the ellipsis."""
    dots = [f"{_DOTS}{place}" for place in range(value.rank - len(term) + 1)]
    return [label for index in term for label in (dots if index == _DOTS else [index])]


def _lengths(call: Call, equation: _Equation, without: int | None = None) -> dict[str, int | str | None]:
    """The length of each label after broadcasting, or its name; None where it is unknown.

    Args:
        without: an operand to leave out.
    """
    entries: dict[str, set[int | str | None]] = {}
    for index, term in enumerate(equation.terms):
        if index == without:
            continue
        value = call.x(index)
        for label, length in zip(_labels(term, value), value.lengths, strict=True):
            entries.setdefault(label, set()).add(length)
    return {label: _broadcast(found) for label, found in entries.items()}


def _broadcast(found: set[int | str | None]) -> int | str | None:
    """What lengths that are equal or 1 amount to."""
    longer = found - {1}
    numbers = [length for length in longer if isinstance(length, int)]
    if numbers or not longer:
        return numbers[0] if numbers else 1
    return longer.pop() if len(longer) == 1 else None


RULES: Rules = {"Einsum": _einsum}
