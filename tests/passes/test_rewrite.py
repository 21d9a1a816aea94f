"""Rewriting: every form on every kind of site computes what NumPy predicts, and nothing else in the model changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from intaglio.ops.form import Form
from intaglio.ops.moment import Moment
from intaglio.passes.assemble import assemble
from intaglio.passes.fit import pack
from intaglio.passes.graph import all_names
from intaglio.passes.kernels import INTEGERS
from intaglio.passes.load import load
from intaglio.passes.ranges import Range
from intaglio.passes.rewrite import array_specs, declines, fragment, ghosts
from intaglio.passes.sites import find_sites
from tests.models import CASES, Array, assert_close, compress, forms_of, is_exact, moments, normal, parse, run, site_of, with_weight
from tests.passes.test_sites import CHAINS, HEAD, LOOP, SCAN, nested

ROUNDING = 5e-6
"""Float32 sums of at most a few hundred terms, taken in another order or through factors: some tens of units in the last place."""

EXACT = 2e-5
"""As above, and the factors themselves are rounded to float32."""

HALF = 5e-3
"""Some units in the last place of float16 (2⁻¹¹), per factor."""

OLD_AND_NEW = [(7, 3), (9, 4), (11, 6), (13, 7), (17, 8), (21, 10)]


def check(proto: onnx.ModelProto, name: str, form: Form, feed: Mapping[str, Array], *, moment: bool = True) -> None:
    """Compress one site; the result is valid and computes what the original does with Ŵ in place of W, optimized or not."""
    model, site = site_of(proto, name)
    known = None
    if moment:
        known = {name: _moment(site.use.view.groups, site.use.view.n)}
    compressed, weights = compress(model, {name: form}, known)
    onnx.checker.check_model(compressed.proto, full_check=True)
    replaced = with_weight(proto, name, site.stored(weights[name]))
    expected, original = run(replaced, feed), run(proto, feed)
    for optimize in (False, True):
        actual = run(compressed.proto, feed, optimize=optimize)
        assert_close(actual, expected, ROUNDING, form)
        if is_exact(site, form):
            assert_close(actual, original, EXACT, form)


def _moment(groups: int, n: int) -> Moment:
    root = np.random.default_rng(3).standard_normal((groups, n, 2 * n))
    return Moment(root @ root.transpose(0, 2, 1) / (2 * n), 2 * n)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.sites])
def test_every_form_of_every_family_computes_the_predicted_weight(name: str) -> None:
    case = CASES[name]
    proto, feed = case.proto(), case.data().first(2)
    for site in find_sites(load(proto)):
        forms = forms_of(site)
        assert any(form.decomposition != "dense" for form in forms) or name == "conv2d_depthwise"
        for form in forms:
            check(proto, site.name, form, feed, moment=case.weights[site.name].ndim != 2 or "gather" not in name)


@pytest.mark.parametrize(("opset", "ir_version"), OLD_AND_NEW)
@pytest.mark.parametrize("name", ["matmul", "gemm_trans_b", "gemm_weight_a", "conv2d", "conv1d", "conv_transpose", "gather", "lstm"])
def test_old_and_new_models(name: str, opset: int, ir_version: int) -> None:
    """Before IR 8 there are no functions: the decode programs' nodes stand in the graph. Before IR 4 initializers are inputs."""
    case = CASES[name]
    proto = case.proto(opset=opset, ir_version=ir_version)
    model, site = site_of(proto)
    for form in forms_of(site):
        compressed, weights = compress(model, {"w": form})
        onnx.checker.check_model(compressed.proto, full_check=True)
        assert bool(compressed.proto.functions) == (ir_version >= 8 and form.storage not in ("float", "fp16"))
        assert [o.version for o in compressed.proto.opset_import if not o.domain] == [opset]
        assert compressed.proto.ir_version == ir_version
        if ir_version < 4:
            listed = {value.name for value in compressed.proto.graph.input}
            assert listed == {"x", *(tensor.name for tensor in compressed.proto.graph.initializer)}
        feed = case.data().first(1)
        expected = run(with_weight(proto, "w", site.stored(weights["w"])), feed)
        assert_close(run(compressed.proto, feed), expected, ROUNDING, form)
        assert_close(run(compressed.proto, feed, optimize=False), expected, ROUNDING, form)


