"""Losses: append a scalar to a model's graph that `differentiate` can start from.

Before: a model. After: the same model (at opset 18 or newer, see `modernize`) with a further output, the loss, and inputs for what it
compares with: labels, weights of the samples, a teacher's outputs. A loss is a weighted sum of terms.

Terms over classes take logits, probabilities or log-probabilities. Probabilities that come from a Softmax are not taken the logarithm of:
the logarithm of the Softmax is computed from its input, which neither overflows nor loses the gradient of a confident error. The class
axis is the last, or axis 1 where there are four axes or more (images), unless it is given; what is left are the samples. Everything is
computed in float32, or float64 where the model is.

Must not fire on: a value whose rank onnx cannot infer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

from intaglio.ops.vjp import Names, Tape, Value

from .divergence import Kind
from .errors import InputError
from .graph import all_names
from .modernize import modernize
from .sites import opset
from .values import infer, typed
from .weights import WeightStore

_TINY = 1e-12
"""Probabilities and sums of squares below this are taken as this."""

_PASSING = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""What may stand between a Softmax and the scores: operators that commute with the logarithm."""

_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


@dataclass(frozen=True)
class CrossEntropy:
    """Mean over samples of −log p(label), in nats.

    Attributes:
        scores: a value with a class axis.
        labels: name of the input for the labels: int64, shaped like the scores without the class axis, 0 ≤ label < classes.
        sample_weights: name of an input for weights shaped like the labels, which makes the mean Σ w·l ∕ Σ w; None to weigh all equally.
        axis: the class axis; None for the convention.
        kind: what the scores hold; None to see it from the operator that makes them, which means logits unless it is a (Log)Softmax.
        weight: of the term.
    """

    scores: str
    labels: str = "labels"
    sample_weights: str | None = None
    axis: int | None = None
    kind: Kind | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class TeacherDivergence:
    """Mean over samples of T²·KL(teacher ‖ model), in nats, of class probabilities at temperature T (Hinton et al. 2015, arXiv 1503.02531).

    Probabilities at temperature T are softmax(logits ∕ T); T² keeps the size of the gradient.

    Attributes:
        scores: a value with a class axis.
        teacher: name of the input for the teacher's scores, shaped like the model's.
        teacher_kind: what they hold.
        temperature: T > 0.
        sample_weights: as in `CrossEntropy`.
        axis: as in `CrossEntropy`.
        kind: as in `CrossEntropy`.
        weight: of the term.
    """

    scores: str
    teacher: str = "teacher"
    teacher_kind: Kind = Kind.LOGITS
    temperature: float = 1.0
    sample_weights: str | None = None
    axis: int | None = None
    kind: Kind | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class SquaredError:
    """‖values − teacher‖² over ‖teacher‖², or over the number of entries.

    Attributes:
        values: a float value.
        teacher: name of the input for what it should be, of the same shape.
        relative: False for the mean square.
        weight: of the term.
    """

    values: str
    teacher: str = "teacher"
    relative: bool = True
    weight: float = 1.0


@dataclass(frozen=True)
class CosineDistance:
    """Mean over vectors of 1 − cos(values, teacher), for embeddings that are compared by their directions.

    A vector of zeros has no direction and counts as orthogonal to all.

    Attributes:
        values: a float value.
        teacher: name of the input for what it should be, of the same shape.
        axis: along which the vectors lie; None for the convention of class axes.
        weight: of the term.
    """

    values: str
    teacher: str = "teacher"
    axis: int | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Named:
    """The mean of a value that the model computes itself, such as its own loss.

    Attributes:
        value: a float value.
        weight: of the term.
    """

    value: str
    weight: float = 1.0


Term: TypeAlias = CrossEntropy | TeacherDivergence | SquaredError | CosineDistance | Named


@dataclass(frozen=True)
class WithLoss:
    """A model with a loss.

    Attributes:
        proto: the model.
        loss: name of the loss, an output of shape ().
        inputs: names of the inputs that were added.
    """

    proto: ModelProto
    loss: str
    inputs: tuple[str, ...]


