"""Values that a thread computes one in advance, while the caller still uses the one before."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item, Value = TypeVar("Item"), TypeVar("Value")


def prefetch(function: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[Value]:
    """Yield the function of every item, in order; a thread computes the next one.

    Raises:
        Exception: what the function raises, where that item's value is due. Closing the iterator stops the thread.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="evaluation") as pool:
        pending: collections.deque[Future] = collections.deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) == 2:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
