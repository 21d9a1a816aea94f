"""Building: what runs in integers does, the size is the predicted one, and the model computes what it stands for."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from intaglio.ops.form import CARRIED, UNCHANGED, Form
from intaglio.passes.apply import apply_plan
from intaglio.passes.budget import Request
from intaglio.passes.build import build, mock
from intaglio.passes.errors import InputError
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.model import Model
from intaglio.passes.plan import read_plan, to_json
from intaglio.passes.ranges import METHODS
from intaglio.passes.replan import plan_job
from intaglio.passes.rewrite import declines
from intaglio.passes.save import save, serialized_size
from tests.models import Array, normal, operators, optimized, parse, run

STORAGES = {"integer": "int8", "dynamic": "int4", "nbits": "nbits4-b32", "rows": "int4-rows"}
"""Arithmetic → the storage that is tried in it."""

CONVOLUTIONS = """g (float[N, 4, 8, 8] x) => (float[N, 10] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, c1, b1)
    ra = Relu (a)
    b = Conv <pads = [1, 1, 1, 1]> (ra, c2, b2)
    s = Add (b, ra)
    rs = Relu (s)
    p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (rs)
    c = Conv (p, c3)
    q = GlobalAveragePool (c)
    f = Flatten (q)
    y = Gemm <transB = 1> (f, g1, b3)
}"""

ATTENTION = """g (int64[N, S] i) => (float[N, S, 32] y) {
    e = Gather (t, i)
    q = MatMul (e, wq)
    qb = Add (q, bq)
    k = MatMul (e, wk)
    v = MatMul (e, wv)
    kt = Transpose <perm = [0, 2, 1]> (k)
    a = MatMul (qb, kt)
    sm = Softmax <axis = -1> (a)
    h = MatMul (sm, v)
    o = MatMul (h, wo)
    r = Add (o, e)
    m = MatMul (r, w1)
    mb = Add (m, b1)
    g = Relu (mb)
    y = MatMul (g, w2)
}"""


RECURRENT = """g (float[N, 6, 16] x) => (float[N, 20] y) {
    t = Transpose <perm = [1, 0, 2]> (x)
    a, ah = LSTM <hidden_size = 24, direction = "bidirectional"> (t, w1, r1, b1)
    m = Transpose <perm = [0, 2, 1, 3]> (a)
    j = Reshape (m, shape)
    c, ch = LSTM <hidden_size = 32> (j, w2, r2, b2)
    s = Squeeze (ch, axes)
    y = MatMul (s, head)
}"""


def convolutions() -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A residual network and images; large enough values that integers have something to round."""
    weights = {
        "c1": normal(1, 16, 4, 3, 3),
        "b1": normal(2, 16),
        "c2": normal(3, 16, 16, 3, 3),
        "b2": normal(4, 16),
        "c3": normal(5, 32, 16, 1, 1),
        "g1": normal(6, 10, 32),
        "b3": normal(7, 10),
    }
    return parse(CONVOLUTIONS, weights), {"x": normal(8, 48, 4, 8, 8) * 8}


def attention() -> tuple[onnx.ModelProto, dict[str, Array]]:
    """An embedding, one head and a feed-forward layer."""
    square = {name: normal(number, 32, 32) for number, name in enumerate(("wq", "wk", "wv", "wo"), 1)}
    rest = {"t": normal(5, 50, 32) * 5, "bq": normal(6, 32), "w1": normal(7, 32, 64), "b1": normal(8, 64), "w2": normal(9, 64, 32)}
    return parse(ATTENTION, square | rest), {"i": np.random.default_rng(10).integers(0, 50, (40, 7))}


