"""Fetching a file once into a cache: resumed after an interruption, checked, one process at a time.

What models on the hub need, `huggingface_hub` fetches (see `hub`), watched by the same rules. It knows no host but the
hub, and gives a file its name before its content is checked.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import queue
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from anyup_core.paths import user_path

ATTEMPTS = 4
DELAY = 1.0  # seconds before the second attempt; doubles each time
TIMEOUT = 30.0  # seconds without an answer
PERIOD, LOWEST_SPEED = 60.0, 1000  # a server is given up that sends fewer bytes per second over so many seconds
PATIENCE = 10.0  # seconds after which a process says which other one it waits for
CHUNK = 1 << 16
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses worth another attempt


def cache_directory() -> Path:
    """Return where published checkpoints are kept: `ANYUP_CACHE`, or the user's cache directory.

    A checkout that torch.hub has fetched has no platformdirs; there it is `anyup` in `XDG_CACHE_HOME` or ~/.cache.
    """
    if given := os.environ.get("ANYUP_CACHE"):
        return user_path(given)
    try:
        import platformdirs
    except ModuleNotFoundError:
        return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "anyup"
    return user_path(platformdirs.user_cache_dir("anyup"))


def obtain(url: str, path: Path, check: Callable[[Path], object]) -> Path:
    """Return `path`, fetching it from `url` first unless it exists.

    What arrives is kept as `<file>.part`, where an interrupted transfer continues, and takes its name only after
    `check` has found nothing wrong. Processes that fetch the same file wait for one another, and say for which.

    Raises:
        ConnectionError: if it cannot be fetched, or only too slowly; the message says which file to put where.
        ValueError: if `check` raised it for what arrived.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with locked(path.with_name(f"{path.name}.lock"), path.name):
        if path.exists():
            return path
        if part.is_symlink():  # what it points to is not ours to write
            part.unlink()
        resumed = part.exists()
        try:
            _download(url, part)
            try:
                check(part)
            except ValueError:
                part.unlink()
                if not resumed:
                    raise
                _download(url, part)  # the older half may be of another file: once more, from the start
                check(part)
        except (OSError, http.client.HTTPException) as error:
            reason = str(error.reason if type(error) is urllib.error.URLError else error) or type(error).__name__
            raise ConnectionError(
                f"Could not fetch {url} ({reason}). Fetch it by other means and put it at {path}."
            ) from error
        except ValueError as error:
            part.unlink(missing_ok=True)
            raise ValueError(f"What {url} gave is no usable checkpoint, and was deleted. {error}") from error
        os.replace(part, path)
    return path


class SlowServer(ConnectionError):
    """A server that sends so little that another attempt would not help."""

    def __init__(self) -> None:
        super().__init__(f"it sent less than {LOWEST_SPEED} bytes per second over {PERIOD:g} seconds")


def _download(url: str, part: Path) -> None:
    """Fetch `url` into `part`, continuing what is there; several attempts."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _transfer(url, part)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # what is there is not the beginning of this file
                part.unlink(missing_ok=True)
            if error.code not in (416, *TRANSIENT) or attempt == ATTEMPTS:
                raise
        except SlowServer:
            raise
        except (OSError, http.client.HTTPException):
            if attempt == ATTEMPTS:
                raise
        time.sleep(DELAY * 2 ** (attempt - 1))


def _transfer(url: str, part: Path) -> None:
    """One attempt. Raises ConnectionError if the connection ends before the file does, SlowServer if it drips."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with _answer(request) as response:
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            start = 0
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        with part.open("ab" if start else "wb") as file, _progress(part.stem, start, total) as advance:
            began, received = time.monotonic(), 0
            while chunk := response.read1(CHUNK):  # whatever has arrived
                file.write(chunk)
                advance(len(chunk))
                received += len(chunk)
                if (elapsed := time.monotonic() - began) >= PERIOD:
                    if received < LOWEST_SPEED * elapsed:
                        raise SlowServer
                    began, received = time.monotonic(), 0
            file.flush()
            os.fsync(file.fileno())
    if total is not None and part.stat().st_size < total:
        raise ConnectionError(f"the connection ended after {part.stat().st_size} of {total} bytes")


@contextlib.contextmanager
def _progress(name: str, start: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show on a terminal how much has arrived, and give what is to be told of every piece. Needs rich to show it."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
    except ModuleNotFoundError:
        yield lambda _size: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(name, completed=start, total=total)
        yield lambda size: bar.advance(task, size)


def _answer(request: urllib.request.Request) -> http.client.HTTPResponse:
    """Open it. Raises SlowServer if the headers take too long: a thread waits for them, as they may drip too."""
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(urllib.request.urlopen(request, timeout=TIMEOUT))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=PERIOD)
    except queue.Empty:
        raise SlowServer from None
    if isinstance(answer, Exception):
        raise answer
    return answer


@contextlib.contextmanager
def locked(path: Path, name: str) -> Iterator[None]:
    """Hold an exclusive lock that ends with the process; whoever waits for it says on stderr which process has it.

    Args:
        path: of the lock.
        name: of what is fetched, for that message.
    """
    import filelock  # which PyTorch needs too

    lock, holder = filelock.FileLock(path), path.with_name(f"{path.name}-holder")
    try:
        lock.acquire(timeout=PATIENCE)
    except filelock.Timeout:
        by = holder.read_text() if holder.is_file() else "another process"
        print(f"Waiting for {by}, which fetches {name}.", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
