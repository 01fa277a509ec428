"""Files and folders are replaced at once, or stay as they are."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

HELD = ".held"  # suffix of the lock beside each temporary folder; a folder without one is not ours


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; it takes the place of `path` only if the block succeeds.

    Where `path` is a link, the file or folder behind it is replaced, and the link stays. A folder can only be replaced
    in two steps; if the second one fails or is interrupted, the old folder is put back. What processes that were killed
    have left in the same place is removed first.
    """
    path = Path(os.path.realpath(path))
    _sweep(path.parent)
    with _held(path) as folder:
        temporary, old = folder / path.name, folder / f"{path.name}.old"
        folder.mkdir(mode=0o700)
        try:
            yield temporary
            try:
                if path.is_dir():
                    path.replace(old)
                temporary.replace(path)
            except BaseException:
                if old.exists():
                    old.replace(path)
                raise
        finally:
            if not old.exists() or path.exists():  # the old folder is kept where it could not be put back
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[Path]:
    """Give the name of a temporary folder for `path`, and lock it while the process lives.

    The lock comes first: whoever is killed leaves no folder without one. Where files cannot be locked there is none,
    and the folder is never swept.
    """
    from filelock import FileLock, Timeout

    with contextlib.ExitStack() as held:
        while True:
            folder = path.with_name(f".{path.stem}-{secrets.token_hex(4)}")
            lock = folder.with_name(folder.name + HELD)
            try:
                held.enter_context(FileLock(lock, blocking=False))
                break
            except Timeout:  # another process sweeps it already
                continue
            except (OSError, NotImplementedError):
                lock.unlink(missing_ok=True)
                break
        try:
            yield folder
        finally:
            if not folder.exists():
                lock.unlink(missing_ok=True)


@functools.cache  # once is enough, and the place may have many files
def _sweep(place: Path) -> None:
    """Remove temporary folders of dead processes; a folder that one was replacing is put back."""
    from filelock import FileLock, Timeout

    for lock in place.glob(f".*-*{HELD}"):
        folder = lock.with_suffix("")
        with contextlib.suppress(OSError, NotImplementedError, Timeout), FileLock(lock, blocking=False):
            for old in folder.glob("*.old"):
                if not (target := place / old.stem).exists():
                    old.replace(target)
            if folder.exists():
                shutil.rmtree(folder)
            lock.unlink(missing_ok=True)  # not before: a folder without one would stay
