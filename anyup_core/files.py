"""Images in, arrays out: which files are photographs, these as RGB, and features written so that no half-written file
remains."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float, UInt8

from anyup_core.replacement import replacing

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jp2", ".avif",
)  # fmt: skip
HIDDEN = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")  # what archives and file servers add to folders
HIDDEN_ENTRIES, OTHER_FILES = "hidden files and folders", "files that are no images"  # what `list_folder` leaves out
ARRAY_SUFFIXES = (".npz", ".safetensors")  # written at once, with their metadata
PlacedBands = Iterator[tuple[int, Float[np.ndarray, "_ W C"]]]
BAND_SUFFIXES = (".npy", ".zarr")  # written band by band, so they may be larger than memory
ZARR_CHUNK = 1 << 22  # numbers in a chunk of a Zarr array, about


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is no part of a data set: its name begins with a dot, or is one of `HIDDEN`."""
    return name.startswith(".") or name in HIDDEN


def is_photograph(path: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> bool:
    """Return whether a relative path is that of a photograph: one of the suffixes in any case, nothing hidden."""
    return path.lower().endswith(suffixes) and not any(map(is_hidden, path.split("/")))


def list_folder(
    folder: str | os.PathLike, left_out: Counter[str], suffixes: tuple[str, ...] = IMAGE_SUFFIXES
) -> tuple[list[str], list[str]]:
    """Return the names of the photographs and of the subfolders in a folder, both sorted; count the rest in `left_out`.

    Photographs are files with one of the suffixes.

    Raises:
        OSError: if the folder cannot be listed.
    """
    photographs, folders = [], []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if is_hidden(entry.name):
            left_out[HIDDEN_ENTRIES] += 1
        elif entry.is_dir():
            folders.append(entry.name)
        elif is_photograph(entry.name, suffixes):
            photographs.append(entry.name)
        else:
            left_out[OTHER_FILES] += 1
    return photographs, folders


def describe(left_out: Counter[str]) -> str:
    """Return what was left out as the end of a sentence: "; 3 left out: hidden files and folders (3)", or ""."""
    kinds = ", ".join(f"{kind} ({count})" for kind, count in left_out.items() if count)
    return f"; {left_out.total()} left out: {kinds}" if kinds else ""


def read_image(path: str | os.PathLike) -> UInt8[np.ndarray, "H W 3"]:
    """Return an image file as 8-bit RGB, turned upright as its EXIF orientation says.

    Grayscale, palette, CMYK and 16-bit images are converted; transparent ones are laid on white.

    Raises:
        OSError: if the file does not exist, is no image, or is damaged.
        ValueError: if its pixels have no known range (floating point, 32-bit integers above 65535), or it is too large.
    """
    with open_image(path, path) as image:
        return np.asarray(to_rgb(image, path))


@contextlib.contextmanager
def open_image(file: str | os.PathLike | IO[bytes] | io.BytesIO, name: str | os.PathLike) -> Iterator[Any]:
    """Give an image file, or one in memory, as Pillow's `Image`; errors, those of the block too, call it `name`.

    Raises:
        OSError: if the file does not exist, is no image, or is damaged.
        ValueError: if it is too large.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            yield image
    except Image.UnidentifiedImageError as error:
        raise OSError(f"{name} is not an image that Pillow can read.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large: {error}") from error
    except (OSError, SyntaxError, EOFError, RuntimeError, ValueError) as error:  # Pillow reports damage in any of these
        if (isinstance(error, OSError) and error.filename) or str(name) in str(error):
            raise
        if isinstance(error, ValueError):
            raise ValueError(
                f"{name} has text or a colour profile that Pillow refuses ({error}); save it without these."
                if "MAX_TEXT" in str(error)
                else f"{name} cannot be read: {error}"
            ) from error
        raise OSError(f"{name} is damaged: {error}.") from error


def to_rgb(image: Any, path: str | os.PathLike) -> Any:
    """Return a Pillow `Image` as one of 8-bit RGB, turned upright; see `read_image`. `image` may be turned in place.

    Raises:
        ValueError: if its pixels have no known range.
    """
    from PIL import Image, ImageOps

    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "I" or image.mode.startswith("I;16"):  # grayscale of 16 bits, in 16 or in 32
        gray = np.asarray(image).astype(np.int64)
        if gray.min() < 0 or gray.max() > 65535:
            raise ValueError(f"{path} holds integers from {gray.min()} to {gray.max()}; convert it to 8 or 16 bits.")
        image = Image.fromarray((gray / 257).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError(f"{path} holds floating-point pixels, whose range is unknown; convert it to 8 or 16 bits.")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize_image(image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Return the image at another (height, width), antialiased bicubic; the image itself where the size is its own."""
    if image.shape[:2] == tuple(size):
        return image
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def read_features(path: str | os.PathLike) -> Float[np.ndarray, "h w C"]:
    """Return a feature map from an .npy file, as float32.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no .npy file, or not one finite feature map (h, w, C) of floating-point numbers.
    """
    try:
        features = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, TokenError, OverflowError, MemoryError, BadZipFile) as error:
        raise ValueError(f"{path} is not an .npy file, or is damaged: {error}") from error
    if not isinstance(features, np.ndarray) or features.ndim != 3 or not np.issubdtype(features.dtype, np.floating):
        content = f"{features.dtype} of shape {features.shape}" if isinstance(features, np.ndarray) else "an archive"
        raise ValueError(f"{path} holds {content}; give one floating-point feature map (h, w, C) as .npy.")
    features = features.astype(np.float32)
    if not np.isfinite(features).all():
        raise ValueError(f"{path} holds numbers that are not finite; features must be.")
    return features