def optimized_ops(proto: onnx.ModelProto, path: Path) -> Counter[str]:
    """Operators that are left when ONNX Runtime has optimized the model as it will for inference."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path)
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("name", ["matmul", "gemm", "conv2d", "conv_transpose", "gather", "gru", "fused_matmul"])
def test_dense_execution_leaves_no_trace_once_loaded(name: str, tmp_path: Path) -> None:
    """Decode programs are folded: what runs is the original graph."""
    proto = CASES[name].proto()
    model, site = site_of(proto)
    original = optimized_ops(proto, tmp_path / "original.onnx")
    for form in forms_of(site):
        if form.execution == "dense":
            compressed, _ = compress(model, {"w": form})
            assert optimized_ops(compressed.proto, tmp_path / "compressed.onnx") == original, form


def test_everything_else_survives() -> None:
    text = """g (float[batch, seq, 16] x, int64[other] unused) => (float[batch, seq, 24] y, float[batch, seq, 16] side) {
        side = Relu (x)
        h = MatMul (side, w)
        y = Add (h, b)
    }"""
    proto = parse(text, {"w": normal(1, 16, 24), "b": normal(2, 24), "spare": normal(3, 4)}, ir_version=9)
    proto.doc_string, proto.producer_name, proto.producer_version, proto.domain, proto.model_version = "about", "me", "1.2", "d", 7
    proto.metadata_props.add(key="classes", value="cat,dog")
    proto.graph.doc_string = "the graph"
    proto.graph.input[0].doc_string = "the input"
    for node in proto.graph.node:
        node.name, node.doc_string = f"/layer/{node.op_type}", "a node"
    proto.opset_import.append(helper.make_opsetid("my.domain", 3))
    model, site = site_of(proto)
    for form in forms_of(site):
        result = compress(model, {"w": form})[0].proto
        assert list(result.graph.input) == list(proto.graph.input)
        assert list(result.graph.output) == list(proto.graph.output)
        assert list(result.metadata_props) == list(proto.metadata_props)
        for field in ("doc_string", "producer_name", "producer_version", "domain", "model_version", "ir_version"):
            assert getattr(result, field) == getattr(proto, field)
        assert result.graph.doc_string == "the graph"
        assert result.graph.name == proto.graph.name
        assert list(result.opset_import)[:2] == list(proto.opset_import)
        kept = [node for node in result.graph.node if node.name]
        sums = form.decomposition == "residual" and form.execution == "contract"
        assert [n.op_type for n in kept] == ["Relu", "Add" if sums else "MatMul", "Add"]
        assert [(n.name, n.output[0], n.doc_string) for n in kept] == [(n.name, n.output[0], n.doc_string) for n in proto.graph.node]
        assert [t.name for t in result.graph.initializer][:1] == ["b"] or form == Form("dense")


def test_the_model_that_is_rewritten_does_not_change() -> None:
    proto = CASES["conv2d"].proto()
    model, site = site_of(proto)
    before = model.proto.SerializeToString(deterministic=True)
    for form in forms_of(site):
        compress(model, {"w": form})
    assert model.proto.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("chain", CHAINS)
def test_weights_behind_chains(chain: str) -> None:
    """Dense forms restore the anchor under its name; contracted ones replace the operator and the chain is dead."""
    text, weights = CHAINS[chain]
    proto = parse(f"{HEAD} {{ {text} y = MatMul (x, v) }}", weights)
    model, site = site_of(proto)
    feed = {"x": normal(9, 5, 16)}
    forms = forms_of(site)
    assert {form.execution for form in forms} == {"dense", "contract"}
    for form in forms:
        compressed, weights = compress(model, {"w": form})
        onnx.checker.check_model(compressed.proto, full_check=True)
        for optimize in (False, True):
            expected = [feed["x"] @ weights["w"][0].T.astype(np.float32)]
            narrow = form.decomposition != "dense" and array_specs(site, form)[0][0].dtype.itemsize == 2  # multiplied in float16
            assert_close(run(compressed.proto, feed, optimize=optimize), expected, HALF if narrow else ROUNDING, form)
        if is_exact(site, form):
            tolerance = HALF if narrow else EXACT
            assert_close(run(compressed.proto, feed), run(proto, feed), tolerance, form)
        if form.execution == "contract":
            assert "w" not in {tensor.name for tensor in compressed.proto.graph.initializer}
            assert all(spec.dtype == np.float32 for spec, _ in array_specs(site, form))


def test_a_narrowing_cast_gives_the_factors_the_narrow_type() -> None:
    text = "g (float16[N, 16] x) => (float16[N, 24] y) { v = Cast <to = 10> (w) y = MatMul (x, v) }"
    proto = parse(text, {"w": normal(1, 16, 24)})
    model, site = site_of(proto)
    feed = {"x": normal(9, 5, 16, dtype=np.float16)}
    for form in forms_of(site):
        compressed, weights = compress(model, {"w": form})
        onnx.checker.check_model(compressed.proto, full_check=True)
        expected = run(with_weight(proto, "w", site.stored(weights["w"])), feed)
        assert_close(run(compressed.proto, feed), expected, HALF, form)


@pytest.mark.parametrize(("dtype", "kind", "tolerance"), [(np.float16, "float16", HALF), (np.float64, "double", 1e-12)])
@pytest.mark.parametrize("text", ["MatMul (x, w)", "Gemm <transB = 0> (x, w)"])
def test_half_and_double_models(text: str, dtype: type, kind: str, tolerance: float) -> None:
    proto = parse(f"g ({kind}[N, 16] x) => ({kind}[N, 24] y) {{ y = {text} }}", {"w": normal(1, 16, 24, dtype=dtype)})
    model, site = site_of(proto)
    feed = {"x": normal(9, 5, 16, dtype=dtype)}
    for form in forms_of(site):
        compressed, weights = compress(model, {"w": form})
        onnx.checker.check_model(compressed.proto, full_check=True)
        expected = run(with_weight(proto, "w", site.stored(weights["w"])), feed)
        assert_close(run(compressed.proto, feed), expected, tolerance, form)


def test_stored_integers_are_replaced_with_their_widening() -> None:
    codes = np.random.default_rng(1).integers(-127, 128, (16, 24), np.int8)
    text = f"{HEAD} {{ v = DequantizeLinear <axis = 1> (w, s) y = MatMul (x, v) }}"
    proto = parse(text, {"w": codes, "s": np.linspace(0.001, 0.002, 24, dtype=np.float32)}, opset=13)
    model, site = site_of(proto, "v")
    feed = {"x": normal(9, 5, 16)}
    for form in forms_of(site):
        compressed, weights = compress(model, {"v": form})
        onnx.checker.check_model(compressed.proto, full_check=True)
        assert {t.name for t in compressed.proto.graph.initializer}.isdisjoint({"w", "s"})
        assert_close(run(compressed.proto, feed), [feed["x"] @ weights["v"][0].T.astype(np.float32)], ROUNDING, form)


def test_a_tied_weight_changes_for_all_its_readers() -> None:
    text = "g (int64[N, S] x) => (float[N, S, 40] y) { e = Gather (w, x) t = Transpose (w) y = MatMul (e, t) }"
    proto = parse(text, {"w": normal(1, 40, 16)})
    _, site = site_of(proto)
    feed = {"x": np.arange(10).reshape(2, 5)}
    for form in forms_of(site):
        assert form.execution == "dense"
        check(proto, "w", form, feed, moment=False)
    assert declines(site, Form("lowrank", (8,), "float", "contract")) == "a tied weight whose uses read it differently"


def test_readers_of_the_same_shape_may_still_read_differently() -> None:
    """A square weight and its transpose have one view but not one meaning."""
    text = "g (float[N, 24] x) => (float[N, 24] y) { a = MatMul (x, w) t = Transpose (w) y = MatMul (a, t) }"
    _, site = site_of(parse(text, {"w": normal(1, 24, 24)}))
    assert site.uses[0].use.view == site.uses[1].use.view
    assert declines(site, Form("lowrank", (8,), "float", "contract")) == "a tied weight whose uses read it differently"


def test_readers_that_read_alike_share_contracted_factors() -> None:
    text = "g (float[N, 24] x) => (float[N, 24] y) { a = MatMul (x, w) r = Relu (a) y = MatMul (r, w) }"
    proto = parse(text, {"w": normal(1, 24, 24)})
    check(proto, "w", Form("lowrank", (8,), "int8", "contract"), {"x": normal(9, 5, 24)})
    compressed, _ = compress(load(proto), {"w": Form("lowrank", (8,), "float", "contract")})
    assert len(compressed.proto.graph.initializer) == 2


def test_branches() -> None:
    """The captured weight can only be dense; the branch's own weight may also be contracted, inside the branch."""
    proto = nested(normal(1, 16, 24))
    model = load(proto)
    captured, own = find_sites(model)
    assert declines(captured, Form("lowrank", (8,), "float", "contract")) == "used in another graph than it is defined in"
    x = normal(9, 5, 16)
    for site, choice, sign in ((captured, True, 1), (own, False, -1)):
        forms = forms_of(site)
        assert any(form.execution == "contract" for form in forms) == (site is own)
        for form in forms:
            compressed, weights = compress(model, {site.name: form})
            onnx.checker.check_model(compressed.proto, full_check=True)
            for optimize in (False, True):
                results = {c: run(compressed.proto, {"x": x, "c": np.array(c)}, optimize=optimize) for c in (True, False)}
                assert_close(results[choice], [x @ weights[site.name][0].T.astype(np.float32)], ROUNDING, form)
                assert_close(results[not choice], [-sign * x @ normal(1, 16, 24)], ROUNDING, form)


