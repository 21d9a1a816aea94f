"""What the tests of `ops` share: uses from ONNX text, and running what an emitter collected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx.parser
import onnxruntime as ort
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

from intaglio.ops.emit import DOMAIN, Emitter, Spec, Target, onnx_type
from intaglio.ops.families import FAMILIES, Use
from intaglio.ops.moment import Moment
from intaglio.ops.view import MatrixView

Array = np.ndarray
Feed = Mapping[str, Array]


def emitter_for(opset: int = 18, *, functions: bool = True, stem: str = "w", taken: frozenset[str] = frozenset()) -> Emitter:
    """An emitter for a weight called w."""
    return Emitter(Target(opset, functions, stem, taken))


def node_of(text: str) -> NodeProto:
    """A node from its ONNX text."""
    node: NodeProto = onnx.parser.parse_node(text)
    return node


def use_of(text: str, shape: Sequence[int], index: int = 1) -> Use:
    """A node from its text as the use of a weight of the given shape."""
    node = node_of(text)
    family = FAMILIES[Use(node, index, MatrixView((1,), 1, 1, 1, True)).key]
    view = family.view(node, index, tuple(shape))
    assert isinstance(view, MatrixView), view
    return Use(node, index, view)


def assemble(emitter: Emitter, feed: Feed, outputs: Sequence[str]) -> ModelProto:
    """A model of everything that the emitter holds; IR 9 where it may carry functions, else IR 7."""
    inputs = [helper.make_tensor_value_info(name, onnx_type(array.dtype), array.shape) for name, array in feed.items()]
    tensors = [numpy_helper.from_array(array, name) for name, array in emitter.initializers.items() if not isinstance(array, Spec)]
    graph = helper.make_graph(emitter.nodes, "g", inputs, [ValueInfoProto(name=name) for name in outputs], tensors)
    functions = [program.function(emitter.target.opset) for program in emitter.programs.values()]
    imports = [helper.make_opsetid("", emitter.target.opset), helper.make_opsetid("com.microsoft", 1)]
    if functions:
        imports.append(helper.make_opsetid(DOMAIN, 1))
    ir_version = 9 if emitter.target.functions else 7
    return helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=ir_version)


def run_model(model: ModelProto, feed: Feed, *, optimize: bool = True, save_to: Path | None = None) -> list[Array]:
    """Outputs under ONNX Runtime; `save_to` receives the model as it was after optimization."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feed)))


def run(emitter: Emitter, feed: Feed, outputs: Sequence[str], *, optimize: bool = True) -> list[Array]:
    """Outputs of what the emitter holds."""
    return run_model(assemble(emitter, feed, outputs), feed, optimize=optimize)


def run_node(node: NodeProto, feed: Feed, constants: Feed, opset: int = 18) -> list[Array]:
    """The named outputs of one node."""
    emitter = emitter_for(opset)
    emitter.nodes.append(node)
    emitter.initializers.update(constants)
    return run(emitter, feed, [name for name in node.output if name])


def normal(seed: int, *shape: int) -> Array:
    """Seeded standard normal float32 values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def moment_of(seed: int, groups: int, n: int, rows: int | None = None) -> Moment:
    """The second moment of correlated random rows; singular where there are fewer rows than entries."""
    rng = np.random.default_rng(seed)
    rows = 2 * n + 1 if rows is None else rows
    data = rng.standard_normal((groups, rows, n)) @ (rng.standard_normal((groups, n, n)) / n**0.5 + np.eye(n))
    return Moment(data.transpose(0, 2, 1) @ data / rows, rows)


def assert_close(actual: Array, expected: Array, relative: float) -> None:
    """Same shape, and every entry within `relative` of the largest magnitude expected."""
    assert actual.shape == expected.shape
    scale = float(np.abs(np.asarray(expected, np.float64)).max(initial=1e-30))
    error = float(np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64)).max(initial=0.0))
    assert error <= relative * scale, f"off by {error / scale:.3g} of the largest entry"
