"""Sessions: weights from wherever they lie, every refusal one line that names the node."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from intaglio.passes.errors import InputError
from intaglio.passes.session import RUNTIME_VERSION, Session, open_session, to_array, to_value
from intaglio.passes.weights import WeightStore

REPOSITORY = Path(__file__).parents[2]
SIDE = 160  # a float32 matrix of this side is large enough to be handed over as an array


def matrix(seed: int = 0, dtype: object = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((SIDE, SIDE)).astype(dtype)


def externalize(tensor: TensorProto, folder: Path) -> None:
    """Move the payload of a tensor into a file of its own."""
    location = f"{tensor.name}.bin"
    (folder / location).write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def run(session: Session, **arrays: np.ndarray) -> list[np.ndarray]:
    values = {name: to_value(array) for name, array in arrays.items()}
    return [to_array(value) for value in session.run(session.outputs, values)]


def product(ir_version: int = 8, extra_input: str = "") -> onnx.ModelProto:
    model = parser.parse_model(
        f'<ir_version: {ir_version}, opset_import: ["" : 9]> g (float[n,{SIDE}] x{extra_input}) => (float[n,{SIDE}] y) '
        "{ t = MatMul(x, W) y = Add(t, b) }"
    )
    model.graph.initializer.append(numpy_helper.from_array(matrix(), "W"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(SIDE, np.float32), "b"))
    return model


@pytest.mark.parametrize("source", ["embedded", "external", "separate", "file"])
def test_weights_come_from_wherever_they_lie(tmp_path, source):
    model = product()
    weights, initializers = None, []
    if source == "external":
        for tensor in model.graph.initializer:
            externalize(tensor, tmp_path)
        weights = WeightStore(tmp_path)
    elif source == "separate":
        initializers = list(model.graph.initializer)
        model.graph.ClearField("initializer")
    elif source == "file":
        onnx.save(model, tmp_path / "model.onnx")
    before = model.SerializeToString()
    opened = tmp_path / "model.onnx" if source == "file" else model
    session = open_session(opened, weights=weights, initializers=initializers)
    x = matrix(1)
    np.testing.assert_array_equal(run(session, x=x, unknown=x)[0], run(open_session(product()), x=x)[0])
    np.testing.assert_allclose(run(session, x=x)[0], x @ matrix() + 1, rtol=1e-4, atol=1e-4)  # sums of 160 products
    assert model.SerializeToString() == before


def test_external_tensors_of_nested_graphs_constants_and_functions(tmp_path):
    model = parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[{SIDE},{SIDE}] x, bool c) => (float[{SIDE},{SIDE}] y) {{
            k = Constant <value = float[1] {{0}}> ()
            t = If (c) <then_branch = a () => (q) {{ q = MatMul(x, V) }}, else_branch = b () => (r) {{ r = Identity(x) }}>
            u = local.f(t)
            y = Add(u, k)
        }}
        <domain: "local", opset_import: ["" : 17]> f (v) => (w) {{ k = Constant <value = float[1] {{0}}> () w = Mul(v, k) }}"""
    )
    constant, condition = model.graph.node[0], model.graph.node[1]
    constant.attribute[0].t.CopyFrom(numpy_helper.from_array(matrix(2), "K"))
    model.functions[0].node[0].attribute[0].t.CopyFrom(numpy_helper.from_array(matrix(3), "F"))
    condition.attribute[0].g.initializer.append(numpy_helper.from_array(matrix(4), "V"))
    x = matrix(1)
    expected = run(open_session(model), x=x, c=np.array(True))[0]
    nested = [constant.attribute[0].t, model.functions[0].node[0].attribute[0].t, condition.attribute[0].g.initializer[0]]
    for tensor in nested:
        externalize(tensor, tmp_path)
    session = open_session(model, weights=WeightStore(tmp_path))
    np.testing.assert_array_equal(run(session, x=x, c=np.array(True))[0], expected)
    with pytest.raises(InputError, match="has external data, but its folder is unknown"):
        open_session(model)


