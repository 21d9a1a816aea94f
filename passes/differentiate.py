"""Reverse-mode differentiation as a graph pass: a model that also computes gradients, run by ONNX Runtime itself.

Before: a model and the names of what to differentiate and with respect to what. After: a model with the same inputs and outputs, a further
input for every cotangent, and a further output for every gradient. The rules of the operators are in `ops.vjp`.

The result is at opset 18 or newer, with functions inlined and constant `If` nodes resolved (`modernize`); values keep their names. Weights
are not read, and may lie in external data: run the result with `open_session(result.proto, weights=...)`.

Must not fire on: an operator without a rule, or in a case its rule does not cover, or one that holds nested graphs. No gradient passes
there; the result names it as a `Stop` and the values whose gradients lack a part as `partial`. Integers, bools and strings pass no gradient
because their derivative is zero, which is no stop; only the integer codes between `QuantizeLinear` and `DequantizeLinear` do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from intaglio.ops.vjp import RULES, Call, Names, Tape, Unsupported, Value

from .errors import InputError
from .gates import Gates
from .graph import STANDARD, all_names, nested_graphs, reads, topological
from .modernize import modernize
from .recompute import Recomputed, recompute_forward
from .sites import opset
from .values import infer, typed
from .weights import WeightStore

_QUANTIZE = "QuantizeLinear"
_DEQUANTIZE = "DequantizeLinear"
_MOVES_CODES = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)
"""What may stand between a QuantizeLinear and its DequantizeLinear: their rules never look at elements."""


@dataclass(frozen=True)
class Stop:
    """Where a path to the loss ended for want of a rule.

    Attributes:
        node: the operator's name, or its first output's name.
        op_type: the operator, as "domain::type" outside the default domain.
        reason: why no gradient passes.
    """

    node: str
    op_type: str
    reason: str

    def __str__(self) -> str:
        return f"no gradient through {self.op_type} '{self.node}': {self.reason}"


@dataclass(frozen=True)
class Differentiated:
    """A model with gradients.

    Attributes:
        proto: the model; initializers are those of the original and the constants of the reverse pass.
        cotangents: output name → name of the input that takes its cotangent, shaped and typed like the output.
        gradients: value name → name of the output that holds its gradient. A value that the loss does not depend on, or only through
            stops, is absent.
        stops: operators between `wrt` and the outputs that no gradient passes.
        partial: names of values of which some path to the loss goes through a stop, so that their gradient lacks that part.
        recomputed: names of forward values that the reverse pass computes again rather than keeps.
    """

    proto: ModelProto
    cotangents: Mapping[str, str]
    gradients: Mapping[str, str]
    stops: tuple[Stop, ...]
    partial: frozenset[str]
    recomputed: frozenset[str] = frozenset()


def differentiate(
    proto: ModelProto,
    outputs: Sequence[str],
    wrt: Sequence[str],
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    recompute: bool | Collection[str] = False,
    weights: WeightStore | None = None,
) -> Differentiated:
    """Add the reverse pass of a model.

    The loss is Σ ⟨cotangent, output⟩ over the outputs, for cotangents that are fed. A scalar loss that the model computes itself is
    differentiated by feeding 1.

    Args:
        proto: the model; not changed.
        outputs: names of float values with given cotangents.
        wrt: names of float initializers, inputs or other values. Nothing about their elements is built into the result, so initializers
            among them may be replaced afterwards.
        shapes: lengths of inputs that the model leaves open, which makes the reverse pass smaller and binds it to them.
        recompute: True to keep only few forward values, at cuts chosen for memory, and to compute the others again in the reverse pass
            (Chen et al. 2016, arXiv 1604.06174); or the names of the values to keep.
        weights: reads small tensors in external data (shapes, axes), so that rules may build on them.

    Raises:
        InputError: a name is not a value of the model, is no float or has no type that can be inferred; `shapes` contradicts the model;
            or the model cannot be brought to opset 18.
    """
    working = modernize(proto, weights)
    model = working.proto
    values = infer(model, wrt, shapes)
    nodes = topological(model.graph.node)
    for name in (*outputs, *wrt):
        _check(name, nodes, values, {value.name for value in model.graph.input})
    tape = Tape(Names(all_names(model) | {value.name for value in model.graph.output}), opset(model))
    produced = {name for node in nodes for name in node.output}
    gates = None if recompute is False else Gates(tape)
    sweep = _Sweep(values, _reachable(nodes, wrt), _codes(nodes, values), tape, gates, frozenset(wrt) - produced)
    cotangents = {name: tape.names.fresh(f"cotangent.{name}") for name in outputs}
    for name, fed in cotangents.items():
        sweep.pending.setdefault(name, []).append(fed)
    for node in reversed(nodes):
        sweep.visit(node)
    gradients = {name: _published(tape, total, name) for name in wrt if (total := sweep.total(name)) is not None}
    again = _recomputed(nodes, sweep, values, model.graph, recompute)

    result = working.restored()
    graph = result.graph
    del graph.node[:]
    graph.node.extend(nodes if again is None else topological([*nodes, *again.nodes]))
    if again is None:
        graph.node.extend(tape.nodes)
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in tape.constants.items())
    graph.value_info.extend(gates.declared if gates is not None else ())
    graph.input.extend(typed(replace(values[name], name=fed)) for name, fed in cotangents.items())
    graph.output.extend(typed(replace(values[name], name=published)) for name, published in gradients.items())
    stops = tuple(sweep.stops)
    return Differentiated(
        result, cotangents, gradients, stops, frozenset(sweep.blocked.intersection(wrt)), again.values if again else frozenset()
    )


# --- the reverse sweep


@dataclass
class _Sweep:
    """The state of a walk over the forward nodes from the outputs back.

    Attributes:
        values: what is known of the forward values.
        active: values that depend on what is differentiated with respect to.
        codes: names of integer values that stand for quantized floats → the float type of their cotangents.
        tape: takes what rules emit.
        gates: makes the reverse pass wait at each operator for its gradients of `leaves`, so that what these need is freed before
            the next is computed; None to leave the order to the runtime.
        leaves: what is differentiated with respect to and no operator makes.
        pending: value name → gradients from the readers seen so far.
        stops: where no gradient passes.
        blocked: values of which some path to the loss goes through a stop.
        entered: the nodes that a rule was applied to, in order, each with one of its cotangents.
    """

    values: Mapping[str, Value]
    active: set[str]
    codes: Mapping[str, np.dtype[Any]]
    tape: Tape
    gates: Gates | None
    leaves: frozenset[str]
    pending: dict[str, list[str]] = field(default_factory=dict)
    stops: list[Stop] = field(default_factory=list)
    blocked: set[str] = field(default_factory=set)
    entered: list[tuple[NodeProto, str]] = field(default_factory=list)

    def total(self, name: str) -> str | None:
        """The sum of a value's gradients over its readers; None if there are none."""
        terms = self.pending.get(name, [])
        if len(terms) > 1:
            terms = self.tape.emit("Sum", terms, 1, f"grad.{name}", "", {})
            self.pending[name] = terms
        return terms[0] if terms else None

    def visit(self, node: NodeProto) -> None:
        """Carry the cotangents of a node's outputs to its inputs. All readers of the outputs must have been visited."""
        if not self.active.intersection(node.output):
            return
        lacking = not self.blocked.isdisjoint(node.output)
        given = [self.total(name) if name in self.active else None for name in node.output]
        if not any(given):
            if lacking:
                self.blocked |= self._passing(node)
            return
        found = self._apply(node, given)
        if isinstance(found, Stop):
            self.stops.append(found)
            self.blocked |= self._passing(node)
            return
        for index, gradient in self._in_turn(node, found).items():
            self.pending.setdefault(node.input[index], []).append(gradient)
            if lacking:
                self.blocked.add(node.input[index])

    def _in_turn(self, node: NodeProto, found: Mapping[int, str]) -> Mapping[int, str]:
        """The gradients, those that the reverse pass goes on with waiting for those that it is done with."""
        done = [gradient for index, gradient in found.items() if node.input[index] in self.leaves]
        if self.gates is None or not done:
            return found
        return {
            index: gradient
            if node.input[index] in self.leaves
            else self.gates.wait(gradient, self._known(node.input[index], as_float=True), done)
            for index, gradient in found.items()
        }

    def _apply(self, node: NodeProto, given: Sequence[str | None]) -> Mapping[int, str] | Stop:
        """What the node's rule emits, or why it does not."""
        key = _operator(node)
        passing = self._passing(node)
        if not passing:
            return {}
        try:
            if any(reads(node) - set(node.input) & self.active) or any(nested_graphs(node)):
                raise Unsupported("it holds nested graphs")
            if key not in RULES:
                raise Unsupported("the operator has no rule")
            call = self._call(node, given, passing)
            self.entered.append((node, next(name for name in given if name)))
            found = RULES[key](call)
        except Unsupported as reason:
            return Stop(_label(node), key, str(reason))
        return {index: name for index, name in found.items() if index in call.wanted}

    def _call(self, node: NodeProto, given: Sequence[str | None], passing: set[str]) -> Call:
        plain = node.op_type not in (_QUANTIZE, _DEQUANTIZE)
        for name, cotangent in zip(node.output, given, strict=True):
            if cotangent and not self._known(name).is_float and name not in self.codes:
                raise Unsupported(f"its output '{name}' holds integers that come from no QuantizeLinear")
        return Call(
            node,
            tuple(self._known(name, plain) if name else None for name in node.input),
            tuple(self._known(name, plain) if name else None for name in node.output),
            tuple(given),
            frozenset(index for index, name in enumerate(node.input) if name in passing),
            self.tape,
            partial(_add_output, node, self.tape.names),
        )

    def _passing(self, node: NodeProto) -> set[str]:
        """Active values that the node reads and whose derivative is not zero by type: floats, codes, and what is of unknown type."""
        found = set()
        for name in reads(node) & self.active:
            value = self.values.get(name)
            # Whatever integers a DequantizeLinear reads, it reads them as floats.
            if value is None or value.is_float or name in self.codes or (node.op_type == _DEQUANTIZE and name == node.input[0]):
                found.add(name)
        return found

    def _known(self, name: str, as_float: bool = False) -> Value:
        """A value; codes in the type of their cotangents if asked for."""
        if name not in self.values:
            raise Unsupported(f"the type of '{name}' is unknown")
        value = self.values[name]
        return replace(value, dtype=self.codes[name]) if as_float and name in self.codes else value


