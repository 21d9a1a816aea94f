"""Gradients of sums, products and quotients."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from .checking import TOLERANCE, gradient_error

_SHAPES = [((3, 4), (3, 4)), ((2, 3, 4), (4,)), ((3, 1), (1, 4)), ((), (2, 2)), ((1,), (2, 1)), ((2, 1, 3), (5, 1))]


@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Div"])
@settings(max_examples=20, deadline=None)
@given(shapes=st.sampled_from(_SHAPES), swap=st.booleans(), open_shapes=st.booleans(), seed=st.integers(0, 99))
def test_binary_operators(op_type: str, shapes: tuple[tuple[int, ...], ...], swap: bool, open_shapes: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = reversed(shapes) if swap else shapes
    inputs = {"a": rng.standard_normal(left), "b": rng.uniform(0.5, 2, right)}
    assert gradient_error(f"y = {op_type}(a, b)", inputs, ["a", "b"], open_shapes=open_shapes) < TOLERANCE


def test_a_value_that_is_read_twice() -> None:
    rng = np.random.default_rng(0)
    assert gradient_error("y = Mul(a, a)", {"a": rng.standard_normal((2, 3))}, ["a"]) < TOLERANCE


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sum_of_several(count: int) -> None:
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal(shape) for name, shape in list({"a": (2, 3), "b": (3,), "c": (2, 1)}.items())[:count]}
    assert gradient_error(f"y = Sum({', '.join(inputs)})", inputs, list(inputs)) < TOLERANCE
