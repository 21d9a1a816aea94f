"""What freezes labels wherever it stands: operators that are not known, nested graphs, annotations, constants with several uses."""

from __future__ import annotations

import onnx
import pytest
from onnx import helper, numpy_helper

from intaglio.passes.load import load
from intaglio.passes.model import Model
from tests.models import normal, parse
from tests.passes.rescaling import MATRICES, VECTORS, applied, declined, preserved, reason_between_convs, uneven


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("r = Sigmoid (h)", "read by Sigmoid"),
        ("r = Clip (h, zero, six)", "read by Clip"),
        ("c = Sigmoid (h) r = Add (c, h)", "read by Sigmoid"),
    ],
)
def test_reasons(body: str, reason: str) -> None:
    assert reason in reason_between_convs(body)


def test_nested_graphs_and_functions() -> None:
    nested = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 18]>
        g (float[N, 6] x, bool c) => (float[N, 4] y) {
            h = MatMul (x, w) k = MatMul (x, u) y0 = MatMul (k, v2)
            y1 = If (c) <
                then_branch = t () => (float[N, 4] a) { a = MatMul (h, v) },
                else_branch = e () => (float[N, 4] b) { b = MatMul (h, v2) }
            >
            y = Add (y0, y1)
        }""")
    called = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 18, "my" : 1]>
        g (float[N, 6] x) => (float[N, 4] y) {
            h = MatMul (x, w) k = MatMul (x, u) y0 = my.Head (h, v) y1 = my.Head (k, v2) y = Add (y0, y1)
        }
        <domain: "my", opset_import: ["" : 18]> Head (x, w) => (y) { y = MatMul (x, w) }""")
    weights = {"w": MATRICES["w"], "u": normal(4, 6, 8), "v": MATRICES["v"], "v2": normal(5, 8, 4)}
    for proto, reasons in ((nested, ("read by If", "'v2' is also read by MatMul")), (called, ("read by Head", "read by Head"))):
        proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
        records = preserved(proto)
        assert tuple(records[name].reason for name in "hk") == reasons


def test_a_local_function_hides_the_standard_operator() -> None:
    """Its body may do anything."""
    proto = parse(f"{VECTORS} {{ h = MatMul (x, w) r = Relu (h) y = MatMul (r, v) }}", {"w": MATRICES["w"], "v": MATRICES["v"]})
    proto.functions.append(helper.make_function("", "Relu", ["a"], ["c"], [helper.make_node("Sigmoid", ["a"], ["c"])], proto.opset_import))
    model = Model(proto, load(parse(f"{VECTORS} {{ y = MatMul (x, v) }}", {"v": normal(1, 6, 4)})).weights, None, 0, "")
    _, records = applied(model)
    assert records["h"].reason == "read by Relu"


def test_annotated_models_are_left_alone() -> None:
    proto, _ = uneven()
    proto.graph.quantization_annotation.add(tensor_name="h")
    _, records = applied(load(proto))
    assert records["h"].reason == "training information or quantization annotations refer to values by name"


def test_a_tied_weight_is_rescaled_if_its_uses_agree() -> None:
    """Both uses lie between the same two streams, so both ends of the weight can take the same factors."""
    text = f"""{VECTORS} {{
        h = MatMul (x, w) k = MatMul (x, u) hr = Relu (h) kr = Relu (k) h1 = MatMul (hr, t) k1 = MatMul (kr, t)
        s = Add (h1, k1) y = MatMul (s, v)
    }}"""
    weights = {"w": MATRICES["w"], "u": normal(4, 6, 8), "t": normal(5, 8, 8), "v": MATRICES["v"]}
    records = preserved(parse(text, weights))
    assert records["h"].tensors == ("w", "u", "t")
    assert records["h1"].tensors == ("t", "v")


@pytest.mark.parametrize(
    ("body", "reasons"),
    [
        ("k = Sigmoid (h) h1 = MatMul (h, t) k1 = MatMul (k, t) s = Add (h1, k1)", {"h": "read by Sigmoid"}),
        ("r = Relu (h) h1 = MatMul (r, t) k = Sigmoid (x0) k1 = MatMul (k, t) s = Add (h1, k1)", {"h": "shares a weight with 'k', which"}),
        ("r = Relu (h) h1 = MatMul (r, t) k1 = Gemm <transB = 1> (h1, t) s = Relu (k1)", {"h": "'t' is also read in two ways"}),
        ("r = Relu (h) h1 = MatMul (r, t) k1 = MatMul (h1, t) k2 = Sigmoid (k1) s = Relu (k2)", {"h": "read by Sigmoid"}),
    ],
)
def test_a_tied_weight_whose_uses_disagree_stays(body: str, reasons: dict[str, str]) -> None:
    text = f"g (float[N, 6] x, float[N, 8] x0) => (float[N, 4] y) {{ h = MatMul (x, w) {body} y = MatMul (s, v) }}"
    found = declined(text, {"w": MATRICES["w"], "t": normal(5, 8, 8), "v": MATRICES["v"]})
    for value, reason in reasons.items():
        assert reason in found[value]
