"""Writes pickles of plain data and tensors (protocol 2) that `torch.load(weights_only=True)` reads."""

from __future__ import annotations

import collections
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

ORDERED = b"ccollections\nOrderedDict\n)R"  # an empty one


def dumps(value: Any, store: Callable[[np.ndarray], tuple[int, str]]) -> bytes:
    """Return the pickle of dicts, lists, tuples, numbers, strings, None and arrays, which become contiguous tensors.

    Args:
        value: the object; keys of dicts are strings or whole numbers.
        store: takes an array and returns the number and the class (of `torch`) of the storage that holds it all.

    Raises:
        TypeError: for anything that is not plain data.
    """
    return b"\x80\x02" + _encode(value, store) + b"."


def tensors(value: Any, path: str = "") -> dict[str, np.ndarray]:
    """Return the arrays in an object by their dot-joined paths, in the order in which `dumps` stores them."""
    if isinstance(value, np.ndarray):
        return {path: value}
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    found: dict[str, np.ndarray] = {}
    for key, item in items:
        found |= tensors(item, f"{path}.{key}" if path else str(key))
    return found


def _encode(value: Any, store: Callable[[np.ndarray], tuple[int, str]]) -> bytes:
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return integer(value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return text(value)
        case np.ndarray():
            return _tensor(value.shape, *store(value))
        case list():
            return b"](" + b"".join(_encode(item, store) for item in value) + b"e"
        case tuple():
            return tuple_of(*(_encode(item, store) for item in value))
        case Mapping():
            if wrong := [key for key in value if not isinstance(key, str | int)]:
                raise TypeError(f"A .pth file cannot hold the key {wrong[0]!r}; keys are strings or whole numbers.")
            start = ORDERED if isinstance(value, collections.OrderedDict) else b"}"
            items = (_encode(key, store) + _encode(item, store) for key, item in value.items())
            return start + b"(" + b"".join(items) + b"u"
    raise TypeError(f"A .pth file cannot hold a {type(value).__name__}; give plain data and numpy arrays.")


def _tensor(shape: tuple[int, ...], index: int, kind: str) -> bytes:
    strides = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
    count = int(np.prod(shape, dtype=np.int64))
    storage = tuple_of(text("storage"), name("torch", kind), text(str(index)), text("cpu"), integer(count)) + b"Q"
    geometry = (integer(0), tuple_of(*map(integer, shape)), tuple_of(*map(integer, strides)))
    arguments = tuple_of(storage, *geometry, b"\x89", ORDERED)  # \x89: requires no gradient
    return name("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def integer(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    size = max(8, value.bit_length() // 8 + 1)
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"
