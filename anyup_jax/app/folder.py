"""The files that the page may open: those of one folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from anyup_core.checkpoints import formats
from anyup_core.files import is_hidden, is_photograph
from anyup_core.paths import expanded

LISTED = 2000  # files of a kind
VISITED = 100_000  # files looked at
WEIGHT_SUFFIXES = (*formats.SUFFIXES, *formats.READ_ONLY, ".ckpt")


class Folder:
    """A folder whose files are named by their paths within it, with "/" on every platform.

    Args:
        root: the folder.

    Raises:
        NotADirectoryError: if it is none.
        PermissionError: if it may not be listed.
    """

    def __init__(self, root: str | os.PathLike):
        if not os.path.isdir(root):
            raise NotADirectoryError(f"{os.fspath(root)} is no folder; give one with pictures, or leave it out.")
        with os.scandir(root):  # `os.walk` would find nothing where nothing may be read
            self.root = Path(root).resolve()

    def listing(self) -> tuple[list[str], list[str], bool]:
        """Return the pictures, the files of weights, and whether there are more than are listed."""
        pictures: list[str] = []
        weights: list[str] = []
        for count, name in enumerate(self._files()):
            if count == VISITED:
                return pictures[:LISTED], weights[:LISTED], True
            if is_photograph(name):
                pictures.append(name)
            elif name.lower().endswith(WEIGHT_SUFFIXES):
                weights.append(name)
        return pictures[:LISTED], weights[:LISTED], max(len(pictures), len(weights)) > LISTED

    def _files(self) -> Iterator[str]:
        for folder, subfolders, names in os.walk(self.root):
            subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
            for name in sorted(names):
                if not is_hidden(name):
                    yield (Path(folder) / name).relative_to(self.root).as_posix()

    def path(self, name: str) -> Path:
        """Return the path of a file.

        Raises:
            PermissionError: if it lies outside of the folder, links followed.
            FileNotFoundError: if there is no such file or folder; a pipe or a device, which may never end, is none.
        """
        missing = FileNotFoundError(f"There is no file {name} in {self.root}.")
        try:
            path = Path(expanded(os.path.join(self.root, name)))
            target = path.resolve()
        except ValueError:  # a zero byte, or half a surrogate pair, which no file system has
            raise missing from None
        if not target.is_relative_to(self.root):
            raise PermissionError(f"{name} lies outside of the folder that the app was started for, {self.root}.")
        if not (path.is_file() or path.is_dir()):
            raise missing
        return path