@pytest.mark.parametrize(("text", "shape"), [(SCAN, (16, 24)), (LOOP, (16, 16))])
def test_loops_and_scans(text: str, shape: tuple[int, int]) -> None:
    proto = parse(text, {"w": normal(1, *shape), "axes": np.array([0])})
    feeds = {"Scan": {"i": normal(4, 24), "x": normal(9, 3, 16)}, "Loop": {"n": np.array(3), "x": normal(9, 4, 16)}}
    _, site = site_of(proto)
    for form in forms_of(site):
        check(proto, "w", form, feeds[proto.graph.node[0].op_type])


def test_a_constant_node_is_replaced() -> None:
    proto = parse(f"{HEAD} {{ y = MatMul (x, w) }}")
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(normal(1, 16, 24))))
    model, site = site_of(proto)
    x = normal(9, 5, 16)
    for form in forms_of(site):
        compressed, weights = compress(model, {"w": form})
        onnx.checker.check_model(compressed.proto, full_check=True)
        assert all(node.op_type != "Constant" for node in compressed.proto.graph.node)
        assert_close(run(compressed.proto, {"x": x}), [x @ weights["w"][0].T.astype(np.float32)], ROUNDING, form)


def test_a_bfloat16_weight_stays_bfloat16_for_its_other_readers() -> None:
    proto = parse(f"{HEAD} {{ v = Cast <to = 1> (w) y = MatMul (x, v) }}", {"w": normal(1, 16, 24, dtype=ml_dtypes.bfloat16)})
    _, site = site_of(proto)
    ((spec, _),) = array_specs(site, Form("dense", (), "int8"))
    assert spec.dtype == ml_dtypes.bfloat16
    assert declines(site, Form("dense", (), "fp16")) == "already bfloat16"
    assert declines(site, Form("lowrank", (8,), "int8", "dense")) == "ONNX Runtime multiplies no bfloat16 on processors"
    assert declines(site, Form("lowrank", (8,), "int8", "contract")) is None