def with_loss(
    proto: ModelProto,
    terms: Sequence[Term],
    *,
    name: str = "loss",
    shapes: Mapping[str, Sequence[int]] | None = None,
    weights: WeightStore | None = None,
) -> WithLoss:
    """Append a weighted sum of terms. Terms that name the same input share it.

    Args:
        proto: the model; not changed.
        terms: at least one.
        name: of the loss, if the model has no such name yet.
        shapes: lengths of inputs that the model leaves open.
        weights: as in `differentiate`.

    Raises:
        InputError: there is no term; a term names no float value of known rank, or an input name that the model uses for something else;
            or a temperature is not above 0.
    """
    if not terms:
        raise InputError("the loss has no terms, expected at least one")
    working = modernize(proto, weights)
    model = working.proto
    values = infer(model, (), shapes)
    used = all_names(model) | {value.name for value in model.graph.output}
    builder = _Builder(list(model.graph.node), values, Tape(Names(used), opset(model), stem="loss"), set(used))
    parts = [_EMIT[type(term)](builder, term) for term in terms]
    result = builder.tape.names.fresh(name)
    dtype = builder.dtype
    weighted = [builder.weighted(part, part_dtype, term.weight) for (part, part_dtype), term in zip(parts, terms, strict=True)]
    builder.tape.nodes.append(helper.make_node("Sum", weighted, [result]))
    complete = working.restored()
    graph = complete.graph
    graph.node.extend(builder.tape.nodes)
    graph.initializer.extend(numpy_helper.from_array(array, constant) for constant, array in builder.tape.constants.items())
    graph.input.extend(builder.inputs.values())
    graph.output.append(typed(Value(result, dtype, ())))
    return WithLoss(complete, result, tuple(builder.inputs))


def with_cross_entropy(proto: ModelProto, scores: str, labels: str = "labels", sample_weights: str | None = None) -> WithLoss:
    """Append the `CrossEntropy` of class scores against labels.

    Raises:
        InputError: as `with_loss`.
    """
    return with_loss(proto, [CrossEntropy(scores, labels, sample_weights)])


# --- terms


@dataclass
class _Builder:
    """Emits the nodes of a loss.

    Attributes:
        nodes: of the model.
        values: what is known of the model's values.
        tape: takes nodes and constants.
        taken: names that the model uses.
        inputs: new inputs by name.
        dtype: float64 once a float64 value took part, else float32.
    """

    nodes: Sequence[NodeProto]
    values: Mapping[str, Value]
    tape: Tape
    taken: set[str]
    inputs: dict[str, ValueInfoProto] = field(default_factory=dict)
    dtype: np.dtype[Any] = _FLOAT32

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Emit a node with one output; the output's name."""
        return str(self.tape.emit(op_type, inputs, 1, "loss", "", attributes)[0])

    def number(self, number: float, dtype: np.dtype[Any]) -> str:
        """A scalar constant."""
        return self.tape.constant(np.asarray(number, dtype))

    def ints(self, *numbers: int) -> str:
        """A one-dimensional int64 constant."""
        return self.tape.constant(np.asarray(numbers, np.int64))

    def weighted(self, term: str, dtype: np.dtype[Any], weight: float) -> str:
        """A term times its weight, in the type of the whole loss."""
        cast = term if dtype == self.dtype else self.op("Cast", term, to=_onnx(self.dtype))
        return cast if weight == 1 else self.op("Mul", cast, self.number(weight, self.dtype))

    def value(self, name: str) -> Value:
        """A float value of the model of known rank."""
        value = self.values.get(name)
        if value is None or value.shape is None or not value.is_float:
            raise InputError(f"loss: '{name}' is no float value of known rank in the model; name an output or a value between")
        if value.dtype == _FLOAT64:
            self.dtype = _FLOAT64
        return value

    def wide(self, value: Value) -> tuple[str, np.dtype[Any]]:
        """The value in float32 or float64, and which."""
        if value.dtype in (_FLOAT32, _FLOAT64):
            return value.name, value.dtype
        return self.op("Cast", value.name, to=_onnx(_FLOAT32)), _FLOAT32

    def input(self, name: str, dtype: np.dtype[Any], lengths: Sequence[int | str | None]) -> str:
        """A new input, or the one that an earlier term made."""
        info = helper.make_tensor_value_info(name, _onnx(dtype), list(lengths))
        if name in self.taken or self.inputs.get(name, info) != info:
            raise InputError(f"loss: the name '{name}' is already taken by another value; choose another for the loss's input")
        self.tape.names.taken.add(name)
        self.inputs[name] = info
        return name


