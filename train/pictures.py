"""Pictures of held-out photographs during training: image | low-res | bilinear | upsampled | target."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, UInt8

from anyup_core import figure, visualize
from anyup_core.encoders.frozen import FrozenEncoder
from anyup_core.files import IMAGE_SUFFIXES, list_folder, read_image
from anyup_core.paths import printable
from anyup_core.preprocessing import normalize
from anyup_jax import AnyUp, upsample
from anyup_jax.upsamplers.protocol import ConfiguredUpsampler
from train.augment import encoder_photograph
from train.config import Config, DatasetConfig
from train.data import bands
from train.data.images import read_crop
from train.data.sources import shipped
from train.step import encoder_pixels

Crop = UInt8[np.ndarray, "Hc Wc 3"] | Float32[np.ndarray, "Hc Wc bands"]
Photograph = tuple[str, Crop]
SHIPPED = ("chelsea.png", "coffee.png")  # by scikit-image; no run trains on them


def held_out(config: Config) -> list[Photograph]:
    """Return the names and centre crops, of `dataset.crop_size`, of at most `log.pictures` photographs.

    They are the first by name in `log.pictures_root`. By default, those in the folder `val` beside `dataset.root`; if
    there is none, the last by name in `dataset.root`, and their names say "(trained on)". For other data sets, they are
    photographs that scikit-image ships and that no run trains on. Files that cannot be read are left out.

    Raises:
        ValueError: if the folder does not exist or holds no photograph.
        ImportError: if scikit-image is needed and not installed.
    """
    count, note = config.log.pictures, ""
    if config.log.pictures_root is not None:
        setting, root = "log.pictures_root", Path(config.log.pictures_root)
    elif config.dataset.kind == "folder":
        setting, root = "dataset.root", Path(str(config.dataset.root))
        beside = root.absolute().parent / "val"
        note = "" if beside.is_dir() and beside != root.absolute() else " (trained on)"
        root = root if note else beside
    else:
        folder = shipped()
        return [(name, _centre_crop(folder / name, config)) for name in SHIPPED[:count]]
    if not root.is_dir():
        raise ValueError(f"{setting}={str(root)!r} is no folder; name a folder of photographs.")
    photographs: list[Photograph] = []
    suffixes = IMAGE_SUFFIXES if config.bands is None else bands.SUFFIXES
    for path in _files(root, bool(note), suffixes):
        with contextlib.suppress(OSError, ValueError):
            photographs.append((printable(path.relative_to(root).as_posix()) + note, _centre_crop(path, config)))
        if len(photographs) == count:
            break
    if not photographs:
        raise ValueError(f"{root} holds no photograph to draw; name another folder as log.pictures_root.")
    return photographs


def draw(
    path: str | os.PathLike,
    model: AnyUp | ConfiguredUpsampler,
    encoder: FrozenEncoder,
    photographs: Sequence[Photograph],
    data: DatasetConfig,
    *,
    step: int,
) -> UInt8[np.ndarray, "H W 3"]:
    """Draw a row for each photograph, write the picture to a file and return it.

    The photograph resized to `img_size` is both the guidance and the encoder's input. Its features are upsampled to the
    size of the target, which is the encoder's features of the photograph at full size. One PCA, of the low-resolution
    features and the target, gives the colours of a row. Images of bands are drawn as the encoder sees them.

    Args:
        path: the .png file; its folder is created if it does not exist.
        model: the upsampler.
        encoder: in Flax, or a timm model.
        photographs: from `held_out`.
        data: the data set, with mean and deviation of each band.
        step: number in the title.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the features are not finite.
    """
    panels = []
    for name, crop in photographs:
        low, upsampled, target = _features(model, encoder, crop, data)
        maps = low, visualize.bilinear(low, target.shape[:2]), upsampled, target
        colors = visualize.pca_colors(*maps, basis=visualize.pca_basis([target, low]))
        image = encoder_photograph(crop, data)
        sizes = [image.shape[:2], *(features.shape for features in maps)]
        titles = name, "low-res", "bilinear", type(model).__name__, "target"
        panels += [(f"{t}\n{_times(size)}", image) for t, size, image in zip(titles, sizes, [image, *colors])]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    view = (
        f"Encoder: {encoder.name}, which sees {_times(data.img_size)}; the target is what it sees of the whole image."
    )
    subtitle = f"{view} Colours: one PCA and one range per row."
    figure.draw_panels(path, panels, columns=5, title=f"Step {step}", subtitle=subtitle)
    return read_image(path)


def _features(
    model: AnyUp | ConfiguredUpsampler, encoder: FrozenEncoder, crop: Crop, data: DatasetConfig
) -> list[Float[np.ndarray, "h w C"]]:
    """Return the low-resolution features, the same upsampled, and the target, all (h, w, C) float32."""
    if data.encoder_bands is None:
        seen, normalized = crop / np.float32(255), normalize(crop)
    else:
        mean, std = (np.array(x, np.float32) for x in (data.mean, data.std))
        seen, normalized = encoder_pixels(jnp.asarray(crop), data), (crop - mean) / std
    whole, guide = jnp.asarray(seen)[None], jnp.asarray(normalized)[None]
    view, guidance = (
        jax.image.resize(image, (1, *data.img_size, image.shape[-1]), "bilinear", antialias=True)
        for image in (whole, guide)
    )
    low, target = (encoder(encoder.normalize(image)) for image in (view, whole))
    if isinstance(model, AnyUp):
        maps = low, upsample(model, guidance, low, target.shape[1:3]), target
    else:
        mean, std = (jnp.asarray(x) for x in model.normalisation)
        maps = low, model((view - mean) / std, low, target.shape[1:3]), target
    return [np.asarray(features[0], np.float32) for features in maps]


def _centre_crop(path: Path, config: Config) -> Crop:
    read = read_crop if config.bands is None else functools.partial(bands.read_band_crop, bands=config.bands)
    return read(path, str(path), config.dataset.crop_size, max_enlargement=math.inf)


def _files(
    folder: Path, reverse: bool, suffixes: tuple[str, ...], outer: frozenset[Path] = frozenset()
) -> Iterator[Path]:
    """Yield the photographs below a folder (see `list_folder`) by name; a subfolder is listed when it is reached.

    A link to one of the `outer` folders, which hold this one, is not followed.
    """
    outer |= {folder.resolve()}
    photographs, folders = list_folder(folder, Counter(), suffixes)
    for path in sorted((folder / name for name in photographs + folders), reverse=reverse):
        if path.is_file():
            yield path
        elif path.is_dir() and path.resolve() not in outer:
            yield from _files(path, reverse, suffixes, outer)


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)
