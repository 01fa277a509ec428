"""Takes apart the checkpoint files that PyTorch wrote before version 1.6; `torch_file` reads what is in them.

Such a file is a run of pickles (a magic number, the version of the format, facts of the machine, the object, the keys
of the storages) and then, in the order of the keys, the number of elements of each storage and its memory.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from anyup_core.checkpoints import pickle_reader

MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # the first pickle, but for its last byte


def split(
    content: bytes, constructors: Mapping[str, Callable[..., Any] | None], dtypes: Mapping[str, np.dtype]
) -> tuple[bytes, dict[str, bytes]]:
    """Return the pickle of the object, and the memory of every storage by its key.

    Args:
        content: the file.
        constructors: as for `pickle_reader.loads`.
        dtypes: name of a storage class, without `torch.` -> type of its elements.

    Raises:
        ForbiddenGlobal: if the object is no plain data.
        ValueError: if the file is damaged, or of a big-endian machine.
    """
    stream = io.BytesIO(content)
    _, _, machine = (pickle_reader.loads(stream, {}, _refuse) for _ in range(3))
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("its byte order is big; save it on a little-endian machine")
    kinds: dict[str, np.dtype] = {}

    def note(reference: Any) -> None:
        match reference:
            case ("storage", pickle_reader.Global(kind), str(key), *_) if kind.removeprefix("torch.") in dtypes:
                kinds[key] = dtypes[kind.removeprefix("torch.")]

    blank = {name: (lambda *_: None) if "_rebuild_" in name else make for name, make in constructors.items()}
    start = stream.tell()
    pickle_reader.loads(stream, blank, note)  # once for the storages, whose memory comes later
    pickle = content[start : stream.tell()]
    order = pickle_reader.loads(stream, {}, _refuse)
    if not isinstance(order, list) or sorted(map(str, order)) != sorted(kinds):
        raise ValueError("it holds other storages than its object refers to")
    memory = {}
    for key in order:
        (count,) = struct.unpack("<q", stream.read(8))
        size = count * kinds[key].itemsize
        if not 0 <= size <= len(content) - stream.tell():
            raise ValueError(f"storage {key} should hold {count} elements, which the file does not")
        memory[key] = stream.read(size)
    return pickle, memory


def _refuse(reference: Any) -> None:
    raise ValueError(f"it refers to {reference!r} where plain data is expected")
