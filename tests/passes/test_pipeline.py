"""The whole path on small models: budgets hold on what is written, and the same input gives the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from intaglio.ops.form import CARRIED, UNCHANGED, Form
from intaglio.passes import pipeline
from intaglio.passes.analyse import analyse
from intaglio.passes.budget import Request
from intaglio.passes.build import build
from intaglio.passes.cache import Cache
from intaglio.passes.errors import InfeasibleError, InputError, LateError, VerificationError
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.latency import PairedLatency
from intaglio.passes.loading import Loading
from intaglio.passes.model import Model
from intaglio.passes.pipeline import Outcome, compress_job, solve_and_build, verified
from intaglio.passes.plan import Menu, read_plan, to_json
from intaglio.passes.propose import expands
from intaglio.passes.report import report
from intaglio.passes.save import save
from intaglio.passes.sites import Site
from intaglio.passes.timing import LatencyPricer
from intaglio.passes.verify import compare
from intaglio.solver import Budget
from tests.models import CASES, Array, classifier, normal, operators, optimized, parse, run
from tests.passes.test_build import MODELS
from tests.passes.test_sites import nested


@cache
def analysed(samples: int = 90) -> tuple[Job, Menu]:
    proto, arrays = classifier(samples)
    job = open_job(proto, arrays, Settings(labels="labels"))
    return job, analyse(job, Cache(None), latency=False)


def written(outcome: Outcome, folder: Path) -> Path:
    path = folder / "small.onnx"
    assert save(outcome.model, path, source=None) == outcome.size_bytes == outcome.predicted_bytes
    return path


def unused_upgrades(outcome: Outcome, limit: float) -> list[tuple[str, str]]:
    """Changes of a single site that would have lowered the predicted divergence noticeably and still kept the size budget."""
    programs_bytes = sum(cost.size_bytes for cost in outcome.plan.menu.shared.values())
    left = limit - outcome.predicted_bytes - programs_bytes  # as if every program had to be added
    found = []
    for site, candidates in outcome.plan.menu.candidates.items():
        chosen = outcome.plan.candidate(site)
        assert chosen is not None
        worth = 0.01 * sum(c.divergence for name in outcome.plan.forms if (c := outcome.plan.candidate(name)) is not None)
        for other in candidates:
            fits = other.size_bytes - chosen.size_bytes <= left and other.latency_s <= chosen.latency_s
            if fits and other.divergence < chosen.divergence - worth:
                found.append((site, str(other.form)))
    return found


@pytest.mark.parametrize("size", [0.5, 0.26, 0.15])
def test_a_size_budget_holds_on_the_written_file(size: float, tmp_path: Path) -> None:
    job, menu = analysed()
    outcome = solve_and_build(job, menu, Request(size=size))
    limit = size * job.original.size_bytes
    path = written(outcome, tmp_path)
    assert path.stat().st_size <= limit
    assert unused_upgrades(outcome, limit) == []  # what is allowed is used
    assert outcome.meets
    onnx.checker.check_model(path, full_check=True)
    assert outcome.comparison.samples == len(job.splits.verify)
    assert outcome.comparison.unit == "kl_nats"
    if size > 0.25:  # int8 everywhere fits
        assert outcome.comparison.divergence < 0.01
        assert outcome.comparison.candidate_metric == pytest.approx(outcome.comparison.reference_metric, abs=1)


def test_a_larger_budget_is_never_worse() -> None:
    job, menu = analysed()
    predicted = [solve_and_build(job, menu, Request(size=size)).plan.divergence for size in (0.6, 0.3, 0.12)]
    assert predicted == sorted(predicted)


def test_an_error_budget_holds_on_samples_that_took_no_part() -> None:
    job, menu = analysed(400)  # a few dozen samples do not tell the divergence of others
    outcome = solve_and_build(job, menu, Request(error=0.05))
    assert outcome.comparison.divergence <= 0.05
    assert outcome.choose_divergence <= 0.05
    assert outcome.size_bytes < 0.3 * job.original.size_bytes
    assert outcome.plan.budget.minimize == "size"


def test_size_and_error_together() -> None:
    job, menu = analysed()
    outcome = solve_and_build(job, menu, Request(size=0.3, error=0.1))
    assert outcome.size_bytes <= 0.3 * job.original.size_bytes
    assert outcome.comparison.divergence <= 0.1


def test_an_impossible_budget_names_a_possible_one() -> None:
    job, menu = analysed()
    with pytest.raises(InfeasibleError, match=r"nearest feasible: --size \d+B"):
        solve_and_build(job, menu, Request(size=0.001))
    with pytest.raises(InfeasibleError, match=r"nearest feasible: --size .* or --error"):
        solve_and_build(job, menu, Request(size=0.1, error=1e-6))


def test_nothing_changes_when_nothing_must(tmp_path: Path) -> None:
    job, menu = analysed()
    outcome = solve_and_build(job, menu, Request(size="1MB"))
    assert set(outcome.plan.forms.values()) == {UNCHANGED}
    assert outcome.comparison.divergence < 1e-9  # canonicalization may reorder float sums
    onnx.checker.check_model(written(outcome, tmp_path))


def test_a_saved_plan_is_solved_again_without_another_look_at_the_model(tmp_path: Path) -> None:
    job, menu = analysed()
    first = solve_and_build(job, menu, Request(size=0.3))
    path = tmp_path / "plan.json"
    path.write_text(to_json(first.plan), encoding="utf-8")
    again = solve_and_build(job, read_plan(path).menu, Request(size=0.3))
    assert again.plan.forms == first.plan.forms


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    proto, arrays = classifier(60)
    contents = []
    for number in range(2):
        outcome = compress_job(open_job(proto, arrays, Settings(labels="labels", seed=3)), Request(size=0.2))
        folder = tmp_path / str(number)
        folder.mkdir()
        contents.append(written(outcome, folder).read_bytes())
    assert contents[0] == contents[1]


FEW = ("float", "int8")
"""Storages for tests of latency, which does not depend on them: pricing all of them takes long."""


def low_rank_layers() -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Two wide layers of rank 8 over 64 rows: contracting them saves most of the work and loses nothing."""
    weights = {name: normal(i, 512, 8) @ normal(i + 10, 8, 512) * 8 for i, name in enumerate("ab")}
    text = "g (float[N, 64, 512] x) => (float[N, 64, 512] y) { h = MatMul (x, a) r = Relu (h) y = MatMul (r, b) }"
    return parse(text, weights), {"x": normal(5, 16, 64, 512)}


