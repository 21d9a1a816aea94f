"""Reverse rules against central differences in float64, under onnx's reference evaluator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from intaglio.passes.differentiate import Differentiated, differentiate
from intaglio.passes.session import open_session

Array = np.ndarray

STEP = 1e-5
TOLERANCE = 1e-6
"""Central differences in float64 err by step² (1e-10 times a third derivative) and by rounding over step (1e-11)."""


def model_of(
    nodes: Sequence[onnx.NodeProto] | str,
    inputs: Mapping[str, Array],
    outputs: Sequence[str],
    *,
    opset: int = 18,
    known: Sequence[str] = (),
) -> onnx.ModelProto:
    """A model of nodes (or of one node in ONNX text) that reads arrays as inputs, those in `known` as initializers.

    Outputs are declared without shapes and types; `differentiate` infers them.
    """
    if isinstance(nodes, str):
        nodes = [onnx.parser.parse_node(nodes)]
    domains = sorted({node.domain for node in nodes if node.domain})
    graph = helper.make_graph(
        list(nodes),
        "checked",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in inputs.items()
            if name not in known
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(inputs[name], name) for name in known],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def gradient_error(
    nodes: Sequence[onnx.NodeProto] | str,
    inputs: Mapping[str, Array],
    wrt: Sequence[str],
    outputs: Sequence[str] = ("y",),
    *,
    opset: int = 18,
    known: Sequence[str] = (),
    seed: int = 0,
    step: float = STEP,
    open_shapes: bool = False,
) -> float:
    """The largest relative error of the gradients of Σ⟨c, output⟩ for random c, against central differences.

    Args:
        nodes: the operators.
        inputs: float64 arrays for what is differentiated, other types for the rest.
        wrt: inputs to differentiate with respect to, entry by entry.
        outputs: outputs that the loss reads.
        opset: of the default domain.
        known: inputs that are initializers, so that rules see their elements.
        seed: of c.
        step: of the differences.
        open_shapes: whether the lengths of the inputs are hidden from the rules.

    Returns:
        max over wrt of max|analytic − numeric| / max(1, max|numeric|).
    """
    proto = model_of(nodes, inputs, outputs, opset=opset, known=known)
    if open_shapes:
        hide_shapes(proto)
    found = _without_stops(proto, outputs, wrt)
    forward = ReferenceEvaluator(proto)
    feed = {name: array for name, array in inputs.items() if name not in known}
    rng = np.random.default_rng(seed)
    values = forward.run(list(outputs), feed)
    cotangents = {name: rng.standard_normal(np.shape(value)) for name, value in zip(outputs, values, strict=True)}

    def loss(changed: Mapping[str, Array]) -> float:
        results = forward.run(list(outputs), {**feed, **changed})
        return float(sum(np.sum(cotangents[name] * value) for name, value in zip(outputs, results, strict=True)))

    analytic = run_gradients(found, feed, cotangents)
    worst = 0.0
    for name in wrt:
        numeric = np.zeros_like(inputs[name])
        for index in np.ndindex(*numeric.shape):
            up, down = inputs[name].copy(), inputs[name].copy()
            up[index] += step
            down[index] -= step
            numeric[index] = (loss({name: up}) - loss({name: down})) / (2 * step)
        gradient = analytic.get(name, np.zeros_like(numeric))
        assert gradient.shape == numeric.shape, (gradient.shape, numeric.shape)
        assert gradient.dtype == numeric.dtype
        worst = max(worst, float(np.max(np.abs(gradient - numeric), initial=0.0)) / max(1.0, float(np.max(np.abs(numeric), initial=0.0))))
    return worst


def _without_stops(proto: onnx.ModelProto, outputs: Sequence[str], wrt: Sequence[str]) -> Differentiated:
    found = differentiate(proto, outputs, wrt)
    assert not found.stops, [str(stop) for stop in found.stops]
    return found


def run_gradients(found: Differentiated, feed: Mapping[str, Array], cotangents: Mapping[str, Array]) -> dict[str, Array]:
    """Gradients under the reference evaluator, by value name."""
    fed = {**feed, **{found.cotangents[name]: array for name, array in cotangents.items()}}
    names = list(found.gradients)
    return dict(zip(names, ReferenceEvaluator(found.proto).run([found.gradients[name] for name in names], fed), strict=True))


RUNTIME_TOLERANCE = 1e-4
"""Float32 against float64: a few dozen roundings of 6e-8 each, in sums whose terms cancel by at most two digits."""


def runtime_error(
    nodes: Sequence[onnx.NodeProto] | str,
    inputs: Mapping[str, Array],
    wrt: Sequence[str],
    outputs: Sequence[str] = ("y",),
    *,
    opset: int = 18,
    known: Sequence[str] = (),
    seed: int = 0,
    open_shapes: bool = False,
) -> float:
    """The largest relative error of gradients in float32 under ONNX Runtime against those in float64 under the reference evaluator.

    Args: as for `gradient_error`.
    """
    single = {name: array.astype(np.float32) if array.dtype == np.float64 else array for name, array in inputs.items()}
    exact = {name: array.astype(np.float64) if array.dtype == np.float32 else array for name, array in single.items()}
    results = []
    rng = np.random.default_rng(seed)
    cotangents: dict[str, Array] = {}
    for arrays in (exact, single):
        proto = model_of(nodes, arrays, outputs, opset=opset, known=known)
        if open_shapes:
            hide_shapes(proto)
        feed = {name: array for name, array in arrays.items() if name not in known}
        found = _without_stops(proto, outputs, wrt)
        if not cotangents:
            values = ReferenceEvaluator(proto).run(list(outputs), feed)
            cotangents = {name: rng.standard_normal(np.shape(value)) for name, value in zip(outputs, values, strict=True)}
            results.append(run_gradients(found, feed, cotangents))
        else:
            results.append(run_in_runtime(found, feed, {name: array.astype(np.float32) for name, array in cotangents.items()}))
    assert results[0].keys() == results[1].keys()
    return max((relative_error(results[1][name], results[0][name]) for name in results[0]), default=0.0)


def run_in_runtime(found: Differentiated, feed: Mapping[str, Array], cotangents: Mapping[str, Array]) -> dict[str, Array]:
    """Gradients under ONNX Runtime, by value name."""
    names = list(found.gradients)
    fed = {**feed, **{found.cotangents[name]: array for name, array in cotangents.items()}}
    return dict(zip(names, open_session(found.proto).run([found.gradients[name] for name in names], fed), strict=True))


def relative_error(found: Array, expected: Array) -> float:
    """max|found − expected| / max(1, max|expected|)."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(np.max(np.abs(found - expected), initial=0.0)) / max(1.0, float(np.max(np.abs(expected), initial=0.0)))


