"""Checkpoint files: which format a path has; a module for each format reads and writes it.

.pth .pt .bin   PyTorch's archive: a plain state dict, or a training checkpoint that holds one; .bin is only read
.safetensors    PyTorch's names and layout, the configuration in the metadata
a directory     an Orbax checkpoint: Flax's names and layout in `params/`, the configuration in `config.json`
                or a folder of the hub: `model.safetensors`, and the configuration in `config.json`; AnyUp only

The configuration of AnyUp holds fields of `AnyUpConfig`; that of an encoder is {"encoder": name}.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from anyup_core.checkpoints import (
    hub_folder,
    orbax_directory,
    run_directory,
    safetensors_file,
    torch_file,
    unwrapping,
)
from anyup_core.checkpoints.checkpoint import Checkpoint, warn_unless_finite
from anyup_core.checkpoints.encoder_checkpoint import EncoderCheckpoint, any_of, architectures
from anyup_core.config import AnyUpConfig
from anyup_core.encoders import catalogue
from anyup_core.replacement import replacing
from anyup_core.upsamplers import catalogue as upsamplers
from anyup_core.upsamplers.checkpoint import KEY as UPSAMPLER_KEY
from anyup_core.upsamplers.checkpoint import UpsamplerCheckpoint, recognise
from anyup_core.upsamplers.checkpoint import unwrap as wrapped_state

TORCH, SAFETENSORS, ORBAX, HUB = "torch", "safetensors", "orbax", "hub"
DIRECTORIES = (ORBAX, HUB)
SUFFIXES = {".pth": TORCH, ".pt": TORCH, ".safetensors": SAFETENSORS}
READ_ONLY = {".bin": TORCH}
FOREIGN = (".ckpt", ".h5", ".json", ".msgpack", ".npy", ".npz", ".onnx", ".pkl", ".tar", ".zip")
METADATA_KEY = "anyup_config"  # in the metadata of a .safetensors file
UPSAMPLER_METADATA_KEY = "upsampler_config"
ENCODER_KEY = "encoder"  # in the metadata and in config.json, with the name of the encoder


def format_of(path: str | Path) -> str:
    """Return the format of a path: by its suffix, and a directory (or a path without a known suffix) is Orbax.

    A directory with `model.safetensors` is a folder of the hub.

    Raises ValueError for the suffixes of other formats.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in FOREIGN:
        raise ValueError(f"{path} has the suffix {suffix}; use {', '.join(SUFFIXES)}, or a directory for Orbax.")
    if path.is_dir():
        return HUB if hub_folder.is_hub_folder(path) else ORBAX
    return (SUFFIXES | READ_ONLY).get(suffix, ORBAX)


