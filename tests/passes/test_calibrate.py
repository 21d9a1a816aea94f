"""Statistics: second moments accumulated inside the graph equal NumPy's on captured activations."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from onnx import helper

from intaglio.ops.moment import Moment
from intaglio.passes import calibrate as module
from intaglio.passes.calibrate import PAIRED, UNSEEN, Pair, PairedSite, Shapes, calibrate, calibrate_pairs, observe, sampled_positions
from intaglio.passes.data import Dataset, input_specs, open_dataset
from intaglio.passes.frontier import Frontier
from intaglio.passes.load import load
from intaglio.passes.options import Runtime
from intaglio.passes.sites import find_sites
from tests.models import CASES, Array, moments, normal, parse, run
from tests.passes.test_sites import LOOP, nested

FLOAT32 = 1e-5
"""Sums of at most a few hundred products in float32, inside the graph."""


def rows_of(name: str, x: Array) -> Array:
    """What multiplies the matrices of a case's weight: (groups, rows, n), from the stacked input of all samples."""
    if name in ("matmul_left", "fused_matmul"):
        return x.transpose(0, 2, 1).reshape(1, -1, 16)
    if name == "gemm_trans_a":
        return x.transpose(0, 2, 1).reshape(1, -1, 16)
    if name == "conv_transpose":
        return np.moveaxis(x, 1, -1).reshape(1, -1, 12)
    return x.reshape(1, -1, x.shape[-1])


def patches(x: Array, kernel: tuple[int, ...], pads: list[int], strides: list[int], dilations: list[int], groups: int = 1) -> Array:
    """im2col: (groups, rows, channels per group · kernel positions)."""
    axes = len(kernel)
    padded = np.pad(x, [(0, 0), (0, 0), *((pads[i], pads[i + axes]) for i in range(axes))])
    spans = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True))
    windows = sliding_window_view(padded, spans, axis=tuple(range(2, 2 + axes)))
    windows = windows[(slice(None), slice(None), *(slice(None, None, s) for s in strides), *(slice(None, None, d) for d in dilations))]
    columns = np.moveaxis(windows, 1, 1 + axes)  # samples, positions, channels, kernel
    channels = x.shape[1] // groups
    flat = columns.reshape(-1, groups, channels * int(np.prod(kernel)))
    return flat.transpose(1, 0, 2)


GEOMETRY = {
    "conv1d": ((3,), [1, 0], [2], [1], 1),
    "conv2d": ((3, 3), [1, 1, 1, 1], [1, 1], [1, 1], 1),
    "conv2d_asymmetric": ((3, 2), [0, 2, 1, 1], [2, 1], [1, 2], 1),
    "conv2d_same_upper": ((3, 3), [0, 1, 1, 1], [2, 2], [1, 1], 1),
    "conv2d_same_lower": ((2, 3), [1, 1, 0, 1], [1, 1], [1, 1], 1),
    "conv2d_valid": ((3, 3), [0, 0, 0, 0], [1, 1], [1, 1], 1),
    "conv2d_groups": ((3, 3), [1, 1, 1, 1], [1, 1], [1, 1], 2),
    "conv2d_depthwise": ((3, 3), [1, 1, 1, 1], [1, 1], [1, 1], 32),
    "conv2d_pointwise": ((1, 1), [0, 0, 0, 0], [2, 2], [1, 1], 1),
    "conv3d": ((2, 3, 2), [1, 0, 1, 0, 1, 1], [1, 2, 1], [1, 1, 1], 1),
    "fused_conv": ((3, 3), [1, 1, 1, 1], [1, 1], [1, 1], 1),
}


def second_moment(rows: Array) -> Array:
    return np.asarray(np.einsum("gki,gkj->gij", rows.astype(np.float64), rows) / rows.shape[1])


