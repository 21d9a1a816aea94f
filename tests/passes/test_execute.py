"""Running in segments gives what running whole gives, whatever crosses a cut."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, parser

from intaglio.passes import execute
from intaglio.passes.errors import InputError
from intaglio.passes.execute import Executor
from intaglio.passes.weights import WeightStore

EACH_WEIGHT_ALONE = 1  # a memory limit, in bytes, that no two weights meet
RNG_SEED = 7


def add_weights(model: onnx.ModelProto, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    generator = np.random.default_rng(RNG_SEED)
    for name, shape in shapes.items():
        model.graph.initializer.append(numpy_helper.from_array(generator.standard_normal(shape).astype(np.float32), name))
    return model


CHAIN = """<ir_version: 8, opset_import: ["" : 17]> chain (float[n,8] x, float[n,8] z) => (float[n,8] y, float[n,8] early) {
    a = MatMul(x, A)
    early = Relu(a)
    b = MatMul(early, B)
    c = Add(b, z)
    d = MatMul(c, A)
    y = Add(d, a)
}"""

CONDITIONAL = """<ir_version: 8, opset_import: ["" : 17]> conditional (float[n,8] x, bool c) => (float[n,8] y) {
    a = MatMul(x, A)
    b = MatMul(a, B)
    y = If (c) <
        then_branch = t () => (float[n,8] p) { p0 = MatMul(a, C) p = Add(p0, b) },
        else_branch = e () => (float[n,8] q) { q0 = If (c) <
            then_branch = tt () => (float[n,8] r) { r = Identity(a) },
            else_branch = ee () => (float[n,8] s) { s = MatMul(b, A) }>
            q = Sub(q0, x) }>
}"""

LOOP = """<ir_version: 8, opset_import: ["" : 17]> loop (float[n,8] x, int64 count) => (float[n,8] y) {
    a = MatMul(x, A)
    b = MatMul(a, B)
    go = Constant <value_int = 1> ()
    keep = Cast <to = 9> (go)
    y = Loop (count, keep, b) <body = step (int64 i, bool on, float[n,8] v) => (bool still, float[n,8] w) {
        still = Identity(on) w0 = MatMul(v, C) w = Add(w0, a) }>
}"""

FUNCTION = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]> function (float[n,8] x) => (float[n,8] y) {
    a = local.block(x, A) y = local.block(a, B)
}
<domain: "local", opset_import: ["" : 17]> block (v, w) => (r) { m = MatMul(v, w) r = Tanh(m) }"""

SEQUENCE = """<ir_version: 8, opset_import: ["" : 17]> sequence (float[n,8] x) => (float[n,8] y) {
    a = MatMul(x, A) b = MatMul(x, B) q = SequenceConstruct(a, b) n = ConcatFromSequence <axis = 0, new_axis = 1> (q)
    r = MatMul(n, C) y = ReduceSum <keepdims = 0> (r, axes)
}"""

SQUARE = (8, 8)
MODELS = {
    "chain": add_weights(parser.parse_model(CHAIN), A=SQUARE, B=SQUARE, unused=SQUARE),
    "conditional": add_weights(parser.parse_model(CONDITIONAL), A=SQUARE, B=SQUARE, C=SQUARE),
    "loop": add_weights(parser.parse_model(LOOP), A=SQUARE, B=SQUARE, C=SQUARE),
    "function": add_weights(parser.parse_model(FUNCTION), A=SQUARE, B=SQUARE),
    "sequence": add_weights(parser.parse_model(SEQUENCE), A=SQUARE, B=SQUARE, C=SQUARE),
}
MODELS["sequence"].graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "axes"))


def feeds(count: int = 3, *, rows: int = 2) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(RNG_SEED)
    return [
        {
            "x": generator.standard_normal((rows + index, 8)).astype(np.float32),
            "z": generator.standard_normal((rows + index, 8)).astype(np.float32),
            "c": np.array(index % 2 == 0),
            "count": np.array(index),
            "unknown": np.ones(3),
        }
        for index in range(count)
    ]


def whole(model: onnx.ModelProto, fetches: list[str], count: int = 3) -> list[list[np.ndarray]]:
    executor = Executor(model, None, fetches)
    assert executor.segment_count == 1
    return list(executor.run(feeds(count)))


