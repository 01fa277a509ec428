"""Resizing to cover a size and cropping the centre, with the same integers for an image and for its labels."""

from __future__ import annotations

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

from evaluation.config import Size


def covering(native: Size, size: Size) -> Size:
    """Return the smallest height and width with the proportions of `native` that cover `size`.

    The side that needs the larger factor becomes that of `size`; the other one is rounded down, as in torchvision's
    `Resize`.
    """
    height, width = native
    return max(size[0], size[1] * height // width), max(size[1], size[0] * width // height)


def centre(whole: Size, size: Size) -> tuple[int, int]:
    """Return the first row and column of the centre crop; halves are rounded to even, as in torchvision."""
    return round((whole[0] - size[0]) / 2), round((whole[1] - size[1]) / 2)


def crop_image(image: Image.Image, size: Size) -> UInt8[np.ndarray, "h w 3"]:
    """Return the centre of an 8-bit RGB image, resized (bilinear, antialiased) so that it just covers `size`."""
    whole = covering((image.height, image.width), size)
    y, x = centre(whole, size)
    image = image.resize(whole[::-1], Image.Resampling.BILINEAR)
    return np.asarray(image.crop((x, y, x + size[1], y + size[0])))


def crop_nearest(array: Shaped[np.ndarray, "H W *rest"], size: Size) -> Shaped[np.ndarray, "h w *rest"]:
    """Return the part of `array` that `crop_image` shows, resized to the nearest pixel.

    Of n pixels resized to m, pixel i is number floor((i + 1/2) n / m): PyTorch's "nearest-exact", in integers.
    """
    whole = covering(array.shape[:2], size)
    rows, cols = (
        (2 * np.arange(first, first + count) + 1) * native // (2 * resized)
        for first, count, native, resized in zip(centre(whole, size), size, array.shape, whole)
    )
    return array[rows[:, None], cols]