def test_latency_is_minimized_within_an_error_budget() -> None:
    proto, arrays = low_rank_layers()
    outcome = compress_job(open_job(proto, arrays, Settings(storages=FEW, arithmetics=("float",))), Request(error=0.01, minimize="latency"))
    assert {form.execution for form in outcome.plan.forms.values()} == {"contract"}
    assert outcome.latency is not None
    assert outcome.latency.ratio < 0.9
    assert outcome.plan.latency_s < outcome.plan.menu.base.latency_s
    assert outcome.comparison.divergence <= 0.01


def test_a_latency_budget_that_holds_already_changes_nothing() -> None:
    """A ratio that only just holds would measure the machine, so the budget here is generous."""
    proto, arrays = low_rank_layers()
    outcome = compress_job(open_job(proto, arrays, Settings(decompositions=("lowrank",), storages=FEW)), Request(latency="10s"))
    assert set(outcome.plan.forms.values()) == {UNCHANGED}
    assert outcome.latency is not None
    assert outcome.meets


def test_a_latency_budget_beyond_reach_is_infeasible() -> None:
    proto, arrays = low_rank_layers()
    with pytest.raises(InfeasibleError, match=r"nearest feasible: --latency [\d.]+ms"):
        compress_job(open_job(proto, arrays, Settings(storages=FEW)), Request(latency=1e-4))


def sequences() -> Iterator[dict[str, Array]]:
    for i, length in enumerate((3, 7, 5, 4, 9, 3, 6, 8)):
        yield {"x": normal(i, 1, length, 16)}


