"""Upsamplers with published or converted weights, and their weights by the published names."""

from __future__ import annotations

import dataclasses
import importlib
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from anyup_core.upsamplers import catalogue, sources
from anyup_core.upsamplers import checkpoint as checkpoints
from anyup_core.upsamplers.checkpoint import UpsamplerCheckpoint
from anyup_jax.upsamplers.protocol import Upsampler


def from_pretrained(
    method: str,
    source: str | os.PathLike | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    revision: str | None = None,
    file: str | None = None,
    **settings: Any,
) -> Upsampler:
    """Return an upsampler with the weights of a checkpoint.

    Args:
        method: a name in `NAMES`.
        source: a published name of the method, fetched once; the path of a .pth, .pt, .bin, .ckpt or .safetensors file
            or of an Orbax directory; or "org/name" on the Hugging Face hub. None for methods without weights.
        dtype: type of the computation, float32 or bfloat16; parameters are float32 either way.
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
        from anyup_jax import pretrained

        path = Path(source) if isinstance(source, os.PathLike) else source or catalogue.ANYUP
        return pretrained.from_pretrained(path, dtype=dtype, revision=revision, file=file, **settings)
    found = catalogue.find(method)
    if found.weightless:
        if source is not None:
            raise ValueError(f"{method} has no weights, got {str(source)!r}; leave it out.")
        return model_class(method)(found.config(**found.settings).replace(**settings))
    if source is None:
        names = ", ".join(found.config.published_names())
        raise ValueError(f"{method} needs weights: give the path of a file, or a published name: {names}.")
    return build(sources.load(method, source, revision=revision, file=file, **settings), dtype=dtype)


def model_class(method: str) -> Any:
    """Return the class of a method's models."""
    found = catalogue.find(method)
    return getattr(importlib.import_module(MODULES[found.module]), found.model)


MODULES = {
    "featup": "anyup_jax.upsamplers.featup",
    "interpolation": "anyup_jax.upsamplers.interpolation",
    "jafar": "anyup_jax.upsamplers.jafar",
    "joint_bilateral": "anyup_jax.upsamplers.joint_bilateral",
    "loftup": "anyup_jax.upsamplers.loftup",
    "naf": "anyup_jax.upsamplers.naf",
}


def build(weights: UpsamplerCheckpoint, *, dtype: DTypeLike = jnp.float32) -> Upsampler:
    """Return a model with weights that have been read."""
    make, parameters = model_class(weights.method), weights.flax()
    # shapes first and the weights after, so that no initial parameters are drawn
    graph, state = nnx.split(nnx.eval_shape(lambda: make(weights.settings, rngs=nnx.Rngs(0), dtype=dtype)))
    filled = []
    for path, variable in nnx.to_flat_state(state):
        array = parameters.pop(".".join(map(str, path)))
        filled.append((path, variable.replace(jnp.array(array, variable.get_value().dtype))))
    assert not parameters, f"the table has more than the model: {', '.join(parameters)}"
    return nnx.merge(graph, nnx.from_flat_state(filled))


def to_published(method: str, state: Any) -> dict[str, np.ndarray]:
    """Return parameters, or gradients of them, by the published names and in PyTorch's layout.

    Args:
        method: name of the upsampler.
        state: a state of its model, `nnx.state(model)` or a part of it, or what `nnx.grad` returns. Parts that are
            missing are left out; where a published tensor is partly there, the rest of it is zero.

    Raises ValueError for an unknown name, or arrays that are not the upsampler's.
    """
    found = catalogue.find(method)
    flat = [(".".join(map(str, path)), variable) for path, variable in nnx.to_flat_state(state)]
    arrays = {path: np.asarray(x.get_value() if isinstance(x, nnx.Variable) else x) for path, x in flat}
    return checkpoints.to_published(_table(found, arrays), arrays)


def _table(found: catalogue.Method, arrays: dict[str, np.ndarray]) -> tuple[Any, ...]:
    """Return the key table of the sizes that the arrays show; settings that only the values decide are defaults."""
    whole = [row for row in found.config().rows() if row.part is None and row.flax in arrays]
    told = found.config.shapes_tell({row.torch: row.op.to_torch(arrays[row.flax]) for row in whole})
    return tuple(found.config(**told).rows())


def checkpoint(model: Any) -> UpsamplerCheckpoint:
    """Return a model's weights and settings, to be written by `anyup_core.checkpoints.formats.write`.

    Raises ValueError for a model without weights.
    """
    names = [name for name, found in catalogue.METHODS.items() if found.model == type(model).__name__]
    if not names or catalogue.find(names[0]).weightless:
        raise ValueError(
            f"{type(model).__name__} has no weights of an upsampler; give one of JAFAR, FeatUp, LoftUp, NAF."
        )
    state = nnx.to_flat_state(nnx.state(model))
    arrays = {".".join(map(str, path)): np.asarray(variable.get_value()) for path, variable in state}
    return UpsamplerCheckpoint.from_flax(names[0], arrays, dataclasses.asdict(model.config))
