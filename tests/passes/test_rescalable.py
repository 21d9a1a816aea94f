"""Operators whose constants take factors: what is rescaled on either side of them, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from tests.models import normal, parse
from tests.passes.rescaling import (
    CONVS,
    IMAGE,
    MATRICES,
    NORM,
    PARAMETERS,
    ROWS,
    VECTORS,
    declined,
    preserved,
    reason_between_convs,
    rescaled_between_convs,
)

BETWEEN_CONVS = {
    "bias": "a = Add (per_channel, h) r = Sub (a, per_channel)",
    "scalar": "a = Mul (h, two) r = Div (a, two)",
    "mask": "r = Mul (h, positions)",
    "depthwise": "d = Conv <group = 8, pads = [1, 1, 1, 1]> (h, depth, b) r = Relu (d)",
    "grouped": "r = Conv <group = 2> (h, groups)",
    "transposed": "r = ConvTranspose <group = 2, strides = [2, 2]> (h, turned, b)",
    "there_and_back": "t = Transpose <perm = [0, 2, 3, 1]> (h) m = MatMul (t, square) r = Transpose <perm = [0, 3, 1, 2]> (m)",
    "gate": "p = GlobalAveragePool (h) c = Conv (p, one) s = Sigmoid (c) r = Mul (s, h)",
    "residual": "a = Relu (h) c = Conv <pads = [1, 1, 1, 1]> (a, inner) d = Add (c, a) r = Relu (d)",
}


@pytest.mark.parametrize("name", BETWEEN_CONVS)
def test_carriers(name: str) -> None:
    assert {"w", "v"} <= rescaled_between_convs(BETWEEN_CONVS[name])


def test_a_residual_stream_is_one() -> None:
    text = f"""{IMAGE} {{
        h = Conv <pads = [1, 1, 1, 1]> (x, w, b) r0 = Relu (h)
        a = Conv <pads = [1, 1, 1, 1]> (r0, w1) ra = Relu (a) c = Conv <pads = [1, 1, 1, 1]> (ra, w2, b) s = Add (c, r0) r1 = Relu (s)
        y = Conv (r1, v)
    }}"""
    weights = CONVS | {"w1": normal(8, 8, 8, 3, 3), "w2": normal(9, 8, 8, 3, 3)}
    records = preserved(parse(text, weights))
    assert list(records) == ["h", "a", "y"]
    assert records["h"].tensors == ("w", "b", "w1", "w2", "v")  # b is shared by two writers of the stream
    assert records["a"].tensors == ("w1", "w2")


def test_gated_products_carry_one_side() -> None:
    text = f"{ROWS} {{ g = MatMul (x, u) s = Sigmoid (g) h = MatMul (x, w) m = Mul (s, h) y = MatMul (m, v) }}"
    records = preserved(parse(text, MATRICES | {"u": normal(9, 6, 8)}))
    assert records["g"].reason == "read by Sigmoid"
    assert records["h"].tensors == ("w", "v")


def test_attention_carries_its_values() -> None:
    """The values' channels pass the heads and the product with the probabilities; queries and keys meet in a product."""
    text = """g (float[N, 5, 6] x) => (float[N, 5, 4] y) {
        q = MatMul (x, wq) k = MatMul (x, wk) w0 = MatMul (x, w) h = Add (b, w0)
        q4 = Reshape (q, heads) k4 = Reshape (k, heads) h4 = Reshape (h, heads)
        qt = Transpose <perm = [0, 2, 1, 3]> (q4) kt = Transpose <perm = [0, 2, 3, 1]> (k4) ht = Transpose <perm = [0, 2, 1, 3]> (h4)
        s = MatMul (qt, kt) p = Softmax (s) o = MatMul (p, ht)
        ot = Transpose <perm = [0, 2, 1, 3]> (o) f = Reshape (ot, joined) y = MatMul (f, v)
    }"""
    weights = MATRICES | {"wq": normal(8, 6, 8), "wk": normal(9, 6, 8), "heads": np.array([0, 0, 2, 4]), "joined": np.array([0, 0, 8])}
    records = preserved(parse(text, weights))
    assert records["q"].reason == records["k"].reason == "read by MatMul with a value"
    assert records["w0"].tensors == ("w", "b", "v")


