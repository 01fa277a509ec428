"""Images in, arrays out: photographs of any kind as RGB, and features written so that no half-written file remains."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

ARRAY_SUFFIXES = (".npy", ".npz", ".safetensors")


def read_image(path: str | os.PathLike) -> UInt8[np.ndarray, "H W 3"]:
    """Return an image file as 8-bit RGB, turned upright as its EXIF orientation says.

    Grayscale, palette, CMYK and 16-bit images are converted; transparent ones are laid on white.

    Raises:
        OSError: if the file does not exist, is no image, or is damaged.
        ValueError: if its pixels have no known range (floating point, 32-bit integers above 65535), or it is too large.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image), path))
    except Image.UnidentifiedImageError as error:
        raise OSError(f"{path} is not an image that Pillow can read.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large: {error}") from error
    except (OSError, SyntaxError, EOFError) as error:  # Pillow reports damage in any of these
        if isinstance(error, OSError) and error.filename:
            raise
        raise OSError(f"{path} is damaged: {error}.") from error


def resize_image(image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Return the image at another (height, width), antialiased bicubic; the image itself where the size is its own."""
    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))


def read_features(path: str | os.PathLike) -> Float[np.ndarray, "h w C"]:
    """Return a feature map from an .npy file, as float32.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no .npy file, or not one finite feature map (h, w, C) of floating-point numbers.
    """
    try:
        features = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not an .npy file: {error}") from error
    if not isinstance(features, np.ndarray) or features.ndim != 3 or not np.issubdtype(features.dtype, np.floating):
        found = f"{features.dtype} of shape {features.shape}" if isinstance(features, np.ndarray) else "several arrays"
        raise ValueError(f"{path} holds {found}; give one floating-point feature map (h, w, C) as .npy.")
    features = features.astype(np.float32)
    if not np.isfinite(features).all():
        raise ValueError(f"{path} holds numbers that are not finite; features must be.")
    return features


def check_output(path: str | os.PathLike, suffixes: Collection[str]) -> Path:
    """Return `path` if a file of one of these suffixes can be written there.

    Raises:
        ValueError: for another suffix.
        OSError: if the folder does not exist or cannot be written to, or the path is a folder.
    """
    path = Path(path)
    if path.suffix not in suffixes:
        raise ValueError(f"{path} has the suffix {path.suffix!r}; the output can be {', '.join(suffixes)}.")
    if path.is_dir():
        raise OSError(f"{path} is a folder; name a file in it.")
    if not path.parent.is_dir():
        raise OSError(f"The folder {path.parent} does not exist; create it first.")
    if not os.access(path.parent, os.W_OK):
        raise OSError(f"The folder {path.parent} is not writable.")
    return path


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; it takes the place of `path` only if the block succeeds."""
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        temporary.replace(path)


def write_features(path: str | os.PathLike, features: Float[np.ndarray, "H W C"], metadata: dict[str, Any]) -> None:
    """Write a feature map as float32; the suffix says how.

    - .npy: the array alone, (H, W, C).
    - .npz: `features`, `image_size` (height, width) and `metadata`, a JSON object as a string.
    - .safetensors: the tensor `features`, and the metadata, each value as JSON, in the header.

    Args:
        path: where; an existing file is replaced once the new one is complete.
        features: the feature map.
        metadata: where it comes from; JSON values, among them `image_size`.
    """
    path = Path(path)
    features = np.ascontiguousarray(features, np.float32)
    with replacing(path) as temporary:
        if path.suffix == ".npy":
            np.save(temporary, features)
        elif path.suffix == ".npz":
            image_size = np.array(metadata["image_size"], np.int64)
            np.savez(temporary, features=features, image_size=image_size, metadata=np.array(json.dumps(metadata)))
        else:
            from safetensors.numpy import save_file

            save_file({"features": features}, temporary, {key: json.dumps(value) for key, value in metadata.items()})


def _to_rgb(image: Image.Image, path: str | os.PathLike) -> Image.Image:
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
