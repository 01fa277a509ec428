"""Work on threads of its own, each of which computes by itself.

PyTorch divides every operation among its threads, which wait for one another at its end, spinning. Where other
processes want the processors too, one of the threads is always late, and the rest wait for it, thousands of times a
call. Blocks of pixels need nothing of each other: here every thread takes a block after the other, with operations that
are not divided, and they wait once, after the last block.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import math
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

CGROUP = Path("/sys/fs/cgroup")  # where Linux tells a container's share of the processors

R = TypeVar("R")
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Crew:
    """The threads that work for another one: on each call one of them leads, and the rest help it."""

    pool: ThreadPoolExecutor
    size: int


class _Local(threading.local):
    """What belongs to a thread: the crew that works for it, and the one that it is of."""

    own: Crew | None = None
    crew: Crew | None = None


_local = _Local()


def count(device: torch.device) -> int:
    """Return with how many threads `on_own_threads` and `each` work on what lies on a device.

    It is PyTorch's number of threads, or that of the processors if there are fewer; 1 on accelerators, which have no
    such threads, and where operations are watched, as by profilers, which see those of their own thread.
    """
    watched: Any = torch._C
    if device.type != "cpu" or watched._len_torch_dispatch_stack() or watched._autograd._profiler_enabled():
        return 1
    if _local.crew is not None:
        return _local.crew.size
    return max(1, min(torch.get_num_threads(), processors()))


@functools.cache
def processors() -> int:
    """Return how many processors this process may use: those it may run on, or the share that its container has."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(available, quota())))


def quota() -> float:
    """Return how many processors' time a container is limited to; infinity if it is not."""
    with contextlib.suppress(OSError, ValueError):  # version 2 of cgroups
        most, period = (CGROUP / "cpu.max").read_text().split()
        return math.inf if most == "max" else int(most) / int(period)
    with contextlib.suppress(OSError, ValueError):  # version 1
        most, period = (int((CGROUP / f"cpu/cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return math.inf if most <= 0 else most / period
    return math.inf


def on_own_threads(function: Function) -> Function:
    """Decorate a function of a module, its first argument: on CPUs it runs on a thread whose operations are not
    divided, and there `each` has as many threads as PyTorch has elsewhere. It may be called from such a thread.
    """

    @functools.wraps(function)
    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        device = next(module.parameters()).device
        if _local.crew is not None or (size := count(device)) < 2:
            return function(module, *args, **kwargs)
        return _submit(_crew(size), lambda: function(module, *args, **kwargs)).result()

    return cast(Function, call)


def each(function: Callable[[int], None], number: int) -> None:
    """Call `function(0)`, ..., `function(number - 1)`, started in this order, on all threads of an `on_own_threads`
    call. A function must not wait for a later one; it may call `each`. What one raises is raised once all have ended.
    """
    crew, numbers = _local.crew, itertools.count()
    failed = threading.Event()

    def work() -> None:
        while (index := next(numbers)) < number and not failed.is_set():
            try:
                function(index)
            except BaseException:
                failed.set()
                raise

    helpers = [] if crew is None else [_submit(crew, work) for _ in range(min(crew.size, number) - 1)]
    try:
        work()
    finally:  # one that has not begun finds nothing to do any more
        begun = [helper for helper in helpers if not helper.cancel()]
        errors = [error for helper in begun if (error := helper.exception()) is not None]
    if errors:
        raise errors[0]


def _submit(crew: Crew, function: Callable[[], R]) -> Future[R]:
    """Run a function on one of the threads, in the mode of this one, without gradients."""
    inference = torch.is_inference_mode_enabled()

    def run() -> R:
        _local.crew = crew
        try:
            with torch.inference_mode(inference), torch.no_grad():
                return function()
        finally:
            _local.crew = None

    return crew.pool.submit(run)


def _crew(size: int) -> Crew:
    """Return the threads that work for this one; they end when it does."""
    if _local.own is None or _local.own.size != size:
        before, started = torch.get_num_threads(), threading.Barrier(size)
        _local.own = Crew(ThreadPoolExecutor(size, "anyup"), size)
        for thread in [_local.own.pool.submit(_start, started) for _ in range(size)]:
            thread.result()
        torch.set_num_threads(before)  # for others: they have set it for themselves, and for all
    return _local.own


def _start(started: threading.Barrier) -> None:
    started.wait()
    torch.get_num_threads()  # the first use in a thread takes the number from the others
    torch.set_num_threads(1)
    if (set_for_this_thread := _mkl()) is not None:
        set_for_this_thread(1)


@functools.cache
def _mkl() -> Callable[[int], int] | None:
    """Return MKL's function for the number of threads of the calling one; None where PyTorch has another library."""
    name = {"linux": "libtorch_cpu.so", "win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "")
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name)).MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):
        return None


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads

    def _forget() -> None:
        global _local
        _local = _Local()

    os.register_at_fork(after_in_child=_forget)
