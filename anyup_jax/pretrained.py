"""Models with published or converted weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from anyup_core.checkpoints.checkpoint import Checkpoint
from anyup_core.checkpoints.names import load
from anyup_core.config import AnyUpConfig
from anyup_jax.model import AnyUp


def from_pretrained(
    source: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    ema: bool = False,
    revision: str | None = None,
    file: str | None = None,
    **overrides: Any,
) -> AnyUp:
    """Return a model with the weights of a checkpoint.

    Args:
        source: a published name ("anyup", "anyup_multi_backbone"), fetched once; "anyup_efficientnet_lite", which comes
            with this package (small data: see its card in `anyup_core/weights`); the path of a .pth, .pt or
            .safetensors file, of a folder of `save_pretrained`, of an Orbax directory, or of a training run, whose
            newest checkpoint is taken; or, where no such path exists, a model "org/name" on the Hugging Face hub.
        dtype: type of the computation, float32 or bfloat16; parameters are float32 either way.
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
    return build(load(source, ema=ema, revision=revision, file=file), dtype=dtype, **overrides)


def build(checkpoint: Checkpoint, *, dtype: DTypeLike = jnp.float32, **overrides: Any) -> AnyUp:
    """Return a model with the weights of a checkpoint that has been read; arguments as in `from_pretrained`."""
    config = AnyUpConfig().replace(**checkpoint.configured(**overrides))
    parameters = checkpoint.flax()
    # shapes first and the weights after, so that no initial parameters are drawn
    graph, state = nnx.split(nnx.eval_shape(lambda: AnyUp(config, rngs=nnx.Rngs(0), dtype=dtype)))
    filled = [
        (path, variable.replace(jnp.array(parameters.pop(".".join(map(str, path))), jnp.float32)))
        for path, variable in nnx.to_flat_state(state)
    ]
    assert not parameters, f"the table has more than the model: {', '.join(parameters)}"
    return nnx.merge(graph, nnx.from_flat_state(filled))


def checkpoint(model: AnyUp) -> Checkpoint:
    """Return a model's parameters, as float32, and its configuration."""
    state = nnx.to_flat_state(nnx.state(model))
    parameters = {".".join(map(str, path)): np.asarray(variable[...], np.float32) for path, variable in state}
    return Checkpoint.from_flax(parameters, dataclasses.asdict(model.config))
