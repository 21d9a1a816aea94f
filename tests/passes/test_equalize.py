"""Equalization: what is rescaled, what is declined and why, and that no output changes by a single bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from intaglio.ops.moment import Moment
from intaglio.passes.data import input_specs, open_dataset
from intaglio.passes.equalize import MAX_EXPONENT, Equalization, equalize
from intaglio.passes.load import load
from intaglio.passes.model import Model
from intaglio.passes.sites import find_sites
from intaglio.passes.weights import SPOOL_THRESHOLD_BYTES, is_external
from tests.models import Array, Feed, moments, normal, parse, run

SCALES = 2.0 ** np.array([-3, 2, 0, -1, 3, 1, -2, 0])
"""Ranges of eight channels, six octaves apart."""

IMAGE = "g (float[N, 3, 8, 8] x) => (float[N, K, P, Q] y)"
ROWS = "g (float[N, 5, 6] x) => (float[N, 5, 4] y)"
VECTORS = "g (float[N, 6] x) => (float[N, 4] y)"

CONVS = {"w": normal(1, 8, 3, 3, 3), "b": normal(2, 8), "v": normal(3, 4, 8, 3, 3)}
MATRICES = {"w": normal(1, 6, 8), "b": normal(2, 8), "v": normal(3, 8, 4)}
NORM = {"g": 1 + normal(4, 6) / 4, "h": normal(5, 6), "v": normal(3, 6, 4)}


def wild(model: Model, seed: int = 0) -> dict[str, Moment]:
    """Made-up moments whose channels differ by up to sixteen octaves in range: what is preserved does not depend on true ones.

    Inputs that are positions of eight channels, or of as many as there are groups, are alike within a channel.
    """
    rng = np.random.default_rng(seed)
    known = {}
    for site in find_sites(model, min_elements=1):
        view = site.use.view
        repeats = next((view.n // size for size in (8, 6, 4) if view.n % size == 0), 1)
        exponents = np.repeat(rng.integers(-8, 9, (view.groups, view.n // repeats)), repeats, axis=1)
        known[site.name] = Moment(4.0**exponents, 10)
    return known


def applied(model: Model, known: Mapping[str, Moment] | None = None, *, alpha: float = 0.5) -> tuple[Model, dict[str, Equalization]]:
    """The result and the records by value; the given model is not changed."""
    before = model.proto.SerializeToString(deterministic=True)
    result, records = equalize(model, find_sites(model, min_elements=1), wild(model) if known is None else known, alpha=alpha)
    assert model.proto.SerializeToString(deterministic=True) == before
    assert len({record.value for record in records}) == len(records)
    assert (result is model) == all(record.rescaled == 0 for record in records)
    for record in records:
        assert (record.rescaled > 0) == bool(record.tensors) == (record.bits_after < record.bits_before)
        assert record.rescaled > 0 or record.reason
    return result, {record.value: record for record in records}


def random_feed(proto: onnx.ModelProto) -> Feed:
    rng = np.random.default_rng(7)
    initialized = {tensor.name for tensor in proto.graph.initializer}
    feed = {}
    for value in proto.graph.input:
        if value.name not in initialized:
            shape = [dim.dim_value or 2 for dim in value.type.tensor_type.shape.dim]
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            feed[value.name] = np.asarray(rng.standard_normal(shape), dtype) if dtype != np.bool_ else np.ones(shape, np.bool_)
    return feed


def preserved(proto: onnx.ModelProto, known: Mapping[str, Moment] | None = None) -> dict[str, Equalization]:
    """Equalize, and check that every bit of every output stays, optimized by ONNX Runtime or not."""
    result, records = applied(load(proto), known)
    onnx.checker.check_model(result.proto, full_check=True)
    feed = random_feed(proto)
    for optimize in (True, False):
        for one, other in zip(run(proto, feed, optimize=optimize), run(result.proto, feed, optimize=optimize), strict=True):
            assert np.isfinite(one).all()
            assert np.abs(one).max() > 0
            np.testing.assert_array_equal(one, other)  # powers of two: exact
    return records


def tensor(model: Model, name: str) -> Array:
    return np.asarray(model.weights.read(next(t for t in model.proto.graph.initializer if t.name == name)))


def bits(ranges: Array) -> float:
    return float(np.log2(ranges).max() - np.log2(ranges).mean())


# ---- the factors


def uneven() -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Two convolutions; the eight channels between them are six octaves apart, but weigh alike in the output."""
    scale = SCALES.astype(np.float32)
    weights = {
        "w": CONVS["w"] * scale[:, None, None, None],
        "b": CONVS["b"] * scale / 4,
        "v": normal(3, 4, 8, 3, 3) / scale[:, None, None],
    }
    proto = parse(f"{IMAGE} {{ h = Conv (x, w, b) r = Relu (h) y = Conv (r, v) }}", weights)
    return proto, {"x": np.random.default_rng(0).standard_normal((20, 3, 8, 8)).astype(np.float32)}


