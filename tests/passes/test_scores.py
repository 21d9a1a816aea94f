"""Floors below masked scores: no output changes, and no floor comes near anything that counts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from intaglio.ops.form import CARRIED, UNCHANGED, Form
from intaglio.passes import analyse
from intaglio.passes import scores as module
from intaglio.passes.apply import apply_plan
from intaglio.passes.budget import Request
from intaglio.passes.build import build, mock
from intaglio.passes.floors import REACH
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.plan import read_plan, to_json
from intaglio.passes.replan import plan_job, replan
from intaglio.passes.report import report
from intaglio.passes.rewrite import declines
from intaglio.passes.scores import find_floors, floored
from tests.models import Feed, normal, operators, optimized, parse, run

LEAST = float(np.finfo(np.float32).min)

TEXT = """g (float[N, S, 16] x, float[N, 1, S] keep) => (float[N, S, 16] y) {
    q = MatMul (x, wq)
    k = MatMul (x, wk)
    v = MatMul (x, wv)
    t = Transpose <perm = [0, 2, 1]> (k)
    a = MatMul (q, t)
    gone = Sub (one, keep)
    mask = Mul (gone, huge)
    s = Add (a, mask)
    p = Softmax <axis = -1> (s)
    y = MatMul (p, v)
}"""


def attention(huge: float = LEAST, scale: float = 1.0, **versions: int) -> onnx.ModelProto:
    weights = {name: normal(number, 16, 16) * np.float32(scale) for number, name in enumerate(("wq", "wk", "wv"), 1)}
    return parse(TEXT, weights | {"one": np.float32(1), "huge": np.float32(huge)}, **versions)


def samples(count: int = 40, length: int = 6, masked: bool = True) -> Feed:
    """Sequences of which the last positions are masked, of some all."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, length, count) if masked else np.full(count, length)
    keep = np.arange(length) < lengths[:, None]
    return {"x": rng.standard_normal((count, length, 16)).astype(np.float32), "keep": keep[:, None].astype(np.float32)}


