"""Where data sets keep images and labels, and how each defines its splits.

Data sets of TensorFlow Datasets are read without TensorFlow.
"""

from __future__ import annotations

import codecs
import dataclasses
import os
import posixpath
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from anyup_core.settings import require
from evaluation.config import DatasetConfig
from evaluation.data import tables
from evaluation.data.split import Files
from evaluation.data.tables import Ids
from train.data.sources import open_tfds

Pairs = list[tuple[str, str]]  # images and their labels
SPLITS = {"train": "train", "val": "validation"}  # the usual ones of TFDS
COCO_LIST = "Coco164kFull_Stuff_Coarse"
"""The curated list of 97702 + 4172 images; STEGO validates on another one of the same folder, that ends in "_7"."""


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of a split; methods as in `Files`.

    Attributes:
        data: the records by number: the bytes of their features by name.
        title: the data set and its split.
        image, label: names of the features.
        classes: their names; None if the label's feature has none.
    """

    data: Any
    title: str
    image: str
    label: str
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.data)

    def names(self, index: int) -> tuple[str, ...]:
        return f"{self.title}#{index}", f"{self.title}#{index} ({self.label})"

    def contents(self, index: int) -> list[bytes]:
        record = self.data[index]
        return [record[self.image], record[self.label]]


def open_records(config: DatasetConfig, split: str) -> Records:
    """Return a split of the data set `config.name` in the folder `config.root`, which must be prepared as array_record.

    Raises:
        FileNotFoundError: if it is not prepared there, or the split has no records.
        ValueError: if it has no such split, or no images of the names `config.image` and `config.label`.
        ImportError: if a package is missing.
    """
    data, features, images = open_tfds(str(config.name), config.root, split)
    for setting, name in dict(image=config.image, label=config.label).items():
        remedy = f"it is no image of {config.name}, whose features are {', '.join(sorted(features))}"
        require(name in images, f"dataset.{setting}", name, remedy)
    if not len(data):
        raise FileNotFoundError(f"The split {split} of {config.name} has no images.")
    label = features[config.label]
    classes = tuple(label.names) if getattr(label, "num_classes", None) else None
    return Records(data, f"{config.name}/{split}", config.image, config.label, classes)


def locate(root: str, places: Iterable[Path], missing: str, contents: str) -> Path:
    """Return the first of several places that exists. Raises FileNotFoundError that says what belongs in the root."""
    if place := next((place for place in places if place.exists()), None):
        return place
    missing = missing if Path(root).is_dir() else "does not exist"
    raise FileNotFoundError(f"dataset.root={root} {missing}; it must hold {contents}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The folders and files of a data set.

    Attributes:
        find: (folder, split) -> relative paths of images and labels, whether they exist or not.
        contents: the files that belong in the folder, and where to download them.
        train, val: the usual splits.
        within: folders below dataset.root that the data set may be in, beside dataset.root itself.
        holds: a folder that every copy of the data set has; "" for none.
        classes, ids: names of the classes, and the table of labels; None where every folder has its own.
    """

    find: Callable[[Path, str], Pairs]
    contents: str
    train: str = "train"
    val: str = "val"
    within: tuple[str, ...] = ()
    holds: str = ""
    classes: tuple[str, ...] | None = None
    ids: Ids | None = None

    def files(self, root: str, split: str) -> Files:
        """Return the images of a split, in order of their names or of the list that defines it.

        Raises:
            FileNotFoundError: if the folder, the split, an image or the label of an image is missing; the message says
                which files belong there.
            ValueError: if a list of images has a line with more than one name, or two images have the same label.
        """
        places = (Path(root, name, self.holds) for name in ("", *self.within))
        folder = locate(root, places, f"has no folder {self.holds}", self.contents)
        folder = folder.parent if self.holds else folder
        pairs = self.find(folder, split)
        if not pairs:
            raise FileNotFoundError(f"The split {split} in {folder} has no images; it must hold {self.contents}.")
        images, labels = zip(*pairs)
        for image in _missing(folder, images):
            raise FileNotFoundError(f"The image {image} of the split {split} does not exist in {folder}.")
        for label in _missing(folder, labels):
            image = images[labels.index(label)]
            raise FileNotFoundError(f"The image {image} in {folder} has no label: {label} does not exist.")
        owners = dict(zip(labels, images))
        for image, label in pairs:
            if (other := owners[label]) != image:
                raise ValueError(f"The images {image} and {other} in {folder} share the label {label}; remove one.")
        return Files(folder, pairs)


def _missing(root: Path, paths: Sequence[str]) -> list[str]:
    """Return the paths that do not exist. Every folder is listed once, which is faster than a look for each file."""
    folders = {folder: root / folder for folder in map(posixpath.dirname, paths)}
    names = {folder: set(os.listdir(path)) if path.is_dir() else set() for folder, path in folders.items()}
    return [path for path in paths if posixpath.basename(path) not in names[posixpath.dirname(path)]]