def test_ranges_become_equal_and_the_function_stays() -> None:
    proto, inputs = uneven()
    model, data = load(proto), open_dataset(inputs, input_specs(proto))
    known = moments(model, find_sites(model, min_elements=1), data)
    result, records = applied(model, known)
    record = records["h"]
    assert record.tensors == ("w", "b", "v")
    assert record.channels == 8
    assert record.reason == ""
    after = moments(result, find_sites(result, min_elements=1), data)
    ranges = [np.sqrt(each["v"].diag.reshape(8, -1).mean(1)) for each in (known, after)]
    # both are sums of squares in float32, of the same numbers up to powers of two: equal up to the logarithm's rounding
    assert record.bits_before == pytest.approx(bits(ranges[0]), abs=1e-9)
    assert record.bits_after == pytest.approx(bits(ranges[1]), abs=1e-9)
    assert record.bits_before > 2.5  # SCALES alone: 3 octaves above the mean
    assert record.bits_after < 1  # what the random weights add to SCALES, halved, and half an octave of rounding
    weights = [np.abs(tensor(each, "v")).max((0, 2, 3)) for each in (model, result)]
    assert bits(weights[1]) < bits(weights[0])
    preserved(proto, known)


def test_factors_are_powers_of_two_within_limits() -> None:
    proto, _ = uneven()
    result, _ = applied(load(proto))
    factors = tensor(result, "v") / tensor(load(proto), "v")
    exponents = np.log2(factors[0, :, 0, 0])
    np.testing.assert_array_equal(factors, np.broadcast_to(factors[:1, :, :1, :1], factors.shape))
    np.testing.assert_array_equal(exponents, np.rint(exponents))
    assert np.abs(exponents).max() == MAX_EXPONENT
    np.testing.assert_array_equal(tensor(result, "w") * factors[0, :, 0, 0][:, None, None, None], tensor(load(proto), "w"))
    np.testing.assert_array_equal(tensor(result, "b") * factors[0, :, 0, 0], tensor(load(proto), "b"))


@pytest.mark.parametrize(("alpha", "expected"), [(0.5, [-1, 0, 1, 0]), (1.0, [-2, 0, 2, 0])])
def test_alpha_shares_between_activations_and_weights(alpha: float, expected: list[int]) -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y) { h = Gemm (x, w) y = Gemm <transB = 1> (h, v) }"
    model = load(parse(text, {"w": normal(1, 4, 4), "v": np.ones((4, 4), np.float32)}))
    known = {"v": Moment(4.0 ** np.array([[-2, 0, 2, 0]]), 5)}
    result, _ = applied(model, known, alpha=alpha)
    np.testing.assert_array_equal(tensor(result, "v"), np.tile(2.0 ** np.array(expected), (4, 1)))


