"""ONNX's own backend tests as material for rewriting: which there are, how weights are frozen, and what a rewrite must yield.

Node tests feed their weights as inputs. `frozen` turns one such input at a time into an initializer; the others stay inputs.
Tests of an opset outside the supported range are converted to the nearest one inside it, which leaves their data valid.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, numpy_helper, version_converter
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner

from intaglio.ops.decompositions import DECOMPOSITIONS
from intaglio.ops.families import FAMILIES
from intaglio.ops.form import Form
from intaglio.ops.moment import Moment
from intaglio.ops.storage import STORAGES, readers
from intaglio.passes.assemble import assemble
from intaglio.passes.fit import Arrays, pack
from intaglio.passes.graph import all_names
from intaglio.passes.kernels import INTEGERS
from intaglio.passes.load import OLDEST_OPSET, newest_opset
from intaglio.passes.model import Model
from intaglio.passes.ranges import Range
from intaglio.passes.rewrite import OPTIONAL_INPUT_IR, declines, fragment, rewrite
from intaglio.passes.session import open_session, to_array
from intaglio.passes.sites import Site, opset

Array = np.ndarray
Feed = Mapping[str, Array]

OPERATORS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Gather", "LSTM", "GRU", "RNN")
ROUNDING = 64
"""Two ways to compute one output may differ by so many units of its type's precision, at the scale of the largest entry."""

ALWAYS = ("float", "fp16", "int8", "int4")
"""Storages that every site is tried in."""

OTHERS = tuple(name for name, storage in STORAGES.items() if name not in ALWAYS and readers(storage) is None)
"""The others that any operator can read. They take turns, `PER_SITE` of them at each site, so that all of them are tried at some sites."""

PER_SITE = 3

MODERN_OPSET = 13

WHOLE_BYTES = {"integer": "int8", "dynamic": "int8", "nbits": "nbits8-b32", "rows": "int8"}
"""Arithmetic → the storage that it is tried in: codes of eight bits, which it reads as they are."""

_SHAPE = re.compile(r"[(\[][-0-9, ]*[)\]]")


@dataclass(frozen=True)
class BackendTest:
    """A model, what it is fed, and what it must yield within its own tolerance."""

    name: str
    proto: ModelProto
    feed: Feed
    expected: tuple[Array, ...]
    rtol: float
    atol: float

    def check(self, outputs: Sequence[Array]) -> None:
        """Compare as ONNX's own test runner does."""
        Runner.assert_similar_outputs(self.expected, list(outputs), self.rtol, self.atol)


@dataclass
class Tally:
    """What has been tried, for the summary and for the floors that keep the suite from shrinking unseen."""

    models: int = 0
    sites: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    skips: Counter[str] = field(default_factory=Counter)
    turns: int = 0
    storages: set[str] = field(default_factory=set)
    arithmetics: set[str] = field(default_factory=set)

    def count(self, form: Form) -> None:
        """One more rewrite into this form."""
        arithmetic = "" if form.arithmetic == "float" else f", {form.arithmetic}"
        self.forms[f"{form.decomposition}, {form.storage}, {form.execution}{arithmetic}"] += 1
        self.storages.add(form.storage)
        self.arithmetics.add(form.arithmetic)

    def skip(self, what: str, reason: str) -> None:
        """One more thing that was not rewritten; reasons that differ in shapes only count as one."""
        self.skips[f"{what}: {_SHAPE.sub('…', reason)}"] += 1


@cache
def backend_tests() -> Mapping[str, tuple[BackendTest, ...]]:
    """Every test whose model and data are installed, under the first of `OPERATORS` that its main graph has."""
    found: dict[str, list[BackendTest]] = {operator: [] for operator in OPERATORS}
    for test in (*_node_tests(), *_stored_tests()):
        present = {node.op_type for node in test.proto.graph.node}
        first = next((operator for operator in OPERATORS if operator in present), None)
        if first is not None:
            found[first].append(replace(test, proto=_in_range(test.proto)))
    return {operator: tuple(tests) for operator, tests in found.items()}


def _node_tests() -> Iterator[BackendTest]:
    for case in load_model_tests(kind="node"):
        if any(node.op_type in OPERATORS for node in case.model.graph.node):
            names = [value.name for value in case.model.graph.input]
            for inputs, outputs in case.data_sets:
                feed = dict(zip(names, map(_array, inputs), strict=True))
                yield BackendTest(case.name, case.model, feed, tuple(map(_array, outputs)), case.rtol, case.atol)


def _stored_tests() -> Iterator[BackendTest]:
    for kind in ("simple", "pytorch-converted", "pytorch-operator"):
        for case in sorted(load_model_tests(kind=kind), key=lambda case: case.name):
            proto = onnx.load(Path(case.model_dir, "model.onnx"))
            if any(node.op_type in OPERATORS for node in proto.graph.node):
                constants = {tensor.name for tensor in proto.graph.initializer}
                names = [value.name for value in proto.graph.input if value.name not in constants]
                for folder in sorted(Path(case.model_dir).glob("test_data_set_*")):
                    feed = {name: read_tensor(folder / f"input_{i}.pb") for i, name in enumerate(names)}
                    expected = tuple(read_tensor(folder / f"output_{i}.pb") for i in range(len(proto.graph.output)))
                    yield BackendTest(case.name, proto, feed, expected, case.rtol, case.atol)


