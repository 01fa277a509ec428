"""Pictures of features: a joint PCA, bilinear upsampling to compare with, and the attention picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Num, UInt8

from anyup_core.resample import axis_weights

Picture = UInt8[np.ndarray, "_ _ 3"]

SAMPLE = 2048  # positions a PCA is fitted on
BLOCK = 1 << 24  # feature values projected at once: 64 MB in float32
LIGHTNESS, CHROMA = 0.74, 0.124  # of the colour wheel: about the most chroma that every hue has within sRGB

OKLAB_TO_LMS = np.array(
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
)
LMS_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


@dataclasses.dataclass(frozen=True)
class PCABasis:
    """The mean and the first three principal components of some features; see `pca_basis`."""

    mean: Float[np.ndarray, " C"]
    components: Float[np.ndarray, "3 C"]

    def project(self, features: Num[Any, "h w C"]) -> Float[np.ndarray, "h w 3"]:
        """Return the coordinates of every position in this basis, float32, a block of rows at a time."""
        if features.ndim != 3 or features.shape[-1] != self.mean.size:
            raise ValueError(f"The basis is for features (h, w, {self.mean.size}); got {features.shape}.")
        rows = max(1, BLOCK // (features.shape[1] * features.shape[2]))
        starts = range(0, features.shape[0], rows)
        blocks = [np.asarray(features[start : start + rows], np.float32) - self.mean for start in starts]
        return np.concatenate([block @ self.components.T for block in blocks])


def pca_basis(maps: Sequence[Num[Any, "_ _ C"]]) -> PCABasis:
    """Fit one basis to all feature maps: their first three principal components.

    At most 2048 positions, spread evenly and as many from each map, are looked at. The sign of a component is such that
    its entry of largest magnitude is positive, so pictures do not change colour between runs. A component without
    variation (fewer than three channels, constant features) is zero.

    Raises:
        ValueError: if the maps are not (h, w, C) with the same C, or hold numbers that are not finite.
    """
    shapes = [tuple(features.shape) for features in maps]
    if not shapes or any(len(shape) != 3 or shape[2] != shapes[0][2] or 0 in shape for shape in shapes):
        raise ValueError(f"One basis needs feature maps (h, w, C) with the same number of channels; got {shapes}.")
    sample = np.concatenate([_spread(features, SAMPLE // len(maps)) for features in maps])
    if not np.isfinite(sample).all():
        raise ValueError("The features hold numbers that are not finite, so they have no principal components.")
    mean = sample.mean(0)
    _, spread, directions = np.linalg.svd(sample - mean, full_matrices=False)
    rank = np.count_nonzero(spread > 1e-6 * np.linalg.norm(sample))
    directions = directions[: min(3, rank)]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(1, keepdims=True), 1)
    components = np.zeros((3, mean.size), np.float32)
    components[: len(directions)] = directions * np.sign(largest)
    return PCABasis(mean.astype(np.float32), components)


def pca_colors(*maps: Num[Any, "_ _ C"], basis: PCABasis | None = None) -> list[Picture]:
    """Return one picture per feature map, in colours that mean the same in all of them.

    The three coordinates become red, green and blue, with one range for all maps: from the least 1st to the greatest
    99th percentile of a map. A coordinate without variation is drawn at half brightness.

    Args:
        maps: feature maps of any sizes with the same channels, from any framework.
        basis: what the coordinates are; by default the basis fitted to all maps.

    Raises:
        ValueError: as for `pca_basis`.
    """
    basis = pca_basis(maps) if basis is None else basis
    coordinates = [basis.project(features) for features in maps]
    bounds = np.stack([np.percentile(points.reshape(-1, 3), (1, 99), axis=0) for points in coordinates])
    low, high = bounds[:, 0].min(0), bounds[:, 1].max(0)
    flat = ~basis.components.any(1) | (high <= low)
    scale = np.where(flat, 0, 1 / np.where(flat, 1, high - low))
    return [_to_uint8(np.where(flat, 0.5, (points - low) * scale)) for points in coordinates]


def bilinear(features: Float[np.ndarray, "h w C"], size: tuple[int, int]) -> Float[np.ndarray, "H W C"]:
    """Return a feature map interpolated to `size`, with cell centres at half integers and edges held."""
    rows, cols = (axis_weights("bilinear", n, m).astype(features.dtype) for n, m in zip(features.shape, size))
    return np.einsum("Hh,Ww,hwc->HWc", rows, cols, features, optimize=["einsum_path", (0, 2), (0, 1)])


def color_wheel(h: int, w: int) -> Float[np.ndarray, "h w 3"]:
    """Return an OKLab colour for every cell: the angle around the centre as hue, the distance from it as chroma.

    The corners have the full chroma of 0.124, the lightness is 0.74 throughout, and every colour lies within sRGB.
    """
    y, x = (((np.arange(n) + 0.5) * 2 / n - 1) / math.sqrt(2) for n in (h, w))
    a, b = np.broadcast_arrays(CHROMA * x, -CHROMA * y[:, None])
    return np.stack([np.full((h, w), LIGHTNESS), a, b], -1).astype(np.float32)


def oklab_to_srgb(colors: Num[np.ndarray, "... 3"]) -> Float[np.ndarray, "... 3"]:
    """Return OKLab colours (L, a, b) as sRGB in [0, 1]; what lies outside is clipped.

    The matrices are those of Björn Ottosson, "A perceptual color space for image processing" (2020).
    """
    linear = np.clip((np.asarray(colors, np.float64) @ OKLAB_TO_LMS.T) ** 3 @ LMS_TO_RGB.T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def oklab_picture(colors: Float[np.ndarray, "h w 3"]) -> Picture:
    """Return an array of OKLab colours as a picture."""
    return _to_uint8(oklab_to_srgb(colors))


def attention_picture(upsample: Callable[[Float[np.ndarray, "h w 3"]], np.ndarray], h: int, w: int) -> Picture:
    """Return the picture of where every pixel looks: the mean colour of the cells it attends to.

    The colour wheel is averaged with the model's attention weights. Colours are mixed in OKLab, so a mixture has the
    lightness and the hue one expects of it.

    Args:
        upsample: takes the colours of the cells, (h, w, 3), to those of the pixels, (H, W, 3); for example
            `lambda colors: model(image[None], features[None], values=colors[None])[0]`.
        h, w: size of the low-resolution features.
    """
    return oklab_picture(np.asarray(upsample(color_wheel(h, w)), np.float32))


def _spread(features: Num[Any, "h w C"], count: int) -> Float[np.ndarray, "n C"]:
    """Return up to `count` positions of a map, spread evenly over it."""
    h, w = features.shape[:2]
    index = np.linspace(0, h * w - 1, min(max(count, 1), h * w)).round().astype(int)
    return np.asarray(features)[index // w, index % w].astype(np.float64)


def _to_uint8(picture: Float[np.ndarray, "h w 3"]) -> Picture:
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)
