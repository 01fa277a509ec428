"""Reads pickles that hold plain data, and executes nothing.

A pickle is a program whose GLOBAL instruction can import anything and whose REDUCE instruction can call it. This
interpreter imports nothing: a global is its name, and REDUCE looks that name up in a table of constructors of plain
data. Names of configuration objects give an `Inert` stand-in, which holds what the pickle says of the object. Any other
name is refused where it is mentioned.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

_MARK = object()
_INERT_MODULES = ("omegaconf.", "typing.")
_INERT_NAMES = frozenset(
    (
        *("collections.defaultdict", "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath"),
        *(
            f"{module}.{name}"
            for module in ("builtins", "__builtin__")
            for name in ("bool", "dict", "float", "int", "list", "long", "object", "str", "tuple", "unicode")
        ),
    )
)
_SCALARS = (str, bytes, int, float, complex, bool, type(None))


class ForbiddenGlobal(ValueError):
    """The pickle names a function or class that is not plain data."""

    def __init__(self, name: str):
        super().__init__(f"it mentions {name}, which is not plain data")
        self.name = name


class Global(NamedTuple):
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


def loads(data: bytes, constructors: Mapping[str, Callable[..., Any]], persistent: Callable[[Any], Any]) -> Any:
    """Return the object in a pickle of dicts, lists, tuples, sets, numbers, strings, bytes and None.

    Objects of omegaconf and typing, and the builtin types that these mention, are `Inert` where the pickle makes one
    and a `Global` where it only names the class.

    Args:
        data: the pickle, any protocol.
        constructors: full name -> function that REDUCE may call, on plain data; a name whose constructor is None is a
            constant, and stays a `Global`.
        persistent: what a persistent id stands for.

    Raises:
        ForbiddenGlobal: for any other name.
        ValueError: for anything else that is no plain data, or is damaged.
    """
    machine = _Machine(constructors, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.step(opcode.name, argument)
        return machine.stack.pop()
    except ValueError:
        raise
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"the pickle is damaged ({type(error).__name__}: {error})") from error


class _Machine:
    """The stack and memo of one pickle."""

    def __init__(self, constructors: Mapping[str, Callable[..., Any]], persistent: Callable[[Any], Any]):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.constructors = constructors
        self.persistent = persistent

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                stack.append(_MARK)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode == "NEWTRUE")
            case _ if opcode in _PUSH:
                stack.append(argument)
            case _ if opcode in _EMPTY:
                stack.append(_EMPTY[opcode]())
            case "TUPLE":
                stack.append(tuple(self.pop_mark()))
            case "LIST":
                stack.append(self.pop_mark())
            case "DICT":
                stack.append(dict(pairs(self.pop_mark())))
            case "FROZENSET":
                stack.append(frozenset(scalars(self.pop_mark())))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = stack[-int(opcode[-1]) :]
                if len(items) < int(opcode[-1]):
                    raise IndexError("the stack is empty")
                stack[-len(items) :] = [tuple(items)]
            case "APPEND":
                self.append([stack.pop()])
            case "APPENDS" | "ADDITEMS":
                self.append(self.pop_mark())
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self.set_items([key, value])
            case "SETITEMS":
                self.set_items(self.pop_mark())
            case "POP":
                stack.pop()
            case "POP_MARK":
                self.pop_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(self.named(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                if not isinstance(name, str) or not isinstance(module, str):
                    raise TypeError("a name that is no string")
                stack.append(self.named(f"{module}.{name}"))
            case "INST":
                raise ForbiddenGlobal(argument.replace(" ", ".", 1))
            case "BINPERSID":
                stack.append(self.persistent(stack.pop()))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self.construct(function, arguments))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Inert):
                    stack[-1].state = state
                elif not isinstance(stack[-1], dict):
                    # the attributes of a dict, such as the `_metadata` of a state dict, are not part of the data
                    raise ValueError(f"it sets attributes of a {type(stack[-1]).__name__}, which is not plain data")
            case _:
                raise ValueError(f"it uses the instruction {opcode}, which plain data does not need")

    def pop_mark(self) -> list[Any]:
        """Pop everything down to the last mark."""
        stack = self.stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is _MARK:
                items = stack[index + 1 :]
                del stack[index:]
                return items
        raise IndexError("no mark")

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, set):
            target.update(scalars(items))
        elif isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Inert):
            target.items.extend(items)
        else:
            raise TypeError(f"append to a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].items.extend(pairs(items))
            return
        if not isinstance(self.stack[-1], dict):
            raise TypeError(f"set an item of a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(pairs(items))

    def named(self, name: str) -> Global:
        if not (name in self.constructors or name in _INERT_NAMES or name.startswith(_INERT_MODULES)):
            raise ForbiddenGlobal(name)
        return Global(name)

    def construct(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise TypeError("a call of something that is no function")
        if function.name not in self.constructors:
            return Inert(function.name, arguments)
        constructor = self.constructors[function.name]
        if constructor is None:
            raise TypeError(f"a call of the constant {function.name}")
        return constructor(*arguments)


_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_PUSH = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}


def pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    """Return (key, value) pairs of a flat list. Raises TypeError for keys that are not scalars."""
    if len(items) % 2:
        raise TypeError("a key without a value")
    return list(zip(scalars(items[::2]), items[1::2]))


def scalars(items: Iterable[Any]) -> list[Any]:
    """Return the items. Raises TypeError if one is a container: hashing nested ones can exhaust the stack."""
    items = list(items)
    for item in items:
        if not isinstance(item, _SCALARS):
            raise TypeError(f"a key that is a {type(item).__name__}")
    return items
