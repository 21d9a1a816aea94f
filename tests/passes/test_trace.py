"""Which constants can take factors."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from intaglio.ops.moment import Moment
from intaglio.passes.load import load
from tests.models import normal, parse
from tests.passes.rescaling import MATRICES, VECTORS, applied, declined, preserved


def test_weights_that_callers_may_override() -> None:
    proto = parse(f"{VECTORS} {{ h = MatMul (x, w) y = MatMul (h, v) }}", {"w": MATRICES["w"], "v": MATRICES["v"]})
    proto.graph.input.append(helper.make_tensor_value_info("v", TensorProto.FLOAT, [8, 4]))
    assert preserved(proto, {"v": Moment(4.0 ** np.arange(8)[None], 3)})["h"].reason == "MatMul: callers may override 'v'"


def test_initializers_of_old_models_are_inputs_too() -> None:
    text = f"{VECTORS} {{ h = MatMul (x, w) a = Add (h, b) y = MatMul (a, v) }}"
    assert preserved(parse(text, MATRICES, opset=7, ir_version=3))["h"].tensors == ("w", "b", "v")


def test_types_with_few_exponents_are_left_alone() -> None:
    text = "g (float16[N, 6] x) => (float16[N, 4] y) { h = MatMul (x, g) l = Mul (h, c) y = MatMul (l, v) }"
    weights = {"g": normal(1, 6, 8, dtype=np.float16), "c": normal(2, 8, dtype=np.float16), "v": normal(3, 8, 4, dtype=np.float16)}
    assert preserved(parse(text, weights)) == {}
    mixed = f"{VECTORS} {{ h = MatMul (x, w) c = Cast <to = 10> (h) m = MatMul (c, v) y = Cast <to = 1> (m) }}"
    assert declined(mixed, {"w": MATRICES["w"], "v": weights["v"]})["h"] == "read by Cast"


def test_double_precision() -> None:
    text = "g (double[N, 6] x) => (double[N, 4] y) { h = MatMul (x, w) y = MatMul (h, v) }"
    weights = {name: MATRICES[name].astype(np.float64) for name in "wv"}
    assert preserved(parse(text, weights))["h"].rescaled > 0


def test_constants_in_nodes_stay_there() -> None:
    text = (
        f"{VECTORS} {{ h = MatMul (x, w) c = Constant <value = float[8] {{1, 2, 3, 4, 5, 6, 7, 8}}> () a = Add (h, c) y = MatMul (a, v) }}"
    )
    proto = parse(text, {"w": MATRICES["w"], "v": MATRICES["v"]})
    assert preserved(proto)["h"].tensors == ("w", "c", "v")
    result, _ = applied(load(proto))
    assert [node.op_type for node in result.proto.graph.node] == [node.op_type for node in proto.graph.node]
    assert len(result.proto.graph.initializer) == 2
