"""Learned position embeddings for another grid than the one they were trained on, as timm's `dynamic_img_size` does it.

Separable bicubic interpolation that widens its kernel where it makes the grid smaller (antialiasing), as
`torch.nn.functional.interpolate(mode="bicubic", antialias=True)` and Pillow do it. The weights are tables, computed on
the host in float32 and in PyTorch's order of operations.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

SHARPNESS = np.float32(-0.5)  # the a of Keys' cubic convolution kernel (1981)
RADIUS = 2  # of the kernel, in cells


def resample(table: Float[Array, "H W C"], height: int, width: int) -> Float[Array, "h w C"]:
    """Return the embeddings of an h x w grid in float32; those of the native grid as they are."""
    if (height, width) == table.shape[:2]:
        return table
    rows, columns = weights(table.shape[0], height), weights(table.shape[1], width)
    return jnp.einsum("hH,wW,HWC->hwC", rows, columns, table, precision=lax.Precision.HIGHEST)


@functools.lru_cache(maxsize=64)
def weights(size: int, new_size: int) -> Float[np.ndarray, "n m"]:
    """Return how much of each of m = `size` cells goes into each of n = `new_size` cells; every row sums to 1.

    With s = m / n, the centre of new cell i is at c = s (i + 1/2), and old cell j gets k((j + 1/2 - c) / max(s, 1)).
    """
    one, half = np.float32(1), np.float32(0.5)
    scale = np.float32(size) / np.float32(new_size)
    wider = max(scale, one)
    support = RADIUS * wider
    centres = scale * (np.arange(new_size, dtype=np.float32) + half)
    first = np.maximum((centres - support + half).astype(np.int64), 0)
    last = np.minimum((centres + support + half).astype(np.int64), size)
    cells = np.arange(size)
    # distances are counted from the first cell under the kernel, for the same rounding
    offsets = (cells - first[:, None]).astype(np.float32)
    distances = (offsets + (first.astype(np.float32) - centres)[:, None] + half) * (one / wider)
    inside = (first[:, None] <= cells) & (cells < last[:, None])
    table = np.where(inside, kernel(distances), np.float32(0))
    return table / table.sum(1, keepdims=True)


def kernel(x: Float[np.ndarray, ...]) -> Float[np.ndarray, ...]:
    """Return Keys' piecewise cubic: 1 at 0, 0 at the other whole numbers, 0 from 2 on."""
    a, x = SHARPNESS, np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < RADIUS, far, np.float32(0)))
