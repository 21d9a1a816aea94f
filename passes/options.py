"""What every pass that runs a model needs to know about the machine and the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from .session import CPU

T = TypeVar("T")

Progress = Callable[[Iterable[T], str, int], Iterable[T]]
"""progress(items, what, count): passes the items on and shows how far it is."""


def silent(items: Iterable[T], what: str, count: int) -> Iterable[T]:
    """No progress shown."""
    return items


@dataclass(frozen=True)
class Runtime:
    """How models are run.

    Attributes:
        providers: ONNX Runtime execution providers, in order of preference.
        threads: intra-op threads.
        batch: most samples per feed while statistics are gathered.
        memory_limit_bytes: most bytes of expanded weights held at once; larger models run in segments.
    """

    providers: tuple[str, ...] = (CPU,)
    threads: int = 1
    batch: int = 16
    memory_limit_bytes: int = 1 << 29
