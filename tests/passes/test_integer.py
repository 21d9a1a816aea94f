"""Placement of quantized activations: what fuses, what stays, and that nothing is lost on a grid that holds every value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from intaglio.passes.data import input_specs, open_dataset
from intaglio.passes.integer import declines, fake_quantized, place, quantized_values
from intaglio.passes.load import load
from intaglio.passes.model import Model
from intaglio.passes.options import Runtime
from intaglio.passes.price import skeleton
from intaglio.passes.ranges import Range, calibrated
from intaglio.passes.regions import find_carriers
from intaglio.passes.save import serialized_size
from tests.models import Array, normal, parse, run

OPSETS = (13, 17, 21)

RESIDUAL = """g (float[N, 3, 8, 8] x) => (float[N, 5] y) {
    a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1, b1)
    r = Relu (a)
    c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r, w2, b2)
    s = Add (c, r)
    t = Relu (s)
    p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (t)
    d = Conv (p, w3)
    k = Clip (d, least, most)
    j = Concat <axis = 1> (p, k)
    q = GlobalAveragePool (j)
    f = Flatten <axis = 1> (q)
    y = Gemm <transB = 1> (f, w4, b4)
}"""

MLP = """g (float[N, 8] x) => (float[N, 6] y) {
    a = Gemm (x, w1, b1)
    r = Relu (a)
    h = MatMul (r, w2)
    i = Add (b2, h)
    t = Clip (i, least, most)
    y = Gemm (t, w3, b3)
}"""

ATTENTION = """g (float[N, S, 8] x) => (float[N, S, 8] y) {
    q = MatMul (x, w1)
    qb = Add (q, b1)
    k = MatMul (x, w2)
    kt = Transpose <perm = [0, 2, 1]> (k)
    a = MatMul (qb, kt)
    h = MatMul (a, x)
    s = Add (h, x)
    m = MatMul (s, w3)
    mb = Add (m, b3)
    r = Relu (mb)
    y = MatMul (r, w4)
}"""

BOUNDS = {"least": np.float32(0), "most": np.float32(255)}


def sparse(seed: int, *shape: int, axis: int, signed: bool = True) -> Array:
    """Whole numbers, ±1 in one place and 1 in another of each output, which lies along `axis`: sums stay small."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((shape[axis], int(np.prod(shape)) // shape[axis]), np.float32)
    for row in rows:
        first, second = rng.choice(len(row), 2, replace=False)
        row[first], row[second] = (-1 if signed and rng.integers(2) else 1), 1
    others = [size for number, size in enumerate(shape) if number != axis]
    return np.moveaxis(rows.reshape(shape[axis], *others), 0, axis)


def narrowed(proto: onnx.ModelProto, layers: Collection[str] | None = None) -> onnx.ModelProto:
    """The model with int8 codes behind DequantizeLinear as weights, one scale (one, or the largest entry's) per output.

    Layers that are not among the given ones, by first output, keep floats: behind DequantizeLinear ONNX Runtime would run some of them
    as MatMulNBits, which rounds activations too.
    """
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    arrays = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    nodes = []
    for node in result.graph.node:
        if (layers is None or node.output[0] in layers) and node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in arrays:
            weight, name = arrays[node.input[1]], node.input[1]
            turned = any(a.name == "transB" and a.i for a in node.attribute)
            axis = 0 if node.op_type == "Conv" or turned else 1
            others = tuple(i for i in range(weight.ndim) if i != axis)
            whole = np.array_equal(weight, np.rint(weight))
            scale = np.ones(weight.shape[axis], np.float32) if whole else np.abs(weight).max(others) / np.float32(127)
            codes = np.rint(weight / np.expand_dims(scale, others)).astype(np.int8)
            parts = {f"{name}.c": codes, f"{name}.s": scale, f"{name}.z": np.zeros(len(scale), np.int8)}
            result.graph.initializer.extend(numpy_helper.from_array(array, part) for part, array in parts.items())
            nodes.append(onnx.helper.make_node("DequantizeLinear", list(parts), [f"{name}.d"], axis=axis))
            node.input[1] = f"{name}.d"
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del result.graph.node[:]
    result.graph.node.extend(copies)
    for tensor in [t for t in result.graph.initializer if not any(t.name in node.input for node in copies)]:
        result.graph.initializer.remove(tensor)
    return result


