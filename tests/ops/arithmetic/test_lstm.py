"""An LSTM in dynamic integers: the kernel computes what its definition says, and nothing of the weights is left to decode."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.arithmetic import join
from intaglio.ops.arithmetic.dynamic import DYNAMIC
from intaglio.ops.emit import Emitter, Spec, spec_of
from intaglio.ops.storage import STORAGES, readers
from intaglio.ops.storage.requantize import requantized
from tests.ops.arithmetic.lowering import optimized, reasons
from tests.ops.arithmetic.test_dynamic import rounded
from tests.ops.running import Array, Feed, assemble, assert_close, emitter_for, node_of, normal, run_model, run_node, use_of

STEPS, BATCH, INPUTS, HIDDEN = 5, 3, 20, 12
STORED = ("int8", "int6", "int4", "int4-b32", "planes3.0", "kmeans4", "vq4x4", "fp16")
"""One storage of each kind that can hold a weight for integers."""

FLOATS = 1e-3
"""Where a float32 sum lies just between two steps, the kernel rounds to the other one: 1/255 of a range times one weight, of dozens that
meet in a gate. Relative to the largest output."""

STEP = 0.05
"""What rounding activations to 8 bits costs at most: a few such steps in a row."""


def text(direction: str, attributes: str = "", rest: str = "b") -> str:
    return f'y, h, c = LSTM <hidden_size = {HIDDEN}, direction = "{direction}"{attributes}> (x, w, r, {rest})'


def weights(directions: int, seed: int = 0) -> dict[str, Array]:
    """Weights under which gates are neither open nor shut."""
    return {
        "w": normal(seed, directions, 4 * HIDDEN, INPUTS) / 4,
        "r": normal(seed + 1, directions, 4 * HIDDEN, HIDDEN) / 3,
        "b": normal(seed + 2, directions, 8 * HIDDEN) / 4,
    }


def lowered(source: str, arrays: dict[str, Array], storages: tuple[str, str], opset: int = 18, *, functions: bool = True) -> Emitter:
    """Both weights in integers, each in a storage of its own; other arrays stay constants. The result is y."""
    collected, node = emitter_for(opset, functions=functions), node_of(source)
    node.name = "layer"
    halves = []
    for index, storage in zip((1, 2), storages, strict=True):
        weight = arrays["wr"[index - 1]]
        assert DYNAMIC.declines(use_of(source, weight.shape, index), opset) is None
        emitter = emitter_for(opset, functions=functions, stem="wr"[index - 1])
        operand = DYNAMIC.operand(emitter, "", STORAGES[storage], STORAGES[storage].encode(weight, 1), spec_of(weight), 1)
        DYNAMIC.lower(emitter, node, index, operand)
        halves.append(emitter.nodes.pop())
        collected.nodes += emitter.nodes
        collected.initializers |= emitter.initializers
        collected.programs |= emitter.programs
    collected.nodes.append(join(node, *halves))
    collected.initializers |= {name: array for name, array in arrays.items() if name not in ("w", "r")}
    return collected


def bytes_of(weight: Array, storage: str) -> Array:
    """What an integer kernel has of a weight: (codes, scale) of what the storage holds, multiplied."""
    chosen, spec = STORAGES[storage], spec_of(weight)
    packed = chosen.encode(weight, 1)
    decoded = np.asarray(chosen.decode(packed, spec), np.float32)
    if chosen.emit_integer(emitter_for(), "", packed, spec, 1) is not None:
        return decoded
    codes, scale = requantized(decoded, 1)
    return np.asarray(codes * scale.reshape(1, -1, 1), np.float32)


def sigmoid(value: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-value)))


def reference(x: Array, arrays: dict[str, Array], direction: str, through: Callable[[Array], Array]) -> Array:
    """Y (steps, directions, batch, hidden) by the equations of the ONNX operator, with what multiplies a weight passed through a function.

    Args:
        x: (steps, batch, inputs).
        arrays: w, r and b.
        direction: as the attribute.
        through: of X, and of the state at each step.
    """
    turned = {"forward": [1], "reverse": [-1], "bidirectional": [1, -1]}[direction]
    results = []
    for number, turn in enumerate(turned):
        gates = through(x)[::turn] @ arrays["w"][number].T.astype(np.float64)
        shift = arrays["b"][number].reshape(2, -1).sum(0)
        h, c, states = np.zeros((x.shape[1], HIDDEN), np.float32), np.zeros((x.shape[1], HIDDEN)), []
        for step in gates:
            i, o, f, g = np.split(step + through(h) @ arrays["r"][number].T.astype(np.float64) + shift, 4, axis=1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = (sigmoid(o) * np.tanh(c)).astype(np.float32)
            states.append(h)
        results.append(np.stack(states[::turn]))
    return np.stack(results, 1)


def state(h: Array) -> Array:
    """A state as the kernel rounds it; one of zeros stays."""
    return rounded(h) if h.any() else h


@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_the_kernel_computes_with_rounded_inputs_and_states_and_decodes_nothing(direction: str, storage: str, tmp_path: Path) -> None:
    arrays = weights(1 + (direction == "bidirectional"))
    x = normal(9, STEPS, BATCH, INPUTS)
    operators, result = optimized(lowered(text(direction), arrays, (storage, storage)), {"x": x}, tmp_path)
    assert operators == ["DynamicQuantizeLSTM"]
    held = {name: bytes_of(array, storage) if name != "b" else array for name, array in arrays.items()}
    expected = reference(x, held, direction, state)
    assert_close(result, expected.astype(np.float32), FLOATS)
    assert np.abs(result - reference(x, held, direction, lambda value: value)).max() > FLOATS * np.abs(result).max()


def test_all_that_the_kernel_reads_of_the_weights_are_constants_when_it_is_created(tmp_path: Path) -> None:
    """ONNX Runtime packs constants only; codes, scales and zero points are initializers of the optimized graph, and nothing else is."""
    emitter = lowered(text("bidirectional"), weights(2), ("int4", "planes3.0"))
    feed = {"x": normal(9, STEPS, BATCH, INPUTS)}
    run_model(assemble(emitter, feed, ["y"]), feed, save_to=tmp_path / "optimized.onnx")
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    (node,) = graph.node
    shapes = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer}
    read = [shapes[node.input[index]] for index in (1, 2, 8, 9, 10, 11)]
    codes, scales = onnx.TensorProto.INT8, onnx.TensorProto.FLOAT
    assert read == [
        (codes, (2, INPUTS, 4 * HIDDEN)),
        (codes, (2, HIDDEN, 4 * HIDDEN)),
        (scales, (2, 4 * HIDDEN)),
        (codes, (2, 4 * HIDDEN)),
        (scales, (2, 4 * HIDDEN)),
        (codes, (2, 4 * HIDDEN)),
    ]
    assert set(shapes) == {name for name in node.input if name} - {"x"}


@pytest.mark.parametrize(("opset", "functions"), [(11, False), (13, True), (17, False), (22, True)])
@pytest.mark.parametrize("storages", [("int8", "int8"), ("int4-b32", "int4")], ids=str)
def test_old_and_new_models(opset: int, functions: bool, storages: tuple[str, str], tmp_path: Path) -> None:
    emitter = lowered(text("forward"), weights(1), storages, opset, functions=functions)
    assert optimized(emitter, {"x": normal(9, STEPS, BATCH, INPUTS)}, tmp_path)[0] == ["DynamicQuantizeLSTM"]


ACTIVATIONS: tuple[dict[str, list[str] | list[float]], ...] = (
    {},
    {"activations": ["HardSigmoid", "Tanh", "Softsign"], "activation_alpha": [0.3], "activation_beta": [0.4]},
    {"activations": ["Sigmoid", "Relu", "Elu"], "activation_alpha": [0.8]},
)
"""Of one direction."""


@settings(max_examples=40)
@given(st.data())
def test_every_input_and_attribute_means_what_it_means_in_floats(data: st.DataObject) -> None:
    """Against ONNX Runtime's kernel for floats on the same bytes: what differs is the rounding of activations alone."""
    direction = data.draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
    directions = 1 + (direction == "bidirectional")
    extra = data.draw(st.sampled_from(["", ", clip = 0.7", ", layout = 0"])) + data.draw(st.sampled_from(["", ", input_forget = 1"]))
    kinds = data.draw(st.sampled_from(ACTIVATIONS))
    extra += "".join(f", {name} = {json.dumps(values * directions)}" for name, values in kinds.items())
    optional = {
        "b": weights(directions, 3)["b"],
        "n": np.asarray(data.draw(st.lists(st.integers(1, STEPS), min_size=BATCH, max_size=BATCH)), np.int32),
        "h0": normal(5, directions, BATCH, HIDDEN) / 2,
        "c0": normal(6, directions, BATCH, HIDDEN) / 2,
        "p": normal(7, directions, 3 * HIDDEN) / 4,
    }
    present = {name: array for name, array in optional.items() if data.draw(st.booleans(), name)}
    rest = ", ".join(name if name in present else '""' for name in optional)
    arrays = {name: array for name, array in weights(directions, data.draw(st.integers(0, 99))).items() if name != "b"} | present
    source = text(direction, extra, rest)
    storages = data.draw(st.tuples(*[st.sampled_from(STORED)] * 2))
    x = normal(8, STEPS, BATCH, INPUTS)
    held = {name: bytes_of(arrays[name], storage) for name, storage in zip("wr", storages, strict=True)}
    expected = run_node(node_of(source.replace(", layout = 0", "")), {"x": x}, arrays | held)
    for optimize in (False, True):
        found = run_model(assemble(lowered(source, arrays, storages), {"x": x}, ["y", "h", "c"]), {"x": x}, optimize=optimize)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, STEP)


