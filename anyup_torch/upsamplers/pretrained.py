"""Upsamplers with published or converted weights."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from anyup_core.upsamplers import catalogue, sources
from anyup_core.upsamplers.checkpoint import UpsamplerCheckpoint
from anyup_torch.upsamplers.protocol import Upsampler


def from_pretrained(
    method: str,
    source: str | os.PathLike | None = None,
    *,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    file: str | None = None,
    **settings: Any,
) -> Upsampler:
    """Return an upsampler with the weights of a checkpoint, in evaluation mode.

    Args:
        method: a name in `NAMES`.
        source: a published name of the method, fetched once; the path of a .pth, .pt, .bin, .ckpt or .safetensors file
            or of an Orbax directory; or "org/name" on the Hugging Face hub. None for methods without weights, and for
            AnyUp's model of the paper.
        device: where the parameters go; they are float32.
        revision: branch, tag or commit of a repository of the hub.
        file: the weight file of that repository.
        settings: what the weights do not tell: `num_heads` of JAFAR and NAF, `kernel_size` of NAF, `per_image` of
            LoftUp, `normalisation` of JAFAR; of FeatUp's published names, `use_norm`.

    Raises:
        ValueError: for an unknown name, a damaged file, or weights or settings that do not fit.
        TypeError: for settings that the method does not have.
        OSError: if there is no such file, or it cannot be fetched.
    """
    if method == catalogue.ANYUP:
        from anyup_torch import pretrained

        path = Path(source) if isinstance(source, os.PathLike) else source or catalogue.ANYUP
        return pretrained.from_pretrained(path, device=device, revision=revision, file=file, **settings)
    found = catalogue.find(method)
    if found.weightless:
        if source is not None:
            raise ValueError(f"{method} has no weights, got {str(source)!r}; leave it out.")
        return model_class(method)(found.config(**found.settings).replace(**settings)).to(device).eval()
    if source is None:
        names = ", ".join(found.config.published_names())
        raise ValueError(f"{method} needs weights: give the path of a file, or a published name: {names}.")
    return build(sources.load(method, source, revision=revision, file=file, **settings), device=device)


def make(method: str, name: str, pretrained: bool, device: torch.device | str, **settings: Any) -> Any:
    """Return the upsampler of a published name, in evaluation mode, with its weights or with random ones.

    Raises ValueError for a name without published weights, and as `from_pretrained` does.
    """
    found = catalogue.find(method)
    options = {option: settings[option] for option in sources.name_options(found) if option in settings}
    published = found.config.published(name, **options)
    if published is None:
        names = ", ".join(found.config.published_names())
        raise ValueError(f"{name!r} is no published name of {method}; the names are {names}.")
    if pretrained:
        return from_pretrained(method, name, device=device, **settings)
    fields = {**published.settings, **{field: x for field, x in settings.items() if field not in options}}
    if published.channels is not None:
        fields["channels"] = published.channels
    return model_class(method)(**fields).to(device).eval()


def model_class(method: str) -> Any:
    """Return the class of a method's models."""
    found = catalogue.find(method)
    return getattr(importlib.import_module(MODULES[found.module]), found.model)


MODULES = {
    "featup": "anyup_torch.upsamplers.featup",
    "interpolation": "anyup_torch.upsamplers.interpolation",
    "jafar": "anyup_torch.upsamplers.jafar",
    "joint_bilateral": "anyup_torch.upsamplers.joint_bilateral",
    "loftup": "anyup_torch.upsamplers.loftup",
    "naf": "anyup_torch.upsamplers.naf",
}


def build(weights: UpsamplerCheckpoint, *, device: torch.device | str = "cpu") -> Any:
    """Return a model with weights that have been read, in evaluation mode."""
    with torch.device("meta"):  # shapes only, so that no initial parameters are drawn
        model = model_class(weights.method)(weights.settings)
    state = {name: torch.from_numpy(_single(tensor)) for name, tensor in weights.tensors.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(device).eval()


def _single(tensor: np.ndarray) -> np.ndarray:
    return tensor.copy() if np.issubdtype(tensor.dtype, np.integer) else tensor.astype(np.float32)


def checkpoint(model: nn.Module) -> UpsamplerCheckpoint:
    """Return a model's weights and settings, to be written by `anyup_core.checkpoints.formats.write`.

    Raises ValueError for a model without weights.
    """
    names = [name for name, found in catalogue.METHODS.items() if found.model == type(model).__name__]
    if not names or catalogue.find(names[0]).weightless:
        name = type(model).__name__
        raise ValueError(f"{name} has no weights of an upsampler; give one of JAFAR, FeatUp, LoftUp, NAF.")
    tensors = {name: _single(tensor.detach().cpu().numpy()) for name, tensor in _floats(model).items()}
    settings: Any = model.config
    return UpsamplerCheckpoint(names[0], tensors, vars(settings))


def _floats(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.float() if x.is_floating_point() else x for name, x in model.state_dict().items()}
