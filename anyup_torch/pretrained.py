"""Models with published or converted weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anyup_core.checkpoints.checkpoint import Checkpoint
from anyup_core.checkpoints.names import load
from anyup_core.config import AnyUpConfig
from anyup_torch.model import AnyUp


def from_pretrained(
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    ema: bool = False,
    revision: str | None = None,
    file: str | None = None,
    **overrides: Any,
) -> AnyUp:
    """Return a model with the weights of a checkpoint, in evaluation mode.

    Args:
        source: a published name ("anyup", "anyup_multi_backbone"), fetched once; "anyup_efficientnet_lite", which comes
            with this package (small data: see its card in `anyup_core/weights`); the path of a .pth, .pt or
            .safetensors file, of a folder of `save_pretrained`, of an Orbax directory, or of a training run, whose
            newest checkpoint is taken; or, where no such path exists, a model "org/name" on the Hugging Face hub.
        device: where the parameters go; they are float32.
        ema: take a run's moving average of the parameters.
        revision: branch, tag or commit of a model on the hub.
        file: a .safetensors, .pth, .pt or .bin file to take from the hub instead of `model.safetensors`.
        overrides: fields of `AnyUpConfig` that the weights do not decide, such as `window="natten"`.

    Raises:
        ValueError: for an unknown name, a file that is not one AnyUp model, or overrides that contradict the weights.
        FileNotFoundError, ConnectionError: if there is no such file or model, or it cannot be fetched.
        PermissionError: for a model on the hub that may not be read.
        TypeError: for overrides that are no fields of `AnyUpConfig`.
    """
    return build(load(source, ema=ema, revision=revision, file=file), device=device, **overrides)


def build(checkpoint: Checkpoint, *, device: torch.device | str = "cpu", **overrides: Any) -> AnyUp:
    """Return a model with the weights of a checkpoint that has been read; arguments as in `from_pretrained`."""
    config = AnyUpConfig().replace(**checkpoint.configured(**overrides))
    with torch.device("meta"):  # shapes only, so that no initial parameters are drawn
        model = AnyUp(config)
    state = {name: torch.from_numpy(tensor.astype(np.float32)) for name, tensor in checkpoint.tensors.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(device).eval()


def checkpoint(model: AnyUp) -> Checkpoint:
    """Return a model's parameters, as float32, and its configuration."""
    tensors = {name: tensor.detach().float().cpu().numpy() for name, tensor in model.state_dict().items()}
    return Checkpoint(tensors, dataclasses.asdict(model.config))
