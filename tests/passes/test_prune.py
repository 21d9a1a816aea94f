"""Pruned forms: what is offered, that layers agree, and that every plan of agreeing forms is a valid model of the predicted size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.form import PRUNED, UNCHANGED, Form
from intaglio.passes import analyse, refit
from intaglio.passes.build import build, check, finish, fit_forms, mock
from intaglio.passes.cache import Cache
from intaglio.passes.channels import find_channel_groups
from intaglio.passes.errors import InputError
from intaglio.passes.frontier import Frontier
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.latency import MicroBench
from intaglio.passes.load import load
from intaglio.passes.model import Model
from intaglio.passes.plan import Candidate, Menu, choose, read_plan, to_json
from intaglio.passes.price import SizePricer
from intaglio.passes.prune import Channels, PrunedTerms
from intaglio.passes.recall import Finding, Findings
from intaglio.passes.refit import channel_orders, channels_of, original_moments, pruned_forms, pruning_trials
from intaglio.passes.report import _kept_channels
from intaglio.passes.rewrite import declines
from intaglio.passes.save import save
from intaglio.passes.session import CPU
from intaglio.passes.sites import Site, find_sites
from intaglio.passes.timing import LatencyPricer
from intaglio.passes.verify import compare
from intaglio.solver import Budget, Cost
from tests.models import Array, assert_close, normal, operators, optimized, parse, run
from tests.passes.pruning import prune
from tests.passes.test_match import still

PAD = "pads = [1, 1, 1, 1]"
RESIDUAL = f"""
    a = Conv <{PAD}> (x, c1, b1) r = Relu (a) c = Conv <{PAD}> (r, c2, b2) s = Add (c, a) t = Relu (s)
    d = Conv (t, c3, b3) p = GlobalAveragePool (d) f = Flatten (p) y = Gemm <transB = 1> (f, head, hb)"""
DEPTHWISE = f"""
    a = Conv <{PAD}> (x, c1, b1) r = Relu (a) e = Conv <{PAD}, group = 32> (r, dw, db) q = Relu (e) d = Conv (q, c3, b3) g = Relu (d)
    f = Flatten (g) h = Gemm <transB = 1> (f, w1, g1) k = Relu (h) y = MatMul (k, w2)"""


def twice(array: Array, axis: int = 0) -> Array:
    """Every entry along an axis two times: channels that say the same."""
    return np.repeat(array, 2, axis)


WEIGHTS = {
    RESIDUAL: {
        "c1": twice(normal(1, 12, 3, 3, 3)),
        "b1": twice(normal(2, 12)),
        "c2": twice(normal(3, 12, 24, 3, 3)),
        "b2": twice(normal(4, 12)),
        "c3": twice(normal(5, 20, 24, 1, 1)),
        "b3": twice(normal(6, 20)),
        "head": normal(7, 10, 40),
        "hb": normal(8, 10),
    },
    DEPTHWISE: {
        "c1": twice(normal(1, 16, 3, 3, 3)),
        "b1": twice(normal(2, 16)),
        "dw": twice(normal(3, 16, 1, 3, 3)),
        "db": twice(normal(4, 16)),
        "c3": twice(normal(5, 8, 32, 1, 1)),
        "b3": twice(normal(6, 8)),
        "w1": normal(7, 24, 16 * 36),
        "g1": normal(8, 24),
        "w2": normal(9, 24, 12),
    },
}


def model_of(body: str, weights: Mapping[str, Array]) -> onnx.ModelProto:
    return parse(f"g (float[N, 3, 6, 6] x) => (float[N, M] y) {{ {body} }}", weights)


def images(count: int = 60) -> dict[str, Array]:
    return {"x": np.random.default_rng(7).standard_normal((count, 3, 6, 6)).astype(np.float32)}


@cache
def job_of(body: str) -> Job:
    return open_job(model_of(body, WEIGHTS[body]), images(), Settings(decompositions=("dense", "pruned"), storages=("float", "int8")))


def channels(body: str, excluded: Sequence[str] = ()) -> Channels:
    model = load(model_of(body, WEIGHTS[body]))
    return Channels.find(model, find_sites(model).sites, excluded)


def pruned(*ranks: int, storage: str = "float", arithmetic: str = "float") -> Form:
    return Form(PRUNED, ranks, storage, "contract", arithmetic)


def halved(body: str, storage: str = "float", arithmetic: str = "float") -> dict[str, Form]:
    """Every group at half of its channels."""
    ranks: dict[str, dict[str, tuple[int, int]]] = {
        RESIDUAL: {"c1": (3, 12), "c2": (12, 12), "c3": (12, 20), "head": (20, 10)},
        DEPTHWISE: {"c1": (3, 16), "dw": (1, 16), "c3": (16, 8), "w1": (8 * 36, 12), "w2": (12, 12)},
    }
    return {name: pruned(*each, storage=storage, arithmetic=arithmetic) for name, each in ranks[body].items()}


def valid(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model, valid in every detail."""
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    return proto


