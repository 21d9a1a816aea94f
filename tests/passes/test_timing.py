"""Latencies: every form is measured on the right micro-model. Nothing here asks how long anything takes, but for one case without doubt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from intaglio.ops.arithmetic import ARITHMETICS
from intaglio.ops.form import PRUNED, UNCHANGED, Form
from intaglio.passes.cache import Cache
from intaglio.passes.calibrate import observe, value_shapes
from intaglio.passes.kernels import INTEGERS
from intaglio.passes.latency import MicroBench, random_feed
from intaglio.passes.load import load
from intaglio.passes.options import Runtime
from intaglio.passes.partners import Partners
from intaglio.passes.regions import find_carriers
from intaglio.passes.session import CPU
from intaglio.passes.sites import find_sites
from intaglio.passes.timing import LatencyPricer, as_run, changes_latency
from intaglio.passes.units import activation_values
from tests.models import CASES, forms_of, narrow_forms, normal, operators, optimized, parse, run, site_of
from tests.passes.test_sites import nested


def bench() -> MicroBench:
    return MicroBench(Cache(None), (CPU,), 1, budget_s=0.002)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.sites])
def test_every_contracted_form_can_be_timed(name: str) -> None:
    case = CASES[name]
    model = load(case.proto())
    sites = find_sites(model)
    pricer = LatencyPricer(model, observe(model, sites.sites, case.data().first(1), Runtime()), bench())
    for site in sites:
        assert pricer.measurable(site) == (site.name != "r")  # the recurrent weight has no operator of its own
        if site.name == "r":
            continue
        assert pricer.reference(site) > 0
        for form in _some(forms_of(site)):
            assert np.isfinite(pricer.change(site, form))


def _some(forms: Sequence[Form]) -> list[Form]:
    return [form for form in forms if form.execution == "contract" and form.storage == "float"]


def test_dense_forms_and_storage_cost_no_time() -> None:
    case = CASES["gemm"]
    model, site = site_of(case.proto())
    pricer = LatencyPricer(model, observe(model, (site,), case.data().first(1), Runtime()), bench())
    assert pricer.change(site, Form("dense", (), "int8")) == 0.0
    assert pricer.change(site, Form("lowrank", (4,), "int8", "dense")) == 0.0


def test_a_weight_behind_a_cast_is_timed_in_the_type_it_is_used_in() -> None:
    text = "g (float[N, 16] x) => (float[N, 24] y) { v = Cast <to = 1> (w) y = MatMul (x, v) }"
    model, site = site_of(parse(text, {"w": normal(1, 16, 24, dtype=np.float16)}))
    shapes = observe(model, (site,), {"x": normal(2, 3, 16)}, Runtime())
    pricer = LatencyPricer(model, shapes, bench())
    micro = pricer._micro(site, Form("lowrank", (4,), "float", "contract"))
    assert {tensor.data_type for tensor in micro.graph.initializer} == {onnx.TensorProto.FLOAT}


def test_a_large_recurrent_weight_beside_the_one_that_is_timed() -> None:
    text = "g (float[S, B, 16] x) => (float[S, 1, B, 512] y) { y = RNN <hidden_size = 512> (x, w, r) }"
    model = load(parse(text, {"w": normal(1, 1, 512, 16), "r": normal(2, 1, 512, 512)}))
    sites = find_sites(model)
    pricer = LatencyPricer(model, observe(model, sites.sites, {"x": normal(3, 3, 1, 16)}, Runtime()), bench())
    assert pricer.reference(next(site for site in sites if site.name == "w")) > 0


def test_a_low_rank_layer_is_measured_to_be_faster() -> None:
    model, site = site_of(parse("g (float[N, 1024] x) => (float[N, 1024] y) { y = MatMul (x, w) }", {"w": normal(1, 1024, 1024)}))
    shapes = observe(model, (site,), {"x": normal(2, 64, 1024)}, Runtime())
    pricer = LatencyPricer(model, shapes, MicroBench(Cache(None), (CPU,), 1, budget_s=0.05))
    assert pricer.change(site, Form("lowrank", (16,), "float", "contract")) < 0


def test_nested_sites_are_not_timed() -> None:
    model = load(nested())
    sites = find_sites(model)
    pricer = LatencyPricer(model, {}, bench())
    assert [pricer.measurable(site) for site in sites] == [False, False]
    assert [pricer.reference(site) for site in sites] == [0.0, 0.0]


@dataclass(frozen=True)
class Stopwatch(MicroBench):
    """A bench that runs every model once at its shapes and says what the test wants.

    Attributes:
        seen: models in the order in which they came, with their feeds.
        seconds_of: seconds of a model.
    """

    seen: list[onnx.ModelProto] = field(default_factory=list)
    seconds_of: Callable[[onnx.ModelProto], float] = lambda model: 1.0

    def seconds(self, model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]], *, index_limit: int = 2) -> float:
        self.seen.append(model)
        run(model, random_feed(model, shapes, index_limit=index_limit))
        return self.seconds_of(model)

    def pair(
        self, reference: onnx.ModelProto, candidate: onnx.ModelProto, shapes: Mapping[str, Sequence[int]], *, index_limit: int = 2
    ) -> tuple[float, float]:
        return self.seconds(reference, shapes, index_limit=index_limit), self.seconds(candidate, shapes, index_limit=index_limit)


def in_bytes(model: onnx.ModelProto) -> bool:
    """Whether a micro-model reads bytes."""
    return any(value.type.tensor_type.elem_type == TensorProto.UINT8 for value in model.graph.input)


def stopwatch(seconds_of: Callable[[onnx.ModelProto], float] = lambda model: 1.0) -> Stopwatch:
    return Stopwatch(Cache(None), (CPU,), 1, 0.0, [], seconds_of)


def pricer_of(proto: onnx.ModelProto, feed: Mapping[str, np.ndarray], bench: MicroBench, integers: str = "full") -> LatencyPricer:
    model = load(proto)
    sites, carriers = find_sites(model).sites, find_carriers(model)
    values = value_shapes(model, activation_values(model, sites, carriers), feed, Runtime())
    return LatencyPricer(model, observe(model, sites, feed, Runtime()), bench, values, integers=INTEGERS[integers])


KERNELS = {"conv2d": "QLinearConv", "conv2d_groups": "QLinearConv", "gemm": "QGemm", "matmul": "MatMulIntegerToFloat"}
"""Case → the integer kernel of its layer."""

CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")


@pytest.mark.parametrize("storage", ["int8", "int4", "kmeans3"])
@pytest.mark.parametrize("name", KERNELS)
def test_an_integer_layer_is_measured_from_bytes_to_bytes(name: str, storage: str) -> None:
    """Or to floats, which the kernels of matrix products yield; entering and leaving integers is counted elsewhere."""
    case, watch = CASES[name], stopwatch()
    pricer = pricer_of(case.proto(), case.data().first(1), watch)
    pricer.pair(site_of(case.proto())[1], Form("dense", (), storage, "dense", "integer"))
    reference, integers = watch.seen
    assert not in_bytes(reference)
    assert [value.type.tensor_type.elem_type for value in integers.graph.input] == [TensorProto.UINT8]
    yields_bytes = [value.type.tensor_type.elem_type == TensorProto.UINT8 for value in integers.graph.output]
    assert yields_bytes == [name.startswith("conv")]
    found = operators(optimized(integers))
    assert found[KERNELS[name]] == 1
    assert not any(found[conversion] for conversion in CONVERSIONS)


@pytest.mark.parametrize("name", ["conv2d", "matmul", "gemm"])
def test_factors_in_integers_stay_in_integers_between_them(name: str) -> None:
    case, watch = CASES[name], stopwatch()
    pricer = pricer_of(case.proto(), case.data().first(1), watch)
    pricer.pair(site_of(case.proto())[1], Form("lowrank", (4,), "int8", "contract", "integer"))
    found = operators(optimized(watch.seen[1]))
    assert in_bytes(watch.seen[1])
    assert sum(found[kernel] for kernel in ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat")) == 2
    assert not any(found[conversion] for conversion in CONVERSIONS)


@pytest.mark.parametrize("name", ["matmul", "gemm", "conv2d", "conv2d_groups", "gather"])
def test_every_arithmetic_can_be_timed(name: str) -> None:
    """Every micro-model runs at the real shapes, on inputs of the declared types."""
    case = CASES[name]
    _, site = site_of(case.proto())
    for form in dict.fromkeys(map(as_run, narrow_forms(site))):
        watch = stopwatch()
        assert pricer_of(case.proto(), case.data().first(1), watch).pair(site, form) == (1.0, 1.0)
        assert in_bytes(watch.seen[1]) == ARITHMETICS[form.arithmetic].coupled


@pytest.mark.parametrize("hidden", [8, 320], ids=["small", "large"])
def test_both_weights_of_an_lstm_are_timed_in_integers(hidden: int) -> None:
    """The recurrent weight of the larger one is not held while operators are timed."""
    text = f"g (float[S, B, 12] x) => (float[S, 1, B, {hidden}] y) {{ y = LSTM <hidden_size = {hidden}> (x, w, r, b) }}"
    weights = {"w": normal(1, 1, 4 * hidden, 12), "r": normal(2, 1, 4 * hidden, hidden), "b": normal(3, 1, 8 * hidden)}
    proto, watch, feed = parse(text, weights), stopwatch(), {"x": normal(4, 5, 2, 12)}
    model = load(proto)
    sites = find_sites(model)
    pricer = LatencyPricer(model, observe(model, sites, feed, Runtime()), watch, {}, Partners.find(sites))
    site = next(site for site in sites if site.name == "w")
    products = {"dense": 0, "contract": 1}
    for form in dict.fromkeys(as_run(form) for form in narrow_forms(site) if form.arithmetic == "dynamic"):
        watch.seen.clear()
        pricer.pair(site, form)
        floats, integers = (operators(optimized(model)) for model in watch.seen)
        assert floats == {"LSTM": 1}
        assert integers["DynamicQuantizeLSTM"] == 1
        assert integers["DynamicQuantizeMatMul"] == products[form.execution] == sum(integers.values()) - 1


TAKEN = "x", "x-pruned", "t-pruned", "w.q", "w.s", "t_quantized"
"""Names that micro-models use or once used for their own values."""


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("body", ["{} = Conv (t, w)", "{} = Conv (t, w, b)", "h = Conv (t, w) {} = Relu (h)"])
def test_a_model_may_call_its_values_what_it_likes(body: str, name: str) -> None:
    """The value that an operator yields, and its bias."""
    text = f"g (float[N, 16, 4, 4] i) => (float[N, 24, 4, 4] y) {{ t = Relu (i) {body.format('result')} y = Tanh (result) }}"
    proto = parse(text, {"w": normal(1, 24, 16, 1, 1), "b": normal(2, 24)})
    for node in proto.graph.node:
        node.input[:] = [{"result": name, "b": f"{name}.b"}.get(value, value) for value in node.input]
        node.output[:] = [name if value == "result" else value for value in node.output]
    for tensor in proto.graph.initializer:
        tensor.name = f"{name}.b" if tensor.name == "b" else tensor.name
    model = load(proto)
    (site,) = find_sites(model)
    pricer = LatencyPricer(model, observe(model, (site,), {"i": normal(3, 2, 16, 4, 4)}, Runtime()), bench())
    for form in (
        Form("lowrank", (4,), "float", "contract"),
        Form("dense", (), "int8", "dense", "integer"),
        Form("lowrank", (4,), "int8", "contract", "integer"),
        Form(PRUNED, (12, 16), "float", "contract"),
    ):
        assert pricer.reference(site) > 0
        assert min(pricer.pair(site, form)) > 0
    assert pricer.calibrate([site], lambda: None) >= 0


def test_sites_that_run_alike_share_a_measurement() -> None:
    text = "g (float[N, 16] x) => (float[N, 24] y) { a = MatMul (x, w) b = MatMul (x, v) s = Add (a, b) c = MatMul (s, u) y = Relu (c) }"
    proto = parse(text, {"w": normal(1, 16, 24), "v": normal(2, 16, 24), "u": normal(3, 24, 24)})
    watch = stopwatch()
    pricer = pricer_of(proto, {"x": normal(4, 3, 16)}, watch)
    sites = {site.name: site for site in find_sites(load(proto))}
    for name, measured in (("w", 2), ("v", 2), ("u", 4)):
        for storage in ("int8", "int4"):
            pricer.pair(sites[name], Form("dense", (), storage, "dense", "dynamic"))
        assert len(watch.seen) == measured


CARRIERS = {
    "y = Add (x, x)": "QLinearAdd",
    "t = Sigmoid (x) y = Mul (x, t)": "QLinearMul",
    "y = Sigmoid (x)": "QLinearSigmoid",
    "y = LeakyRelu (x)": "QLinearLeakyRelu",
    "y = Relu (x)": "QLinearLeakyRelu",
    "y = GlobalAveragePool (x)": "QLinearGlobalAveragePool",
    "y = Concat <axis = 1> (x, x)": "QLinearConcat",
    "y = MaxPool <kernel_shape = [2, 2]> (x)": "NhwcMaxPool",
    "y = Transpose <perm = [0, 1, 3, 2]> (x)": "Transpose",
    "y = Softmax (x)": "QLinearSoftmax",
}
"""Carrier y → its integer kernel."""


@pytest.mark.parametrize(("body", "kernel"), CARRIERS.items(), ids=CARRIERS.values())
def test_carriers_are_measured_from_bytes_to_bytes(body: str, kernel: str) -> None:
    proto = parse(f"g (float[N, 8, 6, 6] x) => (float[A, B, C, D] y) {{ {body} }}")
    watch = stopwatch(lambda model: 0.25 if in_bytes(model) else 1.0)
    pricer = pricer_of(proto, {"x": normal(1, 2, 8, 6, 6)}, watch)
    carrier = next(each for each in find_carriers(load(proto)) if each.name == "y")
    assert pricer.carry(carrier) == pytest.approx(-0.75)
    floats, integers = watch.seen
    assert {value.type.tensor_type.elem_type for value in integers.graph.input} == {TensorProto.UINT8}
    assert [value.type.tensor_type.elem_type for value in integers.graph.output] == [TensorProto.UINT8]
    found = operators(optimized(integers))
    assert found[kernel] == 1
    assert not any(found[conversion] for conversion in CONVERSIONS)
    assert len(floats.graph.node) == 1


@pytest.mark.parametrize(("integer_s", "expected"), [(6.4, True), (6.6, False)])
def test_a_softmax_is_no_candidate_where_conversions_around_the_float_one_are_faster(integer_s: float, expected: bool) -> None:
    proto = parse("g (float[N, 8] x) => (float[N, 8] y) { y = Softmax (x) }")
    seconds = {"Softmax": 1.0, "QuantizeLinear": 3.0, "DequantizeLinear": 2.0, "Sum": 0.5}
    watch = stopwatch(lambda model: integer_s if len(model.graph.node) > 1 else seconds[model.graph.node[0].op_type])
    (carrier,) = find_carriers(load(proto))
    assert pricer_of(proto, {"x": normal(1, 2, 8)}, watch).worthwhile(carrier) == expected


@pytest.mark.parametrize("body", ["y = Sigmoid (x)", "y = MaxPool <kernel_shape = [2, 2]> (x)"])
def test_operators_that_are_priced_otherwise_are_always_candidates(body: str) -> None:
    proto = parse(f"g (float[N, 8, 6, 6] x) => (float[A, B, C, D] y) {{ {body} }}")
    watch = stopwatch(lambda model: 99.0 if in_bytes(model) else 1.0)
    (carrier,) = find_carriers(load(proto))
    assert pricer_of(proto, {"x": normal(1, 2, 8, 6, 6)}, watch).worthwhile(carrier)
    assert not watch.seen


@pytest.mark.parametrize(("integers", "kind"), [("full", TensorProto.UINT8), ("reduced", TensorProto.UINT8), ("signed", TensorProto.INT8)])
def test_what_is_between_operators_is_measured_in_the_bytes_that_they_exchange(integers: str, kind: int) -> None:
    proto = parse("g (float[N, 8, 6, 6] x) => (float[A, B, C, D] y) { y = MaxPool <kernel_shape = [2, 2]> (x) }")
    watch = stopwatch()
    pricer = pricer_of(proto, {"x": normal(1, 2, 8, 6, 6)}, watch, integers)
    (carrier,) = find_carriers(load(proto))
    pricer.carry(carrier)
    pricer.boundary("x")
    values = [value.type.tensor_type.elem_type for model in watch.seen[1:] for value in (*model.graph.input, *model.graph.output)]
    assert values == [kind, kind, TensorProto.FLOAT, kind, kind, TensorProto.FLOAT]


def test_the_way_into_integers_and_out_is_measured_at_the_shape_of_the_value() -> None:
    case = CASES["conv2d"]
    seconds = {"QuantizeLinear": 3.0, "DequantizeLinear": 2.0}
    watch = stopwatch(lambda model: seconds[model.graph.node[0].op_type])
    pricer = pricer_of(case.proto(), case.data().first(1), watch)
    assert pricer.boundary("x") == (3.0, 2.0)
    assert [len(model.graph.node) for model in watch.seen] == [1, 1]


def test_changes_are_relative_to_the_operator_in_place() -> None:
    case = CASES["conv2d"]
    watch = stopwatch(lambda model: 0.5 if in_bytes(model) else 2.0)
    pricer = pricer_of(case.proto(), case.data().first(1), watch)
    _, site = site_of(case.proto())
    assert pricer.reference(site) == 2.0
    assert pricer.change(site, Form("dense", (), "int8", "dense", "integer")) == pytest.approx(-1.5)
    assert pricer.change(site, UNCHANGED) == 0.0


def test_integers_are_scaled_to_what_they_take_together() -> None:
    """One layer of 0.5 s alone takes 0.25 s among others, so its change grows from -1.5 s to -1.75 s."""
    case = CASES["conv2d"]
    pricer = pricer_of(case.proto(), case.data().first(1), stopwatch(lambda model: 0.5 if in_bytes(model) else 2.0))
    _, site = site_of(case.proto())
    form = Form("dense", (), "int8", "dense", "integer")
    pricer.reference(site)
    pricer.calibrate_integers({site.name: pricer.change(site, form)}, -1.75)
    assert pricer.change(site, form) == pytest.approx(-1.75)
    assert pricer.change(site, Form("lowrank", (4,), "float", "contract")) == 0.0  # as fast as before, says the stopwatch
    pricer.calibrate_integers({}, -1.0)  # nothing to learn from
    assert pricer.change(site, form) == pytest.approx(-1.75)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (Form("dense", (), "int4"), UNCHANGED),
        (Form("lowrank", (4,), "int4", "dense"), UNCHANGED),
        (Form("lowrank", (4,), "int4", "contract"), Form("lowrank", (4,), "float", "contract")),
        (Form("dense", (), "kmeans3", "dense", "integer"), Form("dense", (), "int8", "dense", "integer")),
        (Form("lowrank", (4,), "int4", "dense", "dynamic"), Form("dense", (), "int8", "dense", "dynamic")),
        (Form("lowrank", (4,), "int4", "contract", "dynamic"), Form("lowrank", (4,), "int8", "contract", "dynamic")),
        (Form("dense", (), "nbits4-b32", "dense", "nbits"), Form("dense", (), "nbits4-b32", "dense", "nbits")),
        (Form("dense", (), "int4-rows", "dense", "rows"), Form("dense", (), "int4-rows", "dense", "rows")),
        (Form("dense", (), "int8", "dense", "rows"), Form("dense", (), "int8", "dense", "rows")),
    ],
    ids=str,
)
def test_what_runs_alike_is_measured_once(form: Form, expected: Form) -> None:
    assert as_run(form) == expected
    assert changes_latency(form) == (expected != UNCHANGED)
    assert as_run(as_run(form)) == expected
