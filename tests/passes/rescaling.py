"""What the tests of equalization share: small networks, made-up statistics, and that no output changes by a single bit."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper

from intaglio.ops.moment import Moment
from intaglio.passes.equalize import Equalization, equalize
from intaglio.passes.load import load
from intaglio.passes.model import Model
from intaglio.passes.sites import find_sites
from tests.models import Array, Feed, normal, parse, run

IMAGE = "g (float[N, 3, 8, 8] x) => (float[N, K, P, Q] y)"
ROWS = "g (float[N, 5, 6] x) => (float[N, 5, 4] y)"
VECTORS = "g (float[N, 6] x) => (float[N, 4] y)"

CONVS = {"w": normal(1, 8, 3, 3, 3), "b": normal(2, 8), "v": normal(3, 4, 8, 3, 3)}
MATRICES = {"w": normal(1, 6, 8), "b": normal(2, 8), "v": normal(3, 8, 4)}
NORM = {"g": 1 + normal(4, 6) / 4, "h": normal(5, 6), "v": normal(3, 6, 4)}

SCALES = 2.0 ** np.array([-3, 2, 0, -1, 3, 1, -2, 0])
"""Ranges of eight channels, six octaves apart."""

PARAMETERS: dict[str, Array] = {
    "slope": normal(11, 8, 1, 1),
    "per_channel": normal(12, 1, 8, 1, 1),
    "two": np.array(2.5, np.float32),
    "positions": normal(13, 6, 6),
    "sizes": np.array([1, 1, 2, 2], np.float32),
    "depth": normal(14, 8, 1, 3, 3),
    "groups": normal(15, 8, 4, 1, 1),
    "turned": normal(16, 8, 4, 2, 2),
    "square": normal(20, 8, 8),
    "three": np.array([0, 8, 36]),
    "four": np.array([-1, 8, 6, 6]),
    "shuffle": np.array([0, 2, 4, 6, 6]),
    "one": normal(21, 8, 8, 1, 1),
    "inner": normal(22, 8, 8, 3, 3),
}


def wild(model: Model, seed: int = 0) -> dict[str, Moment]:
    """Made-up moments whose channels differ by up to sixteen octaves in range: what is preserved does not depend on true ones.

    Inputs that are positions of eight channels, or of as many as there are groups, are alike within a channel.
    """
    rng = np.random.default_rng(seed)
    known = {}
    for site in find_sites(model, min_elements=1):
        view = site.use.view
        repeats = next((view.n // size for size in (8, 6, 4) if view.n % size == 0), 1)
        exponents = np.repeat(rng.integers(-8, 9, (view.groups, view.n // repeats)), repeats, axis=1)
        known[site.name] = Moment(4.0**exponents, 10)
    return known


def applied(model: Model, known: Mapping[str, Moment] | None = None, *, alpha: float = 0.5) -> tuple[Model, dict[str, Equalization]]:
    """The result and the records by value; the given model is not changed."""
    before = model.proto.SerializeToString(deterministic=True)
    result, records = equalize(model, find_sites(model, min_elements=1), wild(model) if known is None else known, alpha=alpha)
    assert model.proto.SerializeToString(deterministic=True) == before
    assert len({record.value for record in records}) == len(records)
    assert (result is model) == all(record.rescaled == 0 for record in records)
    for record in records:
        assert (record.rescaled > 0) == bool(record.tensors) == (record.bits_after < record.bits_before)
        assert record.rescaled > 0 or record.reason
    return result, {record.value: record for record in records}


def random_feed(proto: onnx.ModelProto) -> Feed:
    rng = np.random.default_rng(7)
    initialized = {tensor.name for tensor in proto.graph.initializer}
    feed = {}
    for value in proto.graph.input:
        if value.name not in initialized:
            shape = [dim.dim_value or 2 for dim in value.type.tensor_type.shape.dim]
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            feed[value.name] = np.asarray(rng.standard_normal(shape), dtype) if dtype != np.bool_ else np.ones(shape, np.bool_)
    return feed


def preserved(proto: onnx.ModelProto, known: Mapping[str, Moment] | None = None) -> dict[str, Equalization]:
    """Equalize, and check that every bit of every output stays, optimized by ONNX Runtime or not."""
    result, records = applied(load(proto), known)
    onnx.checker.check_model(result.proto, full_check=True)
    feed = random_feed(proto)
    for optimize in (True, False):
        for one, other in zip(run(proto, feed, optimize=optimize), run(result.proto, feed, optimize=optimize), strict=True):
            assert np.isfinite(one).all()
            assert np.abs(one).max() > 0
            np.testing.assert_array_equal(one, other)  # powers of two: exact
    return records


def declined(text: str, weights: Mapping[str, Array], **options: int) -> dict[str, str]:
    """Reasons by value, of a model in which nothing is rescaled for them; its outputs stay."""
    return {value: record.reason for value, record in preserved(parse(text, weights, **options)).items() if not record.rescaled}


def between_convs(body: str) -> onnx.ModelProto:
    weights = CONVS | {
        name: array for name, array in PARAMETERS.items() if f" {name})" in body or f" {name}," in body or f"({name}," in body
    }
    return parse(f"{IMAGE} {{ h = Conv (x, w, b) {body} y = Conv (r, v) }}", weights)


def rescaled_between_convs(body: str) -> set[str]:
    """What is rescaled if the body turns h into r between two convolutions."""
    return {name for record in preserved(between_convs(body)).values() for name in record.tensors}


def reason_between_convs(body: str) -> str:
    """Why h stays, which the body turns into r between two convolutions."""
    available = PARAMETERS | {
        "zero": np.float32(0),
        "six": np.float32(6),
        "w1": normal(31, 1, 3, 3, 3),
        "w2": normal(32, 8, 3, 3, 3),
        "w6": normal(33, 2, 6, 1, 1),
        "channels": np.array([1]),
        "mixed": np.array([-1, 6]),
        "quarter": normal(36, 4, 1, 1),
        "line": normal(34, 6),
        "batch": normal(35, 8, 6, 6),
    }
    used = {name: np.asarray(a) for name, a in available.items() if f" {name})" in body or f" {name}," in body or f"({name}," in body}
    text = f"{IMAGE} {{ h = Conv (x, w, b) {body} y = Conv (r, v) }}"
    return declined(text, CONVS | used)["h"]


def uneven() -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Two convolutions; the eight channels between them are six octaves apart, but weigh alike in the output."""
    scale = SCALES.astype(np.float32)
    weights = {
        "w": CONVS["w"] * scale[:, None, None, None],
        "b": CONVS["b"] * scale / 4,
        "v": normal(3, 4, 8, 3, 3) / scale[:, None, None],
    }
    proto = parse(f"{IMAGE} {{ h = Conv (x, w, b) r = Relu (h) y = Conv (r, v) }}", weights)
    return proto, {"x": np.random.default_rng(0).standard_normal((20, 3, 8, 8)).astype(np.float32)}


def tensor(model: Model, name: str) -> Array:
    return np.asarray(model.weights.read(next(t for t in model.proto.graph.initializer if t.name == name)))
