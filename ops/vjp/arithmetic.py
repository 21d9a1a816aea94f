"""Sums, products and quotients, with broadcasting."""

from __future__ import annotations

from .base import Call, Gradients, Rules


def _add(call: Call) -> Gradients:
    return {index: call.sum_to(call.dy, call.x(index)) for index in call.wanted}


def _sub(call: Call) -> Gradients:
    signed = {0: lambda: call.dy, 1: lambda: call.op("Neg", call.dy)}
    return {index: call.sum_to(signed[index](), call.x(index)) for index in call.wanted}


def _mul(call: Call) -> Gradients:
    return {index: call.sum_to(call.op("Mul", call.dy, call.x(1 - index).name), call.x(index)) for index in call.wanted}


def _div(call: Call) -> Gradients:
    over = call.op("Div", call.dy, call.x(1).name)
    gradients = {}
    if 0 in call.wanted:
        gradients[0] = call.sum_to(over, call.x(0))
    if 1 in call.wanted:
        gradients[1] = call.sum_to(call.op("Neg", call.op("Mul", over, call.y().name)), call.x(1))
    return gradients


RULES: Rules = {"Add": _add, "Sub": _sub, "Mul": _mul, "Div": _div, "Sum": _add}
