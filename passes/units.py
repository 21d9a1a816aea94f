"""Operators that may run in integers, as seen by the activation values around them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from intaglio.ops.families import FAMILIES

from .coupling import Unit
from .graph import MAIN, ValueIndex
from .model import Model
from .regions import CHANNELS_LAST, Carrier, unit_output
from .sites import Site

_FLOAT_OUTPUT = ("MatMul", "Gemm")
"""Operators whose integer kernels can yield floats."""


def units_around(model: Model, sites: Iterable[Site], carriers: Iterable[Carrier]) -> dict[str, Unit]:
    """Operators as the values around them see them; a Relu that only follows an operator belongs to it."""
    index = ValueIndex(model.proto)
    units = {}
    for site in sites:
        if any(use.scope != MAIN for use in site.uses):
            continue
        inputs = tuple(dict.fromkeys(FAMILIES[use.use.key].activation(use.use)[0] for use in site.uses))
        outputs = tuple(dict.fromkeys(unit_output(index, use.use.node)[0] for use in site.uses))
        if set(inputs).isdisjoint(outputs):
            units[site.name] = Unit(inputs, outputs, site.op_type in _FLOAT_OUTPUT)
    for carrier in carriers:
        kind = carrier.node.op_type
        units[carrier.name] = Unit(carrier.inputs, (carrier.output,), kind in _FLOAT_OUTPUT, kind in CHANNELS_LAST)
    return units


def activation_values(model: Model, sites: Sequence[Site], carriers: Sequence[Carrier]) -> list[str]:
    """Every value around an operator that may run in integers."""
    units = units_around(model, sites, carriers)
    return list(dict.fromkeys(name for unit in units.values() for name in (*unit.inputs, *unit.outputs)))
