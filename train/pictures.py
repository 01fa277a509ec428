"""Pictures of held-out photographs during training: image | low-res | bilinear | AnyUp | target."""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from anyup_core import figure, visualize
from anyup_core.encoders.frozen import FrozenEncoder
from anyup_core.files import list_folder, read_image
from anyup_core.paths import printable
from anyup_core.preprocessing import normalize
from anyup_jax import AnyUp, upsample
from train.config import Config, Size
from train.data.images import read_crop
from train.data.sources import shipped

Photograph = tuple[str, UInt8[np.ndarray, "Hc Wc 3"]]
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
    for path in _files(root, reverse=bool(note)):
        with contextlib.suppress(OSError, ValueError):
            photographs.append((printable(path.relative_to(root).as_posix()) + note, _centre_crop(path, config)))
        if len(photographs) == count:
            break
    if not photographs:
        raise ValueError(f"{root} holds no photograph to draw; name another folder as log.pictures_root.")
    return photographs


def draw(
    path: str | os.PathLike,
    model: AnyUp,
    encoder: FrozenEncoder,
    photographs: Sequence[Photograph],
    img_size: Size,
    *,
    step: int,
) -> UInt8[np.ndarray, "H W 3"]:
    """Draw a row for each photograph, write the picture to a file and return it.

    The photograph resized to `img_size` is both the guidance and the encoder's input. Its features are upsampled to the
    size of the target, which is the encoder's features of the photograph at full size. One PCA, of the low-resolution
    features and the target, gives the colours of a row.

    Args:
        path: the .png file; its folder is created if it does not exist.
        model: the upsampler.
        encoder: in Flax, or a timm model.
        photographs: from `held_out`.
        img_size: height and width of the view.
        step: number in the title.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the features are not finite.
    """
    panels = []
    for name, crop in photographs:
        low, upsampled, target = _features(model, encoder, crop, img_size)
        maps = low, visualize.bilinear(low, target.shape[:2]), upsampled, target
        colors = visualize.pca_colors(*maps, basis=visualize.pca_basis([target, low]))
        sizes = [crop.shape[:2], *(features.shape for features in maps)]
        titles = name, "low-res", "bilinear", "AnyUp", "target"
        panels += [(f"{t}\n{_times(size)}", image) for t, size, image in zip(titles, sizes, [crop, *colors])]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    view = f"Encoder: {encoder.name}, which sees {_times(img_size)}; the target is what it sees of the whole image."
    subtitle = f"{view} Colours: one PCA and one range per row."
    figure.draw_panels(path, panels, columns=5, title=f"Step {step}", subtitle=subtitle)
    return read_image(path)


def _features(
    model: AnyUp, encoder: FrozenEncoder, crop: UInt8[np.ndarray, "Hc Wc 3"], img_size: Size
) -> list[Float[np.ndarray, "h w C"]]:
    """Return the low-resolution features, the same upsampled, and the target, all (h, w, C) float32."""
    shape = (1, *img_size, 3)
    whole = jnp.asarray(crop / np.float32(255))[None]
    images = whole, jnp.asarray(normalize(crop))[None]
    view, guidance = (jax.image.resize(image, shape, "bilinear", antialias=True) for image in images)
    low, target = (encoder(encoder.normalize(image)) for image in (view, whole))
    maps = low, upsample(model, guidance, low, target.shape[1:3]), target
    return [np.asarray(features[0], np.float32) for features in maps]


def _centre_crop(path: Path, config: Config) -> UInt8[np.ndarray, "Hc Wc 3"]:
    return read_crop(path, str(path), config.dataset.crop_size, max_enlargement=math.inf)


def _files(folder: Path, reverse: bool, outer: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield the photographs below a folder (see `list_folder`) by name; a subfolder is listed when it is reached.

    A link to one of the `outer` folders, which hold this one, is not followed.
    """
    outer |= {folder.resolve()}
    photographs, folders = list_folder(folder, Counter())
    for path in sorted((folder / name for name in photographs + folders), reverse=reverse):
        if path.is_file():
            yield path
        elif path.is_dir() and path.resolve() not in outer:
            yield from _files(path, reverse, outer)


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)
