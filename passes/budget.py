"""Budgets as users write them: ratios, percentages and absolute amounts → bytes, seconds and divergence."""

from __future__ import annotations

import re
from dataclasses import dataclass

from intaglio.solver import Budget, Cost, Quantity

from .errors import InputError

_SIZES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_AMOUNT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([a-zA-Z%]*)\s*")


@dataclass(frozen=True)
class Request:
    """What the user asked for; each limit is a ratio (float ≤ 1), an absolute amount, or a text such as "25%", "4MB" or "3ms".

    Attributes:
        size: of the file.
        latency: of one run.
        error: divergence of the outputs.
        minimize: what to minimise; None for the error if a size or latency is given, else the size.
        preset: "lossless" or "compact": choose by the labelled loss, see `passes.presets`; None to choose by the divergence.
        drop: points that the metric may fall by, which stands for "compact".
    """

    size: float | str | None = None
    latency: float | str | None = None
    error: float | str | None = None
    minimize: Quantity | None = None
    preset: str | None = None
    drop: float | str | None = None


def resolve(request: Request, reference_bytes: int, base: Cost) -> Budget:
    """Absolute limits.

    Args:
        request: the user's words.
        reference_bytes: size of the original model.
        base: cost of the model with nothing changed; its latency is what ratios refer to.

    Raises:
        InputError: a budget cannot be read, is not positive, or none is given.
    """
    if request.size is None and request.latency is None and request.error is None and request.minimize is None:
        raise InputError("no budget: give at least one of --size, --latency, --error (for example --size 0.25)")
    size = None if request.size is None else _limit("--size", request.size, _SIZES, float(reference_bytes))
    latency = None if request.latency is None else _limit("--latency", request.latency, _TIMES, base.latency_s)
    error = None if request.error is None else _number("--error", str(request.error))
    minimize = request.minimize or ("error" if size is not None or latency is not None else "size")
    if minimize not in ("size", "latency", "error"):
        raise InputError(f"--minimize {minimize}: expected size, latency or error")
    return Budget(size, latency, error, minimize)


def _limit(option: str, text: float | str, units: dict[str, float] | dict[str, int], whole: float) -> float:
    match = _AMOUNT.fullmatch(str(text))
    unit = match.group(2).lower() if match else ""
    if match is None or (unit and unit != "%" and unit not in units):
        raise InputError(f"{option} {text}: expected a ratio such as 0.25, a percentage, or a number with one of {', '.join(units)}")
    amount = float(match.group(1))
    if not 0 < amount * units.get(unit, 1) < float("inf"):
        raise InputError(f"{option} {text}: expected a positive, finite amount")
    if unit in units:
        return amount * units[unit]
    ratio = amount / 100 if unit == "%" else amount
    if ratio > 1:
        raise InputError(f"{option} {text}: a ratio above 1 asks for nothing; give a ratio of at most 1, or a unit ({', '.join(units)})")
    return ratio * whole


def _number(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise InputError(f"{option} {text}: expected a positive number")
    return value
