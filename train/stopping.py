"""SIGTERM, SIGHUP and Ctrl-C as requests: the run saves after the step that it is in, and stops."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Give a function that returns whether to stop after a step, the same in all processes.

    A second SIGINT raises KeyboardInterrupt. Of several processes each hands its signals on as SIGTERM to jax, which
    agrees on a step with all of them. A signal that is ignored, as SIGHUP is below `nohup`, stays so.
    """
    several = jax.process_count() > 1
    received: list[int] = []

    def note(number, _frame):
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    numbers = [signal.SIGINT, signal.SIGHUP, *([] if several else [signal.SIGTERM])]
    numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    old = {number: signal.signal(number, note) for number in numbers}
    try:
        yield multihost_utils.reached_preemption_sync_point if several else lambda _step: bool(received)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
