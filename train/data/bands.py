"""Images of any number of bands, such as those of Sentinel-2, from TIFF and NPY files."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np
from jaxtyping import Float32
from PIL import Image

from train.config import Size
from train.data.images import Region, crop_box, place

SUFFIXES = (".tif", ".tiff", ".npy")
NPY_HEADER = dict(descr="'([^']+)'", fortran_order="(True|False)", shape=r"\(([\d, ]*)\)")
File = str | os.PathLike | IO[bytes] | io.BytesIO


class OtherBands(ValueError):
    """The image has another number of bands, or does not say on which axis they are."""


def read_bands(file: File, name: str, bands: int) -> Float32[np.ndarray, "H W bands"]:
    """Return all bands of a TIFF or NPY file, with the values of the file.

    The axis of the bands is the one that a TIFF says holds samples or channels. Otherwise it is the first or the last,
    whichever has `bands` entries; of an NPY file the last if both have.

    Args:
        file: path, or an open file.
        name: name of the image in errors; its suffix says what it is.
        bands: how many bands it must have.

    Raises:
        OSError: if it cannot be read.
        OtherBands: if it has other bands.
        ValueError: if it holds no real numbers, or some that are not finite.
    """
    with _opened(file, name) as (shape, axes, read):
        axis = _band_axis(shape, axes, name, bands)
        pixels = np.moveaxis(read().reshape(shape), axis, -1)
    if pixels.dtype.kind not in "uif":
        raise ValueError(f"{name} holds {pixels.dtype}; bands must be whole or floating-point numbers.")
    pixels = pixels.astype(np.float32)
    if not np.isfinite(pixels).all():
        raise ValueError(f"{name} holds values that are NaN or infinite; fill them in, or leave the image out.")
    return pixels


def band_size(path: str, bands: int) -> Size:
    """Return height and width without reading the pixels; -1, -1 if that fails. Raises OtherBands."""
    with contextlib.suppress(OSError):
        if os.path.isfile(path):  # opening a pipe or a device could wait for ever
            with _opened(path, path) as (shape, axes, _):
                axis = _band_axis(shape, axes, path, bands)
                height, width = (side for number, side in enumerate(shape) if number != axis)
                return height, width
    return -1, -1


def read_band_crop(
    file: File, name: str, size: Size, region: Region | None = None, max_enlargement: float = 1.0, *, bands: int
) -> Float32[np.ndarray, "Hc Wc bands"]:
    """Return the crop as `images.read_crop` does, with all bands.

    Raises:
        TooSmall: as that.
        OSError, OtherBands, ValueError: as `read_bands`.
    """
    pixels = read_bands(file, name, bands)
    height, width, _ = pixels.shape
    whole, corner = place(height, width, name, size, region, max_enlargement)
    box = crop_box(height, width, whole, corner, size)
    planes = (Image.fromarray(np.ascontiguousarray(pixels[..., band])) for band in range(bands))
    resized = [np.asarray(x.resize((size[1], size[0]), Image.Resampling.BILINEAR, box)) for x in planes]
    return np.stack(resized, -1)


@contextlib.contextmanager
def _opened(file: File, name: str) -> Iterator[tuple[tuple[int, ...], str, Callable[[], np.ndarray]]]:
    """Give an image's shape, with an axis of bands, its axes as a TIFF names them or "", and what reads it."""
    import tifffile

    logging.getLogger(tifffile.__name__).setLevel(logging.CRITICAL)  # what it says of damage, it also raises
    try:
        with contextlib.ExitStack() as stack:
            if name.lower().endswith(".npy"):
                opened = stack.enter_context(open(file, "rb")) if isinstance(file, str | os.PathLike) else file
                shape, read = _open_npy(opened)
                axes = ""
            else:
                series = stack.enter_context(tifffile.TiffFile(file)).series[0]
                shape, axes, read = series.shape, series.axes, series.asarray
            if len(shape) == 2:
                shape, axes = (*shape, 1), axes and f"{axes}S"
            yield shape, axes, read
    except (OtherBands, FileNotFoundError):
        raise
    except Exception as error:  # damage makes tifffile and numpy raise nearly anything; one file must not end a run
        text = str(error).rstrip(".") or type(error).__name__
        remedy = "; pip install imagecodecs, or save it with deflate" if "imagecodecs" in text else ""
        raise OSError(f"{name} cannot be read: {text}{remedy}.") from error


def _open_npy(file: IO[bytes] | io.BytesIO) -> tuple[tuple[int, ...], Callable[[], np.ndarray]]:
    """Return the shape of an NPY file, and what reads its array.

    `numpy.load` parses the header with `ast`, which in Python 3.11 fails at random while other threads do so too.
    """
    size = 2 if np.lib.format.read_magic(file) == (1, 0) else 4
    header = file.read(int.from_bytes(file.read(size), "little")).decode("latin1")
    found = [re.search(rf"'{key}': *{value}", header) for key, value in NPY_HEADER.items()]
    if not all(found):
        raise ValueError(f"its header is {header[:80]!r}, not that of a plain array")
    kind, fortran, sides = (match[1] for match in found if match)
    shape, dtype = tuple(int(side) for side in sides.split(",") if side.strip()), np.dtype(kind)

    def read() -> np.ndarray:
        count = math.prod(shape)
        values = np.frombuffer(file.read(count * dtype.itemsize), dtype, count)
        return values.reshape(shape, order="F" if fortran == "True" else "C")

    return shape, read


def _band_axis(shape: tuple[int, ...], axes: str, name: str, bands: int) -> int:
    """Return the axis of the bands; "S" (samples) and "C" (channels) are tifffile's letters for it."""
    named = [number for number, letter in enumerate(axes) if letter in "SC"]
    fitting = [number for number in named or (0, 2) if len(shape) == 3 and shape[number] == bands]
    if not fitting:
        raise OtherBands(
            f"{name} has the shape {_times(shape)}; with model.input_dim={bands} it must be an image of {bands} bands, "
            f"H x W x {bands} or {bands} x H x W."
        )
    if len(fitting) > 1 and axes:
        raise OtherBands(
            f"{name} has the shape {_times(shape)} and does not say which axis holds the {bands} bands; save them "
            "as samples of a pixel."
        )
    return fitting[-1]


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
