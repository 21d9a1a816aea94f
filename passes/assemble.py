"""Put a plan's parts together: fragments in place of weights, what pruning cuts between them, then quantized activations around what runs
in integers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .biased import DOMAIN, with_biases
from .cuts import Cut, cut_between
from .integer import place, quantized_values
from .model import Model
from .ranges import UNSIGNED, Range
from .regions import Carrier
from .rewrite import Fragment, rewrite
from .sites import Site

Ranges = Callable[[Model, Sequence[str], Sequence[str]], Mapping[str, Range]]
"""(model in floats, operators that shall run in integers, values to be quantized) → a range for each value."""


def nominal_ranges(model: Model, operators: Sequence[str], values: Sequence[str], dtype: np.dtype[Any] = UNSIGNED) -> dict[str, Range]:
    """Ranges for models that are sized or timed, not used; `dtype` is uint8 or int8.

    No two are alike: where the scales around a Concat or Add agree, its kernel moves bytes without looking at them.
    """
    return {value: Range(np.float32(0.05 + 0.001 * position), 0, dtype) for position, value in enumerate(values)}


def assemble(
    model: Model,
    fragments: Mapping[str, Fragment],
    sites: Sequence[Site],
    carried: Sequence[Carrier],
    ranges: Ranges,
    cuts: Sequence[Cut] = (),
    constants: Mapping[str, NDArray[np.float32]] | None = None,
    domains: Collection[str] = (),
) -> Model:
    """A copy of the model with the given fragments in it, and with the given operators in integers.

    Args:
        model: the model that sites and carriers were found in.
        fragments: by site name; sites without one stay.
        sites: the sites.
        carried: operators without weights that run in integers.
        ranges: of the activations that are quantized.
        cuts: the channel groups that fragments of pruned sites have cut.
        constants: new contents of initializers of the main graph, by name, in the shapes that they have once channels are cut.
        domains: of operators that may be used besides the standard ones.
    """
    rewritten = joined(model, fragments, sites, cuts, constants or {})
    operators = coupled_operators(fragments, carried)
    if not operators:
        return rewritten
    placed = place(rewritten, operators, ranges(rewritten, operators, quantized_values(rewritten, operators)))
    return with_biases(placed, operators) if DOMAIN in domains else placed


def joined(
    model: Model,
    fragments: Mapping[str, Fragment],
    sites: Sequence[Site],
    cuts: Sequence[Cut],
    constants: Mapping[str, NDArray[np.float32]],
) -> Model:
    """What `assemble` makes before activations are quantized; arguments as there."""
    rewritten = rewrite(model, fragments, sites)
    if cuts:
        rewritten = cut_between(rewritten, cuts)
    for tensor in rewritten.proto.graph.initializer if constants else ():  # `rewrite` has made a copy
        if tensor.name in constants:
            tensor.CopyFrom(model.weights.spool(tensor.name, constants[tensor.name]))
    return rewritten


def coupled_operators(fragments: Mapping[str, Fragment], carried: Sequence[Carrier]) -> list[str]:
    """First outputs of the operators that run in integers; arguments as for `assemble`."""
    return [name for fragment in fragments.values() for name in fragment.coupled] + [carrier.node.output[0] for carrier in carried]
