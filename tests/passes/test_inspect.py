"""Effective ranks and declared shapes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper, parser

from intaglio.passes.inspect import declared_shapes, effective_rank, inspect_model, rank_holding
from intaglio.passes.load import load
from intaglio.passes.sites import find_sites

energies = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20).map(lambda e: np.array(sorted(e, reverse=True)))


@given(energies, st.floats(1e-3, 1e3))
def test_effective_rank_lies_between_one_and_the_count_and_ignores_scale(values: np.ndarray, scale: float) -> None:
    rank = effective_rank(values)
    assert 1 - 1e-9 <= rank <= len(values) + 1e-9
    assert effective_rank(scale * values) == pytest.approx(rank)  # rounding of the products only


@pytest.mark.parametrize("count", [1, 2, 7])
def test_equal_energies_have_full_effective_rank(count: int) -> None:
    assert effective_rank(np.ones(count)) == pytest.approx(count)  # a sum of logarithms: rounding
    assert effective_rank(np.array([3.0, *[0.0] * count])) == pytest.approx(1)


def test_a_weight_of_zeros_has_rank_zero() -> None:
    assert effective_rank(np.zeros(3)) == 0
    assert rank_holding(np.zeros(3), 0.99) == 0


@given(energies, st.floats(0.01, 1))
def test_rank_holding_is_the_least_that_does(values: np.ndarray, share: float) -> None:
    rank = rank_holding(values, share)
    assert 1 <= rank <= len(values)
    assert values[:rank].sum() >= share * values.sum() * (1 - 1e-9)
    assert values[: rank - 1].sum() < share * values.sum()


def dense(rank: int, batch: str) -> onnx.ModelProto:
    """A matrix of a given rank between an input and an output."""
    rng = np.random.default_rng(rank)
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[{batch}, 40] x) => (float[{batch}, 30] y) {{ y = MatMul(x, w) }}'
    )
    weight = np.linalg.qr(rng.standard_normal((40, rank)))[0] @ np.linalg.qr(rng.standard_normal((30, rank)))[0].T
    model.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), "w"))
    return model


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_inspection_finds_the_rank_of_a_weight(rank: int) -> None:
    (site,) = inspect_model(dense(rank, "N")).sites
    assert site.rank == 30
    assert site.effective_rank == pytest.approx(rank, rel=1e-4)  # float32 weights leave a little energy everywhere
    assert site.rank_99 == rank
    assert (site.bytes, site.macs, site.latency_s) == (4800, 1200, None)


def test_macs_follow_declared_shapes_where_they_are_known() -> None:
    assert inspect_model(dense(3, "4")).sites[0].macs == 4 * 1200
    model = load(dense(3, "N"))
    model.proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "any"
    assert declared_shapes(model, find_sites(model)) == {}
