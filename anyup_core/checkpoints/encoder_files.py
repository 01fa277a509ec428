"""Where the weights of encoders come from: files, the packages of the package index, the Hugging Face hub."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from anyup_core.checkpoints import fetching, formats, packaged
from anyup_core.checkpoints.checkpoint import warn_unless_finite
from anyup_core.checkpoints.encoder_checkpoint import EncoderCheckpoint
from anyup_core.encoders import catalogue
from anyup_core.paths import user_path


def load(name: str, weights: str | os.PathLike | None = None) -> EncoderCheckpoint:
    """Return the weights of an encoder: from a file where `weights` gives one, else the published ones.

    These are in a package of the package index (`efficientnet_lite0`, `1` and `2`), or are fetched once from the hub.

    Raises:
        ValueError: for an unknown name, a damaged file, or weights that do not fit.
        ImportError: if the package that holds the weights is not installed.
        OSError: if there is no such file, or it cannot be fetched.
    """
    catalogue.find(name)
    if weights is not None:
        return read(user_path(weights), name)
    if name in catalogue.PACKAGED:
        return EncoderCheckpoint(name, packaged.read(name))
    return read(fetch(name), name)


def read(path: Path, name: str, *, kind: str | None = None) -> EncoderCheckpoint:
    """Read a file with timm's state dict, or an Orbax directory.

    Args:
        path: of a .safetensors, .pth, .pt or .bin file, or of a directory.
        name: of the encoder. A file that knows its own name must agree; it may add the tag.
        kind: the format, where the path does not tell it.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if the file is damaged, or holds other weights than this encoder's (all faults are listed).
    """
    kind = kind or formats.format_of(path)
    tensors, config = formats.read_tensors(path, kind=kind)
    try:
        if formats.ENCODER_KEY in config:
            asked, in_file = catalogue.find(name), catalogue.find(config[formats.ENCODER_KEY])
            if asked.architecture != in_file.architecture or ("." in name and asked.full_name != in_file.full_name):
                raise ValueError(f"These are the weights of {config[formats.ENCODER_KEY]}, not of {name}.")
            name = config[formats.ENCODER_KEY]
        elif kind == formats.ORBAX:
            raise ValueError(
                "this is no encoder's checkpoint, its config.json names none; anyup_jax.from_pretrained loads AnyUp's."
            )
        checkpoint = (EncoderCheckpoint.from_flax if kind == formats.ORBAX else EncoderCheckpoint)(name, tensors)
        warn_unless_finite(checkpoint.tensors, path)
        return checkpoint
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def fetch(name: str) -> Path:
    """Return the file of an encoder's published weights: ours, that in the hub's own cache, or else fetch it.

    Raises:
        ConnectionError: if it cannot be fetched, or `HF_HUB_OFFLINE` forbids it; the message says which file to put
            where.
        ValueError: if what arrived is not the weights of this encoder.
    """
    published = catalogue.find(name)
    path = fetching.cache_directory() / "encoders" / f"{published.full_name}.safetensors"
    if path.exists():
        return path
    with contextlib.suppress(ImportError):
        import huggingface_hub

        cached = huggingface_hub.try_to_load_from_cache(published.repository, "model.safetensors")
        if isinstance(cached, str):
            return Path(cached)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ConnectionError(
            f"{address(name)} is in no cache, and HF_HUB_OFFLINE is set. Fetch it by other means and put it at {path}."
        )
    return fetching.obtain(address(name), path, lambda part: read(part, name, kind=formats.SAFETENSORS))


def address(name: str) -> str:
    """Return where the published weights of an encoder are."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    return f"{endpoint}/{catalogue.find(name).repository}/resolve/main/model.safetensors"
