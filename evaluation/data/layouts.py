"""Where the published data sets keep images and labels, and how each defines its splits."""

from __future__ import annotations

import codecs
import dataclasses
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from evaluation.data import tables
from evaluation.data.tables import Ids

Names = tuple[list[str], list[str]]
COCO_LIST = "Coco164kFull_Stuff_Coarse"
"""The curated list of 97702 + 4172 images; STEGO validates on another one of the same folder, that ends in "_7"."""


@dataclasses.dataclass(frozen=True)
class Files:
    """Image files below a folder and the label file of each, as relative paths; methods as in `records.Records`."""

    root: Path
    images: Sequence[str]
    labels: Sequence[str]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return self.images[index]

    def label_name(self, index: int) -> str:
        return self.labels[index]

    def open(self, index: int) -> tuple[Path, Path]:
        """Return the files of the image and of the label, for Pillow."""
        return self.root / self.images[index], self.root / self.labels[index]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The folders and files of a data set.

    Attributes:
        find: (folder, split) -> relative paths of images and labels, whether they exist or not.
        contents: the files that belong in the folder, and where to download them.
        train, val: the usual splits.
        within: folders below dataset.root that the data set may be in, beside dataset.root itself.
        holds: a folder that every copy of the data set has.
        classes, ids: names of the classes, and the table of labels; None where every folder has its own.
    """

    find: Callable[[Path, str], Names]
    contents: str
    train: str = "train"
    val: str = "val"
    within: tuple[str, ...] = ()
    holds: str | None = None
    classes: tuple[str, ...] | None = None
    ids: Ids | None = None

    def folder(self, root: str) -> Path:
        """Return the folder that the data set is in.

        Raises:
            FileNotFoundError: if there is none; the message says which files belong there.
        """
        for folder in (Path(root), *(Path(root) / name for name in self.within)):
            if folder.is_dir() and (self.holds is None or (folder / self.holds).is_dir()):
                return folder
        missing = f"has no folder {self.holds}" if Path(root).is_dir() else "does not exist"
        raise FileNotFoundError(f"dataset.root={root} {missing}; it must hold {self.contents}.")

    def files(self, root: str, split: str) -> Files:
        """Return the images of a split, in order of their names or of the list that defines it.

        Raises:
            FileNotFoundError: if the folder, the split, an image or the label of an image is missing.
            ValueError: if a list of images has a line with more than one name, or two images have the same label.
        """
        folder = self.folder(root)
        images, labels = self.find(folder, split)
        if not images:
            raise FileNotFoundError(f"The split {split} in {folder} has no images; it must hold {self.contents}.")
        if image := next(_missing(folder, images), None):
            raise FileNotFoundError(f"The image {image} of the split {split} does not exist in {folder}.")
        if label := next(_missing(folder, labels), None):
            image = images[labels.index(label)]
            raise FileNotFoundError(f"The image {image} in {folder} has no label: {label} does not exist.")
        owners: dict[str, str] = {}
        for image, label in zip(images, labels):
            if (other := owners.setdefault(label, image)) != image:
                raise ValueError(f"The images {other} and {image} in {folder} share the label {label}; remove one.")
        return Files(folder, images, labels)


def _missing(root: Path, paths: Sequence[str]) -> Iterator[str]:
    """Yield the paths that do not exist. Every folder is listed once, which is faster than a look for each file."""
    names: dict[str, set[str]] = {}
    for path in paths:
        parent, name = posixpath.split(path)
        if parent not in names:
            names[parent] = set(os.listdir(root / parent)) if (root / parent).is_dir() else set()
        if name not in names[parent]:
            yield path


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


def _folder(root: Path, split: str) -> Names:
    images = _images(root, f"{split}/images/*")
    return images, [f"{split}/labels/{PurePosixPath(image).stem}.png" for image in images]


def _voc(root: Path, split: str) -> Names:
    names = _listed(root / "ImageSets" / "Segmentation" / f"{split}.txt", split)
    return [f"JPEGImages/{name}.jpg" for name in names], [f"SegmentationClass/{name}.png" for name in names]


def _ade20k(root: Path, split: str) -> Names:
    images = _images(root, f"images/{split}/*.jpg")
    return images, [f"annotations/{split}/{PurePosixPath(image).stem}.png" for image in images]


def _cityscapes(root: Path, split: str) -> Names:
    ending = "_leftImg8bit.png"
    images = _images(root, f"leftImg8bit/{split}/*/*{ending}")
    stems = [image.removeprefix("leftImg8bit/").removesuffix(ending) for image in images]
    return images, [f"gtFine/{stem}_gtFine_labelIds.png" for stem in stems]


def _cocostuff27(root: Path, split: str) -> Names:
    """A split is a folder, or FOLDER/LIST for another curated list; without curated lists it is the whole folder."""
    folder, _, chosen = split.partition("/")
    if chosen or (root / "curated" / folder).is_dir():
        names = _listed(root / "curated" / folder / f"{chosen or COCO_LIST}.txt", split)
    else:
        names = [PurePosixPath(image).stem for image in _images(root, f"images/{folder}/*.jpg")]
    return [f"images/{folder}/{name}.jpg" for name in names], [f"annotations/{folder}/{name}.png" for name in names]


LAYOUTS = {
    "folder": Layout(
        find=_folder,
        contents="SPLIT/images/NAME.jpg and SPLIT/labels/NAME.png (8 bits, the class of each pixel) for train and val",
    ),
    "voc": Layout(
        find=_voc,
        within=("VOCdevkit/VOC2012", "VOC2012"),
        holds="JPEGImages",
        contents="JPEGImages, SegmentationClass and ImageSets/Segmentation of Pascal VOC 2012 "
        "(VOCtrainval_11-May-2012.tar from host.robots.ox.ac.uk/pascal/VOC/voc2012)",
        classes=tables.VOC,
        ids=tables.VOC_IDS,
    ),
    "ade20k": Layout(
        find=_ade20k,
        train="training",
        val="validation",
        within=("ADEChallengeData2016",),
        holds="images",
        contents="images/{training,validation} and annotations/{training,validation} of the scene parsing benchmark "
        "(ADEChallengeData2016.zip from data.csail.mit.edu/places/ADEchallenge)",
        classes=tables.ADE20K,
        ids=tables.ADE20K_IDS,
    ),
    "cityscapes": Layout(
        find=_cityscapes,
        holds="leftImg8bit",
        contents="leftImg8bit/{train,val} and gtFine/{train,val} of Cityscapes (leftImg8bit_trainvaltest.zip and "
        "gtFine_trainvaltest.zip from cityscapes-dataset.com)",
        classes=tables.CITYSCAPES,
        ids=tables.CITYSCAPES_IDS,
    ),
    "cocostuff27": Layout(
        find=_cocostuff27,
        train="train2017",
        val="val2017",
        holds="images",
        contents="images/{train2017,val2017} (train2017.zip and val2017.zip from cocodataset.org), "
        "annotations/{train2017,val2017} (stuffthingmaps_trainval2017.zip of COCO-Stuff, from "
        "github.com/nightrome/cocostuff) and curated/{train2017,val2017} (the lists of images in "
        "github.com/janghyuncho/PiCIE)",
        classes=tables.COCOSTUFF27,
        ids=tables.COCOSTUFF27_IDS,
    ),
}
