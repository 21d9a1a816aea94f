"""What may be emitted for a target, as a table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from intaglio.ops.arithmetic import ARITHMETICS
from intaglio.ops.decompositions import DECOMPOSITIONS
from intaglio.ops.form import PRUNED, Form
from intaglio.ops.storage import STORAGES, readers

from .errors import InputError
from .propose import Allowed
from .sites import Sites, Skip


@dataclass(frozen=True)
class Target:
    """Forms that a kind of runtime can load.

    Attributes:
        name: as given to --target.
        storages: which storages its loader expands at load, or reads as they are.
        arithmetics: which arithmetics its providers compute in, besides floats.
        domains: domains of operators that it has, besides the default one and functions that a model carries.
        expands: whether its loader runs decode programs once, instead of in every inference.
    """

    name: str
    storages: tuple[str, ...]
    arithmetics: tuple[str, ...]
    domains: tuple[str, ...] = ()
    expands: bool = True

    def allowed(
        self, decompositions: Sequence[str] = (), storages: Sequence[str] = (), arithmetics: Sequence[str] = (), *, expand: bool = True
    ) -> Allowed:
        """The user's choice within the target's; without one, the decompositions (but pruning, which pays with a latency
        budget only) and arithmetics that it has, and the storages that race.

        Raises:
            InputError: a name is unknown, or the target lacks it.
        """
        names = ("dense", *dict.fromkeys(name for name, _ in DECOMPOSITIONS))
        every = (*names, PRUNED)
        known = ("float", *self.arithmetics)
        for name in decompositions:
            if name not in every:
                raise InputError(f"--decompositions {name}: unknown; expected some of {', '.join(every)}")
        for name in storages:
            if name not in self.storages:
                raise InputError(f"--storages {name}: not available for target {self.name}; expected some of {', '.join(self.storages)}")
        for name in arithmetics:
            if name not in known:
                raise InputError(f"--arithmetics {name}: not available for target {self.name}; expected some of {', '.join(known)}")
        return Allowed(
            tuple(decompositions) or names,
            tuple(storages) or tuple(name for name in RACE if name in self.storages),
            arithmetics=tuple(dict.fromkeys(("float", *arithmetics))) if arithmetics else known,
            expand=expand and self.expands,
        )

    def declines(self, form: Form) -> str | None:
        """Why a form cannot be emitted for this kind of runtime; None where it can."""
        if form.storage not in self.storages:
            return f"target {self.name} has no {form.storage}"
        if form.arithmetic not in ("float", *self.arithmetics):
            return f"target {self.name} does not compute in {form.arithmetic}"
        return None

    def select(self, sites: Sites, include: Sequence[str], exclude: Sequence[str]) -> tuple[Sites, tuple[Skip, ...]]:
        """The sites that the user's expressions leave, and the others as skips.

        Raises:
            InputError: an expression is malformed or matches nothing.
        """
        chosen = {site.name for site in sites}
        if include:
            chosen = set().union(*(_matching("--include", expression, sites) for expression in include))
        for expression in exclude:
            chosen -= _matching("--exclude", expression, sites)
        kept = tuple(site for site in sites if site.name in chosen)
        left = tuple(
            Skip(site.name, "excluded by --include/--exclude", site.op_type, site.shape, site.elements * site.dtype.itemsize)
            for site in sites
            if site.name not in chosen
        )
        return Sites(kept, sites.skipped), left


def _matching(option: str, expression: str, sites: Sites) -> set[str]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise InputError(f"{option} {expression!r}: not a regular expression ({error})") from error
    found = {site.name for site in sites if pattern.search(site.name)}
    if not found:
        some = ", ".join(site.name for site in list(sites)[:3])
        raise InputError(f"{option} {expression!r}: matches none of the {len(sites)} sites; names look like {some}")
    return found


RACE = (
    "float",
    "fp16",
    "int8",
    "int6",
    "int5",
    "int4",
    "int3",
    "int2",
    "ternary",
    "int4-rows",
    "int4-b32",
    "int3-b64",
    "planes2.0",
    "planes2.5",
    "planes3.0",
    "planes3.5",
    "planes4.0",
    "sparse50-int1",
    "kmeans4",
    "kmeans3",
    "kmeans2",
    "vq4x8",
    "nbits8-b32",
    "nbits4-b32",
    "nbits4-b128",
)
"""The storages that race by default: the others differ from one of them in a detail and cost time to price."""

_PORTABLE = tuple(name for name, storage in STORAGES.items() if readers(storage) is None)
"""Storages that standard operators decode."""

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("cpu", tuple(STORAGES), tuple(ARITHMETICS), ("com.microsoft",)),
        # ONNX Runtime's CUDA provider has MatMulNBits and GatherBlockQuantized, but no 8-bit convolutions: they would run on the processor.
        Target("cuda", tuple(STORAGES), ("nbits", "rows"), ("com.microsoft",)),
        # NNAPI, Core ML and XNNPACK take Quantize/DequantizeLinear pairs and nothing outside the standard domain.
        Target("mobile", _PORTABLE, ("integer", "rows")),
        # The browser's WebAssembly build has the processor's standard kernels; what its WebGPU provider lacks falls back to them.
        Target("web", _PORTABLE, ("integer", "dynamic", "rows")),
    )
}
"""Every target, by name."""
