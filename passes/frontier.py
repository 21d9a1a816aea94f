"""Walk through a model: values that are final are kept, so that what comes after them runs without what came before.

Layers that are fitted one after the other ask again and again what the layers before them yield. Whatever does not depend on a layer that
is still to be fitted is *final*. Of the final values those that the rest of the graph reads, the *frontier*, are held for all feeds, and
the model is cut there. Where the frontier moves on with every layer, each part of the model runs over the data once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto, helper

from .data import Dataset, Feed
from .errors import InputError
from .execute import Executor
from .graph import downstream, initializer_names, live, reads
from .model import Model
from .options import Runtime

HELD_BYTES = 1 << 29
"""Most bytes of values that one frontier holds; it stays where it is if it would be wider. While it moves it holds old values too."""


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
        self._wanted: frozenset[str] = frozenset()
        self._refused: list[str] = []

    def rest(self) -> Model:
        """What computes all that is wanted from what is held, which are inputs of it; the whole model at first."""
        return replace(self._model, proto=_cut(self._model.proto, self._held, self._wanted)) if self._held else self._model

    def feeds(self) -> Iterator[Feed]:
        """The data's feeds with what is held, in the same order each time."""
        for number, (feed, _) in enumerate(self._data.feeds(self._indices, self._runtime.batch)):
            yield {**feed, **{name: arrays[number] for name, arrays in self._held.items()}}

    def move(self, model: Model, pending: Iterable[str], wanted: Iterable[str]) -> None:
        """Go on as far as values are final; not at all where they are too many or no plain tensors.

        Args:
            model: what has become of the model. What is held must still be what it computes.
            pending: values that will change yet; all outputs of a node that yields one count as well.
            wanted: values that will be asked for, besides those that depend on pending ones.
        """
        self._model = model
        rest = self.rest()
        wanted = loose(rest.proto, pending).union(wanted)
        names = frontier(rest.proto, pending, wanted)
        if not self.samples or names in (list(self._held), self._refused):
            return
        moved = self._run(rest, names)
        if moved is None:
            self._refused = names
        else:
            self._held, self._wanted = moved, frozenset(wanted)

    def _run(self, rest: Model, names: list[str]) -> dict[str, list[NDArray[Any]]] | None:
        """Values for every feed; None if they are too many, or some are no arrays."""
        moved: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
        room = HELD_BYTES
        try:
            for arrays in Executor.of(rest, names, self._runtime).run(self.feeds()):
                room -= sum(array.nbytes for array in arrays)
                if room < 0:
                    return None
                for name, array in zip(names, arrays, strict=True):
                    moved[name].append(array)
        except InputError:
            return None
        return moved


def frontier(proto: ModelProto, pending: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Values of the main graph that are final and that are wanted, or that nodes read which are not final; in running order.

    Final is what depends on the graph's inputs, but on nothing that is pending.
    """
    constants = initializer_names(proto.graph)
    data = downstream(proto, [value.name for value in proto.graph.input if value.name not in constants])
    changing = loose(proto, pending)
    needed = set(wanted).union(*(reads(node) for node in proto.graph.node if not changing.isdisjoint(node.output)))
    made = [name for node in proto.graph.node for name in node.output]
    given = [value.name for value in proto.graph.input]
    return [name for name in (*given, *made) if name in needed and name in data and name not in changing]


def loose(proto: ModelProto, pending: Iterable[str]) -> set[str]:
    """What depends on pending values; whatever computes one of them computes its other outputs anew too."""
    names = set(pending) - {""}
    return downstream(proto, names.union(*(node.output for node in proto.graph.node if not names.isdisjoint(node.output))))


def _cut(proto: ModelProto, held: dict[str, list[NDArray[Any]]], wanted: Iterable[str]) -> ModelProto:
    """The nodes that compute wanted values, with what is held as inputs."""
    cut = ModelProto()
    cut.CopyFrom(proto)
    graph = cut.graph
    declared = {value.name: value for value in proto.graph.input}
    _keep(graph.node, [node for node in graph.node if held.keys().isdisjoint(node.output)])
    positions, needed = live(graph, wanted)
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