def assert_moment(moment: Moment, rows: Array) -> None:
    assert moment.rows == rows.shape[1]
    assert moment.matrix.dtype == np.float64
    expected = second_moment(rows)
    np.testing.assert_allclose(moment.matrix, expected, rtol=0, atol=FLOAT32 * np.abs(expected).max())


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("gather", "lstm", "gru", "rnn")])
def test_moments_equal_numpy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_PER_INPUT", 1 << 20)  # every position of a Conv
    case = CASES[name]
    model = load(case.proto())
    known = moments(model, find_sites(model), case.data())
    x = case.inputs["x"]
    assert_moment(known["w"], patches(x, *GEOMETRY[name]) if name in GEOMETRY else rows_of(name, x))


@pytest.mark.parametrize(("name", "hidden"), [("lstm", 8), ("gru", 8), ("rnn", 20)])
@pytest.mark.parametrize("named", [True, False])
def test_recurrent_weights_see_the_sequence_and_the_layers_own_output(name: str, hidden: int, named: bool) -> None:
    """R's rows are Y, whether or not the graph gives Y a name."""
    case = CASES[name]
    proto = case.proto()
    if not named:
        node, shape = proto.graph.node[0], [2 if name != "rnn" else 1, "B", hidden]
        del node.output[:], proto.graph.output[:]
        node.output.extend(["", "last"])
        proto.graph.output.append(helper.make_tensor_value_info("last", 1, shape))
    model = load(proto)
    data = open_dataset(case.inputs, input_specs(proto))
    sites = find_sites(model)
    known = moments(model, sites, data)
    assert observe(model, sites.sites, data.first(1), Runtime())["w"].input == case.inputs["x"].shape[1:]
    assert_moment(known["w"], case.inputs["x"].reshape(1, -1, case.inputs["x"].shape[-1]))
    outputs = np.stack([run(case.proto(), feed)[0] for feed, _ in data.feeds(np.arange(len(data)))])
    assert_moment(known["r"], outputs.transpose(2, 0, 1, 3, 4).reshape(outputs.shape[2], -1, hidden))


def test_embeddings_count_their_rows() -> None:
    case = CASES["gather"]
    model = load(case.proto())
    moment = moments(model, find_sites(model), case.data())["w"]
    counts = np.bincount(case.inputs["x"].reshape(-1) % 40, minlength=40)
    np.testing.assert_allclose(moment.matrix, ((1 - UNSEEN) * counts / 30 + UNSEEN / 40)[None])
    assert moment.rows == 30
    assert moment.diagonal


def test_sampled_positions_estimate_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "g (float[N, 4, 40, 40] x) => (float[N, 8, P, Q] y) { y = Conv <pads = [1, 1, 1, 1]> (x, w) }"
    model = load(parse(text, {"w": normal(1, 8, 4, 3, 3)}))
    image = np.cumsum(np.random.default_rng(0).standard_normal((16, 4, 40, 40)), axis=3).astype(np.float32) / 6
    data = open_dataset({"x": image}, input_specs(model.proto))
    (site,) = find_sites(model)
    shapes = observe(model, (site,), data.first(1), Runtime())
    assert sampled_positions(site, shapes["w"], 16) == (36, 1600)
    first, second = (moments(model, find_sites(model), data)["w"] for _ in range(2))
    np.testing.assert_array_equal(first.matrix, second.matrix)
    assert first.rows == 16 * 36
    monkeypatch.setattr(module, "ROWS_PER_INPUT", 1 << 20)
    whole = moments(model, find_sites(model), data)["w"]
    error = np.linalg.norm(first.matrix - whole.matrix) / np.linalg.norm(whole.matrix)
    assert error < 0.25  # 576 strongly correlated rows: an estimate, not noise


