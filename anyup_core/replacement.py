"""Files and folders are replaced at once, or stay as they are."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

LOCK = "held-by-a-process"  # a file in each temporary folder; a folder without it is not ours


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; it takes the place of `path` only if the block succeeds.

    Where `path` is a link, the file or folder behind it is replaced, and the link stays. A folder can only be replaced
    in two steps; if the second one fails or is interrupted, the old folder is put back. What processes that were killed
    have left in the same place is removed first.
    """
    path = Path(os.path.realpath(path))
    _sweep(path.parent)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.stem}-", dir=path.parent))
    temporary, old = folder / path.name, folder / f"{path.name}.old"
    with contextlib.ExitStack() as held:
        try:
            _hold(folder, held)
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


def _hold(folder: Path, held: contextlib.ExitStack) -> None:
    """Lock a temporary folder while the process lives; where files cannot be locked, it is never swept."""
    from filelock import FileLock

    new = folder / "new"
    with contextlib.suppress(OSError, NotImplementedError):
        held.enter_context(FileLock(new, blocking=False))
        new.rename(folder / LOCK)  # which others look for, once it is locked


@functools.cache  # once is enough, and the place may have many files
def _sweep(place: Path) -> None:
    """Remove temporary folders of dead processes; a folder that one was replacing is put back."""
    from filelock import FileLock, Timeout

    for lock in place.glob(f".*-*/{LOCK}"):
        folder = lock.parent
        with contextlib.suppress(OSError, NotImplementedError, Timeout), FileLock(lock, blocking=False):
            for old in folder.glob("*.old"):
                if not (target := place / old.stem).exists():
                    old.replace(target)
            shutil.rmtree(folder)
