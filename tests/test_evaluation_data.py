"""Data sets in every layout that the evaluation reads: contents, resizing, and the errors where data is missing."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from PIL.Image import Transpose
from torchvision.transforms import InterpolationMode, v2

from evaluation.config import DatasetConfig
from evaluation.data import open_nyu, open_segmentation, tables
from evaluation.data.cropping import centre, covering, crop_image, crop_nearest
from parity_tests.golden import DATA, needs_photos
from train.data.images import read_crop

SIZE = (12, 12)
random = np.random.default_rng(0)


def picture(height: int = 16, width: int = 24) -> Image.Image:
    return Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))


def save(root: Path, name: str, values: np.ndarray | Image.Image) -> np.ndarray | Image.Image:
    """Write an image, in the format that its suffix names, and return it."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (values if isinstance(values, Image.Image) else Image.fromarray(values)).save(path)
    return values


def ids(values: list[int], height: int = 16, width: int = 24) -> np.ndarray:
    """A label in which each of these values has columns of its own."""
    columns = np.array(values, np.uint8)[np.arange(width) * len(values) // width]
    return np.tile(columns, (height, 1))


def config(kind: str, root: Path, **settings: Any) -> DatasetConfig:
    return DatasetConfig(kind=kind, root=str(root), **(dict(size=SIZE) | settings))


@pytest.mark.parametrize("size", [(12, 12), (448, 448), (7, 12), (20, 9), (224, 300)])
@pytest.mark.parametrize("native", [(16, 24), (375, 500), (500, 333), (12, 12), (427, 640)])
def test_image_and_label_are_resized_as_torch_and_torchvision_do(
    native: tuple[int, int], size: tuple[int, int]
) -> None:
    image, whole = picture(*native), covering(native, size)
    assert min(w - s for w, s in zip(whole, size)) == 0 <= max(w - s for w, s in zip(whole, size))
    expected = v2.functional.center_crop(v2.functional.resize(image, whole, InterpolationMode.BILINEAR), size)
    assert np.array_equal(crop_image(image, size), np.asarray(expected))
    if size[0] == size[1]:
        assert expected == v2.CenterCrop(size)(v2.Resize(size[0], InterpolationMode.BILINEAR)(image))

    numbers = np.arange(native[0] * native[1], dtype=np.float64).reshape(native)
    resized = torch.nn.functional.interpolate(torch.from_numpy(numbers)[None, None], whole, mode="nearest-exact")[0, 0]
    y, x = centre(whole, size)
    actual = crop_nearest(np.stack([numbers, -numbers], -1), size)
    assert np.array_equal(actual[..., 0], resized[y : y + size[0], x : x + size[1]])
    assert np.array_equal(actual[..., 1], -actual[..., 0])


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text(json.dumps({"0": "sky", "1": "ground", "2": "rest"}))
    image, label = (
        save(tmp_path, "train/images/a.png", picture()),
        save(tmp_path, "train/labels/a.png", ids([2, 0, 255])),
    )
    save(tmp_path, "train/images/b.jpg", picture())
    palette = Image.fromarray(ids([1, 0]))
    palette.putpalette([0, 0, 0, 255, 255, 255])
    save(tmp_path, "train/labels/b.png", palette)
    save(tmp_path, "train/images/c.png", picture().convert("L"))
    save(tmp_path, "train/labels/c.png", Image.fromarray(ids([1, 0])).point(lambda value: 255 * value, "1"))
    (tmp_path / "train/images/notes.txt").write_text("not an image")

    examples = open_segmentation(config("folder", tmp_path), "train")
    assert [examples.name(index) for index in range(len(examples))] == [
        f"train/images/{n}" for n in ("a.png", "b.jpg", "c.png")
    ]
    assert (examples.classes, examples.ignore) == (("sky", "ground", "rest"), 255)
    pixels, classes = examples.read(0)
    assert (pixels.dtype, classes.dtype, pixels.shape, classes.shape) == (np.uint8, np.uint8, (*SIZE, 3), SIZE)
    assert np.array_equal(pixels, crop_image(image, SIZE))
    assert np.array_equal(classes, crop_nearest(label, SIZE))
    assert set(np.unique(classes)) == {0, 2, 255}
    for index in (1, 2):
        assert np.array_equal(examples.read(index)[1], crop_nearest(ids([1, 0]), SIZE))

    numbered = open_segmentation(config("folder", tmp_path, val="train", ignore=2, classes=3), "val")
    assert numbered.ignore == 2
    with pytest.raises(ValueError, match=r"train/labels/a\.png .*\b255\b.*dataset\.ignore=2"):
        numbered.read(0)
    (tmp_path / "classes.json").unlink()
    assert open_segmentation(config("folder", tmp_path, classes=2), "train").classes == ("class 0", "class 1")


def png_of(values: np.ndarray, bits: int, colour: int = 0) -> bytes:
    """A PNG with these integers as they are: `colour` is 0 for grey, 3 for a palette, 4 for grey with alpha 128."""
    height, width = values.shape
    if colour == 4:
        rows = np.stack([values, np.full_like(values, 128)], -1).astype(">u2" if bits == 16 else "u1").view("u1")
    elif bits == 16:
        rows = values.astype(">u2").view("u1")
    else:
        digits = np.unpackbits(values.astype("u1")[..., None], axis=-1)[..., 8 - bits :]
        rows = np.packbits(digits.reshape(height, -1), axis=-1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    palette = [(b"PLTE", np.random.default_rng(0).bytes(3 << bits))] if colour == 3 else []
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    chunks = [header, *palette, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    packed = (struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize(
    ("bits", "colour", "count"),
    [(1, 0, 2), (2, 0, 4), (4, 0, 12), (8, 0, 200), (16, 0, 7), (1, 3, 2), (2, 3, 3), (4, 3, 11), (8, 3, 5), (8, 4, 6)],
)
@pytest.mark.parametrize("width", [12, 13])
def test_the_integer_that_a_label_file_stores_is_the_class(
    bits: int, colour: int, count: int, width: int, tmp_path: Path
) -> None:
    label = np.add.outer(2 * np.arange(12), np.arange(width)) % count
    save(tmp_path, "val/images/a.png", picture(12, width))
    (tmp_path / "val/labels").mkdir()
    (tmp_path / "val/labels/a.png").write_bytes(png_of(label, bits, colour))
    examples = open_segmentation(config("folder", tmp_path, classes=max(count, 2), size=(12, width)), "val")
    assert np.array_equal(examples.read(0)[1], label)


@pytest.mark.parametrize(
    ("orientation", "undo"),
    [(2, Transpose.FLIP_LEFT_RIGHT), (3, Transpose.ROTATE_180), (4, Transpose.FLIP_TOP_BOTTOM),
     (5, Transpose.TRANSPOSE), (6, Transpose.ROTATE_90), (7, Transpose.TRANSVERSE), (8, Transpose.ROTATE_270)],
)  # fmt: skip
def test_images_and_labels_are_turned_upright_as_in_training(orientation: int, undo: Transpose, tmp_path: Path) -> None:
    image, label, tag = picture(12, 16), Image.fromarray(ids([0, 1, 2, 3], 12, 16)), Image.Exif()
    tag[ExifTags.Base.Orientation] = orientation
    for split in ("train", "val"):
        for part in ("images", "labels"):
            (tmp_path / split / part).mkdir(parents=True)
        image.transpose(undo).save(tmp_path / split / "images/a.png", exif=tag)
    label.save(tmp_path / "train/labels/a.png")  # drawn upright
    label.transpose(undo).save(tmp_path / "val/labels/a.png", exif=tag)
    for split in ("train", "val"):
        pixels, classes = open_segmentation(config("folder", tmp_path, classes=4, size=(12, 16)), split).read(0)
        assert np.array_equal(pixels, np.asarray(image))
        assert np.array_equal(pixels, read_crop(tmp_path / split / "images/a.png", "a", (12, 16)))
        assert np.array_equal(classes, np.asarray(label))


def test_a_label_drawn_on_an_image_that_is_not_upright_is_refused(tmp_path: Path) -> None:
    tag = Image.Exif()
    tag[ExifTags.Base.Orientation] = 6
    save(tmp_path, "val/labels/a.png", ids([0, 1]))
    (tmp_path / "val/images").mkdir()
    picture().save(tmp_path / "val/images/a.jpg", exif=tag)
    with pytest.raises(ValueError, match=r"a\.png has 16x24 .*a\.jpg 24x16 .*EXIF orientation 6"):
        open_segmentation(config("folder", tmp_path, classes=2), "val").read(0)


def test_grey_of_16_bits_with_alpha_is_refused(tmp_path: Path) -> None:
    """Pillow reads the upper 8 bits only."""
    save(tmp_path, "val/images/a.png", picture(12, 12))
    (tmp_path / "val/labels").mkdir()
    (tmp_path / "val/labels/a.png").write_bytes(png_of(np.ones((12, 12), int), 16, 4))
    with pytest.raises(ValueError, match=r"val/labels/a\.png .*LA;16B"):
        open_segmentation(config("folder", tmp_path, classes=2), "val").read(0)


def test_the_digest_is_that_of_the_contents(tmp_path: Path) -> None:
    def digest(root: Path, classes: int = 2, **options: Any) -> str:
        return open_segmentation(config("folder", root, classes=classes), "val", **options).contents

    digests = []
    for place in ("one", "two"):
        root = tmp_path / place
        for name in "ab":
            save(root, f"val/images/{name}.png", Image.fromarray(np.full((12, 12, 3), ord(name), np.uint8)))
            save(root, f"val/labels/{name}.png", ids([0, 1], 12, 12))
        digests.append(digest(root))
    assert digests[0] == digests[1]
    changed = {digests[0]}
    save(root, "val/labels/b.png", ids([1, 0], 12, 12))
    changed.add(digest(root))
    save(root, "val/images/b.png", picture(12, 12))
    changed |= {digest(root), digest(root, limit=1), digest(root, 3)}
    assert len(changed) == 5


def test_voc(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("2007_000032", "2007_000039", "2007_000063"):
        save(root, f"JPEGImages/{name}.jpg", picture())
        save(root, f"SegmentationClass/{name}.png", ids([0, 20, 255]))
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000039\n2007_000032\n")
    (lists / "val.txt").write_text("2007_000063\n")
    for place in (tmp_path, root, root.parent):
        examples = open_segmentation(config("voc", place), "train")
        assert [examples.name(index) for index in range(2)] == [f"JPEGImages/2007_0000{n}.jpg" for n in (39, 32)]
    assert len(open_segmentation(config("voc", tmp_path), "val")) == 1
    assert (len(examples.classes), examples.classes[20], examples.ignore) == (21, "tvmonitor", 255)
    assert set(np.unique(examples.read(0)[1])) == {0, 20, 255}
    other = open_segmentation(config("voc", tmp_path, ignore=100), "train")
    assert set(np.unique(other.read(0)[1])) == {0, 20, 100}
    with pytest.raises(FileNotFoundError, match=r"trainval\.txt"):
        open_segmentation(config("voc", tmp_path, train="trainval"), "train")
    with pytest.raises(ValueError, match=r"dataset\.classes=20 .*dataset\.kind=voc.* 21\b"):
        open_segmentation(config("voc", tmp_path, classes=20), "train")
    for content in (b"\xef\xbb\xbf2007_000039\n\n2007_000032\n", "2007_000039\r\n2007_000032".encode("utf-16")):
        (lists / "train.txt").write_bytes(content)
        assert open_segmentation(config("voc", tmp_path), "train").name(1) == "JPEGImages/2007_000032.jpg"
    (lists / "val.txt").write_text("2007_000063\n2007_000039 1\n")
    with pytest.raises(ValueError, match=r"val\.txt, line 2: '2007_000039 1'"):
        open_segmentation(config("voc", tmp_path), "val")
    (lists / "val.txt").write_bytes(b"\xff2007_000063\n")
    with pytest.raises(ValueError, match=r"val\.txt"):
        open_segmentation(config("voc", tmp_path), "val")
    (lists / "val.txt").write_text("2007_000064\n")
    with pytest.raises(FileNotFoundError, match=r"JPEGImages/2007_000064\.jpg .*\bval\b"):
        open_segmentation(config("voc", tmp_path), "val")


def test_ade20k(tmp_path: Path) -> None:
    for split in ("training", "validation"):
        save(tmp_path, f"ADEChallengeData2016/images/{split}/ADE_1.jpg", picture())
        save(tmp_path, f"ADEChallengeData2016/annotations/{split}/ADE_1.png", ids([0, 150]))
    for split in ("train", "val"):
        examples = open_segmentation(config("ade20k", tmp_path), split)
        assert (len(examples), len(examples.classes), len(set(examples.classes))) == (1, 151, 151)
        assert [examples.classes[index] for index in (0, 1, 13, 150)] == ["background", "wall", "person", "flag"]
        assert set(np.unique(examples.read(0)[1])) == {0, 150}  # neither of which is ignored
    save(tmp_path, "ADEChallengeData2016/annotations/validation/ADE_1.png", ids([0, 151]))
    with pytest.raises(ValueError, match=r"annotations/validation/ADE_1\.png .*\b151\b"):
        examples.read(0)


def test_cityscapes(tmp_path: Path) -> None:
    for city in ("ulm", "bonn"):
        save(tmp_path, f"leftImg8bit/val/{city}/{city}_0_1_leftImg8bit.png", picture())
        save(tmp_path, f"gtFine/val/{city}/{city}_0_1_gtFine_labelIds.png", ids([7, 0, 33, 26, 30, 255]))
    examples = open_segmentation(config("cityscapes", tmp_path, size=(16, 24)), "val")
    assert examples.name(0) == "leftImg8bit/val/bonn/bonn_0_1_leftImg8bit.png"
    assert (len(examples), len(examples.classes), examples.classes[13]) == (2, 19, "car")
    assert set(np.unique(examples.read(1)[1])) == {0, 13, 18, 255}
    with pytest.raises(FileNotFoundError, match=r"\btrain\b.*leftImg8bit"):
        open_segmentation(config("cityscapes", tmp_path), "train")


LAID_OUT = {
    "folder": ("val/images/{}.png", "val/labels/{}.png"),
    "voc": ("JPEGImages/{}.jpg", "SegmentationClass/{}.png"),
    "ade20k": ("images/validation/{}.jpg", "annotations/validation/{}.png"),
    "cityscapes": ("leftImg8bit/val/ulm/{}_leftImg8bit.png", "gtFine/val/ulm/{}_gtFine_labelIds.png"),
    "cocostuff27": ("images/val2017/{}.jpg", "annotations/val2017/{}.png"),
}


@pytest.mark.parametrize("kind", LAID_OUT)
def test_hidden_files_are_left_out_and_suffixes_may_be_in_capitals(kind: str, tmp_path: Path) -> None:
    image, label = (tmp_path / path for path in LAID_OUT[kind])
    for name in "ab":
        save(tmp_path, str(image).format(name), picture())
        save(tmp_path, str(label).format(name), ids([1, 7]))
    for path in (image, label):
        Path(str(path).format("a")).rename(Path(str(path).format("a")).with_suffix(path.suffix.upper()))
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("a\nb\n")
    for name in ("._a" + image.name[2:], ".ipynb_checkpoints/" + image.name.format("a"), "__MACOSX/x.jpg"):
        save(image.parent, name, picture())
    (image.parent / "Thumbs.db").touch()
    lines: list[str] = []
    examples = open_segmentation(config(kind, tmp_path, classes=None if kind != "folder" else 8), "val", lines.append)
    assert [Path(examples.name(index)).suffix for index in range(len(examples))] == [
        image.suffix.upper(), image.suffix
    ]  # fmt: skip
    assert [examples.read(index)[1].shape for index in range(2)] == [SIZE, SIZE]
    if kind == "voc":  # its list says which
        assert lines == []
    else:
        assert lines[0].endswith("2 images; 4 left out: hidden files and folders (3), files that are no images (1)")


@pytest.mark.parametrize("kind", LAID_OUT)
def test_labels_and_lists_may_be_in_another_form_of_unicode(kind: str, tmp_path: Path) -> None:
    """The photograph's name is composed, as in the list; the label's is decomposed."""
    image, label = LAID_OUT[kind]
    save(tmp_path, image.format("\u00e9"), picture())
    save(tmp_path, label.format("e\u0301"), ids([1, 7]))
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("\u00e9\n")
    examples = open_segmentation(config(kind, tmp_path, classes=None if kind != "folder" else 8), "val")
    assert examples.read(0)[1].shape == SIZE


def test_cityscapes_ids_are_those_of_torchvision() -> None:
    from torchvision.datasets import Cityscapes

    known = {kind.id: None if kind.train_id == 255 else kind.train_id for kind in Cityscapes.classes if kind.id >= 0}
    assert {value: index for value, index in tables.CITYSCAPES_IDS.items() if value in known} == known
    names = {kind.train_id: kind.name for kind in Cityscapes.classes}
    assert tuple(names[index] for index in range(19)) == tables.CITYSCAPES


def test_cocostuff27(tmp_path: Path) -> None:
    fine = [0, 17, 123, 181, 255]  # person, dog, grass, wood, nothing
    for name in ("000000000139", "000000000285"):
        save(tmp_path, f"images/val2017/{name}.jpg", picture())
        save(tmp_path, f"annotations/val2017/{name}.png", ids(fine))
    examples = open_segmentation(config("cocostuff27", tmp_path), "val")
    assert (len(examples), len(set(examples.classes))) == (2, 27)
    actual = set(np.unique(examples.read(0)[1])) - {255}
    assert {examples.classes[index] for index in actual} == {"person", "animal", "plant", "solid"}
    curated = tmp_path / "curated" / "val2017"
    curated.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"\bval2017\b.*Stuff_Coarse\.txt"):
        open_segmentation(config("cocostuff27", tmp_path), "val")
    (curated / "Coco164kFull_Stuff_Coarse.txt").write_text("000000000285\n")
    (curated / "Coco164kFull_Stuff_Coarse_7.txt").write_text("000000000139\n")
    assert open_segmentation(config("cocostuff27", tmp_path), "val").name(0) == "images/val2017/000000000285.jpg"
    stego = open_segmentation(config("cocostuff27", tmp_path, val="val2017/Coco164kFull_Stuff_Coarse_7"), "val")
    assert (len(stego), stego.name(0)) == (1, "images/val2017/000000000139.jpg")
    save(tmp_path, "annotations/val2017/000000000285.png", ids([182]))
    with pytest.raises(ValueError, match=r"000000000285\.png .*\b182\b.*\b27\b"):
        open_segmentation(config("cocostuff27", tmp_path), "val").read(0)


def test_cocostuff27_supercategories() -> None:
    """Labels of COCO-Stuff's own list, which counts from 1, in the supercategories of its hierarchy."""
    kinds = {
        "vehicle": (2, 9), "outdoor": (10, 15), "animal": (16, 25), "accessory": (26, 33), "sports": (34, 43),
        "kitchen": (44, 51), "food": (52, 61), "furniture": (62, 71), "electronic": (72, 77), "appliance": (78, 83),
        "indoor": (84, 91), "textile": (92, 131, 141), "building": (95, 96), "ceiling": (102, 103), "sky": (106, 157),
        "floor": (114, 118), "food (stuff)": (121, 122, 153, 170), "ground": (125, 149, 154), "plant": (129, 169),
        "wall": (171, 177), "water": (120, 148, 155, 178, 179), "window": (180, 181), "solid": (127, 182),
    }  # fmt: skip
    for name, labels in kinds.items():
        assert {tables.COCOSTUFF27[tables.COCOSTUFF27_IDS[label - 1]] for label in labels} == {name}
    assert set(tables.COCOSTUFF27_IDS) == {*range(182), 255}


@pytest.mark.parametrize(
    ("kind", "advice"),
    [("folder", "SPLIT/images/NAME.jpg and SPLIT/labels/NAME.png"), ("voc", "VOCtrainval_11-May-2012.tar"),
     ("ade20k", "ADEChallengeData2016.zip"), ("cityscapes", "gtFine_trainvaltest.zip"),
     ("cocostuff27", "stuffthingmaps_trainval2017.zip"), ("nyu", "nyuv2_snorm_all.pkl")],
)  # fmt: skip
def test_missing_data_says_what_to_put_there(kind: str, advice: str, tmp_path: Path) -> None:
    opener = open_nyu if kind == "nyu" else open_segmentation
    for root in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(str(root))) as caught:
            opener(config(kind, root), "val")
        assert advice in str(caught.value)
        assert "\n" not in str(caught.value)


def test_examples_that_cannot_be_used(tmp_path: Path) -> None:
    save(tmp_path, "val/images/0.png", picture())
    with pytest.raises(FileNotFoundError, match=r"val/images/0\.png .*val/labels/0\.png"):
        open_segmentation(config("folder", tmp_path), "val")
    for label, message in (
        (ids([0], 16, 23), "16x23 .*val/images/0.png 16x24"),
        (ids([0, 5]), "value 5, .* 5 classes"),
        (picture(), "mode RGB "),
        (picture().convert("RGBA"), "mode RGBA "),
        (ids([0, 1]).astype(np.uint16) + 300, r"\b301\b"),
    ):
        save(tmp_path, "val/labels/0.png", label)
        with pytest.raises(ValueError, match=f"val/labels/0.png .*{message}"):
            open_segmentation(config("folder", tmp_path, classes=5), "val").read(0)
    save(tmp_path, "val/labels/0.png", ids([0]))
    save(tmp_path, "val/images/0.jpg", picture())
    with pytest.raises(ValueError, match=r"val/images/0\.jpg and val/images/0\.png .*val/labels/0\.png"):
        open_segmentation(config("folder", tmp_path, classes=5), "val")
    (tmp_path / "val/images/0.jpg").unlink()
    save(tmp_path, "val/labels/0.PNG", ids([0]))
    with pytest.raises(ValueError, match=r"val/labels/0\.PNG and val/labels/0\.png "):
        open_segmentation(config("folder", tmp_path, classes=5), "val")
    (tmp_path / "val/labels/0.PNG").unlink()
    image = tmp_path / "val/images/0.png"
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(OSError, match=r"val/images/0\.png"):
        open_segmentation(config("folder", tmp_path, classes=5), "val").read(0)

    with pytest.raises(ValueError, match=r"dataset\.classes=None .*dataset\.classes=NUMBER"):
        open_segmentation(config("folder", tmp_path), "val")
    (tmp_path / "classes.json").write_text('{"0": "a", "1": "b"}')
    with pytest.raises(ValueError, match=r"dataset\.classes=5 .*classes\.json.* 2\b"):
        open_segmentation(config("folder", tmp_path, classes=5), "val")
    for text in ('{"1": "a", "2": "b"}', '["a", "b"]', "{"):
        (tmp_path / "classes.json").write_text(text)
        with pytest.raises(ValueError, match=r"classes\.json"):
            open_segmentation(config("folder", tmp_path), "val")
    with pytest.raises(ValueError, match=r"dataset\.kind=nyu"):
        open_segmentation(config("nyu", tmp_path), "val")


@needs_photos
def test_cutouts() -> None:
    settings = config("folder", DATA / "cutouts", size=(448, 448))
    train, val = (open_segmentation(settings, split) for split in ("train", "val"))
    assert (len(train), len(val), len(val.classes)) == (240, 80, 8)
    assert val.classes[0] == "background"
    pixels, classes = val.read(3)
    with Image.open(DATA / "cutouts" / val.name(3)) as image:
        assert np.array_equal(pixels, np.asarray(image))
    with Image.open(DATA / "cutouts" / "val" / "labels" / "0003.png") as label:
        assert np.array_equal(classes, np.asarray(label))


def png(values: np.ndarray | Image.Image) -> io.BytesIO:
    file = io.BytesIO()
    (values if isinstance(values, Image.Image) else Image.fromarray(values)).save(file, "PNG")
    file.seek(0)
    return file


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Image.Image]]:
    """A data set of TFDS with two records, and their images."""
    import tensorflow_datasets as tfds

    images, folder = [picture(), picture()], tmp_path_factory.mktemp("tfds")

    class Mine(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Two images."""

        VERSION = tfds.core.Version("1.0.0")
        name = "mine"

        def _info(self) -> tfds.core.DatasetInfo:
            names = tfds.features.LabeledImage(labels=["sky", "ground"])
            features = dict(
                image=tfds.features.Image(), mask=names, plain=tfds.features.Image(shape=(None, None, 1)), n=np.int64
            )
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _manager: Any) -> dict[str, Any]:
            return {"validation": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            for key, image in enumerate(images):
                yield key, dict(image=png(image), mask=png(ids([1, 0, 255])), plain=png(ids([3])), n=key)

    Mine(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder, images


def test_tfds(prepared: tuple[Path, list[Image.Image]]) -> None:
    folder, images = prepared
    mine = dict(name="mine", label="mask")
    examples = open_segmentation(config("tfds", folder, **mine), "val")
    assert (len(examples), examples.name(1), examples.classes) == (2, "mine/validation#1", ("sky", "ground"))
    actual = [examples.read(index) for index in range(2)]
    for image in images:
        assert any(np.array_equal(crop_image(image, SIZE), pixels) for pixels, _ in actual)
    assert np.array_equal(actual[0][1], crop_nearest(ids([1, 0, 255]), SIZE))

    counted = open_segmentation(config("tfds", folder, name="mine", label="plain", classes=3), "val")
    assert counted.classes == ("class 0", "class 1", "class 2")
    with pytest.raises(ValueError, match=r"mine/validation#0 \(plain\) .*\b3\b"):
        counted.read(0)
    for settings, split, message in (
        (dict(name="mine", label="plain"), "val", r"dataset\.classes=NUMBER"),
        (dict(name="mine"), "val", r"dataset\.label='segmentation_label' .*image, mask, n, plain"),
        (mine | dict(image="n"), "val", r"dataset\.image='n' .*\bmine\b"),
        (mine | dict(classes=5), "val", r"dataset\.classes=5 .*\bmask\b.* 2\b"),
        (mine, "train", r"\btrain of mine\b"),
    ):
        with pytest.raises(ValueError, match=message):
            open_segmentation(config("tfds", folder, **settings), split)
    with pytest.raises(FileNotFoundError, match=r"\bother\b.*\bvalidation\b.*array_record"):
        open_segmentation(config("tfds", folder, name="other"), "val")
