"""One photograph from a file: decoded, resized and cropped."""

from __future__ import annotations

import dataclasses
import io
import math
import os
from typing import IO

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from anyup_core.files import open_image, to_rgb
from train.config import Size

QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that swap height and width


class TooSmall(ValueError):
    """The photograph is too small to cover the crop, even enlarged as far as is allowed."""


@dataclasses.dataclass(frozen=True)
class Region:
    """A random part of a photograph, with the proportions of the crop; all numbers are in [0, 1].

    Attributes:
        down, across: its place: 0 for the top or left edge, 1 for the bottom or right one.
        size: its area: 0 for that of the largest region, 1 for the least share.
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
    file: str | os.PathLike | IO[bytes] | io.BytesIO,
    name: str,
    size: Size,
    region: Region | None = None,
    max_enlargement: float = 1.0,
) -> UInt8[np.ndarray, "Hc Wc 3"]:
    """Return the centre of a photograph, resized (bilinear, antialiased) so that it just covers `size`, as 8-bit RGB.

    Grayscale, palette, CMYK and 16-bit images are converted; transparent ones are laid on white. For speed, a JPEG of
    more than twice the size is decoded at 1/2, 1/4 or 1/8 of its size, but no smaller than twice the wanted one.

    Args:
        file: path, or an open file.
        name: name of the photograph in errors.
        size: height and width of the crop.
        region: the part to take instead of the largest one in the centre.
        max_enlargement: the greatest factor by which the photograph may be enlarged.

    Raises:
        TooSmall: if it would have to be enlarged by more to cover `size`.
        OSError: if it cannot be read.
        ValueError: if the range of its pixels is unknown, or it is too large.
    """
    try:
        with open_image(file, name) as image:
            return _crop(image, name, size, region, max_enlargement)
    except (OSError, ValueError):
        raise
    except Exception as error:  # damage makes Pillow raise nearly anything; one file must not end a run
        raise OSError(f"{name} is damaged: {error!r}.") from error


def covers(height: int, width: int, size: Size, max_enlargement: float) -> bool:
    """Return whether a photograph, enlarged by the greatest factor, covers `size`."""
    return height * max_enlargement >= size[0] and width * max_enlargement >= size[1]


def _crop(
    image: Image.Image, name: str, size: Size, region: Region | None, max_enlargement: float
) -> UInt8[np.ndarray, "Hc Wc 3"]:
    height, width = upright_size(image)
    whole, corner = place(height, width, name, size, region, max_enlargement)
    if image.format == "JPEG":
        stored = whole if (height, width) == image.size[::-1] else whole[::-1]  # before it is turned upright
        image.draft(None, (2 * stored[1], 2 * stored[0]))
    image = to_rgb(image, name)
    box = crop_box(image.height, image.width, whole, corner, size)
    return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR, box))


def place(
    height: int, width: int, name: str, size: Size, region: Region | None, max_enlargement: float
) -> tuple[Size, tuple[int, int]]:
    """Return the size that an image is to be resized to, and there the row and column of the crop's corner.

    Arguments are those of `read_crop`. Raises TooSmall.
    """
    if not covers(height, width, size, max_enlargement):
        most = "" if max_enlargement == 1 else f" and dataset.max_enlargement={max_enlargement:g}"
        raise TooSmall(f"{name} has {height}x{width} pixels, too few for dataset.crop_size={size[0]}x{size[1]}{most}.")
    scale, down, across = max(size[0] / height, size[1] / width), 0.5, 0.5
    if region is not None:  # a share s of the area needs the scale of the largest region times 1 / sqrt(s / its share)
        largest = size[0] * size[1] / (scale * scale * height * width)
        share = largest - region.size * max(0.0, largest - region.least)
        scale, down, across = min(max_enlargement, scale * math.sqrt(largest / share)), region.down, region.across
    whole = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    y, x = (round((full - part) * share) for full, part, share in zip(whole, size, (down, across)))
    return whole, (y, x)


def crop_box(
    height: int, width: int, whole: Size, corner: tuple[int, int], size: Size
) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of the crop, in pixels of an image that has not been resized to `whole`."""
    (y, x), tall, wide = corner, height / whole[0], width / whole[1]
    return x * wide, y * tall, min((x + size[1]) * wide, width), min((y + size[0]) * tall, height)