ONE = Range(np.float32(1), 0)
CENTRED = Range(np.float32(1), 128)
SIXTEENTH = Range(np.float32(1 / 16), 0)


class Net:
    """A network of whole numbers, and ranges that hold each of its values exactly."""

    def __init__(self, text: str, weights: Mapping[str, Array], feed: Array, ranges: Mapping[str, Range]) -> None:
        self.text, self.weights, self.feed, self.ranges = text, weights, {"x": feed}, ranges

    def proto(self, opset: int = 17, ir_version: int = 8) -> onnx.ModelProto:
        return narrowed(parse(self.text, self.weights, opset=opset, ir_version=ir_version))

    def operators(self, proto: onnx.ModelProto) -> list[str]:
        """Everything that can run in integers, by first outputs."""
        layers = [node.output[0] for node in proto.graph.node if any(name.endswith(".d") for name in node.input)]
        return layers + [carrier.node.output[0] for carrier in find_carriers(load(proto))]


def whole(seed: int, *shape: int, limit: int) -> Array:
    return np.random.default_rng(seed).integers(0, limit, shape).astype(np.float32)


NETS = {
    "residual": Net(
        RESIDUAL,
        {
            "w1": sparse(1, 4, 3, 3, 3, axis=0),
            "b1": np.array([0, 1, -1, 1], np.float32),
            "w2": sparse(2, 4, 4, 3, 3, axis=0),
            "b2": np.array([1, 0, 0, -1], np.float32),
            "w3": sparse(3, 4, 4, 1, 1, axis=0),
            "w4": sparse(4, 5, 8, axis=0),
            "b4": np.arange(5, dtype=np.float32) / 16,
            **BOUNDS,
        },
        whole(5, 2, 3, 8, 8, limit=3),
        dict.fromkeys("xrtpkj", ONE) | dict.fromkeys("cd", CENTRED) | dict.fromkeys("qf", SIXTEENTH),
    ),
    "mlp": Net(
        MLP,
        {
            "w1": sparse(1, 8, 8, axis=1),
            "b1": np.arange(-4, 4, dtype=np.float32),
            "w2": sparse(2, 8, 8, axis=1),
            "b2": np.arange(-2, 6, dtype=np.float32)[None],
            "w3": sparse(3, 8, 6, axis=1),
            "b3": np.arange(6, dtype=np.float32),
            **BOUNDS,
        },
        whole(5, 3, 8, limit=9),
        dict.fromkeys("xrt", ONE),
    ),
    "attention": Net(
        ATTENTION,
        {
            "w1": sparse(1, 8, 8, axis=1, signed=False),
            "b1": np.ones(8, np.float32),
            "w2": sparse(2, 8, 8, axis=1, signed=False),
            "w3": sparse(3, 8, 8, axis=1),
            "b3": np.arange(-4, 4, dtype=np.float32),
            "w4": sparse(4, 8, 8, axis=1),
        },
        whole(5, 1, 2, 8, limit=2),
        dict.fromkeys(["x", "qb", "k", "kt", "a", "h", "s", "r"], ONE),
    ),
}

KERNELS = {
    "residual": {
        "QuantizeLinear": 1,
        "QLinearConv": 3,
        "QLinearAdd": 1,
        "MaxPool": 1,
        "QLinearConcat": 1,
        "QLinearGlobalAveragePool": 1,
        "Flatten": 1,
        "QGemm": 1,
    },
    "mlp": {"QuantizeLinear": 1, "QGemm": 3},
}
"""All that is left of each network whose operators all run in integers: its way in, and kernels; the last one yields floats."""


