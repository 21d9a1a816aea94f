"""Tiny models that several test files share: ONNX text with seeded weights, and what is always done with them."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from intaglio.ops.arithmetic import ARITHMETICS
from intaglio.ops.decompositions import DECOMPOSITIONS
from intaglio.ops.form import CARRIED, UNCHANGED, Form
from intaglio.ops.moment import Moment
from intaglio.passes.assemble import assemble, nominal_ranges
from intaglio.passes.calibrate import calibrate, observe
from intaglio.passes.data import Dataset, input_specs, open_dataset
from intaglio.passes.fit import pack
from intaglio.passes.graph import all_names
from intaglio.passes.kernels import INTEGERS
from intaglio.passes.load import load
from intaglio.passes.model import Model
from intaglio.passes.options import Runtime
from intaglio.passes.regions import find_carriers
from intaglio.passes.rewrite import declines, fragment, ghosts, rewrite
from intaglio.passes.sites import Site, Sites, find_sites

Array = np.ndarray
Feed = Mapping[str, Array]


def normal(seed: int, *shape: int, dtype: object = np.float32) -> Array:
    """Seeded weights whose columns have about unit length, shape (outputs or inputs, ...)."""
    values = np.random.default_rng(seed).standard_normal(shape) / max(1, np.prod(shape[1:])) ** 0.5
    return np.asarray(values.astype(dtype))


def parse(text: str, weights: Mapping[str, Array] | None = None, *, opset: int = 18, ir_version: int = 9) -> onnx.ModelProto:
    """A model from the text of its graph; `weights` become initializers, listed as inputs before IR version 4."""
    graph = onnx.parser.parse_graph(text)
    for name, array in (weights or {}).items():
        graph.initializer.append(numpy_helper.from_array(array, name))
        if ir_version < 4:
            graph.input.append(helper.make_tensor_value_info(name, graph.initializer[-1].data_type, array.shape))
    domains = {node.domain for node in graph.node if node.domain}
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in sorted(domains))]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, producer_name="")


def run(proto: onnx.ModelProto, feed: Feed, *, optimize: bool = True) -> list[Array]:
    """Outputs under ONNX Runtime, with all its optimizations or with none."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feed)))


