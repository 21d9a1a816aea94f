"""Clips in front of a Softmax: probabilities stay, and noise in place of scores takes no longer than they do."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.passes.floors import REACH, with_ceilings, with_floors
from intaglio.passes.load import load
from tests.models import normal, operators, parse, run

LEAST = float(np.finfo(np.float32).min)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 3), st.integers(1, 12), st.sampled_from([LEAST, -np.inf, -1e9]))
def test_probabilities_stay_whatever_the_scores(scale: float, length: int, huge: float) -> None:
    """Below the floor by construction: masked entries; every row keeps at least one that is not."""
    rng = np.random.default_rng(length)
    scores = (scale * rng.standard_normal((3, 4, length))).astype(np.float32)
    scores[..., 1:] += np.where(rng.random((3, 4, length - 1)) < 0.5, np.float32(huge), np.float32(0))
    proto = parse("g (float[A, B, C] x) => (float[A, B, C] y) { s = Neg (x) y = Softmax <axis = -1> (s) }")
    floor = float(np.floor(scores.max() - REACH))
    result = with_floors(load(proto), {"s": floor}).proto
    after, before = run(result, {"x": -scores})[0], run(proto, {"x": -scores})[0]
    np.testing.assert_array_equal(after[before > 0], before[before > 0])
    assert after[before == 0].max(initial=0) < 1e-30


def test_values_without_a_floor_stay() -> None:
    proto = parse(
        "g (float[A, 4] x) => (float[A, 4] y, float[A, 4] z) { s = Neg (x) y = Softmax <axis = -1> (s) z = Softmax <axis = -1> (x) }"
    )
    assert operators(with_floors(load(proto), {"other": -1.0, "x": -1.0}).proto) == {"Neg": 1, "Softmax": 2}
    both = parse(
        "g (float[A, 4] x) => (float[A, 4] y, float[A, 4] z) { s = Neg (x) y = Softmax <axis = -1> (s) z = Softmax <axis = -1> (s) }"
    )
    assert operators(with_floors(load(both), {"s": -1.0}).proto) == {"Neg": 1, "Clip": 1, "Softmax": 2}


def test_ceilings_keep_noise_from_saturating() -> None:
    model = load(parse("g (float[A, 9] x) => (float[A, 9] y) { s = Neg (x) y = Softmax <axis = -1> (s) }"))
    floors = {"s": -70.0}
    x = 500 * normal(1, 6, 9)
    assert np.count_nonzero(run(with_floors(model, floors).proto, {"x": x})[0] < np.finfo(np.float32).tiny) > 0
    bounded = with_ceilings(with_floors(model, floors), floors).proto
    assert run(bounded, {"x": x})[0].min() >= np.exp(np.float32(-REACH - 4))
    small = {"x": normal(2, 6, 9)}
    np.testing.assert_array_equal(run(bounded, small)[0], run(model.proto, small)[0])
    assert with_ceilings(model, {}) is model