def optimized(proto: onnx.ModelProto, folder: Path) -> Counter[str]:
    """How often each operator occurs in what ONNX Runtime makes of a model; changes of memory layout do not count."""
    path = folder / "optimized.onnx"
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path)
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [node.op_type.replace("Nhwc", "") for node in onnx.load(path).graph.node]
    return Counter(name for name in names if name != "Transpose")


def placed(net: Net, proto: onnx.ModelProto, operators: Collection[str]) -> onnx.ModelProto:
    """The network with these operators in integers, checked."""
    before = proto.SerializeToString()
    model = load(proto)
    values = quantized_values(model, operators)
    result = place(model, operators, {name: net.ranges[name] for name in values}).proto
    assert proto.SerializeToString() == before
    onnx.checker.check_model(result, full_check=True)
    assert [value.name for value in result.graph.output] == [value.name for value in proto.graph.output]
    return result


def assert_lossless(net: Net, result: onnx.ModelProto) -> None:
    """Exactly the float network's outputs, by integer kernels and by the operators as written."""
    (expected,) = run(parse(net.text, net.weights, opset=17), net.feed)
    for optimize in (True, False):
        np.testing.assert_array_equal(run(result, net.feed, optimize=optimize)[0], expected)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("ir_version", [7, 8])
@pytest.mark.parametrize("name", ["residual", "mlp"])
def test_whole_networks_become_integer_kernels(name: str, ir_version: int, opset: int, tmp_path: Path) -> None:
    net = NETS[name]
    proto = net.proto(opset, ir_version)
    result = placed(net, proto, net.operators(proto))
    assert optimized(result, tmp_path) == KERNELS[name]
    assert bool(result.functions) == (ir_version >= 8)
    assert_lossless(net, result)


@pytest.mark.parametrize("opset", OPSETS)
def test_products_of_activations_and_sequences_run_in_integers(opset: int, tmp_path: Path) -> None:
    """Biases behind products of unknown length stay floats; q + b1 and the last product are floats."""
    net = NETS["attention"]
    proto = net.proto(opset)
    result = placed(net, proto, net.operators(proto))
    kernels = optimized(result, tmp_path)
    assert not {"MatMul", "Gemm", "DequantizeLinear"} & kernels.keys()
    assert kernels["MatMulIntegerToFloat"] + kernels["QLinearMatMul"] == 6
    assert kernels["QLinearAdd"] == 1
    assert_lossless(net, result)


def test_real_numbers_stay_within_the_error_of_rounding() -> None:
    """Errors add up at most as the magnitudes of the weights do; a whole step per value leaves kernels free to round ties otherwise."""
    weights = {"w1": normal(1, 8, 16), "b1": normal(2, 16), "w2": normal(3, 16, 12), "b2": normal(4, 12), "w3": normal(5, 12, 6)}
    text = """g (float[N, 8] x) => (float[N, 6] y) {
        a = Gemm (x, w1, b1) r = Relu (a) h = MatMul (r, w2) i = Add (h, b2) y = MatMul (i, w3)
    }"""
    proto = narrowed(parse(text, weights, ir_version=8))
    x = np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)
    operators = ["a", "h", "y"]
    values = quantized_values(load(proto), operators)
    assert values == ("x", "r", "i")
    ranges = calibrated(load(proto), values, open_dataset({"x": x}, input_specs(proto)), np.arange(32), Runtime(), "minmax")
    arrays = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    value, bound = x, np.full_like(x, ranges["x"].scale)
    for number, (name, bias) in enumerate({"r": "b1", "i": "b2", "": ""}.items(), 1):
        codes, scale = arrays[f"w{number}.c"], arrays[f"w{number}.s"]
        bias_step = float(ranges["xri"[number - 1]].scale) * scale if bias else 0
        bound = bound @ np.abs(codes * scale) + bias_step / 2
        value = value @ (codes * scale) + (weights[bias] if bias else 0)
        value = np.maximum(value, 0) if name == "r" else value
        bound = bound + (ranges[name].scale if name else 0)
    assert bound.max() < np.abs(value).max()
    for optimize in (True, False):
        (y,) = run(place(load(proto), operators, ranges).proto, {"x": x}, optimize=optimize)
        assert (np.abs(y - value) <= bound).all()


