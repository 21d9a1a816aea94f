"""Statistics of normalizations: their outputs are spread as the original's, and nothing else changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import count

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from intaglio.ops.form import CARRIED, PRUNED, Form
from intaglio.passes import build, renormalize
from intaglio.passes.build import finish, fit_forms
from intaglio.passes.frontier import Frontier
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.load import load
from intaglio.passes.options import Runtime
from intaglio.passes.renormalize import Spread, find_normalizations, levels, measured, restored
from intaglio.passes.sensitivity import Probe
from intaglio.passes.verify import compare
from tests.models import Array, normal, operators, optimized, parse, run

BLOCKS, CHANNELS = 3, 8


def preactivation() -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A residual network whose normalizations lie in front of its convolutions and keep the statistics of its own activations."""
    rng = np.random.default_rng(5)
    pad = "pads = [1, 1, 1, 1]"
    weights = {"stem": normal(1, CHANNELS, 3, 3, 3), "head": 6 * normal(2, 10, CHANNELS), "hb": normal(3, 10)}
    lines = [f"h0 = Conv <{pad}> (x, stem)"]
    for i in range(BLOCKS):
        lines += [
            f"n{i} = BatchNormalization (h{i}, s{i}, b{i}, m{i}, v{i}) r{i} = Relu (n{i}) a{i} = Conv <{pad}> (r{i}, p{i}, c{i})",
            f"q{i} = Relu (a{i}) d{i} = Conv <{pad}> (q{i}, w{i}) h{i + 1} = Add (h{i}, d{i})",
        ]
        wide = (CHANNELS, CHANNELS, 3, 3)
        weights |= {f"p{i}": 1.4 * normal(10 + i, *wide), f"c{i}": 0.3 * normal(20 + i, CHANNELS), f"w{i}": 1.4 * normal(30 + i, *wide)}
    last = BLOCKS
    lines.append(f"n{last} = BatchNormalization (h{last}, s{last}, b{last}, m{last}, v{last}) r{last} = Relu (n{last})")
    lines.append(f"g = GlobalAveragePool (r{last}) f = Flatten (g) z = Gemm <transB = 1> (f, head, hb) y = Softmax (z)")
    text = f"net (float[N, 3, 6, 6] x) => (float[N, 10] y) {{ {' '.join(lines)} }}"
    for i in range(BLOCKS + 1):
        spread = {
            "s": rng.uniform(0.7, 1.3, CHANNELS),
            "b": 0.3 * rng.standard_normal(CHANNELS),
            "m": np.zeros(CHANNELS),
            "v": np.ones(CHANNELS),
        }
        weights |= {f"{name}{i}": array.astype(np.float32) for name, array in spread.items()}
    x = (rng.standard_normal((300, 3, 6, 6)) + 2 * rng.standard_normal((300, 3, 1, 1))).astype(np.float32)
    for i in range(BLOCKS + 1):
        (h,) = run(showing(parse(text, weights), f"h{i}"), {"x": x})
        weights |= {f"m{i}": h.mean((0, 2, 3)), f"v{i}": h.var((0, 2, 3))}
    return parse(text, weights), {"x": x}


def showing(proto: onnx.ModelProto, *values: str) -> onnx.ModelProto:
    """The model with other outputs."""
    shown = onnx.ModelProto()
    shown.CopyFrom(proto)
    del shown.graph.output[:]
    shown.graph.output.extend(helper.make_empty_tensor_value_info(value) for value in values)
    return shown


@cache
def job_of() -> Job:
    return open_job(*preactivation(), Settings(curvature="input"))


def narrow(storage: str, arithmetic: str = "float") -> dict[str, Form]:
    """All weights but the head, whose loss no normalization comes after."""
    return {site.name: Form("dense", (), storage, "dense", arithmetic) for site in job_of().sites if site.name != "head"}


PLANS: dict[str, Mapping[str, Form]] = {
    "int3": narrow("int3"),
    "int2": narrow("int2"),
    "low rank": {f"{name}{i}": Form("channel_svd", (4,), "float", "contract") for name in "pw" for i in range(BLOCKS)},
}


@cache
def models(plan: str) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Without and with statistics of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "renormalized", lambda *_: {})
        without = finish(job_of(), PLANS[plan], fit_forms(job_of(), PLANS[plan]))
    return without.proto, finish(job_of(), PLANS[plan], fit_forms(job_of(), PLANS[plan])).proto


