"""Reads and writes PyTorch's checkpoint files (.pth, .pt) with numpy: no torch, and no code of the file is executed.

A file is an uncompressed zip archive: `data.pkl` describes containers and tensors, `data/<key>` is the memory of one
storage, and a tensor is an offset, a shape and strides within a storage. Files of PyTorch before 1.6 are read too.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import itertools
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from anyup_core.checkpoints import pickle_reader, pickle_writer, torch_legacy_file

STORAGES = {
    f"{name}Storage": np.dtype(kind)
    for name, kind in (
        *(("Float", np.float32), ("Double", np.float64), ("Half", np.float16), ("BFloat16", ml_dtypes.bfloat16)),
        *(("Long", np.int64), ("Int", np.int32), ("Short", np.int16), ("Char", np.int8), ("Byte", np.uint8)),
        *(("Bool", np.bool_), ("ComplexFloat", np.complex64), ("ComplexDouble", np.complex128)),
    )
}
UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage")
DTYPES = {
    **{f"torch.{dtype.name}": dtype for dtype in STORAGES.values()},
    **{f"torch.{name}": np.dtype(name) for name in ("uint16", "uint32", "uint64")},
    "torch.float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "torch.float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
ROOT = "archive"  # the directory within the archives written here
ALIGNMENT = 64  # of every storage's first byte, as torch.save writes it
RESAVE = (
    "Where the file's own classes can be imported and its origin is trusted, keep only the weights: "
    'torch.save(torch.load(path, weights_only=False)["anyup"], "weights.pth").'
)


@dataclasses.dataclass(frozen=True)
class Storage:
    """A run of memory: its bytes, and the type of its elements where the pickle says it."""

    key: str
    data: bytes
    dtype: np.dtype | None


def read(path: Path) -> Any:
    """Return what the file holds: plain containers, and tensors as read-only arrays (views of the storages).

    Raises:
        ValueError: if the file is no such checkpoint, is damaged, or holds more than tensors and plain data.
    """
    content = path.read_bytes()
    try:
        if content.startswith(torch_legacy_file.MAGIC):
            pickle, memory = torch_legacy_file.split(content, CONSTRUCTORS, STORAGES)
            return _load(pickle, memory.__getitem__)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return _read_archive(archive)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} {_what_it_is(content, error)}") from error
    except pickle_reader.ForbiddenGlobal as error:
        raise ValueError(f"{path} is refused: {error}, and nothing in it was executed. {RESAVE}") from error
    except (ValueError, EOFError, NotImplementedError, RuntimeError, struct.error) as error:
        raise ValueError(f"{path} cannot be read as a PyTorch checkpoint: {error}") from error


def _what_it_is(content: bytes, error: Exception) -> str:
    if content[257:262] == b"ustar":
        return (
            "is a tar archive, as the first versions of PyTorch wrote them. "
            "Load it with torch.load and save it again with torch.save."
        )
    if content.startswith(b"PK"):
        return f"is truncated or damaged ({error}). Fetch or copy it again."
    return "is no PyTorch checkpoint: it does not start as a zip archive does."


def _read_archive(archive: zipfile.ZipFile) -> Any:
    names = archive.namelist()
    if len(set(names)) < len(names):
        raise ValueError("two of its records have the same name")
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"it holds {len(pickles)} records named data.pkl instead of one")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in names and (order := _record(archive, f"{root}byteorder")) != b"little":
        raise ValueError(
            f"its byte order is {order[:8].decode('ascii', 'replace')}; save it on a little-endian machine"
        )
    return _load(_record(archive, pickles[0]), lambda key: _record(archive, f"{root}data/{key}"))


def _load(pickle: bytes, memory: Callable[[str], bytes]) -> Any:
    """Return the object of a pickle, given the memory of each storage by its key."""
    memory = functools.cache(memory)

    def storage(reference: Any) -> Storage:
        match reference:
            case ("storage", pickle_reader.Global(kind), str(key), str(), int(count), *rest) if rest in ([], [None]):
                pass
            case _:
                raise ValueError("it refers to something that is no storage")
        if kind not in UNTYPED and kind.removeprefix("torch.") not in STORAGES:
            raise pickle_reader.ForbiddenGlobal(kind)
        dtype, data = STORAGES.get(kind.removeprefix("torch.")), memory(key)
        size = count * (1 if dtype is None else dtype.itemsize)
        if not 0 <= size <= len(data):
            raise ValueError(f"storage {key} should have {size} bytes and has {len(data)}")
        return Storage(key, data, dtype)

    return pickle_reader.loads(pickle, CONSTRUCTORS, storage)


def _record(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise ValueError(f"its record {name} is missing") from None
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"its record {name} is compressed, which torch.save never does")
    return archive.read(info)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *options: Any) -> np.ndarray:
    """View a storage as a tensor, after checking that every element lies within.

    `_rebuild_tensor_v3` names the type among its options; the older functions take that of the storage.
    """
    types = [DTYPES.get(option.name) for option in options if isinstance(option, pickle_reader.Global)]
    dtype = types[0] if types else getattr(storage, "dtype", None)
    if not isinstance(storage, Storage) or dtype is None:
        raise ValueError("a tensor has no storage or no type")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in numbers):
        raise ValueError(f"a tensor in storage {storage.key} has impossible strides")
    if 0 in shape:
        return np.empty(shape, dtype)
    elements = len(storage.data) // dtype.itemsize
    if math.prod(shape) > elements:
        raise ValueError(
            f"a tensor of shape {shape} has more elements than its storage {storage.key}, which holds {elements}; "
            "save tensor.contiguous() instead of an expanded tensor"
        )
    strides = [stride if size > 1 else 0 for size, stride in zip(shape, strides)]
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
    if last >= elements:
        raise ValueError(f"a tensor needs number {last} of storage {storage.key}, which holds {elements}")
    return np.ndarray(shape, dtype, storage.data, offset * dtype.itemsize, [x * dtype.itemsize for x in strides])


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"it encodes bytes as {encoding!r} instead of latin1")
    return text.encode("latin1")


CONSTRUCTORS: dict[str, Any] = {
    **dict.fromkeys((f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")), _tensor),
    "torch._utils._rebuild_parameter": lambda data, *_state: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_state: data,
    "torch.Size": tuple,
    "torch.device": lambda kind, index=None: kind if index is None else f"{kind}:{int(index)}",
    "_codecs.encode": _encode,
    "builtins.bytes": lambda: b"",
    "builtins.complex": lambda real, imag: complex(float(real), float(imag)),
    **dict.fromkeys((*UNTYPED, *DTYPES, *(f"torch.{name}" for name in STORAGES))),  # constants
}


def write(path: Path, content: Mapping[Any, Any]) -> None:
    """Write a state dict, or another dict of plain data and arrays, that `torch.load(weights_only=True)` reads.

    Arrays become contiguous CPU tensors, each with a storage of its own, and the outermost dict an OrderedDict. The
    same content always gives the same bytes.

    Raises:
        ValueError: for a number type that PyTorch has no storage for.
        TypeError: for what is no plain data.
    """
    kinds = {dtype: name for name, dtype in STORAGES.items()}
    tensors = pickle_writer.tensors(content)
    unknown = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in kinds]
    if unknown:
        listed = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if unknown[3:] else "")
        raise ValueError(f"PyTorch has no storage type for {listed}.")
    numbers = itertools.count()
    pickle = pickle_writer.dumps(collections.OrderedDict(content), lambda tensor: (next(numbers), kinds[tensor.dtype]))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _store(archive, f"{ROOT}/data.pkl", pickle)
        _store(archive, f"{ROOT}/byteorder", b"little")
        for index, tensor in enumerate(tensors.values()):
            _store(archive, f"{ROOT}/data/{index}", tensor.tobytes())
        _store(archive, f"{ROOT}/version", b"3\n")


def _store(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Add a record whose first byte is aligned, by padding the header with an extra field."""
    info = zipfile.ZipInfo(name)  # dated 1980: the same tensors give the same file
    header = archive.start_dir + 30 + len(name.encode()) + 4
    padding = -header % ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)
    archive.writestr(info, data)