@pytest.mark.parametrize("rows", ["N, S", "2, 3", "N"])
@pytest.mark.parametrize("activation", ["Relu (i)", "Clip (i, least, most)", "Tanh (i)"])
@pytest.mark.parametrize("read", [True, False])
def test_a_product_keeps_its_integer_kernel_with_its_bias(rows: str, activation: str, read: bool, tmp_path: Path) -> None:
    """ONNX Runtime joins MatMul and Add where it can, and a Gemm and Relu, and would then lose a kernel that reads or yields floats."""
    text = f"""g (float[{rows}, 8] x) => (float[{rows}, 8] y) {{
        h = MatMul (x, w1) i = Add (h, b1) r = {activation} y = {"MatMul (r, w2)" if read else "Neg (r)"}
    }}"""
    weights = {"w1": normal(1, 8, 8), "b1": normal(2, 8), **({"w2": normal(3, 8, 8)} if read else {}), **BOUNDS}
    proto = narrowed(parse(text, weights, ir_version=8))
    if not read:
        proto = load(proto).proto
    model = load(proto)
    operators = ["h", "y"] if read else ["h"]
    values = quantized_values(model, operators)
    assert values == (("x", "r") if read else ("x",))
    kernels = optimized(place(model, operators, dict.fromkeys(values, Range(np.float32(0.05), 0))).proto, tmp_path)
    assert not {"MatMul", "Gemm", "DequantizeLinear"} & kernels.keys()
    assert sum(kernels[name] for name in ("QGemm", "MatMulIntegerToFloat", "QLinearMatMul")) == len(operators)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_choice_of_operators_is_lossless_on_a_grid(data: st.DataObject) -> None:
    net = NETS[data.draw(st.sampled_from(sorted(NETS)))]
    proto = parse(net.text, net.weights, opset=data.draw(st.sampled_from(OPSETS)), ir_version=data.draw(st.sampled_from([7, 8])))
    operators = [name for name in net.operators(narrowed(proto)) if data.draw(st.booleans())]
    assert_lossless(net, placed(net, narrowed(proto, operators), operators))


def test_a_skeleton_takes_the_same_bytes() -> None:
    """Ranges and names are all that goes in: no weight is read."""
    weights = {"w1": normal(1, 64, 8), "b1": normal(2, 64), "w2": normal(3, 64, 128), "b2": normal(4, 128)}  # w2: left out of skeletons
    text = "g (float[N, 8] x) => (float[N, 128] y) { a = Gemm <transB = 1> (x, w1, b1) r = Relu (a) y = Gemm (r, w2, b2) }"
    model = load(narrowed(parse(text, weights, ir_version=8)))
    assert any(not t.raw_data for t in skeleton(model).proto.graph.initializer)
    sizes = []
    for each in (model, skeleton(model)):
        values = quantized_values(each, ["a", "y"])
        sizes.append(serialized_size(place(each, ["a", "y"], dict.fromkeys(values, ONE)), False, name="m"))
    assert sizes[0] == sizes[1]


