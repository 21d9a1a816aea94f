"""Which integers operators compute with: what the probe finds out, and what the variants do to a model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import intaglio
from intaglio.ops.form import Form
from intaglio.ops.moment import Moment, relative_error
from intaglio.ops.storage import requantized
from intaglio.passes import kernels
from intaglio.passes.apply import apply_plan
from intaglio.passes.budget import Request
from intaglio.passes.build import build, fit_forms, mock
from intaglio.passes.cache import Cache
from intaglio.passes.check import check_settings
from intaglio.passes.errors import InputError
from intaglio.passes.fit import pack
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.kernels import INTEGERS, Kernels, chosen_integers, exact_variants, find_kernels
from intaglio.passes.latency import Timing
from intaglio.passes.model import Model
from intaglio.passes.plan import read_plan, to_json
from intaglio.passes.propose import Allowed, propose
from intaglio.passes.replan import plan_job, replan
from intaglio.passes.save import save
from intaglio.passes.session import CPU
from tests.models import Array, normal, operators, optimized, parse, run, site_of
from tests.passes.test_build import KERNELS, LOSSES, MODELS, TOLERANCES, forms_in

WORD = 32767
"""The largest number of sixteen bits."""


def processor(proto: onnx.ModelProto, x: Array, saturating: Collection[str]) -> Array:
    """What a processor yields.

    Args:
        proto: a model of products with steps of 1.
        x: its input.
        saturating: the types of activations, "uint8" and "int8", for which it adds pairs of products in sixteen bits; signed ones are made
            unsigned first.
    """
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    types = {node.op_type for node in proto.graph.node}
    codes, weights = (x[0, :, :, 0].T, [arrays["w"][:, :, 0, 0].T]) if "Conv" in types else (x, [arrays["w"]])
    weights += [arrays["b"]] if "Add" in types else []
    kind = "uint8" if "DynamicQuantizeLinear" in types else str(arrays["zero"].dtype)
    sums = sum(_sums(codes.astype(np.int64), weight.astype(np.int64), kind, kind in saturating) for weight in weights)
    if "Conv" not in types:
        return np.asarray(sums, np.float32)
    step = float(arrays["step"])
    return np.ascontiguousarray((np.rint(sums / step) * step).T[None, :, :, None], np.float32)


def _sums(codes: Array, weight: Array, kind: str, saturating: bool) -> Array:
    shift = 128 if kind == "int8" else 0
    pairs = (codes + shift)[:, :, None] * weight
    pairs = pairs[:, ::2] + pairs[:, 1::2]
    pairs = pairs.clip(-WORD - 1, WORD) if saturating else pairs
    return np.asarray(pairs.sum(1) - shift * weight.sum(0))


@pytest.mark.parametrize(
    ("saturating", "exact"),
    [((), ("full", "reduced", "signed")), (("uint8",), ("reduced", "signed")), (("uint8", "int8"), ("reduced",))],
)
def test_the_probe_finds_kernels_that_saturate(saturating: tuple[str, ...], exact: tuple[str, ...]) -> None:
    assert exact_variants(lambda proto, x: processor(proto, x, saturating)) == exact


@pytest.mark.parametrize(
    ("exact", "fastest", "choice"),
    [
        (("full", "reduced", "signed"), "signed", "full"),
        (("reduced", "signed"), "signed", "signed"),
        (("reduced", "signed"), "reduced", "reduced"),
        (("reduced",), "signed", "reduced"),
        (("signed",), "reduced", "signed"),
        ((), "reduced", "reduced"),
    ],
)
def test_what_auto_stands_for(exact: tuple[str, ...], fastest: str, choice: str) -> None:
    assert Kernels(exact, fastest).choice == choice


def test_the_probe_runs_once_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = find_kernels(Cache(tmp_path), (CPU,))
    assert "reduced" in first.exact
    assert chosen_integers("auto", True, Cache(tmp_path), (CPU,)) == first.choice
    monkeypatch.setattr(kernels, "exact_variants", lambda _: ("signed",))
    assert find_kernels(Cache(tmp_path), (CPU,)) == first
    assert find_kernels(Cache(None), (CPU,)).choice == "signed"
    assert chosen_integers("auto", False, Cache(None), (CPU,)) == "full"
    assert chosen_integers("reduced", True, Cache(tmp_path), (CPU,)) == "reduced"


@pytest.mark.parametrize(("signed_s", "choice"), [(1.1, "reduced"), (0.96, "reduced"), (0.94, "signed")])
def test_signed_activations_have_to_be_clearly_faster(signed_s: float, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(runs: Sequence[object]) -> list[Timing]:
        assert len(runs) == 2
        return [Timing(seconds, seconds, np.asarray([seconds])) for seconds in (1.0, signed_s)]

    monkeypatch.setattr(kernels, "exact_variants", lambda _: ("reduced", "signed"))
    monkeypatch.setattr(kernels, "measure", timed)
    assert find_kernels(Cache(None), (CPU,)).choice == choice


def test_what_a_provider_refuses_is_not_exact() -> None:
    def refuse(proto: onnx.ModelProto, x: Array) -> Array:
        if any(node.op_type == "Conv" for node in proto.graph.node):
            raise InputError("no kernel")
        return processor(proto, x, ())

    assert exact_variants(refuse) == ()


def test_nothing_is_probed_where_nothing_computes_in_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where no layer can, nor where a plan says with which."""

    def probed(_: object) -> tuple[str, ...]:
        raise AssertionError("probed")

    monkeypatch.setattr(kernels, "exact_variants", probed)
    table = parse("g (int64[N] i) => (float[N, 32] y) { y = Gather (w, i) }", {"w": normal(1, 64, 32)}), {"i": np.arange(64)}
    assert open_job(*table, Settings()).settings.integers == "full"
    model = parse("g (float[N, 32] x) => (float[N, 32] y) { y = MatMul (x, w) }", {"w": normal(1, 32, 32)})
    data = {"x": normal(2, 64, 32)}
    assert open_job(model, data, Settings(arithmetics=("float",))).settings.integers == "full"
    plan = intaglio.plan(model, data, size=0.9, settings=Settings(integers="reduced", storages=("int8",), decompositions=("dense",)))
    assert intaglio.apply(model, plan, data).report.integers == "reduced"