def _images(root: Path, pattern: str) -> list[str]:
    """Return the relative paths of the images that match, sorted."""
    suffixes = Image.registered_extensions()
    images = (path for path in root.glob(pattern) if path.suffix.lower() in suffixes and path.name[0] != ".")
    return sorted(path.relative_to(root).as_posix() for path in images)


def _listed(path: Path, split: str) -> list[str]:
    """Return the names in a list, one a line; UTF-8 or, with a byte order mark, UTF-16."""
    if not path.is_file():
        raise FileNotFoundError(f"The split {split} has no list of images: {path} does not exist.")
    content = path.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}.") from error
    lines = [line.split() for line in text.splitlines()]
    if number := next((number for number, words in enumerate(lines, 1) if len(words) > 1), 0):
        raise ValueError(f"{path}, line {number}: {' '.join(lines[number - 1])!r} is not one name; remove the rest.")
    return [words[0] for words in lines if words]


def _folder(root: Path, split: str) -> Pairs:
    images = _images(root, f"{split}/images/*")
    return [(image, f"{split}/labels/{PurePosixPath(image).stem}.png") for image in images]


def _voc(root: Path, split: str) -> Pairs:
    names = _listed(root / "ImageSets" / "Segmentation" / f"{split}.txt", split)
    return [(f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png") for name in names]


def _ade20k(root: Path, split: str) -> Pairs:
    images = _images(root, f"images/{split}/*.jpg")
    return [(image, f"annotations/{split}/{PurePosixPath(image).stem}.png") for image in images]


def _cityscapes(root: Path, split: str) -> Pairs:
    images = _images(root, f"leftImg8bit/{split}/*/*_leftImg8bit.png")
    return [(x, x.replace("leftImg8bit/", "gtFine/").replace("_leftImg8bit", "_gtFine_labelIds")) for x in images]


def _cocostuff27(root: Path, split: str) -> Pairs:
    """A split is a folder, or FOLDER/LIST for another curated list; without curated lists it is the whole folder."""
    folder, _, chosen = split.partition("/")
    if chosen or (root / "curated" / folder).is_dir():
        names = _listed(root / "curated" / folder / f"{chosen or COCO_LIST}.txt", split)
    else:
        names = [PurePosixPath(image).stem for image in _images(root, f"images/{folder}/*.jpg")]
    return [(f"images/{folder}/{name}.jpg", f"annotations/{folder}/{name}.png") for name in names]


LAYOUTS = {
    "folder": Layout(
        find=_folder,
        contents="SPLIT/images/NAME.jpg and SPLIT/labels/NAME.png (8 bits, the class of each pixel) for train and val",
    ),
    "voc": Layout(
        find=_voc, within=("VOCdevkit/VOC2012", "VOC2012"), holds="JPEGImages",
        contents="JPEGImages, SegmentationClass and ImageSets/Segmentation of Pascal VOC 2012 "
        "(VOCtrainval_11-May-2012.tar from host.robots.ox.ac.uk/pascal/VOC/voc2012)",
        classes=tables.VOC, ids=tables.VOC_IDS,
    ),
    "ade20k": Layout(
        find=_ade20k, train="training", val="validation", within=("ADEChallengeData2016",), holds="images",
        contents="images/{training,validation} and annotations/{training,validation} of the scene parsing benchmark "
        "(ADEChallengeData2016.zip from data.csail.mit.edu/places/ADEchallenge)",
        classes=tables.ADE20K, ids=tables.ADE20K_IDS,
    ),
    "cityscapes": Layout(
        find=_cityscapes, holds="leftImg8bit",
        contents="leftImg8bit/{train,val} and gtFine/{train,val} of Cityscapes (leftImg8bit_trainvaltest.zip and "
        "gtFine_trainvaltest.zip from cityscapes-dataset.com)",
        classes=tables.CITYSCAPES, ids=tables.CITYSCAPES_IDS,
    ),
    "cocostuff27": Layout(
        find=_cocostuff27, train="train2017", val="val2017", holds="images",
        contents="images/{train2017,val2017} (train2017.zip and val2017.zip from cocodataset.org), "
        "annotations/{train2017,val2017} (stuffthingmaps_trainval2017.zip of COCO-Stuff, from "
        "github.com/nightrome/cocostuff) and curated/{train2017,val2017} (the lists of images in "
        "github.com/janghyuncho/PiCIE)",
        classes=tables.COCOSTUFF27, ids=tables.COCOSTUFF27_IDS,
    ),
}  # fmt: skip