def test_readers_see_what_was_rounded_only_behind_integers(tmp_path: Path) -> None:
    """An input that a float operator reads too stays as it is for that one; a layer's output is rounded for everybody."""
    text = """g (float[N, 3, 4, 4] x) => (float[N, 4, 4, 4] c, float[N, 3, 4, 4] e, float[N, 4, 4, 4] f) {
        c = Conv (x, w)
        e = Exp (x)
        f = Neg (c)
    }"""
    proto = narrowed(parse(text, {"w": sparse(1, 4, 3, 1, 1, axis=0)}, ir_version=8))
    ranges = {"x": ONE, "c": Range(np.float32(2), 128)}
    result = place(load(proto), ["c"], ranges).proto
    x = np.random.default_rng(0).uniform(0, 4, (1, 3, 4, 4)).astype(np.float32)
    c, e, f = run(result, {"x": x})
    inner = run(proto, {"x": ranges["x"].rounded(x)})[0]
    np.testing.assert_array_equal(c, ranges["c"].rounded(inner))
    np.testing.assert_array_equal(f, -c)
    np.testing.assert_array_equal(e, run(proto, {"x": x})[1])
    assert optimized(result, tmp_path)["QLinearConv"] == 1


def test_a_pool_in_floats_stays_in_floats_before_integers(tmp_path: Path) -> None:
    """ONNX Runtime would move the quantizer in front of it, where bytes are pooled one channel after the other."""
    text = """g (float[N, 3, 8, 8] x) => (float[N, 4, 4, 4] y) {
        e = Exp (x)
        p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (e)
        y = Conv (p, w)
    }"""
    proto = narrowed(parse(text, {"w": sparse(1, 4, 3, 1, 1, axis=0)}, ir_version=8))
    result = place(load(proto), ["y"], {"p": ONE, "y": Range(np.float32(2), 128)}).proto
    found = optimized(result, tmp_path)
    assert found["QLinearConv"] == 1
    assert [node.input[0] for node in result.graph.node if node.op_type == "Sum"] == ["p"]
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(result.SerializeToString(), options)
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.index("MaxPool") < kinds.index("QuantizeLinear")


def test_a_softmax_stays_in_floats_where_quantizers_would_move_to_it(tmp_path: Path) -> None:
    """ONNX Runtime moves them over operators that move entries."""
    text = """g (float[4, 8] a, float[4, 8] b, float[8, 5] v) => (float[4, 5] y) {
        s = Add (a, b)
        t = Unsqueeze (s, first)
        p = Softmax (t)
        r = Squeeze (p, first)
        y = MatMul (r, v)
    }"""
    model = load(parse(text, {"first": np.asarray([0], np.int64)}))
    result = place(model, ["s", "y"], dict.fromkeys(quantized_values(model, ["s", "y"]), ONE)).proto
    found = optimized(result, tmp_path)
    assert (found["QLinearSoftmax"], found["Softmax"]) == (0, 1)


@pytest.mark.parametrize("carried", [False, True])
def test_a_softmax_that_is_to_stay_in_floats_does_so_between_bytes(carried: bool, tmp_path: Path) -> None:
    """ONNX Runtime would take its kernel for bytes, which is the slower one, wherever it finds quantizers around it."""
    text = """g (float[N, 4, 8] a, float[N, 4, 8] b, float[N, 8, 4] v) => (float[N, 4, 4] y) {
        s = Add (a, b)
        p = Softmax (s)
        y = MatMul (p, v)
    }"""
    model, chosen = load(parse(text)), ["s", "y", *(["p"] if carried else [])]
    result = place(model, chosen, dict.fromkeys(quantized_values(model, chosen), ONE)).proto
    assert ("Sum" in {node.op_type for node in result.graph.node}) != carried
    found = optimized(result, tmp_path)
    assert found["QLinearAdd"] == 1
    assert (found["QLinearSoftmax"], found["Softmax"]) == ((1, 0) if carried else (0, 1))


