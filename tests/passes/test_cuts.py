"""Cutting channels: shapes, weights and constants, and that what is lost is what was predicted."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from intaglio.ops.moment import Moment
from intaglio.ops.pruning import channel_order, pruning_errors
from intaglio.passes.cuts import pruned_constants, pruned_shape, pruned_weight
from tests.models import run
from tests.passes.pruning import FIRST, LAST, PAD, WEIGHTS, assert_lossless, checked, images, known_moments, network, prune, trace


def test_initializers_that_are_listed_as_inputs_change_their_shape_there_too() -> None:
    found = network(f"{FIRST} z = Relu (a) {LAST}", opset=8, ir_version=3)
    smaller = assert_lossless(found, ["a"], images())
    listed = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in smaller.proto.graph.input}
    assert listed["b1"] == [11]


def test_written_shapes_of_pruned_values_go() -> None:
    found = network(f"{FIRST} z = Relu (a) q = Relu (z) w = Conv (q, c3) y = Relu (w)")
    proto = onnx.shape_inference.infer_shapes(found.proto)
    smaller = assert_lossless(trace(proto), ["a"], images())
    assert [value.name for value in proto.graph.value_info] == ["a", "z", "q", "w"]
    assert [value.name for value in smaller.proto.graph.value_info] == ["w"]


def test_what_pruning_loses_is_what_was_predicted() -> None:
    """A last layer without bias: the mean square of its change, relative, is the closed form's; both from the same samples."""
    found = network(f"{FIRST} z = Relu (a) {LAST}")
    feed = images(12)  # few enough that no position is left out of the moment
    known = known_moments(found, feed)
    site = next(site for site in found.sites if site.name == "c3")
    layer = (site.matrix(site.value(found.model)), known["c3"], 1)
    order = channel_order([layer])
    (expected,) = run(found.proto, feed)
    for count in (3, 8):
        kept = {"a": np.sort(order[-count:])}
        (actual,) = run(checked(prune(found.model, found.sites, list(found.groups.values()), kept, known)), feed)
        measured = np.square(actual - expected).sum() / np.square(expected).sum()
        assert measured == pytest.approx(pruning_errors(*layer, order, [count])[0], rel=1e-4)  # sums in float32


def test_the_pieces_are_what_the_whole_is_made_of() -> None:
    body = f"{FIRST} m = Conv <group = 12, {PAD}> (a, dw) r = Relu (m) b = Conv <{PAD}> (r, c2, b2) z = Relu (b) {LAST}"
    found, feed = network(body), images()
    known = known_moments(found, feed)
    kept = {"a": np.array([0, 3, 4, 9]), "b": np.array([1, 2, 11])}
    smaller = prune(found.model, found.sites, list(found.groups.values()), kept, known)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in checked(smaller).graph.initializer}
    middle = next(site for site in found.sites if site.name == "c2")
    both = pruned_weight(middle, middle.value(found.model), known["c2"], 9, kept["a"], kept["b"])
    np.testing.assert_array_equal(both, stored["c2"])
    assert both.dtype == np.float32
    assert both.shape == pruned_shape(middle, 9, 4, 3) == (3, 4, 3, 3)
    constants = pruned_constants(found.model, found.groups["a"], kept["a"])
    assert sorted(constants) == ["b1"]  # dw is a site
    for name, array in constants.items():
        np.testing.assert_array_equal(array, stored[name])
        np.testing.assert_array_equal(array, WEIGHTS[name][kept["a"]])
    rows = pruned_weight(middle, middle.value(found.model), known["c2"], 1, None, kept["b"])
    np.testing.assert_array_equal(rows, WEIGHTS["c2"][kept["b"]])
    assert rows.shape == pruned_shape(middle, 1, None, 3)


def test_a_consumer_without_statistics_is_only_cut() -> None:
    found = network(f"{FIRST} z = Relu (a) {LAST}")
    smaller = prune(found.model, found.sites, list(found.groups.values()), {"a": np.array([2, 5])}, {})
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(smaller.proto.graph.initializer[2]), WEIGHTS["c3"][:, [2, 5]])
    checked(smaller)


@pytest.mark.parametrize(
    ("kept", "message"),
    [([3, 12], "expected ascending numbers from 0 to 11"), ([3, 3], "expected ascending numbers from 0 to 11"), ([], "at least one")],
)
def test_channels_that_are_not_there(kept: list[int], message: str) -> None:
    found = network(f"{FIRST} b = Conv <{PAD}> (a, c2) z = Relu (b) {LAST}")
    site = next(site for site in found.sites if site.name == "c2")
    value, moment = site.value(found.model), Moment.isotropic(1, site.use.view.n)
    channels = np.array(kept, np.int64)
    for inputs, outputs in ((channels, None), (None, channels)):
        with pytest.raises(ValueError, match=message):
            pruned_weight(site, value, moment, 9, inputs, outputs)
