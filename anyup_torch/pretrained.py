"""Models with published or converted weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from anyup_core.checkpoints.checkpoint import Checkpoint
from anyup_core.checkpoints.names import load
from anyup_core.config import AnyUpConfig
from anyup_torch.model import AnyUp


def from_pretrained(
    source: str | Path, *, device: torch.device | str = "cpu", ema: bool = False, **overrides: Any
) -> AnyUp:
    """Return a model with the weights of a checkpoint, in evaluation mode.

    Args:
        source: a published name ("anyup", "anyup_multi_backbone"), fetched once; "anyup_efficientnet_lite", which comes
            with this package (small data: see its card in `anyup_core/weights`); or the path of a .pth, .pt or
            .safetensors file, of an Orbax directory, or of a training run, whose newest checkpoint is taken.
        device: where the parameters go; they are float32.
        ema: take a run's moving average of the parameters.
        overrides: fields of `AnyUpConfig` that the weights do not decide, such as `window="natten"`.

    Raises:
        ValueError: for an unknown name, a file that is not one AnyUp model, or overrides that contradict the weights.
        FileNotFoundError, ConnectionError: if there is no such file, or it cannot be fetched.
        TypeError: for overrides that are no fields of `AnyUpConfig`.
    """
    return build(load(source, ema=ema), device=device, **overrides)


def build(checkpoint: Checkpoint, *, device: torch.device | str = "cpu", **overrides: Any) -> AnyUp:
    """Return a model with the weights of a checkpoint that has been read; arguments as in `from_pretrained`."""
    config = AnyUpConfig().replace(**checkpoint.configured(**overrides))
    with torch.device("meta"):  # shapes only, so that no initial parameters are drawn
        model = AnyUp(config)
    state = {name: torch.from_numpy(tensor.astype(np.float32)) for name, tensor in checkpoint.tensors.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(device).eval()
