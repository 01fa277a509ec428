"""How a command ends: with an exit status and at most one line on stderr, whoever stops it and wherever it prints."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

IMPOSSIBLE = 2  # exit status: refused, or a file cannot be read or written
REFUSALS = (ValueError, OSError, ImportError, MemoryError)  # whose messages are written for users
GRACE = 60.0  # seconds after SIGTERM in which a worker still serves its parent process, which may be saving
STOPS = [number for number in signal.Signals if number.name in ("SIGTERM", "SIGHUP")]


class Interrupted(KeyboardInterrupt):
    """SIGTERM or SIGHUP, which interrupt a command as Ctrl-C does, so that it removes its temporary files."""


class Abandoned(Interrupted):
    """The same while threads compute: the process ends without the clean-up of the libraries, in which these crash."""


def execute(work: Callable[[], int | None], *others: type[Exception], hint: str = "") -> int:
    """Call `work` and return the exit status: its own, 2 if it was refused, or 128 + the number of a signal.

    What cannot be printed is lost, and the work goes on.

    Args:
        work: returns an exit status; None for 0.
        others: exceptions that are refusals too, beside REFUSALS.
        hint: what the user may do after an interruption.
    """
    with _patient_streams(), _stoppable():
        try:
            return work() or 0
        except (*REFUSALS, *others) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            print("error:", f"out of memory: {text}" if isinstance(error, MemoryError) else text, file=sys.stderr)
            return IMPOSSIBLE
        except KeyboardInterrupt as error:
            print("; ".join(filter(None, ("interrupted", hint))), file=sys.stderr)
            status = 128 + (error.args[0] if isinstance(error, Interrupted) else signal.SIGINT)
            if isinstance(error, Abandoned):
                sys.stdout.flush()
                os._exit(status)
            return status


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Interrupted, unless they are handled or ignored (`nohup`) already."""

    def stop(number: int, _frame: object) -> None:
        raise Interrupted(number)

    main = threading.current_thread() is threading.main_thread()
    ours = [number for number in STOPS if main and signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def start_worker(*_: int) -> None:
    """Leave the signals that a whole group of processes gets to the parent, and exit when it exits, however it does."""

    def stop(*_: object) -> None:
        threading.Timer(GRACE, os._exit, [1]).start()

    for number in (signal.SIGINT, *STOPS):
        signal.signal(number, stop if number.name == "SIGTERM" else signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """Exit when the process that has started this one exits, however it does."""
    if parent := multiprocessing.parent_process():
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def start_tracker() -> None:
    """Start multiprocessing's tracker of shared memory, which survives SIGINT and SIGTERM, with SIGHUP blocked."""
    from multiprocessing import resource_tracker

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # which it inherits
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Patient(io.FileIO):
    """A standard stream that drops what cannot be written: the pipe is closed, the disk full, the terminal gone."""

    def write(self, data, /) -> int:
        with contextlib.suppress(OSError):
            return super().write(data) or len(data)
        return len(data)


@contextlib.contextmanager
def _patient_streams() -> Iterator[None]:
    """Standard output and error never fail, and print any file name. Where a stream is replaced already, it stays."""
    for number in range(3):  # the next file would get the number of one that is closed, and what others print there
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    replaced = {}
    for number, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        if old is getattr(sys, f"__{name}__"):
            replaced[name] = old
            if old is not None:
                with contextlib.suppress(OSError):
                    old.flush()
            encoding = old.encoding if old is not None else "utf-8"
            raw = io.BufferedWriter(_Patient(number, "w", closefd=False))
            new = io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=number == 2 or raw.isatty())
            setattr(sys, name, new)
    try:
        yield
    finally:
        for name, old in replaced.items():
            getattr(sys, name).flush()
            setattr(sys, name, old)
