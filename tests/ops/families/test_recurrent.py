"""LSTM, GRU and RNN: input and recurrent weights."""

from __future__ import annotations

import numpy as np
import pytest

from intaglio.ops.families.recurrent import RECURRENT
from intaglio.ops.view import MatrixView
from tests.ops.families.grams import SUMS, expected_gram, gram_of
from tests.ops.running import assert_close, node_of, normal, run_node, use_of

STEPS, BATCH, INPUTS, HIDDEN = 6, 3, 5, 4
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@pytest.mark.parametrize("op_type", GATES)
@pytest.mark.parametrize("directions", [1, 2])
def test_gram_of_the_input_weight_runs_over_steps_and_batch(op_type: str, directions: int) -> None:
    shape = (directions, GATES[op_type] * HIDDEN, INPUTS)
    use = use_of(f"y = {op_type} <hidden_size = {HIDDEN}> (x, w, r)", shape)
    assert use.view == MatrixView(shape, 1, directions * GATES[op_type] * HIDDEN, INPUTS, True)
    sequence = normal(1, STEPS, BATCH, INPUTS)
    total, count = gram_of(use, sequence)
    assert count == STEPS * BATCH
    assert_close(total, expected_gram(sequence.reshape(1, -1, INPUTS)), SUMS)
    assert RECURRENT.activation(use) == ("x", False)
    assert RECURRENT.contract_reason(use) is None


@pytest.mark.parametrize("op_type", GATES)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_gram_of_the_recurrent_weight_runs_over_the_states_of_each_direction(op_type: str, direction: str) -> None:
    directions, rows = 2 if direction == "bidirectional" else 1, GATES[op_type] * HIDDEN
    shape = (directions, rows, HIDDEN)
    use = use_of(f'y = {op_type} <hidden_size = {HIDDEN}, direction = "{direction}"> (x, w, r)', shape, 2)
    assert use.view == MatrixView(shape, directions, rows, HIDDEN, True)
    weights = {"w": normal(1, directions, rows, INPUTS), "r": normal(2, *shape)}
    (states,) = run_node(use.node, {"x": normal(3, STEPS, BATCH, INPUTS)}, weights)
    total, count = gram_of(use, states)
    assert count == STEPS * BATCH
    assert_close(total, expected_gram(states.transpose(1, 0, 2, 3).reshape(directions, -1, HIDDEN)), SUMS)
    assert RECURRENT.activation(use) == ("y", True)
    assert RECURRENT.contract_reason(use) == "the recurrent weight is applied inside the operator"


def test_batch_first_states() -> None:
    use = use_of('y = GRU <hidden_size = 4, layout = 1, direction = "bidirectional"> (x, w, r)', (2, 12, HIDDEN), 2)
    states = normal(4, BATCH, STEPS, 2, HIDDEN)
    total, count = gram_of(use, states)
    assert count == STEPS * BATCH
    assert_close(total, expected_gram(states.transpose(2, 0, 1, 3).reshape(2, -1, HIDDEN)), SUMS)


def test_an_input_of_zeros_has_a_zero_sum() -> None:
    use = use_of("y = RNN <hidden_size = 4> (x, w, r)", (1, HIDDEN, INPUTS))
    total, count = gram_of(use, np.zeros((STEPS, 1, INPUTS), np.float16))
    assert count == STEPS
    assert not total.any()


@pytest.mark.parametrize(("index", "shape"), [(3, (1, 32)), (7, (1, 12))])
def test_biases_and_peepholes_have_no_view(index: int, shape: tuple[int, ...]) -> None:
    node = node_of("y = LSTM <hidden_size = 4> (x, w, r, b, s, h, c, p)")
    assert RECURRENT.view(node, index, shape) == "biases or peepholes of a recurrent layer"


def test_axis_and_cost() -> None:
    w = use_of("y = GRU <hidden_size = 4> (x, w, r)", (2, 12, INPUTS))
    r = use_of("y = GRU <hidden_size = 4> (x, w, r)", (2, 12, HIDDEN), 2)
    assert RECURRENT.channel_axis(w) == RECURRENT.channel_axis(r) == 1
    assert RECURRENT.macs(w, (STEPS, BATCH, INPUTS), (STEPS, 2, BATCH, HIDDEN)) == STEPS * BATCH * 24 * INPUTS
    assert RECURRENT.macs(r, (STEPS, 2, BATCH, HIDDEN), (STEPS, 2, BATCH, HIDDEN)) == STEPS * BATCH * 24 * HIDDEN
