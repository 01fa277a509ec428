"""Photographs of every kind become crops or are skipped; batches are the same however they are made."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.Image import Transpose

from tests.training import ROOT, environment, losses
from tests.training import train as run_training
from train import size_index
from train.config import Config, DatasetConfig, EncoderConfig
from train.data import Batches, open_source, sources
from train.data.images import TooSmall, read_crop
from train.data.sources import Files

SIZE = (24, 32)
SMALL = dict(crop_size=(32, 32), img_size=(16, 16), num_local_crops=3)


def photograph(height: int = 24, width: int = 32, seed: int = 0) -> Image.Image:
    """Smooth, so that JPEG and resizing change it little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def crop(file: io.BytesIO, size: tuple[int, int] = SIZE) -> np.ndarray:
    pixels = read_crop(file, "it", size)
    assert pixels.shape == (*size, 3)
    assert pixels.dtype == np.uint8
    return pixels


@pytest.mark.parametrize("size", [(24, 32), (20, 20), (24, 10), (7, 32)])
@pytest.mark.parametrize("large", [(24, 32), (61, 47), (40, 200)])
def test_the_centre_just_covers_the_crop(size: tuple[int, int], large: tuple[int, int]) -> None:
    image = photograph(*large)
    scale = max(size[0] / large[0], size[1] / large[1])
    whole = image.resize((round(large[1] * scale), round(large[0] * scale)), Image.Resampling.BILINEAR)
    y, x = round((whole.height - size[0]) / 2), round((whole.width - size[1]) / 2)
    expected = np.asarray(whole)[y : y + size[0], x : x + size[1]]
    assert np.abs(crop(encoded(image), size).astype(int) - expected).max() <= 1


def test_kinds_of_images() -> None:
    image = photograph()
    pixels, gray = np.asarray(image), image.convert("L")
    assert np.array_equal(crop(encoded(image)), pixels)
    assert np.array_equal(crop(encoded(gray)), np.repeat(np.asarray(gray)[..., None], 3, 2))
    assert np.array_equal(crop(encoded(gray.convert("1"))), np.asarray(gray.convert("1").convert("RGB")))
    assert np.array_equal(crop(encoded(image.quantize(16))), np.asarray(image.quantize(16).convert("RGB")))
    ink = encoded(image.convert("CMYK"), "JPEG", quality=100, subsampling=0)
    assert np.abs(crop(ink).astype(int) - pixels).max() < 12
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(crop(encoded(deep, kind))[..., 1], np.asarray(gray))
    with pytest.raises(ValueError, match=r"^it .*floating-point"):
        crop(encoded(gray.convert("F"), "TIFF"))


def test_transparency_is_laid_on_white() -> None:
    image = photograph()
    image.putalpha(Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 16, 1).repeat(24, 0)))
    pixels = crop(encoded(image))
    assert (pixels[:, :16] == 255).all()
    assert np.array_equal(pixels[:, 16:], np.asarray(photograph())[:, 16:])


@pytest.mark.parametrize(
    ("orientation", "undo"),
    [(1, None), (2, Transpose.FLIP_LEFT_RIGHT), (3, Transpose.ROTATE_180), (4, Transpose.FLIP_TOP_BOTTOM),
     (5, Transpose.TRANSPOSE), (6, Transpose.ROTATE_90), (7, Transpose.TRANSVERSE), (8, Transpose.ROTATE_270)],
)  # fmt: skip
def test_exif_orientation(orientation: int, undo: Transpose | None) -> None:
    image, exif = photograph(40, 70), Image.Exif()
    exif[0x0112] = orientation
    turned = image if undo is None else image.transpose(undo)
    assert np.array_equal(crop(encoded(turned, exif=exif), (40, 70)), np.asarray(image))
    large = turned.resize((6 * turned.width, 6 * turned.height))
    decoded = crop(encoded(large, "JPEG", quality=95, exif=exif), (40, 70))  # of which a half is decoded
    assert np.abs(decoded.astype(int) - np.asarray(image)).mean() < 3


