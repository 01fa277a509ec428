"""NYUv2 in Probe3D's two layouts: scenes cleaned, cropped and resized; pickles are read without running them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from evaluation.config import DatasetConfig
from evaluation.data import nyu, open_nyu
from evaluation.data.cropping import crop_image
from evaluation.data.pickled_arrays import read_arrays


def config(root: Path, **settings: Any) -> DatasetConfig:
    return DatasetConfig(kind="nyu", root=str(root), **settings)


def geometry(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image (480, 640, 3), depth in metres and normals of lengths other than 1, with a few unknown pixels."""
    source = np.random.default_rng(seed)
    depth = source.random((480, 640), np.float32) * 9 + 0.5
    normals = source.random((480, 640, 3), np.float32) + 0.1
    depth[:4], depth[4:8], depth[8:12] = 0, 12, np.nan
    normals[12:16], normals[16:20] = 0, np.nan
    return source.integers(0, 256, (480, 640, 3), np.uint8), depth, normals


def check_scene(scene: nyu.Scene, image: np.ndarray, depth: np.ndarray, normals: np.ndarray) -> None:
    """Full size: the centre square, cleaned."""
    assert [plane.dtype for plane in scene] == [np.uint8, np.float32, np.float32]
    assert np.array_equal(scene.image, image[:, 80:-80])
    assert not scene.depth[:12].any()
    assert np.array_equal(scene.depth[12:], depth[12:, 80:-80])
    assert not scene.normals[:20].any()
    normals = normals[20:, 80:-80]
    unit = normals / np.linalg.norm(normals, axis=-1, keepdims=True)
    np.testing.assert_allclose(scene.normals[20:], unit, atol=1e-6)


def test_nyu_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "nyuv2_geonet"
    folder.mkdir()
    image, depth, normals = geometry(0)
    stored = image.astype(np.float64) - 2 * np.array([122.175, 116.169, 103.508]) + 1e-3  # so that 8 bits come back
    scipy.io.savemat(folder / "kitchen_0001_r-1.mat", dict(img=stored, depth=depth, norm=normals))
    scenes = open_nyu(config(tmp_path, size=(480, 480)), "train")
    assert (len(scenes), scenes.name(0)) == (1, "kitchen_0001_r-1.mat")
    check_scene(scenes.read(0), image, depth, normals)

    small = open_nyu(config(tmp_path, size=(224, 224)), "train").read(0)
    assert np.array_equal(small.image, crop_image(Image.fromarray(image[:, 80:-80]), (224, 224)))
    square = torch.from_numpy(np.ascontiguousarray(depth[:, 80:-80]))[None, None]
    nearest = torch.nn.functional.interpolate(square, (224, 224), mode="nearest-exact")[0, 0].numpy()
    assert np.array_equal(small.depth, np.where(nearest <= 10, nearest, 0))
    lengths = np.linalg.norm(small.normals, axis=-1)
    assert set(np.round(lengths, 6).ravel()) == {0, 1}

    for number in range(1, 43):
        (folder / f"kitchen_{number:04}.mat").touch()
    (folder / nyu.BAD[6919]).touch()
    (folder / "._kitchen_0001.mat").touch()  # hidden, and not counted
    splits = {split: open_nyu(config(tmp_path, train=split), "train") for split in ("trainval", "train", "valid")}
    counts = {split: len(scenes) for split, scenes in splits.items()}
    assert counts == {"trainval": 43, "train": 40, "valid": 3}
    assert [splits["valid"].name(index) for index in (0, 1)] == ["kitchen_0001.mat", "kitchen_0020.mat"]
    with pytest.raises(OSError, match=r"kitchen_0001\.mat"):
        splits["valid"].read(0)
    assert splits["valid"].contents != splits["train"].contents
    monkeypatch.setattr(nyu, "COMPLETE", 44)
    monkeypatch.setattr(nyu, "BAD", {0: "", 2: ""})
    left = open_nyu(config(tmp_path), "train")
    assert [left.name(index) for index in (0, 1)] == ["kitchen_0001.mat", "kitchen_0002.mat"]  # without ..._0001_r-1

    scipy.io.savemat(folder / "kitchen_0001.mat", dict(img=stored[:10], depth=depth, norm=normals))
    with pytest.raises(ValueError, match=r"kitchen_0001\.mat .*\(10, 640, 3\)"):
        splits["valid"].read(0)
    scipy.io.savemat(folder / "kitchen_0001.mat", dict(img=stored))
    with pytest.raises(ValueError, match=r"kitchen_0001\.mat .*depth, norm"):
        splits["valid"].read(0)
    with pytest.raises(ValueError, match=r"dataset\.train=all .*trainval, train, valid, test"):
        open_nyu(config(tmp_path, train="all"), "train")