@pytest.fixture
def paying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether floors pay is measured; here they do."""
    monkeypatch.setattr(module, "_pays", lambda *_: True)
    monkeypatch.setattr(module, "_faster", lambda *_: True)


def job_of(proto: onnx.ModelProto, feed: Feed | None = None) -> Job:
    return open_job(proto, dict(feed or samples()), Settings())


@pytest.mark.usefixtures("paying")
@pytest.mark.parametrize("versions", [{"opset": 11, "ir_version": 3}, {"opset": 13, "ir_version": 7}, {"opset": 21, "ir_version": 10}])
def test_no_output_changes(versions: dict[str, int]) -> None:
    proto = attention(**versions)
    text = proto.SerializeToString()
    opened = job_of(proto)
    result = floored(opened)
    assert proto.SerializeToString() == text
    assert "Clip" not in operators(opened.model.proto)
    onnx.checker.check_model(result.model.proto, full_check=True)
    assert operators(result.model.proto)["Clip"] == 1
    assert list(result.floors) == ["s"]
    feed = samples(8, 9)
    for optimize in (True, False):
        np.testing.assert_array_equal(run(result.model.proto, feed, optimize=optimize)[0], run(proto, feed, optimize=optimize)[0])


@pytest.mark.usefixtures("paying")
def test_exponentials_are_ordinary_numbers() -> None:
    result = floored(job_of(attention())).model
    scores = onnx.ModelProto()
    scores.CopyFrom(result.proto)
    scores.graph.output.append(
        onnx.helper.make_tensor_value_info(next(n for n in scores.graph.node if n.op_type == "Softmax").input[0], 1, None)
    )
    found = run(scores, samples())[1]
    below = found - found.max(-1, keepdims=True)
    assert np.exp(below).min() >= np.finfo(np.float32).tiny
    assert below.min() < -module.NEAR


def direct(softmax: str) -> onnx.ModelProto:
    """Scores as they are fed, and a weight behind them."""
    rest, outputs = ("", "float[N, 2, 8] y, float[N, 2, 4] z") if "z = " in softmax else ("y = MatMul (p, w)", "float[N, 2, 8] y")
    return parse(f"g (float[N, 2, 4] x) => ({outputs}) {{ s = Neg (x) p = {softmax} {rest} }}", {"w": normal(1, 4, 8)})


def direct_samples(first: float, second: float) -> Feed:
    """Two rows with these maxima; the last entry of each is masked."""
    scores = np.zeros((40, 2, 4), np.float32) + np.asarray([[first], [second]], np.float32)
    scores[..., 1] -= 1
    scores[..., 3] = LEAST
    return {"x": -scores}


def test_scores_that_are_fed_get_a_floor(paying: None) -> None:
    """What the cases below differ from."""
    assert find_floors(job_of(direct("Softmax <axis = -1> (s)"), direct_samples(5.0, 4.0))) == {"s": 5.0 - REACH}


BOTH = "Softmax <axis = 0> (s) q = Softmax <axis = -1> (s) y = MatMul (q, w) z = Relu (p)"

DECLINED = {
    "nothing masked": (attention(), samples(masked=False)),
    "a mask that is not that low": (attention(-30.0), samples()),
    "rows far apart": (direct("Softmax <axis = -1> (s)"), direct_samples(60.0, -10.0)),
    "scores too high": (direct("Softmax <axis = -1> (s)"), direct_samples(90.0, 80.0)),
    "another axis too": (
        direct(BOTH),
        direct_samples(5.0, 4.0),
    ),
    "an old opset": (attention(opset=10, ir_version=5), samples()),
}


@pytest.mark.usefixtures("paying")
@pytest.mark.parametrize(("proto", "feed"), DECLINED.values(), ids=DECLINED)
def test_what_it_must_not_fire_on(proto: onnx.ModelProto, feed: Feed) -> None:
    opened = job_of(proto, feed)
    assert floored(opened) is opened


def test_rows_of_minus_infinity_have_no_floor() -> None:
    scores = np.asarray([[5.0, 4.0, LEAST], [4.0, -np.inf, 3.0]], np.float32)
    seen = module._Scores()
    seen.look(scores)
    assert seen.floor() == 5.0 - REACH
    seen.look(np.full((1, 3), -np.inf, np.float32))
    assert seen.floor() is None


@pytest.mark.usefixtures("paying")
def test_a_softmax_over_another_axis_stays() -> None:
    proto = attention()
    next(node for node in proto.graph.node if node.op_type == "Softmax").attribute[0].i = 1
    assert find_floors(job_of(proto)) == {}


@pytest.mark.parametrize(("clipped_s", "found"), [(0.79, ["s"]), (0.81, [])])
def test_a_floor_has_to_pay(monkeypatch: pytest.MonkeyPatch, clipped_s: float, found: list[str]) -> None:
    monkeypatch.setattr(module, "measure", lambda runs, **_: [SimpleNamespace(median_s=1.0), SimpleNamespace(median_s=clipped_s)])
    assert list(find_floors(job_of(attention()))) == found


@pytest.mark.usefixtures("paying")
def test_an_addition_in_integers_is_the_floor() -> None:
    """Bytes saturate there, so the Clip goes; the scale spans what counts, not the mask."""
    result = floored(job_of(attention()))
    form = Form("dense", (), "int8", "dense", "integer")
    forms = {site.name: form if declines(site, form) is None else UNCHANGED for site in result.sites}
    forms |= {carrier.name: CARRIED for carrier in result.carriers}
    model = build(result, forms)
    found = operators(optimized(model.proto))
    assert (found["QLinearAdd"], found["Clip"]) == (1, 0)
    (scale,) = (onnx.numpy_helper.to_array(t) for t in model.proto.graph.initializer if t.name == "s_floored_scale")
    assert scale * 255 < 2 * REACH
    assert result.sizes().total(forms) == len(model.proto.SerializeToString())


@pytest.mark.usefixtures("paying")
def test_floors_that_are_known_are_put_in_again() -> None:
    first = floored(job_of(attention()))
    again = module.with_known_floors(job_of(attention()), first.floors)
    assert again.model.proto.SerializeToString() == first.model.proto.SerializeToString()
    assert again.value_shapes == first.value_shapes
    assert again.floors == first.floors


@pytest.mark.usefixtures("paying")
def test_a_plan_brings_its_floors_along(tmp_path: Path) -> None:
    plan = plan_job(job_of(attention()), Request(size="0.9"))
    (tmp_path / "plan.json").write_text(to_json(plan), encoding="utf-8")
    again = read_plan(tmp_path / "plan.json")
    assert again.menu.floors == plan.menu.floors != {}
    applied = apply_plan(job_of(attention()), again)
    assert operators(applied.model.proto)["Clip"] == 1
    assert report(applied).floors == plan.menu.floors
    smaller = replan(attention(), again, Request(size="0.8"))
    assert len(apply_plan(job_of(attention()), smaller).model.proto.SerializeToString()) <= 0.8 * len(attention().SerializeToString())


@pytest.mark.usefixtures("paying")
def test_models_of_noise_have_a_ceiling() -> None:
    opened = floored(job_of(attention()))
    (clip,) = (node for node in mock(opened, {}).proto.graph.node if node.op_type == "Clip")
    assert len(clip.input) == 3
    (clip,) = (node for node in opened.model.proto.graph.node if node.op_type == "Clip")
    assert len(clip.input) == 2


@pytest.mark.usefixtures("paying")
def test_budgets_refer_to_the_original_not_to_what_floors_make_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analyse, "compare_models", lambda *_, **__: SimpleNamespace(ratio=1e-3, reference_s=1.0, candidate_s=1.0))
    opened = job_of(attention())
    base_s = plan_job(opened, Request(size="0.9")).menu.base.latency_s
    monkeypatch.setattr(module, "_faster", lambda *_: False)
    plain = plan_job(opened, Request(size="0.9"))
    assert plain.menu.floors == {}
    assert base_s > 30 * plain.menu.base.latency_s
