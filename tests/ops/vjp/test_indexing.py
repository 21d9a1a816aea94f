"""Gradients of gathers and scatters."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from intaglio.passes.differentiate import differentiate
from intaglio.passes.session import open_session

from .checking import RUNTIME_TOLERANCE, TOLERANCE, check_everywhere, gradient_error, model_of, run_in_runtime, runtime_error


def _ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def _emitted(node: str, inputs: dict[str, np.ndarray], wrt: str, known: list[str]) -> list[str]:
    found = differentiate(model_of(node, inputs, ["y"], known=known), ["y"], [wrt])
    assert not found.stops
    return [node.op_type for node in found.proto.graph.node][1:-1]


# --- Gather


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 4)] * 3),
    axis=st.integers(-3, 2),
    picked=st.sampled_from([(), (1,), (4,), (2, 3), (0,), (1, 1, 2)]),
    known=st.booleans(),
    open_shapes=st.booleans(),
    narrow=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gather(
    shape: tuple[int, ...], axis: int, picked: tuple[int, ...], known: bool, open_shapes: bool, narrow: bool, seed: int
) -> None:
    length = shape[axis]
    indices = np.random.default_rng(seed).integers(-length, length, picked).astype(np.int32 if narrow else np.int64)
    error = gradient_error(
        f"y = Gather<axis={axis}>(x, i)",
        {"x": _normal(*shape), "i": indices},
        ["x"],
        known=["i"] if known else [],
        open_shapes=open_shapes,
    )
    assert error < TOLERANCE


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("indices", [np.array(-1), np.array([1, 2]), np.array([[2, 0], [2, -1]]), np.array([2, 0, 1]), np.array([-2, -1])])
def test_gather_in_the_runtime(indices: np.ndarray, axis: int, known: bool) -> None:
    inputs = {"x": _normal(3, 3, 3), "i": indices.astype(np.int64)}
    check_everywhere(f"y = Gather<axis={axis}>(x, i)", inputs, ["x"], known=["i"] if known else [])


@pytest.mark.parametrize(
    ("indices", "emitted"),
    [
        (_ints(1, 2), ["Pad"]),
        (np.array(3, np.int64), ["Unsqueeze", "Pad"]),
        (_ints(3, 1, 0, 2), ["Gather"]),
        (_ints(3, 1), ["Pad", "Gather"]),
        (_ints(3, 1, 3, 1), ["Pad", "Gather", "ReduceSum"]),
    ],
)
def test_known_positions_need_no_scatter(indices: np.ndarray, emitted: list[str]) -> None:
    assert _emitted("y = Gather(x, i)", {"x": _normal(4, 2), "i": indices}, "x", ["i"]) == emitted


def test_known_positions_of_which_one_is_frequent_are_added_up() -> None:
    """A table of copies would be much larger than the gradient."""
    inputs = {"x": _normal(50, 2), "i": _ints(3, 3, 3, 3, 7)}
    assert _emitted("y = Gather(x, i)", inputs, "x", ["i"])[-1] == "ScatterElements"
    check_everywhere("y = Gather(x, i)", inputs, ["x"], known=["i"])


def test_no_term_is_lost_where_positions_repeat_and_threads_run() -> None:
    """ONNX Runtime's ScatterND loses terms of such a sum in some runs on several threads."""
    count, width = 100_000, 16
    inputs = {"x": np.zeros((3, width), np.float32), "i": np.random.default_rng(0).integers(0, 3, count)}
    found = differentiate(model_of("y = Gather(x, i)", inputs, ["y"]), ["y"], ["x"])
    assert not any(node.op_type == "ScatterND" for node in found.proto.graph.node)
    feed = {**inputs, found.cotangents["y"]: np.ones((count, width), np.float32)}
    (gradient,) = open_session(found.proto, threads=4).run([found.gradients["x"]], feed)
    np.testing.assert_array_equal(gradient, np.repeat(np.bincount(inputs["i"])[:, None], width, axis=1))