def initializers(proto: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


# what is offered


def test_the_groups_of_a_residual_network() -> None:
    found = channels(RESIDUAL)
    assert {name: group.size for name, group in found.groups.items()} == {"a": 24, "d": 40}
    assert found.reads == {"c2": ("a", 9), "c3": ("a", 1), "head": ("d", 1)}
    assert found.writes == {"c1": "a", "c2": "a", "c3": "d"}
    assert found.slice_bytes == {"a": 4 * 2, "d": 4}  # two biases, and one


def test_levels_of_wide_groups_are_multiples_of_eight() -> None:
    assert channels(RESIDUAL).levels("a") == (24, 21, 18, 15, 12)
    assert channels(RESIDUAL).levels("d") == (40, 32, 24)
    assert channels(DEPTHWISE).levels("a") == (32, 24, 16)


def test_ranks_are_all_pairs_of_levels_but_a_layer_that_reads_what_it_writes_keeps_as_many() -> None:
    found = channels(RESIDUAL)
    assert set(found.ranks(found.sites["c2"])) == {(k, k) for k in (21, 18, 15, 12)}
    assert set(found.ranks(found.sites["c1"])) == {(3, k) for k in (21, 18, 15, 12)}
    assert len(list(found.ranks(found.sites["c3"]))) == 5 * 3 - 1


def test_a_depthwise_layer_keeps_as_many_as_it_reads_and_a_flattened_one_whole_images() -> None:
    found = channels(DEPTHWISE)
    assert list(found.ranks(found.sites["dw"])) == [(1, 24), (1, 16)]
    assert {inputs for inputs, _ in found.ranks(found.sites["w1"])} == {36 * k for k in found.levels("d")}


def test_constants_that_must_stay_keep_their_group_whole() -> None:
    assert set(channels(DEPTHWISE, ["dw"]).groups) == {"d", "h"}


def test_groups_with_a_layer_that_is_no_site_stay_whole() -> None:
    model = load(model_of(RESIDUAL, WEIGHTS[RESIDUAL]))
    sites = [site for site in find_sites(model) if site.name != "c2"]
    assert set(Channels.find(model, sites).groups) == {"d"}


def test_groups_of_weights_in_other_types_and_of_few_channels_stay_whole() -> None:
    body = f"a = Conv <{PAD}> (x, c1) b = Conv (a, c2) f = Flatten (b) y = MatMul (f, w)"
    weights = {"c1": normal(1, 7, 3, 5, 5), "c2": normal(2, 64, 7, 1, 1), "w": normal(3, 64 * 16, 5)}
    assert set(Channels.find(*_found(model_of(body.replace(PAD, "pads = [1, 1, 1, 1]"), weights))).groups) == {"b"}  # a has seven
    halves = {name: array.astype(np.float16) for name, array in weights.items()}
    proto = parse(f"g (float16[N, 3, 6, 6] x) => (float16[N, M] y) {{ {body} }}", halves)
    assert not Channels.find(*_found(proto)).groups


def _found(proto: onnx.ModelProto) -> tuple[Model, tuple[Site, ...]]:
    model = load(proto)
    return model, find_sites(model).sites


def test_large_models_keep_their_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit, "MAX_MODEL_BYTES", 1000)
    job = open_job(model_of(RESIDUAL, WEIGHTS[RESIDUAL]), images(12), Settings())
    assert not channels_of(job).groups


