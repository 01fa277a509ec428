"""Interpolation with the conventions of PyTorch's `interpolate`, and the upsamplers that do nothing else."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from anyup_core.resample import axis_taps
from anyup_core.upsamplers.interpolation import InterpolationConfig
from anyup_jax.row_shards import Size
from anyup_jax.upsamplers.protocol import ConfiguredUpsampler


def resize(x: Float[Array, "B H W C"], size: Size, kernel: str) -> Float[Array, "B Ho Wo C"]:
    """Interpolate without aligned corners and antialiasing; the map itself where the size is its own.

    Args:
        x: the map.
        size: height and width of the result.
        kernel: "nearest", "bilinear" or "bicubic", see `anyup_core.resample.axis_taps`.
    """
    for axis, side in zip((1, 2), size):
        if x.shape[axis] != side:
            x = resize_axis(x, side, axis, kernel)
    return x


def resize_axis(x: Float[Array, "B H W C"], side: int, axis: int, kernel: str) -> Float[Array, "B _ _ C"]:
    """Interpolate along one axis: a sum over the few cells that each position takes from."""
    index, weights = axis_taps(kernel, x.shape[axis], side)
    shape = [-1 if a == axis else 1 for a in range(x.ndim)]
    taps = (jnp.take(x, i, axis) * jnp.asarray(w.reshape(shape), x.dtype) for i, w in zip(index.T, weights.T))
    return functools.reduce(jnp.add, taps)


class Interpolation(ConfiguredUpsampler):
    """Interpolation of the features alone; of the image, only the size counts, and a chunk size has nothing to bound.

    Args:
        config: the settings; the default ones if None.
        rngs: ignored, as there are no parameters.
        dtype: ignored; the type of the features is that of the computation.
        fields: fields of `InterpolationConfig` that differ from these.
    """

    settings = InterpolationConfig

    def __init__(
        self,
        config: InterpolationConfig | None = None,
        *,
        rngs: nnx.Rngs | None = None,
        dtype: DTypeLike = jnp.float32,
        **fields: Any,
    ):
        super().__init__(config, dtype, **fields)

    def upsample(
        self, image: Float[Array, "B H W 3"], features: Float[Array, "B h w C"], size: Size, q_chunk_size: int | None
    ) -> Float[Array, "B Ho Wo C"]:
        return resize(features, size, self.config.kernel)
