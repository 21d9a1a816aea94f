"""Progress on the terminal: one line for the whole command and one for the loop that runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from intaglio.passes.options import Progress, silent

T = TypeVar("T")


@contextmanager
def shown(title: str, *, enabled: bool = True) -> Iterator[Progress]:
    """Show bars on stderr while the block runs; nothing when that is no terminal."""
    console = Console(stderr=True)
    if not (enabled and console.is_terminal):
        yield silent
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        bars.add_task(title, total=None)

        def progress(items: Iterable[T], what: str, count: int) -> Iterable[T]:
            task = bars.add_task(what, total=count)
            try:
                yield from bars.track(items, total=count, task_id=task)
            finally:
                bars.remove_task(task)

        yield progress