# --- GatherElements, GatherND, Compress, TopK


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("axis", "shape"), [(0, (2, 4)), (0, (5, 4)), (1, (3, 2)), (1, (3, 6))])
def test_gather_elements(axis: int, shape: tuple[int, int], known: bool) -> None:
    inputs = {"x": _normal(3, 4), "i": np.random.default_rng(0).integers(-3, 3, shape)}
    check_everywhere(f"y = GatherElements<axis={axis}>(x, i)", inputs, ["x"], known=["i"] if known else [])


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_fewer_elements_than_lines(axis: int) -> None:
    """The reference evaluator gathers from all lines only, and from the last axis only if it is counted from the front."""
    indices, cotangent = np.array([[0, -1], [0, 1]]), np.array([[1, 2], [3, 4]], np.float32)
    inputs = {"x": np.zeros((3, 3), np.float32), "i": indices}
    found = differentiate(model_of(f"y = GatherElements<axis={axis}>(x, i)", inputs, ["y"]), ["y"], ["x"])
    expected = np.zeros((3, 3))
    rows, columns = np.indices(indices.shape)
    np.add.at(expected, (indices, columns) if axis == 0 else (rows, indices), cotangent)
    np.testing.assert_array_equal(run_in_runtime(found, inputs, {"y": cotangent})["x"], expected)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 3)] * 4),
    batch=st.integers(0, 2),
    depth=st.integers(1, 2),
    tuples=st.sampled_from([(), (3,), (2, 2)]),
    known=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gather_nd(shape: tuple[int, ...], batch: int, depth: int, tuples: tuple[int, ...], known: bool, seed: int) -> None:
    lead = shape[:batch] + tuples
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.integers(0 if batch else -length, length, lead) for length in shape[batch : batch + depth]], axis=-1)
    inputs = {"x": _normal(*shape), "i": indices}
    assert gradient_error(f"y = GatherND<batch_dims={batch}>(x, i)", inputs, ["x"], known=["i"] if known else []) < TOLERANCE


@pytest.mark.parametrize(
    ("batch", "shape", "picked"), [(0, (2, 2, 3), (5, 2)), (0, (2, 3), (4, 1)), (1, (2, 2, 2, 3), (2, 4, 2)), (2, (2, 3, 2, 2), (2, 3, 2))]
)
def test_gather_nd_in_the_runtime(batch: int, shape: tuple[int, ...], picked: tuple[int, ...]) -> None:
    inputs = {"x": _normal(*shape), "i": np.random.default_rng(0).integers(0 if batch else -2, 2, picked)}
    check_everywhere(f"y = GatherND<batch_dims={batch}>(x, i)", inputs, ["x"], known=["i"])


def test_gather_nd_without_a_known_number_of_coordinates() -> None:
    proto = model_of("y = GatherND(x, i)", {"x": _normal(3, 3), "i": np.array([[0, 1]])}, ["y"])
    proto.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "k"
    (stop,) = differentiate(proto, ["y"], ["x"]).stops
    assert "the number of coordinates in 'i' is unknown" in stop.reason


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("known", [True, False])
def test_compress(axis: int | None, known: bool) -> None:
    node = "y = Compress(x, c)" if axis is None else f"y = Compress<axis={axis}>(x, c)"
    condition = np.array([True, False, True] if axis is not None else [False, True, True, False, True])
    check_everywhere(node, {"x": _normal(3, 3), "c": condition}, ["x"], known=["c"] if known else [])


@pytest.mark.parametrize(("axis", "largest"), [(-1, 1), (0, 0), (1, 1)])
def test_topk(axis: int, largest: int) -> None:
    """Values are far apart, so that the step changes no order."""
    x = np.random.default_rng(0).permutation(12).reshape(3, 4).astype(np.float64)
    check_everywhere(f"y, indices = TopK<axis={axis}, largest={largest}>(x, k)", {"x": x, "k": _ints(2)}, ["x"], known=["k"])


# --- scatters


_TUPLES = [np.array([[0, 1], [2, -1]]), np.array([[2], [0]]), np.array([[[-1, 0]], [[1, 1]]])]


@pytest.mark.parametrize("reduction", ["none", "add"])
@pytest.mark.parametrize("indices", _TUPLES)
def test_scatter_nd(reduction: str, indices: np.ndarray) -> None:
    updates = _normal(*indices.shape[:-1], *(3, 3, 2)[indices.shape[-1] :], seed=1)
    node = f'y = ScatterND<reduction="{reduction}">(x, i, u)'
    check_everywhere(node, {"x": _normal(3, 3, 2), "i": indices, "u": updates}, ["x", "u"])


@pytest.mark.parametrize("reduction", ["mul", "max", "min"])
@pytest.mark.parametrize("indices", _TUPLES)
def test_scatter_nd_at_known_positions(reduction: str, indices: np.ndarray) -> None:
    inputs = {"x": _normal(3, 3, 2), "i": indices, "u": _normal(*indices.shape[:-1], *(3, 3, 2)[indices.shape[-1] :], seed=1)}
    node = f'y = ScatterND<reduction="{reduction}">(x, i, u)'
    assert gradient_error(node, inputs, ["x", "u"], known=["i"]) < TOLERANCE
    assert runtime_error(node, inputs, ["x", "u"], known=["i"]) < RUNTIME_TOLERANCE