def test_nested_graphs_read_the_rounded_value() -> None:
    text = """g (float[N, 3, 4, 4] x, bool p) => (float[N, 4, 4, 4] y) {
        c = Conv (x, w)
        r = Relu (c)
        y = If (p) <
            then_branch = t () => (float[N, 4, 4, 4] u) { u = Neg (r) },
            else_branch = e () => (float[N, 4, 4, 4] v) { v = Identity (r) }
        >
    }"""
    proto = narrowed(parse(text, {"w": sparse(1, 4, 3, 1, 1, axis=0)}, ir_version=8))
    model = load(proto)
    assert quantized_values(model, ["c"]) == ("x", "r")
    for optimize in (True, False):
        result = place(model, ["c"], {"x": ONE, "r": Range(np.float32(4), 0)}).proto
        x = whole(1, 1, 3, 4, 4, limit=9)
        r = run(proto, {"x": x, "p": np.array(False)})[0]
        y = run(result, {"x": x, "p": np.array(True)}, optimize=optimize)[0]
        np.testing.assert_array_equal(y, -Range(np.float32(4), 0).rounded(r))


def test_values_without_a_range_stay_floats() -> None:
    net = NETS["residual"]
    proto = net.proto()
    ranges = {name: each for name, each in net.ranges.items() if name != "t"}
    result = place(load(proto), net.operators(proto), ranges).proto
    rounded = [node.output[0] for node in result.graph.node if node.op_type == "QuantizeLinear"]
    assert rounded == [f"{name}_quantized" for name in "xrcjqf"]  # neither s, whose Relu yields t, nor p, d and k behind it
    assert_lossless(net, result)


def test_moved_entries_keep_their_scale() -> None:
    net = NETS["residual"]
    proto = net.proto()
    operators = net.operators(proto)
    values = quantized_values(load(proto), operators)
    assert values == ("x", "r", "c", "t", "k", "j", "q")
    result = placed(net, proto, operators)
    scales = {node.input[0]: node.input[1:] for node in result.graph.node if node.op_type == "QuantizeLinear"}
    assert scales["p_unrounded"] == scales["s"]  # s is what the Add before t yields
    assert scales["f_unrounded"] == scales["q_unrounded"]


@pytest.mark.parametrize(("wide", "joint"), [(2.0, True), (5.0, False)])
def test_what_a_concat_joins_has_one_range(wide: float, joint: bool) -> None:
    """The pool keeps the range of what it reads, so that this one changes too; a range that is far narrower stays."""
    text = """g (float[N, 3, 4, 4] x) => (float[N, 8, 4, 4] y) {
        a = Conv (x, w)
        b = Conv (x, v)
        p = MaxPool <kernel_shape = [1, 1]> (b)
        y = Concat <axis = 1> (a, p)
    }"""
    proto = narrowed(parse(text, {name: sparse(1, 4, 3, 1, 1, axis=0) for name in "wv"}, ir_version=8))
    ranges = {"x": ONE, "a": Range(np.float32(1), 128), "b": Range(np.float32(wide), 128), "y": Range(np.float32(wide), 128)}
    result = place(load(proto), ["a", "b", "p", "y"], ranges).proto
    constants = {tensor.name: float(numpy_helper.to_array(tensor)) for tensor in result.graph.initializer if not tensor.dims}
    scales = {node.input[0].split("_")[0]: constants[node.input[1]] for node in result.graph.node if node.op_type == "QuantizeLinear"}
    assert scales == {"x": 1, "a": wide if joint else 1, "b": wide, "p": wide, "y": wide}


def test_a_range_stops_where_an_absorbed_clip_does() -> None:
    text = "g (float[N, 3, 4, 4] x) => (float[N, 4, 4, 4] y) { c = Conv (x, w) y = Clip (c, least, most) }"
    weights = {"w": sparse(1, 4, 3, 1, 1, axis=0), "least": np.float32(-2), "most": np.float32(6)}
    proto = narrowed(parse(text, weights, ir_version=8))
    result = place(load(proto), ["c"], {"x": ONE, "y": CENTRED}).proto
    assert "Clip" not in {node.op_type for node in result.graph.node}
    x = whole(1, 2, 3, 4, 4, limit=20)
    y = run(result, {"x": x})[0]
    step = 8 / 255
    np.testing.assert_allclose(y, run(proto, {"x": x})[0], rtol=0, atol=step)  # half a step of rounding, half of the zero point's


