"""Adam over one flat array: Kingma and Ba, "Adam: a method for stochastic optimization" (2015), with the decay of AdamW (Loshchilov and
Hutter, "Decoupled weight decay regularization", 2019).

Arrays may have bases of their own (`passes.bases`), in which their gradients are averaged.

Entries have *units*: a step of rate r moves an entry by about r units whatever the size of its gradient. With units proportional to each
array's size, factors of one product move alike however the product is balanced between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .bases import Bases

Float32 = NDArray[np.float32]

_FIRST_RENEWALS = (1, 4, 7)
"""Steps after which bases are renewed before the first regular time: moments of few gradients change a lot.

Not after the second: mean squares cannot be taken into another basis, and those in the first, which a single gradient made diagonal, would
be next to nothing in the next.
"""

_FARTHEST = 3.0
"""Units that an entry in a basis moves by at rate 1, at most; without one, and with the averages that are the default, it is 2.4."""


@dataclass(frozen=True)
class AdamOptions:
    """How Adam averages.

    Attributes:
        momentum: share of the mean gradient that a step keeps.
        memory: share of the mean squared gradient that a step keeps.
        epsilon: added to the root mean squared gradient, in which entries are measured in units.
        decay: share of an entry that a step of rate 1 takes away.
        clip: gradients longer than this many times their recent mean length are shortened to it.
        renewal: steps from one renewal of bases to the next; 0 for none, which is plain Adam.
        moments: share of the gradients' second moments that a step keeps.
    """

    momentum: float = 0.9
    memory: float = 0.99
    epsilon: float = 1e-8
    decay: float = 0.0
    clip: float = 3.0
    renewal: int = 10
    moments: float = 0.95


class Adam:
    """Moves an array down a stochastic gradient, in place.

    Attributes:
        values: (n,) float32; owned by the caller, changed by `step`.
        steps: how many were made.
    """

    values: Float32
    steps: int

    def __init__(self, values: Float32, units: Float32, options: AdamOptions = AdamOptions(), bases: Bases | None = None) -> None:
        """Start at the given values.

        Args:
            values: (n,) float32.
            units: (n,) float32, positive: the length of one unit for each entry.
            options: how to average.
            bases: in which arrays among the values are averaged; units within such an array are equal.
        """
        self.values, self.steps = values, 0
        self._units, self._options = units, options
        self._bases = bases if bases is not None and options.renewal else Bases()
        self._mean = np.zeros_like(values)
        self._square = np.zeros_like(values)
        self._work = np.empty_like(values)
        self._length = 0.0  # recent mean length of the gradient

    def step(self, gradient: Float32, rate: float) -> float:
        """Make one step.

        Args:
            gradient: (n,) float32; overwritten.
            rate: length of the step in units.

        Returns:
            The gradient's length before it was clipped, entries measured in units. A gradient that is not finite changes nothing.
        """
        options, work = self._options, self._work
        gradient *= self._units
        length = math.sqrt(float(np.dot(gradient, gradient)))
        if not math.isfinite(length):
            return length
        self.steps += 1
        limit = options.clip * self._length
        if 0 < limit < length:
            gradient *= np.float32(limit / length)
        self._length += (min(length, limit or length) - self._length) / min(self.steps, 20)
        self._bases.observe(gradient, options.moments)
        if options.renewal and (self.steps in _FIRST_RENEWALS or self.steps % options.renewal == 0):
            self._bases.renew(self._mean)
        self._bases.turn(gradient)
        _average(self._mean, gradient, options.momentum, work)
        np.multiply(gradient, gradient, out=gradient)
        _average(self._square, gradient, options.memory, work)
        np.sqrt(self._square, out=work)
        work *= np.float32(1 / math.sqrt(1 - options.memory**self.steps))
        work += np.float32(options.epsilon)
        np.divide(self._mean, work, out=work)
        work *= np.float32(1 / (1 - options.momentum**self.steps))
        if len(self._bases):
            np.clip(work, -_FARTHEST, _FARTHEST, out=work)
            self._bases.back(work)
        work *= self._units
        work *= np.float32(rate)
        if options.decay:
            self.values *= np.float32(1 - rate * options.decay)
        self.values -= work
        return length

    def state(self) -> dict[str, NDArray[np.generic]]:
        """What `restore` needs to go on bit by bit; arrays are not copied."""
        return {
            "values": self.values,
            "mean": self._mean,
            "square": self._square,
            "steps": np.asarray(self.steps),
            "length": np.asarray(self._length),
            "moments": self._bases.moments,
            "vectors": self._bases.vectors,
        }

    def restore(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Go on from a `state`."""
        for key, array in self.state().items():
            if array.ndim:
                array[...] = state[key]
        self.steps, self._length = int(state["steps"]), float(state["length"])


def schedule(step: int, steps: int, warmup: int) -> float:
    """The rate at a step as a share of the highest: a linear rise over `warmup` steps, then half a cosine down to zero.

    Args:
        step: from 0.
        steps: of the whole run.
        warmup: fewer than `steps`.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _average(mean: Float32, value: Float32, kept: float, work: Float32) -> None:
    """mean ← kept · mean + (1 − kept) · value."""
    mean *= np.float32(kept)
    np.multiply(value, np.float32(1 - kept), out=work)
    mean += work