def read(path: str | Path, *, kind: str | None = None, item: str = run_directory.PARAMS) -> Checkpoint:
    """Read a checkpoint of any format; `kind` names the format where the path does not tell it.

    Weights that are NaN or infinite are logged.

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
    if UPSAMPLER_KEY in config:
        raise ValueError(_not_anyup_but(path, config[UPSAMPLER_KEY]))
    try:
        checkpoint = (Checkpoint.from_flax if kind == ORBAX else Checkpoint)(tensors, config)
        warn_unless_finite(checkpoint.tensors, Path(path))
        return checkpoint
    except ValueError as error:
        if kind in (TORCH, SAFETENSORS) and (other := _upsampler(path, kind)):
            raise ValueError(_not_anyup_but(path, other)) from error
        fitting = [] if kind == ORBAX else architectures(tensors)
        raise ValueError(_not_anyup(path, fitting) if fitting else f"{path}: {error}") from error


def _upsampler(path: str | Path, kind: str) -> str | None:
    """Return the name of the upsampler whose weights a file holds, with all prefixes of their names."""
    saved = torch_file.read(Path(path)) if kind == TORCH else safetensors_file.read(Path(path))
    with contextlib.suppress(ValueError):
        return recognise(wrapped_state(saved, upsamplers.ENTRIES))
    return None


def _not_anyup_but(path: str | Path, method: str) -> str:
    call = f'upsamplers.from_pretrained("{method}", ...)'
    options = f"load it with {call}, or convert it with --upsampler {method}"
    return f"{path} holds the weights of {method}, not of AnyUp; {options}."


def _not_anyup(path: str | Path, encoders: list[str]) -> str:
    first = encoders[0]
    return (
        f"{path} holds the weights of an encoder, {any_of(encoders)}, and not of AnyUp; load it with "
        f'anyup_jax.encoders.create("{first}", weights=...), or convert it with python -m convert --timm {first}.'
    )


def read_config(path: str | Path, *, kind: str | None = None) -> dict[str, Any]:
    """Return the configuration that a checkpoint carries, without reading its weights; a state dict has none.

    Raises as `read_tensors` does.
    """
    return _config(*_existing(path, kind))


def read_tensors(
    path: str | Path, *, kind: str | None = None, item: str = run_directory.PARAMS
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return what a file holds, in its own names and layout, and the configuration it carries; nothing is checked."""
    path, kind = _existing(path, kind)
    if item != run_directory.PARAMS and not (path / item).is_dir():
        raise ValueError(f"{path} has no {item}/; only runs with optimizer.ema_decay keep an average.")
    config = _config(path, kind)
    if kind == TORCH:
        return unwrapping.unwrap(torch_file.read(path), path)
    if kind == SAFETENSORS:
        return unwrapping.unwrap(safetensors_file.read(path), path)[0], config
    if kind == HUB:
        return safetensors_file.read(path / hub_folder.WEIGHTS), config
    return orbax_directory.read_tree(path / item), config


def _existing(path: str | Path, kind: str | None) -> tuple[Path, str]:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    kind = kind or format_of(path)
    if kind not in DIRECTORIES and not path.is_file():
        raise ValueError(f"{path} is no regular file.")
    if kind == ORBAX and not is_orbax(path):
        path = run_directory.step_directory(path) or path
    return path, kind


def write(
    path: str | Path,
    checkpoint: Checkpoint | EncoderCheckpoint | UpsamplerCheckpoint,
    *,
    overwrite: bool = False,
    kind: str | None = None,
    card: str | None = None,
) -> Path:
    """Write a checkpoint in the format of the path; it takes the place of what is there once it is complete.

    A .pth or .pt file holds the state dict only, so that `load_state_dict(strict=True)` takes it; the other formats
    carry `checkpoint.config`.

    Args:
        path: the destination.
        checkpoint: what is written.
        overwrite: replace a checkpoint of this format.
        kind: HUB for a folder of the hub; otherwise the path tells the format.
        card: the text of that folder's model card.

    Raises:
        FileExistsError: if something is there, unless it is a checkpoint of this format and `overwrite` is given.
        FileNotFoundError: if the parent directory does not exist.
        PermissionError: if the parent directory is not writable.
        ValueError: for the suffix of a format that is not written, or a number type that it lacks.
    """
    check_destination(path, overwrite=overwrite, kind=kind)
    path, kind = Path(path), kind or format_of(path)
    config = json.dumps(checkpoint.config, indent=2) + "\n"
    with replacing(path) as temporary:
        if kind == TORCH:
            torch_file.write(temporary, checkpoint.tensors)
        elif kind == SAFETENSORS:
            key = UPSAMPLER_METADATA_KEY if isinstance(checkpoint, UpsamplerCheckpoint) else METADATA_KEY
            metadata = checkpoint.config if isinstance(checkpoint, EncoderCheckpoint) else {key: config}
            safetensors_file.write(temporary, checkpoint.tensors, metadata)
        elif kind == HUB:
            if not isinstance(checkpoint, Checkpoint):
                raise ValueError(f"{path}: a folder of the hub holds AnyUp, and this is {checkpoint.config}.")
            temporary.mkdir()
            (temporary / hub_folder.CONFIG).write_text(hub_folder.config_text(checkpoint.config))
            safetensors_file.write(temporary / hub_folder.WEIGHTS, checkpoint.tensors, {METADATA_KEY: config})
            if card is not None:
                (temporary / hub_folder.CARD).write_text(card, encoding="utf-8")
        else:
            temporary.mkdir()
            (temporary / "config.json").write_text(config)
            orbax_directory.write_tree(temporary / "params", checkpoint.flax())
            orbax_directory.write_checkpoint_metadata(temporary / "params", orbax_directory.TREE)
    return path