def test_what_cannot_be_used() -> None:
    whole = encoded(photograph(), "JPEG").getvalue()
    cut = encoded(photograph()).getvalue()[:90]
    for data in (whole[:-20], whole[: len(whole) // 2], whole[:10], b"no image", b"", cut):
        with pytest.raises(OSError, match=r"^it "):
            crop(io.BytesIO(data))
    with pytest.raises(TooSmall, match=r"^it .*24x32.* dataset.crop_size=25x32"):
        crop(encoded(photograph()), (25, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    with pytest.raises(TooSmall, match=r"^it .*32x24"):
        crop(encoded(photograph(), exif=exif))
    with pytest.raises(FileNotFoundError):
        read_crop("nowhere.png", "nowhere.png", SIZE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_damage_is_always_an_error_that_the_pipeline_knows(kind: str) -> None:
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(photograph(40, 40), kind, **({} if kind in ("GIF", "BMP", "PPM") else dict(exif=exif))).getvalue()
    failed = 0
    for turn in range(150):
        data = bytearray(whole)
        for _ in range(4):
            data[random.integers(min(len(data), 200 if turn % 2 else len(data)))] = random.integers(256)
        try:
            crop(io.BytesIO(data[: random.integers(len(data))] if turn % 3 == 0 else data))
        except (OSError, ValueError):
            failed += 1
    assert failed >= 20


def config(batch_size: int = 4, seed: int = 0, **dataset: Any) -> Config:
    settings = DatasetConfig(**(SMALL | dataset))
    return Config(encoders={"any": EncoderConfig(name="any")}, dataset=settings, batch_size=batch_size, seed=seed)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten good photographs in two classes."""
    for number in range(10):
        folder = tmp_path / "root" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        photograph(33 + number, 50, seed=number).save(folder / f"{number}.png")
    return tmp_path / "root"


def take(count: int, source: Any, settings: Config, *share: int, start: int = 0) -> list[dict[str, Any]]:
    batches = Batches(source, settings, *share, start=start)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def same(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a) for a, b in zip(left, right)
    )


def test_photographs_of_scikit_image() -> None:
    source = open_source(DatasetConfig(**SMALL))
    assert len(source) == 6
    assert "astronaut.png" in {source.name(index) for index in range(6)}
    assert len(open_source(DatasetConfig(crop_size=(872, 1000), img_size=(16, 16)))) == 2
    with pytest.raises(ValueError, match=r"6 images .*\(2000, 2000\).* 1411 pixels"):
        open_source(DatasetConfig(crop_size=(2000, 2000)))


def test_a_folder_is_indexed_once_and_small_images_are_left_out(root: Path) -> None:
    (root / "a" / "broken.png").write_bytes(b"no image")
    messages: list[str] = []
    settings = config(kind="folder", root=str(root), crop_size=(36, 36)).dataset
    source = open_source(settings, messages.append)
    assert [source.name(index) for index in range(len(source))] == [
        "a/4.png", "a/6.png", "a/8.png", "b/3.png", "b/5.png", "b/7.png", "b/9.png"
    ]  # fmt: skip
    assert f"python -m train.size_index {root}" in messages[0]
    again = open_source(settings, lambda line: pytest.fail(line))
    assert again.digest == source.digest
    with source.open(0) as file:
        assert crop(file).shape == (*SIZE, 3)
    elsewhere = config(kind="folder", root=str(root), index=str(root.parent / "mine.tsv")).dataset
    assert len(open_source(elsewhere, messages.append)) == 10
    assert (root.parent / "mine.tsv").is_file()


def test_hidden_photographs_of_an_older_index_are_not_trained_on(root: Path) -> None:
    settings, messages = config(kind="folder", root=str(root)).dataset, []
    source = open_source(settings, messages.append)
    with (root / "size_index.tsv").open("a") as index:
        index.write("a/._4.png\t0\t60\t60\t60\n__MACOSX/a/4.png\t2\t60\t60\t60\n")
    assert open_source(settings, messages.append).digest == source.digest
    assert "2 of its 12 files" in messages[-1]


def test_an_index_older_than_its_folders_is_named(root: Path) -> None:
    for path in root.rglob("*"):
        os.utime(path, (1e9, 1e9))
    settings, messages = config(kind="folder", root=str(root)).dataset, []
    digest = open_source(settings, messages.append).digest
    index = root / "size_index.tsv"
    os.utime(index, (1.1e9, 1.1e9))
    messages.clear()
    assert open_source(settings, messages.append).digest == digest
    assert messages == []
    photograph(60, 60).save(root / "b" / "added.png")
    assert open_source(settings, messages.append).digest == digest
    (message,) = messages
    assert str(index) in message
    assert " 10 photographs of 2004-11-" in message
    assert "the folder b changed" in message
    (root / "new").mkdir()
    photograph(60, 60).save(root / "new" / "added.png")
    os.utime(root / "new", (1e9, 1e9))  # as a folder that was moved here
    open_source(settings, messages.append)
    assert "the folder b (and 1 more) changed" in messages[-1]
    index.unlink()
    assert len(open_source(settings, messages.append)) == 12
    assert messages[-1].startswith(f"{index}: 12 images, 0 ")


def test_photographs_added_while_a_folder_is_indexed_are_said_to_be_missing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = size_index._measure

    def measure_and_add(path: str) -> tuple[int, int]:
        photograph(60, 60).save(root / "a" / "added.png")
        return measure(path)

    monkeypatch.setattr(size_index, "_measure", measure_and_add)
    messages: list[str] = []
    assert len(open_source(config(kind="folder", root=str(root)).dataset, messages.append)) == 10
    assert "the folder a changed" in messages[-1]


def test_an_index_that_cannot_be_written_names_the_setting(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = config(kind="folder", root=str(root), index=str(root / "absent" / "index.tsv")).dataset
    with pytest.raises(OSError, match=r"absent/index\.tsv .*dataset\.index=FILE"):
        open_source(absent, lambda line: None)

    def read_only(**options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), options["dir"])

    monkeypatch.setattr(sources.tempfile, "TemporaryFile", read_only)
    with pytest.raises(OSError, match=r"size_index\.tsv .*Read-only file system.*dataset\.index=FILE"):
        open_source(config(kind="folder", root=str(root)).dataset, lambda line: None)
    assert sorted(path.name for path in root.iterdir()) == ["a", "b"]


def test_folders_that_cannot_be_used(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"dataset\.root=.*nowhere .*root/class/file"):
        open_source(config(kind="folder", root=str(tmp_path / "nowhere")).dataset)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="root/class/file"):
        open_source(config(kind="folder", root=str(tmp_path / "empty")).dataset, lambda line: None)
    with pytest.raises(ValueError, match=r"10 images .*\(64, 64\).* 42 pixels"):
        open_source(config(kind="folder", root=str(root), crop_size=(64, 64)).dataset, lambda line: None)


def module(name: str, *words: object, folder: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """`python -m NAME WORDS` in a folder, warnings being errors."""
    command = [sys.executable, "-W", "error", "-m", name, *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment())
    assert run.returncode == status, run.stderr[-3000:]
    return run


def test_tfds_round_trip(root: Path, tmp_path: Path) -> None:
    (root / "b" / "broken.png").write_bytes(b"no image")
    words = "root", "data", "mine"
    files = {path.read_bytes() for path in root.glob("*/*.png")}
    for name in ("__MACOSX/4.png", ".git/4.png", "a/._4.png", "a/.ipynb_checkpoints/4.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"hidden")
    (root / "a" / "4.png").rename(root / "a" / "4.PNG")
    (root / "b" / "deep").mkdir()
    (root / "b" / "3.png").rename(root / "b" / "deep" / "3.png")
    os.mkfifo(root / "b" / "pipe.png")
    run = module("train.data.tfds_from_folder", *words, folder=tmp_path)
    assert "11 images; 5 left out: hidden files and folders (4), pipes, devices and broken links (1)" in run.stdout
    assert "mine: 11 images in data; train with dataset=tfds dataset.name=mine dataset.root=data" in run.stdout
    settings = config(kind="tfds", name="mine", root=str(tmp_path / "data"))
    source = open_source(settings.dataset)
    assert len(source) == 11
    stored = set()
    for index in range(len(source)):
        assert source.name(index) == f"mine/train#{index}"
        with source.open(index) as file:
            stored.add(file.read())
    assert stored == files
    skipped = [pair for batch in take(3, source, settings) for pair in batch["skipped"]]
    assert skipped
    assert all(name in reason for name, reason in skipped)

    again = module("train.data.tfds_from_folder", *words, folder=tmp_path, status=2)
    assert str(Path("data") / "mine") in again.stderr
    with pytest.raises(ValueError, match=r"split test of mine"):
        open_source(config(kind="tfds", name="mine", root=str(tmp_path / "data"), split="test").dataset)
    with pytest.raises(ValueError, match=r"11 images of mine/train .*\(64, 64\)"):
        open_source(config(kind="tfds", name="mine", root=str(tmp_path / "data"), crop_size=(64, 64)).dataset)


def test_tfds_that_cannot_be_used(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing_like_it, split train"):
        open_source(config(kind="tfds", name="nothing_like_it", root=str(tmp_path)).dataset)
    with pytest.raises(FileNotFoundError, match="tfds build mnist --file_format=array_record"):
        open_source(config(kind="tfds", name="mnist", root=str(tmp_path)).dataset)
    for words, message in ((("root", "data", "No-Name"), "lower-case"), (("data", "data", "mine"), "root/class/file")):
        run = module("train.data.tfds_from_folder", *words, folder=tmp_path, status=2)
        assert message in run.stderr
        assert run.stderr.count("\n") == 1


@pytest.fixture
def source(root: Path) -> Files:
    return files(root)


def files(root: Path) -> Files:
    return Files(root, sorted(path.relative_to(root).as_posix() for path in root.glob("*/*")))


def test_what_is_in_a_batch(source: Files) -> None:
    for batch in take(3, source, config()):
        assert batch["image"].shape == batch["augmented"].shape == (4, 32, 32, 3)
        assert batch["image"].dtype == batch["augmented"].dtype == np.uint8
        assert batch["crops"].shape == (4, 3, 2)
        assert batch["crops"].dtype == np.float32
        assert (batch["crops"] >= 0).all()
        assert (batch["crops"] < 1).all()
        assert batch["skipped"] == []
        for name, image in zip(batch["name"], batch["image"]):
            assert np.array_equal(image, read_crop(source.root / name, name, (32, 32)))
    plain = take(1, source, config(augmentation_strength=0.0))[0]
    assert np.array_equal(plain["image"], plain["augmented"])


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_same_batches(source: Files, count: int) -> None:
    whole = take(6, source, config())
    shares = [take(6, source, config(), index, count) for index in range(count)]
    joined = []
    for parts in zip(*shares):
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in ("image", "augmented", "crops")}
        lists = {key: [item for part in parts for item in part[key]] for key in ("name", "skipped")}
        joined.append(arrays | lists)
    assert same(joined, whole)


@pytest.mark.parametrize("share", [(0, 1), (1, 2)])
def test_going_on_from_anywhere(source: Files, share: tuple[int, int]) -> None:
    whole = take(7, source, config(), *share)
    assert same(take(3, source, config(), *share, start=4), whole[4:])
    batches = Batches(source, config(), *share)
    for _ in range(3):
        next(batches)
    state = batches.get_state()
    assert state["step"] == 3
    other = Batches(source, config(threads=1, prefetch=1), *share)
    other.set_state(state)
    assert other.get_state() == state
    assert same([next(other) for _ in range(4)], whole[3:])
    other.set_state(batches.get_state() | {"step": 1})
    assert same([next(other)], whole[1:2])
    batches.close()
    other.close()


def test_other_photographs_are_refused(root: Path, source: Files) -> None:
    batches = Batches(source, config())
    state = batches.get_state()
    batches.close()
    for paths in (source.paths[1:], source.paths[::-1]):
        others = Batches(Files(root, paths), config())
        with pytest.raises(ValueError, match=rf"10 photographs .* {len(paths)} now"):
            others.set_state(state)
        others.close()


def test_every_photograph_once_an_epoch_in_another_order_each_time(source: Files) -> None:
    names = [name for batch in take(15, source, config()) for name in batch["name"]]  # across the ends of epochs
    epochs = [tuple(names[first : first + 10]) for first in range(0, 60, 10)]
    assert all(sorted(epoch) == list(source.paths) for epoch in epochs)
    assert len(set(epochs)) == 6
    other = [name for batch in take(5, source, config(seed=1)) for name in batch["name"]]
    assert other[:10] != names[:10]
    first, second = take(5, source, config(batch_size=10))[:2]
    for name in source.paths:
        views = [batch["crops"][batch["name"].index(name)] for batch in (first, second)]
        assert not np.array_equal(*views)  # other crops each time


def test_a_bad_file_gives_way_to_the_next(root: Path) -> None:
    (root / "a" / "4.png").write_bytes(b"no image")
    (root / "a" / "6.png").unlink()
    photograph(20, 50).save(root / "a" / "8.png")
    source = Files(root, [*(f"a/{n}.png" for n in (0, 2, 4, 6, 8)), *(f"b/{n}.png" for n in (1, 3, 5, 7, 9))])
    taken = take(5, source, config())
    assert same(taken, take(5, source, config()))
    names = [name for batch in taken for name in batch["name"]]
    for epoch in (names[:10], names[10:]):
        assert epoch.count("b/1.png") == 4
    skipped = [pair for batch in taken for pair in batch["skipped"]]
    assert [name for name, _ in skipped].count("a/8.png") == 6
    reasons = dict(skipped)
    assert reasons.keys() == {"a/4.png", "a/6.png", "a/8.png"}
    assert "20x50" in reasons["a/8.png"]


def test_a_name_that_is_not_utf8(root: Path) -> None:
    name = os.fsdecode(b"bad\xff.jpg")
    try:
        photograph(40, 50).save(root / "a" / name, "JPEG")
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    settings = config(kind="folder", root=str(root))
    source = open_source(settings.dataset, lambda line: None)
    assert len(source) == 11
    batches = Batches(source, settings)
    names = {name for _ in range(3) for name in next(batches)["name"]}
    state = json.loads(json.dumps(batches.get_state()))
    batches.close()
    assert r"a/bad\udcff.jpg" in names
    other = Batches(source, settings)
    other.set_state(state)
    other.close()


def test_a_pipe_in_place_of_a_photograph_is_skipped(root: Path, source: Files) -> None:
    (root / "a" / "4.png").unlink()
    os.mkfifo(root / "a" / "4.png")
    skipped = [pair for batch in take(3, source, config()) for pair in batch["skipped"]]
    assert {name for name, _ in skipped} == {"a/4.png"}


def test_nothing_but_bad_files_ends_the_run(root: Path, source: Files) -> None:
    for path in root.glob("*/*"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"10 photographs .*\.png"):
        take(1, source, config())


def test_worker_processes_make_the_same_batches(source: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    here = take(5, source, config())
    assert same(take(4, source, config(workers=2), start=1), here[1:])


@pytest.mark.slow
def test_training_with_worker_processes(tmp_path: Path) -> None:
    run = run_training(tmp_path, "output_dir=run", "max_steps=2", "dataset.workers=2")
    assert run.stderr == ""
    assert len(losses(tmp_path / "run")) == 2
