"""Independent tasks side by side: one site per worker, each with single-threaded linear algebra.

Two libraries that each start as many threads as there are cores slow each other down by an order of magnitude (OpenBLAS waits
actively), and the number of BLAS threads changes the last bits of a result. One thread per task avoids both.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

from .sites import Site

_LARGE_ELEMENTS = 1 << 23
"""A weight of 32 MB in float32."""

T = TypeVar("T")
R = TypeVar("R")


def workers(sites: Iterable[Site]) -> int:
    """How many sites may be worked on at a time: one where a weight is so large that its float64 copies decide the memory."""
    return 1 if any(site.elements >= _LARGE_ELEMENTS for site in sites) else os.cpu_count() or 1


def in_parallel(task: Callable[[T], R], items: Iterable[T], count: int) -> Iterator[R]:
    """Yield task(item) for every item, in the order of the items, computed by `count` workers.

    No more than one item per worker is taken ahead of the results that were asked for, so what the items hold does not pile up.
    """
    waiting: deque[Future[R]] = deque()
    with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(count) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(task, item))
                if len(waiting) >= count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
