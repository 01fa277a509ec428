"""One photograph: decoded, resized and centre cropped, from a file or from bytes."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import IO

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

from anyup_core.files import open_image, to_rgb
from train.config import Size

QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that swap height and width


class TooSmall(ValueError):
    """The photograph would have to be enlarged, or by more than is allowed, to cover the crop."""


@dataclasses.dataclass(frozen=True)
class Region:
    """Which part of a photograph is taken, from random numbers in [0, 1).

    Attributes:
        down, across: where it lies, between the two edges.
        size: its area, between the least share and the largest region that has the crop's proportions.
        least: the least share of the photograph's area.
    """

    down: float
    across: float
    size: float
    least: float


def upright_size(image: Image.Image) -> Size:
    """Return height and width of a Pillow image once it is turned as its EXIF orientation says."""
    turned = image.getexif().get(ExifTags.Base.Orientation) in QUARTER_TURNS
    return image.size if turned else image.size[::-1]


def read_crop(
    file: str | os.PathLike | IO[bytes],
    name: str,
    size: Size,
    region: Region | None = None,
    max_enlargement: float = 1.0,
) -> UInt8[np.ndarray, "Hc Wc 3"]:
    """Return the centre of a photograph, resized (bilinear, antialiased) so that it just covers `size`, as 8-bit RGB.

    Grayscale, palette, CMYK and 16-bit images are converted, transparent ones are laid on white. A JPEG of more than
    twice the size is decoded at a half, a quarter or an eighth of it, and no less than twice the size, for speed.

    Args:
        file: its path, or an open file.
        name: what errors call it.
        size: height and width.
        region: what to take instead of the largest region in the centre.
        max_enlargement: the greatest factor that the photograph may be enlarged by.

    Raises:
        TooSmall: if it would have to be enlarged by more to cover `size`.
        OSError: if it cannot be read.
        ValueError: if its pixels have no known range, or it is too large.
    """
    try:
        with open_image(file, name) as image:
            return _crop(image, name, size, region, max_enlargement)
    except (OSError, ValueError):
        raise
    except Exception as error:  # damage makes Pillow raise nearly anything; one file must not end a run
        raise OSError(f"{name} is damaged: {error!r}.") from error


def covers(height: int, width: int, size: Size, max_enlargement: float) -> bool:
    """Whether a photograph covers `size` when it is enlarged by the greatest factor."""
    return height * max_enlargement >= size[0] and width * max_enlargement >= size[1]


def _crop(
    image: Image.Image, name: str, size: Size, region: Region | None, max_enlargement: float
) -> UInt8[np.ndarray, "Hc Wc 3"]:
    height, width = upright_size(image)
    if not covers(height, width, size, max_enlargement):
        most = "" if max_enlargement == 1 else f" and dataset.max_enlargement={max_enlargement:g}"
        raise TooSmall(f"{name} has {height}x{width} pixels, too few for dataset.crop_size={size[0]}x{size[1]}{most}.")
    scale, down, across = max(size[0] / height, size[1] / width), 0.5, 0.5
    if region is not None:  # a share s of the area needs the scale of the largest region times 1 / sqrt(s / its share)
        largest = size[0] * size[1] / (scale * scale * height * width)
        share = largest - region.size * max(0.0, largest - region.least)
        scale, down, across = min(max_enlargement, scale * math.sqrt(largest / share)), region.down, region.across
    whole = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    if image.format == "JPEG":
        asked = whole if (height, width) == image.size[::-1] else whole[::-1]
        image.draft(None, (2 * asked[1], 2 * asked[0]))
    ImageOps.exif_transpose(image, in_place=True)
    image = to_rgb(image, name)
    y, x = (round((full - part) * place) for full, part, place in zip(whole, size, (down, across)))
    tall, wide = image.height / whole[0], image.width / whole[1]
    box = x * wide, y * tall, min((x + size[1]) * wide, image.width), min((y + size[0]) * tall, image.height)
    return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR, box))
