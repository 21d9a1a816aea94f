"""The memory of a run, counted by hand on small graphs."""

from __future__ import annotations

import numpy as np
import pytest

from intaglio.passes.differentiate import differentiate
from intaglio.passes.footprint import affordable_bytes, peak_bytes
from tests.models import normal, parse

ROW = 4 * 16
"""Bytes of a sample's value in these models."""


@pytest.mark.parametrize(
    ("body", "values"),
    [
        ("y = Relu (x)", 1),
        ("a = Relu (x) b = Relu (a) y = Relu (b)", 2),  # a value and the one made of it
        ("a = Relu (x) b = Relu (a) c = Relu (b) y = Add (a, c)", 3),  # a is kept until the end
        ("a = Relu (x) b = Relu (x) c = Relu (x) y = Sum (a, b, c)", 4),
        ("a = Relu (x) dead = Relu (a) y = Relu (a)", 2),
    ],
)
def test_values_are_held_from_their_operator_to_their_last_reader(body: str, values: int) -> None:
    proto = parse(f"g (float[N, 16] x) => (float[N, 16] y) {{ {body} }}")
    assert peak_bytes(proto, {"x": (10, 16)}) == 10 * values * ROW


def test_weights_and_what_is_computed_of_shapes_count_for_nothing() -> None:
    text = "g (float[N, 16] x) => (float[N, 4] y) { s = Shape (w) r = Reshape (w, s) y = MatMul (x, r) }"
    proto = parse(text, {"w": normal(1, 16, 4)})
    assert peak_bytes(proto, {"x": (10, 16), "unknown": (3,)}) == 4 * 10 * 4


def test_a_reverse_pass_grows_with_depth_and_less_so_if_it_computes_again() -> None:
    def peak(depth: int, recompute: bool) -> int:
        layers = " ".join(f"h{i + 1} = Tanh (h{i})" for i in range(depth))
        proto = parse(f"g (float[N, 16] h0) => (float[N, 16] h{depth}) {{ {layers} }}")
        found = differentiate(proto, [f"h{depth}"], ["h0"], recompute=recompute)
        return peak_bytes(found.proto, {"h0": (100, 16), found.cotangents[f"h{depth}"]: (100, 16)})

    assert peak(64, False) > 64 * 100 * ROW  # every layer's output
    assert peak(64, True) < 0.5 * peak(64, False)  # about 2√64 of them
    assert peak(64, False) > 1.9 * peak(32, False)


def test_the_machine_has_some_memory() -> None:
    assert np.isinf(affordable_bytes()) or affordable_bytes() > 1 << 24
