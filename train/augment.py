"""The recipe's augmentation of the guidance: it changes colours and quality of an image, not its geometry."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from jaxtyping import Float32, Int16, UInt8, UInt16
from PIL import Image, ImageEnhance, ImageOps

from train.config import DatasetConfig

Operation = Callable[[Image.Image, np.random.Generator], Image.Image]

JITTER = (0.2, 0.2, 0.3, 0.05)  # of brightness, contrast and saturation; of the hue, in turns
DISTORTION = (0.125, 0.5, 0.5, 0.05)  # the same of the photometric distortion
DISTORTED = 0.5  # probability of each part of the distortion
QUALITIES, QUALITY_WEIGHTS = (95, 80, 60, 40), (0.25, 0.35, 0.25, 0.15)
BLUR_SIGMA = (0.3, 1.5)  # pixels
NOISE = 0.03  # standard deviation, for pixels from 0 to 1
SOLARIZE = round(0.9 * 255)
BAND = 1 << 14  # pixels that are worked on at a time


def augment(image: UInt8[np.ndarray, "H W 3"], strength: float, rng: np.random.Generator) -> UInt8[np.ndarray, "H W 3"]:
    """Return the photograph with the recipe's augmentations, each applied with its probability p ** (1 / strength).

    Only JPEG compression is always applied, at a random quality. Equal generators give equal results.

    Args:
        image: 8-bit RGB.
        strength: 1 for the published recipe; 0 returns the image itself.
        rng: source of all random choices.
    """
    if strength == 0:
        return image
    picture = Image.fromarray(image)
    for probability, operation in OPERATIONS:
        if probability == 1 or rng.random() < probability ** (1 / strength):
            picture = operation(picture, rng)
    return np.asarray(picture)


def _colours(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Colour jitter with its four parts in a random order, then photometric distortion."""
    for part in rng.permutation(4):
        image = _change(image, int(part), JITTER[part], rng)
    happens = rng.random(5) < DISTORTED
    for part in (0, 1, 2, 3) if rng.random() < 0.5 else (0, 2, 3, 1):
        if happens[part]:
            image = _change(image, part, DISTORTION[part], rng)
    if happens[4]:
        bands = image.split()
        image = Image.merge("RGB", [bands[band] for band in rng.permutation(3)])
    return image


def _change(image: Image.Image, part: int, most: float, rng: np.random.Generator) -> Image.Image:
    """Change brightness (part 0), contrast (1), saturation (2) or hue (3) at random, by at most `most`."""
    if part == 3:
        return _shift_hue(image, rng.uniform(-most, most))
    enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[part]
    return enhance(image).enhance(rng.uniform(1 - most, 1 + most))


def _shift_hue(image: Image.Image, turns: float) -> Image.Image:
    """Shift the hue of HSV by at most a sixth of a turn, without computing HSV.

    As the hue goes around, each channel rises from the pixel's least level to its greatest and falls again. It rises
    once the channel that is a third of a turn further on has reached the least level, and falls once that channel has
    reached the greatest, both by as much as the hue still moves.
    """
    part = round(abs(6 * turns) * 128)  # in units of 1/128; 16 bits hold its product with the chroma, at most 255
    further = (1, 2, 0) if turns > 0 else (2, 0, 1)

    def shift(pixels: UInt8[np.ndarray, "h w 3"]) -> Int16[np.ndarray, "h w 3"]:
        planes = [pixels[..., channel].astype(np.int16) for channel in range(3)]
        greatest, least = functools.reduce(np.maximum, planes), functools.reduce(np.minimum, planes)
        step = ((greatest - least) * part + 64) >> 7
        rises, falls = least + step, step - greatest
        shifted = np.empty(pixels.shape, np.int16)
        for channel, level in enumerate(planes):
            other = planes[further[channel]]
            level = level + np.maximum(rises - other, 0) - np.maximum(falls + other, 0)
            shifted[..., channel] = np.maximum(np.minimum(level, greatest), least)
        return shifted

    return Image.fromarray(_in_bands(shift, np.asarray(image)))


