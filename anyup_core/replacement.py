"""Files and folders are replaced at once, or stay as they are."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; it takes the place of `path` only if the block succeeds.

    Where `path` is a link, the file or folder behind it is replaced, and the link stays. A folder can only be replaced
    in two steps; if the second one fails or is interrupted, the old folder is put back.
    """
    path = Path(os.path.realpath(path))
    folder = Path(tempfile.mkdtemp(prefix=f".{path.stem}-", dir=path.parent))
    temporary, old = folder / path.name, folder / f"{path.name}.old"
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