@pytest.mark.parametrize(
    "dtype",
    ["float16", "bfloat16", "float64", "int8", "uint8", "int16", "int32", "int64", "bool", "float8_e4m3fn", "int4", "uint4"],
)
def test_every_type_of_weight(tmp_path, dtype):
    values = np.random.default_rng(0).integers(0, 7, (300, 300)).astype(getattr(ml_dtypes, dtype, dtype))
    model = parser.parse_model('<ir_version: 10, opset_import: ["" : 21]> g () => (float[300,300] y) { y = Cast<to = 1>(W) }')
    model.graph.initializer.append(numpy_helper.from_array(values, "W"))
    externalize(model.graph.initializer[0], tmp_path)
    (result,) = run(open_session(model, weights=WeightStore(tmp_path)))
    np.testing.assert_array_equal(result, values.astype(np.float32))


def test_initializers_listed_as_inputs():
    x, other = matrix(1), matrix(2)
    fixed = open_session(product(ir_version=3, extra_input=f", float[{SIDE},{SIDE}] W, float[{SIDE}] b"))
    assert (fixed.inputs, fixed.defaulted_inputs) == (("x",), ())
    defaulted = open_session(product(ir_version=8, extra_input=f", float[{SIDE},{SIDE}] W"))
    assert (defaulted.inputs, defaulted.defaulted_inputs) == (("x",), ("W",))
    close = {"rtol": 1e-3, "atol": 1e-3}  # only the fixed weight lets MatMul and Add be fused, which rounds otherwise
    np.testing.assert_allclose(run(fixed, x=x, W=other)[0], x @ matrix() + 1, **close)
    np.testing.assert_allclose(run(defaulted, x=x)[0], x @ matrix() + 1, **close)
    np.testing.assert_allclose(run(defaulted, x=x, W=other)[0], x @ other + 1, **close)


def test_results_outlive_the_arrays_that_were_fed():
    model = parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> g (float[n] x) => (float[n] y) { y = Neg(x) }')
    model.graph.output[0].name = "x"
    fed = np.ones(1000, np.float32)
    (result,) = run(open_session(model), x=fed)
    fed[:] = 0
    np.testing.assert_array_equal(result, np.ones(1000))


def test_weights_are_copied():
    class Changing(WeightStore):
        array = matrix()

        def read(self, tensor: TensorProto) -> np.ndarray:
            return self.array

    store = Changing(None)
    session = open_session(product(), weights=store)
    expected = run(session, x=matrix(1))[0]
    store.array[:] = 0
    np.testing.assert_array_equal(run(session, x=matrix(1))[0], expected)


def test_values_of_every_kind_cross_the_border():
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]> g (float[n] x, string[k] s, bfloat16[n] h)
        => (string[k] t, bfloat16[n] i, seq(float[m]) q) {
            t = Identity(s) i = Cast<to = 16>(x) q = SplitToSequence(x) j = Cast<to = 1>(h)
        }"""
    )
    session = open_session(model)
    assert session.output_types == ("tensor(string)", "tensor(bfloat16)", "seq(tensor(float))")
    feed = {"x": np.array([1, 2.5], np.float32), "s": np.array(["a", "b"]), "h": np.ones(2, ml_dtypes.bfloat16)}
    (strings,) = session.run(["t"], {name: to_value(array) for name, array in feed.items()})
    assert to_array(strings).tolist() == ["a", "b"]

    bits = parser.parse_model('<ir_version: 10, opset_import: ["" : 21]> g (bfloat16[n,2] x) => (bfloat16[n,2] y) { y = Identity(x) }')
    for count in (0, 3):
        array = np.arange(2 * count).reshape(count, 2).astype(ml_dtypes.bfloat16)
        (result,) = run(open_session(bits), x=array)
        assert result.dtype == array.dtype
        np.testing.assert_array_equal(result, array)


def test_values_without_an_array_form_are_refused():
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]> g (float[n] x) => (seq(float[m]) q, int4[n] i) {
            q = SplitToSequence(x) i = Cast<to = 22>(x)
        }"""
    )
    session = open_session(model)
    sequence, narrow = session.run(["q", "i"], {"x": to_value(np.ones(2, np.float32))})
    with pytest.raises(InputError, match=r"seq\(tensor\(float\)\) is no array"):
        to_array(sequence)
    with pytest.raises(InputError, match="no array form"):
        to_array(narrow)
    with pytest.raises(InputError, match="no array of int4"):
        to_value(np.ones(2, ml_dtypes.int4))


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_to_value_keeps_shape_and_order(shape):
    array = np.random.default_rng(0).standard_normal(shape[::-1]).T
    np.testing.assert_array_equal(to_array(to_value(array)), array)


