"""Interpolation along one axis as a table of weights, in PyTorch's convention: centres of cells, no aligned corners."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def axis_weights(kernel: str, cells: int, size: int) -> Float[np.ndarray, "size cells"]:
    """Return the weight of each of `cells` input cells in each of `size` output positions; the edge is repeated.

    Args:
        kernel: "nearest" (nearest-exact), "bilinear" or "bicubic" (a = -0.75, which `jax.image.resize` does not offer).
        cells: number of input cells.
        size: number of output positions.
    """
    position = (np.arange(size) + 0.5) * cells / size - 0.5
    if kernel == "nearest":
        taps, weights = np.floor(position + 0.5)[:, None], np.ones((size, 1))
    elif kernel == "bilinear":
        position = position.clip(0, cells - 1)
        taps = np.floor(position)[:, None] + np.arange(2)
        weights = 1 - np.abs(position[:, None] - taps)
    else:  # bicubic
        taps = np.floor(position)[:, None] + np.arange(-1, 3)
        weights = _cubic(np.abs(position[:, None] - taps))
    matrix = np.zeros((size, cells))
    np.add.at(matrix, (np.arange(size)[:, None], taps.clip(0, cells - 1).astype(int)), weights)
    return matrix.astype(np.float32)


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """The cubic convolution kernel of Keys, "Cubic convolution interpolation for digital image processing" (1981)."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))
