"""Configurations as frozen dataclasses: built from plain values, checked by their type hints, and plain again."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal


def require(condition: Any, name: str, value: Any, remedy: str) -> None:
    """Raise ValueError that names a setting, its value and what to do, unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}={value!r} cannot be: {remedy}.")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain dictionaries, lists, strings and numbers; `from_dict` reads it back."""
    return _plain(dataclasses.asdict(config))


def from_dict(kind: type, values: Mapping[str, Any], where: str = "") -> Any:
    """Build a configuration dataclass from plain values.

    Raises:
        ValueError: for a field that does not exist, is missing, or has a value of another type or out of range.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where.rstrip('.') or 'The configuration'} is {values!r}, which is no group of settings.")
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{where + unknown[0]} is no setting; {where or 'the configuration'} has {', '.join(fields)}.")
    converted = {name: _convert(value, hints[name], where + name) for name, value in values.items()}
    for name, field in fields.items():
        if name not in converted and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where + name} is missing; give it a value.")
    return kind(**converted)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [kind for kind in arguments if kind is not type(None)]
        return None if value is None and len(kinds) < len(arguments) else _convert(value, _member(value, kinds), where)
    if origin is Annotated:  # with what turns a user's value into the one that is meant
        return arguments[1](_convert(value, arguments[0], where))
    if origin is Literal:
        require(value in arguments, where, value, f"choose one of {', '.join(map(str, arguments))}")
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        require(isinstance(value, Mapping), where, value, "give a group of settings")
        return from_dict(hint, value, f"{where}.")
    if origin is Mapping:
        require(isinstance(value, Mapping), where, value, "give a group of settings")
        return {str(name): _convert(item, arguments[1], f"{where}.{name}") for name, item in value.items()}
    if origin is tuple:
        return _tuple(value, arguments, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    typed = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    require(typed, where, value, f"it must be of type {hint.__name__}")
    require(hint is not float or math.isfinite(value), where, value, "it must be finite")
    return value


def _member(value: Any, kinds: list[Any]) -> Any:
    """Return the dataclass that a value means: the one with its only literal in a field, or else the first."""
    for kind in kinds[1:]:
        if isinstance(value, kind):
            return kind
        hints = typing.get_type_hints(kind) if isinstance(value, Mapping) else {}
        marks = {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is Literal}
        if any(len(literals) == 1 and value.get(name) == literals[0] for name, literals in marks.items()):
            return kind
    return kinds[0]


def _tuple(given: Any, arguments: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    """A single number stands for as many of them as the tuple has."""
    value = given
    if isinstance(given, int | float) and not isinstance(given, bool):
        value = [given] * (1 if arguments[-1] is Ellipsis else len(arguments))
    require(isinstance(value, tuple | list), where, value, "give a list")
    kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
    require(len(kinds) == len(value), where, list(value), f"it must have {len(kinds)} entries")
    return tuple(_convert(item, kind, where) for item, kind in zip(value, kinds))


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Return, for every setting that differs, its name with dots -> "name: old -> new"."""
    before, after = flat(old), flat(new)
    return {
        name: f"{name}: {before.get(name)} -> {after.get(name)}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    }


def defaults(kind: type, /, **others: Any) -> dict[str, Any]:
    """Return a dataclass's defaults, some of them changed, as plain values; fields without one are left out."""
    values = {field.name: field.default for field in dataclasses.fields(kind)} | others
    return {name: _plain(value) for name, value in values.items() if value is not dataclasses.MISSING}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return every setting by its name with dots."""
    settings: dict[str, Any] = {}
    for name, value in values.items():
        settings |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return settings
