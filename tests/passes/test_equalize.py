"""Equalization as a whole: ranges become equal, constants keep their digits, and no output changes by a single bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.moment import Moment
from intaglio.passes.data import input_specs, open_dataset
from intaglio.passes.equalize import equalize
from intaglio.passes.load import load
from intaglio.passes.sites import find_sites
from intaglio.passes.weights import SPOOL_THRESHOLD_BYTES, is_external
from tests.models import Array, moments, normal, parse, run
from tests.passes.rescaling import MATRICES, VECTORS, applied, preserved, random_feed, tensor, uneven, wild


def bits(ranges: Array) -> float:
    return float(np.log2(ranges).max() - np.log2(ranges).mean())


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


def test_alpha_is_checked() -> None:
    with pytest.raises(ValueError, match="expected a number from 0 to 1"):
        equalize(load(uneven()[0]), (), {}, alpha=1.5)


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