def _in_range(proto: ModelProto) -> ModelProto:
    target = min(max(opset(proto), OLDEST_OPSET), newest_opset())
    return proto if target == opset(proto) else version_converter.convert_version(proto, target)


def modern(test: BackendTest) -> BackendTest:
    """The test at an opset at which every arithmetic is defined."""
    return test if opset(test.proto) >= MODERN_OPSET else replace(test, proto=version_converter.convert_version(test.proto, MODERN_OPSET))


def read_tensor(path: Path) -> Array:
    """The array in a `.pb` file."""
    return numpy_helper.to_array(TensorProto.FromString(path.read_bytes()))


def _array(value: Array | TensorProto) -> Array:
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)


def frozen(test: BackendTest) -> Iterator[tuple[str, BackendTest]]:
    """(input, the test with that input as an initializer), for every floating-point input with at least two axes."""
    for name, array in test.feed.items():
        if array.dtype in (np.float16, np.float32, np.float64) and array.ndim >= 2:
            feed = {other: value for other, value in test.feed.items() if other != name}
            yield name, replace(test, proto=with_weights(test.proto, {name: array}), feed=feed)


def with_weights(proto: ModelProto, weights: Feed) -> ModelProto:
    """A copy in which values (inputs, initializers, or outputs of `Constant` nodes) are initializers with these arrays."""
    result = ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    _keep(graph.initializer, [tensor.name not in weights for tensor in graph.initializer])
    _keep(graph.node, [weights.keys().isdisjoint(node.output) for node in graph.node])
    if proto.ir_version >= OPTIONAL_INPUT_IR:
        _keep(graph.input, [value.name not in weights for value in graph.input])
    graph.initializer.extend(numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in weights.items())
    return result


def _keep(entries: MutableSequence[Any], wanted: Sequence[bool]) -> None:
    """Remove the other entries of a repeated field."""
    for position in reversed([position for position, stays in enumerate(wanted) if not stays]):
        del entries[position]


def run(model: Model, proto: ModelProto, feed: Feed, *, optimize: bool, threads: int = 1) -> list[Array]:
    """Outputs of `proto`, whose weights `model` holds, under ONNX Runtime."""
    session = open_session(proto, weights=model.weights, optimize=optimize, threads=threads)
    return [to_array(output) for output in session.run(session.outputs, feed)]


def full_rank_forms(site: Site, storages: Sequence[str]) -> tuple[list[Form], list[str]]:
    """Every decomposition × execution × storage of a site at full rank, "dense" included, and why the others decline."""
    forms, reasons = [], []
    for storage in storages:
        for form in (Form("dense", (), storage), *_decomposed(site, storage)):
            reason = form if isinstance(form, str) else declines(site, form)
            if reason is None:
                forms.append(form)
            else:
                reasons.append(reason)
    return forms, reasons


def _decomposed(site: Site, storage: str) -> Iterator[Form | str]:
    for (name, execution), decomposition in DECOMPOSITIONS.items():
        reason = decomposition.declines(site.use)
        yield reason or Form(name, decomposition.full(site.use), storage, execution)


def random_moment(site: Site) -> Moment:
    """A seeded, positive definite metric; diagonal for the one-hot inputs of a Gather."""
    view, generator = site.use.view, np.random.default_rng(0)
    if site.op_type == "Gather":
        return Moment(generator.uniform(0.5, 2, (view.groups, view.n)), 1)
    root = generator.standard_normal((view.groups, view.n, view.n))
    return Moment(root @ root.transpose(0, 2, 1) + np.eye(view.n), 1)


def rewritten(model: Model, choices: Sequence[tuple[Site, Form, Arrays]]) -> ModelProto:
    """The model with every given site in its form."""
    taken = frozenset(all_names(model.proto))
    fragments = {site.name: fragment(site, form, packed, model.proto, taken, INTEGERS["full"]) for site, form, packed in choices}
    return rewrite(model, fragments, [site for site, _, _ in choices]).proto


def check_site(test: BackendTest, model: Model, site: Site, tally: Tally, storages: Sequence[str] = ALWAYS) -> None:
    """Rewrite one site into every form that takes it in some storages, and compare outputs with and without optimizations.

    At full rank in the model's own type the outputs are those that the test expects. In every form they are those of the model
    whose weight is the array that the form stands for.
    """
    forms, reasons = full_rank_forms(site, storages)
    tally.sites += 1
    for reason in reasons:
        tally.skip("form", reason)
    value, moment = site.value(model), random_moment(site)
    for form in forms:
        packed, decoded = pack(site, form, value, moment)
        proto = rewritten(model, [(site, form, packed)])
        onnx.checker.check_model(proto)
        decoded_proto = with_weights(model.proto, {site.anchor: site.stored(decoded)})
        reference = run(model, decoded_proto, test.feed, optimize=False)
        for optimize in (False, True):
            outputs = run(model, proto, test.feed, optimize=optimize)
            try:
                if form.storage == "float":
                    test.check(outputs)
                check_close(outputs, reference)
            except AssertionError as error:
                raise AssertionError(f"{test.name}, {site.name}, {form}, optimize={optimize}: {error}") from error
        tally.count(form)


