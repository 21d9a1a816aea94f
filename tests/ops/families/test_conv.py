"""Conv and ConvTranspose: views, grams of patches, geometry."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.families import FAMILIES, GramRequest, Use
from intaglio.ops.families.conv import CONV, CONV_TRANSPOSE
from intaglio.ops.view import MatrixView
from tests.ops.families.grams import SUMS, expected_gram, gram_of, outputs, windows
from tests.ops.running import Array, assert_close, emitter_for, node_of, normal, run, run_node, use_of

SIZES = {1: (9,), 2: (6, 7), 3: (4, 5, 4)}


def conv(axes: int, kernel: list[int], strides: list[int], dilations: list[int], padding: str, groups: int = 1, op: str = "Conv") -> Use:
    """A Conv of 4 channels to 6."""
    text = f"y = {op} <group = {groups}, strides = {strides}, dilations = {dilations}, {padding}> (x, w)"
    return use_of(text, (6, 4 // groups, *kernel[:axes]))


@st.composite
def geometries(draw: st.DrawFn) -> Use:
    axes = draw(st.integers(1, 3))
    lists = st.lists(st.integers(1, 2), min_size=axes, max_size=axes)
    kernel = draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes))
    mode = draw(st.sampled_from(["pads", "pads", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    pads = draw(st.lists(st.integers(0, 2), min_size=2 * axes, max_size=2 * axes))
    dilations = draw(lists) if mode in ("pads", "VALID") else [1] * axes  # ONNX Runtime has no dilated SAME
    if mode == "VALID":
        kernel = [min(k, 2) for k in kernel]
    padding = f"pads = {pads}" if mode == "pads" else f'auto_pad = "{mode}"'
    return conv(axes, kernel, draw(lists), dilations, padding, draw(st.sampled_from([1, 2])))


def as_image(rows: Array, like: Array) -> Array:
    """Outputs (groups, batch·positions, m) in the layout of a Conv's result."""
    batch, groups = len(like), len(rows)
    return rows.reshape(groups, batch, -1, rows.shape[2]).transpose(1, 0, 3, 2).reshape(like.shape)


@settings(max_examples=60)
@given(geometries(), st.integers(1, 2))
def test_gram_is_the_sum_over_the_patches_that_the_operator_sees(use: Use, batch: int) -> None:
    axes = len(use.view.shape) - 2
    image = normal(1, batch, 4, *SIZES[axes])
    rows = windows(use, image)
    weight = normal(2, *use.view.shape)
    (expected,) = run_node(use.node, {"x": image}, {"w": weight})
    assert_close(as_image(outputs(use, weight, rows), expected), expected, SUMS)
    assert CONV.output_size(use, image.shape[2:]) == expected.shape[2:]
    assert CONV.output_positions(use, image.shape) * batch == rows.shape[1]
    total, count = gram_of(use, image)
    assert count == rows.shape[1]
    assert_close(total, expected_gram(rows), SUMS)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("attributes", ["strides = [1, 1]", "strides = [2, 2]", "pads = [1, 0, 0, 1]", 'auto_pad = "SAME_UPPER"'])