def contents(proto: onnx.ModelProto) -> dict[str, bytes]:
    return {tensor.name: tensor.SerializeToString() for tensor in proto.graph.initializer}


def test_the_normalizations_of_the_network_are_not_folded() -> None:
    assert operators(job_of().model.proto)["BatchNormalization"] == BLOCKS + 1


@pytest.mark.parametrize("plan", ["int3", "int2"])
def test_outputs_come_nearer_to_the_originals(plan: str) -> None:
    job = job_of()
    before, after = (compare(job.original, load(proto), job.data, job.splits.verify, job.calibration).divergence for proto in models(plan))
    assert after < before


@pytest.mark.parametrize("plan", PLANS)
def test_nothing_but_statistics_changes(plan: str) -> None:
    before, after = models(plan)
    moved = {name for name, content in contents(after).items() if contents(before)[name] != content}
    assert moved
    assert moved <= {f"{name}{i}" for name in "mv" for i in range(BLOCKS + 1)}
    assert [node.SerializeToString() for node in before.graph.node] == [node.SerializeToString() for node in after.graph.node]
    assert before.ByteSize() == after.ByteSize() == job_of().sizes().total(PLANS[plan])
    assert operators(optimized(before)) == operators(optimized(after))


def test_outputs_are_the_same_without_optimizations() -> None:
    _, proto = models("int3")
    feed = {"x": job_of().data.first(1)["x"]}
    plain, fast = run(proto, feed, optimize=False)[0], run(proto, feed)[0]
    np.testing.assert_allclose(plain, fast, atol=1e-5)  # float32 sums in another order


def test_the_same_samples_give_the_same_statistics() -> None:
    again = open_job(*preactivation(), Settings(curvature="input"))
    assert contents(finish(again, PLANS["int3"], fit_forms(again, PLANS["int3"])).proto) == contents(models("int3")[1])


def test_what_nothing_compressed_comes_before_stays() -> None:
    found = fit_forms(job_of(), {"w1": Form("dense", (), "int2", "dense")}).constants
    assert found
    assert found.keys() <= {"m2", "v2", "m3", "v3"}


def test_models_that_do_not_fit_in_memory_twice_keep_their_statistics() -> None:
    job = open_job(*preactivation(), Settings(runtime=Runtime(memory_limit_bytes=1)))
    assert not fit_forms(job, {"w1": Form("dense", (), "int2", "dense")}).constants


def test_what_does_the_outputs_no_good_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stage is said to do harm."""
    real, given = Probe.divergence, contents(job_of().model.proto)
    monkeypatch.setattr(Probe, "divergence", lambda self, proto: 9e9 if contents(proto)["m1"] != given["m1"] else real(self, proto))
    found = fit_forms(job_of(), PLANS["int2"]).constants
    assert not {"m1", "v1"} & found.keys()
    assert {"m3", "v3"} <= found.keys()


def welcome(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on everything does some good."""
    seen = count()
    monkeypatch.setattr(Probe, "divergence", lambda self, proto: -next(seen))


