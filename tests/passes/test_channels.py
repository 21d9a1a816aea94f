"""Layers that write and read channels: what is found, what is refused and why, and that superfluous channels change no output."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.moment import Moment
from intaglio.passes.groups import ChannelGroup, Reader, Slice
from tests.models import Array, normal, parse, run
from tests.passes.pruning import (
    FIRST,
    LAST,
    OTHERS,
    PAD,
    Found,
    assert_lossless,
    dims,
    images,
    network,
    reason_of_the_first,
    trace,
)
from tests.passes.test_calibrate import patches


def test_a_plain_chain() -> None:
    found = network(f"{FIRST} r = Relu (a) b = Conv <{PAD}> (r, c2, b2) z = Relu (b) {LAST}")
    first, second, last = found.groups.values()
    assert first == ChannelGroup("a", 12, ("c1",), (Reader("c2", 9),), (Slice("b1", 0, 1),), ("b1",), (), (), {}, ("a", "r"), None)
    assert second == ChannelGroup("b", 12, ("c2",), (Reader("c3", 1),), (Slice("b2", 0, 1),), ("b2",), (), (), {}, ("b", "z"), None)
    assert (last.producers, last.reason) == (("c3",), "an output of the graph; no layer reads it")
    smaller = assert_lossless(found, ["a", "b"], images())
    assert dims(smaller.proto) == {"c1": (11, 3, 3, 3), "b1": (11,), "c2": (11, 11, 3, 3), "b2": (11,), "c3": (8, 11, 1, 1)}


def test_a_residual_stream_is_one_group() -> None:
    body = f"""{FIRST} r = Relu (a) b = Conv <{PAD}> (r, c2, b2) s = Add (b, r) q = Relu (s)
        d = Conv <{PAD}> (q, c4) z = Add (q, d) {LAST}"""
    found = network(body, extra={"c4": normal(20, 12, 12, 3, 3)})
    group = found.groups["a"]
    assert [name for name, each in found.groups.items() if each.prunable] == ["a"]
    assert group.producers == ("c1", "c2", "c4")
    assert group.consumers == (Reader("c2", 9), Reader("c4", 9), Reader("c3", 1))
    assert set(group.values) == {"a", "r", "b", "s", "q", "d", "z"}
    smaller = assert_lossless(found, ["a"], images())
    assert dims(smaller.proto)["c4"] == (11, 11, 3, 3)


def test_the_hidden_units_of_matrix_products() -> None:
    """Inputs first, a bias in an Add, and more axes than the model says."""
    extra = {"up": normal(40, 16, 24), "bias": normal(41, 24), "down": normal(42, 24, 16), "sqrt": np.float32(2**0.5), "one": np.float32(1)}
    body = "h = MatMul (x, up) b = Add (bias, h) d = Div (b, sqrt) e = Erf (d) f = Add (e, one) z = Mul (b, f) y = MatMul (z, down)"
    found = network(body, "g (float[N, S, 16] x) => (float[N, S, 16] y)", extra)
    assert found.groups["h"].slices == (Slice("bias", 0, 1),)
    smaller = assert_lossless(found, ["h"], images(100, 5, 16))
    assert dims(smaller.proto)["up"] == (16, 23)
    assert dims(smaller.proto)["down"] == (23, 16)


def test_a_gemm_between_gemms() -> None:
    products = {"up": normal(40, 24, 16), "middle": normal(42, 24, 20), "down": normal(43, 20, 10)}
    extra = {**products, "bias": normal(41, 1, 24), "c": normal(44, 1)}
    body = "h = Gemm <transB = 1, alpha = 0.5> (x, up, bias) r = Relu (h) m = Gemm (r, middle, c) s = Tanh (m) y = Gemm (s, down)"
    found = network(body, "g (float[N, 16] x) => (float[N, 10] y)", extra)
    assert (found.groups["h"].slices, found.groups["m"].slices) == ((Slice("bias", 1, 1),), ())
    assert_lossless(found, ["h", "m"], images(200, 16))


def test_transposed_convolutions_write_and_read_channels() -> None:
    body = "a = ConvTranspose <strides = [2, 2]> (x, t1, b1) r = Relu (a) y = ConvTranspose (r, t2)"
    found = network(body, extra={"t2": normal(50, 12, 5, 2, 2)})
    assert found.groups["a"].consumers == (Reader("t2", 1),)
    smaller = assert_lossless(found, ["a"], images())
    assert (dims(smaller.proto)["t1"], dims(smaller.proto)["t2"]) == ((3, 11, 2, 2), (11, 5, 2, 2))


REFUSED = {
    "graph output": (f"y = Conv <{PAD}> (x, c1, b1) z = Relu (y) w = Conv (z, c3)", "an output of the graph"),
    "nested graph": (
        f"""{FIRST} z = Relu (a) {LAST}
        q = If (yes) <then_branch = t () => (float b) {{ b = Neg (z) }}, else_branch = e () => (float c) {{ c = Abs (z) }}>""",
        "read inside a nested graph",
    ),
    "last axis": (f"{FIRST} y = MatMul (a, m4)", "MatMul reads it along another axis"),
    "tied": (f"{FIRST} r = Relu (a) b = Conv <{PAD}> (r, c2) z = Conv <{PAD}> (b, c2) {LAST}", "tied weight 'c2'"),
    "turned": (
        f"{FIRST} t = Transpose <perm = [1, 0, 2, 3]> (c2) z = Conv <{PAD}> (a, t) {LAST}",
        "weight 'c2' is turned round before it is used",
    ),
    "stored as integers": (
        f"{FIRST} d = DequantizeLinear (i8, half) z = Conv (a, d) y = Conv (z, c10)",
        "weight 'd' is stored in another type",
    ),
    "weight on the left": (f"{FIRST} f = Flatten (a) y = MatMul (left, f)", "MatMul with its operands turned round"),
}
"""Text, and why the group that c1 writes stays."""


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    body, reason = REFUSED[name]
    assert reason in reason_of_the_first(body)


def test_an_axis_of_the_same_length_is_another_axis() -> None:
    groups = network(
        "a = Conv <pads = [1, 1, 1, 1]> (x, square) y = MatMul (a, m4)", extra={**OTHERS, "square": normal(70, 4, 3, 3, 3)}
    ).groups
    assert groups["a"].reason == "MatMul reads it along another axis; no layer reads it"


def test_both_sides_of_a_tied_weight_stay() -> None:
    body = f"{FIRST} r = Relu (a) b = Conv <{PAD}> (r, c2) z = Conv <{PAD}> (b, c2) {LAST}"
    reasons = {name: group.reason for name, group in network(body).groups.items()}
    assert reasons == {"a": "tied weight 'c2'; no layer reads it", "b": "tied weight 'c2'; no layer reads it"} | {
        "z": "tied weight 'c2'",
        "y": "an output of the graph; no layer reads it",
    }


def exact_moments(found: Found, feed: Mapping[str, Array]) -> dict[str, Moment]:
    """The same from float64 sums; for 3 x 3 kernels padded by one, 1 x 1 kernels and products of rows."""
    named = onnx.ModelProto()
    named.CopyFrom(found.proto)
    sites = [site for site in found.sites if site.use.view.groups == 1]
    named.graph.output.extend(onnx.ValueInfoProto(name=site.use.node.input[0]) for site in sites)
    exact = {}
    for site, value in zip(sites, run(named, feed)[1:], strict=True):
        kernel, wide = site.shape[2:], site.shape[2:] == (3, 3)
        rows = patches(value.astype(np.float64), kernel, [int(wide)] * 4, [1, 1], [1, 1]) if kernel else value.astype(np.float64)[None]
        exact[site.name] = Moment(rows.transpose(0, 2, 1) @ rows / rows.shape[1], rows.shape[1])
    return exact


BLOCKS = ("conv", "relu", "normalization", "depthwise", "residual", "pool", "gate")


def random_network(blocks: list[str], flat: bool, seed: int) -> Found:
    """A small CNN on (N, 3, 4, 4) of the given blocks, with 6 channels everywhere and an image of 4 x 4 up to the head."""
    weights: dict[str, Array] = {"stem": normal(seed, 6, 3, 3, 3), "head": normal(seed + 1, 96 if flat else 6, 5)}
    lines, value = [f"v = Conv <{PAD}> (x, stem)"], "v"
    for number, block in enumerate(blocks):
        after = f"v{number}"

        def weight(name: str, *shape: int, number: int = number) -> str:
            weights[f"{name}{number}"] = normal(seed + 10 * number + len(weights), *shape)
            return f"{name}{number}"

        if block in ("conv", "residual"):
            line = f"Conv <{PAD}> ({value}, {weight('w', 6, 6, 3, 3)}, {weight('b', 6)})"
            line = line if block == "conv" else f"{line} {after} = Add (s{number}, {value})"
            lines.append(f"{after if block == 'conv' else f's{number}'} = {line}")
        elif block == "relu":
            lines.append(f"{after} = LeakyRelu <alpha = 0.3> ({value})")
        elif block == "normalization":
            parameters = ", ".join(weight(name, 6) for name in ("scale", "shift", "mean", "var"))
            weights[f"var{number}"] = np.abs(weights[f"var{number}"]) + np.float32(0.5)
            lines.append(f"{after} = BatchNormalization ({value}, {parameters})")
        elif block == "depthwise":
            lines.append(f"{after} = Conv <group = 6, {PAD}> ({value}, {weight('w', 6, 1, 3, 3)})")
        elif block == "pool":
            lines.append(f"{after} = MaxPool <kernel_shape = [3, 3], {PAD}> ({value})")
        else:
            gate = f"g{number} = GlobalAveragePool ({value}) h{number} = Conv (g{number}, {weight('w', 6, 6, 1, 1)})"
            lines.append(f"{gate} i{number} = Sigmoid (h{number}) {after} = Mul ({value}, i{number})")
        value = after
    head = f"f = Flatten ({value})" if flat else f"p = GlobalAveragePool ({value}) f = Flatten (p)"
    text = f"g (float[N, 3, 4, 4] x) => (float[N, 5] y) {{ {' '.join(lines)} {head} y = MatMul (f, head) }}"
    return trace(parse(text, weights))


@settings(max_examples=60)
@given(st.lists(st.sampled_from(BLOCKS), max_size=6), st.booleans(), st.integers(0, 1000))
def test_dropping_a_duplicate_is_lossless(blocks: list[str], flat: bool, seed: int) -> None:
    found = random_network(blocks, flat, seed)
    names = [name for name, group in found.groups.items() if group.prunable]
    assert len(names) == 1 + blocks.count("conv")
    assert_lossless(found, names, images(120), exact_moments)  # pooled and filtered images leave directions below float32's rounding