@pytest.mark.parametrize(
    ("body", "tensors"),
    [
        ("h = LayerNormalization (x, g, h0)", ("g", "h0")),
        ("h = LayerNormalization <axis = 2> (x, g)", ("g",)),
        ("h1 = Mul (x, g) h = Add (h1, h0)", ("g", "h0")),
        ("h = Div (x, g)", ("g",)),
        ("q = Mul (x, x) m = ReduceMean <keepdims = 1> (q, last) r = Sqrt (m) n = Div (x, r) h = Mul (g, n)", ("g",)),
    ],
)
def test_smoothing(body: str, tensors: tuple[str, ...]) -> None:
    text = f"{ROWS} {{ {body} y0 = MatMul (h, v) y1 = MatMul (h, v2) y = Add (y0, y1) }}"
    available = NORM | {"v2": normal(8, 6, 4), "h0": NORM["h"], "last": np.array([-1])}
    del available["h"]
    used = {name: array for name, array in available.items() if f" {name})" in text or f" {name}," in text or f"({name}," in text}
    records = preserved(parse(text, used))
    first = next(record for record in records.values() if record.rescaled)
    assert first.tensors == (*tensors, "v", "v2")
    assert first.channels == 6


def test_normalizations_of_images() -> None:
    text = f"{IMAGE} {{ i = InstanceNormalization (x, g, c) h = Conv (i, w) n = BatchNormalization (h, a, a2, m, s) y = Conv (n, v) }}"
    weights = {
        "g": normal(4, 3),
        "c": normal(5, 3),
        "a": normal(6, 8),
        "a2": normal(7, 8),
        "m": normal(8, 8),
        "s": np.abs(normal(9, 8)),
        "w": CONVS["w"],
        "v": CONVS["v"],
    }
    records = preserved(parse(text, weights))
    assert records["i"].tensors == ("g", "c", "w")
    assert records["n"].tensors == ("a", "a2", "v")
    assert records["h"].reason == "no statistics of what reads it"


def test_a_batch_norm_takes_the_factors_of_its_input() -> None:
    """The scale takes them and the mean gives them back; the variance and ε beside it stay."""
    text = f"{IMAGE} {{ h = Conv (x, w, b) n = BatchNormalization (h, g, c, m, s) k = Conv (h, v) l = Conv (n, u) y = Add (k, l) }}"
    norm = {"g": normal(4, 8), "c": normal(5, 8), "m": normal(6, 8), "s": np.abs(normal(7, 8))}
    records = preserved(parse(text, CONVS | norm | {"u": normal(8, 4, 8, 3, 3)}))
    assert records["h"].tensors == ("w", "b", "g", "m", "v")
    assert records["n"].tensors == ("g", "c", "u")


def test_rms_normalization() -> None:
    text = f"{ROWS} {{ h = RMSNormalization (x, g) y = MatMul (h, v) }}"
    proto = parse(text, {"g": NORM["g"], "v": NORM["v"]}, opset=23, ir_version=10)
    assert preserved(proto)["h"].tensors == ("g", "v")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("r = Mul (h, h)", "read by Mul"),
        ("r = Div (two, h)", "read by Div"),
        ("c = Conv (x, w2) s = Sigmoid (c) r = Div (s, h)", "read by Div"),
        ("c = Conv (x, w2) s = Sigmoid (c) r = Add (s, h)", "Add with 's', which takes no factor"),
        ("c = Conv (x, w1) r = Add (c, h)", "Add of values whose channels differ"),
        ("r = Add (h, two)", "'two' has not one entry per channel"),
        ("r = Transpose <perm = [0, 1, 3, 2]> (h) q = Transpose <perm = [0, 2, 1, 3]> (h) q2 = Conv (q, w6)", "not those that its reader"),
        ("q = Reshape (h, shuffle) m = Mul (q, quarter) r = Reshape (m, four)", "'quarter' has not one entry per channel"),
        ("l = LayerNormalization (h, line) r = Relu (l)", "read by LayerNormalization"),
        ("q = MatMul (h, batch) r = Relu (q)", "a batched MatMul"),
        ("q = MatMul (h, h) r = Relu (q)", "read by MatMul with a value"),
    ],
)
def test_reasons(body: str, reason: str) -> None:
    assert reason in reason_between_convs(body)