def test_one_by_one_kernels(attributes: str, groups: int) -> None:
    use = use_of(f"y = Conv <group = {groups}, kernel_shape = [1, 1], {attributes}> (x, w)", (6, 4 // groups, 1, 1))
    image = normal(3, 2, 4, 5, 6)
    rows = windows(use, image)
    total, count = gram_of(use, image)
    assert count == rows.shape[1]
    assert_close(total, expected_gram(rows), SUMS)


def test_fused_conv_is_a_conv() -> None:
    node = 'y = com.microsoft.FusedConv <activation = "Relu", pads = [1, 1, 1, 1]> (x, w)'
    use = use_of(node, (6, 4, 3, 3))
    image = normal(4, 2, 4, 5, 6)
    total, _ = gram_of(use, image)
    assert_close(total, expected_gram(windows(use, image)), SUMS)


def test_half_precision_is_accumulated_in_single() -> None:
    use = conv(2, [3, 3], [1, 1], [1, 1], "pads = [1, 1, 1, 1]")
    image = normal(5, 2, 4, 6, 7).astype(np.float16)
    total, _ = gram_of(use, image)
    assert_close(total, expected_gram(windows(use, image)), SUMS)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("count", [1, 5, 60])
def test_sampled_positions_are_patches_one_from_each_stretch(count: int, groups: int) -> None:
    use = conv(2, [3, 2], [1, 1], [1, 1], "pads = [1, 1, 1, 0]", groups)
    image = normal(6, 3, 4, *SIZES[2])
    rows = windows(use, image).reshape(groups, 3, -1, use.view.n)
    emitter = emitter_for()
    gram = CONV.gram(emitter, use, "x", GramRequest(4, False, positions=count, seed=7))
    total, columns = run(emitter, {"x": image}, [gram.total, gram.rows])
    chosen = columns.reshape(groups, use.view.n, 3, count).transpose(0, 2, 3, 1)
    there = rows.shape[2]
    for sample in range(3):
        distances = np.abs(chosen[0, sample, :, None, :] - rows[0, sample, None, :, :]).max(axis=2)
        positions = distances.argmin(axis=1)
        np.testing.assert_array_equal(chosen[:, sample], rows[:, sample][:, positions])
        starts = np.arange(count) * there / count
        assert (positions >= np.floor(starts)).all()
        assert (positions < np.ceil(starts + there / count)).all()
    assert_close(total, expected_gram(chosen.reshape(groups, -1, use.view.n)), SUMS)


def test_samples_differ_by_seed_and_repeat_for_the_same() -> None:
    use = conv(2, [2, 2], [1, 1], [1, 1], "pads = [0, 0, 0, 0]")
    image = normal(6, 1, 4, *SIZES[2])
    first, again, other = (gram_of(use, image, GramRequest(4, False, 3, seed))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


def test_depthwise_kernels_are_not_split() -> None:
    depthwise = use_of("y = Conv <group = 4> (x, w)", (8, 1, 3, 3))
    assert CONV.contract_reason(depthwise) == "depthwise: one input channel per group"
    assert CONV.contract_reason(use_of("y = Conv <group = 2> (x, w)", (8, 2, 3, 3))) is None
    assert CONV.contract_reason(use_of("y = Conv (x, w)", (8, 1, 3, 3))) is None


def test_transposed_rows_are_the_input_positions() -> None:
    use = use_of("y = ConvTranspose <strides = [2, 1]> (x, w)", (5, 3, 2, 2))
    image = normal(8, 2, 5, 3, 4)
    rows = image.transpose(0, 2, 3, 1).reshape(1, -1, 5)
    total, count = gram_of(use, image)
    assert count == 24
    assert_close(total, expected_gram(rows), SUMS)


def test_transposed_weight_maps_a_position_to_its_window() -> None:
    use = use_of("y = ConvTranspose (x, w)", (5, 3, 2, 4))
    weight, pixel = normal(9, 5, 3, 2, 4), normal(10, 1, 5, 1, 1)
    (expected,) = run_node(use.node, {"x": pixel}, {"w": weight})
    assert_close(outputs(use, weight, pixel.reshape(1, 1, 5)).reshape(expected.shape), expected, SUMS)
    assert CONV_TRANSPOSE.contract_reason(use) is None


@pytest.mark.parametrize(
    ("text", "index", "shape", "reason"),
    [
        ("y = Conv (x, w, b)", 2, (6,), "the bias of a Conv"),
        ("y = Conv (x, w)", 0, (1, 4, 6, 6), "a constant image"),
        ("y = ConvTranspose (x, w, b)", 2, (6,), "the bias of a ConvTranspose"),
        ("y = ConvTranspose (x, w)", 0, (1, 4, 6, 6), "a constant image"),
        ("y = ConvTranspose <group = 2> (x, w)", 1, (4, 3, 3, 3), "a grouped ConvTranspose"),
    ],
)
def test_weights_without_a_view(text: str, index: int, shape: tuple[int, ...], reason: str) -> None:
    node = node_of(text)
    assert FAMILIES["", node.op_type].view(node, index, shape) == reason


def test_views_axes_and_costs() -> None:
    use = conv(2, [3, 2], [1, 1], [1, 1], "pads = [0, 0, 0, 0]", groups=2)
    assert use.view == MatrixView((6, 2, 3, 2), 2, 3, 12, True)
    assert CONV.activation(use) == ("x", False)
    assert CONV.channel_axis(use) == 0
    assert CONV.macs(use, (2, 4, 6, 7), (2, 6, 4, 6)) == 2 * 6 * 4 * 6 * 12
    transposed = use_of("y = ConvTranspose (x, w)", (5, 3, 2, 2))
    assert transposed.view == MatrixView((5, 3, 2, 2), 1, 12, 5, False)
    assert CONV_TRANSPOSE.activation(transposed) == ("x", False)
    assert CONV_TRANSPOSE.channel_axis(transposed) == 1
    assert CONV_TRANSPOSE.macs(transposed, (2, 5, 3, 4), (2, 3, 4, 5)) == 2 * 5 * 3 * 4 * 12
