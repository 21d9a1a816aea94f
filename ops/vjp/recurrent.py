"""Recurrent layers by back-propagation through time.

Everything that does not wait for another step is computed for all steps at once: the gates anew from X and Y by two products before, the
gradients of weights, biases and X by one product each after. What is left goes through one `Scan` for each direction, against the way
in which the layer ran, with a product by the recurrent weights and a few operators on vectors in its body. LSTM needs its cell states,
which the operator does not output; they go through a second `Scan`, the way the layer ran, without products.

Let h and c be states after a step, h₋ and c₋ before it, and a bar mark the gradient of what is under it. In each step:

    LSTM  h = o tanh c and c = f c₋ + i g: c̄ grows by h̄ o (1 − tanh² c), the gates get h̄ or c̄ times what is known beforehand, c̄₋ = c̄ f
    GRU   h = (1 − z) n + z h₋, with n of the reset state r h₋, or of r (h₋ Rᵀ + b) if linear_before_reset: all get h̄ times what is known
    RNN   h = tanh(…) gets h̄ (1 − h²)

and h̄₋ is the gates' gradients times R, plus what reaches h₋ directly. Peepholes change only what is known beforehand: c̄ grows by ō P_o
too, and c̄₋ by ī P_i + f̄ P_f. Gates and their order in the weights: LSTM i, o, f, g; GRU z, r, n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from .base import Call, Gradients, Rules, Unsupported

_DIRECTIONS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}

_X, _W, _R, _B, _LENGTHS, _H, _C, _P = range(8)
"""Positions of inputs."""


@dataclass(frozen=True)
class _Run:
    """One direction of a layer, with the axis of directions taken away and time first.

    Attributes:
        call: the node.
        index: position among the directions.
        reverse: whether the steps go from the last to the first.
        size: length H of a state.
        gates: how many gates there are.
        x: (T, N, inputs).
        w: (gates · H, inputs).
        r: (gates · H, H).
        bias: (2 gates · H,), of W and of R; None if there is none.
        y: (T, N, H), the states after the steps.
        before: (T, N, H), the states before the steps.
        dy: (T, N, H); None if the loss does not depend on it.
        last: (N, H) cotangents of the last states, h and for LSTM c; None likewise.
        first: (N, H) states before the first step, likewise.
    """

    call: Call
    index: int
    reverse: bool
    size: int
    gates: int
    x: str
    w: str
    r: str
    bias: str | None
    y: str
    before: str
    dy: str | None
    last: tuple[str | None, ...]
    first: tuple[str, ...]

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        return self.call.op(op_type, *inputs, **attributes)

    def gate(self, name: str, first: int, count: int = 1, axis: int = 0) -> str:
        """Some consecutive gates of weights, biases or activations."""
        ints = self.call.ints
        return self.op("Slice", name, ints(first * self.size), ints((first + count) * self.size), ints(axis))

    def columns(self, name: str, *counts: int) -> list[str]:
        """Activations split along the last axis into runs of gates."""
        return self.call.ops("Split", name, self.call.ints(*(count * self.size for count in counts)), outputs=len(counts), axis=-1)

    def side(self, of_recurrent: bool) -> str:
        """The bias of W or that of R, all gates; only where there is one."""
        return self.gate(self.bias or "", self.gates if of_recurrent else 0, self.gates)

    def times(self, name: str, matrix: str) -> str:
        """name · matrixᵀ for all steps."""
        return self.op("MatMul", name, self.op("Transpose", matrix, perm=(1, 0)))

    def plus_bias(self, name: str) -> str:
        """Both biases added, if there are any."""
        return name if self.bias is None else self.op("Add", name, self.op("Add", self.side(False), self.side(True)))

    def earlier(self, name: str, first: str) -> str:
        """States before the steps: those after them, moved by one step."""
        ints, leading = self.call.ints, self.op("Unsqueeze", first, self.call.ints(0))
        if self.reverse:
            return self.op("Concat", self.op("Slice", name, ints(1), ints(np.iinfo(np.int64).max), ints(0)), leading, axis=0)
        return self.op("Concat", leading, self.op("Slice", name, ints(0), ints(-1), ints(0)), axis=0)

    def one_minus(self, name: str) -> str:
        return self.op("Sub", self.call.scalar(1), name)

    def one_minus_square(self, name: str) -> str:
        return self.one_minus(self.op("Mul", name, name))

    def product(self, *factors: str) -> str:
        result = factors[0]
        for factor in factors[1:]:
            result = self.op("Mul", result, factor)
        return result

    @property
    def incoming(self) -> str:
        """Cotangents of the states after the steps, (T, N, H)."""
        return self.dy if self.dy is not None else self.op("Expand", self.call.scalar(0), self.op("Shape", self.y))

    def final(self, state: int) -> str:
        """The cotangent of a last state, (N, H): 0 for h, 1 for c."""
        return self.last[state] or self.op("Expand", self.call.scalar(0), self.op("Shape", self.first[0]))


@dataclass
class _Body:
    """The graph that a `Scan` runs for each step.

    Attributes:
        run: the direction it belongs to.
        nodes: what has been emitted.
    """

    run: _Run
    nodes: list[NodeProto] = field(default_factory=list)

    def fresh(self, stem: str) -> str:
        return self.run.call.tape.names.fresh(f"step.{stem}")

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        name = self.fresh(op_type.lower())
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], **attributes))
        return name


@dataclass(frozen=True)
class _Backward:
    """What back-propagation through one direction finds.

    Attributes:
        of_w: gradients of the gates with respect to x Wᵀ, (T, N, gates · H).
        of_r: likewise with respect to h₋ Rᵀ.
        first: gradients of the states before the first step, (N, H).
        r: finds the gradient of R, if it is not of_rᵀ · h₋.
        p: finds the gradient of the peepholes, (3 H,).
    """

    of_w: str
    of_r: str
    first: tuple[str, ...]
    r: Callable[[], str] | None = None
    p: Callable[[], str] | None = None


_Steps = Callable[[_Body, Sequence[str], Sequence[str]], tuple[list[str], list[str]]]
"""Emits one step from (states, slices of what is scanned): (next states, what is collected)."""


def _scan(run: _Run, states: Sequence[str], scanned: Sequence[str], steps: _Steps, *, back: bool) -> tuple[list[str], list[str]]:
    """Run through time, along the direction of the layer or back: (last states, collections over time)."""
    body = _Body(run)
    old, slices = [body.fresh("state") for _ in states], [body.fresh("slice") for _ in scanned]
    new, kept = steps(body, old, slices)
    results: list[str] = []
    for name in (*new, *kept):  # outputs have names of their own
        results.append(body.op("Identity", name) if name in (*old, *results) else name)
    kind = helper.np_dtype_to_tensor_dtype(run.call.x().dtype)
    declared = [helper.make_tensor_value_info(name, kind, None) for name in (*old, *slices)]
    graph = helper.make_graph(body.nodes, "step", declared, [helper.make_tensor_value_info(name, kind, None) for name in results])
    way = int(run.reverse != back)
    found = run.call.ops(
        "Scan",
        *states,
        *scanned,
        outputs=len(results),
        body=graph,
        num_scan_inputs=len(scanned),
        scan_input_directions=[way] * len(scanned),
        scan_output_directions=[way] * len(kept),
    )
    return found[: len(states)], found[len(states) :]


# --- LSTM


def _lstm(run: _Run) -> _Backward:
    peepholes = _peepholes(run)
    pre = run.plus_bias(run.op("Add", run.times(run.x, run.w), run.times(run.before, run.r)))
    i, o, f, g, c, c_before = _cells(run, pre, peepholes)
    bent = run.op("Tanh", c)
    sigmoids = run.op("Concat", i, o, f, axis=-1)
    slope = run.product(sigmoids, run.one_minus(sigmoids), run.op("Concat", g, bent, c_before, axis=-1))
    gate_slopes = run.op("Concat", slope, run.op("Mul", i, run.one_minus_square(g)), axis=-1)
    into_cell, kept = run.op("Mul", o, run.one_minus_square(bent)), f
    if peepholes:
        of_i, of_o, of_f = run.columns(slope, 1, 1, 1)
        into_cell = run.op("Add", into_cell, run.op("Mul", of_o, peepholes[1]))
        kept = run.op("Sum", kept, run.op("Mul", of_i, peepholes[0]), run.op("Mul", of_f, peepholes[2]))

    def steps(body: _Body, states: Sequence[str], slices: Sequence[str]) -> tuple[list[str], list[str]]:
        (dh, dc), (dy, slopes, into, keep) = states, slices
        dh = body.op("Add", dh, dy)
        dc = body.op("Add", dc, body.op("Mul", dh, into))
        gates = body.op("Mul", body.op("Concat", dc, dh, dc, dc, axis=-1), slopes)
        return [body.op("MatMul", gates, run.r), body.op("Mul", dc, keep)], [gates]

    finals = (run.final(0), run.final(1))
    first, (gates,) = _scan(run, finals, (run.incoming, gate_slopes, into_cell, kept), steps, back=True)

    def of_peepholes() -> str:
        of_i, of_o, of_f, _ = run.columns(gates, 1, 1, 1, 1)
        terms = run.op("Concat", *(run.op("Mul", a, b) for a, b in ((of_i, c_before), (of_o, c), (of_f, c_before))), axis=-1)
        return run.op("ReduceSum", terms, run.call.ints(0, 1), keepdims=0)

    return _Backward(gates, gates, tuple(first), p=of_peepholes)


def _peepholes(run: _Run) -> list[str]:
    """Weights of the cell state in the gates i, o and f, (H,) each; empty if there are none."""
    if not run.call.has_input(_P):
        return []
    return run.columns(_of_direction(run.call, run.call.x(_P).name, run.index, 0), 1, 1, 1)


def _cells(run: _Run, pre: str, peepholes: Sequence[str]) -> tuple[str, str, str, str, str, str]:
    """Gates i, o, f, g and cell states after and before the steps, (T, N, H) each."""
    if not peepholes:
        to_sigmoid, to_tanh = run.columns(pre, 3, 1)
        i, o, f = run.columns(run.op("Sigmoid", to_sigmoid), 1, 1, 1)
        g = run.op("Tanh", to_tanh)

        def open_steps(body: _Body, states: Sequence[str], slices: Sequence[str]) -> tuple[list[str], list[str]]:
            c = body.op("Add", body.op("Mul", states[0], slices[0]), slices[1])
            return [c], [c]

        _, (c,) = _scan(run, [run.first[1]], [f, run.op("Mul", i, g)], open_steps, back=False)
        return i, o, f, g, c, run.earlier(c, run.first[1])
    pre_i, pre_o, pre_f, pre_g = run.columns(pre, 1, 1, 1, 1)
    g = run.op("Tanh", pre_g)

    def steps(body: _Body, states: Sequence[str], slices: Sequence[str]) -> tuple[list[str], list[str]]:
        i, f = (
            body.op("Sigmoid", body.op("Add", given, body.op("Mul", states[0], weight)))
            for given, weight in ((slices[0], peepholes[0]), (slices[1], peepholes[2]))
        )
        c = body.op("Add", body.op("Mul", states[0], f), body.op("Mul", i, slices[2]))
        return [c], [c, i, f]

    _, (c, i, f) = _scan(run, [run.first[1]], [pre_i, pre_f, g], steps, back=False)
    o = run.op("Sigmoid", run.op("Add", pre_o, run.op("Mul", c, peepholes[1])))
    return i, o, f, g, c, run.earlier(c, run.first[1])


# --- GRU


def _gru(run: _Run) -> _Backward:
    return _gru_linear_first(run) if run.call.attribute("linear_before_reset", 0) else _gru_reset_first(run)


def _update_and_reset(run: _Run, from_x: str, from_h: str) -> tuple[str, str, str]:
    """Gates z and r, and σ′ of both, from what x and h₋ give to them."""
    both = run.op("Sigmoid", run.op("Add", from_x, from_h))
    z, r = run.columns(both, 1, 1)
    return z, r, run.op("Mul", both, run.one_minus(both))


def _gru_linear_first(run: _Run) -> _Backward:
    """n = tanh(x Wₙᵀ + b + r ⊙ q) with q = h₋ Rₙᵀ + b′."""
    from_x, from_h = run.times(run.x, run.w), run.times(run.before, run.r)
    if run.bias is not None:
        from_x, from_h = run.op("Add", from_x, run.side(False)), run.op("Add", from_h, run.side(True))
    (x_gates, x_new), (h_gates, q) = run.columns(from_x, 2, 1), run.columns(from_h, 2, 1)
    z, r, slope = _update_and_reset(run, x_gates, h_gates)
    n = run.op("Tanh", run.op("Add", x_new, run.op("Mul", r, q)))
    of_n = run.op("Mul", run.one_minus(z), run.one_minus_square(n))
    of_gates = run.op("Mul", slope, run.op("Concat", run.op("Sub", run.before, n), run.op("Mul", of_n, q), axis=-1))
    slopes = run.op("Concat", of_gates, run.op("Mul", of_n, r), axis=-1)

    def steps(body: _Body, states: Sequence[str], slices: Sequence[str]) -> tuple[list[str], list[str]]:
        (dh,), (dy, slopes, keep) = states, slices
        dh = body.op("Add", dh, dy)
        gates = body.op("Mul", body.op("Concat", dh, dh, dh, axis=-1), slopes)
        return [body.op("Add", body.op("Mul", dh, keep), body.op("MatMul", gates, run.r))], [dh, gates]

    first, (dh, of_r) = _scan(run, [run.final(0)], (run.incoming, slopes, z), steps, back=True)
    of_w = run.op("Concat", run.columns(of_r, 2, 1)[0], run.op("Mul", dh, of_n), axis=-1)
    return _Backward(of_w, of_r, tuple(first))


def _gru_reset_first(run: _Run) -> _Backward:
    """n = tanh(x Wₙᵀ + (r ⊙ h₋) Rₙᵀ + b + b′)."""
    r_gates, r_new = run.gate(run.r, 0, 2), run.gate(run.r, 2)
    x_gates, x_new = run.columns(run.plus_bias(run.times(run.x, run.w)), 2, 1)
    z, r, slope = _update_and_reset(run, x_gates, run.times(run.before, r_gates))
    reset = run.op("Mul", r, run.before)
    n = run.op("Tanh", run.op("Add", x_new, run.times(reset, r_new)))
    slope_z, slope_r = run.columns(slope, 1, 1)
    of_n = run.op("Mul", run.one_minus(z), run.one_minus_square(n))
    of_z = run.op("Mul", slope_z, run.op("Sub", run.before, n))
    of_r = run.op("Mul", slope_r, run.before)

    def steps(body: _Body, states: Sequence[str], slices: Sequence[str]) -> tuple[list[str], list[str]]:
        (dh,), (dy, of_n, of_z, of_r, keep, r) = states, slices
        dh = body.op("Add", dh, dy)
        dn = body.op("Mul", dh, of_n)
        through = body.op("MatMul", dn, r_new)
        gates = body.op("Concat", body.op("Mul", dh, of_z), body.op("Mul", through, of_r), axis=-1)
        direct = body.op("Add", body.op("Mul", dh, keep), body.op("Mul", through, r))
        return [body.op("Add", direct, body.op("MatMul", gates, r_gates))], [body.op("Concat", gates, dn, axis=-1)]

    first, (gates,) = _scan(run, [run.final(0)], (run.incoming, of_n, of_z, of_r, z, r), steps, back=True)

    def of_recurrent() -> str:
        two, one = run.columns(gates, 2, 1)
        return run.op("Concat", _products(run, two, run.before), _products(run, one, reset), axis=0)

    return _Backward(gates, gates, tuple(first), r=of_recurrent)


# --- RNN


def _rnn(run: _Run) -> _Backward:
    def steps(body: _Body, states: Sequence[str], slices: Sequence[str]) -> tuple[list[str], list[str]]:
        gate = body.op("Mul", body.op("Add", states[0], slices[0]), slices[1])
        return [body.op("MatMul", gate, run.r)], [gate]

    first, (gate,) = _scan(run, [run.final(0)], (run.incoming, run.one_minus_square(run.y)), steps, back=True)
    return _Backward(gate, gate, tuple(first))


# --- what the layers share


@dataclass(frozen=True)
class _Layer:
    """A recurrent operator.

    Attributes:
        gates: how many it has.
        states: how many it carries from step to step.
        activations: of one direction, as the attribute spells them.
        backward: differentiates one direction.
    """

    gates: int
    states: int
    activations: tuple[str, ...]
    backward: Callable[[_Run], _Backward]

    def __call__(self, call: Call) -> Gradients:
        """The rule."""
        reverses = self._check(call)
        per_run = [self._one(call, index, reverse) for index, reverse in enumerate(reverses)]
        gradients = {}
        for index in sorted(call.wanted):
            parts = [found[index] for found in per_run if index in found]
            if index == _X:
                total = parts[0] if len(parts) == 1 else call.op("Add", *parts)
                gradients[index] = call.op("Transpose", total, perm=(1, 0, 2)) if call.attribute("layout", 0) else total
            elif parts:
                axis = 1 if index in (_H, _C) and call.attribute("layout", 0) else 0
                whole = [call.op("Unsqueeze", part, call.ints(axis)) for part in parts]
                gradients[index] = whole[0] if len(whole) == 1 else call.op("Concat", *whole, axis=axis)
        return gradients

    def _check(self, call: Call) -> tuple[bool, ...]:
        """Whether each direction is reversed.

        Raises:
            Unsupported: an attribute or input that changes the formulas.
        """
        reverses = _DIRECTIONS[call.attribute("direction", "forward")]
        activations = tuple(_text(name).lower() for name in call.attribute("activations", None) or self.activations * len(reverses))
        expected = tuple(name.lower() for name in self.activations * len(reverses))
        if activations[: len(expected)] != expected:  # RNN lists two by default, one of them for a direction that need not exist
            raise Unsupported(f"its activations are {', '.join(activations)}; only {', '.join(expected)} are covered")
        if call.has_input(_LENGTHS):
            raise Unsupported("it has lengths of sequences")
        if call.attribute("clip"):
            raise Unsupported("it clips the inputs of its activations")
        if call.attribute("input_forget", 0):
            raise Unsupported("its input and forget gates are coupled")
        return reverses

    def _one(self, call: Call, index: int, reverse: bool) -> dict[int, str]:
        """Gradients of one direction, without the axis of directions and with time first."""
        run = _run(call, index, reverse, self)
        found = self.backward(run)
        finders: dict[int, Callable[[], str]] = {
            _X: lambda: run.op("MatMul", found.of_w, run.w),
            _W: lambda: _products(run, found.of_w, run.x),
            _R: found.r or (lambda: _products(run, found.of_r, run.before)),
            _B: lambda: _biases(run, found),
            _H: lambda: found.first[0],
            _C: lambda: found.first[1],
        }
        if found.p is not None:
            finders[_P] = found.p
        return {wanted: finders[wanted]() for wanted in call.wanted}


def _products(run: _Run, left: str, right: str) -> str:
    """Σ over steps and samples of left ⊗ right."""
    rows = [run.op("Flatten", name, axis=2) for name in (left, right)]
    return run.op("Gemm", *rows, transA=1)


def _biases(run: _Run, found: _Backward) -> str:
    """Both biases, (2 gates · H,)."""
    sums = {name: run.op("ReduceSum", name, run.call.ints(0, 1), keepdims=0) for name in dict.fromkeys((found.of_w, found.of_r))}
    return run.op("Concat", sums[found.of_w], sums[found.of_r], axis=0)


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _of_direction(call: Call, name: str, index: int, axis: int) -> str:
    """Drop the axis of directions."""
    if call.attribute("direction", "forward") != "bidirectional":
        return call.op("Squeeze", name, call.ints(axis))
    return call.op("Gather", name, call.scalar(index, np.dtype(np.int64)), axis=axis)


def _run(call: Call, index: int, reverse: bool, layer: _Layer) -> _Run:
    batch_first = bool(call.attribute("layout", 0))
    size = call.attribute("hidden_size") or (call.x(_R).shape or (None,))[-1]
    if not size:
        raise Unsupported("the length of its state is unknown")

    def in_time(name: str) -> str:  # (T, D, N, H), or (N, T, D, H) if the batch comes first
        one = _of_direction(call, name, index, 2 if batch_first else 1)
        return call.op("Transpose", one, perm=(1, 0, 2)) if batch_first else one

    def state(position: int) -> str:
        if call.has_input(position):
            return _of_direction(call, call.x(position).name, index, int(batch_first))
        batch = call.op("Shape", call.x().name, start=0 if batch_first else 1, end=1 if batch_first else 2)
        return call.op("Expand", call.scalar(0), call.op("Concat", batch, call.ints(size), axis=0))

    def cotangent(position: int) -> str | None:
        given = call.cotangents[position] if position < len(call.cotangents) else None
        return None if given is None else _of_direction(call, given, index, int(batch_first))

    w, r = (_of_direction(call, call.x(position).name, index, 0) for position in (_W, _R))
    draft = _Run(
        call=call,
        index=index,
        reverse=reverse,
        size=size,
        gates=layer.gates,
        x=call.op("Transpose", call.x().name, perm=(1, 0, 2)) if batch_first else call.x().name,
        w=w,
        r=r,
        bias=_of_direction(call, call.x(_B).name, index, 0) if call.has_input(_B) else None,
        y=in_time(call.add_output(0)),
        before="",
        dy=None if call.cotangents[0] is None else in_time(call.cotangents[0]),
        last=tuple(cotangent(position) for position in (1, 2)[: layer.states]),
        first=tuple(state(position) for position in (_H, _C)[: layer.states]),
    )
    return replace(draft, before=draft.earlier(draft.y, draft.first[0]))


RULES: Rules = {
    "GRU": _Layer(3, 1, ("Sigmoid", "Tanh"), _gru),
    "LSTM": _Layer(4, 2, ("Sigmoid", "Tanh", "Tanh"), _lstm),
    "RNN": _Layer(1, 1, ("Tanh",), _rnn),
}