def test_sequences_of_different_length_from_a_generator() -> None:
    weights = {"a": normal(1, 16, 64), "b": normal(2, 64, 16)}
    text = "g (float[N, S, 16] x) => (float[N, S, 16] y) { h = MatMul (x, a) r = Relu (h) y = MatMul (r, b) }"
    outcome = compress_job(open_job(parse(text, weights), sequences(), Settings()), Request(size=0.4))
    assert outcome.comparison.unit == "relative_mse"
    assert outcome.comparison.divergence < 0.01
    assert [d.dim_param for d in outcome.model.proto.graph.input[0].type.tensor_type.shape.dim][:2] == ["N", "S"]


def test_several_inputs_and_outputs() -> None:
    text = """g (float[N, 16] x, float[N, 24] z) => (float[N, 32] logits, float[N, 32] y) {
        logits = Gemm (x, a) h = MatMul (z, b) y = Add (h, logits)
    }"""
    proto = parse(text, {"a": normal(1, 16, 32), "b": normal(2, 24, 32)})
    data = {"x": normal(3, 30, 16), "z": normal(4, 30, 24)}
    outcome = compress_job(open_job(proto, data, Settings()), Request(size=0.5))
    assert [value.name for value in outcome.model.proto.graph.output] == ["logits", "y"]
    assert outcome.comparison.agreement is not None
    assert outcome.comparison.unit == "relative_mse"
    (logits, y) = run(outcome.model.proto, {name: array[:3] for name, array in data.items()})
    assert logits.shape == y.shape == (3, 32)


@pytest.mark.parametrize(("opset", "ir_version"), [(8, 3), (13, 7), (21, 10)])
@pytest.mark.parametrize("name", ["conv2d", "lstm", "gather", "gemm_weight_a"])
def test_operators_of_old_and_new_models(name: str, opset: int, ir_version: int, tmp_path: Path) -> None:
    case = CASES[name]
    proto = case.proto(opset=opset, ir_version=ir_version)
    outcome = compress_job(open_job(proto, case.inputs, Settings()), Request(error=0.02))
    assert outcome.size_bytes < outcome.job.original.size_bytes
    assert outcome.comparison.divergence <= 0.02
    onnx.checker.check_model(written(outcome, tmp_path), full_check=True)


def test_branches_are_compressed_too(tmp_path: Path) -> None:
    proto = nested(normal(1, 16, 24))
    job = open_job(proto, {"x": normal(2, 12, 16), "c": np.array(True)}, Settings())
    outcome = compress_job(job, Request(size=0.6))
    assert any(form != UNCHANGED for form in outcome.plan.forms.values())
    onnx.checker.check_model(written(outcome, tmp_path), full_check=True)


def test_only_what_is_included_changes() -> None:
    proto, arrays = classifier(60)
    job = open_job(proto, arrays, Settings(labels="labels", include=("^g$",), storages=("int8",), decompositions=("dense",)))
    assert [site.name for site in job.sites] == ["g"]
    assert {skip.name for skip in job.excluded} == {"c1", "c2", "c3", "head"}
    outcome = compress_job(job, Request(size=0.5))
    assert outcome.plan.forms == {"g": Form("dense", (), "int8")}


@pytest.mark.parametrize(
    ("forms", "words"),
    [
        ({"nowhere": Form("dense", (), "int8")}, "site 'nowhere' is not in the model"),
        ({"g": Form("tucker2", (4, 4), "float", "contract")}, "site 'g' cannot take .*: not a convolution kernel"),
        ({"g": Form("lowrank", (4000,), "float", "contract")}, r"site 'g' cannot take .*rank"),
        ({"g": Form("lowrank", (4, 4), "float", "contract")}, r"site 'g' cannot take .*rank"),
        ({"g": Form("lowrank", (), "float", "contract")}, r"site 'g' cannot take .*rank"),
        ({"g": Form("dense", (4,), "int8")}, r"site 'g' cannot take .*rank"),
    ],
)
def test_plans_that_do_not_fit_the_model_are_refused(forms: dict[str, Form], words: str) -> None:
    with pytest.raises(InputError, match=words):
        build(analysed()[0], forms)


def test_building_leaves_the_job_as_it_was() -> None:
    job, menu = analysed()
    before = job.model.proto.SerializeToString(deterministic=True)
    solve_and_build(job, menu, Request(size=0.2))
    assert job.model.proto.SerializeToString(deterministic=True) == before


