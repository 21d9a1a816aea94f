"""Couple neighbouring choices: what it costs to enter and to leave integers.

An operator that runs in integers needs its input quantized, unless the operator before it runs in integers too; one that stays in
floats needs its input dequantized, unless the one before it stays in floats. Each activation value between operators therefore becomes
up to three shared resources of the solver's problem (needed by some options, provided for free by others):

- ``round:v``: the pair of Quantize/DequantizeLinear on v, its bytes, and what rounding v to eight bits costs at the outputs;
- ``quantize:v``: seconds of quantizing v, needed by readers in integers, provided by a producer in integers;
- ``dequantize:v``: seconds of the way back, needed by readers in floats, provided by a producer in floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from intaglio.solver import Cost


@dataclass(frozen=True)
class Unit:
    """The operators of one group of options, as seen by the values around them.

    Attributes:
        inputs: activation values that they read.
        outputs: activation values that they yield.
        float_output: whether they yield floats even when they run in integers, as matrix products can.
        follows: whether they run in integers only behind others that do, because their kernels want the layout that those leave.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    float_output: bool = False
    follows: bool = False


@dataclass(frozen=True)
class ValuePrice:
    """What quantizing one activation value costs.

    Attributes:
        size_bytes: of the pair of nodes and its parameters.
        quantize_s: seconds of QuantizeLinear.
        dequantize_s: seconds of DequantizeLinear.
        divergence: of the model's outputs when this value alone is rounded.
    """

    size_bytes: int
    quantize_s: float
    dequantize_s: float
    divergence: float


@dataclass(frozen=True)
class Terms:
    """Resources that an option needs, those that it provides, and those that a neighbour has to provide."""

    needs: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()


@dataclass(frozen=True)
class Coupling:
    """The resources, and the terms of every group's options.

    Attributes:
        resources: cost of each.
        integer: group → terms of its options that run in integers.
        floating: group → terms of its other options.
    """

    resources: Mapping[str, Cost] = field(default_factory=dict)
    integer: Mapping[str, Terms] = field(default_factory=dict)
    floating: Mapping[str, Terms] = field(default_factory=dict)

    def terms(self, group: str, *, integer: bool) -> Terms:
        """Of an option of a group; none for a group that borders on nothing."""
        return (self.integer if integer else self.floating).get(group, Terms())


def couple(units: Mapping[str, Unit], prices: Mapping[str, ValuePrice], outside: frozenset[str]) -> Coupling:
    """Couple groups through the values between them.

    Args:
        units: by group; a group may hold several operators (a tied weight).
        prices: by value; a group with a value that has none cannot run in integers, so it must not be among the units.
        outside: values that something besides the units reads as floats, graph outputs included.
    """
    resources: dict[str, Cost] = {}
    needs: dict[tuple[str, bool], list[str]] = {}
    provides: dict[tuple[str, bool], list[str]] = {}

    def add(name: str, cost: Cost, needed: list[tuple[str, bool]], provided: list[tuple[str, bool]]) -> None:
        """A resource with the options (group, whether in integers) that need and provide it."""
        needed = [option for option in needed if option not in provided]
        if needed:
            resources[name] = cost
            for option in needed:
                needs.setdefault(option, []).append(name)
            for option in provided:
                provides.setdefault(option, []).append(name)

    for value in dict.fromkeys(name for unit in units.values() for name in (*unit.inputs, *unit.outputs)):
        price = prices[value]
        readers = [group for group, unit in units.items() if value in unit.inputs]
        producers = [group for group, unit in units.items() if value in unit.outputs]
        rounding = [group for group in producers if not units[group].float_output]
        in_integers = [(group, True) for group in readers]
        add(f"round:{value}", Cost(price.size_bytes, 0.0, price.divergence), in_integers + [(group, True) for group in rounding], [])
        add(f"quantize:{value}", Cost(0, price.quantize_s, 0.0), in_integers, [(group, True) for group in producers])
        if rounding:
            in_floats = [(group, False) for group in readers]
            leaving = [(group, True) for group in rounding] if value in outside else []
            add(f"dequantize:{value}", Cost(0, price.dequantize_s, 0.0), in_floats + leaving, [(group, False) for group in rounding])
    required = {(group, True): [f"quantize:{value}" for value in unit.inputs] for group, unit in units.items() if unit.follows}
    terms = {
        option: Terms(*(tuple(dict.fromkeys(names.get(option, ()))) for names in (needs, provides, required)))
        for option in (*needs, *provides)
    }
    return Coupling(
        resources,
        {group: each for (group, integer), each in terms.items() if integer},
        {group: each for (group, integer), each in terms.items() if not integer},
    )
