"""Where photographs come from. A source has a length, a name for each index, and opens a photograph as a file."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.resources
import io
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from PIL import Image

from anyup_core.files import IMAGE_SUFFIXES, is_photograph
from anyup_core.paths import printable
from train.config import DatasetConfig, Size
from train.data import bands as band_files
from train.data.images import covers, read_crop

SHIPPED = ("astronaut.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg")
"""Colour photographs in the wheel of scikit-image; "chelsea" and "coffee" are held out for `train.pictures`."""
LAYOUT = "a folder with one subfolder a class and the images in these, as ImageNet's train folder is (root/class/file)"
_REMEDY = "take a smaller crop_size, a greater dataset.max_enlargement or other images"
PROBED = 256  # photographs of a TFDS data set, of which one must be large enough


@runtime_checkable
class Source(Protocol):
    """Photographs by index."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str:
        """Return the name of a photograph in messages."""

    def open(self, index: int) -> IO[bytes] | io.BytesIO:
        """Open the file of a photograph. Raises OSError if that fails."""

    @property
    def digest(self) -> str:
        """A digest of the photographs' names and order."""


@dataclasses.dataclass(frozen=True)
class Files:
    """Image files below a folder, by their relative paths."""

    root: Path
    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return printable(self.paths[index])

    def open(self, index: int) -> IO[bytes] | io.BytesIO:
        path = self.root / self.paths[index]
        if path.exists() and not path.is_file():  # opening a pipe or a device could wait for ever
            raise OSError(f"{self.name(index)} is not a regular file.")
        return path.open("rb")

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha1("\n".join(self.paths).encode(errors="surrogateescape")).hexdigest()


@dataclasses.dataclass(frozen=True)
class TFDS:
    """The encoded images of a TFDS data set."""

    data: Any
    feature: str
    title: str

    def __len__(self) -> int:
        return len(self.data)

    def name(self, index: int) -> str:
        return f"{self.title}#{index}"

    def open(self, index: int) -> IO[bytes] | io.BytesIO:
        return io.BytesIO(self.data[index][self.feature])

    @property
    def digest(self) -> str:
        return hashlib.sha1(f"{self.title} {len(self)}".encode()).hexdigest()


def open_source(config: DatasetConfig, say: Callable[[str], None] = print, bands: int | None = None) -> Source:
    """Return the photographs of a configuration, at least one of which is large enough.

    Args:
        config: the data set. A folder without a size index is indexed first.
        say: prints a line, about the indexing, and about a size index that is older than the folders.
        bands: of the images, TIFF and NPY files in a folder; None for photographs.

    Raises:
        FileNotFoundError: if the data set does not exist; the message says what must be where.
        OSError: if a size index cannot be read or written.
        ValueError: if no photograph is large enough, the data set has no image feature or several, or an image has
            other bands.
        ImportError: if a package is missing.
    """
    if config.kind == "folder":
        return _folder(config, say, bands)
    return {"skimage": _skimage, "tfds": _tfds}[config.kind](config)


def shipped() -> Path:
    """Return the folder of photographs in the wheel of scikit-image. Raises ImportError if that is not installed."""
    try:
        return Path(str(importlib.resources.files("skimage"))) / "data"
    except ModuleNotFoundError as error:
        raise ImportError(
            'Photographs come with scikit-image, which is not installed: pip install "anyup-jax[viz]", or name '
            "folders of your own as dataset.root (dataset=folder) and log.pictures_root."
        ) from error


def _skimage(config: DatasetConfig) -> Files:
    folder = shipped()
    sizes = {}
    for name in SHIPPED:
        with Image.open(folder / name) as image:
            sizes[name] = image.size[::-1]
    return Files(folder, _large_enough(sizes, config, folder))


def _folder(config: DatasetConfig, say: Callable[[str], None], bands: int | None) -> Files:
    from train import size_index  # which imports this package

    root = Path(str(config.root))
    if not root.is_dir():
        raise FileNotFoundError(
            f"dataset.root={root} does not exist; it must be {LAYOUT}. ImageNet is at image-net.org (ILSVRC 2012, "
            "training images); any other photographs in this layout will do."
        )
    index = root / size_index.index_name(bands) if config.index is None else Path(config.index)
    if not index.is_file():
        try:
            tempfile.TemporaryFile(dir=index.parent).close()
        except OSError as error:
            raise OSError(
                f"The size index {index} does not exist and cannot be written ({error.strerror}); name a file in "
                "another folder, dataset.index=FILE."
            ) from error
        command = f"python -m train.size_index {root}" + ("" if bands is None else f" --bands {bands}")
        say(f"{index} does not exist yet: reading the size of every image ({command})")
        size_index.build(root, index, max(1, config.workers), say, bands)
    listed = size_index.read_index(index)
    suffixes = IMAGE_SUFFIXES if bands is None else band_files.SUFFIXES
    rows = [row for row in listed if is_photograph(row.rel_path, suffixes)]
    if len(rows) < len(listed):
        say(f"{index}: {len(listed) - len(rows)} of its {len(listed)} files are hidden or no images and are left out")
    if changed := size_index.changed_folders(index, root, rows):
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(index.stat().st_mtime))
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        say(
            f"{index} lists the {len(rows)} photographs of {date}, and only these are used; the folder "
            f"{printable(changed[0])}{more} changed later: delete the index, and the next run makes it anew"
        )
    sizes = {row.rel_path: (row.height, row.width) for row in rows}
    return Files(root, _large_enough(sizes, config, root))


def open_tfds(name: str, folder: str | None, split: str) -> tuple[Any, dict[str, Any], list[str]]:
    """Return the records of a prepared TFDS data set, its features, and the names of those that are images.

    Records hold images as the bytes of their files. `folder` is the `data_dir`.

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


def _tfds(config: DatasetConfig) -> TFDS:
    data, _, images = open_tfds(str(config.name), config.root, config.split)
    if len(images) != 1:
        raise ValueError(f"The data set {config.name} has {len(images)} image features; it must have one.")
    source = TFDS(data, images[0], f"{config.name}/{config.split}")
    probed = min(len(source), PROBED)
    for index in range(probed):
        with contextlib.suppress(OSError, ValueError), source.open(index) as file:
            read_crop(file, source.name(index), config.crop_size, max_enlargement=config.max_enlargement)
            return source
    raise ValueError(
        f"None of the first {probed} images of {source.title} is at least dataset.crop_size={config.crop_size}; "
        f"{_REMEDY}."
    )


def _large_enough(sizes: Mapping[str, Size], config: DatasetConfig, where: Path) -> list[str]:
    """Return the images, by path -> size, that cover the crop. Raises ValueError if there is none."""
    paths = [path for path, size in sizes.items() if covers(*size, config.crop_size, config.max_enlargement)]
    if not paths:
        largest = max(map(min, sizes.values()), default=0)
        raise ValueError(
            f"None of the {len(sizes)} images in {where} is at least dataset.crop_size={config.crop_size} (the largest "
            f"short side is {largest} pixels); {_REMEDY}."
        )
    return paths