def test_a_weight_that_is_not_finite_does_not_keep_the_others_from_shrinking() -> None:
    broken = normal(1, 16, 24)
    broken[0, 0] = np.inf
    proto = parse(
        "g (float[N, 16] x) => (float[N, 24] y) { h = MatMul (x, w) z = Sigmoid (h) y = MatMul (z, v) }",
        {"w": broken, "v": normal(2, 24, 24)},
    )
    job = open_job(proto, {"x": normal(3, 20, 16)}, Settings())
    outcome = compress_job(job, Request(size=0.9))
    assert set(outcome.plan.forms) == {"v"}
    assert [skip.name for skip in job.sites.skipped] == ["w"]


def overflowing() -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model whose outputs come close to the largest float32, e^88.7, on every sample: a coarse weight makes some infinite."""
    x, w = normal(1, 60, 32), normal(2, 32, 48)
    proto = parse(
        "g (float[N, 32] x) => (float[N, 48] y) { h = MatMul (x, w) y = Exp (h) }",
        {"w": w},
    )
    return proto, {"x": x * np.float32(88) / (x @ w).max(1, keepdims=True)}


def test_a_trial_whose_outputs_overflow_does_not_rule_out_finer_forms() -> None:
    menu = analyse(open_job(*overflowing(), Settings()), Cache(None), latency=False)
    storages = {c.form.storage for c in menu.candidates["w"] if c.form.decomposition == "dense"}
    assert "fp16" in storages
    assert "int4" not in storages
    assert all(np.isfinite(c.divergence) for c in menu.candidates["w"])


def test_outputs_that_overflow_lead_to_another_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first plan makes of the choose split is infinitely far off, and the next plan is better."""
    job, menu = analysed()
    first = iter([float("inf")])

    def overflowing_once(*args: object, **options: object) -> object:
        found = compare(*args, **options)  # type: ignore[arg-type]
        return replace(found, divergence=next(first, found.divergence))

    monkeypatch.setattr("intaglio.passes.search.compare", overflowing_once)
    assert solve_and_build(job, menu, Request(error=0.05)).comparison.divergence <= 0.05


