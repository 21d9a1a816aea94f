"""What canonicalization does, and above all what it must leave alone, on models written as text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, numpy_helper

from intaglio.passes import canonicalize as module
from intaglio.passes.canonicalize import Report, canonicalize, remove_dead
from intaglio.passes.graph import scopes
from intaglio.passes.model import Model
from intaglio.passes.session import open_session, to_array, to_value
from intaglio.passes.weights import WeightStore, set_external

Array = npt.NDArray[np.generic]

BATCH_NORM = """
<ir_version: 8, opset_import: ["" : 17]>
agraph (float[N,2,H,5] x) => (float[N,3,H,5] y)
    <float[3] s = {1, 2, 3}, float[3] b = {1, -2, 3}, float[3] m = {0.5, 0, 1}, float[3] v = {1, 2, 0.5}>
{
    [conv] c = Conv(x, W)
    [norm] n = BatchNormalization(c, s, b, m, v)
    [drop] d = Dropout(n)
    [same] i = Identity(d)
    [relu] y = Relu(i)
}
"""

TIED = """
<ir_version: 8, opset_import: ["" : 17]>
agraph (int64[N] ids, float[N,16] x) => (float[N,16] rows, float[N,64] logits)
    <int64[1] one = {1}, int64[1] two = {15}>
{
    sum = Add(one, two)
    minus = Constant <value = int64[1] {-1}> ()
    shape = Concat <axis = 0> (minus, sum)
    rows = Gather(W, ids)
    t = Transpose <perm = [1, 0]> (W)
    flat = Reshape(x, shape)
    logits = MatMul(flat, t)
}
"""

IF = """
<ir_version: 8, opset_import: ["" : 17]>
agraph (bool c, float[N,2] x) => (float[N,2] y) <float[2] w = {1, 2}, float[2] spare = {7, 8}>
{
    k = Identity(w)
    y = If(c) <
        then_branch = yes () => (float[N,2] t) <float[2] unused = {9, 9}> { dead = Neg(x)  s = Add(x, k)  t = Identity(s) },
        else_branch = no () => (float[N,2] e) { one = Constant <value = float[2] {3, 4}> ()  e = Mul(x, one) }
    >
}
"""

LOOP = """
<ir_version: 8, opset_import: ["" : 17]>
agraph (int64 n, bool c, float[2] x) => (float[2] y, float[K,2] all) <float[2] w = {1, 2}>
{
    k = Identity(w)
    y, all = Loop(n, c, x) <
        body = step (int64 i, bool go, float[2] s) => (bool on, float[2] next, float[2] out) {
            on = Identity(go)
            next = Add(s, k)
            out = Mul(s, k)
        }
    >
}
"""

FUNCTION = """
<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
agraph (float[2,2] x) => (float[2,2] y)
{
    a = my.block(x)
    b = Identity(a)
    y = my.block(b)
}
<domain: "my", opset_import: ["" : 17]>
block (x) => (y) { w = Constant <value = float[2,2] {1, 2, 3, 4}> ()  p = MatMul(x, w)  y = Relu(p) }
"""

QDQ = """
<ir_version: 8, opset_import: ["" : 17]>
agraph (float[1,2] x) => (float[1,2] y) <float s = {0.1}, int8 z = {0}, int8[2,2] w = {1, 2, 3, 4}>
{
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    i = Identity(d)
    wd = DequantizeLinear(w, s, z)
    mm = MatMul(i, wd)
    q2 = QuantizeLinear(mm, s, z)
    d2 = DequantizeLinear(q2, s, z)
    t = Transpose <perm = [0, 1]> (d2)
    q3 = QuantizeLinear(t, s, z)
    d3 = DequantizeLinear(q3, s, z)
    r = Relu(d2)
    y = Add(d3, r)
}
"""

HALF = """
<ir_version: 8, opset_import: ["" : 17]>
agraph (float16[N,4] x) => (float16[N,4] y)
{
    a = Relu(x)
    b = Identity(a)
    c = Softmax(b)
    y = Add(c, x)
}
"""

EXPANDED = """
<ir_version: 10, opset_import: ["" : 21]>
agraph (float[2,4,3] x) => (float[2,4,3] y) <float[4] s = {1, 2, 1, 1}>
{
    i = Identity(x)
    a = GroupNormalization <num_groups = 2> (i, s, s)
    y = Mish(a)
}
"""

UNKNOWN = """
<ir_version: 8, opset_import: ["" : 17, "acme" : 3]>
agraph (float[2] x) => (float[2] y) <float[2] spare = {1, 2}>
{
    i = Identity(x)
    dead = Neg(x)
    y = acme.Magic <strength = 3> (i)
}
"""


def parse(text: str, **weights: Array) -> ModelProto:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


def simplify(proto: ModelProto, store: WeightStore | None = None) -> tuple[ModelProto, Report]:
    before = proto.SerializeToString(deterministic=True)
    model = Model(proto, store or WeightStore(None), None, proto.ByteSize(), "")
    result, report = canonicalize(model)
    assert proto.SerializeToString(deterministic=True) == before, "the input was changed"
    assert report.bytes_after <= report.bytes_before
    assert report.nodes_after <= report.nodes_before
    assert report.changed == (result.proto.SerializeToString(deterministic=True) != before)
    assert report.changed or result is model
    return result.proto, report


def op_types(proto: ModelProto) -> list[str]:
    return [node.op_type for scope in scopes(proto) for node in scope.body.node]


def run(proto: ModelProto, store: WeightStore | None = None, **feed: Array) -> list[Array]:
    session = open_session(proto, weights=store, optimize=False)
    return [to_array(value) for value in session.run(session.outputs, {name: to_value(array) for name, array in feed.items()})]


def assert_same(one: list[Array], other: list[Array]) -> None:
    for left, right in zip(one, other, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)  # fp32 sums in another order


def batch_norm() -> ModelProto:
    return parse(BATCH_NORM, W=np.random.default_rng(0).standard_normal((3, 2, 3, 1), np.float32))


def tied() -> ModelProto:
    return parse(TIED, W=np.random.default_rng(0).standard_normal((64, 16), np.float32))


def test_batch_norm_dropout_and_identity_go_into_the_convolution() -> None:
    proto = batch_norm()
    result, report = simplify(proto)
    assert op_types(result) == ["Conv", "Relu"]
    assert report == Report(True, "simplified by ONNX Runtime", 5, 2, proto.ByteSize(), result.ByteSize())
    x = np.random.default_rng(1).standard_normal((2, 2, 7, 5), np.float32)
    assert_same(run(result, x=x), run(proto, x=x))
    onnx.checker.check_model(result, full_check=True)


def test_a_second_time_there_is_nothing_left_to_do() -> None:
    once, _ = simplify(batch_norm())
    _, report = simplify(once)
    assert not report.changed
    assert report.reason == "nothing to simplify"


@pytest.mark.parametrize("text", [IF, LOOP, FUNCTION, QDQ, HALF, EXPANDED])
def test_the_same_model_gives_the_same_bytes(text: str) -> None:
    first, second = (simplify(parse(text))[0].SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_a_tied_weight_is_not_copied_while_shapes_still_fold() -> None:
    proto = tied()
    result, report = simplify(proto)
    assert report.reason == "simplified by ONNX Runtime"
    assert sorted(op_types(result)) == ["Gather", "MatMul", "Reshape", "Transpose"]
    assert [tensor.name for tensor in result.graph.initializer if len(tensor.dims) == 2] == ["W"]
    feed = {"ids": np.array([3, 1]), "x": np.ones((2, 16), np.float32)}
    assert_same(run(result, **feed), run(proto, **feed))


def grown(size: int) -> ModelProto:
    """Computing the Neg of `w` ahead would store two vectors instead of one."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    agraph (float[N] x) => (float[N] y) <int64[1] a = {1}, int64[1] b = {1}>
    { n = Neg(w)  p = Mul(x, w)  q = Add(p, n)  axis = Sub(a, b)  y = CumSum(q, axis) }
    """
    proto = parse(text, w=np.linspace(-1, 1, size, dtype=np.float32))
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = size
    return proto


def test_a_large_constant_is_not_computed_ahead() -> None:
    proto = grown(2048)
    result, report = simplify(proto)
    if report.changed:
        assert sorted(op_types(result)) == ["Add", "CumSum", "Mul", "Neg"]
    else:  # releases of ONNX Runtime without a limit on folding
        assert report.reason.endswith(" bytes larger")
    x = np.linspace(0, 3, 2048, dtype=np.float32)
    assert_same(run(result, x=x), run(proto, x=x))


def test_a_graph_that_can_only_grow_is_left() -> None:
    _, report = simplify(grown(256))
    assert not report.changed
    assert report.reason.startswith("ONNX Runtime's graph is ")
    assert report.reason.endswith(" bytes larger")


def test_everything_that_only_describes_survives() -> None:
    proto = batch_norm()
    proto.doc_string, proto.producer_name, proto.producer_version = "the model", "maker", "1.2"
    proto.model_version, proto.domain = 7, "org.example"
    proto.metadata_props.add(key="classes", value="cat,dog")
    proto.graph.doc_string = "the graph"
    proto.graph.metadata_props.add(key="g", value="1")
    proto.graph.input[0].doc_string = "an image"
    proto.graph.input[0].type.denotation = "IMAGE"
    proto.graph.node[0].doc_string = "the convolution"
    proto.graph.node[0].metadata_props.add(key="origin", value="line 3")
    proto.graph.node[4].metadata_props.add(key="origin", value="line 9")
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("i", TensorProto.FLOAT, ["N", 3, "H", 5]))
    result, report = simplify(proto)
    assert report.reason == "simplified by ONNX Runtime"

    stripped = [ModelProto(), ModelProto()]
    for copy, source in zip(stripped, (proto, result), strict=True):
        copy.CopyFrom(source)
        for field in ("node", "initializer", "value_info"):
            copy.graph.ClearField(field)
    assert stripped[0] == stripped[1]

    conv, relu = result.graph.node
    assert (conv.name, conv.doc_string, relu.name) == ("conv", "the convolution", "relu")
    assert [(entry.key, entry.value) for node in (conv, relu) for entry in node.metadata_props] == [
        ("origin", "line 3"),
        ("origin", "line 9"),
    ]
    assert not conv.attribute, "defaults are not spelled out"
    assert not result.graph.value_info


def test_an_old_model_keeps_its_initializers_among_the_inputs() -> None:
    text = """
    <ir_version: 3, opset_import: ["" : 7]>
    agraph (float[2,2,3,3] x, float[2,2,1,1] W, float[2] s, float[2] b, float[2] m, float[2] v, float[2] k)
        => (float[2,2,3,3] y)
        <float[2,2,1,1] W = {1, 2, 3, 4}, float[2] s = {1, 2}, float[2] b = {1, 2}, float[2] m = {0, 1}, float[2] v = {1, 4},
         float[2] k = {1, 1}>
    { c = Conv(x, W)  n = BatchNormalization(c, s, b, m, v)  y = Relu(n) }
    """
    proto = parse(text)
    result, report = simplify(proto)
    assert report.reason == "simplified by ONNX Runtime"
    assert op_types(result) == ["Conv", "Relu"]
    initializers = {tensor.name for tensor in result.graph.initializer}
    assert result.ir_version == 3
    assert len(initializers) == 2
    assert next(value.name for value in result.graph.input) == "x"
    assert {value.name for value in result.graph.input} == {"x"} | initializers
    onnx.checker.check_model(result, full_check=True)
    x = np.random.default_rng(0).standard_normal((2, 2, 3, 3), np.float32)
    assert_same(run(result, x=x), run(proto, x=x))


def test_a_default_that_users_may_override_stays_and_is_not_folded() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    agraph (float[2] x, float[2] w, float[2] idle) => (float[2] y) <float[2] w = {1, 2}, float[2] idle = {5, 5}>
    { n = Neg(w)  i = Identity(x)  y = Add(i, n) }
    """
    proto = parse(text)
    result, report = simplify(proto)
    assert report.reason == "simplified by ONNX Runtime"
    assert sorted(op_types(result)) == ["Add", "Neg"]
    assert result.graph.input == proto.graph.input
    assert result.graph.initializer == proto.graph.initializer
    assert_same(run(result, x=np.zeros(2, np.float32), w=np.ones(2, np.float32)), [-np.ones(2, np.float32)])


