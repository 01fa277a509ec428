"""The recipe's augmentation of guidance: the colours and the quality of a photograph change, its geometry does not."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from jaxtyping import Float64, UInt8, UInt16
from PIL import Image, ImageEnhance, ImageOps

Operation = Callable[[Image.Image, np.random.Generator], Image.Image]

BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.2, 0.2, 0.3, 0.05  # of the colour jitter; the hue in turns
DISTORTION = 0.5  # probability of each part of the photometric distortion
QUALITIES, QUALITY_WEIGHTS = (95, 80, 60, 40), (0.25, 0.35, 0.25, 0.15)
BLUR_SIGMA = (0.3, 1.5)  # pixels
NOISE = 0.03  # standard deviation, for pixels from 0 to 1
SOLARIZE = round(0.9 * 255)


def augment(image: UInt8[np.ndarray, "H W 3"], strength: float, rng: np.random.Generator) -> UInt8[np.ndarray, "H W 3"]:
    """Return the photograph with the recipe's augmentations, each with its probability p ** (1 / strength).

    JPEG compression is the exception: it always happens, at a quality drawn by weight. Equal generators give equal
    results.

    Args:
        image: 8-bit RGB.
        strength: 1 for the published recipe; 0 returns the image itself.
        rng: draws what is done.
    """
    if strength == 0:
        return image
    picture = Image.fromarray(image)
    for probability, operation in OPERATIONS:
        if probability == 1 or rng.random() < probability ** (1 / strength):
            picture = operation(picture, rng)
    result = np.asarray(picture)
    return _noise(result, rng) if rng.random() < NOISE_PROBABILITY ** (1 / strength) else result


def _colours(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Colour jitter with its four parts in a random order, then photometric distortion."""
    for part in rng.permutation(4):
        if part == 3:
            image = _shift_hue(image, rng.uniform(-HUE, HUE))
        else:
            enhance, spread = _JITTER[part]
            image = enhance(image).enhance(rng.uniform(1 - spread, 1 + spread))
    happens = rng.random(5) < DISTORTION
    contrast_first = rng.random() < 0.5
    if happens[0]:
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.875, 1.125))
    if happens[1] and contrast_first:
        image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.5, 1.5))
    if happens[2]:
        image = ImageEnhance.Color(image).enhance(rng.uniform(0.5, 1.5))
    if happens[3]:
        image = _shift_hue(image, rng.uniform(-0.05, 0.05))
    if happens[1] and not contrast_first:
        image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.5, 1.5))
    if happens[4]:
        bands = image.split()
        image = Image.merge("RGB", [bands[band] for band in rng.permutation(3)])
    return image


def _shift_hue(image: Image.Image, turns: float) -> Image.Image:
    """Turn the hue in HSV by at most a sixth of a turn, without computing it.

    Each channel rises from the pixel's least level to its greatest, and falls again, as the hue moves around. It rises
    once the channel that is one third of a turn further on is down at the least level, and falls once that is up at
    the greatest, both by as much as the hue moves on after that.
    """
    planes = [np.asarray(plane).astype(np.int16) for plane in image.split()]
    greatest = np.maximum(np.maximum(planes[0], planes[1]), planes[2])
    least = np.minimum(np.minimum(planes[0], planes[1]), planes[2])
    step = greatest - least
    step *= round(abs(6 * turns) * 128)  # chroma at most 255, so that 16 bits hold it
    step += 64
    step >>= 7
    rises, falls = least + step, step - greatest
    shifted = []
    for index, plane in enumerate(planes):
        further = planes[(index + 1 if turns > 0 else index - 1) % 3]
        level = plane + np.maximum(rises - further, 0)
        level -= np.maximum(falls + further, 0)
        level = np.maximum(np.minimum(level, greatest), least)
        shifted.append(Image.fromarray(level.astype(np.uint8)))
    return Image.merge("RGB", shifted)