def turn(tally: Tally) -> tuple[str, ...]:
    """The storages whose turn it is."""
    first = PER_SITE * tally.turns
    tally.turns += 1
    return tuple(OTHERS[number % len(OTHERS)] for number in range(first, first + PER_SITE))


def check_arithmetics(test: BackendTest, model: Model, site: Site, tally: Tally) -> None:
    """Let the operator of one site compute in every arithmetic that takes it, and compare with the same weight in floats.

    The weight is exact in either: it is int8 (or 8-bit blocks) from the start. What is looked up is exact, too. Where it is multiplied
    with, activations are rounded: an output differs by at most a step of the input times the largest sum of a row of magnitudes of
    weights, the bias counted as one more weight, and by a step of its own where it is bytes. A step, not half of one: zero points are
    rounded too, which moves the ends of the range by half a step.
    """
    value, moment = site.value(model), random_moment(site)
    for name, storage in WHOLE_BYTES.items():
        form = Form("dense", (), storage, "dense", name)
        reason = declines(site, form) or (None if site.op_type == "Gather" else _surroundings(model, site))
        if reason:
            tally.skip("arithmetic", reason)
            continue
        packed, decoded = pack(site, form, value, moment)
        floats = with_weights(model.proto, {site.anchor: site.stored(decoded)})
        reference = run(model, floats, test.feed, optimize=False)
        ranges, limit = _allowed(test, site, name, decoded, reference)
        part = fragment(site, form, packed, model.proto, frozenset(all_names(model.proto)), INTEGERS["full"])
        proto = assemble(
            model, {site.name: part}, [site], [], lambda _, __, values, known=ranges: {each: known[each] for each in values}
        ).proto
        onnx.checker.check_model(proto)
        for optimize in (False, True):
            try:
                check_close(run(model, proto, test.feed, optimize=optimize), reference, beyond=limit)
            except AssertionError as error:
                raise AssertionError(f"{test.name}, {site.name}, {form}, optimize={optimize}: {error}") from error
        tally.count(form)


def _allowed(test: BackendTest, site: Site, arithmetic: str, decoded: Array, reference: Sequence[Array]) -> tuple[dict[str, Range], float]:
    """Ranges of the activations around a site's operator, and how far its output may be off for their being rounded."""
    if site.op_type == "Gather":
        return {}, 0.0
    (wanted,) = reference
    activation, _ = FAMILIES[site.use.key].activation(site.use)
    output = site.use.node.output[0]
    ranges = {name: Range.spanning(float(a.min()), float(a.max())) for name, a in ((activation, test.feed[activation]), (output, wanted))}
    magnitudes = float(np.abs(decoded).sum(2).max() + np.abs(decoded).max())
    own = float(ranges[output].scale) if arithmetic == "integer" else 0.0
    return ranges, float(ranges[activation].scale) * magnitudes + own


def _surroundings(model: Model, site: Site) -> str | None:
    """None where a site's operator is the whole model: its input is fed, its output is the only one; else what there is besides."""
    activation, _ = FAMILIES[site.use.key].activation(site.use)
    if len(site.uses) != 1 or [site.use.node.output[0]] != [value.name for value in model.proto.graph.output]:
        return "more of the model follows"
    return None if activation in {value.name for value in model.proto.graph.input} else "more of the model comes before"


def check_close(outputs: Sequence[Array], reference: Sequence[Array], units: int = ROUNDING, beyond: float = 0.0) -> None:
    """Equal up to `units` units of rounding at the scale of the largest entry of each output, and `beyond` that."""
    for output, wanted in zip(outputs, reference, strict=True):
        assert (output.shape, output.dtype) == (wanted.shape, wanted.dtype)
        if wanted.size and np.issubdtype(wanted.dtype, np.floating):
            difference = np.abs(output.astype(np.float64) - wanted.astype(np.float64)).max()
            limit = units * np.finfo(wanted.dtype).eps * np.abs(wanted.astype(np.float64)).max() + beyond
            assert difference <= limit, f"outputs differ by {difference:.3g}, allowed are {limit:.3g}"
        else:
            np.testing.assert_array_equal(output, wanted)


__all__ = [
    "ALWAYS",
    "OPERATORS",
    "OTHERS",
    "BackendTest",
    "Tally",
    "backend_tests",
    "check_arithmetics",
    "check_close",
    "check_site",
    "frozen",
    "full_rank_forms",
    "modern",
    "read_tensor",
    "rewritten",
    "run",
    "turn",
    "with_weights",
]
