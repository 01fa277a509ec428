"""Images and labels of a data set of TensorFlow Datasets, still encoded, read without TensorFlow."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

from evaluation.config import DatasetConfig
from train.data.sources import open_tfds

SPLITS = {"train": "train", "val": "validation"}


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of a split.

    Attributes:
        data: gives a record as the bytes of its features.
        title: the data set and its split.
        image, label: names of the features.
        names: of the classes, where the label's feature knows them.
    """

    data: Any
    title: str
    image: str
    label: str
    names: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.data)

    def name(self, index: int) -> str:
        return f"{self.title}#{index}"

    def label_name(self, index: int) -> str:
        return f"{self.title}#{index} ({self.label})"

    def open(self, index: int) -> tuple[io.BytesIO, io.BytesIO]:
        """Return what Pillow opens as the image and as the label."""
        record = self.data[index]
        return io.BytesIO(record[self.image]), io.BytesIO(record[self.label])


def open_records(config: DatasetConfig, split: str) -> Records:
    """Return a split of the data set `config.name` in the folder `config.root`, which must be prepared as array_record.

    Raises:
        FileNotFoundError: if it is not prepared there, or the split has no records.
        ValueError: if it has no such split, or no images of the names `config.image` and `config.label`.
        ImportError: if a package is missing.
    """
    data, features, images = open_tfds(str(config.name), config.root, split)
    for setting, name in (("image", config.image), ("label", config.label)):
        if name not in images:
            raise ValueError(
                f"dataset.{setting}={name} is no image of {config.name}, whose features are "
                f"{', '.join(sorted(features))}."
            )
    if not len(data):
        raise FileNotFoundError(f"The split {split} of {config.name} has no images.")
    label = features[config.label]
    names = tuple(label.names) if getattr(label, "num_classes", None) else None
    return Records(data, f"{config.name}/{split}", config.image, config.label, names)
