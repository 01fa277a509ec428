"""Where photographs are kept. A source has a length, a `name` for each index, and opens one as a file of bytes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from PIL import Image

from train.config import DatasetConfig
from train.data.images import TooSmall, covers, read_crop

SHIPPED = ("astronaut.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg")
"""Colour photographs in the wheel of scikit-image; "chelsea" and "coffee" are held out for pictures."""
INDEX = "size_index.tsv"
LAYOUT = "a folder with one subfolder a class and the images in these, as ImageNet's train folder is (root/class/file)"
_REMEDY = "take a smaller crop_size, a greater dataset.max_enlargement or other images"
PROBED = 256  # photographs of a TFDS data set that are looked at for one that is large enough


class Source(Protocol):
    """Photographs by index."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str:
        """What messages call a photograph."""
        ...

    def open(self, index: int) -> IO[bytes]:
        """Open its file. Raises OSError if that fails."""
        ...

    @property
    def digest(self) -> str:
        """The same for the same photographs in the same order."""
        ...


@dataclasses.dataclass(frozen=True)
class Files:
    """Image files below a folder, by their relative paths."""

    root: Path
    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def open(self, index: int) -> IO[bytes]:
        return (self.root / self.paths[index]).open("rb")

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha1("\n".join(self.paths).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class TFDS:
    """The images of a TFDS data set, still encoded."""

    data: Any
    feature: str
    title: str

    def __len__(self) -> int:
        return len(self.data)

    def name(self, index: int) -> str:
        return f"{self.title}#{index}"

    def open(self, index: int) -> IO[bytes]:
        return io.BytesIO(self.data[index][self.feature])

    @property
    def digest(self) -> str:
        return hashlib.sha1(f"{self.title} {len(self)}".encode()).hexdigest()


def open_source(config: DatasetConfig, say: Callable[[str], None] = print) -> Source:
    """Return the photographs of a configuration, at least one of which is large enough.

    Args:
        config: which; a folder without a size index is indexed first, which `say` hears of.
        say: takes a line of text.

    Raises:
        FileNotFoundError: if they are not there; the message says what to put there.
        ValueError: if none is large enough, or the data set has no single image.
        ImportError: if a package is missing.
    """
    return {"skimage": _skimage, "folder": _folder, "tfds": _tfds}[config.kind](config, say)


def shipped() -> Path:
    """Return the folder of photographs in the wheel of scikit-image. Raises ImportError if it is not installed."""
    try:
        return Path(str(importlib.resources.files("skimage"))) / "data"
    except ModuleNotFoundError as error:
        raise ImportError(
            'Photographs come with scikit-image, which is not installed: pip install "anyup-jax[viz]", or name '
            "folders of your own as dataset.root (dataset=folder) and log.pictures_root."
        ) from error


def _skimage(config: DatasetConfig, _say: Callable[[str], None]) -> Files:
    folder = shipped()
    sizes = {}
    for name in SHIPPED:
        with Image.open(folder / name) as image:
            sizes[name] = image.size[::-1]
    paths = [name for name, size in sizes.items() if _covers(size, config)]
    return Files(folder, _some(paths, sizes.values(), config, str(folder)))


def _folder(config: DatasetConfig, say: Callable[[str], None]) -> Files:
    from train import size_index  # which reads images as this package does

    root = Path(str(config.root))
    if not root.is_dir():
        raise FileNotFoundError(
            f"dataset.root={root} does not exist; it must be {LAYOUT}. ImageNet is at image-net.org (ILSVRC 2012, "
            "training images); any other photographs in this layout will do."
        )
    index = root / INDEX if config.index is None else Path(config.index)
    if not index.is_file():
        say(f"{index} does not exist yet: reading the size of every image (python -m train.size_index {root})")
        size_index.build(root, index, max(1, config.workers), say)
    rows = size_index.read_index(index)
    paths = [row.rel_path for row in rows if _covers((row.height, row.width), config)]
    return Files(root, _some(paths, [(row.height, row.width) for row in rows], config, str(root)))


def open_tfds(name: str, folder: str | None, split: str) -> tuple[Any, dict[str, Any], list[str]]:
    """Return the records of a prepared data set of TensorFlow Datasets, its features, and which of them are images.

    A record has its images as the bytes of their files. `folder` is the `data_dir`.

    Raises:
        ImportError: if a package is missing.
        FileNotFoundError: if the data set is not prepared as array_record in the folder.
        ValueError: if there is no such split.
    """
    try:
        import tensorflow_datasets as tfds
    except ModuleNotFoundError as error:
        raise ImportError(
            f'dataset.kind=tfds needs {error.name}, which is not installed: pip install "anyup-jax[train]".'
        ) from error
    try:
        builder = tfds.builder(name, data_dir=folder)
        features = dict(builder.info.features)
        images = [key for key, kind in features.items() if isinstance(kind, tfds.features.Image)]
        try:
            data = builder.as_data_source(split, decoders=dict.fromkeys(images, tfds.decode.SkipDecoding()))
        except ValueError as error:
            raise ValueError(f"The split {split} of {name} cannot be read: {error}") from error
    except (tfds.core.DatasetNotFoundError, FileNotFoundError, NotImplementedError, AssertionError) as error:
        raise FileNotFoundError(
            f"The data set {name}, split {split}, is not prepared as array_record in "
            f"{folder or 'the default folder of TFDS'} ({' '.join(str(error).split())[:120]}); prepare it with tfds "
            f"build {name} --file_format=array_record, or make one of a folder of photographs with "
            "python -m train.data.tfds_from_folder ROOT DATA_DIR NAME."
        ) from error
    return data, features, images


def _tfds(config: DatasetConfig, _say: Callable[[str], None]) -> TFDS:
    data, _, images = open_tfds(str(config.name), config.root, config.split)
    if len(images) != 1:
        raise ValueError(f"The data set {config.name} has {len(images)} image features; it must have one.")
    source = TFDS(data, images[0], f"{config.name}/{config.split}")
    for index in range(min(len(source), PROBED)):
        try:
            with source.open(index) as file:
                read_crop(file, source.name(index), config.crop_size, max_enlargement=config.max_enlargement)
            return source
        except (TooSmall, OSError, ValueError):
            continue
    raise ValueError(
        f"None of the first {min(len(source), PROBED)} images of {source.title} is at least "
        f"dataset.crop_size={config.crop_size}; {_REMEDY}."
    )


def _covers(size: tuple[int, int], config: DatasetConfig) -> bool:
    return covers(*size, config.crop_size, config.max_enlargement)


def _some(paths: list[str], sizes: Any, config: DatasetConfig, where: str) -> list[str]:
    if paths:
        return paths
    largest = max((min(size) for size in sizes), default=0)
    raise ValueError(
        f"None of the {len(list(sizes))} images in {where} is at least dataset.crop_size={config.crop_size} (the "
        f"largest short side is {largest} pixels); {_REMEDY}."
    )
