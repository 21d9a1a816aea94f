"""A loss and its gradient: one model whose parameters are inputs, differentiated, run on batches of samples.

It serves for a whole student and for a block of it alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper

from .bases import Block
from .differentiate import differentiate
from .loss import Term, with_loss
from .options import Runtime
from .session import Value, open_session, to_array, to_value
from .student import Parameter
from .weights import WeightStore

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Slope:
    """A model that computes a loss and its gradients.

    Attributes:
        proto: the model.
        loss: name of the output that holds the loss.
        gradients: parameter name → name of the output that holds its gradient. Parameters that the loss does not depend on are absent.
        cotangent: name of the input that takes a one.
        answers: name of each input that the loss takes → its type and rank.
        stops: in words, where gradients end for want of a rule.
    """

    proto: ModelProto
    loss: str
    gradients: Mapping[str, str]
    cotangent: str
    answers: Mapping[str, tuple[np.dtype[Any], int]]
    stops: tuple[str, ...]


def slope_of(
    proto: ModelProto, terms: Sequence[Term], parameters: Sequence[str], weights: WeightStore, *, recompute: bool = False
) -> Slope:
    """Differentiate a loss.

    Args:
        proto: the model.
        terms: of the loss.
        parameters: names of the inputs to differentiate with respect to.
        weights: reads its tensors.
        recompute: whether to compute activations twice rather than keep them.

    Raises:
        InputError: the model or a term cannot be differentiated at all.
    """
    built = with_loss(proto, terms, name="tune.loss", weights=weights)
    found = differentiate(built.proto, [built.loss], parameters, weights=weights, recompute=recompute)
    declared = {value.name: value.type.tensor_type for value in found.proto.graph.input}
    return Slope(
        found.proto,
        built.loss,
        found.gradients,
        found.cotangents[built.loss],
        {name: (_dtype(declared[name].elem_type), len(declared[name].shape.dim)) for name in built.inputs},
        tuple(map(str, found.stops)),
    )


class Learner:
    """Computes a loss and its gradient on batches.

    Attributes:
        slope: what it runs.
        parameters: by input name; their parts lie in `flat`.
        trained: names of those that have a gradient.
        flat: (n,) values of all parameters. Changed by whoever optimizes them.
        gradient: (n,), written by `learn`.
        values: parameter name → what the model computes with, after `project`.
    """

    def __init__(self, slope: Slope, parameters: Mapping[str, Parameter], flat: Float32, runtime: Runtime, weights: WeightStore) -> None:
        """Load the model.

        Raises:
            InputError: ONNX Runtime cannot load it.
        """
        self.slope, self.parameters, self.flat = slope, parameters, flat
        self.trained = tuple(name for name in parameters if name in slope.gradients)
        self.gradient = np.zeros_like(flat)
        self._fed = {name: np.zeros(each.latent.shape, np.float32) for name, each in parameters.items()}
        self.values: dict[str, Value] = {name: to_value(array) for name, array in self._fed.items()}
        one = np.ones((), helper.tensor_dtype_to_np_dtype(_type_of(slope.proto, slope.cotangent)))
        self._one = {slope.cotangent: to_value(one)}
        self._fetches = [slope.loss, *(slope.gradients[name] for name in self.trained)]
        self._session = open_session(slope.proto, weights=weights, threads=runtime.threads, providers=runtime.providers)

    def project(self) -> None:
        """Bring the parameters to what the model computes with."""
        for name, parameter in self.parameters.items():
            parameter.project(self.flat, self._fed[name])

    def learn(self, feeds: Sequence[Mapping[str, NDArray[Any]]]) -> float:
        """The mean loss over feeds at the projected parameters; `gradient` holds its gradient.

        Args:
            feeds: at least one: the model's inputs, and what the loss takes.
        """
        self.project()
        self.gradient.fill(0)
        total = 0.0
        for number, feed in enumerate(feeds):
            fed = {name: to_value(self._typed(name, array)) for name, array in feed.items()}
            loss, *gradients = self._session.run(self._fetches, self.values | self._one | fed)
            total += float(to_array(loss))
            self._collect(gradients, first=number == 0)
        if len(feeds) > 1:
            self.gradient /= np.float32(len(feeds))
        return total / len(feeds)

    def _typed(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(array, self.slope.answers[name][0]) if name in self.slope.answers else array

    def _collect(self, gradients: Sequence[Value], first: bool) -> None:
        for name, gradient in zip(self.trained, gradients, strict=True):
            parameter = self.parameters[name]
            part, values, array = self.gradient[parameter.part], self.flat[parameter.part], self._fed[name]
            if first:
                parameter.latent.pull(values, array, to_array(gradient), part)
            else:
                more = np.empty_like(part)
                parameter.latent.pull(values, array, to_array(gradient), more)
                part += more


def units_of(parameters: Mapping[str, Parameter], count: int) -> Float32:
    """(count,): what counts as a large change of each entry of a flat array.

    Args:
        parameters: whose parts it holds.
        count: its length.
    """
    units = np.ones(count, np.float32)
    for parameter in parameters.values():
        units[parameter.part] = parameter.latent.unit()
    return units


def blocks_of(parameters: Mapping[str, Parameter]) -> list[Block]:
    """The arrays in a flat array of parameters whose gradients may be averaged in another basis."""
    return [
        Block(slice(each.part.start, each.part.start + math.prod(each.latent.block)), each.latent.block)
        for each in parameters.values()
        if each.latent.block
    ]


def compact(parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """The parameters with parts in a flat array of their own, side by side."""
    found, end = {}, 0
    for name, parameter in parameters.items():
        start, end = end, end + len(parameter.start)
        found[name] = replace(parameter, part=slice(start, end))
    return found


def _type_of(proto: ModelProto, name: str) -> int:
    return next(int(value.type.tensor_type.elem_type) for value in proto.graph.input if value.name == name)


def _dtype(elem_type: int) -> np.dtype[Any]:
    return np.dtype(helper.tensor_dtype_to_np_dtype(elem_type))