def test_new_names_avoid_those_of_the_model() -> None:
    text = f"{HEAD} {{ taken = Relu (x) y = MatMul (taken, w) }}"
    proto = parse(text, {"w": normal(1, 16, 24)})
    proto.graph.node[0].output[0] = proto.graph.node[1].input[0] = "w.q"
    for form in forms_of(site_of(proto)[1]):
        check(proto, "w", form, {"x": normal(9, 5, 16)})


@pytest.mark.parametrize("name", CASES)
def test_ghosts_have_the_shapes_of_the_packed_arrays(name: str) -> None:
    case = CASES[name]
    model = load(case.proto())
    sites = find_sites(model)
    known = moments(model, sites, case.data())
    for site in sites:
        for form in forms_of(site):
            packed, _ = pack(site, form, site.value(model), known[site.name])
            shapes = [[(a.shape, a.dtype) for a in arrays] for arrays in packed]
            assert [[(a.shape, a.dtype) for a in arrays] for arrays in ghosts(site, form)] == shapes, form


@st.composite
def chains(draw: st.DrawFn) -> tuple[onnx.ModelProto, dict[str, Form]]:
    """A random chain of layers with residual connections, and a form for each of its weights."""
    lines, weights, forms = [], {}, {}
    value, width, widths = "x", 16, {"x": 16}
    for number in range(draw(st.integers(1, 5))):
        after, name, out = f"v{number}", f"w{number}", draw(st.sampled_from([16, 20, 24, 33]))
        kind = draw(st.sampled_from(["MatMul", "Gemm", "GemmT", "Left", "Relu", "Add"]))
        if kind == "Add":
            twin = draw(st.sampled_from([v for v, w in widths.items() if w == width]))
            lines.append(f"{after} = Add ({value}, {twin})")
        elif kind == "Relu":
            lines.append(f"{after} = Relu ({value})")
        else:
            shape = (out, width) if kind in ("GemmT", "Left") else (width, out)
            weights[name] = normal(number, *shape)
            call = {
                "MatMul": f"{after} = MatMul ({value}, {name})",
                "Gemm": f"{after} = Gemm <alpha = 0.5> ({value}, {name})",
                "GemmT": f"{after} = Gemm <transB = 1> ({value}, {name})",
                "Left": f"t{number} = Transpose ({value}) l{number} = MatMul ({name}, t{number}) {after} = Transpose (l{number})",
            }
            lines.append(call[kind])
            width = out
        value, widths[after] = after, width
    proto = parse(f"g (float[N, 16] x) => (float[N, {width}] {value}) {{ {' '.join(lines)} }}", weights)
    for site in find_sites(load(proto)):
        forms[site.name] = draw(st.sampled_from(forms_of(site)))
    return proto, forms