def test_what_the_user_excludes_keeps_its_channels() -> None:
    job = open_job(model_of(RESIDUAL, WEIGHTS[RESIDUAL]), images(12), Settings(exclude=("c2",)))
    assert set(channels_of(job).groups) == {"d"}
    job = open_job(model_of(DEPTHWISE, WEIGHTS[DEPTHWISE]), images(12), Settings(exclude=("dw",)))
    assert set(channels_of(job).groups) == {"d", "h"}


def test_pruning_takes_part_by_default_only_where_latency_counts() -> None:
    job = job_of(RESIDUAL)
    free = replace(job, settings=Settings())
    named = replace(job, settings=Settings(decompositions=("dense",)))
    assert [PRUNED in analyse._allowed(each, latency).decompositions for each in (free, named) for latency in (False, True)] == [
        False,
        True,
        False,
        False,
    ]
    assert PRUNED in analyse._allowed(job, False).decompositions  # it is named


# coupling


def test_the_leader_provides_what_the_others_require() -> None:
    found = channels(RESIDUAL)
    sites = found.sites
    assert found.terms(sites["c1"], pruned(3, 12)) == PrunedTerms(("channels:a:12",), (), 12 * 8)
    assert found.terms(sites["c2"], pruned(12, 12)) == PrunedTerms((), ("channels:a:12",), 0)
    assert found.terms(sites["c3"], pruned(12, 24)) == PrunedTerms(("channels:d:24",), ("channels:a:12",), 16 * 4)
    assert found.terms(sites["c3"], UNCHANGED) == PrunedTerms(("channels:d:40",), ("channels:a:24",), 0)
    assert set(found.resources().values()) == {Cost()}
    for site in sites.values():
        for form in (UNCHANGED, *(pruned(*ranks) for ranks in found.ranks(site))):
            terms = found.terms(site, form)
            assert {*terms.provides, *terms.requires} <= set(found.resources())


def test_what_no_group_holds_is_not_coupled() -> None:
    model = load(model_of(RESIDUAL, WEIGHTS[RESIDUAL]))
    site = next(site for site in find_sites(model) if site.name == "head")
    assert Channels().terms(site, UNCHANGED) == PrunedTerms()
    assert list(Channels().ranks(site)) == []


DISAGREEMENTS = [
    ({"c3": pruned(24, 32)}, "disagree about the channels of 'd': 'head' 40 and 'c3' 32|disagree about the channels of 'd'"),
    ({"head": pruned(32, 10), "c3": pruned(24, 24)}, "disagree about the channels of 'd'"),
    ({"c2": pruned(12, 16)}, "disagree about the channels of 'a'"),
    ({"c1": pruned(2, 24)}, "its inputs cannot be cut; keep all 3"),
    ({"head": pruned(40, 5)}, "its outputs cannot be cut; keep all 10"),
    ({"c2": pruned(24, 24)}, "expected less than"),
    ({"c2": pruned(24)}, "expected less than"),
    ({"c2": pruned(12, 12, storage="int8", arithmetic="nbits")}, "computes in float, integer, dynamic only"),
]