@pytest.mark.parametrize("target", ["mobile", "web", "cuda"])
def test_other_targets_are_not_judged_by_this_machine(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "exact_variants", lambda _: ("reduced",))
    assert open_job(*MODELS["attention"](), Settings(target=target)).settings.integers == "full"
    assert open_job(*MODELS["attention"](), Settings()).settings.integers == "reduced"
    assert open_job(*MODELS["attention"](), Settings(target=target, integers="signed")).integers == INTEGERS["signed"]


@cache
def job(name: str, integers: str) -> Job:
    return open_job(*MODELS[name](), Settings(integers=integers))


def forms(opened: Job, arithmetic: str, storage: str = "int8") -> dict[str, Form]:
    found = forms_in(opened, arithmetic)
    return {name: form if form.decomposition == "unchanged" else replace(form, storage=storage) for name, form in found.items()}


@cache
def built(name: str, integers: str, arithmetic: str, storage: str = "int8") -> Model:
    opened = job(name, integers)
    return build(opened, forms(opened, arithmetic, storage))


def fused_signed(proto: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The model as ONNX Runtime runs it where it has kernels for signed activations."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(proto.SerializeToString(), options, providers=[CPU])
    return onnx.load(folder / "optimized.onnx")


def weights_of(proto: onnx.ModelProto) -> list[Array]:
    """The int8 operands that ONNX Runtime computes with."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    return [array for array in arrays.values() if array.dtype == np.int8 and array.ndim > 1]


CASES = pytest.mark.parametrize(("name", "arithmetic"), [case for case in KERNELS if case[1] in ("integer", "dynamic")])


@pytest.mark.parametrize(("integers", "storage"), [("reduced", "int8"), ("signed", "int8"), ("reduced", "kmeans4")])
@CASES
def test_a_variant_runs_in_the_same_kernels_with_codes_in_its_range(
    name: str, arithmetic: str, integers: str, storage: str, tmp_path: Path
) -> None:
    """And yields what the original does, as nearly as codes of half as many levels can."""
    model = built(name, integers, arithmetic, storage)
    found = fused_signed(model.proto, tmp_path) if integers == "signed" else optimized(model.proto)
    counts = operators(found)
    assert {kernel: counts[kernel] for kernel in KERNELS[name, arithmetic]} == KERNELS[name, arithmetic], counts
    largest = max(int(np.abs(codes.astype(int)).max()) for codes in weights_of(found))
    assert largest == INTEGERS[integers].largest_code(arithmetic)
    zeros = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.proto.graph.initializer if "_zero_point" in tensor.name}
    assert {zero.dtype for zero in zeros.values()} == ({INTEGERS[integers].activations} if arithmetic == "integer" else set())
    _, data = MODELS[name]()
    (exact,), (plain,), (fused,) = (
        run(proto, data, optimize=optimize)
        for proto, optimize in ((job(name, integers).original.proto, True), (model.proto, False), (model.proto, True))
    )
    assert np.abs(plain - fused).max() <= TOLERANCES[arithmetic] * np.abs(plain).max()
    if storage == "int8":
        assert float(((fused - exact) ** 2).sum() / (exact**2).sum()) <= LOSSES["integer"]


@pytest.mark.parametrize("integers", ["reduced", "signed"])
@CASES
def test_the_size_is_the_predicted_one_and_the_mock_runs_the_same_kernels(
    name: str, arithmetic: str, integers: str, tmp_path: Path
) -> None:
    opened, model = job(name, integers), built(name, integers, arithmetic)
    assert save(model, tmp_path / "model.onnx", source=None) == opened.sizes().total(forms(opened, arithmetic))
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    mocked = mock(opened, forms(opened, arithmetic))
    assert operators(optimized(mocked.proto)) == operators(optimized(model.proto))


def test_narrow_codes_stay_as_they_are() -> None:
    full, reduced = (built("convolutions", integers, "integer", "int6").proto.SerializeToString() for integers in ("full", "reduced"))
    assert full == reduced


def test_a_plan_is_applied_and_solved_again_with_its_integers(tmp_path: Path) -> None:
    model = parse("g (float[N, 32] x) => (float[N, 32] y) { y = MatMul (x, w) }", {"w": normal(1, 32, 32)})
    data = {"x": normal(2, 64, 32)}
    opened = open_job(model, data, Settings(integers="reduced", storages=("int8",), decompositions=("dense",)))
    plan = plan_job(opened, Request(size="0.9"))
    edited = replace(plan, forms={"w": Form("dense", (), "int8", "dense", "dynamic")}, solution=None)
    (tmp_path / "plan.json").write_text(to_json(edited), encoding="utf-8")
    known = read_plan(tmp_path / "plan.json")
    assert known.menu.integers == "reduced"
    outcome = apply_plan(open_job(model, data, Settings(integers="full")), known)
    assert outcome.job.settings.integers == "reduced"
    assert [int(np.abs(codes.astype(int)).max()) for codes in weights_of(optimized(outcome.model.proto))] == [63]
    assert replan(model, known, Request(size="0.95")).menu.integers == "reduced"
    with pytest.raises(InputError, match="plan: integers 'roman' are unknown; expected one of full, reduced, signed"):
        replan(model, replace(known, menu=replace(known.menu, integers="roman")), Request(size="0.95"))


def correlated(n: int) -> Moment:
    """The moment of inputs that go together, so that errors of rounding can cancel each other."""
    root = np.random.default_rng(0).standard_normal((n, n)) + 2
    return Moment((root @ root.T)[None] / n, 1000)


@pytest.mark.parametrize(("integers", "narrow"), [("reduced", {"integer", "dynamic"}), ("signed", {"dynamic"})])
@pytest.mark.parametrize("alike", [True, False])
def test_seven_bits_are_priced_as_seven_bits(integers: str, narrow: set[str], alike: bool) -> None:
    """What int8 weights lose with half as many levels is in the proposals and is what is written; nothing else is."""
    model, site = site_of(parse("g (float[N, 64] x) => (float[N, 48] y) { y = MatMul (x, w) }", {"w": normal(1, 64, 48)}))
    moment = Moment.isotropic(1, 64) if alike else correlated(64)
    allowed = Allowed(("dense",), ("int8", "int4"))
    full, found = (
        {each.form: each.rounding for each in propose(site, site.value(model), moment, replace(allowed, integers=name))[0]}
        for name in ("full", integers)
    )
    assert full.keys() == found.keys()
    for form, error in found.items():
        if form.arithmetic in narrow and form.storage == "int8":
            assert error == pytest.approx(full[form] * (127 / 63) ** 2, rel=0.1)  # about uniform within a step
            arrays, decoded = pack(site, form, site.value(model), moment, integers=INTEGERS[integers])
            assert int(np.abs(arrays[0][0].astype(int)).max()) == 63  # type: ignore[type-var]
            assert relative_error(site.matrix(site.value(model)), decoded, moment) == pytest.approx(error, rel=0.25)
        else:
            assert error == full[form]


def test_what_is_rounded_at_load_is_priced_as_rounded_to_nearest() -> None:
    """Compensation gains nothing there."""
    model, site = site_of(parse("g (float[N, 64] x) => (float[N, 48] y) { y = MatMul (x, w) }", {"w": normal(1, 64, 48)}))
    value, moment = site.value(model), correlated(64)
    proposals = propose(site, value, moment, Allowed(("dense",), ("kmeans4",), integers="reduced"))[0]
    errors = {each.form.arithmetic: each.rounding for each in proposals if each.form.storage == "kmeans4"}
    codes, scale = requantized(value, 1, 63)
    nearest = Moment(moment.diag, 1000).energy(site.matrix(value), site.matrix(codes * scale)) / moment.energy(site.matrix(value))
    assert errors["dynamic"] - errors["float"] == pytest.approx(nearest, rel=0.05)


@pytest.mark.parametrize("arithmetic", ["integer", "dynamic"])
def test_weights_are_written_as_they_were_chosen(arithmetic: str) -> None:
    """Inputs that go together: what the operators read is the compensated weight, and nothing is rounded at load."""
    rng = np.random.default_rng(1)
    data = {"x": (rng.standard_normal((400, 8)) @ rng.standard_normal((8, 64)) + 0.1 * rng.standard_normal((400, 64))).astype(np.float32)}
    proto = parse("g (float[N, 64] x) => (float[N, 48] y) { y = MatMul (x, w) }", {"w": normal(1, 64, 48)})
    opened = open_job(proto, data, Settings(integers="reduced"))
    plan = {"w": Form("dense", (), "int8", "dense", arithmetic)}
    fitted = fit_forms(opened, plan, keep=True)
    (weight,) = weights_of(optimized(build(opened, plan).proto))
    np.testing.assert_array_equal(weight, fitted.packed["w"][0][0])
    nearest, _ = requantized(opened.sites.sites[0].value(opened.model), 1, 63)
    assert (weight != nearest).mean() > 0.1


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(InputError, match="--integers roman: unknown; expected one of auto, full, reduced, signed"):
        check_settings(Settings(integers="roman"))