def test_an_unknown_domain_is_left_but_for_dead_code() -> None:
    proto = parse(UNKNOWN)
    result, report = simplify(proto)
    assert op_types(result) == ["Identity", "Magic"]
    assert not result.graph.initializer
    assert report.changed
    assert report.reason.startswith("ONNX Runtime cannot load it: ")
    assert "\n" not in report.reason
    assert result.graph.node[1] == proto.graph.node[2]
    assert result.opset_import == proto.opset_import


@pytest.mark.parametrize("c", [True, False])
def test_branches_keep_working(c: bool) -> None:
    proto = parse(IF)
    proto.graph.node[1].attribute[0].g.metadata_props.add(key="part", value="then")
    proto.graph.node[1].metadata_props.add(key="origin", value="line 5")
    result, report = simplify(proto)
    assert report.reason == "simplified by ONNX Runtime"
    assert sorted(op_types(result)) == ["Add", "If", "Mul"]
    feed = {"c": np.array(c), "x": np.array([[1, 5]], np.float32)}
    assert_same(run(result, **feed), run(proto, **feed))
    assert [tensor.name for tensor in result.graph.initializer] == ["w"]
    assert result.graph.node[0].metadata_props == proto.graph.node[1].metadata_props
    graphs = {attribute.name: attribute.g for attribute in result.graph.node[0].attribute}
    assert graphs["then_branch"].metadata_props[0].value == "then"