@settings(max_examples=40)
@given(chains())
def test_random_graphs(example: tuple[onnx.ModelProto, dict[str, Form]]) -> None:
    proto, forms = example
    model = load(proto)
    compressed, weights = compress(model, forms)
    onnx.checker.check_model(compressed.proto, full_check=True)
    replaced = proto
    for site in find_sites(model):
        replaced = with_weight(replaced, site.name, site.stored(weights[site.name]))
    feed = {"x": normal(9, 3, 16)}
    for optimize in (False, True):  # five layers deep, each with its own rounding
        assert_close(run(compressed.proto, feed, optimize=optimize), run(replaced, feed), 5 * ROUNDING, forms)


@st.composite
def convolutions(draw: st.DrawFn) -> onnx.ModelProto:
    """A two-dimensional Conv with random attributes."""
    kernel = [draw(st.integers(1, 3)) for _ in range(2)]
    groups = draw(st.sampled_from([1, 1, 2]))
    attributes = [f"group = {groups}", f"strides = {[draw(st.integers(1, 3)) for _ in range(2)]}"]
    auto_pad = draw(st.sampled_from(["", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if auto_pad:
        attributes.append(f'auto_pad = "{auto_pad}"')
    else:
        attributes.append(f"pads = {[draw(st.integers(0, 2)) for _ in range(4)]}")
    if not auto_pad.startswith("SAME"):
        attributes.append(f"dilations = {[draw(st.integers(1, 2)) for _ in range(2)]}")
    if draw(st.booleans()):
        attributes.append(f"kernel_shape = {kernel}")
    weight = normal(draw(st.integers(0, 9)), 16, 16 // groups, *kernel)
    text = f"g (float[N, 16, 8, 9] x) => (float[N, 16, P, Q] y) {{ y = Conv <{', '.join(attributes)}> (x, w) }}"
    return parse(text, {"w": weight})


@settings(max_examples=25)
@given(convolutions(), st.data())
def test_random_convolutions(proto: onnx.ModelProto, data: st.DataObject) -> None:
    if not find_sites(load(proto)).sites:  # a grouped 1×1 kernel is too small
        return
    forms = forms_of(site_of(proto)[1])
    for form in data.draw(st.lists(st.sampled_from(forms), min_size=1, max_size=4, unique=True)):
        check(proto, "w", form, {"x": normal(9, 2, 16, 8, 9)})


BESIDE = {
    "matmul": "g (float[N, S, 64] x) => (float[N, S, 96] y) { h = MatMul (x, w) y = Add (h, b) }",
    "gemm": "g (float[N, 64] x) => (float[N, 96] y) { y = Gemm <transB = 1> (x, w, b) }",
    "conv": "g (float[N, 8, 6, 6] x) => (float[N, 16, 6, 6] y) { y = Conv <pads = [1, 1, 1, 1]> (x, w, b) }",
}
RUN: dict[tuple[str, str], dict[str, int]] = {
    ("matmul", "nbits"): {"MatMulNBits": 1, "MatMul": 2, "Add": 2},
    ("matmul", "dynamic"): {"DynamicQuantizeMatMul": 1, "MatMul": 2, "Add": 2},
    ("matmul", "integer"): {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1, "MatMul": 2, "Add": 2},
    ("gemm", "nbits"): {"MatMulNBits": 1, "Gemm": 2},
    ("gemm", "dynamic"): {"DynamicQuantizeMatMul": 1, "Gemm": 2},
    ("gemm", "integer"): {"QuantizeLinear": 1, "QGemm": 1, "Gemm": 2},
    ("conv", "integer"): {"QuantizeLinear": 1, "QLinearConv": 1, "DequantizeLinear": 1, "Conv": 2, "Add": 1},
}
"""Operators of the optimized graph by model and arithmetic of the base; what changes layouts is left out."""

EIGHT_BITS = 0.03
"""Activations and outputs of about one, rounded to steps of 10/255: root mean squares of a hundredth each."""


@pytest.mark.parametrize(("name", "arithmetic"), RUN)
def test_a_branch_runs_in_floats_beside_the_narrow_kernel_of_its_base(name: str, arithmetic: str, tmp_path: Path) -> None:
    """Nothing decodes in a run, and what runs is the predicted weight, optimized or not."""
    weight = normal(1, *{"matmul": (64, 96), "gemm": (96, 64), "conv": (16, 8, 3, 3)}[name])
    proto = parse(BESIDE[name], {"w": weight, "b": normal(2, weight.shape[name == "matmul"])})
    feed = {"x": normal(3, *{"matmul": (2, 5, 64), "gemm": (5, 64), "conv": (2, 8, 6, 6)}[name])}
    form = Form("residual", (8,), "nbits4-b32" if arithmetic == "nbits" else "int4", "contract", arithmetic)
    model, site = site_of(proto)
    arrays, fitted = pack(site, form, site.value(model), Moment.isotropic(site.use.view.groups, site.use.view.n))
    part = fragment(site, form, arrays, model.proto, frozenset(all_names(model.proto)), INTEGERS["full"])
    built = assemble(model, {"w": part}, [site], [], lambda _, __, values: dict.fromkeys(values, Range.spanning(-5.0, 5.0)))
    onnx.checker.check_model(built.proto, full_check=True)
    found = optimized_ops(built.proto, tmp_path / "optimized.onnx")
    assert {op_type: count for op_type, count in found.items() if op_type not in ("ReorderOutput", "Transpose")} == RUN[name, arithmetic]
    (expected,) = run(with_weight(proto, "w", site.stored(fitted)), feed)
    for optimize in (False, True):
        (actual,) = run(built.proto, feed, optimize=optimize)
        assert np.linalg.norm(actual - expected) <= EIGHT_BITS * np.linalg.norm(expected)
