"""Checkpoint files: which format a path has, and reading and writing each of them.

.pth .pt .bin   PyTorch's archive: a plain state dict, or a training checkpoint that holds one; .bin is only read
.safetensors    PyTorch's names and layout, the configuration in the metadata
a directory     an Orbax checkpoint: Flax's names and layout in `params/`, the configuration in `config.json`

The configuration of AnyUp holds fields of `AnyUpConfig`; that of an encoder is {"encoder": name}.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from anyup_core.checkpoints import run_directory, torch_file, unwrapping
from anyup_core.checkpoints.checkpoint import Checkpoint
from anyup_core.checkpoints.encoder_checkpoint import EncoderCheckpoint, any_of, architectures

TORCH, SAFETENSORS, ORBAX = "torch", "safetensors", "orbax"
SUFFIXES = {".pth": TORCH, ".pt": TORCH, ".safetensors": SAFETENSORS}
READ_ONLY = {".bin": TORCH}
FOREIGN = (".ckpt", ".h5", ".json", ".msgpack", ".npy", ".npz", ".onnx", ".pkl", ".tar", ".zip")
METADATA_KEY = "anyup_config"  # in the metadata of a .safetensors file
ENCODER_KEY = "encoder"  # in the metadata and in config.json, with the name of the encoder


def format_of(path: str | Path) -> str:
    """Return the format of a path: by its suffix, and a directory (or a path without a known suffix) is Orbax.

    Raises ValueError for the suffixes of other formats.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in FOREIGN:
        raise ValueError(f"{path} has the suffix {suffix}; use {', '.join(SUFFIXES)}, or a directory for Orbax.")
    return ORBAX if path.is_dir() else (SUFFIXES | READ_ONLY).get(suffix, ORBAX)


def read(path: str | Path, *, kind: str | None = None, item: str = run_directory.PARAMS) -> Checkpoint:
    """Read a checkpoint of any format; `kind` names the format where the path does not tell it.

    Of a run of `train` it is the newest step; `item` is "params", or "ema" for the average of them.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if the file is damaged, holds an encoder, or other tensors than one AnyUp model (all faults are
            listed).
    """
    kind = kind or format_of(path)
    tensors, config = read_tensors(path, kind=kind, item=item)
    if ENCODER_KEY in config:
        raise ValueError(_not_anyup(path, [config[ENCODER_KEY]]))
    try:
        return (Checkpoint.from_flax if kind == ORBAX else Checkpoint)(tensors, config)
    except ValueError as error:
        fitting = [] if kind == ORBAX else architectures(tensors)
        raise ValueError(_not_anyup(path, fitting) if fitting else f"{path}: {error}") from error


def _not_anyup(path: str | Path, encoders: list[str]) -> str:
    first = encoders[0]
    return (
        f"{path} holds the weights of an encoder, {any_of(encoders)}, and not of AnyUp; load it with "
        f'anyup_jax.encoders.create("{first}", weights=...), or convert it with python -m convert --timm {first}.'
    )


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the configuration that a checkpoint carries, without reading its weights; a state dict has none.

    Raises as `read_tensors` does.
    """
    path, kind = _existing(path, None)
    if kind == ORBAX:
        return _orbax_config(path)
    return _safetensors_config(path) if kind == SAFETENSORS else {}


def read_tensors(
    path: str | Path, *, kind: str | None = None, item: str = run_directory.PARAMS
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return what a file holds, in its own names and layout, and the configuration it carries; nothing is checked."""
    path, kind = _existing(path, kind)
    if item != run_directory.PARAMS and not (path / item).is_dir():
        raise ValueError(f"{path} has no {item}/; only runs with optimizer.ema_decay keep an average.")
    if kind == ORBAX:
        return _read_orbax(path, item)
    if kind == TORCH:
        return unwrapping.unwrap(torch_file.read(path), path)
    return _read_safetensors(path)


def _existing(path: str | Path, kind: str | None) -> tuple[Path, str]:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    kind = kind or format_of(path)
    if kind != ORBAX and not path.is_file():
        raise ValueError(f"{path} is no regular file.")
    if kind == ORBAX and not is_orbax(path):
        path = run_directory.step_directory(path) or path
    return path, kind


def write(path: str | Path, checkpoint: Checkpoint | EncoderCheckpoint, *, overwrite: bool = False) -> Path:
    """Write a checkpoint in the format of the path, under a temporary name that is then renamed.

    A .pth or .pt file holds the state dict only, so that `load_state_dict(strict=True)` takes it; the other formats
    carry `checkpoint.config`.

    Raises:
        FileExistsError: if something is there, unless it is a checkpoint of this format and `overwrite` is given.
        FileNotFoundError: if the parent directory does not exist.
        PermissionError: if the parent directory is not writable.
        ValueError: for the suffix of a format that is not written.
    """
    path, kind = Path(path), format_of(path)
    check_destination(path, overwrite=overwrite)
    with _temporary(path) as temporary:
        if kind == TORCH:
            torch_file.write(temporary, checkpoint.tensors)
        elif kind == SAFETENSORS:
            config = checkpoint.config
            carried = config if isinstance(checkpoint, EncoderCheckpoint) else {METADATA_KEY: _to_json(config)}
            temporary.write_bytes(safetensors.numpy.save(checkpoint.tensors, metadata={"format": "pt"} | carried))
        else:
            _write_orbax(temporary, checkpoint)
    return path


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with _open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    tensors, _ = unwrapping.unwrap(tensors, path)
    return tensors, _safetensors_config(path)


