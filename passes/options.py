"""What every pass that runs a model needs to know about the machine and the data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from .session import CPU

T = TypeVar("T")


class Progress(Protocol):
    """Shows how far a loop is."""

    def __call__(self, items: Iterable[T], what: str, count: int) -> Iterable[T]:
        """Pass the items on; `what` is being done to `count` of them."""
        ...


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
