"""Reading images of every kind, writing features whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import zarr
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open

from anyup_core import files

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
GRAY = PIXELS[..., 0]


def saved(tmp_path, image: Image.Image, name: str = "image.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def test_what_counts_as_a_photograph(tmp_path):
    photographs = ["a.JPEG", "b.Tif", "c.png"]
    hidden = [".a.jpg", "._c.png", "__MACOSX/d.jpg", ".ipynb_checkpoints/c.png", ".git/e.png", "@eaDir/c.png/f.jpg"]
    for name in [*photographs, *hidden, "notes.txt", "jpg", "inner.jpg/g.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    left_out = Counter()
    assert files.list_folder(tmp_path, left_out) == (photographs, ["inner.jpg"])
    assert left_out == {files.HIDDEN_ENTRIES: 6, files.OTHER_FILES: 2}
    assert files.describe(left_out) == "; 8 left out: hidden files and folders (6), files that are no images (2)"
    assert files.describe(Counter()) == ""
    assert all(files.is_photograph(name) for name in [*photographs, "inner.jpg/g.png"])
    assert not any(files.is_photograph(name) for name in [*hidden, "notes.txt", "jpg"])


def test_colour_and_grayscale(tmp_path):
    np.testing.assert_array_equal(files.read_image(saved(tmp_path, Image.fromarray(PIXELS))), PIXELS)
    gray = files.read_image(saved(tmp_path, Image.fromarray(GRAY)))
    np.testing.assert_array_equal(gray, np.repeat(GRAY[..., None], 3, -1))
    bits = files.read_image(saved(tmp_path, Image.fromarray(GRAY > 100)))
    np.testing.assert_array_equal(bits[..., 0], np.where(GRAY > 100, 255, 0))


@pytest.mark.parametrize("name", ["image.png", "image.tif"])
def test_sixteen_bits_keep_their_range(tmp_path, name):
    deep = GRAY.astype(np.uint16) * 257
    image = files.read_image(saved(tmp_path, Image.fromarray(deep), name))
    np.testing.assert_array_equal(image, np.repeat(GRAY[..., None], 3, -1))


def test_palette_and_cmyk(tmp_path):
    palette = Image.fromarray(PIXELS).quantize(256)
    np.testing.assert_array_equal(files.read_image(saved(tmp_path, palette)), np.asarray(palette.convert("RGB")))
    cmyk = Image.fromarray(PIXELS).convert("CMYK")
    np.testing.assert_array_equal(files.read_image(saved(tmp_path, cmyk, "image.tif")), PIXELS)


def test_transparent_pixels_are_white(tmp_path):
    alpha = np.where(np.arange(9) < 4, 0, 255).astype(np.uint8)
    rgba = np.dstack([PIXELS, np.broadcast_to(alpha, (6, 9))])
    expected = np.where(alpha[:, None] == 0, 255, PIXELS)
    np.testing.assert_array_equal(files.read_image(saved(tmp_path, Image.fromarray(rgba))), expected)


def test_exif_orientation_turns_the_image_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    path = saved(tmp_path, Image.fromarray(PIXELS), exif=exif)
    np.testing.assert_array_equal(files.read_image(path), np.rot90(PIXELS, -1))


def test_images_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"absent\.png"):
        files.read_image(tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(OSError, match=r"text\.png is not an image"):
        files.read_image(tmp_path / "text.png")
    path = saved(tmp_path, Image.fromarray(PIXELS).resize((300, 200)), "image.jpg")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(OSError, match=r"image\.jpg is damaged: .*truncated"):
        files.read_image(path)
    with pytest.raises(ValueError, match="range is unknown"):
        files.read_image(saved(tmp_path, Image.fromarray(GRAY.astype(np.float32)), "float.tif"))
    with pytest.raises(ValueError, match="convert it to 8 or 16 bits"):
        files.read_image(saved(tmp_path, Image.fromarray(GRAY.astype(np.int32) * 70000), "deep.tif"))
    path = saved(tmp_path, Image.fromarray(PIXELS))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"image\.png is too large"):
        files.read_image(path)


def test_resizing(tmp_path):
    assert files.resize_image(PIXELS, (6, 9)) is PIXELS
    assert files.resize_image(PIXELS, (3, 20)).shape == (3, 20, 3)


def test_features_are_read_and_checked(tmp_path):
    path = tmp_path / "features.npy"
    np.save(path, np.ones((2, 3, 4), np.float16))
    assert files.read_features(path).dtype == np.float32
    for wrong in (np.ones((3, 4)), np.ones((2, 3, 4), int)):
        np.save(path, wrong)
        with pytest.raises(ValueError, match=r"give one floating-point feature map \(h, w, C\)"):
            files.read_features(path)
    np.save(path, np.full((2, 3, 4), np.inf))
    with pytest.raises(ValueError, match="not finite"):
        files.read_features(path)
    path.write_bytes(b"not numpy")
    with pytest.raises(ValueError, match=r"is not an \.npy file"):
        files.read_features(path)


@pytest.mark.parametrize("metadata", ["text", "icc_profile"])
def test_metadata_that_pillow_refuses(tmp_path, metadata):
    info = PngInfo()
    info.add_text("text", 2_000_000 * "x", zip=True)
    options = dict(pnginfo=info) if metadata == "text" else dict(icc_profile=bytes(2_000_000))
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png", **options)
    with pytest.raises(ValueError, match=r"image\.png has text or a colour profile .*; save it without these"):
        files.read_image(tmp_path / "image.png")


def test_output_paths_are_checked(tmp_path):
    assert files.check_output(tmp_path / "a.npz", files.ARRAY_SUFFIXES) == tmp_path / "a.npz"
    with pytest.raises(ValueError, match=r"suffix '\.txt'; the output can be \.npz, \.safetensors"):
        files.check_output(tmp_path / "a.txt", files.ARRAY_SUFFIXES)
    with pytest.raises(OSError, match="does not exist; create it first"):
        files.check_output(tmp_path / "absent" / "a.npz", files.ARRAY_SUFFIXES)
    (tmp_path / "link.npz").symlink_to(tmp_path / "absent" / "a.npz")
    with pytest.raises(OSError, match="absent does not exist"):
        files.check_output(tmp_path / "link.npz", files.ARRAY_SUFFIXES)
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(OSError, match="is a folder"):
        files.check_output(tmp_path / "folder.npz", files.ARRAY_SUFFIXES)


def test_a_folder_without_write_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    with pytest.raises(OSError, match="not writable"):
        files.check_output(tmp_path / "a.npz", files.ARRAY_SUFFIXES)


@pytest.mark.parametrize("suffix", files.ARRAY_SUFFIXES)
def test_features_are_written(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    features = np.arange(24, dtype=np.float64).reshape(2, 3, 4).transpose(1, 0, 2)  # neither float32 nor contiguous
    metadata = {"image": "cat.jpg", "image_size": [20, 30]}
    files.write_features(path, features, metadata)
    if suffix == ".npz":
        with np.load(path) as archive:
            written = archive["features"]
            assert archive["image_size"].tolist() == [20, 30]
            assert json.loads(str(archive["metadata"])) == metadata
    else:
        with safe_open(path, "numpy") as archive:
            written = archive.get_tensor("features")
            assert {key: json.loads(value) for key, value in archive.metadata().items()} == metadata
    assert written.dtype == np.float32
    np.testing.assert_array_equal(written, features)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


MAP = np.random.default_rng(0).standard_normal((37, 20, 5)).astype(np.float32)


def in_bands(rows: int = 8):
    return (MAP[first : first + rows] for first in range(0, len(MAP), rows))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("suffix", files.BAND_SUFFIXES)
def test_bands_are_written_one_after_the_other(tmp_path, suffix, dtype):
    path = tmp_path / f"out{suffix}"
    for _ in range(2):  # the second one takes the first one's place
        files.write_bands(path, in_bands(), MAP.shape, {"image": "cat.jpg"}, dtype)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    if suffix == ".npy":
        written = np.load(path)
    else:
        array = zarr.open_array(str(path), mode="r")
        assert dict(array.attrs) == {"image": "cat.jpg"}
        written = array[:]
    assert written.dtype == dtype
    np.testing.assert_array_equal(written, MAP.astype(dtype))


@pytest.mark.parametrize("suffix", files.BAND_SUFFIXES)
def test_bands_that_end_early_or_do_not_fit_leave_the_old_file(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    files.write_bands(path, in_bands(), MAP.shape, {})

    def interrupted():
        yield MAP[:8] + 1
        raise KeyboardInterrupt

    for wrong, error, sentence in (
        (interrupted(), KeyboardInterrupt, None),
        ([MAP[:8] + 1], ValueError, "ended after 8 of 37 rows"),
        ([MAP, MAP[:1]], ValueError, "does not fit into"),
        ([MAP[:, :3]], ValueError, "does not fit into"),
    ):
        with pytest.raises(error, match=sentence):
            files.write_bands(path, wrong, MAP.shape, {})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    if suffix == ".npy":
        np.testing.assert_array_equal(np.load(path), MAP)


FULL_DISK = """
import pathlib, resource, signal, sys
import numpy as np
from anyup_core import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # as a full disk: writing beyond fails
try:
    files.write_bands(sys.argv[1], [np.ones((8, 20, 5), np.float32)] * 2, (16, 20, 5), {})