def optimized(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model as ONNX Runtime runs it, with all its optimizations: what is left of its graph, constants folded."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(path)


def operators(proto: onnx.ModelProto) -> Counter[str]:
    """How many nodes of each type the main graph has."""
    return Counter(node.op_type for node in proto.graph.node)


@dataclass(frozen=True)
class Case:
    """A model around one kind of site.

    Attributes:
        text: its graph.
        weights: the weights to compress and the small ones.
        inputs: data as `open_dataset` takes it.
        opset: of the default domain.
    """

    text: str
    weights: Mapping[str, Array]
    inputs: Mapping[str, Array]
    opset: int = 18
    sites: tuple[str, ...] = field(default=("w",))

    def proto(self, *, opset: int | None = None, ir_version: int = 9) -> onnx.ModelProto:
        """The model."""
        return parse(self.text, self.weights, opset=opset or self.opset, ir_version=ir_version)

    def data(self) -> Dataset:
        """Its samples."""
        return open_dataset(self.inputs, input_specs(self.proto()))


def _image(*shape: int) -> dict[str, Array]:
    return {"x": np.random.default_rng(7).standard_normal((6, *shape)).astype(np.float32)}


def _conv(attributes: str, shape: tuple[int, ...], image: tuple[int, ...], op_type: str = "Conv") -> Case:
    dims = ", ".join(map(str, image))
    text = f"g (float[N, {dims}] x) => (float[N, C, {', '.join('PQR'[: len(image) - 1])}] y) {{ y = {op_type} <{attributes}> (x, w, b) }}"
    outputs = shape[1] if "Transpose" in op_type else shape[0]
    return Case(text, {"w": normal(1, *shape), "b": normal(2, outputs)}, _image(*image))


def _recurrent(op_type: str, gates: int, extra: str = "") -> Case:
    text = f"""g (float[S, B, 12] x) => (float[S, 2, B, 8] y) {{
        y = {op_type} <hidden_size = 8, direction = "bidirectional"{extra}> (x, w, r, b)
    }}"""
    weights = {"w": normal(1, 2, gates * 8, 12), "r": normal(2, 2, gates * 8, 8), "b": normal(3, 2, gates * 16)}
    data = {"x": np.random.default_rng(7).standard_normal((6, 5, 2, 12)).astype(np.float32)}
    return Case(text, weights, data, sites=("w", "r") if gates > 1 else ())


_ROWS = _image(5, 16)
_VECTORS = _image(16)

CASES: dict[str, Case] = {
    "matmul": Case(
        "g (float[N, S, 16] x) => (float[N, S, 24] y) { h = MatMul (x, w) y = Add (h, b) }",
        {"w": normal(1, 16, 24), "b": normal(2, 24)},
        _ROWS,
    ),
    "matmul_left": Case("g (float[N, 16, S] x) => (float[N, 24, S] y) { y = MatMul (w, x) }", {"w": normal(1, 24, 16)}, _image(16, 5)),
    "gemm": Case("g (float[N, 16] x) => (float[N, 24] y) { y = Gemm (x, w, b) }", {"w": normal(1, 16, 24), "b": normal(2, 24)}, _VECTORS),
    "gemm_trans_b": Case(
        "g (float[N, 16] x) => (float[N, 24] y) { y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, b) }",
        {"w": normal(1, 24, 16), "b": normal(2, 24)},
        _VECTORS,
    ),
    "gemm_trans_a": Case(
        "g (float[16, N] x) => (float[N, 24] y) { y = Gemm <transA = 1, alpha = 3.0> (x, w, b) }",
        {"w": normal(1, 16, 24), "b": normal(2, 24)},
        {"x": np.random.default_rng(7).standard_normal((6, 16, 4)).astype(np.float32)},
    ),
    "gemm_weight_a": Case(
        "g (float[N, 16] x) => (float[24, N] y) { y = Gemm <transB = 1> (w, x, b) }",
        {"w": normal(1, 24, 16), "b": normal(2, 24, 1)},
        _VECTORS,
    ),
    "gemm_weight_a_trans_a": Case(
        "g (float[N, 16] x) => (float[24, N] y) { y = Gemm <transA = 1, transB = 1> (w, x, b) }",
        {"w": normal(1, 16, 24), "b": normal(2, 24, 1)},
        _VECTORS,
    ),
    "conv1d": _conv("kernel_shape = [3], strides = [2], pads = [1, 0]", (16, 8, 3), (8, 11)),
    "conv2d": _conv("kernel_shape = [3, 3], pads = [1, 1, 1, 1]", (8, 6, 3, 3), (6, 7, 8)),
    "conv2d_asymmetric": _conv("strides = [2, 1], dilations = [1, 2], pads = [0, 2, 1, 1]", (8, 6, 3, 2), (6, 9, 8)),
    "conv2d_same_upper": _conv('auto_pad = "SAME_UPPER", strides = [2, 2], kernel_shape = [3, 3]', (8, 6, 3, 3), (6, 8, 7)),
    "conv2d_same_lower": _conv('auto_pad = "SAME_LOWER", kernel_shape = [2, 3]', (8, 6, 2, 3), (6, 8, 7)),
    "conv2d_valid": _conv('auto_pad = "VALID"', (8, 6, 3, 3), (6, 8, 7)),
    "conv2d_groups": _conv("group = 2, pads = [1, 1, 1, 1]", (16, 4, 3, 3), (8, 6, 6)),
    "conv2d_depthwise": _conv("group = 32, pads = [1, 1, 1, 1]", (32, 1, 3, 3), (32, 4, 4)),
    "conv2d_pointwise": _conv("kernel_shape = [1, 1], strides = [2, 2]", (24, 16, 1, 1), (16, 6, 5)),
    "conv3d": _conv("strides = [1, 2, 1], pads = [1, 0, 1, 0, 1, 1]", (8, 4, 2, 3, 2), (4, 4, 5, 4)),
    "conv_transpose": _conv("strides = [2, 2], pads = [1, 0, 0, 1], output_padding = [1, 0]", (12, 4, 3, 3), (12, 5, 4), "ConvTranspose"),
    "fused_conv": _conv('pads = [1, 1, 1, 1], activation = "Relu"', (8, 6, 3, 3), (6, 5, 5), "com.microsoft.FusedConv"),
    "fused_matmul": Case(
        "g (float[N, 16, S] x) => (float[N, S, 24] y) { y = com.microsoft.FusedMatMul <transA = 1, transB = 1, alpha = 0.5> (x, w) }",
        {"w": normal(1, 24, 16)},
        _image(16, 5),
    ),
    "fused_gemm": Case(
        'g (float[N, 16] x) => (float[N, 24] y) { y = com.microsoft.FusedGemm <activation = "Relu", transB = 1> (x, w, b) }',
        {"w": normal(1, 24, 16), "b": normal(2, 24)},
        _VECTORS,
    ),
    "gather": Case(
        "g (int64[N, S] x) => (float[N, S, 16] y) { y = Gather (w, x) }",
        {"w": normal(1, 40, 16)},
        {"x": np.random.default_rng(7).integers(-40, 40, (6, 5))},
    ),
    "lstm": _recurrent("LSTM", 4),
    "gru": _recurrent("GRU", 3, ", linear_before_reset = 1"),
    "rnn": Case(
        "g (float[S, B, 16] x) => (float[S, 1, B, 20] y) { y = RNN <hidden_size = 20> (x, w, r) }",
        {"w": normal(1, 1, 20, 16), "r": normal(2, 1, 20, 20)},
        {"x": np.random.default_rng(7).standard_normal((6, 5, 2, 16)).astype(np.float32)},
        sites=("w", "r"),
    ),
}
"""One model per kind of operator and attribute that matters."""


def moments(model: Model, sites: Sites, data: Dataset, runtime: Runtime = Runtime()) -> dict[str, Moment]:  # noqa: B008
    """Second moments of all sites over all samples."""
    shapes = observe(model, sites.sites, data.first(1), runtime)
    return calibrate(model, sites.sites, shapes, data, np.arange(len(data)), runtime)


def compress(model: Model, forms: Mapping[str, Form], known: Mapping[str, Moment] | None = None) -> tuple[Model, dict[str, Array]]:
    """Fit the given forms and rewrite the model; returns it and Ŵ (groups, m, n) by site. Metrics default to the identity."""
    sites = find_sites(model)
    taken = frozenset(all_names(model.proto))
    fragments, weights = {}, {}
    for site in sites:
        form = forms.get(site.name, UNCHANGED)
        if form == UNCHANGED:
            continue
        moment = (known or {}).get(site.name) or Moment.isotropic(site.use.view.groups, site.use.view.n)
        arrays, weights[site.name] = pack(site, form, site.value(model), moment)
        fragments[site.name] = fragment(site, form, arrays, model.proto, taken, INTEGERS["full"])
    return rewrite(model, fragments, sites.sites), weights


def mocked(model: Model, forms: Mapping[str, Form]) -> Model:
    """The assembled model with zeros in place of fitted arrays: what depends on shapes alone, at once."""
    sites = find_sites(model)
    taken = frozenset(all_names(model.proto))
    fragments = {}
    for site in sites:
        form = forms.get(site.name, UNCHANGED)
        if form != UNCHANGED:
            arrays = tuple(tuple(np.zeros(spec.shape, spec.dtype) for spec in packed) for packed in ghosts(site, form))
            fragments[site.name] = fragment(site, form, arrays, model.proto, taken, INTEGERS["full"])
    carried = [carrier for carrier in find_carriers(model) if forms.get(carrier.name) == CARRIED]
    return assemble(model, fragments, sites.sites, carried, nominal_ranges)


def with_weight(proto: onnx.ModelProto, name: str, array: Array) -> onnx.ModelProto:
    """A copy in which one initializer of the main graph holds another array."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    tensor = next(t for t in copy.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    return copy


def site_of(proto: onnx.ModelProto, name: str = "w") -> tuple[Model, Site]:
    """The loaded model and the site of that name."""
    model = load(proto)
    return model, next(site for site in find_sites(model) if site.name == name)


SOME_STORAGES = ("float", "fp16", "int8", "int4", "int3-b32-asym", "planes3.0", "kmeans3", "vq4x4")
"""One storage of each kind; `tests/ops/storage` tries them all."""


def forms_of(site: Site) -> list[Form]:
    """Forms that the rewriter can give a site: `SOME_STORAGES` of the whole weight, and of every decomposition at its largest rank.

    Full ranks come in float storage, where the form is exact.
    """
    found = [Form("dense", (), storage) for storage in SOME_STORAGES]
    for (name, execution), decomposition in DECOMPOSITIONS.items():
        if decomposition.declines(site.use) is not None:
            continue
        found.append(Form(name, decomposition.full(site.use), "float", execution))
        found += [Form(name, ranks, storage, execution) for ranks in decomposition.grid(site.use)[-1:] for storage in SOME_STORAGES]
    return [form for form in dict.fromkeys(found) if declines(site, form) is None]


def narrow_forms(site: Site, storages: Sequence[str] = (*SOME_STORAGES, "int4-rows", "nbits4-b32")) -> list[Form]:
    """Forms in which a site computes in something narrower than floats: the whole weight, low rank both ways, and a base with a branch.

    Of the last only those whose kernels read float activations: the branch reads them too.
    """
    whole = [Form("dense", (), storage, "dense", arithmetic) for storage in storages for arithmetic in ARITHMETICS]
    low = [
        Form("lowrank", (4,), storage, execution, arithmetic)
        for storage in storages
        for execution in ("dense", "contract")
        for arithmetic in ARITHMETICS
    ]
    beside = [
        Form("residual", (2,), storage, "contract", arithmetic)
        for storage in storages
        for arithmetic in ARITHMETICS
        if not ARITHMETICS[arithmetic].coupled
    ]
    return [form for form in (*whole, *low, *beside) if declines(site, form) is None]


def is_exact(site: Site, form: Form) -> bool:
    """Whether a form loses nothing but float rounding."""
    full = form.decomposition == "dense" or DECOMPOSITIONS[form.decomposition, form.execution].full(site.use) == form.ranks
    return full and form.storage == "float"


def assert_close(actual: list[Array], expected: list[Array], relative: float, what: object = "") -> None:
    """Every output within `relative` of the largest magnitude of the expected one."""
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        scale = float(np.abs(np.asarray(b, np.float64)).max(initial=1e-30))
        error = float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max(initial=0.0))
        assert error <= relative * scale, f"{what}: off by {error / scale:.3g} of the largest entry"


def classifier(samples: int = 120) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A small convolutional network that classifies noisy templates, its head fitted by least squares, and labelled data.

    Weights of the layers before have falling spectra, as trained ones do. Inputs x (N, 4, 8, 8), output logits (N, 6).
    """
    rng = np.random.default_rng(11)

    def layer(*shape: int) -> Array:
        u, s, v = np.linalg.svd(normal(int(np.prod(shape)), shape[0], int(np.prod(shape[1:]))), full_matrices=False)
        spectrum = np.geomspace(1, 0.05, len(s)) * 1.5
        return np.asarray(((u * spectrum) @ v).reshape(shape), np.float32)

    labels = rng.integers(0, 6, samples)
    templates = rng.standard_normal((6, 4, 8, 8))
    x = (templates[labels] + 0.7 * rng.standard_normal((samples, 4, 8, 8))).astype(np.float32)
    body = """a = Conv <pads = [1, 1, 1, 1]> (x, c1) ra = Relu (a)
        b = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (ra, c2) rb = Relu (b)
        c = Conv (rb, c3) rc = Relu (c)
        f = Flatten (rc) h = Gemm <transB = 1> (f, g, gb) features = Relu (h)"""
    weights = {"c1": layer(16, 4, 3, 3), "c2": layer(24, 16, 3, 3), "c3": layer(32, 24, 1, 1), "g": layer(48, 512), "gb": normal(9, 48)}
    text = f"net (float[N, 4, 8, 8] x) => (float[N, 48] features) {{ {body} }}"
    (features,) = run(parse(text, weights), {"x": x})
    targets = 6.0 * np.eye(6)[labels]
    gram = features.T @ features + 0.1 * np.eye(48)
    weights["head"] = np.linalg.solve(gram, features.T @ targets).astype(np.float32)
    text = f"net (float[N, 4, 8, 8] x) => (float[N, 6] logits) {{ {body} logits = MatMul (features, head) }}"
    return parse(text, weights), {"x": x, "labels": labels}