def test_the_last_node_keeps_name_and_outputs_and_knows_no_layout() -> None:
    node = lowered(text("forward", ", layout = 0, clip = 2.0"), weights(1), ("int8", "int8")).nodes[-1]
    assert (node.name, list(node.output), node.domain) == ("layer", ["y", "h", "c"], "com.microsoft")
    assert {attribute.name for attribute in node.attribute} == {"hidden_size", "direction", "clip"}


@pytest.mark.parametrize("index", [1, 2])
def test_one_weight_alone_makes_half_a_node(index: int) -> None:
    emitter, weight = emitter_for(), weights(1)["wr"[index - 1]]
    operand = DYNAMIC.operand(emitter, "", STORAGES["int8"], STORAGES["int8"].encode(weight, 1), spec_of(weight), 1)
    DYNAMIC.lower(emitter, node_of(text("forward")), index, operand)
    inputs = list(emitter.nodes[-1].input)
    assert inputs[3 - index] == "wr"[2 - index]
    assert bool(inputs[8]) == (index == 1)
    assert len(inputs) == (10 if index == 1 else 12)
    assert inputs[-1]


def test_joining_takes_each_input_from_the_half_that_changed_it() -> None:
    original = node_of("y = LSTM <hidden_size = 4> (x, w, r, b)")
    first, second = node_of("y = LSTM <hidden_size = 4> (h, w2, r, b)"), node_of("y = LSTM <hidden_size = 4> (x, w, r2, b, n)")
    assert list(join(original, first, second).input) == list(join(original, second, first).input) == ["h", "w2", "r2", "b", "n"]