except OSError as error:
    print("refused", error)
"""


@pytest.mark.parametrize("suffix", files.BAND_SUFFIXES)
def test_a_full_disk_leaves_nothing(tmp_path, suffix, monkeypatch):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / f"out{suffix}")], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("refused"), done.stderr
    assert list(tmp_path.iterdir()) == []
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"takes 0\.0 GB, but only 0\.0 GB are free"):
        files.write_bands(tmp_path / f"out{suffix}", in_bands(), MAP.shape, {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_zarr_array_is_kept(tmp_path):
    (tmp_path / "a.zarr").mkdir()
    with pytest.raises(OSError, match="is no Zarr array"):
        files.check_output(tmp_path / "a.zarr", files.BAND_SUFFIXES)
    (tmp_path / "a.zarr" / ".zarray").write_text("{}")
    assert files.check_output(tmp_path / "a.zarr", files.BAND_SUFFIXES) == tmp_path / "a.zarr"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.npy"
    path.write_text("old")

    def write_half():
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["out.npy"]


def test_a_whole_map_as_npy_and_no_other_suffix(tmp_path):
    features = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    files.write_features(tmp_path / "x.npy", features, {"image_size": [2, 3]})
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), features)
    with pytest.raises(ValueError, match=r"\.tif"):
        files.write_features(tmp_path / "x.tif", features, {"image_size": [2, 3]})
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]
