"""Output metrics: gradients' second moments against sums by hand, and prices against divergences that are measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from intaglio.ops.form import Form
from intaglio.ops.moment import Moment
from intaglio.ops.view import MatrixView
from intaglio.passes import curvature as module
from intaglio.passes.analyse import analyse
from intaglio.passes.build import build
from intaglio.passes.cache import Cache
from intaglio.passes.calibrate import observe
from intaglio.passes.curvature import Curvature, curvatures, measure, output_metrics, projection, total
from intaglio.passes.data import Source, input_specs, open_dataset
from intaglio.passes.divergence import Divergence, Kind, output_kinds
from intaglio.passes.fit import pack
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.load import load
from intaglio.passes.options import Runtime
from intaglio.passes.recall import Finding, Findings
from intaglio.passes.sensitivity import Curve, Sensitivity
from intaglio.passes.sites import find_sites
from tests.models import CASES, Array, classifier, moments, normal, parse, run

FLOAT32 = 1e-4
"""Sums of up to a few hundred products in float32, inside the graph, relative to the largest of them."""

SECOND_ORDER = 0.05
"""Outputs are moved by about a hundredth, so what third order adds is of a few hundredths."""

SCORES = (Kind.LOGITS, Kind.PROBABILITIES, Kind.LOG_PROBABILITIES)


class Basis(np.random.Generator):
    """Yields, in place of normal noise, one unit vector: a projection is linear in the noise, so this shows its columns."""

    def __init__(self, index: int) -> None:
        super().__init__(np.random.PCG64(0))
        self.index = index

    def standard_normal(self, size: tuple[int, ...], *_: object, **__: object) -> Array:  # type: ignore[override]
        return np.eye(1, int(np.prod(size)), self.index).reshape(size)


def columns(kind: Kind, output: Array) -> Array:
    """M with v = M·ε, (entries, entries)."""
    return np.stack([projection(kind, output, Basis(index)).reshape(-1) for index in range(output.size)], axis=1)


def scores(kind: Kind, logits: Array) -> Array:
    """What a model with these logits (classes last, or on axis 1 of images) yields."""
    axis = 1 if logits.ndim > 3 or (logits.ndim == 3 and logits.shape[2] == 1) else -1
    if kind == Kind.PROBABILITIES:
        return np.asarray(scipy.special.softmax(logits, axis))
    return np.asarray(scipy.special.log_softmax(logits, axis)) if kind == Kind.LOG_PROBABILITIES else logits


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 4), (2, 4, 1), (1, 3, 2, 2), (3,)])
def test_projections_have_the_curvature_of_the_divergence(kind: Kind, shape: tuple[int, ...]) -> None:
    logits = normal(1, *shape).astype(np.float64)
    output, moved = scores(kind, logits), scores(kind, logits + 0.01 * normal(2, *shape))
    measured = Divergence((kind,))
    measured.add([output], [moved])
    lost = columns(kind, output).T @ (moved - output).reshape(-1)
    assert 0.5 * float(lost @ lost) / total(kind, output) == pytest.approx(measured.value, rel=SECOND_ORDER)


@pytest.mark.parametrize("kind", SCORES)
def test_classes_that_are_ruled_out_are_not_projected_on(kind: Kind) -> None:
    with np.errstate(divide="ignore"):
        output = {Kind.LOGITS: np.array([[0.0, -np.inf, 1.0]]), Kind.PROBABILITIES: np.array([[0.3, 0.0, 0.7]])}.get(
            kind, np.log([[0.3, 0.0, 0.7]])
        )
    v = projection(kind, output, np.random.default_rng(0))
    assert v[0, 1] == 0
    assert np.isfinite(v).all()
    assert (v[0, [0, 2]] != 0).all()


def measured(proto: onnx.ModelProto, inputs: Source, runtime: Runtime = Runtime(), kind: str = "auto") -> dict[str, Curvature]:  # noqa: B008
    """Curvatures of all sites over all samples."""
    model, data = load(proto), open_dataset(inputs, input_specs(proto))
    sites = find_sites(model).sites
    shapes = observe(model, sites, data.first(1), runtime)
    return measure(model, output_kinds(proto, kind), sites, shapes, data, np.arange(len(data)), runtime)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Array, Array]]:
    """Outputs and the projections that were drawn for them, in order."""
    seen: list[tuple[Array, Array]] = []

    def spy(kind: Kind, output: Array, rng: np.random.Generator) -> Array:
        seen.append((output, projection(kind, output, rng)))
        return seen[-1][1]

    monkeypatch.setattr(module, "projection", spy)
    return seen


ALPHA = {"gemm_trans_b": 0.5, "gemm_trans_a": 3.0, "fused_matmul": 0.5}
OUTPUT_AXIS = {"matmul_left": 1, "gemm_weight_a": 0, "gemm_weight_a_trans_a": 0}
DIRECT = [name for name in CASES if name not in ("conv_transpose", "lstm", "gru", "rnn")]


def by_hand(name: str, view: MatrixView, drawn: list[tuple[Array, Array]]) -> Array:
    """G of a model whose output is that of the site's operator (and a bias): the projection is the gradient."""
    axis = 1 if "conv" in name else OUTPUT_AXIS.get(name, -1)
    rows = [np.moveaxis(v, axis, -1).reshape(-1, view.groups, view.m) for _, v in drawn]
    gram = sum(np.einsum("kgi,kgj->gij", each, each) for each in rows)
    energy = sum(np.square(output.astype(np.float64)).sum() for output, _ in drawn)
    return np.asarray(ALPHA.get(name, 1.0) ** 2 * 2 / energy * gram)


