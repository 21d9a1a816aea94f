"""Scopes, values, sizes and prefixes of graphs, on models written as text."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from intaglio.passes.errors import InputError
from intaglio.passes.graph import (
    ValueIndex,
    all_names,
    captures,
    downstream,
    field_size,
    live,
    reads,
    scopes,
    topological,
)
from intaglio.passes.session import open_session, to_array, to_value
from tests.models import normal, parse

NESTED = """
<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
agraph (bool c, float[2] x) => (float[2] y) <float[2] w = {1, 2}, float[2] v = {5, 6}>
{
    h = Add(x, w)
    r = If(c) <
        then_branch = yes () => (float[2] t) <float[2] k = {1, 1}> { g = Mul(h, w) t = Add(g, k) },
        else_branch = no () => (float[2] e) <float[2] k = {3, 4}> { e = Mul(x, k) }
    >
    y = my.twice(r)
}
<domain: "my", opset_import: ["" : 17]>
twice (h) => (d) { d = Add(h, h) }
"""

CHAIN = """
<ir_version: 8, opset_import: ["" : 17]>
agraph (float[N,2] x, float[N,2] unused) => (float[N,2] y) <float[2] w = {1, 2}, float[2] late = {3, 4}>
{
    a = Add(x, w)
    b = Relu(a)
    y = Mul(b, late)
}
"""


@pytest.fixture
def nested() -> ModelProto:
    return onnx.parser.parse_model(NESTED)


def run(proto: ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = open_session(proto)
    return [to_array(value) for value in session.run(session.outputs, {name: to_value(array) for name, array in feed.items()})]


def test_scopes_are_the_main_graph_nested_graphs_and_functions(nested: ModelProto) -> None:
    found = {scope.path: scope for scope in scopes(nested)}
    assert list(found) == ["main", "main/If_1.then_branch", "main/If_1.else_branch", "function my::twice"]
    assert found["main/If_1.then_branch"].parent is found["main"]
    assert found["function my::twice"].parent is None
    assert found["main/If_1.else_branch"].defines == {"e", "k"}
    assert found["main"].body is nested.graph


def test_uses_follow_captures_and_keep_the_names_of_siblings_apart(nested: ModelProto) -> None:
    index = ValueIndex(nested)
    found = {scope.path: scope for scope in scopes(nested)}

    def places(name: str, path: str = "main") -> list[tuple[str, int, str]]:
        return [(use.node.op_type, use.index, use.scope.path) for use in index.uses(name, found[path])]

    assert places("w") == [("Add", 1, "main"), ("Mul", 1, "main/If_1.then_branch")]
    assert places("w", "main/If_1.then_branch") == places("w")
    assert places("k", "main/If_1.then_branch") == [("Add", 1, "main/If_1.then_branch")]
    assert places("k", "main/If_1.else_branch") == [("Mul", 1, "main/If_1.else_branch")]
    assert places("k") == []
    assert places("h") == [("Mul", 0, "main/If_1.then_branch")]
    assert places("h", "function my::twice") == [("Add", 0, "function my::twice"), ("Add", 1, "function my::twice")]
    assert places("v") == []


def test_producer_is_found_from_inside_and_is_none_for_constants(nested: ModelProto) -> None:
    index = ValueIndex(nested)
    inside = next(scope for scope in scopes(nested) if scope.path.endswith("then_branch"))
    producer = index.producer("h", inside)
    assert producer is not None
    assert producer.node.op_type == "Add"
    assert producer.scope.path == "main"
    assert index.producer("t") is None, "a nested value is not visible outside"
    assert index.producer("t", inside) is not None
    assert index.producer("w") is None
    assert index.producer("x") is None
    assert index.producer("nowhere") is None


def test_reads_include_captures_but_not_inner_names(nested: ModelProto) -> None:
    branch = nested.graph.node[1]
    assert reads(branch) == {"c", "h", "w", "x"}
    assert captures(branch.attribute[0].g if branch.attribute[0].name == "else_branch" else branch.attribute[1].g) == {"x"}


def test_live_keeps_what_only_a_nested_graph_needs(nested: ModelProto) -> None:
    positions, needed = live(nested.graph, ["r"])
    assert positions == {0, 1}
    assert needed == {"r", "c", "h", "w", "x"}


@given(st.binary(max_size=300) | st.sampled_from([b"a" * 16_370, b"a" * 16_384, b"a" * 2_097_152]))
def test_field_size_is_what_the_model_grows_by(payload: bytes) -> None:
    tensor = TensorProto(name="t", data_type=TensorProto.UINT8, dims=[len(payload)], raw_data=payload)
    graph = GraphProto()
    graph.initializer.append(tensor)
    assert field_size(tensor) == graph.ByteSize()


def test_field_size_of_an_empty_message() -> None:
    graph = GraphProto()
    graph.node.append(NodeProto())
    assert field_size(NodeProto()) == graph.ByteSize() == 2


def test_all_names_covers_every_scope(nested: ModelProto) -> None:
    nested.graph.node[0].name = "first"
    assert all_names(nested) == {"c", "x", "y", "w", "v", "h", "r", "g", "t", "e", "k", "d", "first"}


@given(st.permutations(range(6)))
def test_topological_sorts_any_order(order: list[int]) -> None:
    nodes = [onnx.helper.make_node("Add", [f"v{i - 1}", f"v{i // 2}"], [f"v{i}"]) for i in range(1, 7)]
    assert [node.output[0] for node in topological([nodes[i] for i in order])] == [f"v{i}" for i in range(1, 7)]


def test_topological_keeps_an_order_that_is_right_and_refuses_a_cycle(nested: ModelProto) -> None:
    assert topological(nested.graph.node) == list(nested.graph.node)
    loop = [onnx.helper.make_node("Neg", ["b"], ["a"], "n1"), onnx.helper.make_node("Neg", ["a"], ["b"], "n2")]
    with pytest.raises(InputError, match="node 'n1'"):
        topological(loop)


TWO = "g (float[N, 16] x) => (float[N, 24] y, float[N, 24] z) { h = MatMul (x, a) r = Relu (h) y = MatMul (r, b) z = MatMul (x, c) }"


def test_what_lies_downstream() -> None:
    proto = parse(TWO, {"a": normal(1, 16, 16), "b": normal(2, 16, 24), "c": normal(3, 16, 24)})
    assert downstream(proto, {"a"}) == {"a", "h", "r", "y"}
    assert downstream(proto, {"c"}) == {"c", "z"}
    assert downstream(proto, ()) == set()


def test_nested_graphs_pass_changes_on() -> None:
    text = """g (float[N, 16] x, bool k) => (float[N, 8] y) {
        h = MatMul (x, a)
        y = If (k) <then_branch = t () => (float[N, 8] u) { u = Relu (h) }, else_branch = e () => (float[N, 8] v) { v = Neg (h) }>
    }"""
    assert downstream(parse(text, {"a": normal(1, 16, 8)}), {"a"}) == {"a", "h", "y"}