def _config(path: Path, kind: str) -> dict[str, Any]:
    readers = {ORBAX: _orbax_config, SAFETENSORS: _safetensors_config, HUB: hub_folder.read_config}
    config = readers[kind](path) if kind in readers else {}
    try:
        if UPSAMPLER_KEY in config:
            settings = {name: value for name, value in config.items() if name != UPSAMPLER_KEY}
            upsamplers.find(config[UPSAMPLER_KEY]).config().replace(**settings)
        elif ENCODER_KEY in config:
            catalogue.find(config[ENCODER_KEY])
        else:
            AnyUpConfig().replace(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The configuration in {path} does not hold: {error}") from error
    return config


def _safetensors_config(path: Path) -> dict[str, Any]:
    metadata = safetensors_file.read_metadata(path)
    if ENCODER_KEY in metadata:
        return {ENCODER_KEY: " ".join(metadata[ENCODER_KEY].split())[:200]}  # no name is longer
    key = UPSAMPLER_METADATA_KEY if UPSAMPLER_METADATA_KEY in metadata else METADATA_KEY
    return run_directory.parse_json(metadata.get(key, "{}"), f"the metadata of {path}")


def _orbax_config(path: Path) -> dict[str, Any]:
    if run_directory.step_directory(path) == path:
        return run_directory.config(path)
    if not is_orbax(path):
        raise ValueError(
            f"{path} is no Orbax checkpoint of AnyUp or of an encoder, no folder of the hub, and no run of train.run: "
            "it must be a directory with config.json and params/ or model.safetensors, or a run's output_dir with "
            "checkpoints/STEP/."
        )
    config = run_directory.parse_json((path / "config.json").read_bytes(), str(path / "config.json"))
    if not isinstance(config.get(ENCODER_KEY, ""), str):
        raise ValueError(f"{path / 'config.json'} names the encoder {config[ENCODER_KEY]!r}, which is no name.")
    return config


def is_orbax(path: Path) -> bool:
    return (path / "config.json").is_file() and (path / "params").is_dir()


def check_destination(path: str | Path, *, overwrite: bool = False, kind: str | None = None) -> None:
    """Raise as `write` does if a checkpoint may not be written there."""
    path, kind = Path(path), format_of(path) if kind is None else kind
    if kind == HUB and path.suffix.lower() in (*SUFFIXES, *READ_ONLY, *FOREIGN):
        raise ValueError(f"{path} has the suffix {path.suffix} of a file; give a folder for {hub_folder.WEIGHTS}.")
    if path.suffix.lower() in READ_ONLY:
        raise ValueError(f"{path} has the suffix {path.suffix}, which is only read; use {', '.join(SUFFIXES)}.")
    parent = Path(os.path.realpath(path)).parent  # where `path` is a link, what is behind it is written
    if not parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: the directory {parent} does not exist.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: the directory {parent} is not writable.")
    if kind == HUB and path.exists():
        if not path.is_dir() or not hub_folder.holds_nothing_else(path):
            what = "a directory that holds other files" if path.is_dir() else "a file"
            raise FileExistsError(f"{path} is {what} and stays as it is; choose another name.")
        if not any(path.iterdir()):
            return
    if path.exists() and kind == ORBAX and not is_orbax(path):
        what = "a directory that is no Orbax checkpoint" if path.is_dir() else "a file"
        raise FileExistsError(f"{path} is {what} and stays as it is; choose another name.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already; choose another name, or allow overwriting it (--overwrite).")
