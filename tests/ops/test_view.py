"""Matrix views: stored tensor ↔ matrices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intaglio.ops.view import MatrixView

SIZES = st.integers(1, 5)


@given(SIZES, SIZES, SIZES, st.booleans())
def test_stored_undoes_matrix(groups: int, m: int, n: int, outputs_first: bool) -> None:
    shape = (groups * m, n) if outputs_first else (n, m)
    view = MatrixView(shape, groups if outputs_first else 1, m, n, outputs_first)
    tensor = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    matrix = view.matrix(tensor)
    assert matrix.shape == (view.groups, m, n)
    assert matrix.dtype == np.float64
    np.testing.assert_array_equal(view.stored(matrix), tensor)


def test_outputs_first_keeps_the_order_of_groups_outputs_and_kernel_entries() -> None:
    kernel = np.arange(2 * 3 * 4 * 5).reshape(6, 4, 5)
    matrix = MatrixView((6, 4, 5), 2, 3, 20, True).matrix(kernel)
    assert matrix[1, 2, 7] == kernel[5, 1, 2]


def test_inputs_first_is_the_transpose() -> None:
    table = np.arange(12).reshape(4, 3)
    np.testing.assert_array_equal(MatrixView((4, 3), 1, 3, 4, False).matrix(table)[0], table.T)


@pytest.mark.parametrize(
    ("shape", "groups", "m", "n", "outputs_first", "message"),
    [((4, 3), 1, 4, 2, True, "1 x 4 x 2 matrices do not fill"), ((4, 3), 2, 2, 3, False, "has one group")],
)
def test_impossible_views_are_refused(shape: tuple[int, ...], groups: int, m: int, n: int, outputs_first: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatrixView(shape, groups, m, n, outputs_first)
