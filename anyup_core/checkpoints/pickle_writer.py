"""Writes pickles of plain data and tensors (protocol 2) that `torch.load(weights_only=True)` reads."""

from __future__ import annotations

import collections
import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from anyup_core.checkpoints.pickle_reader import Global


def dumps(value: Any, store: Callable[[np.ndarray], tuple[int, str]]) -> bytes:
    """Return the pickle of dicts, lists, tuples, numbers, strings, None and arrays, which become contiguous tensors.

    Args:
        value: the object; keys of dicts are strings or whole numbers.
        store: takes an array and returns the number and the class (of `torch`) of the storage that holds it all.

    Raises:
        TypeError: for anything that is not plain data.
    """
    file = io.BytesIO()
    _Writer(file, store).dump(value)
    return file.getvalue()


def tensors(value: Any, path: str = "") -> dict[str, np.ndarray]:
    """Return the arrays in an object by their dot-joined paths, in the order in which `dumps` stores them."""
    if isinstance(value, np.ndarray):
        return {path: value}
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    arrays: dict[str, np.ndarray] = {}
    for key, item in items:
        arrays |= tensors(item, f"{path}.{key}" if path else str(key))
    return arrays


_Pickler: Any = pickle._Pickler  # whose parts the type stubs do not know


class _Writer(_Pickler):
    """Python's pickler, which calls PyTorch's functions by name: the C form imports what it names."""

    def __init__(self, file: io.BytesIO, store: Callable[[np.ndarray], tuple[int, str]]):
        super().__init__(file, protocol=2)
        self.fast = True  # without references to what was written before: equal contents give equal bytes
        self.store = store

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        match obj:
            case Global():
                self.write(pickle.GLOBAL + "{}\n{}\n".format(*obj.name.rsplit(".", 1)).encode())
            case None | bool() | list() | tuple():
                super().save(obj)
            case int() | float() | str():  # also NumPy's
                super().save(next(kind for kind in (int, float, str) if isinstance(obj, kind))(obj))
            case np.ndarray():
                index, kind = self.store(obj)
                strides = tuple(int(np.prod(obj.shape[axis + 1 :], dtype=np.int64)) for axis in range(obj.ndim))
                self.save(Global("torch._utils._rebuild_tensor_v2"))
                self.write(pickle.MARK)
                self.save(("storage", Global(f"torch.{kind}"), str(index), "cpu", obj.size))
                self.write(pickle.BINPERSID)
                for item in (0, obj.shape, strides, False, collections.OrderedDict()):  # offset 0, without gradient
                    self.save(item)
                self.write(pickle.TUPLE + pickle.REDUCE)
            case Mapping():
                if wrong := [key for key in obj if not isinstance(key, str | int)]:
                    raise TypeError(f"A .pth file cannot hold the key {wrong[0]!r}; keys are strings or whole numbers.")
                super().save(obj if isinstance(obj, collections.OrderedDict) else dict(obj))
            case collections.OrderedDict:
                super().save(obj)
            case _:
                raise TypeError(f"A .pth file cannot hold a {type(obj).__name__}; give plain data and numpy arrays.")
