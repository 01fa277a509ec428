"""Reading images of every kind, writing features whole or not at all."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from anyup_jax import files

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
GRAY = PIXELS[..., 0]


def saved(tmp_path, image: Image.Image, name: str = "image.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


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


def test_output_paths_are_checked(tmp_path):
    assert files.check_output(tmp_path / "a.npy", files.ARRAY_SUFFIXES) == tmp_path / "a.npy"
    with pytest.raises(ValueError, match=r"suffix '\.txt'; the output can be \.npy, \.npz, \.safetensors"):
        files.check_output(tmp_path / "a.txt", files.ARRAY_SUFFIXES)
    with pytest.raises(OSError, match="does not exist; create it first"):
        files.check_output(tmp_path / "absent" / "a.npy", files.ARRAY_SUFFIXES)
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(OSError, match="is a folder"):
        files.check_output(tmp_path / "folder.npy", files.ARRAY_SUFFIXES)


def test_a_folder_without_write_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    with pytest.raises(OSError, match="not writable"):
        files.check_output(tmp_path / "a.npy", files.ARRAY_SUFFIXES)


@pytest.mark.parametrize("suffix", files.ARRAY_SUFFIXES)
def test_features_are_written(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    features = np.arange(24, dtype=np.float64).reshape(2, 3, 4).transpose(1, 0, 2)  # neither float32 nor contiguous
    metadata = {"image": "cat.jpg", "image_size": [20, 30]}
    files.write_features(path, features, metadata)
    if suffix == ".npy":
        written = np.load(path)
    elif suffix == ".npz":
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