@pytest.mark.parametrize("name", DIRECT)
def test_sums_equal_numpy(name: str, drawn: list[tuple[Array, Array]]) -> None:
    case = CASES[name]
    found = measured(case.proto(), case.inputs)["w"]
    view = find_sites(load(case.proto())).sites[0].use.view
    assert found.reason is None
    expected = by_hand(name, view, drawn)
    np.testing.assert_allclose(found.matrix, expected, rtol=0, atol=FLOAT32 * np.abs(expected).max())


def test_wide_layers_keep_the_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["conv2d_groups"]
    whole = measured(case.proto(), case.inputs)["w"].matrix
    monkeypatch.setattr(module, "LARGEST_OUTPUTS", 7)
    np.testing.assert_allclose(measured(case.proto(), case.inputs)["w"].matrix, np.diagonal(whole, axis1=1, axis2=2), rtol=FLOAT32)


DEEP = "a = MatMul (x, w) b = Tanh (a) logits = MatMul (b, u)"
WEIGHTS = {"w": normal(1, 16, 24) / 8, "u": normal(2, 24, 12) / 3}


def deep(batch: str = "N") -> onnx.ModelProto:
    return parse(f"g (float[{batch}, 16] x) => (float[{batch}, 12] logits) {{ {DEEP} }}", WEIGHTS)