def _operator(node: NodeProto) -> str:
    """The operator as rules name it."""
    return str(node.op_type) if node.domain in STANDARD else f"{node.domain}::{node.op_type}"


def _label(node: NodeProto) -> str:
    return str(node.name) or next(str(name) for name in node.output if name)


def _add_output(node: NodeProto, names: Names, index: int) -> str:
    """Make the node give an optional output."""
    while len(node.output) <= index:
        node.output.append("")
    if not node.output[index]:
        node.output[index] = names.fresh(f"{node.output[0]}.output{index}")
    return str(node.output[index])


def _published(tape: Tape, gradient: str, name: str) -> str:
    """An output of its own for a gradient: two values may share one."""
    result = tape.names.fresh(f"gradient.{name}")
    tape.nodes.append(helper.make_node("Identity", [gradient], [result]))
    return result


# --- what takes part


def _check(name: str, nodes: Sequence[NodeProto], values: Mapping[str, Value], inputs: Collection[str]) -> None:
    """Refuse a name that no gradient can be had of.

    Raises:
        InputError: see `differentiate`.
    """
    producer = next((node for node in nodes if name in node.output), None)
    if name not in values:
        if producer is None and name not in inputs:
            raise InputError(f"'{name}' is not a value of the model; name an input, an initializer or the output of an operator")
        made = f"made by {_operator(producer)} '{_label(producer)}'" if producer is not None else "an input"
        raise InputError(f"the type of '{name}', {made}, is unknown to onnx's shape inference; declare it in the model's value_info")
    if not values[name].is_float:
        raise InputError(f"'{name}' holds {values[name].dtype}, expected floats; only floats have gradients")


