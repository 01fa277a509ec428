"""Images and the class of each of their pixels, of one size, from every data set that a configuration can name."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int16, UInt8
from PIL import Image

from anyup_core.files import open_image, to_rgb
from evaluation.config import DatasetConfig, Size
from evaluation.data import contents, records
from evaluation.data.cropping import crop_image, crop_nearest
from evaluation.data.layouts import LAYOUTS, Files
from evaluation.data.records import Records
from evaluation.data.tables import Ids, plain

CLASSES = "classes.json"
UNKNOWN = -1  # in a table of labels: a value that is no class
STORED = dict.fromkeys(("1", "L", "LA", "P", "P;1", "P;2", "P;4", "I;16", "I;16B", "I;16L"), 1) | {"L;2": 85, "L;4": 17}
"""Pillow's names of what a label file may store -> the factor that Pillow scales the stored integers by."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """The images and labels of a split.

    Attributes:
        source: reads the files or records.
        classes: names of the classes.
        ignore: label of pixels that do not count.
        table: the class of every value of a label file, or `ignore`.
        size: height and width of images and labels.
    """

    source: Files | Records
    classes: tuple[str, ...]
    ignore: int
    table: Int16[np.ndarray, "values=256"]
    size: Size

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """Return the name of an example in messages and pictures: its relative path, or the number of its record."""
        return self.source.name(index)

    def digest(self, count: int) -> str:
        """Return the same for the same first images, labels and classes, wherever they are stored."""

        def read(index: int) -> list[bytes]:
            return [file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()
                    for file in self.source.open(index)]  # fmt: skip

        return f"{contents.digest(read, count)} {len(self.classes)}"

    def read(self, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"]]:
        """Return an image as RGB, and the class of each of its pixels, or `ignore`.

        Both are resized so that they just cover the size, the image bilinearly (antialiased) and the label to the
        nearest pixel, then centre cropped (JAFAR's protocol). Pixels are taken as they are stored: labels are drawn on
        these, so an EXIF orientation is not applied.

        Raises:
            OSError: if the image or the label cannot be read.
            ValueError: if the label is no map of classes, has another size than the image, or a value that is no class.
        """
        name, label_name = self.source.name(index), self.source.label_name(index)
        image_file, label_file = self.source.open(index)
        try:
            with open_image(image_file, name) as image, open_image(label_file, label_name) as label:
                if label.size != image.size:
                    raise ValueError(
                        f"The label {label_name} has {label.height}x{label.width} pixels and its image {name} "
                        f"{image.height}x{image.width}; they must have the same size."
                    )
                values = crop_nearest(_values(label, label_name), self.size)
                return crop_image(to_rgb(image, name), self.size), self._classes(values, label_name)
        except (OSError, ValueError):
            raise
        except Exception as error:  # Pillow raises errors of any type for damaged files
            raise OSError(f"{name} or its label is damaged: {error!r}.") from error

    def _classes(self, values: UInt8[np.ndarray, "H W"], name: str) -> UInt8[np.ndarray, "H W"]:
        classes = self.table[values]
        if (unknown := values[classes == UNKNOWN]).size:
            raise ValueError(
                f"The label {name} has the value {unknown.max()}, which is none of the {len(self.classes)} classes and "
                f"not dataset.ignore={self.ignore}."
            )
        return classes.astype(np.uint8)


def open_segmentation(config: DatasetConfig, split: Literal["train", "val"]) -> Examples:
    """Return the images of a split with their labels; nothing is decoded yet.

    Args:
        config: the data set; its `train` and `val` override the usual names of the splits.
        split: the split that probes are trained on, or the one that they are scored on.

    Raises:
        FileNotFoundError: if the data set, the split, or a label is missing; the message says which files belong where.
        ValueError: if the number of classes is unknown or contradicts the data set, or the data set has no labels for
            segmentation.
        ImportError: if a package is missing.
    """
    chosen = getattr(config, split)
    if config.kind == "tfds":
        source = records.open_records(config, chosen or records.SPLITS[split])
        classes, ids = _numbered(config, source.names, f"the feature {config.label} of {config.name}"), None
    elif config.kind in LAYOUTS:
        layout = LAYOUTS[config.kind]
        source, ids = layout.files(str(config.root), chosen or getattr(layout, split)), layout.ids
        names = layout.classes if ids else _named(source.root / CLASSES)
        classes = _numbered(config, names, f"dataset.kind={config.kind}" if ids else str(source.root / CLASSES))
    else:
        raise ValueError(f"dataset.kind={config.kind} has no labels for segmentation; it is read by open_nyu.")
    if ids is None:
        ids = plain(len(classes)) | {config.ignore: None}
    return Examples(source, classes, config.ignore, _table(ids, config.ignore), config.size)


def _values(label: Image.Image, name: str) -> UInt8[np.ndarray, "H W"]:
    """Return the integers that a label file stores, whatever its bit depth and the colours of its palette."""
    decoder_options = label.tile[0][3] if label.tile else label.mode
    stored = decoder_options if isinstance(decoder_options, str) else decoder_options[0]
    if stored not in STORED:
        raise ValueError(
            f"The label {name} is an image of mode {label.mode} ({stored}); it must be grayscale or palette, the class "
            "of each pixel."
        )
    values = np.asarray(label)
    values = values[..., 0] if label.mode == "LA" else values
    if values.max() > 255:
        raise ValueError(f"The label {name} has the value {values.max()}; classes are from 0 to 255.")
    return values.astype(np.uint8) // STORED[stored]


def _table(ids: Ids, ignore: int) -> Int16[np.ndarray, "values=256"]:
    table = np.full(256, UNKNOWN, np.int16)
    for value, index in ids.items():
        table[value] = ignore if index is None else index
    return table


def _named(path: Path) -> tuple[str, ...] | None:
    """Return the names in a file {"0": name, ...}, or None if there is no file."""
    if not path.is_file():
        return None
    try:
        names = json.loads(path.read_text())
        return tuple(str(names[str(index)]) for index in range(len(names)))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} must be a JSON object that names the classes in order, {{"0": NAME, ...}}.'
        ) from error


def _numbered(config: DatasetConfig, names: tuple[str, ...] | None, where: str) -> tuple[str, ...]:
    """Return the names, or numbers where there are none. Raises ValueError if neither is known, or they contradict."""
    if names is None:
        if config.classes is None:
            raise ValueError(
                f"The number of classes is unknown: give dataset.classes=NUMBER, or name them in {CLASSES} in "
                f"dataset.root={config.root}."
            )
        return tuple(f"class {index}" for index in range(config.classes))
    if config.classes not in (None, len(names)):
        raise ValueError(f"dataset.classes={config.classes} contradicts {where}, which has {len(names)}; leave it out.")
    return names
