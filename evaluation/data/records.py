"""Images and labels of a data set of TensorFlow Datasets, still encoded, read without TensorFlow."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from evaluation.config import DatasetConfig
from train.data.sources import open_tfds

SPLITS = {"train": "train", "val": "validation"}


@runtime_checkable
class Encoded(Protocol):
    """Records by number: the bytes of their features by name."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Mapping[str, bytes]: ...


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of a split.

    Attributes:
        data: the records.
        title: the data set and its split.
        image, label: names of the features.
        names: of the classes; None if the label's feature has none.
    """

    data: Encoded
    title: str
    image: str
    label: str
    names: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.data)

    def name(self, index: int) -> str:
        """Return the name of an image in messages and pictures."""
        return f"{self.title}#{index}"

    def label_name(self, index: int) -> str:
        """Return the name of a label in messages."""
        return f"{self.title}#{index} ({self.label})"

    def open(self, index: int) -> tuple[io.BytesIO, io.BytesIO]:
        """Return the encoded image and label, for Pillow."""
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
