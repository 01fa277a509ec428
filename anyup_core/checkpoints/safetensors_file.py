"""Reads and writes .safetensors files with numpy: tensors, and a header of strings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}  # types that safetensors.numpy lacks


def read(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors by their names. Raises ValueError if the file is damaged, or has a type that NumPy lacks."""
    with _opened(path) as file:
        types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - it is no dict
        tensors = {name: file.get_tensor(name) for name, kind in types.items() if kind not in FLOAT8}
    if len(tensors) < len(types):
        for name, tensor in safetensors.deserialize(path.read_bytes()):
            if name not in tensors:
                tensors[name] = np.frombuffer(tensor["data"], FLOAT8[types[name]]).reshape(tensor["shape"])
    return tensors


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
