"""Work that is done ahead by a thread, while what was asked for before is still in use."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item, Value = TypeVar("Item"), TypeVar("Value")


def ahead(function: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[Value]:
    """Give the function of every item, in order, the next one being computed by a thread.

    Raises:
        Exception: what the function raises, when that item is due. Closing the iterator stops the thread.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="evaluation") as pool:
        waiting: collections.deque = collections.deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) == 2:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