def test_nyu_test(tmp_path: Path) -> None:
    made = [geometry(seed) for seed in (1, 2)]
    images, depths, normals = map(np.stack, zip(*made))
    path = tmp_path / "nyuv2" / "nyuv2_snorm_all.pkl"
    path.parent.mkdir()
    content = dict(
        depths=depths.transpose(1, 2, 0).copy().transpose(2, 0, 1),  # as MATLAB's arrays are: in another order
        images=images.transpose(0, 3, 1, 2),
        snorms=normals.transpose(0, 3, 1, 2),
        scene_types=[["kitchen"], ["office"]],
        train_indices=np.array([0]),
        test_indices=np.array([1]),
    )
    path.write_bytes(pickle.dumps(content, 4))
    scenes = open_nyu(config(tmp_path, size=(480, 480)), "val")
    assert (len(scenes), scenes.name(0)) == (1, "nyuv2_snorm_all.pkl#1")
    check_scene(scenes.read(0), *made[1])
    for change, message in (
        (dict(test_indices=np.array([2])), r"test_indices .*\b2 images"),
        (dict(snorms=content["snorms"][:1]), r"snorms .*\(1, 3, 480, 640\)"),
        (dict(images=content["images"][..., :20]), r"\(480, 20, 3\)"),
        (dict(images=content["images"].astype(np.int16)), "images .*int16"),
    ):
        path.write_bytes(pickle.dumps(content | change, 4))
        with pytest.raises(ValueError, match=message):
            open_nyu(config(tmp_path), "val")


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_pickled_arrays(protocol: int, tmp_path: Path) -> None:
    kept = dict(
        plain=np.arange(12.0).reshape(3, 4),
        turned=np.arange(12, dtype=np.float32).reshape(3, 4).T,
        mixed=np.arange(9000, dtype=np.uint8).reshape(2, 50, 30, 3).transpose(3, 2, 0, 1),
        swapped=np.arange(5000, dtype=">i2"),
    )
    other = dict(objects=np.array([["a"], ["b"]], object), scalar=np.float32(2), words=[["kitchen"]])
    path = tmp_path / "arrays.pkl"
    path.write_bytes(pickle.dumps(kept | other, protocol))
    actual = read_arrays(path, tuple(kept))
    for name, array in kept.items():
        assert np.array_equal(actual[name], array)
    for name in other:
        with pytest.raises(ValueError, match=rf"arrays\.pkl .*\b{name}\b"):
            read_arrays(path, [name])
    with pytest.raises(ValueError, match="nothing, missing"):
        read_arrays(path, ["plain", "nothing", "missing"])


class Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 3",)


def test_pickles_run_nothing(tmp_path: Path) -> None:
    path = tmp_path / "arrays.pkl"
    whole = pickle.dumps(dict(a=np.arange(5000)), 4)
    for content, message in (
        (pickle.dumps(dict(a=Command()), 4), "system"),
        (pickle.dumps([1], 4), "list"),
        (whole[:3000], r"arrays\.pkl"),
        (b"no pickle at all", r"arrays\.pkl"),
        (b"", r"arrays\.pkl"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_arrays(path, ["a"])