def _reachable(nodes: Sequence[NodeProto], start: Iterable[str]) -> set[str]:
    """Values that depend on any of `start`, themselves included.

    Args:
        nodes: in topological order.
        start: names of values.
    """
    found = set(start)
    for node in nodes:
        if found & reads(node):
            found.update(name for name in node.output if name)
    return found


def _codes(nodes: Sequence[NodeProto], values: Mapping[str, Value]) -> dict[str, np.dtype[Any]]:
    """Integers that QuantizeLinear made, also where they have been moved since: names → type of the float that they stand for."""
    found: dict[str, np.dtype[Any]] = {}
    for node in nodes:
        if node.op_type == _QUANTIZE and node.input[0] in values and node.output[0] in values:
            found[node.output[0]] = values[node.input[0]].dtype
        elif node.op_type in _MOVES_CODES and node.domain in STANDARD and node.input and node.input[0] in found:
            found.update((name, found[node.input[0]]) for name in node.output if name)
    return found


def _recomputed(
    nodes: Sequence[NodeProto], sweep: _Sweep, values: Mapping[str, Value], graph: GraphProto, recompute: bool | Collection[str]
) -> Recomputed | None:
    """The reverse pass on recomputed values; None where all are kept."""
    if sweep.gates is None or recompute is False:
        return None
    for name in () if recompute is True else recompute:
        if name not in values:
            raise InputError(f"recompute: '{name}' is not a value of the model; name values to keep")
    given = {value.name for value in graph.input}
    outputs = {value.name for value in graph.output}
    keep = None if recompute is True else frozenset(recompute)
    return recompute_forward(nodes, sweep.tape, sweep.entered, sweep.gates, values, given, outputs, keep)