def assert_same(actual: list[list[np.ndarray]], expected: list[list[np.ndarray]]) -> None:
    assert len(actual) == len(expected)
    for row, expected_row in zip(actual, expected, strict=True):
        assert len(row) == len(expected_row)
        for array, expected_array in zip(row, expected_row, strict=True):
            assert array.dtype == expected_array.dtype
            np.testing.assert_array_equal(array, expected_array)


@pytest.mark.parametrize(("name", "segments"), [("chain", 3), ("conditional", 3), ("loop", 3), ("function", 2), ("sequence", 4)])
def test_segments_give_what_the_whole_gives(name, segments):
    model = MODELS[name]
    fetches = [value.name for value in model.graph.output]
    before = model.SerializeToString()
    executor = Executor(model, None, fetches, memory_limit_bytes=EACH_WEIGHT_ALONE)
    assert executor.segment_count == segments
    expected = whole(model, fetches)
    assert np.abs(expected[0][0]).sum() > 0
    assert_same(list(executor.run(feeds())), expected)
    assert_same(list(executor.run(feeds())), expected)  # a second run starts afresh
    assert_same([executor.run_feed(feeds()[1])], expected[1:2])
    assert model.SerializeToString() == before


def test_the_reference_itself_is_right():
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in MODELS["chain"].graph.initializer}
    feed = feeds()[0]
    a = feed["x"] @ weights["A"]
    expected = (np.maximum(a, 0) @ weights["B"] + feed["z"]) @ weights["A"] + a
    close = {"rtol": 1e-4, "atol": 1e-4}  # the order of sums of 8 products
    np.testing.assert_allclose(whole(MODELS["chain"], ["y"])[0][0], expected, **close)


@pytest.mark.parametrize("limit_bytes", [EACH_WEIGHT_ALONE, 1 << 29])
def test_any_value_can_be_fetched_in_any_order_and_twice(limit_bytes):
    model = MODELS["chain"]
    fetches = ["c", "x", "A", "early", "y", "c", "unused"]
    results = list(Executor(model, None, fetches, memory_limit_bytes=limit_bytes).run(feeds()))
    for feed, (c, x, weight, early, y, again, unused) in zip(feeds(), results, strict=True):
        np.testing.assert_array_equal(x, feed["x"])
        np.testing.assert_array_equal(weight, numpy_helper.to_array(model.graph.initializer[0]))
        np.testing.assert_array_equal(unused, numpy_helper.to_array(model.graph.initializer[2]))
        np.testing.assert_array_equal(c, again)
        close = {"rtol": 1e-4, "atol": 1e-4}  # the order of sums of 8 products
        np.testing.assert_allclose(y, c @ weight + x @ weight, **close)
        np.testing.assert_allclose(early, np.maximum(x @ weight, 0), **close)


def test_fetching_inputs_and_initializers_alone_runs_nothing():
    executor = Executor(MODELS["chain"], None, ["z", "B"])
    assert executor.segment_count == 0
    (z, weight), *_ = executor.run(feeds())
    np.testing.assert_array_equal(z, feeds()[0]["z"])
    np.testing.assert_array_equal(weight, numpy_helper.to_array(MODELS["chain"].graph.initializer[1]))
    with pytest.raises(InputError, match="input 'z' is asked for"):
        executor.run_feed({})


def test_only_what_the_fetches_need_is_run():
    executor = Executor(MODELS["chain"], None, ["early"], memory_limit_bytes=EACH_WEIGHT_ALONE)
    assert executor.segment_count == 1
    assert_same(list(executor.run([{"x": feed["x"]} for feed in feeds()])), whole(MODELS["chain"], ["early"]))


def test_one_piece_streams():
    taken = []
    source = (taken.append(index) or feed for index, feed in enumerate(feeds()))
    results = Executor(MODELS["chain"], None, ["y"]).run(source)
    next(results)
    assert taken == [0]


def test_values_are_dropped_after_their_last_reader(monkeypatch):
    held = []
    real = execute._step
    monkeypatch.setattr(execute, "_step", lambda *step: (real(*step), held.append(sorted(step[-1])))[0])
    Executor(MODELS["chain"], None, ["y"], memory_limit_bytes=EACH_WEIGHT_ALONE).run_feed(feeds()[0])
    assert held == [["a", "early", "z"], ["a", "c"], ["y"]]


def test_the_limit_groups_weights():
    model = MODELS["chain"]  # reads A, B, A: 256 bytes each
    counts = [Executor(model, None, ["y"], memory_limit_bytes=limit).segment_count for limit in (255, 256, 511, 512)]
    assert counts == [3, 3, 3, 1]