def one_node(op: str, domain: str = "", opset: int = 21, ir_version: int = 10) -> onnx.ModelProto:
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node(op, ["x"], ["y"], name="node_7", domain=domain)],
            "tiny",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        ),
        opset_imports=[helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else []),
    )
    model.ir_version = ir_version
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (one_node("Frobnicate"), ["node_7", "Frobnicate"]),
        (one_node("Blur", domain="com.example"), ["node_7", "com.example:Blur"]),
        (one_node("Neg", opset=99), ["99"]),
        (one_node("Neg", ir_version=99), ["99"]),
        (one_node("MatMul"), ["node_7", "MatMul"]),
    ],
)
def test_a_model_that_does_not_load_is_one_line(model, words):
    with pytest.raises(InputError) as caught:
        open_session(model)
    message = str(caught.value)
    assert "\n" not in message
    assert ".cc:" not in message
    assert all(word in message for word in ["'tiny'", RUNTIME_VERSION, *words])


def test_a_file_that_is_no_model_is_one_line(tmp_path):
    (tmp_path / "junk.onnx").write_bytes(b"abc")
    for name in ("junk.onnx", "missing.onnx"):
        with pytest.raises(InputError, match=rf"^model '{name}' does not load: [^\n]*$"):
            open_session(tmp_path / name)


def test_a_run_that_fails_is_one_line_and_prints_nothing(capfd):
    session = open_session(product())
    with pytest.raises(InputError, match=r"^model 'g' fails when run: [^\n]*$"):
        run(session, x=np.ones((2, 3), np.float32))
    with pytest.raises(InputError, match=r"^model 'g' fails when run: [^\n]*double[^\n]*$"):
        run(session, x=np.ones((2, SIDE)))
    with pytest.raises(InputError, match=r"needs input 'x', but the data has z"):
        run(session, z=np.ones(2, np.float32))
    late = one_node("Neg")
    late.graph.node[0].op_type = "Reshape"
    late.graph.node[0].input.append("shape")
    late.graph.input.append(helper.make_tensor_value_info("shape", TensorProto.INT64, [1]))
    with pytest.raises(InputError, match=r"Reshape node\. Name:'node_7'"):
        run(open_session(late), x=np.ones(4, np.float32), shape=np.array([3]))
    assert capfd.readouterr() == ("", "")


def test_bad_options_are_refused():
    with pytest.raises(InputError, match=r"provider 'NoProvider' .*CPUExecutionProvider"):
        open_session(one_node("Neg"), providers=["NoProvider"])
    with pytest.raises(InputError, match="threads is 0"):
        open_session(one_node("Neg"), threads=0)


@pytest.mark.parametrize("strings", [False, True])
def test_bind_runs_and_checks_the_feed(strings):
    kind = "string" if strings else "float"
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g ({kind}[2] x) => ({kind}[2] y) {{ y = Identity(x) }}')
    good = np.array(["a", "b"]) if strings else np.ones(2, np.float32)
    open_session(model).bind({"x": good, "unknown": good})()
    with pytest.raises(InputError, match="fails when run"):
        open_session(model).bind({"x": good[:1]})


def test_without_optimization_the_result_is_the_same():
    x = matrix(1)
    np.testing.assert_array_equal(run(open_session(product(), optimize=False), x=x)[0], run(open_session(product()), x=x)[0])


def test_telemetry_is_off_unless_the_user_says_otherwise():
    program = "import os, intaglio.passes.session; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    plain = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"} | {"PYTHONPATH": str(REPOSITORY)}
    for environment, expected in ((plain, "1"), (plain | {"ORT_DISABLE_TELEMETRY": "0"}, "0")):
        done = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True)
        assert done.stdout.strip() == expected
