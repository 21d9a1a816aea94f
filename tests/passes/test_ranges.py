"""Ranges against ONNX Runtime's rounding, histograms against the entries themselves, and methods against brute force."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from intaglio.passes import ranges as module
from intaglio.passes.data import Dataset, input_specs, open_dataset
from intaglio.passes.load import load
from intaglio.passes.model import Model
from intaglio.passes.options import Runtime
from intaglio.passes.ranges import AUTO, BINS, METHODS, Histogram, Range, calibrated, collect
from tests.models import Array, parse, run

FLOATS = st.floats(-1e6, 1e6, width=32)
U8, I8 = np.dtype(np.uint8), np.dtype(np.int8)


def histogram(values: Array, parts: int = 1) -> Histogram:
    """Of some entries, counted in a few feeds."""
    growing = module._Growing()
    for part in np.array_split(values, parts):
        growing.add(part)
    return growing.histogram()


def test_a_range_is_what_onnx_runtime_rounds_with() -> None:
    rng = np.random.default_rng(0)
    for dtype in (U8, I8):
        span = Range.spanning(-1.7, 3.1, dtype)
        parameters = {"s": np.asarray(span.scale), "z": np.asarray(span.zero_point, dtype)}
        text = "g (float[N] x) => (float[N] y) { q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z) }"
        x = (4 * rng.standard_normal(1000)).astype(np.float32)
        np.testing.assert_array_equal(span.rounded(x), run(parse(text, parameters), {"x": x}, optimize=False)[0])


@given(FLOATS, FLOATS, st.sampled_from([U8, I8]), st.sampled_from([7, 8]))
def test_ranges_hold_their_limits_and_zero(one: float, other: float, dtype: np.dtype[np.generic], bits: int) -> None:
    low, high = min(one, other), max(one, other)
    span = Range.spanning(low, high, dtype, bits)
    assert span.scale > 0
    assert np.iinfo(dtype).min <= span.zero_point <= np.iinfo(dtype).max
    assert span.rounded(np.zeros(1, np.float32))[0] == 0
    ends = np.array([low, high], np.float32)
    np.testing.assert_allclose(span.rounded(ends), ends, rtol=1e-6, atol=float(span.scale) * 1.001)  # half a step each: value, zero point
    codes = np.rint(ends / span.scale) + span.zero_point
    assert np.ptp([*codes, span.zero_point]) <= 2**bits  # 7 bits: sums of two products stay within 16 bits
    if low >= 0 and high > 0:
        assert span.zero_point == np.iinfo(dtype).min >> (8 - bits)


def test_nothing_but_zeros_has_scale_one() -> None:
    assert Range.spanning(0, 0) == Range(np.float32(1), 0)
    assert histogram(np.zeros(5, np.float32)).minmax() == (0, 0)


@pytest.mark.parametrize("low", [-3.4e38, -1e-45, 0])
@pytest.mark.parametrize("high", [3.4e38, 1e-45])
def test_extreme_limits_have_finite_scales(low: float, high: float) -> None:
    span = Range.spanning(low, high)
    assert 0 < span.scale < np.inf
    assert span.scale >= np.finfo(np.float32).tiny


@given(FLOATS, st.integers(0, 255), st.floats(-1e3, 0, width=32), st.floats(0, 1e3, width=32))
def test_narrowing_stops_at_bounds(scale: float, zero_point: int, low: float, high: float) -> None:
    assume(high - low > 1e-3)
    span = Range(np.float32(abs(scale) + 1e-3), zero_point)
    narrow = span.within(low, high)
    assert narrow.lowest >= low - 0.501 * float(narrow.scale)  # half a step, for the zero point is whole
    assert narrow.highest <= high + 0.501 * float(narrow.scale)
    assert narrow.within(low, high) == narrow or math.isclose(narrow.within(low, high).scale, narrow.scale, rel_tol=0.01)
    assert span.within(-math.inf, math.inf) is span


HUGE, SMALL = float(np.float32(1e30)), float(np.float32(1e-30))
ENTRIES = st.lists(st.floats(-HUGE, HUGE, width=32) | st.just(0.0) | FLOATS | st.floats(-SMALL, SMALL, width=32), min_size=1, max_size=60)


@settings(max_examples=200)
@given(ENTRIES, st.integers(1, 8))
def test_histograms_count_every_entry_once(entries: list[float], parts: int) -> None:
    values = np.array(entries, np.float32)
    result = histogram(values, parts)
    assert (result.low, result.high) == (values.min(), values.max())
    assert (result.zeros, result.broken, result.total) == ((values == 0).sum(), 0, len(values))
    assert len(result.counts) <= BINS
    expected, _ = np.histogram(values[values != 0].astype(np.float64), np.append(result.edges[:-1], np.inf))
    np.testing.assert_array_equal(result.counts, expected)
    if values.any():
        assert len(result.counts) > BINS // 2 or result.width <= 2.0**-148  # as fine as they can be
    assert result.edges[0] <= min(0, values.min())
    assert result.edges[-1] > max(0, values.max())


@given(ENTRIES, st.integers(1, 8), st.randoms())
def test_histograms_do_not_depend_on_the_order(entries: list[float], parts: int, random: object) -> None:
    shuffled = sorted(entries, key=lambda _: random.random())  # type: ignore[attr-defined]
    one, other = histogram(np.array(entries, np.float32)), histogram(np.array(shuffled, np.float32), parts)
    assert (one.first, one.width, one.zeros) == (other.first, other.width, other.zeros)
    np.testing.assert_array_equal(one.counts, other.counts)


def test_broken_and_missing_entries_are_reasons() -> None:
    assert histogram(np.array([1, np.nan, 2, np.inf, -np.inf], np.float32), 2).reason == "3 of its 5 entries are NaN or infinite"
    assert histogram(np.zeros(0, np.float32)).reason == "it has no entries"
    assert histogram(np.array([1, 2], np.float32)).reason is None


DISTRIBUTIONS = {
    "normal": lambda rng: rng.standard_normal(20000),
    "relu": lambda rng: np.maximum(rng.standard_normal(20000), 0),
    "tail": lambda rng: rng.standard_normal(20000) ** 5,
    "positive": lambda rng: 5 + rng.random(20000),
    "negative": lambda rng: -rng.exponential(size=20000),
    "lopsided": lambda rng: np.where(rng.random(20000) < 0.01, -30, 1) * rng.random(20000),
}


def entries_of(name: str) -> Array:
    return np.asarray(DISTRIBUTIONS[name](np.random.default_rng(0)), np.float32)


def squared_error(values: Array, low: float, high: float) -> float:
    return float(((Range.spanning(low, high).rounded(values).astype(np.float64) - values) ** 2).sum())


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("share", [0.1, 0.5, 1])
def test_expected_errors_are_those_of_rounding(name: str, share: float) -> None:
    values = entries_of(name)
    result = histogram(values)
    low, high = result.low * share, result.high * share
    measured = squared_error(values, low, high)
    # 20,000 samples; entries are not quite even in a bin, least of all where most of a heavy tail's lie in the bins beside zero
    (expected,) = result._squared_errors([(low, high)])
    assert expected == pytest.approx(measured, rel=0.15 if name == "tail" else 0.05)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_mse_is_as_good_as_brute_force(name: str) -> None:
    values = entries_of(name)
    result = histogram(values)
    found = squared_error(values, *result.mse())
    least, most = min(result.low, 0.0), max(result.high, 0.0)
    shares = np.geomspace(0.005, 1, 24)
    tried = [squared_error(values, least * a, most * b) for a in (shares if least else [1]) for b in (shares if most else [1])]
    assert found <= 1.05 * min(tried)  # the price of a histogram: entries within a bin count as evenly spread
    assert found <= 1.001 * squared_error(values, *result.minmax())


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("percent", [90, 99, 99.9, 100])
def test_percentiles_are_quantiles(name: str, percent: float) -> None:
    values = entries_of(name)
    result = histogram(values)
    outside = (100 - percent) / 200
    low, high = result.percentile(percent)
    for signed, limit in ((values, low), (-values, -high)):
        assert (signed < limit).sum() <= outside * len(values) * (1 + 1e-9)
        assert (signed < limit + result.width).sum() >= outside * len(values) * (1 - 1e-9)


def information_lost(counts: Array, start: int, stop: int) -> float:
    """The same as `_information_lost`, bin by bin."""
    p = counts[start:stop].astype(float)
    q = np.zeros_like(p)
    size = max(256, len(p))
    limits = [math.ceil(level * size / 256) for level in range(257)]
    for first, last in pairwise(limits):
        members = [i for i in range(first, min(last, len(p))) if p[i] > 0]
        for i in members:
            q[i] = p[members].sum() / len(members)
    p[0] += counts[:start].sum()
    p[-1] += counts[stop:].sum()
    p, q = p / p.sum(), q / q.sum()
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


@given(st.integers(0, 2**32 - 1), st.integers(0, 600), st.integers(1, 1500))
def test_lost_information_is_a_divergence(seed: int, start: int, length: int) -> None:
    counts = np.random.default_rng(seed).poisson(0.7, 2048).astype(np.float64)
    counts[[start, start + length - 1]] += 1
    lost = module._information_lost(counts, start, start + length)
    assert lost >= -1e-12  # rounding of a sum of a few thousand terms
    assert lost == pytest.approx(information_lost(counts, start, start + length), abs=1e-9)


def test_entropy_cuts_tails_and_nothing_else() -> None:
    even = histogram(np.random.default_rng(0).uniform(-1, 1, 100000).astype(np.float32))
    assert even.entropy() == pytest.approx((-1, 1), rel=0.02)
    values = np.random.default_rng(0).standard_normal(100000).astype(np.float32)
    values[0] = 20
    low, high = histogram(values).entropy()
    assert 3 < high < 10
    assert values.min() <= low < -1


def test_limits_of_every_method_lie_within_what_was_seen() -> None:
    for name in DISTRIBUTIONS:
        values = entries_of(name)
        for method in METHODS.values():
            low, high = method(histogram(values))
            assert min(values.min(), 0) - 1e-6 <= low <= high <= max(values.max(), 0) + 1e-6


TEXT = """g (float[N, 6] x) => (float[N, 6] y, float[N, 6] l) {
    h = Tanh (x)
    y = Relu (h)
    l = Log (h)
}"""


def network() -> tuple[Model, Dataset, Array]:
    x = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
    proto = parse(TEXT)
    return load(proto), open_dataset({"x": x}, input_specs(proto)), x


@pytest.mark.parametrize("limit", [1, 1 << 28])
def test_activations_are_counted_however_they_are_fetched(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FETCH_LIMIT_BYTES", limit)
    model, data, x = network()
    chosen = np.arange(5, 30)
    found = collect(model, ["x", "h", "y"], data, chosen, Runtime(batch=7))
    h = run(parse(TEXT.replace("float[N, 6] y,", "float[N, 6] h, float[N, 6] y,")), {"x": x[chosen]})[0]
    for name, values in {"x": x[chosen], "h": h, "y": np.maximum(h, 0)}.items():
        expected = histogram(values)
        assert (found[name].low, found[name].high, found[name].zeros) == (expected.low, expected.high, expected.zeros)
        assert (found[name].first, found[name].width, found[name].total) == (expected.first, expected.width, values.size)
        np.testing.assert_array_equal(found[name].counts, expected.counts)


def test_values_that_are_not_finite_have_no_range() -> None:
    model, data, x = network()
    found = calibrated(model, ["h", "y", "l"], data, np.arange(40), Runtime(), "minmax")
    assert list(found) == ["h", "y"]
    h = run(parse(TEXT.replace("float[N, 6] y,", "float[N, 6] h, float[N, 6] y,")), {"x": x})[0]
    assert found["h"] == Range.spanning(float(h.min()), float(h.max()))
    assert found["y"].zero_point == 0


def test_auto_is_a_method() -> None:
    model, data, _ = network()
    auto, named = (calibrated(model, ["h"], data, np.arange(40), Runtime(), method) for method in ("auto", AUTO))
    assert auto == named
    signed = calibrated(model, ["y"], data, np.arange(40), Runtime(), dtype=I8, bits=7)["y"]
    assert (signed.dtype, signed.zero_point) == (I8, -64)