def test_large_weights_limit_a_factor() -> None:
    """s = √r / √w: a channel that is large where its weights are large stays."""
    text = "g (float[N, 4] x) => (float[N, 4] y) { h = Gemm (x, w) y = Gemm (h, v) }"
    v = np.ones((4, 4), np.float32) * np.array([1, 4, 1, 1], np.float32)[:, None]
    known = {"v": Moment(4.0 ** np.array([[-2, 2, 2, -2]]), 5)}
    result, _ = applied(load(parse(text, {"w": normal(1, 4, 4), "v": v})), known)
    # log₂ s = (−1, 0, 1, −1) before it is centred by +1/4 and rounded
    np.testing.assert_array_equal(tensor(result, "v")[:, 0] / v[:, 0], [0.5, 1, 2, 0.5])


def test_alpha_is_checked() -> None:
    with pytest.raises(ValueError, match="expected a number from 0 to 1"):
        equalize(load(uneven()[0]), (), {}, alpha=1.5)


# ---- what carries factors

BETWEEN_CONVS = {
    "relu": "r = Relu (h)",
    "leaky": "r = LeakyRelu <alpha = 0.1> (h)",
    "prelu": "r = PRelu (h, slope)",
    "max_pool": "r = MaxPool <kernel_shape = [2, 2], strides = [2, 2], pads = [1, 1, 0, 0]> (h)",
    "average_pool": "r = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (h)",
    "identity": "i = Identity (h) d = Dropout (i) n = Neg (d) r = Abs (n)",
    "bias": "a = Add (per_channel, h) r = Sub (a, per_channel)",
    "scalar": "a = Mul (h, two) r = Div (a, two)",
    "mask": "r = Mul (h, positions)",
    "resize": 'r = Resize <mode = "linear"> (h, , sizes)',
    "depthwise": "d = Conv <group = 8, pads = [1, 1, 1, 1]> (h, depth, b) r = Relu (d)",
    "grouped": "r = Conv <group = 2> (h, groups)",
    "transposed": "r = ConvTranspose <group = 2, strides = [2, 2]> (h, turned, b)",
    "there_and_back": "t = Transpose <perm = [0, 2, 3, 1]> (h) m = MatMul (t, square) r = Transpose <perm = [0, 3, 1, 2]> (m)",
    "flat_positions": "f = Reshape (h, three) r = Reshape (f, four)",
    "shuffle": "q = Reshape (h, shuffle) t = Transpose <perm = [0, 2, 1, 3, 4]> (q) r = Reshape (t, four)",
    "gate": "p = GlobalAveragePool (h) c = Conv (p, one) s = Sigmoid (c) r = Mul (s, h)",
    "residual": "a = Relu (h) c = Conv <pads = [1, 1, 1, 1]> (a, inner) d = Add (c, a) r = Relu (d)",
    "split": "i, j = Split <axis = 1, num_outputs = 2> (h) r = Concat <axis = 1> (j, i)",
}
PARAMETERS: dict[str, Array] = {
    "slope": normal(11, 8, 1, 1),
    "per_channel": normal(12, 1, 8, 1, 1),
    "two": np.array(2.5, np.float32),
    "positions": normal(13, 6, 6),
    "sizes": np.array([1, 1, 2, 2], np.float32),
    "depth": normal(14, 8, 1, 3, 3),
    "groups": normal(15, 8, 4, 1, 1),
    "turned": normal(16, 8, 4, 2, 2),
    "square": normal(20, 8, 8),
    "three": np.array([0, 8, 36]),
    "four": np.array([-1, 8, 6, 6]),
    "shuffle": np.array([0, 2, 4, 6, 6]),
    "one": normal(21, 8, 8, 1, 1),
    "inner": normal(22, 8, 8, 3, 3),
}


def between_convs(body: str) -> onnx.ModelProto:
    weights = CONVS | {
        name: array for name, array in PARAMETERS.items() if f" {name})" in body or f" {name}," in body or f"({name}," in body
    }
    return parse(f"{IMAGE} {{ h = Conv (x, w, b) {body} y = Conv (r, v) }}", weights)