def count_nodes(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Records the operators of every model that is run."""
    seen: list[list[str]] = []

    class Spy(module.Executor):
        def __init__(self, proto: onnx.ModelProto, *args: object, **options: object) -> None:
            seen.append([node.op_type for node in proto.graph.node])
            super().__init__(proto, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("intaglio.passes.execute.Executor", Spy)  # which `Executor.of` makes
    return seen


def test_sites_that_read_the_same_value_share_a_gram(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "g (float[N, 16] x) => (float[N, 24] y) { q = MatMul (x, a) k = MatMul (x, b) s = Add (q, k) y = Gemm <transB = 1> (s, c) }"
    model = load(parse(text, {"a": normal(1, 16, 24), "b": normal(2, 16, 24), "c": normal(3, 24, 24)}))
    sites = find_sites(model)
    data = open_dataset({"x": normal(4, 8, 16)}, input_specs(model.proto))
    shapes = observe(model, sites.sites, data.first(1), Runtime())
    seen = count_nodes(monkeypatch)
    known = calibrate(model, sites.sites, shapes, data, np.arange(8), Runtime())
    (operators,) = seen
    assert operators.count("Size") == 2
    np.testing.assert_array_equal(known["a"].matrix, known["b"].matrix)
    assert known["c"].matrix.shape == (1, 24, 24)


def test_convs_with_another_geometry_do_not_share() -> None:
    text = """g (float[N, 6, 7, 8] x) => (float[N, 8, P, Q] y, float[N, 8, R, S] z) {
        y = Conv <pads = [1, 1, 1, 1]> (x, a)
        z = Conv <strides = [2, 2]> (x, b)
    }"""
    model = load(parse(text, {"a": normal(1, 8, 6, 3, 3), "b": normal(2, 8, 6, 3, 3)}))
    data = open_dataset(CASES["conv2d"].inputs, input_specs(model.proto))
    known = moments(model, find_sites(model), data)
    x = CASES["conv2d"].inputs["x"]
    assert_moment(known["a"], patches(x, (3, 3), [1, 1, 1, 1], [1, 1], [1, 1]))
    assert_moment(known["b"], patches(x, (3, 3), [0, 0, 0, 0], [2, 2], [1, 1]))


def two_layers() -> tuple[onnx.ModelProto, Dataset]:
    text = "g (float[N, 16] x) => (float[N, 16] y) { h = MatMul (x, a) r = Relu (h) y = Gemm (r, b) }"
    proto = parse(text, {"a": normal(1, 16, 24), "b": normal(2, 24, 16)})
    return proto, open_dataset({"x": normal(4, 20, 16)}, input_specs(proto))


@pytest.mark.parametrize("limit_bytes", [1, 1 << 29])
def test_segments_and_several_runs_give_the_same(limit_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    proto, data = two_layers()
    model = load(proto)
    monkeypatch.setattr(module, "MOMENT_LIMIT_BYTES", limit_bytes)
    seen = count_nodes(monkeypatch)
    known = moments(model, find_sites(model), data, Runtime(memory_limit_bytes=limit_bytes))
    assert len(seen) == (3 if limit_bytes == 1 else 2)  # one observes
    x = np.stack([data.rows[i]["x"][0] for i in range(20)])
    assert_moment(known["a"], x[None])
    assert_moment(known["b"], np.maximum(x @ normal(1, 16, 24), 0)[None])


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_batch_does_not_matter(batch: int) -> None:
    proto, data = two_layers()
    model = load(proto)
    known = moments(model, find_sites(model), data, Runtime(batch=batch))
    assert_moment(known["a"], np.stack([data.rows[i]["x"][0] for i in range(20)])[None])


def test_only_the_given_samples_count() -> None:
    proto, data = two_layers()
    model = load(proto)
    sites = find_sites(model).sites
    indices = np.array([3, 5, 11])
    known = calibrate(model, sites, observe(model, sites, data.first(1), Runtime()), data, indices, Runtime())
    assert_moment(known["a"], np.stack([data.rows[int(i)]["x"][0] for i in indices])[None])


def test_models_for_one_sample_at_a_time() -> None:
    proto = parse("g (float[1, 16] x) => (float[1, 24] y) { y = Gemm (x, w) }", {"w": normal(1, 16, 24)})
    x = normal(4, 9, 16)
    known = moments(load(proto), find_sites(load(proto)), open_dataset({"x": x}, input_specs(proto)))
    assert_moment(known["w"], x[None])


def test_several_inputs() -> None:
    text = "g (float[N, 16] x, float[N, S, 24] z) => (float[N, 20] y, float[N, S, 20] u) { y = MatMul (x, a) u = MatMul (z, b) }"
    proto = parse(text, {"a": normal(1, 16, 20), "b": normal(2, 24, 20)})
    x, z = normal(3, 7, 16), normal(4, 7, 3, 24)
    known = moments(load(proto), find_sites(load(proto)), open_dataset({"x": x, "z": z}, input_specs(proto)))
    assert_moment(known["a"], x[None])
    assert_moment(known["b"], z.reshape(1, -1, 24))


def test_sequences_of_different_length() -> None:
    case = CASES["matmul"]
    proto = case.proto()
    feeds = [{"x": normal(i, 1, length, 16)} for i, length in enumerate((3, 7, 1, 7, 5))]
    known = moments(load(proto), find_sites(load(proto)), open_dataset(feeds, input_specs(proto)))
    assert_moment(known["w"], np.concatenate([feed["x"] for feed in feeds], axis=1))


@pytest.mark.parametrize(("opset", "ir_version"), [(7, 3), (9, 4), (13, 7), (21, 10)])
@pytest.mark.parametrize("name", ["matmul", "gemm_trans_b", "conv2d", "lstm", "conv_transpose"])
def test_old_models(name: str, opset: int, ir_version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_PER_INPUT", 1 << 20)
    case = CASES[name]
    new, old = load(case.proto()), load(case.proto(opset=opset, ir_version=ir_version))
    expected = moments(new, find_sites(new), case.data())
    for site, moment in moments(old, find_sites(old), case.data()).items():
        np.testing.assert_allclose(moment.matrix, expected[site].matrix, rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize(("dtype", "kind"), [(np.float16, "float16"), (np.float64, "double")])
def test_half_and_double_models_are_summed_in_float32(dtype: type, kind: str) -> None:
    """In float16 a sum of 4000 squares would overflow."""
    proto = parse(f"g ({kind}[N, 16] x) => ({kind}[N, 24] y) {{ y = MatMul (x, w) }}", {"w": normal(1, 16, 24, dtype=dtype)})
    x = (normal(4, 4000, 16) * 40).astype(dtype)
    known = moments(load(proto), find_sites(load(proto)), open_dataset({"x": x}, input_specs(proto)), Runtime(batch=4000))
    assert_moment(known["w"], x[None].astype(np.float64))


def test_a_cast_decides_what_is_summed() -> None:
    text = "g (float16[N, 16] x) => (float16[N, 24] y) { v = Cast <to = 10> (w) y = MatMul (x, v) }"
    proto = parse(text, {"w": normal(1, 16, 24)})
    x = normal(4, 50, 16, dtype=np.float16)
    known = moments(load(proto), find_sites(load(proto)), open_dataset({"x": x}, input_specs(proto)))
    assert_moment(known["w"], x[None].astype(np.float64))


def test_sites_in_nested_graphs_have_an_isotropic_metric() -> None:
    for proto, inputs in (
        (nested(), {"x": normal(4, 6, 16), "c": np.array(True)}),
        (parse(LOOP, {"w": normal(1, 16, 16)}), {"x": normal(4, 3, 4, 16), "n": np.array(2)}),
    ):
        model = load(proto)
        for site, moment in moments(model, find_sites(model), open_dataset(inputs, input_specs(proto))).items():
            assert (moment.diagonal, moment.rows) == (True, 0), site
            np.testing.assert_array_equal(moment.matrix, 1.0)


@pytest.mark.parametrize("scale", [1e25, -3e38])
def test_inputs_too_large_to_be_squared_have_an_isotropic_metric(scale: float) -> None:
    proto = parse("g (float[N, 16] x) => (float[N, 24] y) { y = MatMul (x, w) }", {"w": normal(1, 16, 24)})
    x = np.float32(scale) * np.sign(normal(2, 6, 16))
    model = load(proto)
    moment = moments(model, find_sites(model), open_dataset({"x": x}, input_specs(proto)))["w"]
    assert (moment.diagonal, moment.rows) == (True, 0)
    np.testing.assert_array_equal(moment.matrix, 1.0)


def test_observed_shapes() -> None:
    expected = {
        "matmul": Shapes((1, 5, 16), (1, 5, 24)),
        "conv2d": Shapes((1, 6, 7, 8), (1, 8, 7, 8)),
        "gather": Shapes((1, 5), (1, 5, 16)),
        "lstm": Shapes((5, 2, 12), (5, 2, 2, 8)),
    }
    for name, shapes in expected.items():
        case = CASES[name]
        model = load(case.proto())
        assert observe(model, find_sites(model).sites, case.data().first(1), Runtime())["w"] == shapes


def test_calibration_leaves_the_model_as_it_is() -> None:
    proto, data = two_layers()
    model = load(proto)
    before = model.proto.SerializeToString(deterministic=True)
    moments(model, find_sites(model), data)
    assert model.proto.SerializeToString(deterministic=True) == before


# pairs


def scaled(name: str, scale: Array) -> onnx.ModelProto:
    """A case's model whose operator reads x·scale."""
    proto = CASES[name].proto()
    node = next(node for node in proto.graph.node if "w" in node.input)
    node.input[list(node.input).index("x")] = "scaled"
    proto.graph.node.insert(0, helper.make_node("Mul", ["x", "scale"], ["scaled"]))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(scale, np.float32), "scale"))
    return proto


