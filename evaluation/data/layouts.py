"""Where data sets keep images and labels, and how each defines its splits.

Data sets of TensorFlow Datasets are read without TensorFlow.
"""

from __future__ import annotations

import codecs
import dataclasses
import os
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from anyup_core.files import describe, list_folder
from anyup_core.paths import user_path
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
        find: (folder, split, left_out) -> relative paths of images and labels, whether they exist or not; what a folder
            of images holds beside photographs is counted in `left_out`.
        contents: the files that belong in the folder, and where to download them.
        train, val: the usual splits.
        within: folders below dataset.root that the data set may be in, beside dataset.root itself.
        holds: a folder that every copy of the data set has; "" for none.
        classes, ids: names of the classes, and the table of labels; None where every folder has its own.
    """

    find: Callable[[Path, str, Counter[str]], Pairs]
    contents: str
    train: str = "train"
    val: str = "val"
    within: tuple[str, ...] = ()
    holds: str = ""
    classes: tuple[str, ...] | None = None
    ids: Ids | None = None

    def files(self, root: str, split: str, say: Callable[[str], None]) -> Files:
        """Return the images of a split, in order of their names or of the list that defines it.

        Suffixes may be in capitals. `say` prints a line about what was left out.

        Raises:
            FileNotFoundError: if the folder, the split, an image or the label of an image is missing; the message says
                which files belong there.
            ValueError: if a list of images has a line with more than one name, two images have the same label, or the
                names of two files differ only in the case of their suffixes.
        """
        places = (Path(root, name, self.holds) for name in ("", *self.within))
        folder = locate(root, places, f"has no folder {self.holds}", self.contents)
        folder = folder.parent if self.holds else folder
        left_out: Counter[str] = Counter()
        pairs, told = self.find(folder, split, left_out), describe(left_out)
        if not pairs:
            raise FileNotFoundError(f"The split {split} in {folder} has no images{told}; it must hold {self.contents}.")
        stored = _stored(folder, [path for pair in pairs for path in pair])
        for image, label in pairs:
            if image not in stored:
                raise FileNotFoundError(f"The image {image} of the split {split} does not exist in {folder}.")
            if label not in stored:
                raise FileNotFoundError(f"The image {image} in {folder} has no label: {label} does not exist.")
        pairs = [(stored[image], stored[label]) for image, label in pairs]
        owners = {label: image for image, label in pairs}
        for image, label in pairs:
            if (other := owners[label]) != image:
                raise ValueError(f"The images {image} and {other} in {folder} share the label {label}; remove one.")
        if told:
            say(f"{folder}, {split}: {len(pairs)} images{told}")
        return Files(folder, pairs)


def _stored(root: Path, paths: Sequence[str]) -> dict[str, str]:
    """Return path -> the path as it is stored, of the paths that exist.

    Its suffix may be in another case, and its letters composed or decomposed Unicode. Every folder is listed once,
    which is faster than a look for each file.

    Raises:
        ValueError: if several files fit a path.
    """

    def folded(path: str) -> str:
        name, suffix = posixpath.splitext(unicodedata.normalize("NFC", path))
        return name + suffix.lower()

    fitting: dict[str, list[str]] = {}
    for folder in dict.fromkeys(user_path(root / posixpath.dirname(path)) for path in paths):
        for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
            file = (folder / name).relative_to(root).as_posix()
            fitting.setdefault(folded(file), []).append(file)
    found = {path: fitting[folded(path)] for path in paths if folded(path) in fitting}
    if several := next((files for files in found.values() if len(files) > 1), None):
        raise ValueError(
            f"{' and '.join(several)} in {root} differ only in the case of their suffixes or in how they write "
            "accents; remove one."
        )
    return {path: file for path, (file,) in found.items()}


def _images(root: Path, folder: str, left_out: Counter[str]) -> list[str]:
    """Return the relative paths of the photographs in a folder, sorted; none where there is no such folder."""
    if not (root / folder).is_dir():
        return []
    photographs, folders = list_folder(root / folder, left_out)
    left_out["subfolders"] += len(folders)
    return [f"{folder}/{name}" for name in photographs]


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


def _labelled(images: Iterable[str], labels: str) -> Pairs:
    return [(image, f"{labels}/{PurePosixPath(image).stem}.png") for image in images]


def _folder(root: Path, split: str, left_out: Counter[str]) -> Pairs:
    return _labelled(_images(root, f"{split}/images", left_out), f"{split}/labels")


def _voc(root: Path, split: str, _left_out: Counter[str]) -> Pairs:
    names = _listed(root / "ImageSets" / "Segmentation" / f"{split}.txt", split)
    return [(f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png") for name in names]


def _ade20k(root: Path, split: str, left_out: Counter[str]) -> Pairs:
    return _labelled(_images(root, f"images/{split}", left_out), f"annotations/{split}")


def _cityscapes(root: Path, split: str, left_out: Counter[str]) -> Pairs:
    folder, ending = f"leftImg8bit/{split}", "_leftImg8bit"
    cities = list_folder(root / folder, left_out)[1] if (root / folder).is_dir() else []
    paths = [PurePosixPath(image) for city in cities for image in _images(root, f"{folder}/{city}", left_out)]
    images = [path for path in paths if path.stem.endswith(ending)]
    left_out[f"images whose names do not end in {ending}"] += len(paths) - len(images)
    labels = (f"{path.parent.name}/{path.stem.removesuffix(ending)}_gtFine_labelIds.png" for path in images)
    return [(str(image), f"gtFine/{split}/{label}") for image, label in zip(images, labels)]


def _cocostuff27(root: Path, split: str, left_out: Counter[str]) -> Pairs:
    """A split is a folder, or FOLDER/LIST for another curated list; without curated lists it is the whole folder."""
    folder, _, chosen = split.partition("/")
    if chosen or (root / "curated" / folder).is_dir():
        names = _listed(root / "curated" / folder / f"{chosen or COCO_LIST}.txt", split)
        images = [f"images/{folder}/{name}.jpg" for name in names]
    else:
        images = _images(root, f"images/{folder}", left_out)
    return _labelled(images, f"annotations/{folder}")


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
