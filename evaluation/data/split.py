"""What every data set is: examples by number, each with a name, and a digest of what is stored, wherever that is."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from evaluation.config import Size


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of every example below a folder, as relative paths: an image and its label, or one file."""

    root: Path
    groups: Sequence[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.groups)

    def names(self, index: int) -> tuple[str, ...]:
        return self.groups[index]

    def contents(self, index: int) -> list[bytes]:
        return [(self.root / name).read_bytes() for name in self.groups[index]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """The examples of a split.

    Attributes:
        source: the files or records, whose number is its length. `names(index)` names the parts of one in messages, the
            first one in pictures: files, or the number of a record; `contents(index)` lists the bytes that are stored.
        size: height and width that examples are resized to.
        limit: use only the first ones; None for all.
    """

    source: Any
    size: Size
    limit: int | None = None

    def __len__(self) -> int:
        return min(len(self.source), self.limit or len(self.source))

    def name(self, index: int) -> str:
        """Return the name of an example in messages and pictures: its file, or the number of its record."""
        return self.source.names(index)[0]

    @functools.cached_property
    def contents(self) -> str:
        """A digest of the stored examples, the same wherever they are; threads read each of them once."""

        def digest(index: int) -> bytes:
            return b"".join(hashlib.sha256(part).digest() for part in self.source.contents(index))

        with ThreadPoolExecutor(thread_name_prefix="digest") as pool:
            return hashlib.sha256(b"".join(pool.map(digest, range(len(self))))).hexdigest()[:16]
