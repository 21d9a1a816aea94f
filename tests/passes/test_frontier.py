"""Frontiers: the rest of a model on what is held yields what the whole model yields, wherever it is cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.passes import frontier as module
from intaglio.passes.data import Dataset, input_specs, open_dataset
from intaglio.passes.execute import Executor
from intaglio.passes.frontier import Frontier, frontier
from intaglio.passes.graph import downstream
from intaglio.passes.load import load
from intaglio.passes.model import Model
from intaglio.passes.options import Runtime
from tests.models import Array, normal, parse

RUNTIME = Runtime(batch=4)

TEXT = """g (float[N, 8] x, bool[1] k) => (float[N, M] y) {
    half = Constant <value = float {0.5}> ()
    a0 = MatMul (x, w0)
    a1 = Relu (a0)
    left, right = Split <axis = 1, num_outputs = 2> (a1)
    l1 = MatMul (left, w1)
    r1 = Mul (right, half)
    joined = Add (l1, r1)
    rows = Shape (x)
    again = Reshape (joined, rows4)
    chosen = If (k) <
        then_branch = t () => (float[N, 4] u) { u = MatMul (again, w2) },
        else_branch = e () => (float[N, 4] v) { v = Neg (again) }
    >
    skip = Add (chosen, left)
    out = MatMul (skip, w3)
    count = Gather (rows, first)
    size = Cast <to = 1> (count)
    y = Div (out, size)
}"""
VALUES = ("a0", "a1", "left", "right", "l1", "r1", "joined", "again", "chosen", "skip", "out", "count", "size", "y")


def model(text: str = TEXT) -> Model:
    arrays = {"w0": normal(0, 8, 8), "w1": normal(1, 4, 4), "w2": normal(2, 4, 4), "w3": normal(3, 4, 4)}
    return load(parse(text, {**arrays, "rows4": np.array([-1, 4]), "first": np.array(0)}))


def dataset(whole: Model) -> Dataset:
    return open_dataset({"x": normal(5, 10, 8), "k": np.array([[True]] * 10)}, input_specs(whole.proto))


def fetched(part: Frontier, names: Sequence[str]) -> list[list[Array]]:
    return list(Executor.of(part.rest(), names, RUNTIME).run(part.feeds()))


@given(st.lists(st.sampled_from((*VALUES, "w0", "w1", "w2", "w3")), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_the_rest_yields_what_the_whole_yields(path: list[str]) -> None:
    whole = model()
    data = dataset(whole)
    start, moved = (Frontier(whole, data, np.arange(10), RUNTIME) for _ in range(2))
    for done in range(len(path)):
        pending = path[done:]
        moved.move(whole, pending, ())
        names = sorted(downstream(whole.proto, pending) & set(VALUES))
        for ours, theirs in zip(fetched(moved, names), fetched(start, names), strict=True):
            for one, other in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_what_is_final_does_not_run_again() -> None:
    whole = model()
    moved = Frontier(whole, dataset(whole), np.arange(10), RUNTIME)
    counts = []
    for pending in (["w0"], ["w1"], ["w2"], ["w3"]):
        moved.move(whole, pending, ())
        counts.append([node.op_type for node in moved.rest().proto.graph.node].count("MatMul"))
    assert counts == [3, 2, 1, 1]  # the one inside If is not counted
    assert sorted(value.name for value in moved.rest().proto.graph.input) == ["size", "skip"]


def test_a_value_that_both_what_is_final_and_the_rest_read_is_held() -> None:
    assert frontier(model().proto, ["w1"], ["a0", "out"]) == ["k", "a0", "left", "r1", "size"]


def test_what_changed_beyond_the_frontier_is_seen() -> None:
    whole = model()
    moved = Frontier(whole, dataset(whole), np.arange(10), RUNTIME)
    moved.move(whole, ["w3"], ())
    other = model(TEXT.replace("Div (out", "Mul (out"))
    moved.move(other, ["w3"], ())
    start = Frontier(other, dataset(whole), np.arange(10), RUNTIME)
    for ours, theirs in zip(itertools.chain(*fetched(moved, ["y"])), itertools.chain(*fetched(start, ["y"])), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_a_frontier_that_is_too_wide_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model()
    moved = Frontier(whole, dataset(whole), np.arange(10), RUNTIME)
    monkeypatch.setattr(module, "HELD_BYTES", 100)
    moved.move(whole, ["w3"], ())
    assert moved.rest() is whole
    assert all(set(feed) == {"x", "k"} for feed in moved.feeds())


def test_feeds_of_different_lengths_keep_their_lengths() -> None:
    text = "g (float[N, T, 8] x) => (float[N, T, 8] y) { h = MatMul (x, w0) r = Relu (h) y = MatMul (r, w1) }"
    whole = load(parse(text, {"w0": normal(0, 8, 8), "w1": normal(1, 8, 8)}))
    rows = [{"x": normal(length, 1, length, 8)} for length in (2, 3, 3, 5)]
    data = open_dataset(rows, input_specs(whole.proto))
    moved, start = (Frontier(whole, data, np.arange(4), RUNTIME) for _ in range(2))
    moved.move(whole, ["w1"], ())
    assert [value.name for value in moved.rest().proto.graph.input] == ["r"]
    lengths = [arrays[0].shape[1] for arrays in fetched(moved, ["y"])]
    assert lengths == [arrays[0].shape[1] for arrays in fetched(start, ["y"])]
    assert set(lengths) == {2, 3, 5}


def test_sequences_are_not_held() -> None:
    text = """g (float[N, 8] x) => (float[N, 8] y) {
        h = MatMul (x, w0) none = SequenceEmpty () one = SequenceInsert (none, h)
        r = Relu (h) k = MatMul (r, w1) two = SequenceInsert (one, k) y = ConcatFromSequence <axis = 0> (two)
    }"""
    whole = load(parse(text, {"w0": normal(0, 8, 8), "w1": normal(1, 8, 8)}))
    data = open_dataset({"x": normal(2, 8, 8)}, input_specs(whole.proto))
    moved = Frontier(whole, data, np.arange(8), RUNTIME)
    moved.move(whole, ["w1"], ())
    assert moved.rest() is whole


def test_what_is_wanted_is_held_too() -> None:
    whole = model()
    moved, start = (Frontier(whole, dataset(whole), np.arange(10), RUNTIME) for _ in range(2))
    moved.move(whole, ["w3"], ["a1"])
    np.testing.assert_array_equal(
        np.concatenate(*zip(*fetched(moved, ["a1"]), strict=True)), np.concatenate(*zip(*fetched(start, ["a1"]), strict=True))
    )