def test_prices_are_the_divergence_of_a_single_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one sample and all projections nothing is approximate but the second order: the explicit Fisher information."""
    x, proto = normal(3, 1, 16), deep("1")
    fisher = dict.fromkeys(WEIGHTS, 0.0)
    for index in range(12):
        monkeypatch.setattr(module, "projection", lambda kind, output, rng, index=index: projection(kind, output, Basis(index)))
        for name, found in measured(proto, {"x": x}).items():
            fisher[name] = fisher[name] + found.matrix
    model = load(proto)
    known = moments(model, find_sites(model), open_dataset({"x": x}, input_specs(proto)))
    for seed, site in enumerate(find_sites(model)):
        weight = site.matrix(WEIGHTS[site.name])
        other = weight + 0.03 * np.abs(weight).mean() * normal(4 + seed, *weight.shape)
        compared = Divergence((Kind.LOGITS,))
        moved = parse(f"g (float[1, 16] x) => (float[1, 12] logits) {{ {DEEP} }}", WEIGHTS | {site.name: site.stored(other)})
        compared.add(*([each.astype(np.float64) for each in run(model, {"x": x})] for model in (proto, moved)))
        predicted = Curvature(fisher[site.name], 1).predicted(known[site.name], weight, other)
        assert predicted == pytest.approx(compared.value, rel=SECOND_ORDER)


def test_gradients_equal_finite_differences(drawn: list[tuple[Array, Array]]) -> None:
    x = normal(3, 5, 16)
    found = measured(deep(), {"x": x})["w"]
    ((_, v),) = drawn
    at, step = x.astype(np.float64) @ WEIGHTS["w"], 1e-5

    def loss(hidden: Array) -> Array:
        return np.asarray((np.tanh(hidden) @ WEIGHTS["u"].astype(np.float64) * v).sum(1))

    g = np.stack([(loss(at + step * unit) - loss(at - step * unit)) / (2 * step) for unit in np.eye(24)], axis=1)
    np.testing.assert_allclose(found.matrix[0], g.T @ g / 5, rtol=0, atol=FLOAT32 * np.square(g).sum(0).max())
    assert found.samples == 5


@pytest.mark.parametrize(("operator", "kind"), [("Softmax", Kind.PROBABILITIES), ("LogSoftmax", Kind.LOG_PROBABILITIES)])
def test_all_kinds_of_scores_agree(operator: str, kind: Kind) -> None:
    text = f"g (float[N, 16] x) => (float[N, 12] y) {{ {DEEP} y = {operator} <axis = 1> (logits) }}"
    proto = parse(text, WEIGHTS)
    assert output_kinds(proto) == (kind,)
    expected, found = (measured(each, {"x": normal(3, 5, 16)}) for each in (deep(), proto))
    for name in WEIGHTS:
        np.testing.assert_allclose(found[name].matrix, expected[name].matrix, rtol=0, atol=FLOAT32 * np.abs(expected[name].matrix).max())


def test_outputs_share_the_divergence(drawn: list[tuple[Array, Array]]) -> None:
    """Each output counts by its own energy and by their number; an integer output has no gradient."""
    text = """g (float[N, 16] x) => (float[N, 24] y, float[N, 24] z, int64[N, 1] top) {
        y = MatMul (x, w) three = Constant <value = float {3.0}> () z = Mul (y, three) top = ArgMax <axis = 1> (y)
    }"""
    found = measured(parse(text, {"w": normal(1, 16, 24)}), {"x": normal(3, 6, 16)})["w"]
    (y, v), (z, u) = drawn
    g = v * np.sqrt(2 / 3 / np.square(y).sum()) + 3 * u * np.sqrt(2 / 3 / np.square(z).sum())
    np.testing.assert_allclose(found.matrix[0], g.T @ g, rtol=0, atol=FLOAT32 * np.square(g).sum(0).max())


def test_a_model_of_one_sample_a_run_gives_the_same() -> None:
    x = normal(3, 6, 16)
    joined, single = (measured(deep(batch), {"x": x})["w"].matrix for batch in ("N", "1"))
    np.testing.assert_allclose(single, joined, rtol=0, atol=FLOAT32 * np.abs(joined).max())


def test_several_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = {"x": normal(3, 6, 16)}
    whole = measured(deep(), x)
    monkeypatch.setattr(module, "PART_BYTES", 1)
    for name, part in measured(deep(), x).items():
        np.testing.assert_allclose(part.matrix, whole[name].matrix, rtol=0, atol=FLOAT32 * np.abs(part.matrix).max())


# --- what has no metric

BRANCH = """g (float[N, 16] x) => (float[N, 24] y) {
    h = MatMul (x, w) s = ReduceMax <keepdims = 0> (x) zero = Constant <value = float {0.0}> () c = Greater (s, zero)
    y = If (c) <then_branch = t () => (float[N, 24] a) { a = Relu (h) }, else_branch = e () => (float[N, 24] b) { b = Neg (h) }>
}"""
LACKS = BRANCH.replace("y = If", "d = If").replace("Neg (h) }>", "Neg (h) }> y = Add (h, d)")
TOP = "g (float[N, 16] x) => (int64[N, 1] y) { h = MatMul (x, w) y = ArgMax <axis = 1> (h) }"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BRANCH, "no gradient through If"),
        (LACKS, "no gradient through If"),
        (TOP, "no output depends on it"),
    ],
)
def test_sites_without_a_whole_gradient_keep_the_reason(text: str, reason: str) -> None:
    found = measured(parse(text, {"w": normal(1, 16, 24)}), {"x": normal(3, 6, 16)})["w"]
    assert reason in (found.reason or "")
    assert found.metric() is None


@pytest.mark.parametrize(("name", "site"), [("conv_transpose", "w"), ("lstm", "w"), ("lstm", "r"), ("rnn", "w")])
def test_operators_that_do_more_than_multiply_are_declined(name: str, site: str) -> None:
    case = CASES[name]
    assert "something else than the product" in (measured(case.proto(), case.inputs)[site].reason or "")


def test_a_model_that_does_not_fit_in_memory_is_declined() -> None:
    found = measured(deep(), {"x": normal(3, 6, 16)}, Runtime(memory_limit_bytes=100))
    assert {each.reason for each in found.values()} == {"the model is too large to be differentiated in memory"}


# --- metrics


@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 6), st.integers(1, 40), st.booleans())
def test_metrics_are_positive_definite_with_a_mean_of_one(seed: int, groups: int, m: int, samples: int, diagonal: bool) -> None:
    g = np.random.default_rng(seed).standard_normal((groups, 2, m)) * 1e-4
    matrix = np.einsum("gki,gkj->gij", g, g)
    metric = Curvature(np.diagonal(matrix, axis1=1, axis2=2) if diagonal else matrix, samples).metric()
    assert metric is not None
    assert metric.diag.mean() == pytest.approx(1)
    share = 1 - module.TRUST * samples / (0.1 * m + samples)
    smallest = metric.diag.min() if diagonal else np.linalg.eigvalsh(metric.matrix).min()
    assert smallest >= share * (1 - 1e-9)  # rounding of the eigenvalues


def test_an_output_that_reaches_nothing_has_no_metric() -> None:
    assert Curvature(np.zeros((1, 3, 3)), 5).metric() is None


def test_a_price_is_half_the_weighed_energy() -> None:
    matrix, inputs = np.array([[[2.0, 1.0], [1.0, 3.0]]]), Moment(np.array([[[1.0, 0.5], [0.5, 2.0]]]), 9)
    weight, change = np.zeros((1, 2, 2)), np.array([[[1.0, -1.0], [2.0, 0.0]]])
    expected = 0.5 * np.trace(matrix[0] @ change[0] @ inputs.matrix[0] @ change[0].T)
    assert Curvature(matrix, 9).predicted(inputs, weight, -change) == pytest.approx(expected, rel=1e-12)


# --- a job


def job_of(curvature: str, decompositions: tuple[str, ...] = (), storages: tuple[str, ...] = ()) -> Job:
    proto, inputs = classifier()
    return open_job(proto, inputs, Settings(labels="labels", curvature=curvature, decompositions=decompositions, storages=storages))


def test_jobs_have_output_metrics_where_they_ask_for_them() -> None:
    plain = Moment.isotropic(1, 512)
    assert output_metrics(job_of("input")).weigh("g", plain) is plain
    job = job_of("both")
    metric = output_metrics(job).weigh("g", plain).outputs
    assert metric is not None
    assert metric.matrix.shape == (1, 48, 48)
    assert curvatures(job) is curvatures(job)


def test_copies_of_a_job_share_what_was_measured() -> None:
    """Presets make one for every plan."""
    job = job_of("both")
    copy = replace(job, slopes={"g": np.zeros((1, 48, 512), np.float32)})
    assert curvatures(copy) is curvatures(job)
    other = replace(job, settings=replace(job.settings, seed=1))
    assert curvatures(other) is not curvatures(job)


def test_a_fixed_batch_larger_than_the_samples_wanted_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLES", 8)
    job = open_job(deep("50"), {"x": normal(3, 200, 16)}, Settings(curvature="both"))
    assert {each.reason for each in curvatures(job).values()} == {None}
    assert {each.samples for each in curvatures(job).values()} == {50}
    assert job.probe().divergence(job.model.proto) == 0


def test_ranks_are_not_spent_on_outputs_that_nobody_reads() -> None:
    """All outputs are alike, but half of them are not read."""
    weights = {"w": normal(5, 32, 16), "u": np.vstack([normal(1, 8, 32), np.zeros((8, 32), np.float32)])}
    proto = parse("g (float[N, 32] x) => (float[N, 32] y) { h = MatMul (x, w) y = MatMul (h, u) }", weights)
    job = open_job(proto, {"x": normal(2, 200, 32)}, Settings(curvature="both"))
    site = next(site for site in job.sites if site.name == "w")
    plain = Moment.isotropic(1, 32)
    lost = {}
    for name, moment in {"input": plain, "both": output_metrics(job).weigh("w", plain)}.items():
        _, fitted = pack(site, Form("lowrank", (8,), "float", "dense"), site.value(job.model), moment)
        lost[name] = job.probe().replaced(site, site.stored(fitted))
    assert lost["both"] < 0.5 * lost["input"]


def test_both_sides_give_a_menu_and_a_model() -> None:
    job = job_of("both", decompositions=("dense", "lowrank"), storages=("float", "int4"))
    menu = analyse(job, Cache(None), latency=False)
    form = Form("lowrank", (16,), "int4", "dense")
    row = next(row for row in menu.candidates["g"] if row.form == form)
    lost = job.probe().divergence(build(job, {"g": form}).proto)
    assert lost / 4 < row.divergence < lost * 4  # a curve through a few trials, and the fit is refined on all samples


def test_findings_are_kept_apart(tmp_path: Path) -> None:
    cache, jobs = Cache(tmp_path), {name: job_of(name) for name in ("input", "both")}
    known = {name: Findings(job, job.settings.allowed(), cache) for name, job in jobs.items()}
    known["input"].put("g", Finding((), Sensitivity(Curve(()), Curve(()))))
    assert known["input"].get("g") is not None
    assert known["both"].get("g") is None