def test_a_bias_saturates() -> None:
    """int32 holds what fits; a bias beyond that comes out as the largest number, not as its negative."""
    text = "g (float[N, 8] x) => (float[N, 8] y) { y = Gemm (x, w, b) }"
    weights = {"w": sparse(1, 8, 8, axis=1), "b": np.array([3e9, -3e9, 1, -1, 0, 2.5, 1.5, 7], np.float32)}
    result = place(load(narrowed(parse(text, weights, ir_version=8))), ["y"], {"x": ONE}).proto
    y = run(result, {"x": np.zeros((1, 8), np.float32)}, optimize=False)[0][0]
    np.testing.assert_array_equal(y, np.array([2147483520, -2147483520, 1, -1, 0, 2, 2, 7], np.float32))


def test_signed_activations(tmp_path: Path) -> None:
    net = NETS["mlp"]
    signed = Range(np.float32(1), -128, np.dtype(np.int8))
    proto = net.proto()
    operators = net.operators(proto)
    result = place(load(proto), operators, dict.fromkeys(quantized_values(load(proto), operators), signed)).proto
    assert optimized(result, tmp_path) == KERNELS["mlp"]
    assert_lossless(net, result)


CARRIERS = {
    "Add": ("Add (a, b)", "QLinearAdd"),
    "Mul": ("Mul (a, b)", "QLinearMul"),
    "MatMul": ("MatMul (a, b)", "MatMulIntegerToFloat"),
    "Concat": ("Concat <axis = 1> (a, b)", "QLinearConcat"),
    "AveragePool": ("AveragePool <kernel_shape = [2, 2], pads = [1, 0, 0, 0], count_include_pad = 1> (a)", "QLinearAveragePool"),
    "GlobalAveragePool": ("GlobalAveragePool (a)", "QLinearGlobalAveragePool"),
    "LeakyRelu": ("LeakyRelu <alpha = 0.1> (a)", "QLinearLeakyRelu"),
    "Relu": ("Relu (a)", "QLinearLeakyRelu"),
    "Sigmoid": ("Sigmoid (a)", "QLinearSigmoid"),
    "Softmax": ("Softmax <axis = 1> (a)", "QLinearSoftmax"),
    "DepthToSpace": ("DepthToSpace <blocksize = 2> (a)", "DepthToSpace"),
    "Expand": ("Expand (a, ones)", "Expand"),
    "Flatten": ("Flatten (a)", "Flatten"),
    "Gather": ("Gather <axis = 2> (a, picks)", "Gather"),
    "MaxPool": ("MaxPool <kernel_shape = [2, 2], dilations = [2, 1]> (a)", "MaxPool"),
    "Reshape": ("Reshape (a, flat)", "Reshape"),
    "Resize": ('Resize <mode = "nearest"> (a, , factors)', "Resize"),
    "Slice": ("Slice (a, one, two, one)", "Slice"),
    "Squeeze": ("Squeeze (a)", "Squeeze"),
    "Tile": ("Tile (a, ones)", "Tile"),
    "Transpose": ("Transpose <perm = [0, 2, 3, 1]> (a)", ""),
    "Unsqueeze": ("Unsqueeze (a, one)", "Unsqueeze"),
}
PARAMETERS = {
    "ones": np.array([2, 1, 1, 1], np.int64),
    "picks": np.array([3, 0], np.int64),
    "flat": np.array([0, -1], np.int64),
    "factors": np.array([1, 1, 2, 2], np.float32),
    "one": np.array([1], np.int64),
    "two": np.array([2], np.int64),
}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", CARRIERS)
def test_every_carrier_runs_on_bytes(name: str, opset: int, tmp_path: Path) -> None:
    expression, kernel = CARRIERS[name]
    second = ", float[1, 4, 4, 4] b" if "b)" in expression else ""
    parameters = {key: array for key, array in PARAMETERS.items() if key in expression}
    axes = {"Flatten": "P, Q", "Reshape": "P, Q", "Squeeze": "P, Q, R", "Unsqueeze": "P, Q, R, S, T"}.get(name, "P, Q, R, S")
    text = f"g (float[1, 4, 4, 4] a{second}) => (float[{axes}] y) {{ y = {expression} }}"
    proto = parse(text, parameters, opset=opset, ir_version=8)
    model = load(proto)
    (carrier,) = find_carriers(model)
    assert (carrier.name, carrier.inputs, carrier.output) == ("y", ("a", "b") if second else ("a",), "y")
    rng = np.random.default_rng(0)
    feed = {key: rng.standard_normal((1, 4, 4, 4)).astype(np.float32) for key in carrier.inputs}
    data = open_dataset(feed, input_specs(proto))
    ranges = calibrated(model, ["a", "b", "y"] if second else ["a", "y"], data, np.arange(1), Runtime(), "minmax")
    result = place(model, ["y"], ranges).proto
    kernels = optimized(result, tmp_path)
    ends = Counter({"QuantizeLinear": len(carrier.inputs), kernel: 1, "DequantizeLinear": int(name != "MatMul")})
    assert kernels + Counter() == Counter({key: count for key, count in ends.items() if key and count})
    integers, written = (run(result, feed, optimize=optimize)[0] for optimize in (True, False))
    step = float(ranges["y"].scale if name != "MatMul" else 1e-5)  # kernels round ties otherwise; a product of floats does not round
    np.testing.assert_allclose(integers, written, rtol=0, atol=1.01 * step)