def _cross_entropy(build: _Builder, term: CrossEntropy) -> tuple[str, np.dtype[Any]]:
    value = build.value(term.scores)
    axis = _class_axis(value, term.axis)
    logs, dtype = _log_probabilities(build, value, axis, term.kind)
    samples = [*value.lengths[:axis], *value.lengths[axis + 1 :]]
    labels = build.input(term.labels, np.dtype(np.int64), samples)
    picked = build.op("GatherElements", logs, build.op("Unsqueeze", labels, build.ints(axis)), axis=axis)
    losses = build.op("Neg", build.op("Squeeze", picked, build.ints(axis)))
    return _mean(build, losses, dtype, samples, term.sample_weights), dtype


def _teacher_divergence(build: _Builder, term: TeacherDivergence) -> tuple[str, np.dtype[Any]]:
    if not term.temperature > 0:
        raise InputError(f"loss: temperature is {term.temperature}, expected a number above 0")
    value = build.value(term.scores)
    axis = _class_axis(value, term.axis)
    logs, dtype = _log_probabilities(build, value, axis, term.kind)
    logs = _tempered(build, logs, dtype, axis, term.temperature)
    teacher = build.input(term.teacher, dtype, value.lengths)
    if term.teacher_kind == Kind.PROBABILITIES:
        teacher = build.op("Log", build.op("Max", teacher, build.number(_TINY, dtype)))
    elif term.teacher_kind == Kind.LOGITS and term.temperature == 1:
        teacher = build.op("LogSoftmax", teacher, axis=axis)
    teacher = _tempered(build, teacher, dtype, axis, term.temperature)
    products = build.op("Mul", build.op("Exp", teacher), build.op("Sub", teacher, logs))
    divergences = build.op("ReduceSum", products, build.ints(axis), keepdims=0)
    samples = [*value.lengths[:axis], *value.lengths[axis + 1 :]]
    mean = _mean(build, divergences, dtype, samples, term.sample_weights)
    return (mean if term.temperature == 1 else build.op("Mul", mean, build.number(term.temperature**2, dtype))), dtype


def _tempered(build: _Builder, logs: str, dtype: np.dtype[Any], axis: int, temperature: float) -> str:
    """Log-probabilities at a temperature, from logits or log-probabilities: they differ by a constant that cancels."""
    if temperature == 1:
        return logs
    return build.op("LogSoftmax", build.op("Div", logs, build.number(temperature, dtype)), axis=axis)


def _squared_error(build: _Builder, term: SquaredError) -> tuple[str, np.dtype[Any]]:
    value = build.value(term.values)
    ours, dtype = build.wide(value)
    teacher = build.input(term.teacher, dtype, value.lengths)
    difference = build.op("Sub", ours, teacher)
    squares = build.op("Mul", difference, difference)
    if not term.relative:
        return build.op("ReduceMean", squares, keepdims=0), dtype
    size = build.op("ReduceSumSquare", teacher, keepdims=0)
    return build.op("Div", build.op("ReduceSum", squares, keepdims=0), build.op("Max", size, build.number(_TINY, dtype))), dtype


def _cosine_distance(build: _Builder, term: CosineDistance) -> tuple[str, np.dtype[Any]]:
    value = build.value(term.values)
    axis = _class_axis(value, term.axis)
    ours, dtype = build.wide(value)
    teacher = build.input(term.teacher, dtype, value.lengths)
    products = build.op("ReduceSum", build.op("Mul", ours, teacher), build.ints(axis), keepdims=0)
    lengths = [build.op("Sqrt", build.op("Max", _squares(build, each, axis), build.number(_TINY, dtype))) for each in (ours, teacher)]
    cosines = build.op("Div", products, build.op("Mul", *lengths))
    return build.op("Sub", build.number(1, dtype), build.op("ReduceMean", cosines, keepdims=0)), dtype


