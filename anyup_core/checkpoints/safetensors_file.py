"""Reads and writes .safetensors files with numpy: tensors, and a header of strings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy


def read(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors by their names. Raises ValueError if the file is damaged, or has a type that NumPy lacks."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict


def read_metadata(path: Path) -> dict[str, str]:
    """Return the strings in the header, without reading the tensors. Raises ValueError as `read` does."""
    with _opened(path) as file:
        return file.metadata() or {}


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write tensors and strings; PyTorch's readers take the file too."""
    path.write_bytes(safetensors.numpy.save(dict(tensors), metadata={"format": "pt", **metadata}))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}.") from error
    except (AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} holds tensors of a type that NumPy does not have: {error}.") from error
