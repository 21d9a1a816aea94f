"""PyTorch's half of `throughput.py`: python benchmarks/torch_student.py FOLDER --threads N

FOLDER holds a student as `throughput.py` writes it: `student.onnx`, whose last inputs are its parameters; `student.json`, which says what
each parameter is rounded to and what each output holds; and `arrays.npz` with values, feeds and the teacher's answers. Commands come as
lines on stdin, and each is answered by a line on stdout: "check" writes loss and gradients to `torch.npz`, "step" makes one step and
answers its seconds.

A step does what one of ours does, in PyTorch's way: parameters are rounded (straight through) to what can be written, the graph is run
by the interpreter of `torch_nodes.py`, and PyTorch's fused Adam moves the parameters. Left out, which favours PyTorch: collecting the
batch, keeping codes of variable width within their bytes, clipping gradients.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper
from torch_nodes import Tensor, UnknownOperator, functional, run_node, torch

_TINY = 1e-12
"""Probabilities and sums of squares below this are taken as this."""

_RATE = 1e-5
"""So low that the model hardly changes while it is timed: a step costs the same at any rate."""


@dataclass(frozen=True)
class Parameter:
    """An input of the student, its values as they are before rounding.

    Attributes:
        values: what Adam moves.
        project: from these values to what the graph computes with.
        straight: whether gradients pass through it as if it were not there; otherwise PyTorch differentiates it.
    """

    values: Tensor
    project: Callable[[Tensor], Tensor]
    straight: bool

    def projected(self) -> tuple[Tensor, Tensor]:
        """What the graph computes with, and the tensor whose gradient is that of the values."""
        if not self.straight:
            return self.project(self.values), self.values
        with torch.no_grad():
            rounded = self.project(self.values)
        rounded = rounded.detach().requires_grad_()
        return rounded, rounded


class Learner:
    """A student in training."""

    def __init__(self, folder: Path) -> None:
        """Read it.

        Args:
            folder: holds it.
        """
        proto, described = onnx.load(folder / "student.onnx"), json.loads((folder / "student.json").read_text())
        with np.load(folder / "arrays.npz") as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
        self.parameters = {each["name"]: parameter(each, arrays) for each in described["parameters"]}
        self.kinds: dict[str, str] = described["kinds"]
        self.lessons: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = [
            ({name: arrays[key] for name, key in each["feed"].items()}, {name: arrays[key] for name, key in each["answers"].items()})
            for each in described["lessons"]
        ]
        self.constants, self.nodes = folded(proto)
        values = [each.values for each in self.parameters.values()]
        self.adam = torch.optim.Adam(values, lr=_RATE, betas=(described["momentum"], described["memory"]), fused=True)

    def loss(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The mean over the lessons of the loss of one step."""
        return sum(self._lesson_loss(parameters, feed, answers) for feed, answers in self.lessons) / len(self.lessons)

    def _lesson_loss(self, parameters: Mapping[str, Tensor], feed: Mapping[str, Tensor], answers: Mapping[str, Tensor]) -> Tensor:
        values = {**self.constants, **parameters, **feed}
        for node in self.nodes:
            values[node.output[0]] = run_node(node, [values[name] if name else None for name in node.input])
        losses = [divergence(values[name], answer, self.kinds[name]) for name, answer in answers.items()]
        return sum(losses) / len(losses)

    def learn(self) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The loss, and its gradient with respect to the values of each parameter; None where there is none."""
        pairs = {name: each.projected() for name, each in self.parameters.items()}
        loss = self.loss({name: rounded for name, (rounded, _) in pairs.items()})
        return loss, torch.autograd.grad(loss, [leaf for _, leaf in pairs.values()], allow_unused=True)

    def step(self) -> None:
        """Learn, and move the parameters."""
        _, gradients = self.learn()
        for each, gradient in zip(self.parameters.values(), gradients, strict=True):
            each.values.grad = gradient
        self.adam.step()

    def check(self, path: Path) -> None:
        """Write the loss and all gradients, flat and one behind the other."""
        loss, found = self.learn()
        parts = [
            torch.zeros(each.values.numel()) if gradient is None else gradient.reshape(-1)
            for each, gradient in zip(self.parameters.values(), found, strict=True)
        ]
        np.savez(path, loss=loss.detach().numpy(), gradient=torch.cat(parts).numpy())


def folded(proto: ModelProto) -> tuple[dict[str, Tensor], list[NodeProto]]:
    """What the graph computes of constants alone, and the nodes that are left."""
    constants = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in proto.graph.initializer}
    nodes = []
    for node in proto.graph.node:
        if all(name in constants for name in node.input if name):
            constants[node.output[0]] = run_node(node, [constants[name] if name else None for name in node.input])
        else:
            nodes.append(node)
    return constants, nodes


def divergence(scores: Tensor, answer: Tensor, kind: str) -> Tensor:
    """Mean KL from the teacher's probabilities in nats, or the relative mean square error of values."""
    if kind == "values":
        return (scores - answer).square().sum() / answer.square().sum().clamp_min(_TINY)
    axis = 1 if scores.dim() > 3 else scores.dim() - 1
    ours, teacher = (_logs(each, kind, axis) for each in (scores, answer))
    return functional.kl_div(ours, teacher, reduction="none", log_target=True).sum(axis).mean()


