"""Gradients of recurrent layers."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from onnx import helper

from intaglio.passes.differentiate import differentiate

from .checking import RUNTIME_TOLERANCE, TOLERANCE, model_error, model_of, relative_error, run_gradients, run_in_runtime

Array = np.ndarray

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_OUTPUTS = {"LSTM": ("y", "h", "c"), "GRU": ("y", "h"), "RNN": ("y", "h")}
_STEPS, _BATCH, _INPUTS, _SIZE = 3, 2, 2, 3


def _layer(op_type: str, seed: int, direction: str, layout: int, optional: frozenset[str]) -> dict[str, Array]:
    """Inputs of a layer in the operator's order; bias, states and peepholes only if named in `optional`."""
    ways, gates = 2 if direction == "bidirectional" else 1, _GATES[op_type]
    state = (_BATCH, ways, _SIZE) if layout else (ways, _BATCH, _SIZE)
    shapes: dict[str, tuple[int, ...]] = {
        "x": (_BATCH, _STEPS, _INPUTS) if layout else (_STEPS, _BATCH, _INPUTS),
        "w": (ways, gates * _SIZE, _INPUTS),
        "r": (ways, gates * _SIZE, _SIZE),
        "b": (ways, 2 * gates * _SIZE),
        "h0": state,
        "c0": state,
        "p": (ways, 3 * _SIZE),
    }
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in shapes.items() if name in "xwr" or name in optional}


def _model(
    op_type: str, inputs: dict[str, Array], outputs: tuple[str, ...], open_shapes: bool = False, **attributes: object
) -> onnx.ModelProto:
    order = ["x", "w", "r", "b", "", "h0", "c0", "p"][: None if op_type == "LSTM" else 6]
    names = [name if name in inputs else "" for name in order]
    results = [name if name in outputs else "" for name in _OUTPUTS[op_type]]
    node = helper.make_node(op_type, names, results, hidden_size=_SIZE, **attributes)
    proto = model_of([node], inputs, outputs, opset=22)
    if open_shapes:
        for axis in range(2):
            proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"x{axis}"
    return proto


