"""Runs a download of `huggingface_hub`, and gives up a server that drips, as `fetching` does.

The library sets a time limit for each read only, so a byte now and then would keep it busy for ever.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from anyup_core.checkpoints import fetching

TICK = 0.1  # seconds between two looks at a transfer


def run(download: Callable[[type], str], name: str) -> str:
    """Return what `download` returns; it works in a thread of its own.

    Args:
        download: calls the library, with a class of progress bars.
        name: of what is fetched, for messages.

    Raises:
        SlowServer: if the server sends too little, see `fetching`.
        Exception: what `download` raises.
    """
    meter, done = Meter(), threading.Event()
    results: list[str] = []
    errors: list[BaseException] = []

    def work() -> None:
        meter.thread = threading.get_ident()
        try:
            with meter.installed():
                results.append(download(meter.progress_bar()))
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=work, daemon=True).start()
    try:
        meter.watch(done, name)
    except BaseException:
        meter.give_up()
        raise
    if errors:
        raise errors[0]
    return results[0]


@contextlib.contextmanager
def locked(repository: str) -> Iterator[None]:
    """Hold the lock of a repository in the hub's cache; whoever waits says who has it. Without one where none can be.

    The library's own locks do not tell their holder.
    """
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / ".locks" / f"models--{repository.replace('/', '--')}"
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError, NotImplementedError):  # such as a cache that is only read
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(fetching.locked(folder / "anyup.lock", repository))
        yield


class Meter:
    """What the requests of one thread receive.

    Attributes:
        thread: its identifier; requests of other threads are not counted.
        asked: whether a request waits for the head of its answer.
        answer: the newest answer.
        bars: progress bars that are open.
        shown: what they have counted: the only sign of transfers that do not go over HTTP (Xet).
        given_up: whether further requests are refused.
    """

    def __init__(self) -> None:
        self.thread: int | None = None
        self.asked = False
        self.answer: Any = None
        self.bars = 0
        self.shown = 0.0
        self.given_up = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Follow the requests of the library's session."""
        import huggingface_hub

        hooks = huggingface_hub.get_session().event_hooks
        ours = {"request": self.on_request, "response": self.on_response}
        for event, hook in ours.items():
            hooks[event].append(hook)
        try:
            yield
        finally:
            for event, hook in ours.items():
                hooks[event].remove(hook)

    def on_request(self, _request: Any) -> None:
        if threading.get_ident() == self.thread:
            if self.given_up:
                raise fetching.SlowServer
            self.asked = True

    def on_response(self, response: Any) -> None:
        if threading.get_ident() == self.thread:
            self.asked, self.answer = False, response

    def progress_bar(self) -> type:
        """Return the library's class of progress bars, which count here, too."""
        from huggingface_hub.utils import tqdm

        meter = self

        class Bar(tqdm):
            def __init__(self, *args: Any, **options: Any):
                meter.bars += 1
                self.counts = True
                super().__init__(*args, **options)

            def update(self, n: float | None = 1) -> bool | None:
                meter.shown += n or 0
                return super().update(n)

            def close(self) -> None:
                meter.bars -= self.counts
                self.counts = False
                super().close()

        return Bar

    def transferring(self) -> bool:
        return self.asked or self.bars > 0 or (self.answer is not None and not self.answer.is_closed)

    def received(self) -> float:
        return self.shown + (0 if self.answer is None else self.answer.num_bytes_downloaded)

    def watch(self, done: threading.Event, name: str) -> None:
        """Wait until it is done. Raises SlowServer if too little is received while something is transferred."""
        began = idle = time.monotonic()
        before, said = self.received(), False
        while not done.wait(TICK):
            now, received = time.monotonic(), self.received()
            if not self.transferring():
                began, before = now, received
                if now - idle >= fetching.PATIENCE and not said:
                    print(f"Waiting for another process, which fetches {name}.", file=sys.stderr, flush=True)
                    said = True
                continue
            idle = now
            if received < before:  # another answer
                began, before = now, received
            if now - began >= fetching.PERIOD:
                if received - before < fetching.LOWEST_SPEED * (now - began):
                    raise fetching.SlowServer
                began, before = now, received

    def give_up(self) -> None:
        """End the transfer and those after it."""
        self.given_up = True
        if self.answer is not None:
            with contextlib.suppress(Exception):
                self.answer.close()
