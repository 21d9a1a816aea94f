"""Walk through a model once: values that are final are kept, so that what comes after them runs without what came before.

Layers that are fitted one after the other ask again and again what the layers before them yield. Whatever does not depend on a layer that
is still to be fitted is *final*. Of the final values those that the rest of the graph reads, the *frontier*, are held for all feeds, and
the model is cut there: with every step the frontier moves on, and each part of the model runs over the data once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto, helper

from .data import Dataset, Feed
from .execute import Executor
from .graph import downstream, initializer_names, live, reads
from .model import Model
from .options import Runtime

HELD_BYTES = 1 << 30
"""Most bytes of values that are held; a frontier that is wider is not moved on."""


class Frontier:
    """A model with data, of which a part may be done with.

    Attributes:
        samples: how many samples there are.
    """

    def __init__(self, model: Model, data: Dataset, indices: NDArray[Any], runtime: Runtime) -> None:
        """Start at the model's inputs.

        Args:
            model: the model.
            data: the samples.
            indices: which of them, (n,) integer.
            runtime: how to run.
        """
        self.samples = len(indices)
        self._data, self._indices, self._runtime = data, indices, runtime
        self._model = model
        self._held: dict[str, list[NDArray[Any]]] = {}
        self._pending: frozenset[str] = frozenset()

    @property
    def model(self) -> Model:
        """The rest of the model: what is held are its inputs, and what only led to it is gone."""
        return replace(self._model, proto=_cut(self._model.proto, self._held, self._pending)) if self._held else self._model

    def feeds(self) -> Iterator[Feed]:
        """The data's feeds with what is held, in the same order each time."""
        for number, (feed, _) in enumerate(self._data.feeds(self._indices, self._runtime.batch)):
            yield {**feed, **{name: arrays[number] for name, arrays in self._held.items()}}

    def move(self, model: Model, pending: Iterable[str]) -> None:
        """Go on as far as values are final; not at all where they are too many or no plain tensors.

        Args:
            model: what has become of the model. What is held must still be what it computes.
            pending: values that will change yet, or that what changes computes.
        """
        self._model = model
        rest, pending = self.model, frozenset(pending)
        names = frontier(rest.proto, pending)
        if not self.samples or names == list(self._held):
            return
        executor = Executor.of(rest, names, self._runtime)
        moved: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
        room = HELD_BYTES
        for arrays in executor.run(self.feeds()):
            for name, array in zip(names, arrays, strict=True):
                if not isinstance(array, np.ndarray) or (room := room - array.nbytes) < 0:
                    return
                moved[name].append(array)
        self._held, self._pending = moved, pending


def frontier(proto: ModelProto, pending: Iterable[str]) -> list[str]:
    """Values of the main graph that depend on its inputs and not on what is pending, and that nodes which do read, in running order."""
    constants = initializer_names(proto.graph)
    data = downstream(proto, [value.name for value in proto.graph.input if value.name not in constants])
    loose = _loose(proto, pending)
    read = set().union(*(reads(node) for node in proto.graph.node if not loose.isdisjoint(node.output)))
    made = [name for node in proto.graph.node for name in node.output]
    given = [value.name for value in proto.graph.input]
    return [name for name in (*given, *made) if name in read and name in data and name not in loose]


def _loose(proto: ModelProto, pending: Iterable[str]) -> set[str]:
    """What depends on pending values; whatever computes one of them computes its other outputs anew too."""
    names = set(pending)
    return downstream(proto, names.union(*(node.output for node in proto.graph.node if not names.isdisjoint(node.output))))


def _cut(proto: ModelProto, held: dict[str, list[NDArray[Any]]], pending: Iterable[str]) -> ModelProto:
    """The nodes that depend on pending values, and what they need besides what is held, with that as inputs."""
    cut = ModelProto()
    cut.CopyFrom(proto)
    graph = cut.graph
    declared = {value.name: value for value in proto.graph.input}
    _keep(graph.node, [node for node in graph.node if held.keys().isdisjoint(node.output)])
    positions, needed = live(graph, _loose(cut, pending))
    _keep(graph.node, [node for position, node in enumerate(graph.node) if position in positions])
    _keep(graph.value_info, [value for value in graph.value_info if value.name not in held])
    _keep(graph.input, [value for value in graph.input if value.name in needed - held.keys()])
    graph.input.extend(declared.get(name) or _declared(name, arrays) for name, arrays in held.items())
    return cut


def _keep(field: Any, members: list[Any]) -> None:
    """Leave only some members in a repeated field."""
    del field[:]
    field.extend(members)


def _declared(name: str, arrays: list[NDArray[Any]]) -> ValueInfoProto:
    """Type and shape, open where feeds differ."""
    kind = helper.np_dtype_to_tensor_dtype(arrays[0].dtype)
    if len({array.ndim for array in arrays}) > 1:
        return helper.make_tensor_value_info(name, kind, None)
    lengths = (set(axis) for axis in zip(*(array.shape for array in arrays), strict=True))
    return helper.make_tensor_value_info(name, kind, [each.pop() if len(each) == 1 else None for each in lengths])