def test_scatter_nd_adds_up_repeated_positions() -> None:
    inputs = {"x": _normal(3, 2), "i": _ints(1, 1, -2)[:, None], "u": _normal(3, 2, seed=1)}
    check_everywhere('y = ScatterND<reduction="add">(x, i, u)', inputs, ["x", "u"])


@pytest.mark.parametrize("reduction", ["mul", "max", "min"])
@pytest.mark.parametrize("known", [True, False])
def test_scatter_nd_declines_positions_that_may_repeat(reduction: str, known: bool) -> None:
    inputs = {"x": _normal(3), "i": _ints(1, -2)[:, None], "u": _normal(2)}  # both mean the middle one
    proto = model_of(f'y = ScatterND<reduction="{reduction}">(x, i, u)', inputs, ["y"], known=["i"] if known else [])
    (stop,) = differentiate(proto, ["y"], ["x"]).stops
    assert f"reduction '{reduction}' at positions that repeat" in stop.reason


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scatter_elements(reduction: str, axis: int) -> None:
    indices = np.array([[0, 1, 1], [2, 0, 0]]) if axis == 0 else np.array([[0, 1], [2, 0], [1, 0]])
    inputs = {"x": _normal(3, 3), "i": indices, "u": _normal(*indices.shape, seed=1)}
    check_everywhere(f'y = ScatterElements<axis={axis}, reduction="{reduction}">(x, i, u)', inputs, ["u", "x"], known=["i"])


def test_positions_from_the_end_are_told_from_those_from_the_front() -> None:
    inputs = {"x": _normal(3), "i": _ints(-1, 1), "u": _normal(2, seed=1)}
    assert gradient_error('y = ScatterElements<reduction="mul">(x, i, u)', inputs, ["x", "u"], known=["i"]) < TOLERANCE
    (stop,) = differentiate(
        model_of('y = ScatterElements<reduction="mul">(x, i, u)', {**inputs, "i": _ints(-2, 1)}, ["y"], known=["i"]), ["y"], ["u"]
    ).stops
    assert "positions that repeat" in stop.reason


@pytest.mark.parametrize("reduction", ["add", "max", "min"])
def test_scatter_elements_at_repeated_positions(reduction: str) -> None:
    inputs = {"x": _normal(3), "i": _ints(1, 1, -2, 0), "u": _normal(4, seed=1)}
    check_everywhere(f'y = ScatterElements<reduction="{reduction}">(x, i, u)', inputs, ["x", "u"])


def test_a_product_at_repeated_positions_has_a_gradient_of_the_data_only() -> None:
    inputs = {"x": _normal(3), "i": _ints(1, 1, -2, 0), "u": _normal(4, seed=1)}
    node = 'y = ScatterElements<reduction="mul">(x, i, u)'
    check_everywhere(node, inputs, ["x"], known=["i"])
    (stop,) = differentiate(model_of(node, inputs, ["y"], known=["i"]), ["y"], ["x", "u"]).stops
    assert "positions that repeat" in stop.reason


def test_equal_extremes_share() -> None:
    """One datum and two updates of the same size at one place: a third each, and a place that no update touches keeps all."""
    inputs = {"x": np.array([2.0, 5.0], np.float32), "i": _ints(0, 0, 0), "u": np.array([2.0, 1.0, 2.0], np.float32)}
    proto = model_of('y = ScatterElements<reduction="max">(x, i, u)', inputs, ["y"])
    found = differentiate(proto, ["y"], ["x", "u"])
    feed = {**inputs, found.cotangents["y"]: np.array([3.0, 1.0], np.float32)}
    data, updates = open_session(found.proto).run([found.gradients["x"], found.gradients["u"]], feed)
    np.testing.assert_array_equal(data, [1, 1])
    np.testing.assert_array_equal(updates, [1, 0, 1])


# --- OneHot


@pytest.mark.parametrize("axis", [0, -1])
def test_values_of_one_hot(axis: int) -> None:
    inputs = {"i": np.array([[0, 2], [1, -1], [5, 0]]), "d": np.array(3, np.int64), "v": np.array([0.3, 1.2])}
    check_everywhere(f"y = OneHot<axis={axis}>(i, d, v)", inputs, ["v"], known=["d"])
