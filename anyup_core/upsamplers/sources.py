"""Where the weights of upsamplers come from: published names, files, training runs, the Hugging Face hub."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anyup_core.checkpoints import fetching, formats, hub, orbax_directory, run_directory, safetensors_file, torch_file
from anyup_core.checkpoints.checkpoint import warn_unless_finite
from anyup_core.paths import user_path
from anyup_core.upsamplers import catalogue
from anyup_core.upsamplers.checkpoint import KEY, UpsamplerCheckpoint, unwrap
from anyup_core.upsamplers.config import Published

SUFFIXES = {**formats.SUFFIXES, **formats.READ_ONLY, ".ckpt": formats.TORCH}


def load(
    method: str, source: str | os.PathLike, *, revision: str | None = None, file: str | None = None, **settings: Any
) -> UpsamplerCheckpoint:
    """Return the weights of an upsampler; a published name goes before a path, a path before a repository of the hub.

    Args:
        method: name of an upsampler that has weights.
        source: a published name, which is fetched once; the path of a .pth, .pt, .bin, .ckpt or .safetensors file or of
            an Orbax directory; or "org/name" on the hub.
        revision: branch, tag or commit of a repository of the hub.
        file: the weight file of that repository.
        settings: of the model, that the weights do not tell; and of the name, such as FeatUp's `use_norm`.

    Raises:
        ValueError: for an unknown name, a damaged file or weights that do not fit.
        TypeError: for settings that the method does not have.
        OSError: if there is no such file, or it cannot be fetched.
    """
    found = catalogue.find(method)
    options = {name: settings.pop(name) for name in name_options(found) if name in settings}
    found.config().replace(**settings)  # before anything is fetched
    on_hub = {name: value for name, value in dict(revision=revision, file=file).items() if value is not None}
    if isinstance(source, str) and not on_hub and (published := found.config.published(source, **options)):
        return _fetched(method, published, settings)
    if options:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise ValueError(f"{given} belongs to a published name, which {str(source)!r} is not; leave it out.")
    path = user_path(source)
    if path.exists() and not on_hub:
        return read(method, path, **settings)
    if isinstance(source, str) and path.suffix.lower() not in SUFFIXES and hub.is_name(source):
        return read(method, hub.fetch(source, file or "model.safetensors", revision), **settings)
    if on_hub:
        raise ValueError(f"{', '.join(on_hub)} belongs to a repository of the hub, which {str(source)!r} is not.")
    if isinstance(source, Path) or path.suffix.lower() in SUFFIXES or os.sep in str(source):
        raise FileNotFoundError(f"{path} does not exist.")
    names = ", ".join(found.config.published_names())
    raise ValueError(f"{source!r} is neither a path nor a published name of {method}; the names are {names}.")


def name_options(method: catalogue.Method) -> list[str]:
    """Return the settings that belong to a published name of a method rather than to the model."""
    return [name for name in inspect.signature(method.config.published).parameters if name not in ("name", "options")]


def checkpoint_settings(checkpoint: UpsamplerCheckpoint) -> dict[str, Any]:
    return {name: value for name, value in checkpoint.config.items() if name != KEY}


def _fetched(method: str, published: Published, settings: Mapping[str, Any]) -> UpsamplerCheckpoint:
    """Return published weights, from the cache or fetched into it. Raises ValueError if they are not what they must be.

    `ANYUP_RELEASES` stands for the address up to the last slash, as it does for AnyUp's own.
    """
    known = {} if published.channels is None else {"channels": published.channels}
    settings = {**published.settings, **known, **settings}
    if not published.address.startswith("https://"):
        repository, file = published.address.rsplit("/", 1)
        return read(method, hub.fetch(repository, file), **settings)
    address, file = published.address, published.address.rsplit("/", 1)[1]
    folder = "no_norm" if "/no_norm/" in address else ""
    if base := os.environ.get("ANYUP_RELEASES"):
        address = f"{base.rstrip('/')}/{method}/{f'{folder}/' if folder else ''}{file}"
    path = fetching.cache_directory() / method / folder / file
    obtained = fetching.obtain(address, path, lambda part: read(method, part, kind=formats.TORCH, **settings))
    return read(method, obtained, kind=formats.TORCH, **settings)


def read(method: str, path: Path, *, kind: str | None = None, **settings: Any) -> UpsamplerCheckpoint:
    """Read a file or a directory; `kind` names the format where the path does not tell it.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if the file is damaged, or holds other weights than this upsampler's (all faults are listed).
        TypeError: for settings that the method does not have.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    found = catalogue.find(method)
    kind = kind or SUFFIXES.get(path.suffix.lower()) or formats.format_of(path)
    try:
        if kind == formats.TORCH:
            checkpoint = UpsamplerCheckpoint(method, unwrap(torch_file.read(path), found.config.entries), settings)
        else:
            config = formats.read_config(path, kind=kind)
            if (other := config.get(KEY, method)) != method:
                raise ValueError(f"these are the weights of {other}, not of {method}.")
            known = {name: config[name] for name in config if name in found.config.__dataclass_fields__}
            if kind == formats.ORBAX:
                tree = orbax_directory.read_tree((run_directory.step_directory(path) or path) / run_directory.PARAMS)
                checkpoint = UpsamplerCheckpoint.from_flax(method, tree, {**known, **settings})
            else:
                file = path / formats.hub_folder.WEIGHTS if kind == formats.HUB else path
                tensors = unwrap(safetensors_file.read(file), ())
                checkpoint = UpsamplerCheckpoint(method, tensors, {**known, **settings})
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error
    warn_unless_finite(checkpoint.tensors, path)
    return checkpoint