def pairs(name: str, scale: Array, folds: int = 1, batch: int = 16) -> tuple[Pair, ...]:
    """Of a case's operator that reads x·scale, against one that reads x."""
    reference, model = (load(scaled(name, each)) for each in (np.ones_like(scale), scale))
    data = open_dataset(CASES[name].inputs, input_specs(model.proto))
    (site,) = (site for site in find_sites(reference) if site.name == "w")
    shapes = observe(reference, (site,), data.first(1), Runtime())
    runtime = Runtime(batch=batch)
    whole = (Frontier(each, data, np.arange(len(data)), runtime) for each in (reference, model))
    return calibrate_pairs(*whole, [PairedSite(site, site)], shapes, runtime, folds=folds)["w"]


PAIRED_CASES = [name for name in CASES if name not in ("gather", "lstm", "gru", "rnn")]


def test_every_operator_of_pairs_is_tried() -> None:
    assert {node.op_type for name in PAIRED_CASES for node in CASES[name].proto().graph.node if "w" in node.input} == set(PAIRED)


def assert_pair(pair: Pair, reference: Array, current: Array) -> None:
    """Rows (groups, rows, n)."""
    assert_moment(pair.moment, current)
    cross = np.einsum("gki,gkj->gij", reference.astype(np.float64), current) / reference.shape[1]
    np.testing.assert_allclose(pair.cross, cross, rtol=0, atol=FLOAT32 * np.abs(cross).max())
    assert pair.moment.mean is not None
    for found, rows in ((pair.moment.mean, current), (pair.mean, reference)):
        exact = rows.astype(np.float64).mean(1)
        np.testing.assert_allclose(found, exact, rtol=0, atol=FLOAT32 * np.abs(rows).max())