def recurrent() -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Two layers of memory, one of them in both directions, over short sequences."""
    weights = {
        "w1": normal(1, 2, 96, 16) * 3,
        "r1": normal(2, 2, 96, 24) * 3,
        "b1": normal(3, 2, 192),
        "w2": normal(4, 1, 128, 48) * 3,
        "r2": normal(5, 1, 128, 32) * 3,
        "b2": normal(6, 1, 256),
        "head": normal(7, 32, 20),
        "shape": np.asarray([0, 0, -1]),
        "axes": np.asarray([0]),
    }
    return parse(RECURRENT, weights), {"x": normal(8, 48, 6, 16) * 4}


MODELS = {"convolutions": convolutions, "attention": attention, "recurrent": recurrent}


@cache
def job(name: str) -> Job:
    return open_job(*MODELS[name](), Settings())


def forms_in(opened: Job, arithmetic: str) -> dict[str, Form]:
    """Everything that can be in this arithmetic."""
    form = Form("dense", (), STORAGES[arithmetic], "dense", arithmetic)
    forms = {site.name: form if declines(site, form) is None else UNCHANGED for site in opened.sites}
    carried = {carrier.name: CARRIED for carrier in opened.carriers} if arithmetic == "integer" else {}
    return forms | carried


@cache
def built(name: str, arithmetic: str) -> Model:
    opened = job(name)
    return build(opened, forms_in(opened, arithmetic))


KERNELS = {
    ("convolutions", "integer"): {"QLinearConv": 3, "QLinearAdd": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1, "QuantizeLinear": 1},
    ("convolutions", "dynamic"): {"Conv": 3, "DynamicQuantizeMatMul": 1},
    ("attention", "integer"): {"QLinearMatMul": 5, "MatMulIntegerToFloat": 3, "QLinearSoftmax": 1, "QLinearAdd": 1},
    ("attention", "dynamic"): {"MatMulIntegerToFloat": 3, "DynamicQuantizeLinear": 1, "DynamicQuantizeMatMul": 3},
    ("recurrent", "dynamic"): {"DynamicQuantizeLSTM": 2, "DynamicQuantizeMatMul": 1},
    ("attention", "nbits"): {"MatMulNBits": 6, "GatherBlockQuantized": 1},
    ("attention", "rows"): {"Gather": 2},
}
"""Model and arithmetic → how many operators of some types are left once ONNX Runtime has optimized the model."""

FLOATS = {"integer": ("Conv", "Gemm", "MatMul"), "dynamic": ("Gemm", "LSTM"), "nbits": (), "rows": ()}
"""Arithmetic → operators of which none is left in floats."""

DECODING = ("DequantizeLinear", "Cast", "Sub", "Mul", "Div", "Floor", "Round", "BitShift", "BitwiseAnd", "Constant", "Expand")
"""What decode programs are made of, and the networks are not."""

cases = pytest.mark.parametrize(("name", "arithmetic"), KERNELS, ids=map("-".join, KERNELS))


@cases
def test_the_optimized_model_has_the_kernels_of_the_arithmetic_and_decodes_nothing(name: str, arithmetic: str) -> None:
    found = operators(optimized(built(name, arithmetic).proto))
    assert {kernel: found[kernel] for kernel in KERNELS[name, arithmetic]} == KERNELS[name, arithmetic], found
    assert not any(found[operator] for operator in FLOATS[arithmetic]), found
    if arithmetic != "rows":  # rows are decoded when they are looked up
        assert not any(found[operator] for operator in DECODING), found


@pytest.mark.parametrize(("target", "domains"), [("cpu", {"com.microsoft"}), ("mobile", set()), ("web", set())])
def test_products_add_their_biases_where_the_target_has_the_kernel(target: str, domains: set[str]) -> None:
    """Of two biased products one yields floats to a product of activations, the other ones to an activation; sizes are exact either way."""
    opened = open_job(*attention(), Settings(target=target))
    forms = forms_in(opened, "integer")
    model = build(opened, forms)
    assert {node.domain for node in model.proto.graph.node} - {"", "intaglio"} == domains
    assert operators(model.proto)["MatMulIntegerToFloat"] == 2 * len(domains)
    assert operators(optimized(model.proto))["MatMulIntegerToFloat"] == 3
    assert opened.sizes().total(forms) == serialized_size(model, opened.external)
    assert operators(mock(opened, forms).proto)["MatMulIntegerToFloat"] == 2 * len(domains)


@pytest.mark.parametrize(("target", "domains"), [("cpu", {"com.microsoft"}), ("mobile", set()), ("web", set())])
def test_a_plan_is_applied_for_the_target_it_was_made_for(target: str, domains: set[str], tmp_path: Path) -> None:
    opened = open_job(*attention(), Settings(target=target))
    plan = plan_job(opened, Request(size="0.9"))
    edited = replace(plan, forms=forms_in(opened, "integer"), solution=None)
    (tmp_path / "plan.json").write_text(to_json(edited), encoding="utf-8")
    result = apply_plan(job("attention"), read_plan(tmp_path / "plan.json")).model.proto
    assert {node.domain for node in result.graph.node} - {"", "intaglio"} == domains


def test_a_plan_that_names_no_target_or_an_unknown_one(tmp_path: Path) -> None:
    """Plans from before targets were noted use standard operators only."""
    plan = plan_job(job("attention"), Request(size="0.9"))
    document = json.loads(to_json(plan))
    del document["target"]
    (tmp_path / "plan.json").write_text(json.dumps(document), encoding="utf-8")
    old = read_plan(tmp_path / "plan.json")
    assert old.menu.target == "cpu"  # some candidates are for MatMulNBits
    rows = document["candidates"]
    document["candidates"] = {name: [row for row in rows[name] if row[4] != "nbits"] for name in rows}
    (tmp_path / "plan.json").write_text(json.dumps(document), encoding="utf-8")
    old = read_plan(tmp_path / "plan.json")
    assert old.menu.target == "web"
    result = apply_plan(job("attention"), replace(old, forms=forms_in(job("attention"), "integer"), solution=None)).model.proto
    assert {node.domain for node in result.graph.node} <= {"", "intaglio"}
    with pytest.raises(InputError, match="plan: target 'toaster' is unknown; expected one of cpu, cuda, mobile, web"):
        apply_plan(job("attention"), replace(plan, menu=replace(plan.menu, target="toaster")))


@pytest.mark.parametrize(
    ("target", "arithmetic", "reason"),
    [
        ("mobile", "dynamic", "does not compute in dynamic"),
        ("cuda", "integer", "does not compute in integer"),
        ("web", "nbits", "has no nbits4"),
    ],
)
def test_an_edited_plan_asks_for_what_its_target_lacks(target: str, arithmetic: str, reason: str) -> None:
    opened = open_job(*attention(), Settings(target=target))
    with pytest.raises(InputError, match=rf"plan: site '\w+' cannot take dense/.*: target {target} {reason}"):
        build(opened, forms_in(opened, arithmetic))


TOLERANCES = {"integer": 0.03, "dynamic": 0.03, "nbits": 0.03, "rows": 1e-5}
"""Arithmetic → of the largest output. Kernels and plain operators round to the same step but where float32 sums differ just between
two steps; each such entry is off by 1/255 of its range, and few of them meet in one output. `MatMulNBits` rounds its input
to eight bits too. Packed rows are read by the same operators either way."""


@cases
def test_optimizations_do_not_change_the_outputs(name: str, arithmetic: str) -> None:
    _, data = MODELS[name]()
    (plain,), (fused,) = (run(built(name, arithmetic).proto, data, optimize=optimize) for optimize in (False, True))
    assert plain.shape == fused.shape
    assert np.abs(plain - fused).max() <= TOLERANCES[arithmetic] * np.abs(plain).max()


LOSSES = {"integer": 3e-3, "dynamic": 0.05, "nbits": 0.05, "rows": 0.05}
"""Arithmetic → relative mean square error of the outputs. A value in bytes loses about (1/255)² / 12 of its range's square, 1e-5 of its
energy where the range is six times its deviation, and up to a dozen values and weights follow each other; four bits lose 256 times as much
per weight, a few percent where several follow each other."""


@cases
def test_the_outputs_are_those_of_the_original(name: str, arithmetic: str) -> None:
    _, data = MODELS[name]()
    (exact,), (found,) = (run(model.proto, data) for model in (job(name).original, built(name, arithmetic)))
    assert float(((found - exact) ** 2).sum() / (exact**2).sum()) <= LOSSES[arithmetic]


@cases
def test_the_size_is_the_predicted_one(name: str, arithmetic: str, tmp_path: Path) -> None:
    """Corrected biases and calibrated ranges included."""
    path = tmp_path / "model.onnx"
    size = save(built(name, arithmetic), path, source=None)
    assert size == job(name).sizes().total(forms_in(job(name), arithmetic))
    onnx.checker.check_model(path, full_check=True)


@cases
def test_a_mock_runs_the_same_kernels(name: str, arithmetic: str) -> None:
    """From the same operators in the same numbers, whatever is stored, and without any data."""
    _, data = MODELS[name]()
    model = mock(job(name), forms_in(job(name), arithmetic))
    assert operators(optimized(model.proto)) == operators(optimized(built(name, arithmetic).proto))
    assert [output.shape for output in run(model.proto, data)] == [output.shape for output in run(built(name, arithmetic).proto, data)]


def test_a_mock_of_nothing_is_the_model() -> None:
    opened = job("convolutions")
    model = mock(opened, dict.fromkeys([site.name for site in opened.sites], UNCHANGED))
    assert serialized_size(model, False) == serialized_size(opened.model, False)


def test_a_mock_leaves_out_what_is_folded() -> None:
    """A form that is expanded when the model is loaded runs as the original does: its storage is not even written."""
    opened = job("convolutions")
    model = mock(opened, {"c2": Form("lowrank", (4,), "int4", "dense")})
    assert operators(model.proto) == operators(opened.model.proto)


def scales(model: Model) -> dict[str, float]:
    """Scales of the quantized activations, by name."""
    return {tensor.name: float(numpy_helper.to_array(tensor)) for tensor in model.proto.graph.initializer if tensor.name.endswith("_scale")}


def test_automatic_ranges_are_those_of_the_method_that_harms_least() -> None:
    proto, data = convolutions()
    data["x"][::7] *= 6  # rare large values, so that the methods differ
    found, divergences = {}, {}
    for method in ("auto", *METHODS):
        opened = open_job(proto, data, Settings(ranges=method))
        model = build(opened, forms_in(opened, "integer"))
        found[method], divergences[method] = scales(model), opened.probe().divergence(model.proto)
    assert len({tuple(found[method].values()) for method in METHODS}) > 1
    assert divergences["auto"] == min(divergences.values())
    assert any(found["auto"] == found[method] for method in METHODS)
