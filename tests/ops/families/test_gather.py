"""Gather from a table."""

from __future__ import annotations

import numpy as np
import pytest

from intaglio.ops.families import GramRequest
from intaglio.ops.families.gather import GATHER
from intaglio.ops.view import MatrixView
from tests.ops.running import emitter_for, node_of, run, use_of


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_gram_hands_out_the_indices(shape: tuple[int, ...], dtype: type) -> None:
    indices = np.random.default_rng(1).integers(-9, 9, shape).astype(dtype)
    emitter = emitter_for()
    gram = GATHER.gram(emitter, use_of("y = Gather (w, i)", (9, 4), 0), "i", GramRequest(indices.ndim, True))
    total, rows = run(emitter, {"i": indices}, [gram.total, gram.rows])
    assert total.dtype == np.int64
    np.testing.assert_array_equal(total, indices.reshape(-1))
    assert rows.size == indices.size


@pytest.mark.parametrize(
    ("text", "index", "shape", "reason"),
    [
        ("y = Gather (x, i)", 1, (4,), "constant indices of a Gather"),
        ("y = Gather <axis = 1> (w, i)", 0, (4, 5), "Gather along axis 1"),
        ("y = Gather <axis = -1> (w, i)", 0, (4, 5), "Gather along axis -1"),
        ("y = Gather (w, i)", 0, (4, 5, 6), "a table of shape [4, 5, 6]: only two-dimensional tables are decomposed"),
    ],
)
def test_tables_without_a_view(text: str, index: int, shape: tuple[int, ...], reason: str) -> None:
    assert GATHER.view(node_of(text), index, shape) == reason


@pytest.mark.parametrize("text", ["y = Gather (w, i)", "y = Gather <axis = -2> (w, i)"])
def test_view_activation_axis_and_cost(text: str) -> None:
    use = use_of(text, (9, 4), 0)
    assert use.view == MatrixView((9, 4), 1, 4, 9, False)
    assert GATHER.activation(use) == ("i", False)
    assert GATHER.channel_axis(use) == 0
    assert GATHER.macs(use, (3,), (3, 4)) == 0
    assert GATHER.contract_reason(use) is None
