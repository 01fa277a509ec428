"""Images and the class of each of their pixels, of one size, from every data set that a configuration can name."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int16, UInt8
from PIL import ExifTags, Image, ImageOps

from anyup_core.files import open_image, to_rgb
from anyup_core.settings import require
from evaluation.config import DatasetConfig
from evaluation.data.cropping import crop_image, crop_nearest
from evaluation.data.layouts import LAYOUTS, SPLITS, Records, open_records
from evaluation.data.split import Files, Split
from train.data.images import upright_size

CLASSES = "classes.json"
UNKNOWN = -1  # in a table of labels: a value that is no class
STORED = dict.fromkeys(("1", "L", "LA", "P", "P;1", "P;2", "P;4", "I;16", "I;16B", "I;16L"), 1) | {"L;2": 85, "L;4": 17}
"""Pillow's names of what a label file may store -> the factor that Pillow scales the stored integers by."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples(Split):
    """The images and labels of a split, and which of their pixels count. A view is an image, mirrored or not.

    Attributes:
        classes: names of the classes.
        ignore: label of pixels that do not count.
        table: the class of every value of a label file, or `ignore`.
        mirrored: whether there are mirrored views too.
        pixel_stride: of every square of this many pixels a side, one counts; the others have the label `ignore`.
        seed: of the choice of pixels.
    """

    source: Files | Records
    classes: tuple[str, ...]
    ignore: int
    table: Int16[np.ndarray, "values=256"]
    mirrored: bool = False
    pixel_stride: int = 1
    seed: int = 0

    @functools.cached_property
    def contents(self) -> str:
        """A digest of the stored images and labels, wherever they are, and the number of classes."""
        return f"{super().contents} {len(self.classes)}"

    def thinned(self, label: UInt8[np.ndarray, "H W"], index: int, mirror: bool) -> UInt8[np.ndarray, "H W"]:
        """Return the label of a view with only the pixels that count."""
        if self.pixel_stride == 1:
            return label
        return np.where(self.chosen(index, mirror), label, self.ignore).astype(np.uint8)

    def targets(self, index: int) -> Bool[np.ndarray, "views H W"]:
        """Return which pixels of the views of an image are learned or scored."""
        views = (False, True)[: 1 + self.mirrored]
        labels = [self.thinned(self.read(index, mirror)[1], index, mirror) for mirror in views]
        return np.stack(labels) != self.ignore

    def chosen(self, index: int, mirror: bool) -> Bool[np.ndarray, "H W"]:
        """Return which pixels of a view count."""
        stride = self.pixel_stride
        blocks = tuple(-(-side // stride) for side in self.size)
        pick = np.random.default_rng((self.seed, index, mirror)).integers(0, stride, (2, *blocks))
        mask = np.zeros([count * stride for count in blocks], bool)
        mask[np.arange(blocks[0])[:, None] * stride + pick[0], np.arange(blocks[1]) * stride + pick[1]] = True
        return mask[: self.size[0], : self.size[1]]

    def read(self, index: int, mirror: bool = False) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"]]:
        """Return the image of a view as RGB, and the class of each of its pixels, or `ignore`; all pixels count.

        Both are resized so that they just cover the size, the image bilinearly (antialiased) and the label to the
        nearest pixel, then centre cropped (JAFAR's protocol). Both are turned upright as their EXIF orientation says,
        as photographs are everywhere else.

        Raises:
            OSError: if the image or the label cannot be read.
            ValueError: if the label is no map of classes, has another size than the image, or a value that is no class.
        """
        name, label_name = self.source.names(index)
        image_file, label_file = map(io.BytesIO, self.source.contents(index))
        try:
            with open_image(image_file, name) as image, open_image(label_file, label_name) as label:
                values = _values(label, label_name)
                if values.shape != upright_size(image):
                    raise ValueError(
                        f"The label {label_name} has {_size(label)} pixels and its image {name} {_size(image)}; "
                        "they must have the same size."
                    )
                values = crop_nearest(values, self.size)
                pixels, classes = crop_image(to_rgb(image, name), self.size), self.table[values]
        except (OSError, ValueError):
            raise
        except Exception as error:  # Pillow raises errors of any type for damaged files
            raise OSError(f"{name} or its label is damaged: {error!r}.") from error
        if (unknown := values[classes == UNKNOWN]).size:
            raise ValueError(
                f"The label {label_name} has the value {unknown.max()}, which is none of the {len(self.classes)} "
                f"classes and not dataset.ignore={self.ignore}."
            )
        planes = pixels, classes.astype(np.uint8)
        return tuple(np.ascontiguousarray(plane[:, ::-1]) for plane in planes) if mirror else planes


def open_segmentation(
    config: DatasetConfig, split: Literal["train", "val"], say: Callable[[str], None] = print, **options: Any
) -> Examples:
    """Return the images of a split with their labels; nothing is decoded yet.

    Args:
        config: the data set; its `train` and `val` override the usual names of the splits.
        split: the split that probes are trained on, or the one that they are scored on.
        say: prints a line, about files that were left out.
        options: `limit`, `mirrored`, `pixel_stride` and `seed` of the examples.

    Raises:
        FileNotFoundError: if the data set, the split, or a label is missing; the message says which files belong where.
        ValueError: if the number of classes is unknown or contradicts the data set, or the data set has no labels for
            segmentation.
        ImportError: if a package is missing.
    """
    chosen = getattr(config, split)
    if config.kind == "tfds":
        source = open_records(config, chosen or SPLITS[split])
        classes, ids = _numbered(config, source.classes, f"the feature {config.label} of {config.name}"), None
    elif config.kind in LAYOUTS:
        layout = LAYOUTS[config.kind]
        source, ids = layout.files(str(config.root), chosen or getattr(layout, split), say), layout.ids
        names = layout.classes if ids else _named(source.root / CLASSES)
        classes = _numbered(config, names, f"dataset.kind={config.kind}" if ids else str(source.root / CLASSES))
    else:
        raise ValueError(f"dataset.kind={config.kind} has no labels for segmentation; it is read by open_nyu.")
    table = np.full(256, UNKNOWN, np.int16)
    plain = {label: label for label in range(len(classes))} | {config.ignore: None}
    for value, index in (ids or plain).items():
        table[value] = config.ignore if index is None else index
    options |= dict(source=source, classes=classes, ignore=config.ignore, table=table, size=config.size)
    return Examples(**options)


def _values(label: Image.Image, name: str) -> UInt8[np.ndarray, "H W"]:
    """Return the integers that a label file stores, whatever its bit depth and the colours of its palette."""
    decoder_options = label.tile[0][3] if label.tile else label.mode
    stored = decoder_options if isinstance(decoder_options, str) else decoder_options[0]
    if stored not in STORED:
        raise ValueError(
            f"The label {name} is an image of mode {label.mode} ({stored}); it must be grayscale or palette, the class "
            "of each pixel."
        )
    values = np.asarray(ImageOps.exif_transpose(label))
    values = values[..., 0] if label.mode == "LA" else values
    if values.max() > 255:
        raise ValueError(f"The label {name} has the value {values.max()}; classes are from 0 to 255.")
    return values.astype(np.uint8) // STORED[stored]


def _size(image: Image.Image) -> str:
    """Return height and width once upright, and the EXIF orientation where there is one."""
    height, width = upright_size(image)
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    remedy = "remove the tag if the label is drawn on the image as it is stored"
    tag = f" (turned upright as its EXIF orientation {orientation} says; {remedy})"
    return f"{height}x{width}{tag if orientation in range(2, 9) else ''}"


def _named(path: Path) -> tuple[str, ...] | None:
    """Return the names in a file {"0": name, ...}, or None if there is no file."""
    if not path.is_file():
        return None
    try:
        names = json.loads(path.read_text())
        return tuple(str(names[str(index)]) for index in range(len(names)))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} must name the classes in a JSON object, in order: {{"0": NAME, ...}}.') from error


def _numbered(config: DatasetConfig, names: tuple[str, ...] | None, where: str) -> tuple[str, ...]:
    """Return the names, or numbers where there are none. Raises ValueError if neither is known, or they contradict."""
    if names is None:
        remedy = f"give dataset.classes=NUMBER, or name the classes in {CLASSES} in dataset.root={config.root}"
        require(config.classes is not None, "dataset.classes", None, remedy)
        return tuple(f"class {index}" for index in range(config.classes))
    known = config.classes in (None, len(names))
    require(known, "dataset.classes", config.classes, f"{where} has {len(names)}; leave it out")
    return names