@pytest.fixture
def narrow_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which everything narrow takes a tenth of the time, as every clock says: choices then do not depend on the real one."""

    def pair(_: LatencyPricer, site: Site, form: Form) -> tuple[float, float]:
        return 1e-3, 1e-4 if form.arithmetic != "float" else 1e-3

    def whole(_: Job, model: Model, *__: object, **___: object) -> PairedLatency:
        narrow = {"QuantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeLSTM", "MatMulNBits", "GatherBlockQuantized"} & set(
            operators(model.proto)
        )
        looked_up = operators(model.proto)["Gather"] > 1
        ratio = 0.45 if narrow or looked_up else 1.0
        return PairedLatency((np.array([[1e-2, ratio * 1e-2]]),))

    monkeypatch.setattr(LatencyPricer, "pair", pair)
    monkeypatch.setattr(LatencyPricer, "reference", lambda *_: 1e-3)
    monkeypatch.setattr(LatencyPricer, "calibrate", lambda pricer, sites, whole: 1e-3 * len(sites))
    monkeypatch.setattr(LatencyPricer, "calibrate_integers", lambda *_: None)
    monkeypatch.setattr(LatencyPricer, "carry", lambda *_: -1e-5)
    monkeypatch.setattr(LatencyPricer, "boundary", lambda *_: (1e-5, 1e-5))
    for module in ("search", "within"):
        monkeypatch.setattr(f"intaglio.passes.{module}.latency_of", whole)
    monkeypatch.setattr("intaglio.passes.pipeline.measure_loading", lambda *_, **__: Loading(1e-3, 1000))


@pytest.mark.usefixtures("narrow_is_fast")
@pytest.mark.parametrize(
    ("name", "arithmetic", "latency", "kernels"),
    [
        ("convolutions", "integer", 0.5, {"QLinearConv": 1, "QGemm": 1}),
        ("attention", "integer", 0.5, {"MatMulIntegerToFloat": 1}),
        ("attention", "dynamic", 0.5, {"DynamicQuantizeLinear": 1}),
        ("recurrent", "dynamic", 0.5, {"DynamicQuantizeLSTM": 1}),
        ("attention", "nbits", 0.5, {"MatMulNBits": 1}),
        ("attention", "rows", 0.9, {"Gather": 2}),
    ],
)
def test_size_and_latency_budgets_are_kept_by_computing_in_narrow_numbers(
    name: str, arithmetic: str, latency: float, kernels: dict[str, int], tmp_path: Path
) -> None:
    proto, arrays = MODELS[name]()
    chosen = Settings(arithmetics=(arithmetic,), decompositions=("dense",))
    outcome = compress_job(open_job(proto, arrays, chosen), Request(size=0.6, latency=latency))
    path = written(outcome, tmp_path)
    assert outcome.meets
    assert path.stat().st_size <= 0.6 * outcome.job.original.size_bytes
    assert arithmetic in {form.arithmetic for form in outcome.plan.forms.values()}
    assert {form.arithmetic for form in outcome.plan.forms.values()} <= {"float", arithmetic}
    found = operators(optimized(onnx.load(path)))
    assert all(found[kernel] >= least for kernel, least in kernels.items()), found
    assert outcome.comparison.divergence < 0.1
    told = report(outcome)
    assert {site.arithmetic for site in told.sites} == {outcome.plan.forms[site.name].arithmetic for site in told.sites}
    assert told.carriers == tuple(name for name, form in outcome.plan.forms.items() if form == CARRIED)
    assert bool(told.carriers) <= (arithmetic == "integer")
    assert told.loading is not None


@pytest.mark.usefixtures("narrow_is_fast")
def test_nothing_that_expands_is_chosen_where_that_is_not_wanted() -> None:
    proto, arrays = MODELS["convolutions"]()
    outcome = compress_job(open_job(proto, arrays, Settings(decompositions=("dense",), expand=False)), Request(size=0.6, latency=0.5))
    assert any(form.arithmetic == "integer" for form in outcome.plan.forms.values())
    assert not [form for form in outcome.plan.forms.values() if form != CARRIED and expands(form)]


def test_a_model_that_comes_out_late_is_built_again_with_less_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the budget while plans are chosen, 4 % over it in the verdict: the second search has that much less, the verdict the same."""
    job, menu = analysed()
    attempt = SimpleNamespace(model="model", measured=0.0, plan=None)
    budgets, verdicts = [], iter([LateError("late", 1.04), None])

    def within(_: Job, __: Menu, budget: Budget, ___: object) -> object:
        budgets.append(budget.latency_s)
        return attempt, None

    def judged(_: Job, __: object, budget: Budget) -> object:
        budgets.append(budget.latency_s)
        verdict = next(verdicts)
        if verdict is not None:
            raise verdict
        return replace(outcome, plan=None)

    outcome = solve_and_build(job, menu, Request(size=0.5))
    monkeypatch.setattr(pipeline, "_taught_within", within)
    monkeypatch.setattr(pipeline, "_verified", judged)
    solve_and_build(job, menu, Request(latency="1ms"))
    assert budgets == pytest.approx([1e-3, 1e-3, 0.97e-3 / 1.04, 1e-3])


def test_only_lateness_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is too slow and too far off is not."""
    job, menu = analysed()
    slow = PairedLatency((np.array([[1e-2, 2e-2]]), np.array([[1e-2, 1.5e-2]])))
    monkeypatch.setattr(pipeline, "latency_verdict", lambda *_: slow)
    outcome = solve_and_build(job, menu, Request(size=0.5))
    base = replace(menu.base, latency_s=1e-2)
    plan = replace(outcome.plan, menu=replace(menu, base=base))
    for divergence, error in ((None, LateError), (1e-12, VerificationError)):
        with pytest.raises(VerificationError, match=r"latency ratio 1.732 \(measured: 2.000 and 1.500\)") as caught:
            verified(job, plan, Budget(latency_s=1e-2, divergence=divergence), outcome.model, 0.0, 0, timed=True)
        assert type(caught.value) is error
