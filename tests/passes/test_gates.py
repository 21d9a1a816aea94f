"""Gates: the value they are given, whatever they wait for, and a dependency that optimization leaves."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from intaglio.ops.vjp import Names, Tape, Value
from intaglio.passes.gates import Gates
from tests.models import operators, optimized, run

FLOAT = np.dtype(np.float32)


def gated(like: Value | None, rank: int) -> onnx.ModelProto:
    """A model whose output is its input x, gated by h = tanh(b)."""
    tape = Tape(Names({"x", "b", "h", "y"}), 18)
    gates = Gates(tape)
    result = gates.wait("x", like, ["h", "h"])
    nodes = [helper.make_node("Tanh", ["b"], ["h"]), *tape.nodes, helper.make_node("Identity", [result], ["y"])]
    inputs = [helper.make_tensor_value_info("x", 1, [None] * rank), helper.make_tensor_value_info("b", 1, [None, None])]
    constants = [numpy_helper.from_array(array, name) for name, array in tape.constants.items()]
    outputs = [helper.make_tensor_value_info("y", 1, [None] * rank)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants, value_info=gates.declared)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 3), (2, 3)])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("other", [np.ones((2, 2)), np.full((1, 1), np.nan), np.full((1, 1), np.inf), np.zeros((0, 2))])
def test_a_gate_gives_what_it_is_given(shape: tuple[int, ...], known: bool, other: np.ndarray) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    (y,) = run(gated(Value("x", FLOAT, shape) if known else None, len(shape)), {"x": x, "b": other.astype(np.float32)})
    np.testing.assert_array_equal(y, x)
    assert y.shape == shape


@pytest.mark.parametrize("known", [True, False])
def test_optimization_leaves_the_dependency(known: bool) -> None:
    left = operators(optimized(gated(Value("x", FLOAT, (2, 3)) if known else None, 2)))
    assert left["Tanh"] == 1
    assert left["Reshape"] >= 1
    assert left["ReduceSum"] == 1, "one zero for both uses"