def test_loops_keep_working() -> None:
    proto = parse(LOOP)
    result, report = simplify(proto)
    assert report.reason == "simplified by ONNX Runtime"
    assert report.nodes_after == report.nodes_before - 1
    feed = {"n": np.array(3), "c": np.array(True), "x": np.array([1, 5], np.float32)}
    assert_same(run(result, **feed), run(proto, **feed))


def test_functions_are_called_as_before() -> None:
    proto = parse(FUNCTION)
    result, report = simplify(proto)
    assert report.reason == "simplified by ONNX Runtime"
    assert [node.op_type for node in result.graph.node] == ["block", "block"]
    assert result.functions == proto.functions
    assert result.opset_import == proto.opset_import
    x = np.array([[1, -2], [3, 4]], np.float32)
    assert_same(run(result, x=x), run(proto, x=x))


def test_quantize_and_dequantize_nodes_stay() -> None:
    proto = parse(QDQ)
    result, report = simplify(proto)
    expected = Counter(op_types(proto))
    if report.changed:
        expected -= Counter(["Identity"])
    else:  # releases of ONNX Runtime that cannot be kept from fusing
        assert report.reason == "ONNX Runtime's graph has 3 of 4 DequantizeLinear nodes"
    assert Counter(op_types(result)) == expected
    x = np.array([[1, -2]], np.float32)
    assert_same(run(result, x=x), run(proto, x=x))


