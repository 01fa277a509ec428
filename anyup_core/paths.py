"""Paths as users give them, in settings and on the command line."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Annotated

SYNTAX = set("[]{}()=,'\"\\$")  # of hydra, with which a value is quoted already, or is no path


def expanded(text: str) -> str:
    """Return a path with `~` as the home folder, and each name as it is on the disk.

    Where there is no such name, one that is composed or decomposed Unicode counts as the same: macOS, and archives made
    there, write "é" as two characters. An address (gs://) stays as it is.
    """
    if "://" in text:
        return text
    text = os.path.expanduser(text)
    if text.isascii() or os.path.lexists(text):
        return text
    found = Path(Path(text).anchor)
    for name in Path(text).parts[bool(found.parts) :]:
        forms = (name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))
        found /= next((form for form in forms if os.path.lexists(found / form)), name)
    return str(found)


def user_path(path: str | os.PathLike) -> Path:
    """Return the path that a user means, see `expanded`."""
    return Path(expanded(os.fspath(path)))


def for_hydra(word: str) -> str:
    """Return NAME=VALUE as hydra's grammar takes it, without a bare `~` or bare letters beyond ASCII."""
    name, equals, value = word.partition("=")
    value = os.path.expanduser(value)
    quoted = not value.isascii() and SYNTAX.isdisjoint(value)
    return name + equals + (f'"{value}"' if quoted else value)


def printable(name: str) -> str:
    """Return a file name as any terminal and file can hold it: bytes that are not UTF-8 appear as \\udcff and so on."""
    return name.encode(errors="backslashreplace").decode()


PathText = Annotated[str, expanded]
"""The type of a setting that is a path, or may be one; `settings.from_dict` passes its value through `expanded`."""
