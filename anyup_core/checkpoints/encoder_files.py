"""Where the weights of encoders come from: files, the packages of the package index, timm, the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from anyup_core.checkpoints import fetching, formats
from anyup_core.checkpoints.encoder_checkpoint import EncoderCheckpoint
from anyup_core.encoders import catalogue

HUB = "https://huggingface.co"  # or the environment variable HF_ENDPOINT


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
        return read(Path(weights).expanduser(), name)
    if name in catalogue.PACKAGED:
        from anyup_core.checkpoints import packaged

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
            name = _agreed(name, config[formats.ENCODER_KEY])
        elif kind == formats.ORBAX:
            raise ValueError(
                "this is no encoder's checkpoint, its config.json names none; anyup_jax.from_pretrained loads AnyUp's."
            )
        return (EncoderCheckpoint.from_flax if kind == formats.ORBAX else EncoderCheckpoint)(name, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def fetch(name: str) -> Path:
    """Return the file of an encoder's published weights, fetching it first unless the cache has it.

    Raises:
        ConnectionError: if it cannot be fetched; the message says which file to put where.
        ValueError: if what arrived is not the weights of this encoder.
    """
    full = catalogue.find(name).full_name
    path = fetching.cache_directory() / "encoders" / f"{full}.safetensors"
    return fetching.obtain(address(name), path, lambda part: read(part, name, kind=formats.SAFETENSORS))


def address(name: str) -> str:
    """Return where the published weights of an encoder are."""
    endpoint = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    return f"{endpoint}/{catalogue.find(name).repository}/resolve/main/model.safetensors"


def from_timm(name: str) -> EncoderCheckpoint:
    """Return the pretrained weights as timm itself loads them; the packaged ones from their packages.

    Raises:
        ValueError: for an unknown name.
        ImportError: if timm, or the package that holds the weights, is not installed.
        ConnectionError: if timm cannot fetch the weights; the message says what to do.
    """
    if name in catalogue.PACKAGED:
        return load(name)
    full = catalogue.find(name).full_name
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ImportError(
            f"The weights of {full} are fetched by timm, and {error.name} is not installed: "
            'pip install "anyup-jax[torch]", or give a local file with --weights FILE.'
        ) from error
    try:
        state = timm.create_model(full, pretrained=True).state_dict()
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConnectionError(
            f"timm could not fetch the weights of {full} ({reason}); fetch {address(name)} by other means and give it "
            "with --weights FILE."
        ) from error
    return EncoderCheckpoint(full, {key: value.numpy() for key, value in state.items()})


def _agreed(name: str, carried: str) -> str:
    """Return the name that a file carries, if it is the one asked for or adds the tag to it."""
    asked, found = catalogue.find(name), catalogue.find(carried)
    same = asked.full_name == found.full_name if "." in name else asked.architecture == found.architecture
    if not same:
        raise ValueError(f"These are the weights of {carried}, not of {name}.")
    return carried
