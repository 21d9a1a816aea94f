"""int8 codes from any float weight that is known when the model is loaded: of codebooks, blocks, products of factors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..emit import Emitter, Program, Spec, ints_attribute
from .base import IntegerWeight
from .grid import single
from .scaling import emit_flat_scale

LARGEST = 127
"""The largest code, unless told otherwise; grids are symmetric."""

AXES_INPUT_OPSET = 18
"""The opset from which `ReduceMax` takes its axes as an input."""

_SCALE_TAIL = """
        share = Div (peak, largest)
        positive = Greater (share, nothing)
        s = Where (positive, share, one)
    }"""


def _scale_program(largest: int, reduced: str) -> Program:
    """Scales by the largest magnitude; `reduced` yields the peak. A program's name is its identity, so other grids have other names."""
    head = f"""<axes> (w) => (s) {{
        largest = Constant <value = float {{{largest}.0}}> ()
        nothing = Constant <value = float {{0.0}}> ()
        one = Constant <value = float {{1.0}}> ()
        f = Cast <to = 1> (w)
        magnitude = Abs (f)"""
    return Program("RoundingScale" if largest == LARGEST else f"RoundingScale{largest}", head + reduced + _SCALE_TAIL)


_BY_ATTRIBUTE = "\n        peak = ReduceMax <axes: ints = @axes, keepdims = 1> (magnitude)"

_BY_INPUT = """
        reduced = Constant <value: tensor = @axes> ()
        peak = ReduceMax <keepdims = 1> (magnitude, reduced)"""

_CODES = Program(
    "RoundedCodes",
    """(w, scale) => (c) {
        f = Cast <to = 1> (w)
        steps = Div (f, scale)
        rounded = Round (steps)
        c = Cast <to = 3> (rounded)
    }""",
)

MIN_OPSET = 11
"""`Round` exists since then."""


def requantize(emitter: Emitter, weight: str, spec: Spec, axis: int) -> IntegerWeight:
    """Add a program that rounds a float weight to int8 when the model is loaded.

    Args:
        emitter: collects it; its opset is `MIN_OPSET` or higher.
        weight: name of a value that depends on no input.
        spec: its shape and dtype.
        axis: that scales lie along.

    Returns:
        codes = round(w / s), ties to even, with s = max|w| / largest for each entry of `axis`, and 1 where that is zero; the emitter's
        target says what the largest code is.

    Raises:
        ValueError: the opset has no `Round`, or the weight has but one axis.
    """
    if emitter.target.opset < MIN_OPSET:
        raise ValueError(f"opset {emitter.target.opset} cannot round; expected {MIN_OPSET} or higher")
    axes = [i for i in range(len(spec.shape)) if i != axis]
    if not axes:
        raise ValueError("a weight of one axis has nothing to share a scale")
    largest = emitter.target.largest_code
    if emitter.target.opset < AXES_INPUT_OPSET:
        scale = emitter.call(_scale_program(largest, _BY_ATTRIBUTE), [weight], emitter.name("p"), {"axes": axes})
    else:
        scale = emitter.call(_scale_program(largest, _BY_INPUT), [weight], emitter.name("p"), {"axes": ints_attribute(axes)})
    codes = emitter.call(_CODES, [weight, scale], emitter.name("c"), {})
    return IntegerWeight(codes, emit_flat_scale(emitter, scale, 1), axis)


def requantized(weight: NDArray[np.generic], axis: int, largest: int = LARGEST) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """What the program of `requantize` yields: int8 codes of the weight's shape, and float32 scales of one dimension."""
    values = single(weight)
    others = tuple(i for i in range(values.ndim) if i != axis)
    scale = np.abs(values).max(axis=others, keepdims=True) / np.float32(largest)
    scale[~(scale > 0)] = 1
    return np.rint(values / scale).astype(np.int8), scale.reshape(-1)