def test_several_levels_are_judged_together_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later ones of a stage follow what earlier ones of it yield by then."""
    monkeypatch.setattr(renormalize, "STAGES", 1)
    welcome(monkeypatch)
    job, forms = job_of(), PLANS["int2"]
    fitted = fit_forms(job, forms)
    assert fitted.constants.keys() == {f"{name}{i}" for name in "mv" for i in range(1, BLOCKS + 1)}
    feed = {"x": preactivation()[1]["x"][job.splits.fit]}
    last = f"n{BLOCKS}"
    (exact,), (found,) = (run(showing(proto, last), feed) for proto in (job.model.proto, finish(job, forms, fitted).proto))
    agreed = np.abs(found.mean((0, 2, 3)) - exact.mean((0, 2, 3))) < 1e-3  # of about one; float32 sums
    spread = np.abs(found.std((0, 2, 3)) / exact.std((0, 2, 3)) - 1) < 1e-3
    assert (agreed & spread).mean() > 0.8  # channels of which the halves of the samples say the same


def test_pruned_channels_are_compared_with_those_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    welcome(monkeypatch)
    text = """net (float[N, 8, 6, 6] x) => (float[N, 5] y) {
        h = Conv (x, a) r = Relu (h) n = BatchNormalization (r, s, b, m, v) k = Conv (n, c)
        g = GlobalAveragePool (k) f = Flatten (g) y = Gemm <transB = 1> (f, head, hb)
    }"""
    weights = {"a": normal(1, 24, 8, 3, 3), "c": normal(2, 12, 24, 3, 3), "head": normal(3, 5, 12), "hb": normal(4, 5)}
    weights |= {"s": np.ones(24, np.float32), "b": normal(5, 24), "m": np.zeros(24, np.float32), "v": np.ones(24, np.float32)}
    data = {"x": normal(6, 300, 8, 6, 6) * 17}
    (r,) = run(showing(parse(text, weights), "r"), data)
    weights |= {"m": r.mean((0, 2, 3)), "v": r.var((0, 2, 3))}
    job = open_job(parse(text, weights), data, Settings(decompositions=("dense", "pruned"), storages=("int2", "float")))
    forms = {"a": Form(PRUNED, (8, 16), "int2", "contract"), "c": Form(PRUNED, (16, 12), "float", "contract")}
    fitted = fit_forms(job, forms)
    assert fitted.constants.keys() == {"m", "v"}
    assert fitted.constants["m"].shape == (16,)
    model = finish(job, forms, fitted)
    kept = fitted.cuts[0].kept
    feed = {"x": data["x"][job.splits.fit]}
    (exact,), (found,) = (run(showing(proto, "n"), feed) for proto in (job.model.proto, model.proto))
    np.testing.assert_allclose(found.std((0, 2, 3)), exact.std((0, 2, 3))[kept], rtol=0.02)  # some channels may have been denied
    assert model.proto.ByteSize() == job.sizes().total(forms)


def test_normalizations_between_integers_keep_working() -> None:
    job = replace(job_of(), settings=replace(job_of().settings, ranges="minmax"))
    forms = narrow("int8", "integer") | {carrier.name: CARRIED for carrier in job.carriers if carrier.name != "y"}
    proto = finish(job, forms, fit_forms(job, forms)).proto
    made = {node.output[0]: node.op_type for node in proto.graph.node}
    read = {node.input[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    between = [n for n in proto.graph.node if n.op_type == "BatchNormalization" and made[n.input[0]] == "DequantizeLinear"]
    assert {f"n{i}" for i in range(1, BLOCKS + 1)} <= {node.output[0] for node in between} & read
    kinds = operators(optimized(proto))
    assert kinds["QLinearConv"] == 2 * BLOCKS
    assert kinds["BatchNormalization"] == BLOCKS  # the first follows a Conv in floats, which takes it in
    assert compare(job.original, load(proto), job.data, job.splits.verify, job.calibration).divergence < 0.01


# one normalization

ROWS = 4000


def spread_of(ours: Array, theirs: Array, mean: Array) -> Spread:
    """Of rows (rows, channels)."""
    first, second = ours - mean, theirs - mean
    return Spread(len(ours), np.stack([first.sum(0), (first**2).sum(0), second.sum(0), (second**2).sum(0)]))


@given(channels=st.integers(1, 8), seed=st.integers(0, 999), epsilon=st.sampled_from([1e-5, 1e-3]))
@settings(max_examples=30, deadline=None)
def test_the_output_has_the_originals_mean_and_variance(channels: int, seed: int, epsilon: float) -> None:
    rng = np.random.default_rng(seed)
    theirs = 2 * rng.standard_normal((ROWS, channels)) + rng.standard_normal(channels)
    ours = theirs * rng.choice([0.6, 1.5], channels) + 0.5 * rng.standard_normal((ROWS, channels)) + rng.choice([-1, 1], channels)
    stored = rng.standard_normal(channels).astype(np.float32), rng.uniform(1, 5, channels).astype(np.float32)
    folds = [spread_of(ours[half::2], theirs[half::2], stored[0].astype(np.float64)) for half in range(2)]
    found = restored(stored, epsilon, folds)
    assert found is not None  # both halves see a loss that is far beyond chance
    after, before = ((rows - mean) / np.sqrt(variance + epsilon) for rows, (mean, variance) in ((ours, found), (theirs, stored)))
    np.testing.assert_allclose(after.mean(0), before.mean(0), atol=1e-5)  # float32 statistics
    np.testing.assert_allclose(after.std(0), before.std(0), rtol=1e-5)


def test_the_mean_is_that_of_what_is_read_where_training_left_the_originals() -> None:
    rng = np.random.default_rng(0)
    theirs = rng.standard_normal((ROWS, 3)) + 1
    ours = 0.5 * theirs + 3
    stored = theirs.mean(0).astype(np.float32), theirs.var(0).astype(np.float32)
    found = restored(stored, 1e-5, [spread_of(ours[half::2], theirs[half::2], stored[0]) for half in range(2)])
    assert found is not None
    np.testing.assert_allclose(found[0], ours.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found[1], ours.var(0), rtol=1e-4)  # ε does not shrink with the variance


STILL = np.array([0.0, 1e-4, 1.0])


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_channels_with_next_to_no_variance_stay(whose: str) -> None:
    rng = np.random.default_rng(1)
    moving, still = 2 * rng.standard_normal((ROWS, 3)) + 1, STILL * rng.standard_normal((ROWS, 3))
    ours, theirs = (still, moving) if whose == "ours" else (moving, still)
    stored = np.zeros(3, np.float32), np.ones(3, np.float32)
    found = restored(stored, 1e-5, [spread_of(ours[half::2], theirs[half::2], stored[0]) for half in range(2)])
    assert found is not None
    np.testing.assert_array_equal(found[0][:2], stored[0][:2])
    np.testing.assert_array_equal(found[1][:2], stored[1][:2])
    assert found[1][2] != 1


def test_what_one_half_suggests_and_the_other_denies_is_left() -> None:
    rng = np.random.default_rng(2)
    theirs = rng.standard_normal((ROWS, 4))
    stored = np.zeros(4, np.float32), np.ones(4, np.float32)
    folds = [spread_of(theirs * factor, theirs, stored[0]) for factor in (0.7, 1.3)]
    assert restored(stored, 1e-5, folds) is None
    assert restored(stored, 1e-5, [spread_of(theirs, theirs, stored[0])] * 2) is None
    assert restored(stored, 1e-5, folds[:1]) is None


def test_what_is_not_finite_is_left() -> None:
    rng = np.random.default_rng(3)
    theirs = rng.standard_normal((ROWS, 2))
    ours = theirs * [np.inf, 2.0]
    stored = np.zeros(2, np.float32), np.ones(2, np.float32)
    with np.errstate(invalid="ignore"):
        folds = [spread_of(ours[half::2], theirs[half::2], stored[0]) for half in range(2)]
    found = restored(stored, 1e-5, folds)
    assert found is not None
    assert found[1][0] == 1
    assert found[1][1] != 1


@given(
    rank=st.integers(2, 5),
    opset=st.sampled_from([9, 12, 13, 18]),
    cut=st.booleans(),
    offset=st.sampled_from([0.0, 300.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_spreads_are_those_of_the_values(rank: int, opset: int, cut: bool, offset: float, seed: int) -> None:
    """Of any rank, far from zero too, on two feeds of which each is a fold."""
    rng = np.random.default_rng(seed)
    sides = tuple(int(side) for side in rng.integers(1, 4, rank - 2))
    axes, names = tuple(i for i in range(rank) if i != 1), "".join(f", {side}" for side in sides)
    text = f"net (float[N, 6{names}] x) => (float[N, 6{names}] y) {{ h = Mul (x, f) y = BatchNormalization (h, s, b, m, v) }}"
    stored = {name: rng.uniform(0.5, 2, 6).astype(np.float32) for name in "sbv"} | {"m": np.full(6, offset, np.float32)}
    x = (offset + rng.standard_normal((48, 6, *sides))).astype(np.float32)
    first, second = (load(parse(text, stored | {"f": np.float32(factor)}, opset=opset, ir_version=8)) for factor in (1, 1.25))
    kept = np.array([1, 2, 5]) if cut else np.arange(6)
    if cut:
        gone = f"net (float[N, 6{names}] x) => (float[N, 3{names}] y) {{ k = Gather <axis = 1> (x, i) h = Mul (k, f) "
        left = {name: array[kept] for name, array in stored.items()}
        second = load(
            parse(gone + "y = BatchNormalization (h, s, b, m, v) }", left | {"f": np.float32(1.25), "i": kept}, opset=opset, ir_version=8)
        )
    data = open_job(first.proto, {"x": x}, Settings()).data
    frontiers = [Frontier(model, data, np.arange(48), Runtime(batch=24)) for model in (first, second)]
    found, _ = find_normalizations(first)
    ((*folds,),) = measured(*frontiers, found, [stored["m"][kept]], [kept if cut else None], Runtime())
    assert len(folds) == 2
    for fold, part in zip(folds, (x[:24], x[24:]), strict=True):
        assert fold.rows == part[:, 0].size
        theirs = (part.astype(np.float64) - offset)[:, kept]
        ours = (part[:, kept] * np.float32(1.25)).astype(np.float64) - offset
        direct = np.stack([ours.sum(axes), (ours**2).sum(axes), theirs.sum(axes), (theirs**2).sum(axes)])
        np.testing.assert_allclose(fold.sums, direct, rtol=1e-4, atol=1e-3)  # float32 sums of up to some hundred terms


def test_levels_hold_normalizations_that_do_not_read_each_other() -> None:
    text = """net (float[N, 4] x) => (float[N, 4] y) {
        a = BatchNormalization (x, s, b, ma, va) h = Neg (x) c = BatchNormalization (h, s, b, mc, vc) k = Add (a, c)
        d = BatchNormalization (k, s, b, md, vd) y = Relu (d)
    }"""
    model = load(parse(text, {name: np.ones(4, np.float32) for name in ("s", "b", "ma", "va", "mc", "vc", "md", "vd")}))
    found, _ = find_normalizations(model)
    assert [[each.name for each in level] for level in levels(model.proto, found)] == [["a", "c"], ["d"]]


ONES = {name: np.ones(4, np.float32) for name in "sbmv"}
REFUSED = {
    "training": (
        "(float[N, 4] x) => (float[N, 4] y) { y, p, q = BatchNormalization <training_mode = 1> (x, s, b, m, v) }",
        ONES,
        "it normalizes by statistics of the batch, or of each position",
    ),
    "shared": (
        "(float[N, 4] x) => (float[N, 4] y) { h = BatchNormalization (x, s, b, m, v) y = BatchNormalization (h, s, b, m2, v) }",
        ONES | {"m2": ONES["m"]},
        "'v' is read by something else too",
    ),
    "an input": (
        "(float[N, 4] x, float[4] m) => (float[N, 4] y) { y = BatchNormalization (x, s, b, m, v) }",
        ONES,
        "'m' is an input or output of the model",
    ),
    "an output": (
        "(float[N, 4] x) => (float[N, 4] y, float[4] v) { y = BatchNormalization (x, s, b, m, v) }",
        ONES,
        "'v' is an input or output of the model",
    ),
    "computed": (
        "(float[N, 4] x) => (float[N, 4] y) { m = Neg (k) y = BatchNormalization (x, s, b, m, v) }",
        ONES | {"k": ONES["m"]},
        "'m' is no float32 initializer of one number per channel",
    ),
    "doubles": (
        "(double[N, 4] x) => (double[N, 4] y) { y = BatchNormalization (x, s, b, m, v) }",
        {name: array.astype(np.float64) for name, array in ONES.items()},
        "'m' is no float32 initializer of one number per channel",
    ),
    "nested": (
        """(float[N, 4] x, bool c) => (float[N, 4] y) {
            y = If (c) <then_branch = t () => (float[N, 4] p) { p = BatchNormalization (x, s, b, m, v) },
                        else_branch = e () => (float[N, 4] q) { q = Neg (x) }>
        }""",
        ONES,
        "it lies in a nested graph or function",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_must_stay_is_refused_with_the_reason(case: str) -> None:
    text, weights, reason = REFUSED[case]
    _, skipped = find_normalizations(load(parse(f"net {text}", {k: v for k, v in weights.items() if case != "computed" or k != "m"})))
    assert reason in {skip.reason for skip in skipped}


def test_statistics_of_old_models_are_no_inputs() -> None:
    """Before IR version 4 every initializer is listed as one."""
    model = load(parse("net (float[N, 4] x) => (float[N, 4] y) { y = BatchNormalization (x, s, b, m, v) }", ONES, opset=9, ir_version=3))
    found, skipped = find_normalizations(model)
    assert [each.name for each in found] == ["y"]
    assert not skipped


def test_other_normalizations_are_none() -> None:
    text = "net (float[N, 4, 5] x) => (float[N, 4, 5] y) { y = InstanceNormalization (x, s, b) }"
    assert find_normalizations(load(parse(text, ONES))) == ((), ())


def test_initializers_keep_their_names() -> None:
    model = load(parse("net (float[N, 4] x) => (float[N, 4] y) { y = BatchNormalization (x, s, b, m, v) }", ONES))
    changed = renormalize.with_contents(model, {"m": np.arange(4, dtype=np.float32)})
    assert [tensor.name for tensor in changed.proto.graph.initializer] == list("sbmv")
    assert numpy_helper.to_array(changed.proto.graph.initializer[2]).tolist() == [0, 1, 2, 3]
    assert renormalize.with_contents(model, {}) is model