def test_an_old_opset_declines() -> None:
    proto = parse("g (float[N, 8] x) => (float[N, 8] y) { y = Relu (x) }", opset=12, ir_version=7)
    reason = "integers with one scale per channel need opset 13, the model has 12"
    assert declines(proto) == reason
    with pytest.raises(ValueError, match="need opset 13"):
        place(load(proto), ["y"], {})
    assert declines(parse("g (float[N, 8] x) => (float[N, 8] y) { y = Relu (x) }", opset=13)) is None


def test_operators_may_be_named_by_node() -> None:
    proto = NETS["mlp"].proto()
    for number, node in enumerate(proto.graph.node):
        node.name = f"node{number}"
    names = [node.name for node in proto.graph.node if "x" in node.input]
    model = load(proto)
    assert quantized_values(model, names) == quantized_values(model, ["a"]) == ("x",)


@pytest.mark.parametrize("values", [["x"], ["h"], ["y"], ["x", "h", "y"]])
@pytest.mark.parametrize("opset", [11, 17])
def test_fake_quantization_rounds_just_these_values(values: list[str], opset: int) -> None:
    text = """g (float[N, 8] x, bool p) => (float[N, 8] y, float[N, 8] z) {
        h = Tanh (x)
        y = Mul (h, x)
        z = If (p) <then_branch = t () => (float[N, 8] u) { u = Add (h, x) }, else_branch = e () => (float[N, 8] v) { v = Sub (h, x) }>
    }"""
    model: Model = load(parse(text, opset=opset, ir_version=7))
    before = model.proto.SerializeToString()
    ranges = {name: Range.spanning(-3, 3) for name in values}
    result = fake_quantized(model, values, ranges).proto
    assert model.proto.SerializeToString() == before
    onnx.checker.check_model(result)
    x = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)

    def rounded(name: str, value: Array) -> Array:
        return ranges[name].rounded(value) if name in ranges else value

    a = rounded("x", x)
    h = rounded("h", run(parse("g (float[N, 8] x) => (float[N, 8] h) { h = Tanh (x) }"), {"x": a})[0])
    for optimize in (True, False):
        y, z = run(result, {"x": x, "p": np.array(True)}, optimize=optimize)
        np.testing.assert_array_equal(y, rounded("y", h * a))
        np.testing.assert_array_equal(z, h + a)
