"""Activation functions, each a derivative times the cotangent g.

At a kink the derivative is that of one side, or zero where a function is clipped. ONNX Runtime computes a comparison, a cast and a product
faster than a selection, so masks multiply.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .base import Call, Gradients, Rule, Rules, Unsupported

_SQRT_HALF = math.sqrt(0.5)
_LOG_DENSITY = -math.log(math.sqrt(2 * math.pi))  # of the normal distribution at 0
_TANH_GELU = 2 * math.sqrt(2 / math.pi), 0.044715  # twice k, and c, of gelu ≈ x (1 + tanh(k (x + c x³))) / 2

# --- piecewise linear


def _masked(call: Call, mask: str, gradient: str) -> str:
    """The gradient where a bool is true, else zero."""
    return call.op("Mul", gradient, call.cast(mask, call.x().dtype))


def _relu(call: Call) -> Gradients:
    return {0: _masked(call, call.op("Greater", call.y().name, call.scalar(0)), call.dy)}


def _leaky_relu(call: Call) -> Gradients:
    return {0: _leaky(call, call.x().name, call.attribute("alpha", 0.01))}


def _leaky(call: Call, sign: str, alpha: float) -> str:
    """The gradient through a leaky Relu, given a value that has the sign of its input."""
    slope = call.op("Where", call.op("Greater", sign, call.scalar(0)), call.scalar(1), call.scalar(alpha))
    return call.op("Mul", call.dy, slope)


def _prelu(call: Call) -> Gradients:
    x, slope, zero = call.x(0), call.x(1), call.scalar(0)
    gradients = {}
    if 0 in call.wanted:
        chosen = call.op("Where", call.op("Greater", x.name, zero), call.scalar(1), slope.name)
        gradients[0] = call.op("Mul", call.dy, chosen)
    if 1 in call.wanted:
        gradients[1] = call.sum_to(call.op("Mul", call.dy, call.op("Min", x.name, zero)), slope)
    return gradients


def _thresholded_relu(call: Call) -> Gradients:
    return {0: _masked(call, call.op("Greater", call.x().name, call.scalar(call.attribute("alpha", 1.0))), call.dy)}


def _shrink(call: Call) -> Gradients:
    far = call.op("Greater", call.op("Abs", call.x().name), call.scalar(call.attribute("lambd", 0.5)))
    return {0: _masked(call, far, call.dy)}


def _hard_sigmoid(call: Call) -> Gradients:
    return {0: _strictly_inside(call, 0, 1, call.attribute("alpha", 0.2))}


def _strictly_inside(call: Call, low: float, high: float, slope: float) -> str:
    """slope · g where the output lies between two bounds, zero where it equals one."""
    y = call.y().name
    inside = call.op("And", call.op("Greater", y, call.scalar(low)), call.op("Less", y, call.scalar(high)))
    return _masked(call, inside, call.dy if slope == 1 else call.op("Mul", call.dy, call.scalar(slope)))


def _hard_swish(call: Call) -> Gradients:
    """x / 3 + 1/2 where |x| < 3, beyond 0 or 1."""
    x = call.x().name
    inside = call.op("Less", call.op("Abs", x), call.scalar(3))
    line = call.op("Add", call.op("Mul", x, call.scalar(1 / 3)), call.scalar(0.5))
    beyond = call.cast(call.op("Greater", x, call.scalar(0)), call.x().dtype)
    return {0: call.op("Mul", call.dy, call.op("Where", inside, line, beyond))}


# --- exponential on one side


def _elu(call: Call) -> Gradients:
    """1 above zero, α eˣ = y + α below; for α = 1 that is the smaller of both."""
    alpha = call.attribute("alpha", 1.0)
    below = call.op("Add", call.y().name, call.scalar(alpha))
    return {0: call.op("Mul", call.dy, _lesser(call, below) if alpha == 1 else _above_zero(call, 1, below))}


def _celu(call: Call) -> Gradients:
    """1 above zero, exp(x / α) = y / α + 1 below."""
    alpha = call.attribute("alpha", 1.0)
    scaled = call.y().name if alpha == 1 else call.op("Div", call.y().name, call.scalar(alpha))
    below = call.op("Add", scaled, call.scalar(1))
    return {0: call.op("Mul", call.dy, _lesser(call, below) if alpha > 0 else _above_zero(call, 1, below))}


def _selu(call: Call) -> Gradients:
    """γ above zero, γ α eˣ = y + γ α below."""
    alpha, gamma = call.attribute("alpha", 1.6732631921768188), call.attribute("gamma", 1.0507010221481323)
    below = call.op("Add", call.y().name, call.scalar(gamma * alpha))
    return {0: call.op("Mul", call.dy, _above_zero(call, gamma, below))}


def _lesser(call: Call, below: str) -> str:
    return call.op("Min", below, call.scalar(1))


def _above_zero(call: Call, slope: float, below: str) -> str:
    """The slope where the input is positive, `below` elsewhere."""
    return call.op("Where", call.op("Greater", call.x().name, call.scalar(0)), call.scalar(slope), below)


# --- smooth


def _sigmoid(call: Call) -> Gradients:
    y = call.y().name
    return {0: call.op("Mul", call.dy, call.op("Mul", y, call.op("Sub", call.scalar(1), y)))}


def _softplus(call: Call) -> Gradients:
    return {0: call.op("Mul", call.dy, call.op("Sigmoid", call.x().name))}


def _softsign(call: Call) -> Gradients:
    """g / (1 + |x|)²."""
    divisor = call.op("Add", call.op("Abs", call.x().name), call.scalar(1))
    return {0: call.op("Div", call.op("Div", call.dy, divisor), divisor)}


def _swish(default: float) -> Rule:
    """y = x σ(α x), with the given α unless the node says another: σ + α y (1 − σ)."""

    def rule(call: Call) -> Gradients:
        alpha = call.attribute("alpha", default)
        scaled = call.x().name if alpha == 1 else call.op("Mul", call.x().name, call.scalar(alpha))
        gate = call.op("Sigmoid", scaled)
        rest = call.op("Mul", call.y().name, call.op("Sub", call.scalar(1), gate))
        if alpha != 1:
            rest = call.op("Mul", rest, call.scalar(alpha))
        return {0: call.op("Mul", call.dy, call.op("Add", gate, rest))}

    return rule


def _mish(call: Call) -> Gradients:
    """y = x t with t = tanh(log(1 + eˣ)) = n / (n + 2), n = eˣ (eˣ + 2): t + x (1 − t²) σ(x).

    ONNX Runtime takes much longer for Softplus than for all of this. Above the largest x whose n is finite, t rounds to 1.
    """
    one, two = call.scalar(1), call.scalar(2)
    x = call.op("Min", call.x().name, call.scalar(5.5 if call.x().dtype.name == "float16" else 20))
    exp = call.op("Exp", x)
    n = call.op("Mul", exp, call.op("Add", exp, two))
    t = call.op("Div", n, call.op("Add", n, two))
    bent = call.op("Mul", call.op("Sub", one, call.op("Mul", t, t)), call.op("Sigmoid", x))
    return {0: call.op("Mul", call.dy, call.op("Add", t, call.op("Mul", x, bent)))}


# --- gelu


def _gelu(call: Call) -> Gradients:
    """Hendrycks and Gimpel 2016, arXiv 1606.08415."""
    if call.attribute("approximate", "none") == "tanh":
        return {0: _through_tanh_gelu(call, call.x().name)}
    return {0: _through_gelu(call, call.x().name)}


def _bias_gelu(call: Call) -> Gradients:
    return _to_both(call, _through_gelu(call, call.op("Add", call.x(0).name, call.x(1).name)))


def _fast_gelu(call: Call) -> Gradients:
    """With an optional bias over the last axis."""
    if not call.has_input(1):
        return {0: _through_tanh_gelu(call, call.x().name)}
    return _to_both(call, _through_tanh_gelu(call, call.op("Add", call.x(0).name, call.x(1).name)))


def _to_both(call: Call, gradient: str) -> Gradients:
    """The gradients of an input and of a bias from that of their sum."""
    return {index: call.sum_to(gradient, call.x(index)) for index in call.wanted}


def _through_gelu(call: Call, x: str) -> str:
    """g (Φ(x) + x φ(x)), with the normal distribution Φ and its density φ."""
    u = call.op("Mul", x, call.scalar(_SQRT_HALF))
    half = call.scalar(0.5)
    distribution = call.op("Add", call.op("Mul", call.op("Erf", u), half), half)
    density = call.op("Exp", call.op("Sub", call.scalar(_LOG_DENSITY), call.op("Mul", u, u)))
    return call.op("Mul", call.dy, call.op("Add", distribution, call.op("Mul", x, density)))


def _through_tanh_gelu(call: Call, x: str) -> str:
    """y = x s with s = σ(v), v = 2k (x + c x³): g (s + y (1 − s) v′), because (1 + tanh u) / 2 = σ(2u)."""
    k, c = _TANH_GELU
    linear = call.scalar(k)
    cubic = call.op("Mul", call.op("Mul", x, x), call.scalar(k * c))
    s = call.op("Sigmoid", call.op("Mul", x, call.op("Add", cubic, linear)))
    slope = call.op("Add", call.op("Mul", cubic, call.scalar(3)), linear)
    rest = call.op("Mul", call.op("Mul", call.y().name, call.op("Sub", call.scalar(1), s)), slope)
    return call.op("Mul", call.dy, call.op("Add", s, rest))


# --- fused into another operator


def before_activation(call: Call, activation: str, parameters: Sequence[float]) -> str:
    """The cotangent in front of an activation that the node applies last, from the node's output.

    Args:
        call: the node; its first output is that of the activation.
        activation: the operator's name; empty for none.
        parameters: of the activation, in the order in which ONNX Runtime stores them; missing ones are the operator's defaults.

    Raises:
        Unsupported: the output does not tell what went in.
    """
    given = dict(enumerate(parameters))
    if not activation:
        return call.dy
    if activation == "LeakyRelu" and given.get(0, 0.01) > 0:
        return _leaky(call, call.y().name, given.get(0, 0.01))
    if activation == "HardSigmoid":
        return _strictly_inside(call, 0, 1, given.get(0, 0.2))
    if activation == "Clip" and len(given) == 2:
        return _strictly_inside(call, given[0], given[1], 1)
    if activation in ("Relu", "Sigmoid"):
        return {"Relu": _relu, "Sigmoid": _sigmoid}[activation](call)[0]
    if activation == "Tanh":
        y = call.y().name
        return call.op("Mul", call.dy, call.op("Sub", call.scalar(1), call.op("Mul", y, y)))
    raise Unsupported(f"the fused activation {activation} cannot be differentiated from its output")


RULES: Rules = {
    "Celu": _celu,
    "Elu": _elu,
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "LeakyRelu": _leaky_relu,
    "Mish": _mish,
    "PRelu": _prelu,
    "Relu": _relu,
    "Selu": _selu,
    "Shrink": _shrink,
    "Sigmoid": _sigmoid,
    "Softplus": _softplus,
    "Softsign": _softsign,
    "Swish": _swish(1.0),
    "ThresholdedRelu": _thresholded_relu,
    "com.microsoft::BiasGelu": _bias_gelu,
    "com.microsoft::FastGelu": _fast_gelu,
    "com.microsoft::Gelu": _gelu,
    "com.microsoft::QuickGelu": _swish(1.702),
}
