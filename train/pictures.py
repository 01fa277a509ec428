"""Pictures of held-out photographs while a model trains: image | low-res | bilinear | AnyUp | target."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from anyup_core import figure, visualize
from anyup_core.files import read_image
from anyup_core.preprocessing import normalize
from anyup_jax import AnyUp, upsample
from train.config import Config, Size
from train.data.sources import shipped

Photograph = tuple[str, UInt8[np.ndarray, "Hc Wc 3"]]
SHIPPED = ("chelsea.png", "coffee.png")  # of scikit-image; `train.data` leaves them out


def held_out(config: Config) -> list[Photograph]:
    """Return the names and centre crops, of `dataset.crop_size`, of at most `log.pictures` photographs.

    They are the first by name of `log.pictures_root`. Without it, those of the folder `val` beside `dataset.root`; if
    there is none, the last by name of `dataset.root`, whose names say that they are trained on. For other data sets,
    photographs that scikit-image ships and that no run trains on. Files that cannot be read are passed over.

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
        return [(name, _centre_crop(read_image(path), config.dataset.crop_size)) for name, path in _shipped()[:count]]
    if not root.is_dir():
        raise ValueError(f"{setting}={str(root)!r} is no folder; name a folder of photographs.")
    photographs: list[Photograph] = []
    for path in _files(root, reverse=bool(note)):
        try:
            crop = _centre_crop(read_image(path), config.dataset.crop_size)
        except (OSError, ValueError):
            continue
        photographs.append((path.relative_to(root).as_posix() + note, crop))
        if len(photographs) == count:
            break
    if not photographs:
        raise ValueError(f"{root} holds no photograph to draw; name another folder as log.pictures_root.")
    return photographs


def draw(
    path: str | os.PathLike,
    model: AnyUp,
    encoder: Any,
    photographs: Sequence[Photograph],
    img_size: Size,
    *,
    step: int,
) -> UInt8[np.ndarray, "H W 3"]:
    """Draw one row for each photograph into a file, and return the picture.

    The encoder sees the photograph resized to `img_size`, which is the guidance too, and its features are upsampled to
    the size that the target has: the features of the whole photograph. The colours of a row mean the same in all of
    its panels: one PCA, of the low-resolution features and the target.

    Args:
        path: the file, .png; its folder is created if it does not exist.
        model: AnyUp.
        encoder: of `anyup_jax.encoders`, or a bridge to timm.
        photographs: see `held_out`.
        img_size: height and width of the view.
        step: for the title.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the features are not finite.
    """
    panels = []
    for name, crop in photographs:
        low, upsampled, target = _features(model, encoder, crop, img_size)
        smooth = visualize.bilinear(low, target.shape[:2])
        basis = visualize.pca_basis([target, low])
        colors = visualize.pca_colors(low, smooth, upsampled, target, basis=basis)
        titles = "low-res", "bilinear", "AnyUp", "target"
        maps = low, smooth, upsampled, target
        panels.append((f"{name}\n{_times(crop.shape[:2])}", crop))
        panels += [(f"{title}\n{_times(m.shape)}", color) for title, m, color in zip(titles, maps, colors)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    view = f"Encoder: {encoder.name}, which sees {_times(img_size)}; the target is what it sees of the whole image."
    subtitle = f"{view} Colours: one PCA and one range per row."
    figure.draw_panels(path, panels, columns=5, title=f"Step {step}", subtitle=subtitle)
    return read_image(path)


def _features(model: AnyUp, encoder: Any, crop: UInt8[np.ndarray, "Hc Wc 3"], img_size: Size) -> list[np.ndarray]:
    """Return the low-resolution features, the same upsampled, and the target, all (h, w, C) float32."""
    shape = (1, *img_size, 3)
    whole = jnp.asarray(crop / np.float32(255))[None]
    images = whole, jnp.asarray(normalize(crop))[None]
    view, guidance = (jax.image.resize(image, shape, "bilinear", antialias=True) for image in images)
    low, target = (encoder(encoder.normalize(image)) for image in (view, whole))
    maps = low, upsample(model, guidance, low, target.shape[1:3]), target
    return [np.asarray(features[0], np.float32) for features in maps]


def _shipped() -> list[tuple[str, Path]]:
    folder = shipped()
    return [(name, folder / name) for name in SHIPPED]


def _centre_crop(image: UInt8[np.ndarray, "H W 3"], size: Size) -> UInt8[np.ndarray, "Hc Wc 3"]:
    """Cut the centre out of the image, resized (bilinear, antialiased) so that it just covers `size`."""
    scale = max(wanted / side for wanted, side in zip(size, image.shape))
    rows, columns = (max(wanted, round(side * scale)) for wanted, side in zip(size, image.shape))
    resized = np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR))
    top, left = (rows - size[0]) // 2, (columns - size[1]) // 2
    return resized[top : top + size[0], left : left + size[1]]


def _files(folder: Path, reverse: bool) -> Iterator[Path]:
    """Yield the image files below a folder by name, without listing what is not asked for."""
    for path in sorted(folder.iterdir(), reverse=reverse):
        if path.is_dir():
            yield from _files(path, reverse)
        elif path.suffix.lower() in Image.registered_extensions():
            yield path


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)
