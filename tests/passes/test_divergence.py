"""Divergence: against direct computations, and which outputs count as class scores."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intaglio.passes.divergence import Divergence, Kind, output_kinds
from intaglio.passes.errors import InputError
from tests.models import Array, normal, parse

LOGITS = (Kind.LOGITS,)
VALUES = (Kind.VALUES,)


def of(kinds: tuple[Kind, ...], *feeds: tuple[list[Array], list[Array]]) -> Divergence:
    total = Divergence(kinds)
    for reference, candidate in feeds:
        total.add(reference, candidate)
    return total


def softmax(scores: Array) -> Array:
    exponentials = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(1, keepdims=True))


def test_kl_is_the_textbook_sum_however_the_scores_are_written() -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 7, 5))
    p, q = softmax(a), softmax(b)
    expected = (p * np.log(p / q)).sum(1).mean()
    for kind, x, y in ((Kind.LOGITS, a, b), (Kind.PROBABILITIES, p, q), (Kind.LOG_PROBABILITIES, np.log(p), np.log(q))):
        assert of((kind,), ([x], [y])).value == pytest.approx(expected, rel=1e-9)
    assert of(LOGITS, ([a + 3], [b - 2])).value == pytest.approx(expected, rel=1e-9)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_feeds_add_up_by_samples(sizes: list[int]) -> None:
    a, b = np.random.default_rng(1).standard_normal((2, sum(sizes), 5))
    cuts = np.cumsum(sizes)[:-1]
    parts = list(zip(np.split(a, cuts), np.split(b, cuts), strict=True))
    for kinds in (LOGITS, VALUES):
        whole = of(kinds, ([a], [b]))
        pieces = of(kinds, *(([x], [y]) for x, y in parts))
        assert pieces.value == pytest.approx(whole.value)
        assert pieces.samples == whole.samples == sum(sizes)
        assert pieces.agreement == whole.agreement


def test_relative_squared_error() -> None:
    a, b = np.random.default_rng(2).standard_normal((2, 4, 3))
    assert of(VALUES, ([a], [b])).value == pytest.approx(((a - b) ** 2).sum() / (a**2).sum())


def test_several_outputs_count_alike() -> None:
    a, b = np.ones((2, 3)), np.full((2, 3), 1.5)
    assert of((Kind.VALUES, Kind.VALUES), ([a, a], [a, b])).value == pytest.approx(0.125)


def test_equal_outputs_diverge_by_nothing() -> None:
    values = [normal(1, 4, 3), np.arange(4), np.array([True, False]), np.array(["a", "b"], object)]
    total = of((Kind.VALUES,) * 4, (values, [v.copy() for v in values]))
    assert total.value == 0.0
    zero = np.zeros((2, 2))
    assert of(VALUES, ([zero], [zero])).value == 0.0
    assert of(VALUES, ([zero], [zero + 1])).value > 0


def test_integers_and_texts_count_disagreements() -> None:
    assert of(VALUES, ([np.array([1, 2, 3, 4])], [np.array([1, 2, 9, 9])])).value == 0.5
    assert of(VALUES, ([np.array(["a", "b"], object)], [np.array(["a", "c"], object)])).value == 0.5


def test_narrow_floats_are_floats() -> None:
    """bfloat16 is no number to NumPy; a small error must not count as a disagreement."""
    a = np.array([1.0, 2.0], ml_dtypes.bfloat16)
    b = np.array([1.0, 2.0625], ml_dtypes.bfloat16)
    assert of(VALUES, ([a], [b])).value == pytest.approx(0.0625**2 / 5)


def test_what_is_not_finite_is_infinitely_far() -> None:
    a, broken = np.ones((2, 3)), np.array([[1, np.nan, 1], [1, 1, 1.0]])
    for kinds in (VALUES, LOGITS, (Kind.PROBABILITIES,)):
        assert of(kinds, ([a], [broken])).value == math.inf, kinds
    masked = np.array([[1.0, -np.inf, 2.0]])
    assert of(VALUES, ([masked], [masked])).value == 0.0
    assert of(LOGITS, ([masked], [masked])).value == 0.0


def test_confident_zeros_cost_a_finite_number_of_nats() -> None:
    p, q = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    assert of((Kind.PROBABILITIES,), ([p], [q])).value == pytest.approx(math.log(1e12), rel=1e-6)


def test_agreement_is_the_share_of_equal_top_classes() -> None:
    a = np.eye(4)
    total = of(LOGITS, ([a], [a[[0, 1, 3, 2]]]))
    assert (total.agreement, total.unit) == (0.5, "kl_nats")
    assert of(VALUES, ([a], [a])).agreement is None
    assert of(VALUES, ([a], [a])).unit == "relative_mse"


def test_classes_are_axis_1_of_images_of_one_pixel_and_last_in_sequences() -> None:
    image = np.random.default_rng(3).standard_normal((2, 5, 1, 1))
    other = np.random.default_rng(4).standard_normal((2, 5, 1, 1))
    assert of(LOGITS, ([image], [other])).value == pytest.approx(of(LOGITS, ([image[:, :, 0, 0]], [other[:, :, 0, 0]])).value)
    a, b = np.random.default_rng(5).standard_normal((2, 2, 3, 5))
    assert of(LOGITS, ([a], [b])).value == pytest.approx(of(LOGITS, ([a.reshape(6, 5)], [b.reshape(6, 5)])).value)
    assert of(LOGITS, ([a], [a])).agreement == 1.0


def test_shapes_must_agree() -> None:
    with pytest.raises(InputError, match=r"output 0: shape \[2, 4\], expected \[2, 3\]"):
        of(VALUES, ([np.ones((2, 3))], [np.ones((2, 4))]))


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("y = Softmax (x)", Kind.PROBABILITIES),
        ("s = Softmax (x) y = Identity (s)", Kind.PROBABILITIES),
        ("s = LogSoftmax (x) f = Flatten (s) y = Identity (f)", Kind.LOG_PROBABILITIES),
        ("y = Relu (x)", Kind.VALUES),
        ("s = Softmax (x) y = Relu (s)", Kind.VALUES),
    ],
)
def test_kinds_are_read_off_the_graph(body: str, kind: Kind) -> None:
    assert output_kinds(parse(f"g (float[N, 4] x) => (float[N, 4] y) {{ {body} }}")) == (kind,)


def test_outputs_that_are_no_tensors_are_refused() -> None:
    proto = parse("g (float[N, 4] x) => (seq(float[N, 4]) y) { y = SequenceConstruct (x, x) }")
    with pytest.raises(InputError, match=r"output 'y' has type sequence, but only tensors can be compared"):
        output_kinds(proto)


def test_an_output_called_logits_holds_logits() -> None:
    proto = parse(
        "g (float[N, 4] x) => (float[N, 4] logits, float[N, 4] other) { logits = Gemm (x, w) other = Relu (x) }", {"w": normal(1, 4, 4)}
    )
    assert output_kinds(proto) == (Kind.LOGITS, Kind.VALUES)


def test_the_users_word_wins() -> None:
    proto = parse("g (float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }")
    assert output_kinds(proto, "logits") == (Kind.LOGITS,)
    with pytest.raises(InputError, match="output kind 'classes' is unknown"):
        output_kinds(proto, "classes")


def test_classes_are_axis_1_of_segmentations() -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((2, 3, 4, 5))
    direct, segmented = Divergence((Kind.LOGITS,)), Divergence((Kind.LOGITS,))
    other = scores + 0.1 * rng.standard_normal(scores.shape)
    segmented.add([scores], [other])
    direct.add([scores.transpose(0, 2, 3, 1).reshape(-1, 3)], [other.transpose(0, 2, 3, 1).reshape(-1, 3)])
    assert segmented.value == pytest.approx(direct.value)
    assert segmented.agreement == direct.agreement


def test_a_reference_without_any_finite_value_is_refused() -> None:
    with pytest.raises(InputError, match="no finite value"):
        Divergence((Kind.VALUES,)).add([np.full((2, 3), np.nan)], [np.zeros((2, 3))])
