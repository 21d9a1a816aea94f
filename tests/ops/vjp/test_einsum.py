"""Gradients of Einstein sums."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from intaglio.passes.differentiate import differentiate

from .checking import RUNTIME_TOLERANCE, TOLERANCE, gradient_error, model_of, runtime_error

Array = np.ndarray

_CASES = [
    ("ij,jk->ik", [(2, 3), (3, 4)]),
    ("bhqd,bhkd->bhqk", [(2, 2, 3, 2), (2, 2, 4, 2)]),
    ("ij,jk", [(2, 3), (3, 4)]),
    ("aB,Bc", [(2, 3), (3, 4)]),
    ("ji", [(2, 3)]),
    ("ij -> ji", [(2, 3)]),
    ("ij->", [(2, 3)]),
    ("ij->i", [(2, 3)]),
    ("->", [()]),
    (",i->i", [(), (3,)]),
    (",i->", [(), (3,)]),
    ("i,j->", [(2,), (3,)]),
    ("i,j->ij", [(2,), (3,)]),
    ("ij,k->k", [(2, 3), (4,)]),
    ("ij,ij,j->i", [(2, 3), (2, 3), (3,)]),
    ("...ij,...jk->...ik", [(2, 3, 2, 2), (2, 3, 2, 4)]),
    ("...ij,jk->...ik", [(2, 2, 3, 2), (2, 3)]),
    ("...ij,...jk->...ik", [(2, 3), (3, 2)]),
    ("...i,...i", [(2, 3), (2, 3)]),
    ("i...,i...->...", [(3, 2, 2), (3, 2, 2)]),
    ("i...j,k->...jk", [(2, 3, 2), (2,)]),
    ("...,i->...i", [(2, 3), (4,)]),
    ("i...->...", [(2, 3)]),
    ("ij,ij->ij", [(2, 3), (1, 3)]),
    ("ij,jk->ik", [(2, 1), (3, 4)]),
    ("ij,ik->jk", [(1, 3), (2, 2)]),
    ("...i,...i->...i", [(2, 3), (1, 3)]),
    ("bi,b->b", [(2, 3), (1,)]),
]
"""Equations with shapes of operands; the last ones repeat axes of length 1."""


def _text(equation: str, count: int) -> str:
    return f'y = Einsum <equation = "{equation}"> ({", ".join(_names(count))})'


def _names(count: int) -> list[str]:
    return [f"x{index}" for index in range(count)]


def _inputs(shapes: list[tuple[int, ...]], seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape)) for name, shape in zip(_names(len(shapes)), shapes, strict=True)}


@pytest.mark.parametrize("open_shapes", [False, True])
@pytest.mark.parametrize(("equation", "shapes"), _CASES)
def test_einsum(equation: str, shapes: list[tuple[int, ...]], open_shapes: bool) -> None:
    inputs = _inputs(shapes, 0)
    assert gradient_error(_text(equation, len(shapes)), inputs, list(inputs), open_shapes=open_shapes) < TOLERANCE
    assert runtime_error(_text(equation, len(shapes)), inputs, list(inputs), open_shapes=open_shapes) < RUNTIME_TOLERANCE


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_any_equation(data: st.DataObject, seed: int) -> None:
    """Operands of distinct indices out of four, with a result of any of these, with lengths of 1 to 3."""
    lengths = dict(zip("ijkl", data.draw(st.tuples(*[st.integers(1, 3)] * 4)), strict=True))
    terms = data.draw(st.lists(st.lists(st.sampled_from("ijkl"), unique=True, max_size=3).map("".join), min_size=1, max_size=3))
    used = sorted(set("".join(terms)))
    result = "".join(data.draw(st.permutations(used).flatmap(lambda order: st.integers(0, len(order)).map(lambda n: order[:n]))))
    inputs = _inputs([tuple(lengths[letter] for letter in term) for term in terms], seed)
    assert gradient_error(_text(f"{','.join(terms)}->{result}", len(terms)), inputs, list(inputs)) < TOLERANCE


def test_an_operand_that_stands_twice() -> None:
    assert gradient_error('y = Einsum <equation = "ij,ik->jk"> (x0, x0)', _inputs([(2, 3)], 0), ["x0"]) < TOLERANCE


def test_an_index_that_another_operand_repeats() -> None:
    inputs = _inputs([(3, 3), (3, 2)], 0)
    assert gradient_error(_text("ii,ij->j", 2), inputs, ["x1"]) < TOLERANCE
    assert runtime_error(_text("ii,ij->j", 2), inputs, ["x1"]) < RUNTIME_TOLERANCE


def test_lengths_of_one_name_need_no_sum() -> None:
    proto = model_of(_text("ij,jk->ik", 2), _inputs([(2, 3), (3, 4)], 0), ["y"])
    for value, names in zip(proto.graph.input, (("i", "j"), ("j", "k")), strict=True):
        for dim, name in zip(value.type.tensor_type.shape.dim, names, strict=True):
            dim.dim_param = name
    found = differentiate(proto, ["y"], ["x0", "x1"])
    assert [node.op_type for node in found.proto.graph.node] == ["Einsum"] * 3 + ["Identity"] * 2


@pytest.mark.parametrize(
    ("equation", "shapes", "reason"),
    [
        ("ii->i", [(2, 2)], "an index is repeated inside operand 0"),
        ("ij,...->ij", [(2, 2), (3,)], "the result lacks the ellipsis of the operands"),
    ],
)
def test_equations_without_a_gradient(equation: str, shapes: list[tuple[int, ...]], reason: str) -> None:
    proto = model_of(_text(equation, len(shapes)), _inputs(shapes, 0), ["y"])
    (stop,) = differentiate(proto, ["y"], ["x0"]).stops
    assert stop.reason == reason
