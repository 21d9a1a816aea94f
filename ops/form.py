"""A form: what a weight becomes, without any arrays."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Form:
    """decomposition × ranks × storage × execution × arithmetic.

    Attributes:
        decomposition: "unchanged", "dense" (one array), "pruned" (one array with fewer channels), or the name of a decomposition.
        ranks: the decomposition's parameters; empty for "unchanged" and "dense"; what stays of the weight's input axis and of its
            output axis for "pruned".
        storage: name of the storage of every array of the form; "float" keeps the model's own type.
        execution: "dense" (the layer runs on the expanded weight) or "contract" (activations flow through the factors).
        arithmetic: what the layer computes in: "float", or the name of an arithmetic of `ops.arithmetic`.
    """

    decomposition: str
    ranks: tuple[int, ...] = ()
    storage: str = "float"
    execution: str = "dense"
    arithmetic: str = "float"

    def __str__(self) -> str:
        ranks = f"[{','.join(map(str, self.ranks))}]" if self.ranks else ""
        arithmetic = "" if self.arithmetic == "float" else f"/{self.arithmetic}"
        return f"{self.decomposition}{ranks}/{self.storage}/{self.execution}{arithmetic}"


PRUNED = "pruned"
"""The decomposition of a weight that lost channels; the layers around it lose the same ones."""

UNCHANGED = Form("unchanged")
"""Leave the weight alone: always a candidate."""

CARRIED = Form("unchanged", arithmetic="integer")
"""What an operator without a weight becomes when it runs in integers."""
