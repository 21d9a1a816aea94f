"""Time a training step against the forward pass: python benchmarks/differentiate.py MODEL [--batch 64] [--threads 1] [--torch]

The step computes the mean cross-entropy of the first output against random labels and its gradients with respect to all float initializers
with two axes or more, and to the biases of the layers that these belong to. Inputs are random. Printed are the seconds of the forward pass
and of the step (medians of runs that take turns), their ratio, and the peak resident memory of a fresh process that runs the step.

With --torch the same step in PyTorch takes turns with them: the graph is run by the interpreter in `torch_nodes.py`, which knows
what convolutional classifiers are made of.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from intaglio.passes.differentiate import differentiate
from intaglio.passes.loss import with_cross_entropy
from intaglio.passes.session import open_session, to_value

Array = np.ndarray
Step = Callable[[], object]


def trained(proto: ModelProto) -> list[str]:
    """Names of the weights and of the biases beside them."""
    axes = {tensor.name: len(tensor.dims) for tensor in proto.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    weights = {name for name, count in axes.items() if count >= 2}
    beside = {name for node in proto.graph.node if weights & set(node.input) for name in node.input if axes.get(name) == 1}
    return [name for name in axes if name in weights | beside]


def feed(proto: ModelProto, batch: int) -> dict[str, Array]:
    """A random batch for the first input: standard normal, or small whole numbers."""
    names = {tensor.name for tensor in proto.graph.initializer}
    entry = next(value for value in proto.graph.input if value.name not in names)
    tensor = entry.type.tensor_type
    shape = [batch if axis == 0 else dim.dim_value or 1 for axis, dim in enumerate(tensor.shape.dim)]
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    rng = np.random.default_rng(0)
    floats = np.issubdtype(dtype, np.floating)
    return {entry.name: (rng.standard_normal(shape) if floats else rng.integers(0, 10, shape)).astype(dtype)}


def step_model(proto: ModelProto, inputs: Mapping[str, Array]) -> tuple[ModelProto, list[str], dict[str, Array]]:
    """The model with loss and gradients; what to fetch; what to feed besides the inputs."""
    output = proto.graph.output[0].name
    shape = open_session(proto).run([output], {name: to_value(array) for name, array in inputs.items()})[0].shape()
    labels = np.random.default_rng(1).integers(0, shape[-1], shape[:-1])
    lost = with_cross_entropy(proto, output)
    wanted = trained(proto)
    found = differentiate(lost.proto, [lost.loss], wanted, shapes={name: array.shape for name, array in inputs.items()})
    for stop in found.stops:
        print(stop)
    one = np.ones((), np.float32)
    return found.proto, [lost.loss, *found.gradients.values()], {"labels": labels, found.cotangents[lost.loss]: one}


def runner(proto: ModelProto, fetches: Sequence[str], inputs: Mapping[str, Array], threads: int) -> Step:
    """A function that runs a model on what is given and fetches only what is named."""
    model = ModelProto()
    model.CopyFrom(proto)
    kept = [value for value in model.graph.output if value.name in fetches]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    session = open_session(model, threads=threads)
    values = {name: to_value(array) for name, array in inputs.items()}
    return lambda: session.run(list(fetches), values)


def medians(steps: Mapping[str, Step], runs: int) -> dict[str, float]:
    """Seconds of each step; they take turns, so that a machine that slows down slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(runs):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


# --- PyTorch


def torch_steps(proto: ModelProto, inputs: Mapping[str, Array], labels: Array, threads: int) -> dict[str, Step]:
    """Forward pass and training step of the graph in PyTorch."""
    import torch
    from torch_nodes import UnknownOperator, run_node

    torch.set_num_threads(threads)
    wanted = set(trained(proto))
    weights = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()).requires_grad_(tensor.name in wanted)
        for tensor in proto.graph.initializer
    }
    data = {name: torch.from_numpy(array) for name, array in inputs.items()}
    targets, leaves = torch.from_numpy(labels), [weights[name] for name in wanted]

    def logits() -> Any:
        values = {**weights, **data}
        for node in proto.graph.node:
            try:
                values[node.output[0]] = run_node(node, [values.get(name) for name in node.input])
            except UnknownOperator as error:
                raise SystemExit(f"{error}; leave --torch out") from error
        return values[proto.graph.output[0].name]

    def forward() -> None:
        with torch.inference_mode():
            logits()

    def step() -> None:
        torch.autograd.grad(torch.nn.functional.cross_entropy(logits(), targets), leaves)

    return {"PyTorch forward": forward, "PyTorch step": step}


# --- the command


def peak_bytes(model: ModelProto, fetches: Sequence[str], inputs: Mapping[str, Array], threads: int) -> int:
    """Peak resident memory of a fresh process that runs a model twice."""
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, Path(folder, "step.onnx"))
        np.savez(Path(folder, "feed.npz"), **inputs)
        command = [sys.executable, __file__, folder, "--child", *fetches, "--threads", str(threads)]
        return int(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.split()[-1])


def child(folder: Path, fetches: Sequence[str], threads: int) -> None:
    """Run the step twice and print the peak resident memory in bytes."""
    with np.load(folder / "feed.npz") as file:
        step = runner(onnx.load(folder / "step.onnx"), fetches, dict(file), threads)
    step()
    step()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(line.split()[1]) * 1024)


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--torch", action="store_true", help="compare with PyTorch, which must be installed")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.model, options.child, options.threads)
        return
    proto = onnx.load(options.model)
    inputs = feed(proto, options.batch)
    model, fetches, more = step_model(proto, inputs)
    steps = {
        "forward": runner(proto, [proto.graph.output[0].name], inputs, options.threads),
        "step": runner(model, fetches, {**inputs, **more}, options.threads),
    }
    if options.torch:
        steps |= torch_steps(proto, inputs, more["labels"], options.threads)
    seconds = medians(steps, options.runs)
    for name, value in seconds.items():
        print(f"{name:16} {value:.4f} s")
    print(f"step / forward   {seconds['step'] / seconds['forward']:.2f}")
    if options.torch:
        print(f"in PyTorch       {seconds['PyTorch step'] / seconds['PyTorch forward']:.2f}")
        print(f"step / PyTorch's {seconds['step'] / seconds['PyTorch step']:.2f}")
    print(f"peak memory      {peak_bytes(model, fetches, {**inputs, **more}, options.threads) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