def test_a_node_that_becomes_two_operators_is_refused() -> None:
    original = node_of("y = LSTM <hidden_size = 4> (x, w, r)")
    with pytest.raises(ValueError, match="LSTM 'y' becomes LSTM and DynamicQuantizeLSTM"):
        join(original, original, node_of("y = com.microsoft.DynamicQuantizeLSTM (x, w, r)"))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("y = LSTM <hidden_size = 12, layout = 1> (x, w, r)", "DynamicQuantizeLSTM has no layout with the batch first"),
        ("y = LSTM <hidden_size = 12, output_sequence = 1> (x, w, r)", "DynamicQuantizeLSTM has no attribute output_sequence"),
    ],
)
def test_what_the_operator_lacks_is_declined(source: str, reason: str) -> None:
    assert reasons("dynamic", "int8", source, weights(1)["w"], 1) == [reason]


def test_types_and_versions_that_have_no_operator_are_declined() -> None:
    weight = weights(1)["w"]
    assert reasons("dynamic", "int8", text("forward"), weight, 1, opset=10) == ["DynamicQuantizeLinear needs opset 11, the model has 10"]
    expected = "a weight of float16: DynamicQuantizeLinear takes float32"
    assert reasons("dynamic", "int8", text("forward"), weight.astype(np.float16), 1) == [expected]


def test_the_weights_of_an_lstm_are_each_others_partners() -> None:
    shape = (1, 4 * HIDDEN, HIDDEN)
    assert [DYNAMIC.partners(use_of(text("forward"), shape, index)) for index in (1, 2)] == [(2,), (1,)]
    assert DYNAMIC.domains(use_of(text("forward"), shape)) == ("com.microsoft",)


def test_every_storage_that_standard_operators_decode_can_be_an_operand() -> None:
    """None is refused by oversight."""
    spec: Spec = spec_of(weights(1)["w"])
    for storage in STORAGES.values():
        if storage.accepts(spec) is None and readers(storage) is None:
            assert DYNAMIC.accepts(storage, spec, 1) is None


def test_a_product_of_factors_is_folded_too(tmp_path: Path) -> None:
    arrays = weights(1)
    x: Feed = {"x": normal(9, STEPS, BATCH, INPUTS)}
    emitter = lowered(text("forward"), arrays, ("int8", "int8"))
    whole = emitter.nodes.pop()
    left, right = normal(1, 1, 4 * HIDDEN, 4) / 4, normal(2, 1, 4, HIDDEN) / 3
    own = emitter_for(stem="product")
    own.initializers |= {"left": left, "right": right}
    operand = DYNAMIC.from_value(own, own.node("MatMul", ["left", "right"]), Spec((1, 4 * HIDDEN, HIDDEN), np.dtype(np.float32)), 1)
    DYNAMIC.lower(own, node_of(text("forward")), 2, operand)
    half = own.nodes.pop()
    emitter.nodes += own.nodes
    emitter.initializers |= own.initializers
    emitter.programs |= own.programs
    whole.input[2], whole.input[10], whole.input[11] = half.input[2], half.input[10], half.input[11]
    emitter.nodes.append(whole)
    operators, result = optimized(emitter, x, tmp_path)
    assert operators == ["DynamicQuantizeLSTM"]
    codes, scale = requantized(left @ right, 1)
    held = {"w": bytes_of(arrays["w"], "int8"), "r": codes * scale.reshape(1, -1, 1), "b": arrays["b"]}
    assert_close(result, reference(x["x"], held, "forward", state).astype(np.float32), FLOATS)