def model_error(
    proto: onnx.ModelProto,
    inputs: Mapping[str, Array],
    wrt: Sequence[str],
    outputs: Sequence[str] = ("y",),
    *,
    step: float = STEP,
    prepare: Callable[[onnx.ModelProto], onnx.ModelProto] | None = None,
) -> float:
    """`gradient_error` of a model that is there already, for types that must be declared.

    Args:
        prepare: rewrites the model with gradients into what the reference evaluator can run.
    """
    found = differentiate(proto, outputs, wrt)
    assert not found.stops, [str(stop) for stop in found.stops]
    if prepare is not None:
        found = replace(found, proto=prepare(found.proto))
    forward, rng = ReferenceEvaluator(proto), np.random.default_rng(0)
    values = forward.run(list(outputs), dict(inputs))
    cotangents = {name: rng.standard_normal(np.shape(value)) for name, value in zip(outputs, values, strict=True)}

    def loss(name: str, array: Array) -> float:
        results = forward.run(list(outputs), {**inputs, name: array})
        return float(sum(np.sum(cotangents[output] * value) for output, value in zip(outputs, results, strict=True)))

    analytic = run_gradients(found, inputs, cotangents)
    return max(relative_error(analytic[name], differences(partial(loss, name), inputs[name], step)) for name in wrt)


def differences(function: Callable[[Array], float], at: Array, step: float = STEP) -> Array:
    """Central differences of a scalar function with respect to each entry."""
    gradient = np.zeros_like(at)
    for index in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


def hide_shapes(proto: onnx.ModelProto) -> None:
    """Hide the lengths of a model's inputs."""
    for value in proto.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            dim.dim_param = f"{value.name}{axis}"


def check_everywhere(
    nodes: Sequence[onnx.NodeProto] | str,
    inputs: Mapping[str, Array],
    wrt: Sequence[str],
    outputs: Sequence[str] = ("y",),
    *,
    opset: int = 18,
    known: Sequence[str] = (),
) -> None:
    """Assert that gradients are right under the reference evaluator and under ONNX Runtime, with known and with open lengths.

    Args: as for `gradient_error`.
    """
    for open_shapes in (False, True):
        assert gradient_error(nodes, inputs, wrt, outputs, opset=opset, known=known, open_shapes=open_shapes) < TOLERANCE
        assert runtime_error(nodes, inputs, wrt, outputs, opset=opset, known=known, open_shapes=open_shapes) < RUNTIME_TOLERANCE
