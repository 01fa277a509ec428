"""Examples in batches, in a given order, read ahead by threads."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Readable(Protocol):
    """What has arrays of one shape for every index: `Examples` of segmentation, or `Scenes`."""

    def read(self, index: int) -> tuple[np.ndarray, ...]:
        """Return the arrays of an example."""
        ...


def batches(
    examples: Readable, order: Sequence[int], batch_size: int, threads: int = 2
) -> Iterator[tuple[np.ndarray, ...]]:
    """Give examples in batches: each array of `read`, stacked, and last their indices as int64 (B,).

    Of segmentation these are images (B, H, W, 3) and labels (B, H, W), both uint8, and indices.

    Args:
        examples: what is read.
        order: the indices, in the order in which they come; the last batch is smaller where they do not fill it.
        batch_size: examples of a batch.
        threads: that decode; they read at most one batch ahead, and stop when the iterator is closed.

    Raises:
        OSError, ValueError: what `read` raises, when the batch of that example is due.
    """
    indices, waiting = iter(order), collections.deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="evaluate-data")
    try:
        for _ in range(0, len(order), batch_size):
            ahead = itertools.islice(indices, 2 * batch_size - len(waiting))
            waiting.extend((index, pool.submit(examples.read, index)) for index in ahead)
            batch = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
            arrays = zip(*(future.result() for _, future in batch))
            yield *map(np.stack, arrays), np.array([index for index, _ in batch], np.int64)
    finally:
        pool.shutdown(cancel_futures=True)
