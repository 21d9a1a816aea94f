"""Functions of single elements: powers, exponentials, trigonometry, changes of type, and steps, whose derivative is zero.

Let g be the cotangent. Derivatives are written with the output y where that is cheaper than with the input x. Activation functions have
their own file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Call, Gradients, Rule, Rules, Unsupported

# --- functions of one element


def _times(slope: Callable[[Call], str]) -> Rule:
    """dx = g ⊙ slope."""
    return lambda call: {0: call.op("Mul", call.dy, slope(call))}


def _over(divisor: Callable[[Call], str]) -> Rule:
    """dx = g / divisor."""
    return lambda call: {0: call.op("Div", call.dy, divisor(call))}


def _minus(rule: Rule) -> Rule:
    """The opposite of what a rule gives for input 0."""
    return lambda call: {0: call.op("Neg", rule(call)[0])}


def _input(call: Call) -> str:
    return call.x().name


def _output(call: Call) -> str:
    return call.y().name


def _of_input(op_type: str) -> Callable[[Call], str]:
    """Another function of the input."""
    return lambda call: call.op(op_type, call.x().name)


def _squared_output(call: Call) -> str:
    return call.op("Mul", call.y().name, call.y().name)


def _twice_output(call: Call) -> str:
    return call.op("Mul", call.y().name, call.scalar(2))


def _one_plus_squared_input(call: Call) -> str:
    return call.op("Add", call.op("Mul", call.x().name, call.x().name), call.scalar(1))


def _one_minus_squared_input(call: Call) -> str:
    """1 − x² as a product, which loses no digits near ±1."""
    x, one = call.x().name, call.scalar(1)
    return call.op("Mul", call.op("Sub", one, x), call.op("Add", one, x))


def _tan_slope(call: Call) -> str:
    return call.op("Add", _squared_output(call), call.scalar(1))


def _tanh_slope(call: Call) -> str:
    return call.op("Sub", call.scalar(1), _squared_output(call))


def _asin_divisor(call: Call) -> str:
    return call.op("Sqrt", _one_minus_squared_input(call))


def _asinh_divisor(call: Call) -> str:
    return call.op("Sqrt", _one_plus_squared_input(call))


def _acosh_divisor(call: Call) -> str:
    """√(x² − 1) as a product, for the same reason as `_one_minus_squared_input`."""
    x, one = call.x().name, call.scalar(1)
    return call.op("Sqrt", call.op("Mul", call.op("Sub", x, one), call.op("Add", x, one)))


def _erf_slope(call: Call) -> str:
    """2/√π exp(−x²), the factor inside of the exponential."""
    squared = call.op("Mul", call.x().name, call.x().name)
    return call.op("Exp", call.op("Sub", call.scalar(math.log(2 / math.sqrt(math.pi))), squared))


# --- powers and remainders


def _pow(call: Call) -> Gradients:
    """dx = g p xᵖ⁻¹, dp = g xᵖ log x.

    Where p = 0 the first is 0, also at x = 0. Where x ≤ 0 the second is taken as 0: at x = 0 it is the limit for p > 0, and below
    the power is defined at isolated exponents only.
    """
    base, exponent = call.x(0), call.x(1)
    gradients = {}
    if 0 in call.wanted:
        scaled = _through_base(call)
        if scaled is not None:
            gradients[0] = call.sum_to(scaled, base)
    if 1 in call.wanted:
        positive = call.op("Greater", base.name, call.scalar(0))
        logarithm = call.op("Log", call.op("Where", positive, base.name, call.scalar(1)))
        total = call.sum_to(call.op("Mul", call.op("Mul", call.dy, call.y().name), logarithm), exponent)
        gradients[1] = total if exponent.dtype == base.dtype else call.cast(total, exponent.dtype)
    return gradients


def _through_base(call: Call) -> str | None:
    """g p xᵖ⁻¹ in the shape of the output; None if p is 0."""
    base, exponent = call.x(0), call.x(1)
    if exponent.constant is None:
        p = exponent.name if exponent.dtype == base.dtype else call.cast(exponent.name, base.dtype)
        zero, one = call.scalar(0), call.scalar(1)
        lower = call.op("Where", call.op("Equal", p, zero), one, call.op("Sub", p, one))
    elif exponent.constant.size == 1:
        return _through_scalar_power(call, float(exponent.constant.item()))
    else:
        powers: NDArray[Any] = exponent.constant.astype(base.dtype)
        p, lower = call.constant(powers), call.constant(np.where(powers == 0, 1, powers - 1).astype(base.dtype))
    return call.op("Mul", call.dy, call.op("Mul", call.op("Pow", base.name, lower), p))


def _through_scalar_power(call: Call, p: float) -> str | None:
    """The same for a known scalar exponent: general powers are slow, so none is taken where the output or a product will do."""
    if p == 0:
        return None
    if p == 1:
        return call.dy
    if p == 0.5:
        return call.op("Div", call.op("Mul", call.dy, call.scalar(0.5)), call.y().name)
    if p < 0:
        lower = call.op("Div", call.y().name, call.x().name)  # y is infinite where x is 0, so this is never 0/0
    else:
        lower = call.x().name if p == 2 else call.op("Pow", call.x().name, call.scalar(p - 1))
    return call.op("Mul", call.dy, call.op("Mul", lower, call.scalar(p)))


def _mod(call: Call) -> Gradients:
    """y = a − b trunc(a / b); at its jumps the quotient counts as constant."""
    if not call.attribute("fmod", 0):
        raise Unsupported("fmod must be 1 for floats")
    gradients = {}
    if 0 in call.wanted:
        gradients[0] = call.sum_to(call.dy, call.x(0))
    if 1 in call.wanted:
        # The quotient comes from the output: a / b may round up to the next integer.
        quotient = call.op("Round", call.op("Div", call.op("Sub", call.y().name, call.x(0).name), call.x(1).name))
        gradients[1] = call.sum_to(call.op("Mul", call.dy, quotient), call.x(1))
    return gradients


# --- copies and constants


def _identity(call: Call) -> Gradients:
    return {0: call.dy}


def _cast(call: Call) -> Gradients:
    """Between floats. Rounding counts as the identity, saturation too."""
    if not call.y().is_float:
        return {}
    return {0: call.dy if call.y().dtype == call.x().dtype else call.cast(call.dy, call.x().dtype)}


def _nothing(call: Call) -> Gradients:
    """Steps, and what depends on a shape only: the derivative is zero, and zero is taken at the jumps too."""
    return {}


RULES: Rules = {
    "Abs": _times(_of_input("Sign")),  # the subgradient at 0 is 0
    "Acos": _minus(_over(_asin_divisor)),
    "Acosh": _over(_acosh_divisor),
    "Asin": _over(_asin_divisor),
    "Asinh": _over(_asinh_divisor),
    "Atan": _over(_one_plus_squared_input),
    "Atanh": _over(_one_minus_squared_input),
    "Cast": _cast,
    "CastLike": _cast,
    "Ceil": _nothing,
    "Cos": _minus(_times(_of_input("Sin"))),
    "Cosh": _times(_of_input("Sinh")),
    "Erf": _times(_erf_slope),
    "Exp": _times(_output),
    "EyeLike": _nothing,
    "Floor": _nothing,
    "Identity": _identity,
    "Log": _over(_input),
    "Mod": _mod,
    "Neg": lambda call: {0: call.op("Neg", call.dy)},
    "Pow": _pow,
    "RandomNormalLike": _nothing,
    "RandomUniformLike": _nothing,
    "Reciprocal": _minus(_times(_squared_output)),
    "Round": _nothing,
    "Sign": _nothing,
    "Sin": _times(_of_input("Cos")),
    "Sinh": _times(_of_input("Cosh")),
    "Sqrt": _over(_twice_output),
    "Tan": _times(_tan_slope),
    "Tanh": _times(_tanh_slope),
}
