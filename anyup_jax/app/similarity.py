"""Cosine similarities of one feature to all of a map, which may be a file that is larger than memory."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

from anyup_core import visualize
from anyup_core.resample import axis_weights

Map = Float[np.ndarray, "_ _ _"]
Plane = Float[np.ndarray, "_ _"]

LEAST = 1e-12  # of a product of lengths, which is divided by
GROUP = 16  # channels that are interpolated at once


def norms(features: Map) -> Plane:
    """Return the lengths of the features of a map."""
    return np.sqrt(np.stack([np.einsum("wc,wc->w", row, row) for row in features]))


def bilinear_norms(features: Map, size: tuple[int, int]) -> Plane:
    """Return the lengths of a map's features once they are interpolated, of which a few channels are held at a time."""
    total = np.zeros(size, np.float32)
    for first in range(0, features.shape[-1], GROUP):
        fine = visualize.bilinear(np.ascontiguousarray(features[..., first : first + GROUP]), size)
        total += np.einsum("hwc,hwc->hw", fine, fine)
    return np.sqrt(total)


def interpolated(features: Map, size: tuple[int, int], pixel: tuple[int, int]) -> Float[np.ndarray, " C"]:
    """Return the interpolated feature of one pixel (y, x)."""
    rows, cols = (axis_weights("bilinear", n, m)[at] for n, m, at in zip(features.shape, size, pixel))
    return np.einsum("h,w,hwc->c", rows, cols, features).astype(np.float32)


def cosines(products: Plane, length: float, lengths: Plane) -> Plane:
    return products / np.maximum(length * lengths, LEAST)


def shade(similarity: Plane) -> UInt8[np.ndarray, "_ _"]:
    """Return similarities from 0 to 1 as bytes; negative ones count as 0."""
    return np.rint(255 * np.clip(similarity, 0, 1)).astype(np.uint8)
