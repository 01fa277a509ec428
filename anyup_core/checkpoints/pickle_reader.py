"""Reads pickles that hold plain data, and executes nothing.

A pickle is a program whose GLOBAL instruction can import anything and whose REDUCE instruction can call it. This
reader imports nothing: a global is its name, and REDUCE looks that name up in a table of constructors of plain data.
Names of configuration objects give an `Inert` stand-in, which holds what the pickle says of the object. Any other name
is refused where it is mentioned.

It is the standard library's unpickler, in its Python form because only there an instruction can be replaced: the C form
inserts keys into dictionaries by itself, and 60,000 whole numbers of one hash keep it busy for minutes.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any

MOST_SPARSE_KEYS = 4096
"""Numbers used as keys in one pickle, besides whole numbers from 0 to 65535; more could be chosen to collide."""

_INERT_MODULES = ("omegaconf.", "typing.")
_BUILTINS = ("bool", "dict", "float", "int", "list", "long", "object", "str", "tuple", "unicode")
_INERT_NAMES = (
    *("collections.defaultdict", "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath"),
    *(f"builtins.{name}" for name in _BUILTINS),
)
_SCALARS = (str, bytes, int, float, complex, bool, type(None))
_DAMAGE = (
    *(IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError),
    *(EOFError, AssertionError, struct.error, pickle.UnpicklingError),
)


class ForbiddenGlobal(ValueError):
    """The pickle names a function or class that is not plain data."""

    def __init__(self, name: str):
        super().__init__(f"it mentions {name}, which is not plain data")


@dataclasses.dataclass(frozen=True)
class Global:
    """A function, class or constant by its full name."""

    name: str


class Inert:
    """Stands for a configuration object: nothing of its class is imported or run.

    Attributes:
        name: full name of its class.
        arguments: what the class would have been called with.
        state: what would have become its attributes, or None.
        items: what would have been put into it: pairs of a key and a value for a mapping, else values.
    """

    def __init__(self, name: str, arguments: tuple[Any, ...]):
        self.name, self.arguments = name, arguments
        self.state: Any = None
        self.items: list[Any] = []

    def __repr__(self) -> str:
        return f"Inert({self.name})"  # its contents often refer back to it

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Iterable[Any]) -> None:
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))


def loads(data: Any, constructors: Mapping[str, Callable[..., Any] | None], persistent: Callable[[Any], Any]) -> Any:
    """Return the object in a pickle of dicts, lists, tuples, sets, numbers, strings, bytes and None.

    Objects of omegaconf and typing, and the builtin types that these mention, are `Inert` where the pickle makes one
    and a `Global` where it only names the class.

    Args:
        data: the pickle as bytes, any protocol; or a file with `read`, `readline` and `tell`, read up to its end.
        constructors: full name -> function that REDUCE may call, on plain data; a name whose constructor is None is a
            constant, and stays a `Global`.
        persistent: what a persistent id stands for.

    Raises:
        ForbiddenGlobal: for any other name.
        ValueError: for anything else that is no plain data, or is damaged.
    """
    try:
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        return _Reader(file, constructors, persistent).load()
    except _DAMAGE as error:
        raise ValueError(f"the pickle is damaged ({type(error).__name__}: {error})") from error


_Unpickler: Any = pickle._Unpickler  # whose parts the type stubs do not know


class _Reader(_Unpickler):
    """Python's unpickler without imports, calls of anything but the table's, and attributes."""

    dispatch = dict(_Unpickler.dispatch)

    def __init__(self, file: Any, constructors: Mapping[str, Any], persistent: Callable[[Any], Any]):
        super().__init__(file, encoding="latin1")
        self.constructors = constructors
        self.persistent_load = persistent
        self.memo = _Memo()
        self.position = file.tell
        self.sparse_keys = self.copied = 0

    def find_class(self, module: str, name: str) -> Global:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"  # as Python 2 called it
        known = (self.constructors, _CONTAINERS, _INERT_NAMES)
        if not (any(full in names for names in known) or full.startswith(_INERT_MODULES)):
            raise ForbiddenGlobal(f"{module}.{name}")
        return Global(full)

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise TypeError("a call of something that is no function")
        self.copied += sum(len(x) for x in arguments if isinstance(x, str | bytes | list | tuple))
        if self.copied > (1 << 20) + 4 * self.position():
            raise ValueError("it copies its contents over and over")
        if function.name in _CONTAINERS:
            return self.append(_CONTAINERS[function.name](self, *arguments))
        if function.name not in self.constructors:
            return self.append(Inert(function.name, arguments))
        constructor = self.constructors[function.name]
        if constructor is None:
            raise TypeError(f"a call of the constant {function.name}")
        return self.append(constructor(*arguments))

    def ordered_dict(self, items: Iterable[Any] = ()) -> dict[Any, Any]:
        entries = [(key, value) for key, value in items]
        self.keys([key for key, _ in entries])
        return collections.OrderedDict(entries)

    def build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].state = state
        elif not isinstance(self.stack[-1], dict):
            # the attributes of a dict, such as the `_metadata` of a state dict, are not part of the data
            raise ValueError(f"it sets attributes of a {type(self.stack[-1]).__name__}, which is not plain data")

    def byte_array(self) -> None:
        """Make one of what there is; the original trusts the length."""
        self.append(bytearray(self.read(struct.unpack("<Q", self.read(8))[0])))

    def keys(self, items: list[Any]) -> list[Any]:
        """Return items that are about to be hashed: scalars, as nested ones can exhaust the stack.

        Raises ValueError once so many of them are numbers that an attacker could give them one hash.
        """
        for item in items:
            if not isinstance(item, _SCALARS):
                raise TypeError(f"a key that is a {type(item).__name__}")
            if isinstance(item, int | float | complex) and not (isinstance(item, int) and 0 <= item < 1 << 16):
                self.sparse_keys += 1
        if self.sparse_keys > MOST_SPARSE_KEYS:
            raise ValueError(f"it has more than {MOST_SPARSE_KEYS} numbers outside 0..65535 as keys")
        return items


class _Memo(dict[int, Any]):
    """Objects by number, as picklers count them; numbers of one hash would be slow to insert."""

    def __setitem__(self, index: int, value: Any) -> None:
        if not 0 <= index <= 2 * len(self) + 1024:
            raise ValueError(f"it calls an object number {index} after {len(self)} others")
        super().__setitem__(index, value)


def _check_keys(opcode: str, keys: slice, reader: _Reader) -> None:
    """Run an instruction after a check of what it hashes: these objects of the stack, down to the last mark."""
    reader.keys(reader.stack[keys])
    _Unpickler.dispatch[getattr(pickle, opcode)[0]](reader)


def _refuse(opcode: str, _: _Reader) -> None:
    raise ValueError(f"it uses the instruction {opcode}, which plain data does not need")


_KEYS = {
    "SETITEM": slice(-2, -1),
    **dict.fromkeys(("SETITEMS", "DICT"), slice(None, None, 2)),
    **dict.fromkeys(("ADDITEMS", "FROZENSET"), slice(None)),
}
_REFUSED = ("INST", "OBJ", "NEWOBJ_EX", "PERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER")
_INSTRUCTIONS = {
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Reader.reduce),
    **{"BUILD": _Reader.build, "BYTEARRAY8": _Reader.byte_array},
    **{opcode: functools.partial(_check_keys, opcode, keys) for opcode, keys in _KEYS.items()},
    **{opcode: functools.partial(_refuse, opcode) for opcode in _REFUSED},
}
_Reader.dispatch |= {getattr(pickle, opcode)[0]: instruction for opcode, instruction in _INSTRUCTIONS.items()}

_CONTAINERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _Reader.ordered_dict,
    "builtins.set": lambda reader, items=(): set(reader.keys(list(items))),
    "builtins.frozenset": lambda reader, items=(): frozenset(reader.keys(list(items))),
}