@pytest.mark.parametrize("name", BETWEEN_CONVS)
def test_carriers(name: str) -> None:
    proto = between_convs(BETWEEN_CONVS[name])
    records = preserved(proto)
    assert {"w", "v"} <= {name for record in records.values() for name in record.tensors}


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


# ---- smoothing


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


# ---- declined


def declined(text: str, weights: Mapping[str, Array], **options: int) -> dict[str, str]:
    """Reasons by value, of a model in which nothing is rescaled for them; its outputs stay."""
    return {value: record.reason for value, record in preserved(parse(text, weights, **options)).items() if not record.rescaled}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("r = Sigmoid (h)", "read by Sigmoid"),
        ("r = Clip (h, zero, six)", "read by Clip"),
        ("r = Mul (h, h)", "read by Mul"),
        ("r = Div (two, h)", "read by Div"),
        ("c = Conv (x, w2) s = Sigmoid (c) r = Div (s, h)", "read by Div"),
        ("c = Sigmoid (h) r = Add (c, h)", "read by Sigmoid"),
        ("c = Conv (x, w2) s = Sigmoid (c) r = Add (s, h)", "Add with 's', which takes no factor"),
        ("c = Conv (x, w1) r = Add (c, h)", "Add of values whose channels differ"),
        ("r = Add (h, two)", "'two' has not one entry per channel"),
        ("r = Transpose <perm = [0, 1, 3, 2]> (h) q = Transpose <perm = [0, 2, 1, 3]> (h) q2 = Conv (q, w6)", "not those that its reader"),
        ("q = ReduceSum (h, channels) r = Add (q, h)", "ReduceSum mixes its channels"),
        ("q = ReduceMax (h) r = Mul (q, h)", "ReduceMax over axes that are not listed"),
        (
            "t = Transpose <perm = [0, 2, 3, 1]> (h) m = MaxPool <kernel_shape = [1, 1]> (t) r = Transpose <perm = [0, 3, 1, 2]> (m)",
            "mixes",
        ),
        ("q = Reshape (h, mixed) r = Reshape (q, four)", "does not keep its channels apart"),
        ("q = Reshape (h, shuffle) m = Mul (q, quarter) r = Reshape (m, four)", "'quarter' has not one entry per channel"),
        ("l = LayerNormalization (h, line) r = Relu (l)", "read by LayerNormalization"),
        ("q = MatMul (h, batch) r = Relu (q)", "a batched MatMul"),
        ("q = MatMul (h, h) r = Relu (q)", "read by MatMul with a value"),
        ("r = Concat <axis = 2> (h, h) c = Conv (x, w2) s = Sigmoid (c) r2 = Concat <axis = 2> (h, s)", "along another axis"),
    ],
)
def test_reasons_between_convs(body: str, reason: str) -> None:
    available = PARAMETERS | {
        "zero": np.float32(0),
        "six": np.float32(6),
        "w1": normal(31, 1, 3, 3, 3),
        "w2": normal(32, 8, 3, 3, 3),
        "w6": normal(33, 2, 6, 1, 1),
        "channels": np.array([1]),
        "mixed": np.array([-1, 6]),
        "quarter": normal(36, 4, 1, 1),
        "line": normal(34, 6),
        "batch": normal(35, 8, 6, 6),
    }
    used = {name: np.asarray(a) for name, a in available.items() if f" {name})" in body or f" {name}," in body or f"({name}," in body}
    text = f"{IMAGE} {{ h = Conv (x, w, b) {body} y = Conv (r, v) }}"
    assert reason in declined(text, CONVS | used)["h"]


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


