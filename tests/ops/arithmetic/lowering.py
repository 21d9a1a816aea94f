"""What the tests of arithmetics share: one operator, lowered with a packed weight, run with and without optimizations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from intaglio.ops.arithmetic import ARITHMETICS, Operand
from intaglio.ops.emit import Emitter, spec_of
from intaglio.ops.storage import STORAGES
from tests.ops.running import Array, Feed, assemble, emitter_for, node_of, normal, run_model, use_of

FLOAT32 = 1e-5
"""Sums of a few dozen float32 products, in another order: relative to the largest result."""

HALF_STEP = 0.5001
"""A value that is rounded to nearest moves by half a step at most, give or take float32's own rounding of the step."""


def tame(seed: int, *shape: int, inputs: int = 1) -> Array:
    """Weights whose products with uint8 never exceed int16 in pairs of neighbouring inputs, where processors without VNNI saturate.

    Along axis `inputs` the first entry is ±2, the second 0, all others within ±1.
    """
    array = np.moveaxis(np.clip(normal(seed, *shape), -1, 1), inputs, 0)
    array[0] = np.where(array[0] < 0, -2, 2)
    array[1] = 0
    return np.ascontiguousarray(np.moveaxis(array, 0, inputs))


@dataclass(frozen=True)
class Lowered:
    """An operator that was lowered.

    Attributes:
        emitter: holds everything; the result is y.
        operand: of the weight.
        packed: the weight's arrays.
        decoded: the weight as its storage decodes it.
    """

    emitter: Emitter
    operand: Operand
    packed: tuple[Array, ...]
    decoded: Array


def reasons(arithmetic: str, storage: str, text: str, weight: Array, axis: int, index: int = 1, opset: int = 18) -> list[str]:
    """Why an operator or its weight is declined."""
    chosen = ARITHMETICS[arithmetic]
    found = (chosen.declines(use_of(text, weight.shape, index), opset), chosen.accepts(STORAGES[storage], spec_of(weight), axis))
    return [reason for reason in found if reason]


def lower(
    arithmetic: str, storage: str, text: str, weight: Array, axis: int, index: int = 1, *, opset: int = 18, functions: bool = True
) -> Lowered:
    """Lower one operator that reads the weight w."""
    assert not reasons(arithmetic, storage, text, weight, axis, index, opset)
    emitter, spec = emitter_for(opset, functions=functions), spec_of(weight)
    packed = STORAGES[storage].encode(weight, axis)
    operand = ARITHMETICS[arithmetic].operand(emitter, "", STORAGES[storage], packed, spec, axis)
    node = node_of(text)
    node.name = "layer"
    ARITHMETICS[arithmetic].lower(emitter, node, index, operand)
    assert emitter.nodes[-1].name == "layer"
    return Lowered(emitter, operand, packed, np.asarray(STORAGES[storage].decode(packed, spec)))


def optimized(emitter: Emitter, feed: Feed, folder: Path, relative: float = FLOAT32) -> tuple[list[str], Array]:
    """Operators of the optimized graph and its result y, which is that of the graph as it is written to within `relative`."""
    model, path = assemble(emitter, feed, ["y"]), folder / "optimized.onnx"
    (plain,) = run_model(model, feed, optimize=False)
    (result,) = run_model(model, feed, save_to=path)
    np.testing.assert_allclose(result, plain, rtol=0, atol=relative * float(np.abs(plain).max()))
    return [node.op_type for node in onnx.load(path).graph.node], result
