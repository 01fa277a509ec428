"""Regions of other photographs pasted onto a photograph, whose outlines are therefore known to the pixel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Shaped, UInt8

RADIUS = (0.12, 0.3)  # mean radius, in units of the photograph's shorter side
WAVES = 6  # of the outline, the k-th with k periods a turn
AMPLITUDE = 0.35  # standard deviation of the first wave, in units of the mean radius; that of the k-th is this / k


def paste_regions(
    image: Shaped[np.ndarray, "H W C"],
    others: Sequence[Shaped[np.ndarray, "H W C"]],
    rng: np.random.Generator,
) -> tuple[Shaped[np.ndarray, "H W C"], UInt8[np.ndarray, "H W"]]:
    """Return a copy of the photograph with regions of others pasted onto it, and the region of each pixel.

    Args:
        image: a photograph, or an image of any bands; not changed.
        others: a photograph for each region, which is pasted at its own place; later regions cover earlier ones.
        rng: draws the outlines.

    Returns:
        The picture, and for each pixel 0 for the photograph itself or k for the k-th region.
    """
    image, regions = image.copy(), np.zeros(image.shape[:2], np.uint8)
    for number, other in enumerate(others, 1):
        inside = blob(image.shape[:2], rng)
        image[inside] = other[inside]
        regions[inside] = number
    return image, regions


def blob(size: tuple[int, int], rng: np.random.Generator) -> Bool[np.ndarray, "H W"]:
    """Return the inside of an irregular outline around a random point.

    Its radius is a mean radius times exp of a random Fourier series of the angle, which gives round shapes as well as
    ragged ones.
    """
    height, width = size
    centre = rng.uniform(0, 1, 2) * size
    radius = rng.uniform(*RADIUS) * min(size)
    down, across = np.arange(height)[:, None] + 0.5 - centre[0], np.arange(width)[None] + 0.5 - centre[1]
    waves = np.arange(1, WAVES + 1)
    heights, phases = rng.normal(0, AMPLITUDE / waves), rng.uniform(0, 2 * np.pi, WAVES)
    angle = np.arctan2(down, across)
    series = sum(h * np.cos(k * angle + p) for k, h, p in zip(waves, heights, phases))
    return np.hypot(down, across) < radius * np.exp(series)
