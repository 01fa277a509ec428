"""Held-out photographs, and the picture of features drawn from them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from anyup_core import figure
from anyup_jax import AnyUp, AnyUpConfig, encoders
from train import pictures
from train.config import Config, DatasetConfig, EncoderConfig, LogConfig

ENCODERS = {"lite0": EncoderConfig(name="efficientnet_lite0")}


def settings(crop_size: tuple[int, int] = (64, 96), log: LogConfig | None = None, **dataset) -> Config:
    views = DatasetConfig(crop_size=crop_size, **dict(img_size=(32, 48)) | dataset)
    return Config(encoders=ENCODERS, dataset=views, log=log or LogConfig())


def folder(root: Path, *names: str, size: tuple[int, int] = (100, 80)) -> str:
    """Write photographs whose colour is their number."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((*size, 3), number, np.uint8)).save(path)
    return str(root)


@pytest.mark.parametrize("dataset", [{}, {"kind": "tfds", "name": "imagenet2012"}])
def test_photographs_that_scikit_image_ships(dataset):
    photographs = pictures.held_out(settings(**dataset))
    assert [name for name, _ in photographs] == ["chelsea.png", "coffee.png"]
    assert all(crop.shape == (64, 96, 3) and crop.dtype == np.uint8 and crop.std() > 10 for _, crop in photographs)


def test_a_folder_of_ones_own(tmp_path):
    root = folder(tmp_path, "a/1.png", "a/3.png", "b/1.png", "b/2.png")
    Path(root, "a/2.jpg").write_bytes(b"no image")
    Path(root, "notes.txt").write_text("no image either")
    log = LogConfig(pictures=3, pictures_root=root)
    photographs = pictures.held_out(settings(log=log, kind="folder", root="elsewhere"))
    assert [(name, crop[0, 0, 0]) for name, crop in photographs] == [("a/1.png", 0), ("a/3.png", 1), ("b/1.png", 2)]


def test_loops_of_links_and_pipes_are_left_out(tmp_path):
    root = folder(tmp_path, "a/1.png", "b/2.png")
    Path(root, "a/loop").symlink_to(root)
    Path(root, "b/loop").symlink_to(".")
    os.mkfifo(Path(root, "a/0.png"))
    photographs = pictures.held_out(settings(log=LogConfig(pictures=9, pictures_root=root)))
    assert [name for name, _ in photographs] == ["a/1.png", "b/2.png"]


def test_hidden_photographs_are_not_drawn(tmp_path):
    root = folder(tmp_path, "a/1.png", "__MACOSX/a/1.png", "a/._1.png", "a/.ipynb_checkpoints/1.png", ".git/1.png")
    Path(root, "a/1.png").rename(Path(root, "a/1.PNG"))
    photographs = pictures.held_out(settings(log=LogConfig(pictures=9, pictures_root=root)))
    assert [name for name, _ in photographs] == ["a/1.PNG"]


def test_the_folder_val_beside_the_data_set(tmp_path):
    root = folder(tmp_path / "train", "a/1.png", "a/2.png", "b/3.png")
    photographs = pictures.held_out(settings(kind="folder", root=root))
    assert [name for name, _ in photographs] == ["b/3.png (trained on)", "a/2.png (trained on)"]
    folder(tmp_path / "val", "a/9.png")
    assert [name for name, _ in pictures.held_out(settings(kind="folder", root=root))] == ["a/9.png"]


def test_small_photographs_are_enlarged(tmp_path):
    root = folder(tmp_path, "a/1.png")
    ((_, crop),) = pictures.held_out(settings((500, 300), LogConfig(pictures_root=root)))
    assert crop.shape == (500, 300, 3)


def test_errors_name_the_setting(tmp_path):
    with pytest.raises(ValueError, match=r"log\.pictures_root=.*none"):
        pictures.held_out(settings(log=LogConfig(pictures_root=str(tmp_path / "none"))))
    with pytest.raises(ValueError, match=r"dataset\.root=.*none"):
        pictures.held_out(settings(kind="folder", root=str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"log\.pictures_root"):
        pictures.held_out(settings(log=LogConfig(pictures_root=str(tmp_path))))


def test_without_scikit_image(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ImportError, match=r"anyup-jax\[viz\]"):
        pictures.held_out(settings())


def test_a_picture(tmp_path, monkeypatch):
    config = settings((64, 96))
    encoder = encoders.create("efficientnet_lite0", layer=2)
    model = AnyUp(AnyUpConfig(qk_dim=16), rngs=nnx.Rngs(0))
    drawn, draw_panels = [], figure.draw_panels

    def spy(path, panels, **options):
        drawn.append((panels, options))
        draw_panels(path, panels, **options)

    monkeypatch.setattr(figure, "draw_panels", spy)
    path = tmp_path / "pictures" / "step_00000007.png"
    photographs = pictures.held_out(config)
    picture = pictures.draw(path, model, encoder, photographs, config.dataset, step=7)
    np.testing.assert_array_equal(picture, np.asarray(Image.open(path).convert("RGB")))
    (panels, options), = drawn  # fmt: skip
    assert options["columns"] == 5
    assert options["title"] == "Step 7"
    assert encoder.name in options["subtitle"]
    titles = [title for title, _ in panels]
    assert titles[:5] == ["chelsea.png\n64 x 96", "low-res\n4 x 6 x 40", "bilinear\n8 x 12 x 40", "AnyUp\n8 x 12 x 40",
                          "target\n8 x 12 x 40"]  # fmt: skip
    assert titles[5] == "coffee.png\n64 x 96"
    assert [panel.shape[:2] for _, panel in panels] == [(64, 96), (4, 6), (8, 12), (8, 12), (8, 12)] * 2
    np.testing.assert_array_equal(panels[0][1], photographs[0][1])


def test_the_target_is_the_encoder_on_the_whole_photograph():
    encoder = encoders.create("efficientnet_lite0", layer=2)
    model = AnyUp(AnyUpConfig(qk_dim=16), rngs=nnx.Rngs(0))
    config = settings((64, 96), img_size=(64, 96))
    (_, crop), *_ = pictures.held_out(config)
    low, upsampled, target = pictures._features(model, encoder, crop, config.dataset)
    np.testing.assert_array_equal(low, target)  # the view is the whole
    np.testing.assert_allclose(target, encoder.encode_array(crop / np.float32(255)), atol=1e-6)
    assert upsampled.shape == target.shape
    assert upsampled.dtype == np.float32
    assert upsampled.min() >= low.min() - 1e-4  # weighted means of the features