def test_annotated_models_are_left_alone() -> None:
    proto, _ = uneven()
    proto.graph.quantization_annotation.add(tensor_name="h")
    _, records = applied(load(proto))
    assert records["h"].reason == "training information or quantization annotations refer to values by name"


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ({}, "no statistics of what reads it"),
        ({"v": Moment.isotropic(1, 8)}, "no statistics of what reads it"),
        ({"v": Moment(np.zeros((1, 8)), 9)}, "no statistics of what reads it"),
        ({"v": Moment(np.ones((1, 8)), 9)}, "its channels are balanced already"),
    ],
)
def test_without_ranges(known: dict[str, Moment], reason: str) -> None:
    proto = parse(f"{VECTORS} {{ h = MatMul (x, w) y = MatMul (h, v) }}", {"w": MATRICES["w"], "v": np.ones((8, 4), np.float32)})
    assert preserved(proto, known)["h"].reason == reason


def test_equal_ranges_are_not_spoiled_for_the_sake_of_weights() -> None:
    v = np.ones((8, 4), np.float32) * 4.0 ** np.arange(8, dtype=np.float32)[:, None]
    proto = parse(f"{VECTORS} {{ h = MatMul (x, w) y = MatMul (h, v) }}", {"w": MATRICES["w"], "v": v})
    record = preserved(proto, {"v": Moment(np.ones((1, 8)), 9)})["h"]
    assert record.reason == "its ranges would become less equal"
    assert record.bits_before == record.bits_after == 0


# ---- shared and odd constants


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


def test_constants_in_nodes_stay_there() -> None:
    text = (
        f"{VECTORS} {{ h = MatMul (x, w) c = Constant <value = float[8] {{1, 2, 3, 4, 5, 6, 7, 8}}> () a = Add (h, c) y = MatMul (a, v) }}"
    )
    proto = parse(text, {"w": MATRICES["w"], "v": MATRICES["v"]})
    assert preserved(proto)["h"].tensors == ("w", "c", "v")
    result, _ = applied(load(proto))
    assert [node.op_type for node in result.proto.graph.node] == [node.op_type for node in proto.graph.node]
    assert len(result.proto.graph.initializer) == 2


@pytest.mark.parametrize(("channel", "weight"), [(3, 9.8e-45), (5, 3e38)])
def test_channels_whose_weights_would_lose_digits_stay(channel: int, weight: float) -> None:
    """Channel 3 would be divided, and a subnormal weight has no digits to spare; channel 5 would be multiplied beyond the largest float."""
    w = MATRICES["w"].copy()
    w[0, channel] = weight
    known = {"v": Moment(4.0 ** np.array([[0, 6, 0, 6, 0, -6, -6, 0]]), 5), "u": Moment(4.0 ** np.arange(4)[None], 5)}
    text = f"{VECTORS} {{ h = MatMul (x, w) k = MatMul (h, v) y = MatMul (k, u) }}"
    result, records = applied(load(parse(text, {"w": w, "v": MATRICES["v"], "u": normal(9, 4, 4)})), known)
    assert records["h"].reason == "'w' would lose digits"
    np.testing.assert_array_equal(tensor(result, "w")[:, channel], w[:, channel])
    assert records["h"].rescaled == np.count_nonzero(tensor(result, "w")[1] != w[1]) > 0
    assert records["k"].tensors == ("v", "u")


def test_large_weights_go_to_the_spool(tmp_path: Path) -> None:
    rows = SPOOL_THRESHOLD_BYTES // (4 * 512) + 8
    text = "g (float[N, 16] x) => (float[N, 512] y) { h = MatMul (x, w) r = Relu (h) y = MatMul (r, v) }"
    model = load(parse(text, {"w": normal(1, 16, rows), "v": normal(2, rows, 512)}))
    with model.weights:
        model.weights.enable_spooling(tmp_path)
        result, records = applied(model)
        external = {t.name: is_external(t) for t in result.proto.graph.initializer}
        assert external == {"w": False, "v": True}
        factors = tensor(result, "v")[:, 0] / tensor(model, "v")[:, 0]
        np.testing.assert_array_equal(tensor(result, "w") * factors, tensor(model, "w"))
        assert records["h"].rescaled == np.count_nonzero(factors != 1)