def decoder(layers: int = 3) -> onnx.ModelProto:
    """Layers whose weights are 8-bit codes, all decoded at the start of the graph as exporters write it."""
    nodes = [helper.make_node("Constant", [], ["shape"], value_ints=[8, 8])]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "decoder",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])],
            [numpy_helper.from_array(np.float32(0.1), "scale")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    generator = np.random.default_rng(RNG_SEED)
    for layer in range(layers):
        codes = generator.integers(-8, 8, 64).astype(np.int8)
        model.graph.initializer.append(numpy_helper.from_array(codes, f"codes{layer}"))
        model.graph.node.append(helper.make_node("Cast", [f"codes{layer}"], [f"cast{layer}"], to=TensorProto.FLOAT))
        model.graph.node.append(helper.make_node("Mul", [f"cast{layer}", "scale"], [f"flat{layer}"]))
        model.graph.node.append(helper.make_node("Reshape", [f"flat{layer}", "shape"], [f"W{layer}"]))
    for layer in range(layers):
        target = "y" if layer == layers - 1 else f"h{layer + 1}"
        model.graph.node.append(helper.make_node("MatMul", ["x" if layer == 0 else f"h{layer}", f"W{layer}"], [target]))
    return model


def test_decode_programs_count_as_what_they_expand_to_and_stay_with_their_weight():
    model = decoder()
    expected = whole(model, ["y"])
    counts = []
    for limit_bytes in (255, 256, 512, 768):  # 64 codes become 256 bytes of float32
        executor = Executor(model, None, ["y"], memory_limit_bytes=limit_bytes)
        counts.append(executor.segment_count)
        assert_same(list(executor.run(feeds())), expected)
    assert counts == [3, 3, 2, 1]


def test_a_decoded_weight_can_be_fetched():
    expected = whole(decoder(), ["W1", "y"])
    codes = numpy_helper.to_array(decoder().graph.initializer[2])
    np.testing.assert_array_equal(expected[0][0], (codes.astype(np.float32) * np.float32(0.1)).reshape(8, 8))
    assert_same(list(Executor(decoder(), None, ["W1", "y"], memory_limit_bytes=EACH_WEIGHT_ALONE).run(feeds())), expected)


def test_random_numbers_are_drawn_once():
    model = add_weights(
        parser.parse_model(
            """<ir_version: 8, opset_import: ["" : 17]> g (float[n,8] x) => (float[n,8] y) {
                noise = RandomNormal <shape = [8]> ()
                a0 = Add(x, noise) a = MatMul(a0, A)
                b = MatMul(a, B)
                c0 = Sub(a0, noise) zero = Sub(c0, x) c = MatMul(c0, C) y = Add(b, c)
            }"""
        ),
        A=SQUARE,
        B=SQUARE,
        C=SQUARE,
    )
    executor = Executor(model, None, ["y", "zero"], memory_limit_bytes=EACH_WEIGHT_ALONE)
    assert executor.segment_count == 3
    for _, zero in executor.run(feeds()):
        np.testing.assert_allclose(zero, 0, atol=1e-6)  # (x + noise) - noise - x, up to rounding


def test_optional_inputs_and_nodes_out_of_order():
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[n,8] x) => (float[n,8] y) {
            y = MatMul(c, B) c = Clip(a, , top) a = MatMul(x, A)
        }"""
    )
    add_weights(model, A=SQUARE, B=SQUARE)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "top"))
    executor = Executor(model, None, ["y", "c"], memory_limit_bytes=EACH_WEIGHT_ALONE)
    assert executor.segment_count == 3
    results = list(executor.run(feeds()))
    assert_same(results, whole(model, ["y", "c"]))
    assert max(c.max() for _, c in results) == 0.5


@pytest.mark.parametrize("ir_version", [3, 8])
def test_initializers_listed_as_inputs(ir_version):
    model = onnx.ModelProto()
    model.CopyFrom(MODELS["chain"])
    model.ir_version = ir_version
    model.graph.input.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, [8, 8]) for name in ("A", "B", "unused"))
    executor = Executor(model, None, ["y"], memory_limit_bytes=EACH_WEIGHT_ALONE)
    assert executor.segment_count == 3
    expected = whole(model, ["y"])
    assert_same(list(executor.run(feeds())), expected)
    other = {"A": np.ones((8, 8), np.float32)}
    results = list(executor.run([feed | other for feed in feeds()]))
    assert_same(results, [Executor(model, None, ["y"]).run_feed(feed | other) for feed in feeds()])
    assert np.array_equal(results[0][0], expected[0][0]) == (ir_version == 3)  # before version 4 they are constants


def test_types_that_numpy_lacks_cross_a_cut():
    model = add_weights(
        parser.parse_model(
            """<ir_version: 10, opset_import: ["" : 21]> g (float[n,8] x, string[k] s) => (float[n,8] y, string[k] t) {
                a = MatMul(x, A) h = Cast <to = 16> (a) i = Cast <to = 22> (x)
                b = MatMul(a, B) g = Cast <to = 1> (h) j = Cast <to = 1> (i) c = Add(b, g) y = Add(c, j) t = Identity(s)
            }"""
        ),
        A=SQUARE,
        B=SQUARE,
    )
    fetches = ["y", "h"]
    executor = Executor(model, None, fetches, memory_limit_bytes=EACH_WEIGHT_ALONE)
    assert executor.segment_count == 2
    results = list(executor.run(feeds()))
    assert_same(results, whole(model, fetches))
    assert results[0][1].dtype == ml_dtypes.bfloat16
    strings = [feed | {"s": np.array(["a", "b"])} for feed in feeds()]
    (text,) = Executor(model, None, ["t"]).run_feed(strings[0])
    assert text.tolist() == ["a", "b"]


def test_external_weights(tmp_path):
    model = onnx.ModelProto()
    model.CopyFrom(MODELS["chain"])
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    light = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    assert light.graph.initializer[0].data_location == TensorProto.EXTERNAL
    expected = whole(MODELS["chain"], ["y", "A"])
    for limit_bytes in (EACH_WEIGHT_ALONE, 1 << 29):
        executor = Executor(light, WeightStore(tmp_path), ["y", "A"], memory_limit_bytes=limit_bytes)
        assert_same(list(executor.run(feeds())), expected)


def test_an_unknown_value_is_refused():
    with pytest.raises(InputError, match=r"^value 'nowhere' is not in the main graph of model 'chain'; [^\n]*$"):
        Executor(MODELS["chain"], None, ["y", "nowhere"])


@pytest.mark.parametrize("limit_bytes", [EACH_WEIGHT_ALONE, 1 << 29])
def test_a_missing_input_is_named(limit_bytes):
    with pytest.raises(InputError, match="needs input 'z'"):
        Executor(MODELS["chain"], None, ["y"], memory_limit_bytes=limit_bytes).run_feed({"x": feeds()[0]["x"]})


@st.composite
def networks(draw: st.DrawFn) -> onnx.ModelProto:
    """A random graph of products, sums and maxima, some of weights alone, over two inputs and three weights."""
    values, weights, nodes = ["x", "z"], ["A", "B", "C"], []
    for index in range(draw(st.integers(1, 12))):
        op = draw(st.sampled_from(["MatMul", "Add", "Max", "MatMulWeights"]))
        name = f"v{index}"
        if op == "MatMulWeights":
            nodes.append(helper.make_node("MatMul", [draw(st.sampled_from(weights)), draw(st.sampled_from(weights))], [name]))
            weights.append(name)
            continue
        second = weights if op == "MatMul" else values
        nodes.append(helper.make_node(op, [draw(st.sampled_from(values)), draw(st.sampled_from(second))], [name]))
        values.append(name)
    nodes.append(helper.make_node("MatMul", [values[-1], weights[-1]], ["y"]))
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in ("x", "z")]
    graph = helper.make_graph(nodes, "network", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    for name in "ABC":  # small whole numbers: float32 arithmetic on them is exact in any order
        array = np.random.default_rng(ord(name)).integers(-1, 2, (8, 8)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


@settings(max_examples=25, deadline=None)
@given(networks(), st.integers(0, 1200), st.data())
def test_any_cut_of_any_network_is_exact(model, limit_bytes, data):
    computed = [node.output[0] for node in model.graph.node]
    fetches = ["y", *data.draw(st.lists(st.sampled_from([*computed, "x", "A"]), max_size=3))]
    generator = np.random.default_rng(RNG_SEED)
    small = [{name: generator.integers(-1, 2, (2, 8)).astype(np.float32) for name in ("x", "z")} for _ in range(2)]
    expected = list(Executor(model, None, fetches).run(small))
    assert_same(list(Executor(model, None, fetches, memory_limit_bytes=limit_bytes).run(small)), expected)
