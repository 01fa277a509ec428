"""SIGTERM and Ctrl-C as requests: the run saves after the step that it is in, and stops."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Give a function that returns whether to stop after a step, the same in all processes.

    One process listens for SIGTERM and SIGINT, and a second SIGINT raises KeyboardInterrupt. Several leave SIGTERM to
    jax, which agrees on a step with all processes.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    received: list[int] = []

    def note(number, _frame):
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda _step: bool(received)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