def check_output(path: str | os.PathLike, suffixes: Collection[str]) -> Path:
    """Return `path` if a file of one of these suffixes, or a Zarr array, can be written there.

    Raises:
        ValueError: for another suffix.
        OSError: if the folder does not exist or cannot be written to, or the path is a folder, but for .zarr one that
            holds a Zarr array, which is a folder itself.
    """
    path = Path(path)
    if path.suffix not in suffixes:
        raise ValueError(f"{path} has the suffix {path.suffix!r}; the output can be {', '.join(suffixes)}.")
    if path.suffix == ".zarr" and path.exists() and not (path / ".zarray").is_file():
        raise OSError(f"{path} exists and is no Zarr array of version 2; move it away or choose another name.")
    if path.suffix != ".zarr" and path.is_dir():
        raise OSError(f"{path} is a folder; name a file in it.")
    folder = Path(os.path.realpath(path)).parent  # where `path` is a link, the file behind it is written
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder {folder} does not exist; create it first.")
    if not os.access(folder, os.W_OK):
        raise OSError(f"The folder {folder} is not writable; name a file in another one.")
    return path


def write_features(
    path: str | os.PathLike, features: Float[np.ndarray, "H W C"], metadata: dict[str, Any], dtype: str = "float32"
) -> None:
    """Write a feature map; the suffix says how.

    - .npy: the array alone, (H, W, C).
    - .npz: `features`, `image_size` (height, width) and `metadata`, a JSON object as a string.
    - .safetensors: the tensor `features`, and the metadata, each value as JSON, in the header.

    Args:
        path: where; an existing file is replaced once the new one is complete.
        features: the feature map.
        metadata: where it comes from; JSON values, among them `image_size`.
        dtype: "float32" or "float16".

    Raises:
        ValueError: for another suffix.
    """
    path = check_output(path, (".npy", *ARRAY_SUFFIXES))
    features = np.ascontiguousarray(features, dtype)
    with replacing(path) as temporary:
        if path.suffix == ".npy":
            np.save(temporary, features)
        elif path.suffix == ".npz":
            image_size = np.array(metadata["image_size"], np.int64)
            np.savez(temporary, features=features, image_size=image_size, metadata=np.array(json.dumps(metadata)))
        else:
            from safetensors.numpy import save_file

            save_file({"features": features}, temporary, {key: json.dumps(value) for key, value in metadata.items()})


def write_bands(
    path: str | os.PathLike,
    bands: Iterable[Float[np.ndarray, "_ _ _"]],
    shape: tuple[int, int, int],
    metadata: dict[str, Any],
    dtype: str = "float32",
) -> None:
    """Write a feature map that comes in bands of rows, from the top, none of which is kept; the suffix says how.

    - .npy: the array alone, (H, W, C).
    - .zarr: a Zarr array of version 2, uncompressed, with the metadata as its attributes.

    Args:
        path: where; an existing file or Zarr array is replaced once the new one is complete.
        bands: the map, piece by piece; read one at a time.
        shape: of the whole map.
        metadata: where it comes from; JSON values.
        dtype: "float32" or "float16".

    Raises:
        OSError: if the disk is too small, now or while writing; nothing is left behind then.
        ValueError: if the bands do not make up a map of this shape.
    """
    path = Path(path)
    check_room(path, shape, dtype)
    write = _write_npy if path.suffix == ".npy" else _write_zarr
    with replacing(path) as temporary:
        write(temporary, _placed(bands, shape, dtype), shape, np.dtype(dtype), metadata)


def check_room(path: Path, shape: tuple[int, int, int], dtype: str) -> None:
    """Raise OSError if the disk has no room for a feature map of this shape."""
    needed, free = math.prod(shape) * np.dtype(dtype).itemsize, shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(
            f"{path} of shape {tuple(shape)} in {dtype} takes {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are "
            "free there; write float16, choose another disk or a smaller output size (--output-size)."
        )


def _placed(bands: Iterable[Float[np.ndarray, "_ _ _"]], shape: tuple[int, ...], dtype: str) -> PlacedBands:
    """Yield each band with the number of its first row."""
    first = 0
    for band in bands:
        if band.shape[1:] != tuple(shape[1:]) or first + len(band) > shape[0]:
            raise ValueError(f"A band of shape {band.shape} after {first} rows does not fit into {shape}.")
        yield first, np.ascontiguousarray(band, dtype)
        first += len(band)
    if first != shape[0]:
        raise ValueError(f"The bands ended after {first} of {shape[0]} rows.")


def _write_npy(path: Path, bands: PlacedBands, shape: tuple[int, ...], dtype: np.dtype, metadata: Any) -> None:
    header = dict(descr=np.lib.format.dtype_to_descr(dtype), fortran_order=False, shape=tuple(shape))
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for _, band in bands:
            file.write(band.data)


def _write_zarr(path: Path, bands: PlacedBands, shape: tuple[int, ...], dtype: np.dtype, metadata: Any) -> None:
    """Chunks hold rows that the bands fill in turn, so that a chunk is read again only where a band ends within it."""
    import tensorstore

    store = None
    for first, band in bands:
        try:
            if store is None:
                rows, cols = min(len(band), shape[0]), max(1, min(shape[1], ZARR_CHUNK // (len(band) * shape[2])))
                layout = dict(shape=list(shape), chunks=[rows, cols, shape[2]], dtype=dtype.str, compressor=None)
                spec = dict(driver="zarr", kvstore=dict(driver="file", path=f"{path}/"), metadata=layout)
                store = tensorstore.open(spec, create=True).result()
                (path / ".zattrs").write_text(json.dumps(metadata))
            store[first : first + len(band)].write(band).result()
        except ValueError as error:  # tensorstore's way to report a full disk
            raise OSError(f"{path.name} could not be written: {error}") from error