# ---- any network


@st.composite
def networks(draw: st.DrawFn) -> onnx.ModelProto:
    """Chains, branches, sums and concatenations of small layers on images of eight by eight, with or without a head."""
    values: list[tuple[str, int]] = [("x", 3)]
    weights: dict[str, Array] = {}
    lines: list[str] = []

    def emit(expression: str, channels: int) -> None:
        name = f"v{len(lines)}"
        lines.append(f"{name} = {expression}")
        values.append((name, channels))

    for step in range(draw(st.integers(3, 10))):
        kind = draw(st.sampled_from(["conv", "conv", "conv", "unary", "unary", "pool", "add", "concat", "scale", "norm", "depthwise"]))
        source, channels = draw(st.sampled_from(values[-3:]))
        weight, bias = f"w{step}", f"b{step}"
        if kind == "conv":
            outputs = draw(st.sampled_from([2, 4, 5]))
            weights |= {weight: normal(step, outputs, channels, 3, 3), bias: normal(step + 50, outputs)}
            emit(f"Conv <pads = [1, 1, 1, 1]> ({source}, {weight}, {bias})", outputs)
        elif kind == "depthwise":
            weights[weight] = normal(step, 2 * channels, 1, 1, 1)
            emit(f"Conv <group = {channels}> ({source}, {weight})", 2 * channels)
        elif kind == "unary":
            emit(f"{draw(st.sampled_from(['Relu', 'LeakyRelu', 'Identity', 'Neg', 'Sigmoid', 'Exp']))} ({source})", channels)
        elif kind == "pool":
            op = draw(st.sampled_from(["MaxPool", "AveragePool"]))
            emit(f"{op} <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> ({source})", channels)
        elif kind == "add":
            partners = [name for name, count in values if count == channels]
            emit(f"{draw(st.sampled_from(['Add', 'Sub', 'Mul']))} ({source}, {draw(st.sampled_from(partners))})", channels)
        elif kind == "concat":
            other, count = draw(st.sampled_from(values))
            emit(f"Concat <axis = 1> ({source}, {other})", channels + count)
        elif kind == "scale":
            shape = draw(st.sampled_from([(channels, 1, 1), (1, channels, 1, 1), (1,), (8, 8)]))
            weights[weight] = 0.5 + np.abs(normal(step, *shape))
            emit(f"{draw(st.sampled_from(['Mul', 'Div', 'Add']))} ({source}, {weight})", channels)
        else:
            weights |= {f"{p}{step}": np.abs(normal(step + i, channels)) + np.float32(0.1) for i, p in enumerate("gcmu")}
            emit(f"BatchNormalization ({source}, g{step}, c{step}, m{step}, u{step})", channels)
    weights["last"] = normal(99, 3, values[-1][1] * (64 if draw(st.booleans()) else 1))
    pooled = weights["last"].shape[1] == values[-1][1]
    tail = f"p = {'GlobalAveragePool' if pooled else 'Identity'} ({values[-1][0]}) f = Flatten (p) y = Gemm <transB = 1> (f, last)"
    proto = parse(f"g (float[N, 3, 8, 8] x) => (float[N, 3] y) {{ {' '.join(lines)} {tail} }}", weights)
    return load(proto).proto


@settings(max_examples=60, deadline=None)
@given(networks(), st.integers(0, 3))
def test_any_network_keeps_every_bit(proto: onnx.ModelProto, seed: int) -> None:
    model = load(proto)
    result, _ = applied(model, wild(model, seed))
    onnx.checker.check_model(result.proto, full_check=True)
    feed = random_feed(proto)
    with np.errstate(all="ignore"):
        (before,), (after,) = run(proto, feed, optimize=False), run(result.proto, feed, optimize=False)
    np.testing.assert_array_equal(before, after)  # powers of two: exact, infinities of nested exponentials included
