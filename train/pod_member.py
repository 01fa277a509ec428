"""A process of a run of several: a child does the work, and its parent tells in one sentence when another has died.

When jax's coordination service misses a process, it ends the others with abort() and the stack of C++, which nothing
within them can prevent. Where a collective operation fails first, a process that closes what it has opened would wait
for the dead one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from anyup_core import command

LOST = 69  # exit status: another process has died
SENTENCE = (
    "error: another process of this run has died or cannot be reached, and its own log tells why; start all of them "
    "again, and they go on from the newest checkpoint"
)
FAILED = re.compile(r"gloo|nccl|coordination|heartbeat|barrier|connection reset|socket closed|unavailable", re.I)
RUNTIME = re.compile(rb"[EFW]\d{4} .*(coordination|preemption_sync|distributed service|distributed runtime)")
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_supervised = threading.Event()  # set in a child


def supervise(work: Callable[..., int], *arguments: Any, hint: str) -> int:
    """Return the exit status of `work`, which runs in a child with a session of its own, or LOST.

    Args:
        work: a function of a module, with arguments that can be pickled. What it raises is told as `command.execute`
            does.
        hint: what the user may do after an interruption.
    """
    context = multiprocessing.get_context("spawn")
    command.start_tracker()
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(sender, work, arguments, hint))
    child.start()
    sender.close()
    held: list[bytes] = []
    reader = threading.Thread(target=_forward, args=(receiver, held), daemon=True)
    reader.start()
    with _forwarding(child):
        child.join()
    reader.join(5)  # a process that the child has left behind keeps its end open
    status = child.exitcode or 0
    if status == LOST or (status == -signal.SIGABRT and held):
        print(SENTENCE, file=sys.stderr)
        return LOST
    for line in held:
        sys.stderr.write(line.decode(errors="backslashreplace"))
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """End a supervised process at once where what it does fails because another has died."""
    try:
        yield
    except Exception as error:
        if _supervised.is_set() and FAILED.search(str(error)):
            sys.stdout.flush()
            os._exit(LOST)
        raise


def _work(sender: Connection, work: Callable[..., int], arguments: tuple, hint: str) -> None:
    os.setsid()  # a signal to the group comes once, through the parent
    os.dup2(sender.fileno(), 2)
    sender.close()
    command.end_with_parent()
    _supervised.set()
    sys.exit(command.execute(lambda: work(*arguments), hint=hint))


def _forward(receiver: Connection, held: list[bytes]) -> None:
    """Write what the child writes to stderr; from the first line of jax's runtime on, hold it."""
    with open(receiver.fileno(), "rb", closefd=False) as lines:
        for line in lines:
            if held or RUNTIME.match(line):
                held.append(line)
            else:
                sys.stderr.write(line.decode(errors="backslashreplace"))
                sys.stderr.flush()


@contextlib.contextmanager
def _forwarding(child: BaseProcess) -> Iterator[None]:
    def forward(number: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            if child.pid is not None:
                os.kill(child.pid, number)

    numbers = [number for number in FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
    old = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
