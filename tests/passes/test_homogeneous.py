"""Operators that hand labels on: what they carry, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from intaglio.passes.load import load
from tests.models import normal, parse
from tests.passes.rescaling import (
    CONVS,
    IMAGE,
    MATRICES,
    PARAMETERS,
    ROWS,
    applied,
    preserved,
    reason_between_convs,
    rescaled_between_convs,
)

BETWEEN_CONVS = {
    "relu": "r = Relu (h)",
    "leaky": "r = LeakyRelu <alpha = 0.1> (h)",
    "prelu": "r = PRelu (h, slope)",
    "max_pool": "r = MaxPool <kernel_shape = [2, 2], strides = [2, 2], pads = [1, 1, 0, 0]> (h)",
    "average_pool": "r = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (h)",
    "identity": "i = Identity (h) d = Dropout (i) n = Neg (d) r = Abs (n)",
    "resize": 'r = Resize <mode = "linear"> (h, , sizes)',
    "flat_positions": "f = Reshape (h, three) r = Reshape (f, four)",
    "shuffle": "q = Reshape (h, shuffle) t = Transpose <perm = [0, 2, 1, 3, 4]> (q) r = Reshape (t, four)",
    "split": "i, j = Split <axis = 1, num_outputs = 2> (h) r = Concat <axis = 1> (j, i)",
}


@pytest.mark.parametrize("name", BETWEEN_CONVS)
def test_carriers(name: str) -> None:
    assert {"w", "v"} <= rescaled_between_convs(BETWEEN_CONVS[name])


@pytest.mark.parametrize(
    "body",
    [
        "f = Flatten (r) y = Gemm (f, v, c)",
        "f = Reshape (r, flat) y = MatMul (f, v)",
        "p = GlobalAveragePool (r) f = Flatten (p) y = Gemm <transB = 1> (f, u)",
        "p = GlobalMaxPool (r) f = Squeeze (p, axes) y = Gemm <transB = 1> (f, u)",
        "f = ReduceMean <keepdims = 0> (r, axes) y = Gemm <transB = 1, alpha = 0.5> (f, u)",
    ],
)
def test_heads(body: str) -> None:
    available = {
        "v": normal(3, 8 * 36, 4),
        "u": normal(4, 4, 8),
        "c": normal(5, 4),
        "flat": np.array([0, -1]),
        "axes": np.array([2, 3]),
    }
    used = {name: array for name, array in available.items() if f" {name})" in body or f" {name}," in body}
    text = f"g (float[N, 3, 8, 8] x) => (float[N, 4] y) {{ h = Conv (x, w, b) r = Relu (h) {body} }}"
    weights = {"w": CONVS["w"], "b": CONVS["b"]} | used
    record = preserved(parse(text, weights))["h"]
    assert record.channels == 8
    assert record.rescaled > 0
    assert record.tensors == ("w", "b", "v" if "v" in used else "u")


def test_concat_gives_each_part_its_own_factors() -> None:
    text = f"""{IMAGE} {{
        h = Conv (x, w, b) p = Relu (h) k = Conv (x, u) s = Sigmoid (k) l = Conv (x, t)
        c = Concat <axis = 1> (p, s, l) y = Conv (c, v)
    }}"""
    weights = {"w": CONVS["w"], "b": CONVS["b"], "u": normal(5, 2, 3, 3, 3), "t": normal(6, 3, 3, 3, 3), "v": normal(7, 4, 13, 1, 1)}
    records = preserved(parse(text, weights))
    assert records["k"].reason == "read by Sigmoid"
    record = records["h"]
    assert record.tensors == ("w", "b", "t", "v")
    assert record.channels == 13
    assert 0 < record.rescaled <= 11
    assert record.reason == "'s' takes no factor"


def test_concat_along_other_axes_shares_factors() -> None:
    text = f"{ROWS[:-2]} y) {{ h = MatMul (x, w) k = MatMul (x, u) c = Concat <axis = 1> (h, k) m = MatMul (c, v) y, z = Split (m, five) }}"
    weights = {"w": MATRICES["w"], "u": normal(4, 6, 8), "v": MATRICES["v"], "five": np.array([5, 5])}
    text = text.replace("y, z = Split (m, five)", "y, z = Split <axis = 1> (m, five)")
    record = preserved(parse(text, weights))["h"]
    assert record.channels == 8
    assert record.tensors == ("w", "u", "v")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("q = ReduceSum (h, channels) r = Add (q, h)", "ReduceSum mixes its channels"),
        ("q = ReduceMax (h) r = Mul (q, h)", "ReduceMax over axes that are not listed"),
        (
            "t = Transpose <perm = [0, 2, 3, 1]> (h) m = MaxPool <kernel_shape = [1, 1]> (t) r = Transpose <perm = [0, 3, 1, 2]> (m)",
            "mixes",
        ),
        ("q = Reshape (h, mixed) r = Reshape (q, four)", "does not keep its channels apart"),
        ("r = Concat <axis = 2> (h, h) c = Conv (x, w2) s = Sigmoid (c) r2 = Concat <axis = 2> (h, s)", "along another axis"),
    ],
)
def test_reasons(body: str, reason: str) -> None:
    assert reason in reason_between_convs(body)


def test_reshapes_of_unknown_sizes() -> None:
    text = """g (float[N, 3, H, W] x, int64[4] shape) => (float[N, K, P, Q] y, float[A, B, C, D] z) {
        h = Conv <pads = [1, 1, 1, 1]> (x, w, b) q = Reshape (h, three) r = Relu (q) s = Shape (h) t = Reshape (r, s) y = Conv (t, v)
        k = Conv <pads = [1, 1, 1, 1]> (x, w2) l = Reshape (k, shape) z = Relu (l)
    }"""
    weights = CONVS | {"v": normal(3, 4, 8, 1, 1), "w2": normal(4, 8, 3, 3, 3), "three": PARAMETERS["three"] * [1, 1, 0] - [0, 0, 1]}
    proto = parse(text, weights)
    _, records = applied(load(proto))
    assert records["h"].reason == "Reshape does not keep its channels apart"
    assert records["k"].reason in ("Reshape between shapes that are not known", "Reshape does not keep its channels apart")
