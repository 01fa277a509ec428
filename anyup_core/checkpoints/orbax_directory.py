"""Reads and writes the directories of Orbax with TensorStore: neither Orbax nor jax is imported.

A tree is a directory: `_METADATA` lists its leaves, and each leaf is a Zarr array of its dot-joined path in an OCDBT
key-value store. A checkpoint is a directory with `config.json` and the tree `params/`, in Flax's names and layout; a
step of a training run has several trees and JSON records (see `run_directory`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_HANDLERS = "orbax.checkpoint._src.handlers"
TREE = f"{_HANDLERS}.pytree_checkpoint_handler.PyTreeCheckpointHandler"
STANDARD = f"{_HANDLERS}.standard_checkpoint_handler.StandardCheckpointHandler"
RECORD = f"{_HANDLERS}.json_checkpoint_handler.JsonCheckpointHandler"

METADATA = "_METADATA"
EMPTY = ("None", "Dict", "List", "Tuple", "NamedTuple")  # types of leaves without an array


def read_tree(path: Path) -> dict[str, np.ndarray]:
    """Return dot-joined path -> array of the tree that Orbax, or `write_tree`, wrote.

    Raises:
        ValueError: if something is missing or damaged, or a leaf is no array of numbers.
    """
    import tensorstore

    try:
        metadata = json.loads((path / METADATA).read_text())
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        complete = bool(metadata.get("store_array_data_equal_to_fill_value"))
        names = [
            ".".join(str(key["key"]) for key in leaf["key_metadata"])
            for leaf in metadata["tree_metadata"].values()
            if leaf["value_metadata"]["value_type"] not in EMPTY
        ]
        context = tensorstore.Context()  # one cache for the store that all arrays are in
        stores = [
            tensorstore.open(
                {
                    "driver": driver,
                    "kvstore": _key_value_store(path, name, ocdbt=bool(metadata.get("use_ocdbt", True))),
                    # a chunk that is not there is damage, unless zeros were left out when it was written
                    "fill_missing_data_reads": not complete,
                },
                open=True,
                context=context,
            )
            for name in names
        ]
        arrays = [store.result().read() for store in stores]
        return {name: np.asarray(array.result()) for name, array in zip(names, arrays)}
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        reason = str(error).partition(" [")[0] or type(error).__name__
        raise ValueError(f"{path} is incomplete or damaged: {reason}") from error


def write_tree(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write dot-joined path -> array as a tree that Orbax restores as nested dictionaries; the directory is made.

    Raises:
        OSError: if it cannot be written.
    """
    import tensorstore

    path.mkdir()
    context = tensorstore.Context()  # one store for all arrays, committed at once: a few files instead of hundreds
    try:
        with tensorstore.Transaction() as transaction:
            for name, array in arrays.items():
                spec = {
                    "driver": "zarr",
                    "kvstore": _key_value_store(path, name, ocdbt=True),
                    "metadata": {
                        "shape": list(array.shape),
                        "chunks": [max(1, size) for size in array.shape],
                        "compressor": {"id": "zstd", "level": 1},
                    },
                    "dtype": array.dtype.name,
                    "store_data_equal_to_fill_value": True,
                }
                store = tensorstore.open(spec, create=True, context=context, transaction=transaction).result()
                store.write(array).result()
    except ValueError as error:  # TensorStore's way to report what the disk refuses
        raise OSError(f"{path} could not be written: {error}") from error
    leaves = {
        str(tuple(name.split("."))): {
            "key_metadata": [{"key": key, "key_type": 2} for key in name.split(".")],  # 2: of a dictionary
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for name in arrays
    }
    options = {"use_ocdbt": True, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    (path / METADATA).write_text(json.dumps({"tree_metadata": leaves, **options, "custom_metadata": None}))


def write_checkpoint_metadata(path: Path, handlers: str | dict[str, str]) -> None:
    """Say how Orbax restores the directory `path`: by one handler, or each of its items by one.

    Args:
        path: of the directory, complete but for this.
        handlers: one of TREE, STANDARD and RECORD, or item -> one of them.
    """
    now = time.time_ns()
    times = {"init_timestamp_nsecs": now, "commit_timestamp_nsecs": now}
    nothing = {"metrics": {}, "performance_metrics": {}, "custom_metadata": {}}
    (path / "_CHECKPOINT_METADATA").write_text(json.dumps({"item_handlers": handlers, **times, **nothing}))


def _key_value_store(path: Path, name: str, *, ocdbt: bool) -> dict[str, Any]:
    if ocdbt:
        return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path.absolute()}/"}, "path": f"{name}/"}
    return {"driver": "file", "path": f"{path.absolute() / name}/"}