def _safetensors_config(path: Path) -> dict[str, Any]:
    with _open_safetensors(path) as file:
        metadata = file.metadata() or {}
    if ENCODER_KEY in metadata:
        return {ENCODER_KEY: metadata[ENCODER_KEY]}
    return _from_json(metadata.get(METADATA_KEY, "{}"), f"the metadata of {path}")


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}.") from error


def _read_orbax(path: Path, item: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    config = _orbax_config(path)
    return dict(flatten(read_tree(path / item))), config


def read_tree(path: Path) -> dict[str, Any]:
    """Return the arrays that Orbax wrote, in nested dictionaries.

    Raises:
        ValueError: if something is missing or damaged.
        ImportError: without jax and orbax-checkpoint.
    """
    checkpointer = orbax()
    import jax

    where = path.absolute()
    handler = checkpointer.PyTreeCheckpointHandler()  # a Checkpointer would warn that a run's items lack metadata
    try:
        as_numpy = jax.tree.map(
            lambda _: checkpointer.RestoreArgs(restore_type=np.ndarray), handler.metadata(where).tree
        )
        return handler.restore(where, args=checkpointer.args.PyTreeRestore(restore_args=as_numpy))
    except (ValueError, KeyError, OSError, AttributeError) as error:
        raise ValueError(f"{path} is incomplete or damaged: {error}") from error
    finally:
        handler.close()


def _orbax_config(path: Path) -> dict[str, Any]:
    if run_directory.step_directory(path) == path:
        return run_directory.config(path)
    if not is_orbax(path):
        raise ValueError(
            f"{path} is no Orbax checkpoint of AnyUp or of an encoder, and no run of train.run: it must be a directory "
            "with config.json and params/, or a run's output_dir with checkpoints/STEP/."
        )
    config = _from_json((path / "config.json").read_text(), f"{path / 'config.json'}")
    if not isinstance(config.get(ENCODER_KEY, ""), str):
        raise ValueError(f"{path / 'config.json'} names the encoder {config[ENCODER_KEY]!r}, which is no name.")
    return config


def _write_orbax(path: Path, checkpoint: Checkpoint | EncoderCheckpoint) -> None:
    checkpointer = orbax()
    nested: dict[str, Any] = {}
    for name, array in checkpoint.flax().items():
        *parents, leaf = name.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    path.mkdir()
    (path / "config.json").write_text(_to_json(checkpoint.config))
    with checkpointer.PyTreeCheckpointer() as writer:
        writer.save(path.absolute() / "params", nested)


def is_orbax(path: Path) -> bool:
    return (path / "config.json").is_file() and (path / "params").is_dir()


def orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError(
            "Orbax directories need jax and orbax-checkpoint; install them, or convert to .safetensors where they are."
        ) from error
    return orbax.checkpoint


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", np.asarray(value)


def _to_json(config: Mapping[str, Any]) -> str:
    return json.dumps(dict(config), indent=2) + "\n"


def _from_json(text: str, origin: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{origin} holds no configuration: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{origin} holds no configuration: it must be a JSON object.")
    return config


def check_destination(path: str | Path, *, overwrite: bool = False) -> None:
    """Raise as `write` does if a checkpoint may not be written there."""
    path, kind = Path(path), format_of(path)
    if path.suffix.lower() in READ_ONLY:
        raise ValueError(f"{path} has the suffix {path.suffix}, which is only read; use {', '.join(SUFFIXES)}.")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: the directory {parent} does not exist.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: the directory {parent} is not writable.")
    if not path.exists():
        return
    if kind == ORBAX and not is_orbax(path):
        what = "a directory that is no Orbax checkpoint" if path.is_dir() else "a file"
        raise FileExistsError(f"{path} is {what} and stays as it is; choose another name.")
    if not overwrite:
        raise FileExistsError(f"{path} exists already; choose another name, or allow overwriting it (--overwrite).")


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Give a path in a temporary sibling directory, and rename what was written there to `path`."""
    directory = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
    try:
        yield directory / path.name
        replaced = path.rename(directory / "replaced") if path.is_dir() else None
        try:
            os.replace(directory / path.name, path)
        except OSError:
            if replaced is not None:
                replaced.rename(path)
            raise
    finally:
        shutil.rmtree(directory, ignore_errors=True)