def _blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Blur with a 5x5 Gaussian, weights in units of 1/256; the border is reflected, as in torchvision."""
    weights = np.exp(-0.5 * (np.arange(3) / rng.uniform(*BLUR_SIGMA)) ** 2)
    one, two = (round(256 * weight) for weight in weights[1:] / (weights[0] + 2 * weights[1:].sum()))

    def weigh(shifted: list[UInt16[np.ndarray, "h w 3"]]) -> UInt16[np.ndarray, "h w 3"]:
        total = (shifted[1] + shifted[3]) * np.uint16(one)
        total += (shifted[0] + shifted[4]) * np.uint16(two)
        total += shifted[2] * np.uint16(256 - 2 * (one + two))
        return (total + 128) >> 8

    def blur(pixels: UInt8[np.ndarray, "h w 3"]) -> UInt16[np.ndarray, "h-4 w-4 3"]:
        levels = pixels.astype(np.uint16)
        levels = weigh([levels[:, first : first + image.width] for first in range(5)])
        return weigh([levels[first : len(levels) - 4 + first] for first in range(5)])

    return Image.fromarray(_in_bands(blur, np.pad(np.asarray(image), ((2, 2), (2, 2), (0, 0)), "reflect"), 2))


def _in_bands(
    operation: Callable[[np.ndarray], np.ndarray], image: UInt8[np.ndarray, "H W 3"], border: int = 0
) -> UInt8[np.ndarray, "h w 3"]:
    """Apply an operation to bands of rows that fit into the cache: three times as fast as the whole image at once.

    Args:
        operation: takes rows with their border, and returns the levels, 0 to 255, of the rows without it.
        image: with a border on all sides.
        border: width of the border in pixels.
    """
    height, width = image.shape[0] - 2 * border, image.shape[1] - 2 * border
    result = np.empty((height, width, 3), np.uint8)
    rows = max(1, BAND // width)
    for first in range(0, height, rows):
        result[first : first + rows] = operation(image[first : first + rows + 2 * border])
    return result


def _compress(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.choice(QUALITIES, p=QUALITY_WEIGHTS)))
    return Image.open(file).copy()


def _noise(image: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "H W 3"]:
    """Add Gaussian noise: to each level the sum of two draws from 256 equally likely quantiles."""

    def add(pixels: UInt8[np.ndarray, "h w 3"]) -> Int16[np.ndarray, "h w 3"]:
        draws = rng.integers(2**64, size=(pixels.size + 3) // 4, dtype=np.uint64).tobytes().translate(_quantiles())
        first, second = np.frombuffer(draws, np.int8)[: 2 * pixels.size].reshape(2, *pixels.shape)
        return np.minimum(np.maximum(pixels.astype(np.int16) + (first + second), 0), 255)  # 8 bits hold that sum

    return _in_bands(add, image)


@functools.cache
def _quantiles() -> bytes:
    """Return the quantiles, in grey levels, of a normal distribution of half the variance, as signed bytes."""
    normal = NormalDist(0, 255 * NOISE / 2**0.5)
    return np.array([round(normal.inv_cdf((index + 0.5) / 256)) for index in range(256)], np.int8).tobytes()


OPERATIONS: tuple[tuple[float, Operation], ...] = (
    (0.5, _colours),
    (0.1, lambda image, rng: image.convert("L").convert("RGB")),
    (0.35, _blur),
    (1, _compress),
    (0.2, lambda image, rng: ImageOps.autocontrast(image)),
    (0.15, lambda image, rng: ImageOps.equalize(image)),
    (0.2, lambda image, rng: ImageEnhance.Sharpness(image).enhance(1.5)),
    (0.1, lambda image, rng: ImageOps.posterize(image, 5)),
    (0.05, lambda image, rng: ImageOps.solarize(image, SOLARIZE)),
    (0.02, lambda image, rng: ImageOps.invert(image)),
    (0.6, lambda image, rng: Image.fromarray(_noise(np.asarray(image), rng))),
)
"""Probability at strength 1, and the operation, in the order in which they are applied."""


def encoder_photograph(
    image: UInt8[np.ndarray, "H W 3"] | Float32[np.ndarray, "H W bands"], config: DatasetConfig
) -> UInt8[np.ndarray, "H W 3"]:
    """Return what an encoder sees of an image as 8-bit RGB: its bands between their `limits`, or the photograph."""
    if config.encoder_bands is None:
        return image
    low, high = (np.array(limit, np.float32)[list(config.encoder_bands)] for limit in config.limits())
    seen = (image[..., list(config.encoder_bands)] - low) / (high - low)
    return np.rint(255 * np.clip(seen, 0, 1)).astype(np.uint8)


def augment_bands(
    image: Float32[np.ndarray, "H W bands"], config: DatasetConfig, rng: np.random.Generator
) -> Float32[np.ndarray, "H W bands"]:
    """Return an image of bands with augmented values.

    The bands that encoders get are augmented as the photograph that they make (`encoder_photograph`): the change of its
    levels is added to them. Of the recipe, the other bands get, with the same probabilities and ranges, what needs no
    colours and no 8 bits: brightness and contrast, blur, sharpness and noise, between their `limits`. No hue,
    saturation, greyscale, change of channels, JPEG, histograms, posterisation, solarisation or inversion.

    Args:
        image: with the values of the file.
        config: the data set, with `mean` and `std`; at an augmentation strength of 0 the image itself is returned.
        rng: source of all random choices.
    """
    if config.augmentation_strength == 0:
        return image
    chosen = list(config.encoder_bands or ())
    others = [band for band in range(image.shape[-1]) if band not in chosen]
    low, high = (np.array(limit, np.float32) for limit in config.limits())
    photograph = encoder_photograph(image, config)
    change = np.float32(augment(photograph, config.augmentation_strength, rng)) - photograph
    result = image.copy()
    result[..., chosen] += change / 255 * (high - low)[chosen]
    levels = (image[..., others] - low[others]) / (high - low)[others]
    levels = _augment_levels(levels, config.augmentation_strength, rng)
    result[..., others] = low[others] + levels * (high - low)[others]
    return result


def _augment_levels(
    levels: Float32[np.ndarray, "H W C"], strength: float, rng: np.random.Generator
) -> Float32[np.ndarray, "H W C"]:
    """Change bands whose usual levels are from 0 to 1: all of them alike, but for the noise."""
    happens = rng.random(4) < np.array([0.5, 0.35, 0.2, 0.6]) ** (1 / strength)
    if happens[0]:
        brightness, contrast = (np.float32(rng.uniform(1 - most, 1 + most)) for most in JITTER[:2])
        mean = levels.mean((0, 1), keepdims=True)
        levels = brightness * (mean + contrast * (levels - mean))
    if happens[1]:
        weights = np.exp(-0.5 * (np.arange(-2, 3) / rng.uniform(*BLUR_SIGMA)) ** 2)
        levels = _smooth(levels, weights / weights.sum())
    if happens[2]:
        levels = levels + (levels - _smooth(levels, np.array([1, 2, 1]) / 4)) / 2
    if happens[3]:
        levels = levels + np.float32(NOISE) * rng.standard_normal(levels.shape, np.float32)
    return levels


def _smooth(levels: Float32[np.ndarray, "H W C"], weights: np.ndarray) -> Float32[np.ndarray, "H W C"]:
    """Average over the pixels around along either axis; the border is reflected."""
    edge = len(weights) // 2
    for axis in (0, 1):
        padded = np.pad(levels, [(edge, edge) if i == axis else (0, 0) for i in range(3)], "reflect")
        size = levels.shape[axis]
        shifted = (np.take(padded, range(first, first + size), axis) for first in range(len(weights)))
        levels = functools.reduce(np.add, (np.float32(weight) * part for weight, part in zip(weights, shifted)))
    return levels
