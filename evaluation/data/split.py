"""What every data set is: examples by number, each with a name, and a digest of what is stored, wherever that is."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from evaluation.config import Size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """The examples of a split.

    Attributes:
        source: the files or records, whose number is its length. `name(index)` names one in messages and pictures: a
            file, or the number of a record; `contents(index)` lists the bytes that are stored of it.
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
        return self.source.name(index)

    @functools.cached_property
    def contents(self) -> str:
        """A digest of the stored examples, the same wherever they are; threads read each of them once."""

        def digest(index: int) -> bytes:
            return b"".join(hashlib.sha256(part).digest() for part in self.source.contents(index))

        with ThreadPoolExecutor(thread_name_prefix="digest") as pool:
            return hashlib.sha256(b"".join(pool.map(digest, range(len(self))))).hexdigest()[:16]