def _logs(scores: Tensor, kind: str, axis: int) -> Tensor:
    if kind == "probabilities":
        return scores.clamp_min(_TINY).log()
    return scores if kind == "log-probabilities" else functional.log_softmax(scores, axis)


# --- what parameters are rounded to


def parameter(described: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> Parameter:
    """A parameter as `throughput.py` describes it."""
    parts = {part: arrays[key] for part, key in described["arrays"].items()}
    project = _PROJECTIONS[described["kind"]](described, parts)
    axis = described["rounded_axis"]
    final = project if axis is None else lambda values: _passed(project(values), lambda each: _to_int8(each, axis))
    return Parameter(parts["values"].requires_grad_(), final, described["kind"] != "table")


def _passed(values: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """Rounded, with the gradient of what is not."""
    return values + (rounding(values) - values).detach() if torch.is_grad_enabled() else rounding(values)


def _plain(described: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Floats, perhaps of half precision."""
    dtype = getattr(torch, described["dtype"])
    return lambda values: values.to(dtype).float()


def _grid(described: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Uniform levels: PyTorch's own kernel where one scale is for a whole slice, or for everything."""
    scale, zero, values = parts["scale"], parts["zero"], parts["values"]
    low, high = described["lowest"], described["highest"]
    axes = [axis for axis in range(scale.dim()) if scale.shape[axis] > 1]
    if len(axes) > 1 or (axes and scale.shape[axes[0]] != values.shape[axes[0]]):
        return lambda values: ((values / scale).round_() + zero).clamp_(low, high).sub_(zero).mul_(scale)
    axis = axes[0] if axes else 0
    length = values.shape[axis]
    steps = scale.reshape(-1).expand(length).contiguous()
    points = zero.reshape(-1).expand(length).to(torch.int32).contiguous()
    return lambda values: torch.fake_quantize_per_channel_affine(values, steps, points, axis, low, high)


def _levels(described: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """The nearest level of a codebook."""
    levels, scale = parts["levels"], parts["scale"]
    between = (levels[1:] + levels[:-1]) / 2
    return lambda values: levels[torch.bucketize(values / scale, between)] * scale


def _table(described: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Entries of a table of half precision."""
    places, scale = parts["places"], parts["scale"]
    return lambda values: _passed(values, lambda each: each.half().float())[places] * scale


def _to_int8(values: Tensor, axis: int) -> Tensor:
    """Rounded to int8 with a scale for each entry of an axis."""
    largest = values.abs().amax([other for other in range(values.dim()) if other != axis], keepdim=True)
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    return (values / scale).round_() * scale


_PROJECTIONS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Tensor]], Callable[[Tensor], Tensor]]] = {
    "plain": _plain,
    "grid": _grid,
    "levels": _levels,
    "table": _table,
}


def main() -> None:
    """Obey commands until there are none."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        learner = Learner(options.folder)
        print(f"PyTorch {torch.__version__}", flush=True)
        for line in sys.stdin:
            if line.strip() == "check":
                learner.check(options.folder / "torch.npz")
                print("checked", flush=True)
            else:
                start = time.perf_counter()
                learner.step()
                print(time.perf_counter() - start, flush=True)
    except UnknownOperator as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
