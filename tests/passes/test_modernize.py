"""Working copies: converted, inlined and with constant branches resolved, they compute the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from intaglio.passes.errors import InputError
from intaglio.passes.modernize import SMALL_BYTES, modernize
from intaglio.passes.sites import opset
from intaglio.passes.weights import WeightStore
from tests.models import CASES, assert_close, normal, operators, parse, run

CONVERTIBLE = [name for name in CASES if not name.startswith("fused")]


@pytest.mark.parametrize("old", [9, 11, 13, 17])
@pytest.mark.parametrize("name", CONVERTIBLE)
def test_an_old_model_computes_the_same(name: str, old: int) -> None:
    case = CASES[name]
    proto = case.proto(opset=old, ir_version=3 if old == 9 else 8)
    new = modernize(proto).restored()
    assert opset(new) == 18
    onnx.checker.check_model(new)
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in proto.graph.input}
    feed = {name: array if array.ndim == ranks[name] else array[0] for name, array in case.inputs.items()}  # some take one sample a run
    # The kernels of an operator are the same for all versions here, but a converted graph may be fused in another way.
    assert_close(run(new, feed), run(proto, feed), 1e-6, name)


OLD = """g (float[N, 4, 6] x) => (float[N, M] y) {
    s = Softmax <axis = 1> (x)
    u = Unsqueeze <axes = [1]> (s)
    q = Squeeze <axes = [1]> (u)
    r = ReduceSum <axes = [2], keepdims = 0> (q)
    p = Pad <pads = [0, 1, 0, 1]> (r)
    a, b = Split <axis = 1, split = [2, 4]> (p)
    d = Dropout <ratio = 0.5> (b)
    m = ReduceMean <axes = [1]> (d)
    y = Mul (m, a)
}"""


def test_attributes_become_inputs() -> None:
    proto = parse(OLD, opset=10, ir_version=5)
    new = modernize(proto).restored()
    x = np.random.default_rng(0).standard_normal((3, 4, 6)).astype(np.float32)
    assert_close(run(new, {"x": x}), run(proto, {"x": x}), 1e-6)  # the same kernels; float32 rounding at most
    made = {name for node in new.graph.node for name in node.output}
    assert {name for node in proto.graph.node for name in node.output if name} <= made, "values lost their names"


def test_contrib_operators_survive_conversion() -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y) { h = com.microsoft.FastGelu (x) y = Softmax (h) }"
    proto = parse(text, opset=13)
    new = modernize(proto).restored()
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    assert_close(run(new, {"x": x}), run(proto, {"x": x}), 0)


def test_metadata_is_kept_and_the_original_is_not_changed() -> None:
    proto = CASES["gemm"].proto(opset=11)
    helper.set_model_props(proto, {"key": "value"})
    before = proto.SerializeToString(deterministic=True)
    new = modernize(proto).restored()
    assert {entry.key: entry.value for entry in new.metadata_props} == {"key": "value"}
    assert proto.SerializeToString(deterministic=True) == before


def test_large_weights_do_not_enter_the_working_copy() -> None:
    large = normal(1, 160, 160)
    proto = parse(
        "g (float[N, 160] x) => (float[N, 160] y) { h = MatMul (x, w) y = Add (h, b) }", {"w": large, "b": normal(2, 160)}, opset=12
    )
    assert large.nbytes > SMALL_BYTES
    working = modernize(proto)
    assert working.heavy.keys() == {"w"}
    assert [tensor.name for tensor in working.proto.graph.initializer] == ["b"]
    assert working.proto.ByteSize() < 4000
    new = working.restored()
    assert [value.name for value in new.graph.input] == ["x"]
    x = np.random.default_rng(0).standard_normal((2, 160)).astype(np.float32)
    assert_close(run(new, {"x": x}), run(proto, {"x": x}), 0)


def test_external_weights_are_not_read(tmp_path: Path) -> None:
    proto = parse("g (float[N, 4] x) => (float[M] y) { y = Reshape (x, s) }", {"s": np.array([-1])}, opset=13)
    (tmp_path / "data").write_bytes(proto.graph.initializer[0].raw_data)
    tensor = TensorProto(name="s", dims=[1], data_type=TensorProto.INT64, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="data")
    proto.graph.initializer[0].CopyFrom(tensor)
    assert modernize(proto).restored().graph.initializer[0] == tensor
    (read,) = modernize(proto, WeightStore(tmp_path)).proto.graph.initializer
    assert numpy_helper.to_array(read).tolist() == [-1]


def test_what_onnx_cannot_convert_is_refused_in_one_line() -> None:
    text = "g (float[2, 3, 4] x) => (float[2, 3, 4] y) { y = Upsample (x, s) }"
    proto = parse(text, {"s": np.ones(3, np.float32)}, opset=9)
    proto.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(InputError, match="cannot convert the model") as refused:
        modernize(proto)
    assert "\n" not in str(refused.value)
    assert "export it for opset 18" in str(refused.value)


FUNCTION = """<ir_version: 8, opset_import: ["": 18, "local": 1]>
agraph (float[N, 4] x) => (float[N, 4] y) { h = local.twice (x) y = local.twice (h) }
<domain: "local", opset_import: ["": 18]>
twice (a) => (b) { c = Add (a, a) b = Tanh (c) }"""


def test_functions_are_inlined() -> None:
    proto = onnx.parser.parse_model(FUNCTION)
    new = modernize(proto).restored()
    assert operators(new) == {"Add": 2, "Tanh": 2}
    assert not new.functions
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    assert_close(run(new, {"x": x}), run(proto, {"x": x}), 0)


BRANCHES = """g (float[N, 4] x) => (float[N, 4] y) {
    c = Not (on)
    h = If (c) <then_branch = t () => (r) { r = Neg (x) }, else_branch = e () => (r) { k = Exp (x) r = Mul (k, x) }>
    y = If (on) <then_branch = t () => (h) { }, else_branch = e () => (r) { r = Neg (h) }>
}"""


@pytest.mark.parametrize("on", [True, False])
def test_constant_branches_are_resolved(on: bool) -> None:
    proto = parse(BRANCHES, {"on": np.array(on)})
    new = modernize(proto).restored()
    assert not any(node.op_type == "If" for node in new.graph.node)
    assert ("Exp" in operators(new)) == on
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    (y,) = run(new, {"x": x})
    np.testing.assert_allclose(y, np.exp(x) * x if on else x, rtol=1e-6)  # one rounding of exp
    assert len({name for node in new.graph.node for name in node.output}) == sum(len(node.output) for node in new.graph.node)


def test_a_condition_that_a_caller_feeds_is_left() -> None:
    branches = "<then_branch = t () => (r) { r = Neg (x) }, else_branch = e () => (r) { r = Exp (x) }>"
    text = f"g (float[N, 4] x, bool on) => (float[N, 4] y) {{ y = If (on) {branches} }}"
    for weights in ({}, {"on": np.array(True)}):
        assert operators(modernize(parse(text, weights)).proto) == {"If": 1}
