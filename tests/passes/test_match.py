"""Matching: the target is the least-squares one, held-out samples decide, and compressed models come nearer to the original's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.form import PRUNED, Form
from intaglio.ops.moment import Moment, OutputMetric
from intaglio.passes import match as module
from intaglio.passes.build import build, finish, fit_forms
from intaglio.passes.calibrate import Pair
from intaglio.passes.frontier import Frontier
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.load import load
from intaglio.passes.match import centred, levels, matchable, matched, mean_shift, pooled
from intaglio.passes.model import Model
from intaglio.passes.options import Runtime
from intaglio.passes.rewrite import declines
from intaglio.passes.sites import find_sites
from tests.models import CASES, Array, normal, parse, run

EXACT = 1e-6
"""Of the largest entry: double precision, a ridge of 1e-12, and condition numbers of at most some thousand."""

NEARLY_NO_RIDGE = (1e-12,)


def pair_of(reference: Array, current: Array) -> Pair:
    """Of rows (groups, rows, p) and (groups, rows, n)."""
    rows = reference.shape[1]
    moment = Moment(current.transpose(0, 2, 1) @ current / rows, rows, current.mean(1))
    return Pair(moment, reference.transpose(0, 2, 1) @ current / rows, reference.mean(1))


def rows_of(seed: int, groups: int, rows: int, p: int, n: int) -> tuple[Array, Array]:
    """Inputs of a reference, and of a model in which they are mixed, shifted and disturbed."""
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal((groups, rows, p)) + rng.standard_normal((groups, 1, p))
    mixed = reference @ rng.standard_normal((groups, p, n)) + rng.standard_normal((groups, 1, n))
    return reference, mixed + 0.3 * rng.standard_normal((groups, rows, n))


@given(
    groups=st.integers(1, 3), m=st.integers(1, 5), p=st.integers(1, 6), n=st.integers(1, 6), free=st.booleans(), seed=st.integers(0, 999)
)
@settings(max_examples=40, deadline=None)
def test_the_target_is_the_least_squares_weight(groups: int, m: int, p: int, n: int, free: bool, seed: int) -> None:
    """With an intercept where the mean is free, whatever the start and the metric of outputs."""
    reference, current = rows_of(seed, groups, 80, p, n)
    rng = np.random.default_rng(seed + 1)
    weight, start = rng.standard_normal((groups, m, p)), 9 * rng.standard_normal((groups, m, n))  # a start that anything improves
    outputs = OutputMetric(np.abs(rng.standard_normal((groups, m))) + 0.1)
    folds = [pair_of(reference[:, part], current[:, part]) for part in (slice(0, 40), slice(40, 80))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "RIDGES", NEARLY_NO_RIDGE)
        found = matched(weight, start, folds, free_mean=free, outputs=outputs)
    assert found is not None
    for group in range(groups):
        inputs = np.hstack([current[group], np.ones((80, 1))]) if free else current[group]
        exact = np.linalg.lstsq(inputs, reference[group] @ weight[group].T, rcond=None)[0].T[:, :n]
        np.testing.assert_allclose(found[group], exact, rtol=0, atol=EXACT * max(1.0, np.abs(exact).max()))


def test_the_mean_of_the_output_is_the_originals() -> None:
    reference, current = rows_of(1, 2, 50, 4, 3)
    weight, other = normal(2, 2, 5, 4).astype(np.float64), normal(3, 2, 5, 3).astype(np.float64)
    folds = [pair_of(reference[:, part], current[:, part]) for part in (slice(0, 11), slice(11, 50))]
    shifted = current @ other.transpose(0, 2, 1) + mean_shift(weight, other, folds)[:, None]
    np.testing.assert_allclose(shifted.mean(1), (reference @ weight.transpose(0, 2, 1)).mean(1), atol=1e-12)  # sums of doubles


def test_folds_together_are_all_rows() -> None:
    reference, current = rows_of(1, 2, 50, 4, 3)
    whole, cut = pair_of(reference, current), (slice(0, 11), slice(11, 50))
    both = pooled([pair_of(reference[:, part], current[:, part]) for part in cut])
    assert both.moment.rows == 50
    assert both.moment.mean is not None
    found = both.moment.matrix, both.cross, both.mean, both.moment.mean
    for one, other in zip(found, (whole.moment.matrix, whole.cross, whole.mean, current.mean(1)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)  # sums of doubles


def test_centred_pairs_are_covariances() -> None:
    reference, current = rows_of(1, 2, 50, 4, 3)
    found = centred(pair_of(reference, current))
    exact = pair_of(reference - reference.mean(1, keepdims=True), current - current.mean(1, keepdims=True))
    np.testing.assert_allclose(found.moment.matrix, exact.moment.matrix, atol=1e-12)  # sums of doubles
    np.testing.assert_allclose(found.cross, exact.cross, atol=1e-12)


def test_inputs_that_are_the_same_need_no_other_weight() -> None:
    reference, _ = rows_of(1, 1, 60, 5, 5)
    folds = [pair_of(part, part) for part in (reference[:, :30], reference[:, 30:])]
    weight = normal(2, 1, 3, 5).astype(np.float64)
    found = matched(weight, weight, folds, free_mean=True)
    assert found is None or np.abs(found - weight).max() < 1e-12  # rounding of differences that are zero


def test_what_one_half_suggests_and_the_other_denies_is_left() -> None:
    """Errors along the input in one half of the samples and against it in the other."""
    _, current = rows_of(1, 1, 60, 5, 5)
    weight = normal(2, 1, 3, 5).astype(np.float64)
    folds = [pair_of(scale * current, current) for scale in (1.1, 0.9)]
    assert matched(weight, weight, folds, free_mean=False) is None


def test_a_single_part_of_the_samples_suggests_nothing() -> None:
    reference, current = rows_of(1, 1, 60, 5, 5)
    weight = normal(2, 1, 3, 5).astype(np.float64)
    assert matched(weight, weight, [pair_of(reference, current)], free_mean=False) is None


def test_fewer_rows_than_inputs_do_not_lead_astray() -> None:
    """Noise that does not depend on the input: the ridge and the held-out half leave little of what it suggests."""
    rng = np.random.default_rng(0)
    current = rng.standard_normal((1, 40, 100))
    reference = current + 0.3 * rng.standard_normal(current.shape)
    weight = rng.standard_normal((1, 4, 100))
    found = matched(weight, weight, [pair_of(reference[:, half::2], current[:, half::2]) for half in range(2)], free_mean=True)
    moved = 0.0 if found is None else float(np.square(found - weight).sum())
    assert moved <= 0.1 * 0.3**2 * float(np.square(weight).sum())  # a tenth of what separates the outputs for good


TWO = "g (float[N, 16] x) => (float[N, 24] y, float[N, 24] z) { h = MatMul (x, a) r = Relu (h) y = MatMul (r, b) z = MatMul (x, c) }"


def test_levels_hold_sites_that_do_not_read_each_other() -> None:
    text = """g (float[N, 16] x) => (float[N, 16] y) {
        q = MatMul (x, a) k = MatMul (x, b) s = Add (q, k) h = MatMul (s, c) r = Add (h, x)
        u = MatMul (r, d) v = MatMul (r, e) y = Add (u, v)
    }"""
    model = load(parse(text, {name: normal(number, 16, 16) for number, name in enumerate("abcde")}))
    assert [[site.name for site in level] for level in levels(model.proto, find_sites(model).sites)] == [["a", "b"], ["c"], ["d", "e"]]


@pytest.mark.parametrize(("name", "expected"), [("matmul", True), ("conv2d_groups", True), ("conv_transpose", True), ("gather", False)])
def test_which_operators_are_matched(name: str, expected: bool) -> None:
    model = load(CASES[name].proto())
    assert matchable(next(site for site in find_sites(model) if site.name == "w")) is expected


def test_tied_weights_are_not_matched() -> None:
    text = "g (float[N, 16] x) => (float[N, 16] y) { h = MatMul (x, a) y = MatMul (h, a) }"
    (site,) = find_sites(load(parse(text, {"a": normal(1, 16, 16)})))
    assert not matchable(site)


# in models

PAD = "pads = [1, 1, 1, 1]"
CONVOLUTIONS = f"""g (float[N, 4, 8, 8] x) => (float[N, Z] y) {{
    a = Conv <{PAD}> (x, c1, b1) ra = Relu (a)
    b = Conv <{PAD}, strides = [2, 2], group = 2> (ra, c2, b2) rb = Relu (b)
    d = Conv <{PAD}, group = 32> (rb, dw, b3) rd = Relu (d)
    e = Conv (rd, c3, b4) p = GlobalAveragePool (e) f = Flatten (p) y = Gemm <transB = 1> (f, head, b5)
}}"""
PRODUCTS = """g (float[N, 24] x) => (float[N, 12] y) {
    a = MatMul (x, w1) ab = Add (a, b1) r = Relu (ab)
    c = MatMul (r, w2) cb = Add (c, b2) s = Relu (cb) y = Gemm (s, w3, b3)
}"""


def convolutions() -> tuple[onnx.ModelProto, dict[str, Array]]:
    weights = {
        "c1": normal(1, 16, 4, 3, 3),
        "b1": normal(2, 16),
        "c2": normal(3, 32, 8, 3, 3),
        "b2": normal(4, 32),
        "dw": normal(5, 32, 1, 3, 3),
        "b3": normal(6, 32),
        "c3": normal(7, 24, 32, 1, 1),
        "b4": normal(8, 24),
        "head": normal(9, 12, 24),
        "b5": normal(10, 12),
    }
    return parse(CONVOLUTIONS, weights), {"x": normal(11, 160, 4, 8, 8) * 3}


def products() -> tuple[onnx.ModelProto, dict[str, Array]]:
    weights = {"w1": normal(1, 24, 40), "b1": normal(2, 40), "w2": normal(3, 40, 32), "b2": normal(4, 32), "w3": normal(5, 32, 12)}
    return parse(PRODUCTS, {**weights, "b3": normal(6, 12)}), {"x": normal(7, 800, 24) * 3}


MODELS = {"convolutions": convolutions, "products": products}


@cache
def job_of(name: str) -> Job:
    return open_job(*MODELS[name](), Settings())


def errors(job: Job, forms: Mapping[str, Form], data: Mapping[str, Array]) -> list[float]:
    """Mean square error of the outputs on samples that nothing was fitted on, without and with matching."""
    held = {"x": data["x"][job.splits.verify]}
    (exact,) = run(job.original.proto, held)
    outputs = [run(finish(job, forms, fit_forms(job, forms, match=match)).proto, held)[0] for match in (False, True)]
    return [float(np.square(output - exact).mean()) for output in outputs]


def narrow(job: Job, storage: str) -> dict[str, Form]:
    return {site.name: Form("dense", (), storage, "dense") for site in job.sites}


@pytest.mark.parametrize("name", MODELS)
def test_a_later_layer_makes_good_what_an_earlier_one_lost(name: str) -> None:
    """The first layer in 2 bits; the others in half precision, which by itself changes next to nothing."""
    job, (_, data) = job_of(name), MODELS[name]()
    first, *rest = job.sites
    forms = {first.name: Form("dense", (), "int2", "dense")} | {site.name: Form("dense", (), "fp16", "dense") for site in rest}
    without, matching = errors(job, forms, data)
    assert matching < 0.8 * without  # more than noise: hundreds of samples, and most of the loss lies along the inputs


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_all_lose_come_nearer_to_the_outputs(name: str) -> None:
    job, (_, data) = job_of(name), MODELS[name]()
    without, matching = errors(job, narrow(job, "int3"), data)
    assert matching < without


@pytest.mark.parametrize("name", MODELS)
def test_the_mean_of_the_outputs_is_the_originals(name: str) -> None:
    """On the samples that it was taken from."""
    job, (_, data) = job_of(name), MODELS[name]()
    forms, seen = narrow(job, "int3"), {"x": data["x"][job.splits.fit]}
    (exact,), (found,) = (run(model.proto, seen) for model in (job.original, finish(job, forms, fit_forms(job, forms))))
    np.testing.assert_allclose(found.mean(0), exact.mean(0), atol=1e-4 * np.abs(exact).max())  # float32 sums


def initializers(job: Job, forms: Mapping[str, Form], *, match: bool = True) -> dict[str, bytes]:
    proto = finish(job, forms, fit_forms(job, forms, match=match)).proto
    return {tensor.name: tensor.SerializeToString() for tensor in proto.graph.initializer}


def test_layers_that_read_what_nothing_has_changed_are_fitted_to_themselves() -> None:
    proto = parse(TWO, {"a": normal(1, 16, 16), "b": normal(2, 16, 24), "c": normal(3, 16, 24)})
    job = open_job(proto, {"x": normal(4, 90, 16)}, Settings())
    forms = {name: Form("dense", (), "int3", "dense") for name in ("a", "c")}
    assert initializers(job, forms) == initializers(job, forms, match=False)


def test_models_that_do_not_fit_in_memory_twice_are_fitted_to_themselves() -> None:
    job = open_job(*products(), Settings(runtime=Runtime(memory_limit_bytes=1)))
    forms = narrow(job, "int3")
    assert initializers(job, forms) == initializers(job, forms, match=False)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_samples_give_the_same_model(name: str) -> None:
    job, again = job_of(name), open_job(*MODELS[name](), Settings())
    assert initializers(job, narrow(job, "int3")) == initializers(again, narrow(again, "int3"))


def pruned(*ranks: int, storage: str = "float") -> Form:
    return Form(PRUNED, ranks, storage, "contract")


PRUNED_BODY = CONVOLUTIONS.replace(", group = 2>", ">")


@cache
def pruned_job() -> Job:
    proto, data = convolutions()
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    return open_job(parse(PRUNED_BODY, {**weights, "c2": normal(3, 32, 16, 3, 3)}), data, Settings(storages=("float", "int4", "int8")))


@pytest.mark.parametrize("storage", ["float", "int4"])
def test_pruned_layers_make_good_what_those_before_have_lost(storage: str) -> None:
    """Depthwise ones and those of all channels between them too."""
    job = pruned_job()
    forms = {
        "c1": pruned(4, 8, storage=storage),
        "c2": pruned(8, 16, storage=storage),
        "dw": pruned(1, 16, storage=storage),
        "c3": pruned(16, 12, storage=storage),
        "head": pruned(12, 12, storage=storage),
    }
    without, matching = errors(job, forms, convolutions()[1])
    assert matching < 0.9 * without  # more than noise: thousands of positions


def test_layers_with_all_channels_are_fitted_in_the_pruned_model() -> None:
    """The last layer makes good what the pruned ones have lost."""
    proto, data = products()
    job = open_job(proto, data, Settings(decompositions=("dense", "pruned"), storages=("int2", "fp16")))
    forms = {"w1": pruned(24, 20, storage="int2"), "w2": pruned(20, 32, storage="int2"), "w3": Form("dense", (), "fp16", "dense")}
    without, matching = errors(job, forms, data)
    assert matching < 0.9 * without  # more than noise: hundreds of rows


def test_pruning_keeps_the_mean_of_the_outputs() -> None:
    job = pruned_job()
    forms = {"c1": pruned(4, 8), "c2": pruned(8, 16), "dw": pruned(1, 16), "c3": pruned(16, 12), "head": pruned(12, 12)}
    seen = {"x": convolutions()[1]["x"][job.splits.fit]}
    (exact,), (found,) = (run(model.proto, seen) for model in (job.original, finish(job, forms, fit_forms(job, forms))))
    np.testing.assert_allclose(found.mean(0), exact.mean(0), atol=1e-4 * np.abs(exact).max())  # float32 sums


# what is held


def still(frontier: Frontier, model: Model, *_: object) -> None:
    """Stands for `Frontier.move`: hold nothing, and run everything from the model's inputs."""
    frontier._model = model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", [Form("dense", (), "int4"), Form("lowrank", (6,), "float", "contract")], ids=str)
def test_held_values_are_those_of_the_model_as_it_is(name: str, form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    job, (_, data) = job_of(name), MODELS[name]()
    forms = {site.name: form for site in job.sites if declines(site, form) is None}
    walked = run(build(job, forms).proto, data)[0]
    monkeypatch.setattr(Frontier, "move", still)
    np.testing.assert_allclose(walked, run(build(job, forms).proto, data)[0], rtol=0, atol=1e-3 * float(np.abs(walked).max()))