def _squares(build: _Builder, name: str, axis: int) -> str:
    """The sum of squares along an axis."""
    return build.op("ReduceSum", build.op("Mul", name, name), build.ints(axis), keepdims=0)


def _named(build: _Builder, term: Named) -> tuple[str, np.dtype[Any]]:
    value = build.value(term.value)
    wide, dtype = build.wide(value)
    return (wide if value.shape == () else build.op("ReduceMean", wide, keepdims=0)), dtype


# What each kind of term emits: the name of a scalar, and its type.
_EMIT: Mapping[type, Any] = {
    CrossEntropy: _cross_entropy,
    TeacherDivergence: _teacher_divergence,
    SquaredError: _squared_error,
    CosineDistance: _cosine_distance,
    Named: _named,
}


# --- classes and samples


def _class_axis(value: Value, axis: int | None) -> int:
    """The class axis, not negative."""
    if value.rank == 0:
        raise InputError(f"loss: '{value.name}' is a scalar, expected a class axis")
    if axis is None:
        return 1 if value.rank > 3 else value.rank - 1
    if not -value.rank <= axis < value.rank:
        raise InputError(f"loss: class axis {axis} of '{value.name}', which has {value.rank} axes")
    return axis % value.rank


def _mean(build: _Builder, losses: str, dtype: np.dtype[Any], samples: Sequence[int | str | None], weights: str | None) -> str:
    """The mean over samples, weighted by a further input if one is named."""
    if weights is None:
        return build.op("ReduceMean", losses, keepdims=0)
    fed = build.input(weights, dtype, samples)
    total = build.op("ReduceSum", build.op("Mul", losses, fed), keepdims=0)
    return build.op("Div", total, build.op("ReduceSum", fed, keepdims=0))


def _log_probabilities(build: _Builder, value: Value, axis: int, kind: Kind | None) -> tuple[str, np.dtype[Any]]:
    """Log-probabilities of scores, and their type."""
    producers = {name: node for node in build.nodes for name in node.output if name}
    chain: list[NodeProto] = []
    node = producers.get(value.name)
    while node is not None and node.op_type in _PASSING and node.domain == "" and node.input[0] in producers:
        chain.append(node)
        node = producers[node.input[0]]
    made_by = node.op_type if node is not None and node.domain == "" else ""
    if node is not None and made_by == "Softmax" and kind in (None, Kind.PROBABILITIES):
        return _replayed(build, node, chain)
    name, dtype = build.wide(value)
    if kind == Kind.PROBABILITIES:
        return build.op("Log", build.op("Max", name, build.number(_TINY, dtype))), dtype
    if kind == Kind.LOG_PROBABILITIES or (kind is None and made_by == "LogSoftmax"):
        return name, dtype
    if kind == Kind.VALUES:
        raise InputError(f"loss: '{value.name}' is declared to hold values, expected class scores; use SquaredError for values")
    return build.op("LogSoftmax", name, axis=axis), dtype


def _replayed(build: _Builder, softmax: NodeProto, chain: Sequence[NodeProto]) -> tuple[str, np.dtype[Any]]:
    """The logarithm of a Softmax, taken through the operators after it, Cast left out."""
    name, dtype = build.wide(build.value(softmax.input[0]))
    axis = next((attribute.i for attribute in softmax.attribute if attribute.name == "axis"), -1)
    logs = build.op("LogSoftmax", name, axis=axis)
    for node in reversed(chain):
        if node.op_type in ("Cast", "Identity"):
            continue
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        logs = build.op(node.op_type, logs, *node.input[1:], **attributes)
    return logs, dtype


def _onnx(dtype: np.dtype[Any]) -> int:
    return int(helper.np_dtype_to_tensor_dtype(dtype))