@pytest.mark.parametrize("name", PAIRED_CASES)
def test_products_with_a_references_inputs_equal_numpy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_PER_INPUT", 1 << 20)  # every position of a Conv
    x = CASES[name].inputs["x"]
    scale = np.random.default_rng(1).standard_normal(x.shape[-1]).astype(np.float32)
    (pair,) = pairs(name, scale)
    reference, current = (patches(each, *GEOMETRY[name]) if name in GEOMETRY else rows_of(name, each) for each in (x, x * scale))
    assert_pair(pair, reference, current)


def test_both_models_are_sampled_at_the_same_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doubled inputs give products that are twice the reference's moment, which other positions would not."""
    monkeypatch.setattr(module, "ROWS_PER_INPUT", 1)
    (pair,) = pairs("conv2d", np.float32(2).reshape(1))
    assert pair.moment.rows == 6 * 9  # of 56 positions of six samples
    np.testing.assert_array_equal(2 * pair.cross, pair.moment.matrix)  # powers of two are exact
    np.testing.assert_array_equal(2 * pair.mean, pair.moment.mean)


def test_feeds_are_dealt_out_to_folds() -> None:
    x = CASES["gemm"].inputs["x"]
    scale = np.random.default_rng(1).standard_normal(16).astype(np.float32)
    first, second = pairs("gemm", scale, folds=2, batch=2)
    for pair, rows in ((first, [0, 1, 4, 5]), (second, [2, 3])):
        assert_pair(pair, x[None, rows], x[None, rows] * scale)
    (only,) = pairs("gemm", scale, folds=2)  # a single feed
    assert only.moment.rows == 6