def _one_way(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Scans that go backwards, which the reference evaluator cannot run, as scans of what is turned around."""
    nodes = []
    for node in proto.graph.node:
        given = {attribute.name: list(attribute.ints) for attribute in node.attribute if attribute.name.endswith("directions")}
        if not any(map(any, given.values())):
            nodes.append(node)
            continue
        count = len(given["scan_input_directions"])
        before = [_turned(name, f"{name}.turned.{node.output[0]}") for name in node.input[-count:]]
        kept = len(given["scan_output_directions"])
        after = [_turned(f"{name}.turned", name) for name in node.output[len(node.output) - kept :]]
        turned = onnx.NodeProto()
        turned.CopyFrom(node)
        turned.input[-count:] = [step.output[0] for step in before]
        turned.output[len(node.output) - kept :] = [step.input[0] for step in after]
        for attribute in [attribute for attribute in turned.attribute if attribute.name in given]:
            turned.attribute.remove(attribute)
        nodes += [*before, turned, *after]
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    for name, number in (("first", -1), ("last", -(2**31)), ("axis", 0), ("step", -1)):
        result.graph.initializer.append(onnx.numpy_helper.from_array(np.array([number]), f"turn.{name}"))
    return result


def _turned(name: str, result: str) -> onnx.NodeProto:
    return helper.make_node("Slice", [name, "turn.first", "turn.last", "turn.axis", "turn.step"], [result])


@pytest.mark.parametrize("op_type", ["LSTM", "GRU", "RNN"])
@settings(max_examples=15, deadline=None)
@given(
    direction=st.sampled_from(["forward", "reverse", "bidirectional"]),
    layout=st.integers(0, 1),
    optional=st.frozensets(st.sampled_from(["b", "h0", "c0", "p"])),
    read=st.integers(1, 7),
    linear=st.booleans(),
    open_shapes=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gradients(
    op_type: str, direction: str, layout: int, optional: frozenset[str], read: int, linear: bool, open_shapes: bool, seed: int
) -> None:
    """`read` is the set of outputs that the loss reads, as bits."""
    if op_type != "LSTM":
        optional -= {"c0", "p"}
    inputs = _layer(op_type, seed, direction, layout, optional)
    outputs = tuple(name for bit, name in enumerate(_OUTPUTS[op_type]) if read & 1 << bit) or ("y",)
    attributes: dict[str, object] = {"direction": direction, "layout": layout}
    if op_type == "GRU":
        attributes["linear_before_reset"] = int(linear)
    proto = _model(op_type, inputs, outputs, open_shapes, **attributes)
    assert model_error(proto, inputs, list(inputs), outputs, prepare=_one_way) < TOLERANCE


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("op_type", ["LSTM", "GRU", "RNN"])
def test_everything_at_once(op_type: str, direction: str, layout: int) -> None:
    inputs = _layer(op_type, 0, direction, layout, frozenset({"b", "h0", "c0", "p"} if op_type == "LSTM" else {"b", "h0"}))
    proto = _model(op_type, inputs, _OUTPUTS[op_type], direction=direction, layout=layout)
    assert model_error(proto, inputs, list(inputs), _OUTPUTS[op_type], prepare=_one_way) < TOLERANCE


@pytest.mark.parametrize("name", ["x", "w", "r", "b", "h0", "c0", "p"])
def test_each_input_by_itself(name: str) -> None:
    inputs = _layer("LSTM", 0, "reverse", 0, frozenset({"b", "h0", "c0", "p"}))
    proto = _model("LSTM", inputs, ("y",), direction="reverse")
    assert model_error(proto, inputs, [name], prepare=_one_way) < TOLERANCE


@pytest.mark.parametrize("op_type", ["LSTM", "GRU", "RNN"])
def test_a_sequence_of_one_step(op_type: str) -> None:
    inputs = _layer(op_type, 0, "bidirectional", 0, frozenset({"b"}))
    inputs["x"] = inputs["x"][:1]
    proto = _model(op_type, inputs, ("y", "h"), direction="bidirectional")
    assert model_error(proto, inputs, list(inputs), ("y", "h"), prepare=_one_way) < TOLERANCE


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(
    ("op_type", "attributes", "optional"),
    [
        ("LSTM", {}, {"b", "h0", "c0"}),
        ("LSTM", {}, {"b", "h0", "c0", "p"}),
        ("LSTM", {}, {}),
        ("GRU", {"linear_before_reset": 0}, {"b", "h0"}),
        ("GRU", {"linear_before_reset": 1}, {"b", "h0"}),
        ("RNN", {}, {"b", "h0"}),
    ],
)
def test_in_the_runtime(op_type: str, direction: str, attributes: dict[str, object], optional: set[str]) -> None:
    """ONNX Runtime has no layout 1."""
    wide = _layer(op_type, 1, direction, 0, frozenset(optional))
    wide = {name: array.astype(np.float32).astype(np.float64) for name, array in wide.items()}
    single = {name: array.astype(np.float32) for name, array in wide.items()}
    outputs = _OUTPUTS[op_type]
    rng, ways = np.random.default_rng(2), 2 if direction == "bidirectional" else 1
    shapes = {"y": (_STEPS, ways, _BATCH, _SIZE), "h": (ways, _BATCH, _SIZE), "c": (ways, _BATCH, _SIZE)}
    cotangents = {name: rng.standard_normal(shapes[name]) for name in outputs}
    found = differentiate(_model(op_type, single, outputs, direction=direction, **attributes), outputs, list(single))
    exact = differentiate(_model(op_type, wide, outputs, direction=direction, **attributes), outputs, list(single))
    gradients = run_in_runtime(found, single, {name: array.astype(np.float32) for name, array in cotangents.items()})
    exact = type(exact)(_one_way(exact.proto), exact.cotangents, exact.gradients, exact.stops, exact.partial)
    expected = run_gradients(exact, wide, cotangents)
    assert gradients.keys() == expected.keys() == single.keys()
    assert max(relative_error(gradients[name], expected[name]) for name in single) < RUNTIME_TOLERANCE


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"activations": ["Sigmoid", "Relu", "Tanh"]}, "its activations are sigmoid, relu, tanh; only sigmoid, tanh, tanh are covered"),
        ({"clip": 3.0}, "it clips the inputs of its activations"),
        ({"input_forget": 1}, "its input and forget gates are coupled"),
    ],
)
def test_attributes_that_stop_the_derivative(attributes: dict[str, object], reason: str) -> None:
    inputs = _layer("LSTM", 0, "forward", 0, frozenset())
    (stop,) = differentiate(_model("LSTM", inputs, ("y",), **attributes), ["y"], ["x"]).stops
    assert stop.reason == reason


def test_lengths_of_sequences_stop_the_derivative() -> None:
    inputs = _layer("GRU", 0, "forward", 0, frozenset())
    proto = model_of("y = GRU <hidden_size = 3> (x, w, r, , n)", {**inputs, "n": np.array([3, 2], np.int32)}, ["y"])
    (stop,) = differentiate(proto, ["y"], ["x"]).stops
    assert stop.reason == "it has lengths of sequences"


def test_activations_that_are_spelled_out() -> None:
    inputs = _layer("LSTM", 0, "forward", 0, frozenset())
    proto = _model("LSTM", inputs, ("y",), activations=["sigmoid", "Tanh", "TANH"])
    assert model_error(proto, inputs, list(inputs), prepare=_one_way) < TOLERANCE