@pytest.mark.parametrize(
    ("text", "value", "reason"),
    [
        (
            "g (float[N, 6] x) => (float[N, 4] y, float[N, 8] r) { h = MatMul (x, w) r = Relu (h) y = MatMul (r, v) }",
            "h",
            "'r' is an output",
        ),
        (f"{VECTORS} {{ h = Gemm (x, w, b) t = Transpose (h) y = Gemm <transA = 1> (t, v) }}", "h", "Gemm reads it transposed"),
        (f"{VECTORS} {{ h = MatMul (x, w) d = Cast <to = 11> (h) r = Cast <to = 1> (d) y = MatMul (r, v) }}", "h", "read by Cast"),
        (f"{VECTORS} {{ h = MatMul (x, w) i = Identity (v) y = MatMul (h, i) }}", "h", "read by MatMul with a value"),
        (f"{VECTORS} {{ h = Gemm (x, w) i = Identity (v) y = Gemm (h, i) }}", "h", "Gemm: 'i' is not a constant"),
        (
            f"{VECTORS} {{ h = MatMul (x, w) q = ReduceSum (b) s = Shape (h) y = MatMul (h, v) z = Add (w, q) }}",
            "h",
            "'w' is also read by Add",
        ),
    ],
)
def test_reasons_between_products(text: str, value: str, reason: str) -> None:
    if "z = " in text:
        text = text.replace("y)", "y, float[6, 8] z)", 1)
    used = {name: array for name, array in MATRICES.items() if name != "b" or " b)" in text or "(b)" in text}
    assert reason in declined(text, used)[value]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("t = Transpose <perm = [0, 2, 1]> (h) y = MatMul (t, v)", "its channels are not those that its reader multiplies"),
        ("t = Transpose <perm = [0, 2, 1]> (h) m = MatMul (square, t) y = MatMul (m, v)", "MatMul mixes its channels"),
        ("m = MatMul (square, h) s = Softmax (m) y = MatMul (s, v)", "read by Softmax"),
    ],
)
def test_channels_are_told_from_other_axes_of_the_same_size(body: str, reason: str) -> None:
    text = f"g (float[N, 8, 6] x) => (float[N, 8, 4] y) {{ h = MatMul (x, w) {body} }}"
    weights = {"w": MATRICES["w"], "v": MATRICES["v"]} | ({"square": PARAMETERS["square"]} if "square" in body else {})
    assert declined(text, weights)["h"] == reason


def test_a_stream_that_also_feeds_a_residual_sum_before_a_norm_is_declined() -> None:
    """Post-LN transformers: the normalized stream meets the next normalization through the sum."""
    text = """g (float[N, 5, 6] x) => (float[N, 5, 6] y) {
        a = LayerNormalization (x, g, c) h = MatMul (a, w) r = Relu (h) o = MatMul (r, v) s = Add (o, a) y = LayerNormalization (s, g2, c2)
    }"""
    weights = {"g": NORM["g"], "c": NORM["h"], "w": MATRICES["w"], "v": normal(3, 8, 6), "g2": normal(8, 6), "c2": normal(9, 6)}
    records = preserved(parse(text, weights))
    assert records["a"].reason == "read by LayerNormalization"
    assert records["h"].tensors == ("w", "v")