def test_pruned_layers_are_paired_with_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """A depthwise layer that has lost channels with those that stay, any other with all of its inputs."""
    monkeypatch.setattr(module, "ROWS_PER_INPUT", 1 << 20)  # every position
    head = "g (float[N, 16, 6, 6] x) => (float[N, P, Q, R] y)"
    text = f"{head} {{ s = Mul (x, a) d = Conv <group = 16, pads = [1, 1, 1, 1]> (s, dw) y = Conv (d, w) }}"
    kept = np.array([1, 2, 5, 11])
    ones, dw, w = np.ones((16, 1, 1), np.float32), normal(2, 16, 1, 3, 3), normal(3, 24, 16, 1, 1)
    reference = load(parse(text, {"a": ones, "dw": dw, "w": w}))
    smaller = text.replace("Mul (x, a)", "Gather <axis = 1> (x, a)").replace("group = 16", "group = 4")
    model = load(parse(smaller, {"a": kept, "dw": 3 * dw[kept], "w": w[:, kept]}))
    sites = [{site.name: site for site in find_sites(each, min_elements=1)} for each in (reference, model)]
    paired = [PairedSite(sites[0]["dw"], sites[1]["dw"], kept), PairedSite(sites[0]["w"], sites[1]["w"])]
    x = normal(4, 9, 16, 6, 6)
    data = open_dataset({"x": x}, input_specs(model.proto))
    shapes = observe(reference, [each.site for each in paired], data.first(1), Runtime())
    whole = (Frontier(each, data, np.arange(9), Runtime()) for each in (reference, model))
    found = calibrate_pairs(*whole, paired, shapes, Runtime())
    rows = patches(x, (3, 3), [1, 1, 1, 1], [1, 1], [1, 1], 16)[kept]
    assert_pair(found["dw"][0], rows, rows)
    inputs = np.einsum("gkn,gn->kg", patches(x, (3, 3), [1, 1, 1, 1], [1, 1], [1, 1], 16), dw.reshape(16, 9))
    assert_pair(found["w"][0], inputs[None], 3 * inputs[None, :, kept])


def test_inputs_that_are_not_finite_have_no_pair() -> None:
    name, scale = "matmul", np.array([np.inf], np.float32)
    reference, model = (load(scaled(name, each)) for each in (np.ones_like(scale), scale))
    data = open_dataset(CASES[name].inputs, input_specs(model.proto))
    (site,) = find_sites(reference)
    shapes = observe(reference, (site,), data.first(1), Runtime())
    whole = (Frontier(each, data, np.arange(len(data)), Runtime()) for each in (reference, model))
    assert not calibrate_pairs(*whole, [PairedSite(site, site)], shapes, Runtime())
