"""What families share: products of two values whose rows are read alike."""

from __future__ import annotations

import numpy as np
import pytest

from intaglio.ops.families.base import Gram, cross_gram
from tests.ops.running import emitter_for, normal, run


@pytest.mark.parametrize("opset", [9, 18])  # with and without a Gemm of two inputs
@pytest.mark.parametrize(("columns", "grouped"), [(False, False), (True, False), (True, True)])
def test_products_of_the_rows_of_two_values(opset: int, columns: bool, grouped: bool) -> None:
    """Of five and three entries, however the rows lie."""
    first, second = normal(1, 2, 7, 5), normal(2, 2, 7, 3)
    expected = first.transpose(0, 2, 1) @ second
    if columns:
        first, second = first.transpose(0, 2, 1), second.transpose(0, 2, 1)
    if not grouped:
        first, second, expected = first[0], second[0], expected[0]
    emitter = emitter_for(opset, functions=False)
    grams = (Gram("", name, columns=columns, grouped=grouped) for name in ("first", "second"))
    (found,) = run(emitter, {"first": first, "second": second}, [cross_gram(emitter, *grams)])
    np.testing.assert_allclose(found, expected, atol=1e-5)  # sums of seven products in float32