@pytest.mark.parametrize("text", [HALF, EXPANDED])
def test_what_the_cpu_has_no_kernel_for_is_not_expanded(text: str) -> None:
    proto = parse(text)
    result, report = simplify(proto)
    assert report.reason == "simplified by ONNX Runtime"
    assert op_types(result) == [op_type for op_type in op_types(proto) if op_type != "Identity"]


def test_external_weights_keep_their_reference(tmp_path: Path) -> None:
    proto = tied()
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "W")
    (tmp_path / "w.bin").write_bytes(tensor.raw_data)
    set_external(tensor, "w.bin", 0, len(tensor.raw_data))
    tensor.ClearField("raw_data")
    store = WeightStore(tmp_path)
    result, report = simplify(proto, store)
    assert report.reason == "simplified by ONNX Runtime"
    assert report.bytes_before == proto.ByteSize() + 64 * 16 * 4
    assert next(tensor for tensor in result.graph.initializer if tensor.name == "W") == tensor
    feed = {"ids": np.array([3, 1]), "x": np.ones((2, 16), np.float32)}
    assert_same(run(result, store, **feed), run(proto, store, **feed))


def test_a_large_model_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT_BYTES", 1000)
    _, report = simplify(tied())
    assert not report.changed
    assert report.reason.endswith("more than the 1000 that are simplified in memory")