def _blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A 5x5 Gaussian; the border is mirrored, as torchvision does."""
    weights = np.exp(-0.5 * (np.arange(3) / rng.uniform(*BLUR_SIGMA)) ** 2)
    weights /= weights[0] + 2 * weights[1:].sum()
    padded = np.pad(np.asarray(image), ((2, 2), (2, 2), (0, 0)), "reflect").astype(np.uint16)
    return Image.fromarray(_smooth(_smooth(padded, weights).swapaxes(0, 1), weights).swapaxes(0, 1).astype(np.uint8))


def _smooth(levels: UInt16[np.ndarray, "h w 3"], weights: Float64[np.ndarray, "3"]) -> UInt16[np.ndarray, "h-4 w 3"]:
    """Weigh each row and its neighbours at distances 1 and 2, in units of 1/256, which 16 bits hold."""
    one, two = (round(256 * weight) for weight in weights[1:])
    total = levels[1:-3] + levels[3:-1]
    total *= one
    outer = levels[:-4] + levels[4:]
    outer *= two
    total += outer
    total += levels[2:-2] * np.uint16(256 - 2 * (one + two))
    total += 128
    total >>= 8
    return total


def _compress(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.choice(QUALITIES, p=QUALITY_WEIGHTS)))
    with Image.open(file) as decoded:
        decoded.load()
        return decoded


def _noise(image: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "H W 3"]:
    """Gaussian noise: for each level the sum of two draws from 256 equally likely quantiles."""
    draws = rng.integers(2**64, size=(image.size + 3) // 4, dtype=np.uint64).tobytes().translate(_quantiles())
    first, second = np.frombuffer(draws, np.int8)[: 2 * image.size].reshape(2, *image.shape)
    noisy = image.astype(np.int16)
    noisy += first + second  # at most 32
    return np.minimum(np.maximum(noisy, 0), 255).astype(np.uint8)


@functools.cache
def _quantiles() -> bytes:
    """Half the variance of the noise in grey levels, rounded, as signed bytes."""
    normal = NormalDist(0, 255 * NOISE / 2**0.5)
    return np.array([round(normal.inv_cdf((index + 0.5) / 256)) for index in range(256)], np.int8).tobytes()


_JITTER[part]
            image = enhance(image).enhance(rng.uniform(1 - spread, 1 + spread))
    happens = rng.random(5) < DISTORTION
    contrast_first = rng.random() < 0.5
    if happens[0]:
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.875, 1.125))
    if happens[1] and contrast_first:
        image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.5, 1.5))
    if happens[2]:
        image = ImageEnhance.Color(image).enhance(rng.uniform(0.5, 1.5))
    if happens[3]:
        image = _shift_hue(image, rng.uniform(-0.05, 0.05))
    if happens[1] and not contrast_first:
        image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.5, 1.5))
    if happens[4]:
        bands = image.split()
        image = Image.merge("RGB", [bands[band] for band in rng.permutation(3)])
    return image


def _shift_hue(image: Image.Image, turns: float) -> Image.Image:
    """Turn the hue in HSV by at most a sixth of a turn, without computing it.

    Each channel rises from the pixel's least level to its greatest, and falls again, as the hue moves around. It rises
    once the channel that is one third of a turn further on is down at the least level, and falls once that is up at
    the greatest, both by as much as the hue moves on after that.
    """
    planes = [np.asarray(plane).astype(np.int16) for plane in image.split()]
    greatest = np.maximum(np.maximum(planes[0], planes[1]), planes[2])
    least = np.minimum(np.minimum(planes[0], planes[1]), planes[2])
    step = greatest - least
    step *= round(abs(6 * turns) * 128)  # chroma at most 255, so that 16 bits hold it
    step += 64
    step >>= 7
    rises, falls = least + step, step - greatest
    shifted = []
    for index, plane in enumerate(planes):
        further = planes[(index + 1 if turns > 0 else index - 1) % 3]
        level = plane + np.maximum(rises - further, 0)
        level -= np.maximum(falls + further, 0)
        level = np.maximum(np.minimum(level, greatest), least)
        shifted.append(Image.fromarray(level.astype(np.uint8)))
    return Image.merge("RGB", shifted)


def _blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A 5x5 Gaussian; the border is mirrored, as torchvision does."""
    weights = np.exp(-0.5 * (np.arange(3) / rng.uniform(*BLUR_SIGMA)) ** 2)
    weights /= weights[0] + 2 * weights[1:].sum()
    padded = np.pad(np.asarray(image), ((2, 2), (2, 2), (0, 0)), "reflect").astype(np.uint16)
    return Image.fromarray(_smooth(_smooth(padded, weights).swapaxes(0, 1), weights).swapaxes(0, 1).astype(np.uint8))


def _smooth(levels: UInt16[np.ndarray, "h w 3"], weights: Float64[np.ndarray, "3"]) -> UInt16[np.ndarray, "h-4 w 3"]:
    """Weigh each row and its neighbours at distances 1 and 2, in units of 1/256, which 16 bits hold."""
    one, two = (round(256 * weight) for weight in weights[1:])
    total = levels[1:-3] + levels[3:-1]
    total *= one
    outer = levels[:-4] + levels[4:]
    outer *= two
    total += outer
    total += levels[2:-2] * np.uint16(256 - 2 * (one + two))
    total += 128
    total >>= 8
    return total


def _compress(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.choice(QUALITIES, p=QUALITY_WEIGHTS)))
    with Image.open(file) as decoded:
        decoded.load()
        return decoded


def _noise(image: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "H W 3"]:
    draws = np.frombuffer(rng.bytes(2 * image.size), np.uint16)
    noisy = image.astype(np.int16) + _noise_levels()[draws].reshape(image.shape)
    return np.clip(noisy, 0, 255, out=noisy).astype(np.uint8)


@functools.cache
def _noise_levels() -> Int8[np.ndarray, 65536]:
    """The noise in grey levels, rounded as the sum would be, at 65536 equally likely quantiles."""
    normal = NormalDist(0, 255 * NOISE)
    upper = [round(normal.inv_cdf((2**15 + index + 0.5) / 2**16)) for index in range(2**15)]
    return np.array([-level for level in reversed(upper)] + upper, np.int8)


_JITTER = (
    (ImageEnhance.Brightness, BRIGHTNESS),
    (ImageEnhance.Contrast, CONTRAST),
    (ImageEnhance.Color, SATURATION),
)
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
)
"""Probability at strength 1, and what is done, in this order."""
NOISE_PROBABILITY = 0.6
