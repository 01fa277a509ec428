"""Interpolation along one axis as a table, in PyTorch's convention: centres of cells, no aligned corners."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def axis_taps(
    kernel: str, cells: int, size: int
) -> tuple[Int[np.ndarray, "size taps"], Float[np.ndarray, "size taps"]]:
    """Return which of `cells` input cells each of `size` output positions takes from, int32, and the float32 weights.

    The edge is repeated, so that a cell may occur more than once.

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
    return taps.clip(0, cells - 1).astype(np.int32), weights.astype(np.float32)


def axis_weights(kernel: str, cells: int, size: int) -> Float[np.ndarray, "size cells"]:
    """Return the weight of each input cell in each output position, float32; arguments as for `axis_taps`."""
    taps, weights = axis_taps(kernel, cells, size)
    matrix = np.zeros((size, cells), np.float32)
    np.add.at(matrix, (np.arange(size)[:, None], taps), weights)
    return matrix


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """The cubic convolution kernel of Keys, "Cubic convolution interpolation for digital image processing" (1981)."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))