@pytest.mark.parametrize(("forms", "message"), DISAGREEMENTS, ids=range(len(DISAGREEMENTS)))
def test_forms_that_do_not_fit_together_are_refused_in_one_line(forms: dict[str, Form], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        check(job_of(RESIDUAL), forms)
    assert "\n" not in str(caught.value)


def test_parts_of_channels_cannot_be_kept() -> None:
    with pytest.raises(InputError, match="287 of 576 inputs are no whole channels"):
        check(job_of(DEPTHWISE), {"w1": pruned(287, 24)})


# building


@pytest.mark.parametrize("body", [RESIDUAL, DEPTHWISE], ids=["residual", "depthwise"])
def test_pruned_weights_are_those_of_the_reference(body: str) -> None:
    job, forms = job_of(body), halved(body)
    model = finish(job, forms, fit_forms(job, forms, match=False))
    orders = channel_orders(job)
    kept = {name: np.sort(order[len(order) // 2 :]) for name, order in orders.items()}
    moments = {name: moment.shrunk() for name, moment in original_moments(job, list(job.sites)).items()}
    expected = initializers(prune(job.model, job.sites, find_channel_groups(job.model, job.sites), kept, moments).proto)
    actual = initializers(valid(model.proto))
    assert expected.keys() == actual.keys()
    corrected = {name for name in actual if not np.array_equal(actual[name], expected[name])}
    assert all(actual[name].shape == expected[name].shape for name in actual)
    assert corrected <= {"b2", "b3", "hb", "db", "g1"}  # biases take up what dropped channels leave out of the mean


@pytest.mark.parametrize("body", [RESIDUAL, DEPTHWISE], ids=["residual", "depthwise"])
@pytest.mark.parametrize("storage", ["float", "int8"])
def test_predicted_bytes_are_those_of_the_file(body: str, storage: str, tmp_path: Path) -> None:
    job, forms = job_of(body), halved(body, storage)
    path = tmp_path / "model.onnx"
    assert save(build(job, forms), path, source=None) == job.sizes().total(forms)
    assert save(mock(job, forms), path, source=None) > 0
    valid(mock(job, forms).proto)


def test_bytes_beside_the_model_and_where_initializers_are_inputs(tmp_path: Path) -> None:
    proto = parse(f"g (float[N, 3, 6, 6] x) => (float[N, M] y) {{ {DEPTHWISE} }}", WEIGHTS[DEPTHWISE], opset=12, ir_version=3)
    job, forms = open_job(proto, images(12), Settings()), halved(DEPTHWISE, "int8")
    model, path = build(job, forms), tmp_path / "model.onnx"
    valid(model.proto)
    for external in (False, True):
        assert save(model, path, source=None, external=external) == SizePricer(job.model, external=external).total(forms)
    assert {value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in model.proto.graph.input}["db"] == (
        16,
    )


def test_superfluous_channels_are_dropped_without_a_trace() -> None:
    proto, feed = model_of(RESIDUAL, WEIGHTS[RESIDUAL]), images(200)
    job = open_job(proto, feed, Settings())
    small = valid(build(job, halved(RESIDUAL)).proto)
    expected = run(proto, feed)
    # moments of n inputs from r rows are mixed with a share of at most n / 10 r of the identity: 40 / 1000 for the head, less elsewhere
    assert_close(run(small, feed), expected, 0.05)
    assert_close(run(small, feed), run(small, feed, optimize=False), 1e-4)  # float32 sums in another order


def test_dropped_channels_do_not_move_the_mean() -> None:
    proto, feed = model_of(RESIDUAL, {**WEIGHTS[RESIDUAL], "c3": normal(5, 40, 24, 1, 1), "b3": 2 + normal(6, 40)}), images(400)
    job = open_job(proto, feed, Settings())
    small = build(job, {"c3": pruned(24, 20), "head": pruned(20, 10)}).proto
    seen = {"x": feed["x"][job.splits.fit]}
    (before,), (after,) = run(proto, seen), run(small, seen)
    assert float(np.abs(after - before).max()) > 1e-3  # something is lost
    # the correction is exact on the samples that it was made from, up to float32 sums
    np.testing.assert_allclose(after.mean(0), before.mean(0), atol=1e-4)


def test_predicted_errors_are_those_of_the_pruned_weight() -> None:
    job = job_of(RESIDUAL)
    found, orders = channels_of(job), channel_orders(job)
    site = found.sites["c3"]
    moment = original_moments(job, [site])["c3"].shrunk()
    weight = site.matrix(site.value(job.model))
    for (inputs, outputs), error in pruned_forms(found, site, site.value(job.model), moment, orders):
        if outputs != 40 or inputs == 24:
            continue
        kept = {"a": np.sort(orders["a"][24 - inputs :])}
        cut = initializers(prune(job.model, job.sites, [found.groups["a"]], kept, {"c3": moment}).proto)["c3"].reshape(40, inputs)
        whole = np.zeros_like(weight[0])
        whole[:, kept["a"]] = cut
        lost = moment.energy(weight, whole[None]) / moment.energy(weight)
        assert lost == pytest.approx(error, rel=1e-3, abs=1e-8)  # float32 weights, and a ridge of 1e-9


def test_trials_measure_what_dropped_inputs_do_to_the_outputs(tmp_path: Path) -> None:
    weights = {**WEIGHTS[RESIDUAL], "c3": normal(5, 40, 24, 1, 1), "head": normal(7, 10, 40)}
    job = open_job(model_of(RESIDUAL, weights), images(), Settings())
    found, orders, probe = channels_of(job), channel_orders(job), job.probe()
    site = found.sites["head"]
    value, moment = site.value(job.model), original_moments(job, [site])["head"].shrunk()
    trials = pruning_trials(found, site, value, moment, orders)
    errors = dict(pruned_forms(found, site, value, moment, orders))
    assert [error for error, _ in trials] == [errors[32, 10], errors[24, 10]]
    kept = [np.flatnonzero(np.any(weight != 0, 0)) for _, weight in trials]
    assert [channels.tolist() for channels in kept] == [sorted(orders["d"][dropped:].tolist()) for dropped in (8, 16)]
    curves = analyse._sensitivity(site, value, moment, (), probe, trials)
    for error, weight in trials:
        assert curves.pruning(error) == pytest.approx(probe.replaced(site, weight))
    assert pruning_trials(found, found.sites["c1"], value, moment, orders) == []  # it reads no group
    finding = Finding((), curves)
    known = Findings(job, job.settings.allowed(), Cache(tmp_path))
    known.put("head", finding)
    assert known.get("head") == finding


def test_pruned_convolutions_run_in_integers() -> None:
    job, feed = job_of(RESIDUAL), images()
    forms = halved(RESIDUAL, "int8", "integer")
    small = valid(build(job, forms).proto)
    assert operators(optimized(small))["QLinearConv"] == 3
    assert job.sizes().total(forms) > 0
    # eight bits in five places, each 1/256 of a range of about four standard deviations either way
    assert_close(run(small, feed), run(build(job, halved(RESIDUAL)).proto, feed), 0.1)


def test_a_pruned_product_is_quantized_while_the_model_runs() -> None:
    job, feed = job_of(DEPTHWISE), images()
    forms = halved(DEPTHWISE)
    narrow = {**forms, "w1": replace(forms["w1"], storage="int8", arithmetic="dynamic")}
    small = valid(build(job, narrow).proto)
    assert operators(small)["MatMulInteger"] == 1
    assert_close(run(small, feed), run(build(job, forms).proto, feed), 0.1)  # as above


@pytest.mark.parametrize("body", [RESIDUAL, DEPTHWISE], ids=["residual", "depthwise"])
@pytest.mark.parametrize("arithmetic", ["float", "integer", "dynamic"])
def test_held_values_are_those_of_the_pruned_model_as_it_is(body: str, arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job, feed = job_of(body), images()
    forms = halved(body)
    for site in job.sites:
        narrow = replace(forms[site.name], storage="int8", arithmetic=arithmetic) if site.name in forms else None
        if narrow is not None and arithmetic != "float" and declines(site, narrow) is None:
            forms[site.name] = narrow
    walked = run(build(job, forms).proto, feed)
    monkeypatch.setattr(Frontier, "move", still)
    assert_close(walked, run(build(job, forms).proto, feed), 1e-3)


# timing


def test_a_pruned_operator_is_timed_on_the_channels_that_are_left() -> None:
    for body in (RESIDUAL, DEPTHWISE):
        job = job_of(body)
        timer = LatencyPricer(job.model, job.shapes, MicroBench(Cache(None), (CPU,), 1, budget_s=0.002), job.value_shapes)
        for name, form in halved(body).items():
            site = channels_of(job).sites[name]
            micro = timer._micro(site, form)
            assert [value.name for value in micro.graph.input] == [f"{site.use.node.input[0]}-pruned"]
            weights = [tuple(tensor.dims[:2]) for tensor in micro.graph.initializer if len(tensor.dims) > 1]
            assert form.ranks in weights or form.ranks[::-1] in weights
            assert np.isfinite(timer.change(site, form))


# the solver's plans


def menu_of(job: Job, seed: int) -> Menu:
    """Every pruned form at random prices, but for bytes."""
    rng, sizes, found = np.random.default_rng(seed), job.sizes(), channels_of(job)
    candidates = {}
    for site in job.sites:
        forms = [Form("dense", (), "int8"), *(pruned(*ranks, storage=name) for ranks in found.ranks(site) for name in ("float", "int8"))]
        rows = []
        for form in (UNCHANGED, *(form for form in forms if declines(site, form) is None)):
            price, terms = sizes.price(site, form), found.terms(site, form)
            costs = (0.0, 0.0) if form == UNCHANGED else (-float(rng.random()), float(rng.random()))
            bytes_ = price.size_bytes - terms.saved_bytes
            rows.append(Candidate(form, bytes_, *costs, 0.0, price.shared, terms.provides, terms.requires))
        candidates[site.name] = tuple(rows)
    shared = {**found.resources(), **{name: Cost(size) for name, size in sizes.shared.items()}}
    return Menu(job.original.sha256, candidates, Cost(sizes.base_bytes, 100.0, 0.0), shared, "relative_mse")


@st.composite
def networks(draw: st.DrawFn) -> onnx.ModelProto:
    """A few convolutions in a row, some of them residual or depthwise, then a linear layer."""
    weights: dict[str, Array] = {}
    body, value, width, image = "", "x", 3, 6
    for number in range(draw(st.integers(2, 4))):
        kind = draw(st.sampled_from(["plain", "residual", "depthwise", "norm"])) if number else "plain"
        after = width if kind in ("residual", "depthwise") else draw(st.sampled_from([16, 33, 40]))
        inputs = 1 if kind == "depthwise" else width
        names = [f"w{number}", f"b{number}"] if draw(st.booleans()) else [f"w{number}"]
        weights |= {names[0]: normal(number, after, inputs, 3, 3), **{name: normal(9, after) for name in names[1:]}}
        group = f", group = {after}" if kind == "depthwise" else ""
        body += f"c{number} = Conv <{PAD}{group}> ({value}, {', '.join(names)}) "
        result = f"c{number}"
        if kind == "residual":
            body += f"a{number} = Add (c{number}, {value}) "
            result = f"a{number}"
        if kind == "norm":
            parameters = [f"{word}{number}" for word in ("scale", "shift", "mean", "variance")]
            weights |= {name: np.abs(normal(number + 20, after)) + np.float32(0.5) for name in parameters}
            body += f"a{number} = BatchNormalization (c{number}, {', '.join(parameters)}) "
            result = f"a{number}"
        body += f"r{number} = Relu ({result}) "
        value, width = f"r{number}", after
    pooled = draw(st.booleans())
    body += f"p = {'GlobalAveragePool' if pooled else 'Identity'} ({value}) f = Flatten (p) y = Gemm <transB = 1> (f, head)"
    weights["head"] = normal(30, 12, width * (1 if pooled else image * image))
    return model_of(body, weights)


@settings(max_examples=6, deadline=None)
@given(networks(), st.integers(0, 1000), st.sampled_from(["latency", "size", "error"]))
def test_every_plan_of_the_solver_is_a_valid_model_of_the_predicted_size(proto: onnx.ModelProto, seed: int, minimize: str) -> None:
    feed = images(12)
    job = open_job(proto, feed, Settings())
    menu = menu_of(job, seed)
    limit = int(0.7 * menu.base.size_bytes) if minimize == "error" else None
    forms = choose(menu, Budget(limit, None, None, minimize)).forms  # type: ignore[arg-type]
    channels_of(job).cuts(forms)  # agree
    model = build(job, forms)
    small = valid(model.proto)
    assert len(small.SerializeToString()) == job.sizes().total(forms)
    assert_close(run(small, feed), run(small, feed, optimize=False), 1e-3)  # float32 sums in another order, decoded weights alike


@cache
def analysed() -> tuple[Job, Menu]:
    job = open_job(model_of(RESIDUAL, WEIGHTS[RESIDUAL]), images(), Settings(decompositions=("pruned",), storages=("float",)))
    before = analyse._TIMING_S, analyse.SLOWER
    analyse._TIMING_S, analyse.SLOWER = 0.002, float("inf")  # so tiny a model may well seem slower: what is offered must not depend on it
    try:
        return job, analyse.analyse(job, Cache(None), latency=False)
    finally:
        analyse._TIMING_S, analyse.SLOWER = before


def test_a_size_budget_is_met_by_pruning_what_is_superfluous(tmp_path: Path) -> None:
    job, menu = analysed()
    forms = choose(menu, Budget(0.5 * job.original.size_bytes, None, None, "error")).forms
    assert {"c1", "c2", "c3"} <= {name for name, form in forms.items() if form.decomposition == PRUNED}
    model = build(job, forms)
    assert save(model, tmp_path / "small.onnx", source=None) == job.sizes().total(forms) <= 0.5 * job.original.size_bytes
    valid(model.proto)
    comparison = compare(job.original, model, job.data, job.splits.verify, job.calibration)
    assert comparison.divergence < 0.01  # relative mean square: at most one tenth of the outputs' size
    site, kept = channels_of(job).sites["c2"], forms["c2"].ranks
    assert _kept_channels(site, forms["c2"]) == f"keeps {kept[0]} of 24 inputs and {kept[1]} of 24 outputs; "
    assert _kept_channels(site, UNCHANGED) == ""


def test_a_plan_survives_its_file_and_is_refused_once_it_is_edited_into_a_mix(tmp_path: Path) -> None:
    job, menu = analysed()
    plan = choose(menu, Budget(int(0.5 * menu.base.size_bytes), None, None, "error"))
    path = tmp_path / "plan.json"
    path.write_text(to_json(plan))
    again = read_plan(path)
    assert (again.menu, again.forms) == (plan.menu, plan.forms)
    assert any(candidate.requires for candidate in again.menu.candidates["c2"])
    edited = {**again.forms, "c1": UNCHANGED}
    with pytest.raises(InputError, match="layers disagree about the channels of 'a'"):
        build(job, edited)


def test_every_candidate_names_its_channels_in_every_group() -> None:
    job, menu = analysed()
    found = channels_of(job)
    for name, rows in menu.candidates.items():
        groups = {found.reads.get(name, ("", 0))[0], found.writes.get(name, "")} - {""}
        for row in rows:
            assert {each.split(":")[1] for each in (*row.provides, *row.requires)} == groups
