"""Timing: sane ratios, structures measured once, values of weights without influence."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from intaglio.passes import latency
from intaglio.passes.cache import Cache
from intaglio.passes.errors import InputError
from intaglio.passes.latency import MicroBench, PairedLatency, compare_models, measure, random_feed, structure


def matmul(width: int, *, value: float = 1.0, weight: str = "W") -> onnx.ModelProto:
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[n,64] x) => (float[n,{width}] y) {{ y = MatMul(x, {weight}) }}'
    )
    model.graph.initializer.append(numpy_helper.from_array(np.full((64, width), value, np.float32), weight))
    return model


def test_measure_ranks_what_takes_longer():
    short, long = measure([lambda: sum(range(1000)), lambda: sum(range(10000))], budget_s=0.02, sample_s=1e-3)
    assert 3 < long.minimum_s / short.minimum_s < 30  # minima: other work on the machine must not fail this
    assert long.minimum_s <= long.median_s
    assert short.samples_s.shape == long.samples_s.shape
    assert len(short.samples_s) >= 5


def test_measure_interleaves():
    calls: list[int] = []
    measure([lambda: calls.append(0), lambda: calls.append(1)], rounds=20, sample_s=0.0)
    timed = calls[-40:]
    rounds = [tuple(timed[start : start + 2]) for start in range(0, 40, 2)]
    assert all(sorted(pair) == [0, 1] for pair in rounds)
    assert {(0, 1), (1, 0)} == set(rounds)


def test_a_larger_matmul_is_slower():
    bench = MicroBench(Cache(None), budget_s=0.03)
    small_s, large_s = bench.pair(matmul(64), matmul(4096), {"x": (64, 64)})
    assert large_s > 4 * small_s > 0


def test_compare_models_gives_a_ratio_and_its_spread(tmp_path):
    path = tmp_path / "large.onnx"
    onnx.save(matmul(4096), path)
    result = compare_models(matmul(64), path, {"x": np.ones((64, 64), np.float32), "other": np.ones(1)}, pairs=7)
    assert result.pairs == 7
    assert result.ratio == result.candidate_s / result.reference_s > 4
    assert result.ratio_low <= result.ratio_high
    same = compare_models(matmul(1024), matmul(1024), {"x": np.ones((64, 64), np.float32)}, pairs=31)
    assert same.ratio_low < 1.5  # quartiles, and wide: other work on the machine must not fail this
    assert same.ratio_high > 1 / 1.5


def test_measurements_are_pooled_by_their_pairs():
    """The machine was twice as fast in one of them: what each says of the two models counts, not how fast it was."""
    fast, slow = np.tile([1e-3, 0.5e-3], (30, 1)), np.tile([2e-3, 1.6e-3], (10, 1))
    both = PairedLatency((fast,)) + PairedLatency((slow,))
    assert both.ratios == pytest.approx((0.5, 0.8))
    assert both.ratio == pytest.approx(0.5**0.75 * 0.8**0.25)
    assert both.pairs == 40
    assert (both.reference_s, both.candidate_s) == (1e-3, 0.5e-3)
    assert (both.ratio_low, both.ratio_high) == pytest.approx((0.5, 0.575))
    assert PairedLatency((slow,)).ratio == PairedLatency((slow,)).candidate_s / 2e-3


def test_compare_models_refuses_a_feed_that_does_not_fit():
    with pytest.raises(InputError, match="needs input 'x'"):
        compare_models(matmul(8), matmul(8), {})
    with pytest.raises(InputError, match="fails when run"):
        compare_models(matmul(8), matmul(8), {"x": np.ones((1, 3), np.float32)})


def test_one_structure_is_measured_once(tmp_path, monkeypatch):
    measured = []
    real = latency.measure
    monkeypatch.setattr(latency, "measure", lambda runs, **options: measured.append(len(runs)) or real(runs, **options))
    bench = MicroBench(Cache(tmp_path), budget_s=0.01)
    first = bench.pair(matmul(8), matmul(16), {"x": (1, 64)})
    again = MicroBench(Cache(tmp_path), budget_s=0.01).pair(matmul(8, value=2.0, weight="V"), matmul(16), {"x": (1, 64)})
    assert again == first
    assert measured == [2]
    assert bench.seconds(matmul(8), {"x": (1, 64)}) == bench.seconds(matmul(8, weight="Q"), {"x": (1, 64)})
    assert measured == [2, 1]
    MicroBench(Cache(tmp_path), threads=2, budget_s=0.01).seconds(matmul(8), {"x": (1, 64)})
    bench.seconds(matmul(8), {"x": (2, 64)})
    assert measured == [2, 1, 1, 1]


def reshape(shape: str, *, op: str = "Neg", name: str = "s", axis: int = 0, opset: int = 17) -> onnx.ModelProto:
    return parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[4] x) => (float[a,b] y) <int64[2] {name} = {{{shape}}}> '
        f"{{ t = {op}(x) u = Reshape(t, {name}) y = Softmax<axis={axis}>(u) }}"
    )


def test_structure_sees_what_matters_and_nothing_else():
    shapes = {"x": (4,)}
    base = structure(reshape("2,2"), shapes)
    renamed = reshape("2,2", name="shape")
    renamed.graph.node[0].name = "first"
    renamed.doc_string = "of no matter"
    assert structure(renamed, shapes) == base
    others = [reshape("4,1"), reshape("2,2", op="Abs"), reshape("2,2", axis=1), reshape("2,2", opset=18)]
    digests = {structure(model, shapes) for model in others} | {structure(reshape("2,2"), {"x": (8,)}), base}
    assert len(digests) == 6
    assert structure(matmul(8, value=1.0), {"x": (1, 64)}) == structure(matmul(8, value=2.0), {"x": (1, 64)})


def test_structure_looks_into_nested_graphs():
    def branch(op: str, inner: str = "q") -> onnx.ModelProto:
        return parser.parse_model(
            f"""<ir_version: 8, opset_import: ["" : 17]> g (float[2] x, bool c) => (float[2] y) {{
                y = If (c) <then_branch = a () => (float[2] {inner}) {{ {inner} = {op}(x) }},
                            else_branch = b () => (float[2] r) {{ r = Identity(x) }}>
            }}"""
        )

    shapes = {"x": (2,), "c": ()}
    assert structure(branch("Neg"), shapes) == structure(branch("Neg", "z"), shapes) != structure(branch("Abs"), shapes)


def test_random_feed_has_the_declared_types():
    model = parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 19]>
        g (float16[n] f, int64[n] i, bool b, uint8[n] u, bfloat16[n] h) => (float16[n] y) { y = Neg(f) }"""
    )
    shapes = {"f": (5,), "i": (500,), "b": (), "u": (300,), "h": (2,)}
    feed = random_feed(model, shapes, index_limit=1000)
    assert {name: (array.dtype.name, array.shape) for name, array in feed.items()} == {
        "f": ("float16", (5,)),
        "i": ("int64", (500,)),
        "b": ("bool", ()),
        "u": ("uint8", (300,)),
        "h": ("bfloat16", (2,)),
    }
    assert 500 < feed["i"].max() < 1000
    again = random_feed(model, shapes, index_limit=1000)
    assert all(np.array_equal(feed[name], again[name]) for name in feed)
    with pytest.raises(InputError, match=r"'f'.*no shape"):
        random_feed(model, {})
