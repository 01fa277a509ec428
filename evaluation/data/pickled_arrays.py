"""Arrays of numbers in a pickle, as views of the file: nothing is executed, and only values that are used are read."""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection
from typing import Any

import numpy as np

from anyup_core.checkpoints.pickle_reader import Inert, loads

LARGE = 1 << 12  # bytes; a read of at least this size is a view of the file instead of a copy
_NAMED = {"_reconstruct": "array", "_frombuffer": "buffer", "scalar": "scalar"}
_CONSTRUCTORS: dict[str, Any] = {
    f"numpy.{core}.{module}.{function}": lambda *arguments, name=name: Inert(name, arguments)
    for core in ("core", "_core")  # NumPy 1 and 2
    for module in ("multiarray", "numeric")
    for function, name in _NAMED.items()
} | {"numpy.dtype": lambda *arguments: Inert("dtype", arguments), "numpy.ndarray": None}


class _Views(mmap.mmap):
    """A file whose large reads are views of its memory map."""

    def read(self, count: int) -> bytes | memoryview:
        if count < LARGE:
            return super().read(count)
        start = self.tell()
        self.seek(count, os.SEEK_CUR)  # refused beyond the end
        return memoryview(self)[start : start + count]


def read_arrays(path: str | os.PathLike, names: Collection[str]) -> dict[str, np.ndarray]:
    """Return arrays from a pickle of a dictionary.

    They are views of the file, so 10 GB of them take no memory; from a pickle of protocol 5 they are copies.

    Args:
        path: a pickle of protocol 3 to 5; other values of the dictionary may be plain data or arrays of any kind.
        names: keys of arrays of numbers.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no such pickle, holds anything but plain data and NumPy's arrays, or lacks a name.
    """
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise ValueError(f"{path} is empty.")
        mapped = _Views(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        content = loads(mapped, _CONSTRUCTORS, _no_reference)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        if missing := [name for name in names if name not in content]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        return {name: _array(content[name], name) for name in names}
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is no pickle of a dictionary with the arrays {', '.join(names)}: {error}.") from error


def _array(item: Any, name: str) -> np.ndarray:
    axes = None
    match item:
        case Inert(name="array", state=(_, tuple() as shape, Inert(name="dtype") as kind, fortran, buffer)):
            order = "F" if fortran else "C"
        case Inert(name="buffer", arguments=(buffer, Inert(name="dtype") as kind, tuple() as shape, order)):
            pass
        case Inert(name="buffer", arguments=(buffer, Inert(name="dtype") as kind, tuple() as shape, "K", axes)):
            order = "C"
        case _:
            raise ValueError(f"{name} is no array of numbers")
    dtype = np.dtype(kind.arguments[0])
    if dtype.kind not in "biuf" or not isinstance(buffer, bytes | bytearray | memoryview):
        raise ValueError(f"{name} is no array of numbers but of {dtype}")
    array = np.frombuffer(buffer, dtype.newbyteorder(kind.state[1])).reshape(shape, order=order)
    return array if axes is None else array.transpose(axes)


def _no_reference(_: Any) -> Any:
    raise ValueError("it refers to something outside the file")
