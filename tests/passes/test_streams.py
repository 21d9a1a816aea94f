"""The factors of a stream: what they follow from, their limits, and when there are none."""

from __future__ import annotations

import numpy as np
import pytest

from intaglio.ops.moment import Moment
from intaglio.passes.load import load
from intaglio.passes.streams import MAX_EXPONENT
from tests.models import normal, parse
from tests.passes.rescaling import MATRICES, VECTORS, applied, preserved, tensor, uneven


def test_factors_are_powers_of_two_within_limits() -> None:
    proto, _ = uneven()
    result, _ = applied(load(proto))
    factors = tensor(result, "v") / tensor(load(proto), "v")
    exponents = np.log2(factors[0, :, 0, 0])
    np.testing.assert_array_equal(factors, np.broadcast_to(factors[:1, :, :1, :1], factors.shape))
    np.testing.assert_array_equal(exponents, np.rint(exponents))
    assert np.abs(exponents).max() == MAX_EXPONENT
    np.testing.assert_array_equal(tensor(result, "w") * factors[0, :, 0, 0][:, None, None, None], tensor(load(proto), "w"))
    np.testing.assert_array_equal(tensor(result, "b") * factors[0, :, 0, 0], tensor(load(proto), "b"))


@pytest.mark.parametrize(("alpha", "expected"), [(0.5, [-1, 0, 1, 0]), (1.0, [-2, 0, 2, 0])])
def test_alpha_shares_between_activations_and_weights(alpha: float, expected: list[int]) -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y) { h = Gemm (x, w) y = Gemm <transB = 1> (h, v) }"
    model = load(parse(text, {"w": normal(1, 4, 4), "v": np.ones((4, 4), np.float32)}))
    known = {"v": Moment(4.0 ** np.array([[-2, 0, 2, 0]]), 5)}
    result, _ = applied(model, known, alpha=alpha)
    np.testing.assert_array_equal(tensor(result, "v"), np.tile(2.0 ** np.array(expected), (4, 1)))


def test_large_weights_limit_a_factor() -> None:
    """s = √r / √w: a channel that is large where its weights are large stays."""
    text = "g (float[N, 4] x) => (float[N, 4] y) { h = Gemm (x, w) y = Gemm (h, v) }"
    v = np.ones((4, 4), np.float32) * np.array([1, 4, 1, 1], np.float32)[:, None]
    known = {"v": Moment(4.0 ** np.array([[-2, 2, 2, -2]]), 5)}
    result, _ = applied(load(parse(text, {"w": normal(1, 4, 4), "v": v})), known)
    # log₂ s = (−1, 0, 1, −1) before it is centred by +1/4 and rounded
    np.testing.assert_array_equal(tensor(result, "v")[:, 0] / v[:, 0], [0.5, 1, 2, 0.5])


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ({}, "no statistics of what reads it"),
        ({"v": Moment.isotropic(1, 8)}, "no statistics of what reads it"),
        ({"v": Moment(np.zeros((1, 8)), 9)}, "no statistics of what reads it"),
        ({"v": Moment(np.ones((1, 8)), 9)}, "its channels are balanced already"),
    ],
)
def test_without_ranges(known: dict[str, Moment], reason: str) -> None:
    proto = parse(f"{VECTORS} {{ h = MatMul (x, w) y = MatMul (h, v) }}", {"w": MATRICES["w"], "v": np.ones((8, 4), np.float32)})
    assert preserved(proto, known)["h"].reason == reason


def test_equal_ranges_are_not_spoiled_for_the_sake_of_weights() -> None:
    v = np.ones((8, 4), np.float32) * 4.0 ** np.arange(8, dtype=np.float32)[:, None]
    proto = parse(f"{VECTORS} {{ h = MatMul (x, w) y = MatMul (h, v) }}", {"w": MATRICES["w"], "v": v})
    record = preserved(proto, {"v": Moment(np.ones((1, 8)), 9)})["h"]
    assert record.reason == "its ranges would become less equal"
    assert record.bits_before == record.bits_after == 0
