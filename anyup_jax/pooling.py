"""Adaptive average pooling, with the bins of PyTorch's."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from anyup_core import geometry


def adaptive_average_pool(x: Float[Array, "B H W D"], size: tuple[int, int]) -> Float[Array, "B h w D"]:
    """Average over `size` bins, [floor(i H / h), ceil((i + 1) H / h)) along each axis; upwards the bins overlap."""
    return pool_axis(pool_axis(x, size[0], 1), size[1], 2)


def pool_axis(x: Float[Array, "B H W D"], out: int, axis: int) -> Float[Array, "B h w D"]:
    """Average over `out` bins along one axis."""
    size = x.shape[axis]
    if size == out:
        return x
    if size % out == 0:
        shape = (*x.shape[:axis], out, size // out, *x.shape[axis + 1 :])
        return x.reshape(shape).mean(axis + 1, dtype=jnp.float32).astype(x.dtype)
    index, weights = geometry.pool_bins(size, out)
    shape = [-1 if a == axis else 1 for a in range(x.ndim)]
    taps = (jnp.take(x, i, axis).astype(jnp.float32) * w.reshape(shape) for i, w in zip(index.T, weights.T))
    return functools.reduce(jnp.add, taps).astype(x.dtype)
