"""Gradients of operators that move or repeat elements."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from intaglio.passes.differentiate import differentiate

from .checking import check_everywhere, gradient_error, model_of, run_in_runtime

TOLERANCE = 1e-8
"""These operators are linear: differences are exact but for rounding over the step."""


def _ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize(
    ("node", "shape", "second"),
    [
        ("y = Reshape(x, s)", (2, 3, 4), _ints(0, -1)),
        ("y = Reshape<allowzero=1>(x, s)", (0, 3), _ints(3, 0)),
        ("y = Reshape(x, s)", (1,), _ints()),
        ("y = Flatten(x)", (2, 3, 4), None),
        ("y = Flatten<axis=-1>(x)", (2, 3, 4), None),
        ("y = Squeeze(x)", (1, 3, 1), None),
        ("y = Squeeze(x, s)", (1, 3, 1), _ints(-1)),
        ("y = Unsqueeze(x, s)", (2, 3), _ints(-1, 1)),
        ("y = Transpose(x)", (2, 3, 4), None),
        ("y = Transpose<perm=[2, 0, 1]>(x)", (2, 3, 4), None),
        ("y = Trilu(x)", (2, 3, 4), None),
        ("y = Trilu<upper=0>(x, s)", (3, 4), np.array(-1, np.int64)),
        ("y = Expand(x, s)", (3, 1), _ints(2, 1, 4)),
        ("y = Expand(x, s)", (3, 4), _ints(1, 1)),
        ("y = Expand(x, s)", (), _ints(2, 3)),
        ("y = Tile(x, s)", (2, 3), _ints(2, 3)),
        ("y = Tile(x, s)", (2, 3, 2), _ints(1, 2, 1)),
        ("y = Tile(x, s)", (2, 3), _ints(1, 1)),
        ("y = Tile(x, s)", (2, 3), _ints(2, 0)),
        ("y = ReverseSequence<time_axis=0, batch_axis=1>(x, s)", (4, 3, 2), _ints(4, 1, 2)),
        ("y = ReverseSequence<time_axis=1, batch_axis=0>(x, s)", (3, 4), _ints(3, 4, 1)),
    ],
)
def test_one_operand(node: str, shape: tuple[int, ...], second: np.ndarray | None) -> None:
    inputs = {"x": _normal(*shape)} if second is None else {"x": _normal(*shape), "s": second}
    check_everywhere(node, inputs, ["x"], known=["s"] if second is not None else [])


@pytest.mark.parametrize(
    ("node", "second"),
    [
        ("y = Expand(x, s)", _ints(2, 3, 4)),
        ("y = Tile(x, s)", _ints(2, 3)),
        ("y = Unsqueeze(x, s)", _ints(0)),
        ("y = Reshape(x, s)", _ints(2, 3)),
    ],
)
def test_shapes_that_only_a_run_tells(node: str, second: np.ndarray) -> None:
    check_everywhere(node, {"x": _normal(3, 1) if "Expand" in node else _normal(3, 2), "s": second}, ["x"])


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    axis=st.integers(-2, 1),
    data=st.data(),
    open_shapes=st.booleans(),
)
def test_concat(lengths: list[int], axis: int, data: st.DataObject, open_shapes: bool) -> None:
    inputs = {f"x{index}": np.moveaxis(_normal(length, 2, seed=index), 0, axis) for index, length in enumerate(lengths)}
    wrt = data.draw(st.lists(st.sampled_from(sorted(inputs)), min_size=1, unique=True))
    node = f"y = Concat<axis={axis}>({', '.join(inputs)})"
    assert gradient_error(node, inputs, wrt, open_shapes=open_shapes) < TOLERANCE


def test_concat_in_the_runtime() -> None:
    inputs = {"a": _normal(2, 3), "b": _normal(2, 1), "c": _normal(2, 2)}
    check_everywhere("y = Concat<axis=-1>(a, b, c)", inputs, ["a", "b", "c"])
    check_everywhere("y = Concat<axis=1>(a, b, c, a)", inputs, ["a", "c"])


@pytest.mark.parametrize("used", [["a"], ["b"], ["c"], ["a", "b"], ["a", "c"], ["a", "b", "c"]])
@pytest.mark.parametrize("known", [True, False])
def test_split_by_sizes_of_which_some_parts_are_unused(used: list[str], known: bool) -> None:
    inputs = {"x": _normal(2, 6), "s": _ints(1, 3, 2)}
    check_everywhere("a, b, c = Split<axis=-1>(x, s)", inputs, ["x"], used, known=["s"] if known else [])


def test_split_by_number() -> None:
    check_everywhere("a, b, c = Split<num_outputs=3>(x)", {"x": _normal(8, 2)}, ["x"], ["a", "c"])
    check_everywhere("a, b = Split<axis=1, num_outputs=2>(x)", {"x": _normal(2, 4)}, ["x"], ["b"])


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_cumulative_sum(exclusive: int, reverse: int, axis: int) -> None:
    inputs = {"x": _normal(3, 4), "axis": np.array(axis, np.int64)}
    check_everywhere(f"y = CumSum<exclusive={exclusive}, reverse={reverse}>(x, axis)", inputs, ["x"], known=["axis"])


def test_a_concat_copies_only_what_is_wanted() -> None:
    inputs = {"a": _normal(2, 3), "b": _normal(2, 1), "c": _normal(2, 2)}
    proto = model_of("y = Concat<axis=1>(a, b, c)", inputs, ["y"])
    assert [node.op_type for node in differentiate(proto, ["y"], ["b"]).proto.graph.node] == ["Concat", "Slice", "Identity"]
    assert [node.op_type for node in differentiate(proto, ["y"], list("abc")).proto.graph.node][1] == "Split"


def test_gradients_in_half_precision() -> None:
    x = _normal(2, 3).astype(np.float16)
    found = differentiate(model_of("y = Tile(x, s)", {"x": x, "s": _ints(2, 1)}, ["y"], known=["s"]), ["y"], ["x"])
    gradient = run_in_runtime(found, {"x": x}, {"y": np.ones((4, 3), np.float16)})["x"]
    np.testing.assert_array_equal(gradient, np.full((2, 3), 2, np.float16))