def test_a_graph_with_other_outputs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(proto: ModelProto, fold_limit_bytes: int) -> ModelProto:
        return parse(
            """
            <ir_version: 8, opset_import: ["" : 17]>
            agraph (float[N,2] x) => (float[N,2] y) { y = Sigmoid(x) }
            """
        )

    monkeypatch.setattr(module, "_optimized_offline", wrong)
    text = '<ir_version: 8, opset_import: ["" : 17]> agraph (float[N,2] x) => (float[N,2] y) { i = Identity(x)  y = Relu(i) }'
    _, report = simplify(parse(text))
    assert not report.changed
    assert "differ on random inputs" in report.reason


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("y = com.microsoft.QuickGelu(x)", "ONNX Runtime's graph needs com.microsoft::QuickGelu"),
        ("y = Relu <depth = 3> (x)", "the checker refuses ONNX Runtime's graph"),
        ("y = Relu(x)", "ONNX Runtime's graph has 0 of 1 QuantizeLinear nodes"),
    ],
)
def test_a_graph_that_is_no_better_is_refused(monkeypatch: pytest.MonkeyPatch, nodes: str, reason: str) -> None:
    other = parse(f'<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> g (float[2] x) => (float[2] y) {{ {nodes} }}')
    monkeypatch.setattr(module, "_optimized_offline", lambda proto, fold_limit_bytes: other)
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    agraph (float[2] x) => (float[2] y) <float s = {0.1}> { q = QuantizeLinear(x, s)  y = DequantizeLinear(q, s) }
    """
    if "Quantize" not in reason:
        text = """
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[2] x) => (float[2] y) { i = Identity(x)  j = Identity(i)  k = Identity(j)  y = Relu(k) }
        """
    _, report = simplify(parse(text))
    assert not report.changed
    assert report.reason.startswith(reason)


def test_a_random_model_is_not_held_to_its_outputs() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    agraph (float[2,3] x) => (float[2,3] y) { i = Identity(x)  r = RandomNormalLike(i)  y = Add(x, r) }
    """
    result, _ = simplify(parse(text))
    assert op_types(result) == ["RandomNormalLike", "Add"]


def test_annotations_and_training_information_pin_the_graph() -> None:
    annotated, trained = batch_norm(), batch_norm()
    note = annotated.graph.quantization_annotation.add(tensor_name="c")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
    annotated.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "scale"))
    trained.training_info.add().update_binding.add(key="s", value="b")
    for proto in (annotated, trained):
        result, report = simplify(proto)
        assert not report.changed
        assert "refer to values by name" in report.reason
        assert result == proto


def test_remove_dead_looks_into_every_scope() -> None:
    result = remove_dead(parse(IF))
    assert [tensor.name for tensor in result.graph.initializer] == ["w"], "w is read through k by a branch only"
    branches = {attribute.name: attribute.g for attribute in result.graph.node[1].attribute}
    assert [node.op_type for node in branches["then_branch"].node] == ["Add", "Identity"]
    assert not branches["then_branch"].initializer


def test_remove_dead_keeps_inputs_and_drops_chains_and_their_types() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    agraph (float[2] x, float[2] z) => (float[2] y) <float[2] w = {1, 2}> { a = Add(z, w)  b = Neg(a)  y = Relu(x) }
    """
    proto = parse(text)
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("a", TensorProto.FLOAT, [2]))
    result = remove_dead(proto)
    assert op_types(result) == ["Relu"]
    assert not result.graph.initializer
    assert not result.graph.value_info
    assert result.graph.input == proto.graph.input


def test_remove_dead_keeps_nodes_without_outputs() -> None:
    text = '<ir_version: 8, opset_import: ["" : 17, "a" : 1]> g (float[2] x) => (float[2] y) { n = Neg(x) a.Log(n) y = Relu(x) }'
    proto = parse(text.replace("a.Log(n)", "l = a.Log(n)"))
    del proto.graph.node[1].output[:]
    assert op_types(remove_dead(proto)) == ["Neg", "Log", "Relu"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["Add", "Mul", "Sub"]), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=10))
def test_remove_dead_changes_no_output_and_leaves_nothing_dead(program: list[tuple[str, int, int]]) -> None:
    names = ["x", "w"]
    nodes = []
    for position, (op_type, left, right) in enumerate(program):
        nodes.append(onnx.helper.make_node(op_type, [names[left % len(names)], names[right % len(names)]], [f"v{position}"]))
        names.append(f"v{position}")
    value = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", names[-1])]
    weight = numpy_helper.from_array(np.array([0.5, -1], np.float32), "w")
    graph = onnx.helper.make_graph(nodes, "g", value[:1], value[1:], [weight])
    proto = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
    result = remove_dead(proto)
    x = np.array([0.25, 1.5], np.float32)
    np.testing.assert_array_equal(run(result, x=x)[0], run(proto, x=x)[0])
    read = {name for node in result.graph.node for name in node.input} | {names[-1]}
    assert all(set(node.output) <= read for node in result.graph.node)
    assert {tensor.name for tensor in result.graph.initializer} <= read
