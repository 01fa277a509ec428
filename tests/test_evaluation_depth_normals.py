"""Probes for depth and normals on scenes in NYUv2's layout, whose geometry can be read from their colours."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io
import yaml
from PIL import Image

from anyup_core.settings import from_dict
from anyup_jax.encoders.settings import EncoderConfig
from evaluation import depth_normals, sheet
from evaluation.config import Config, DatasetConfig, ProbeConfig
from evaluation.data import nyu, open_nyu
from evaluation.fitting import ProbeFile
from evaluation.methods import Interpolation
from tests.training import environment

OPTIONS = (
    "encoders=lite0", "encoders.lite0.layer=[2]", "probe.class_token=false", "methods=[bilinear]",
    "dataset.root=.", "dataset.size=64", "probe.epochs=6", "probe.batch_size=2", "probe.learning_rate=0.01",
    "pictures=1",
)  # fmt: skip
WALLS = np.array([[0, 0, 1], [0.6, 0, 0.8], [0, -0.8, 0.6]], np.float32)


def scene(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three walls, each with its colour, depth and normal, and a strip of unknown depth."""
    random = np.random.default_rng(seed)
    which = np.zeros((480, 640), int)
    which[:, 200 + random.integers(0, 200) :] = 1
    which[240 + random.integers(0, 100) :] = 2
    image = np.array([[230, 40, 30], [40, 200, 60], [50, 60, 220]])[which] + random.integers(-9, 9, (480, 640, 3))
    depth = np.array([1.5, 4, 7.5], np.float32)[which]
    depth[:20] = 0
    return image.clip(0, 255).astype(np.uint8), depth, WALLS[which]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nyu")
    (folder / "nyuv2_geonet").mkdir()
    for number in range(6):
        image, depth, normals = scene(number)
        content = dict(img=image - 2 * np.array(nyu.MEAN) + 1e-3, depth=depth, norm=normals)
        scipy.io.savemat(folder / f"nyuv2_geonet/room_{number}.mat", content)
    images, depths, normals = (np.stack(planes) for planes in zip(*map(scene, (20, 21, 22))))
    content = dict(depths=depths, images=images.transpose(0, 3, 1, 2), snorms=normals.transpose(0, 3, 1, 2))
    (folder / "nyuv2").mkdir()
    (folder / "nyuv2/nyuv2_snorm_all.pkl").write_bytes(pickle.dumps(content | dict(test_indices=np.arange(2)), 4))
    return folder


def evaluate(folder: Path, task: str, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "evaluation.run", f"+experiment=nyu_{task}", *OPTIONS, *words]
    run = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert run.returncode == status, run.stdout[-1500:] + run.stderr[-3000:]
    return run


def test_depth(folder: Path) -> None:
    run = evaluate(folder, "depth", "output_dir=depth")
    actual = json.loads((folder / "depth/results.json").read_text())[0]
    names = [f"{kind}{name}" for kind in ("", "aligned_") for name in ("rmse", "d1", "d2", "d3")]
    assert list(actual["scores"]) == [*names, "seconds"]
    assert actual["scores"]["rmse"] < 2  # a constant is 2.4 metres off
    assert actual["scores"]["aligned_rmse"] <= actual["scores"]["rmse"]
    assert actual["scores"]["d1"] <= actual["scores"]["d2"] <= actual["scores"]["d3"]
    losses = [float(line.rsplit(" ", 1)[1]) for line in run.stdout.splitlines() if "loss" in line]
    assert losses[-1] < losses[0]
    assert np.load(folder / "depth/lite0/bilinear/predictions.npy").shape == (1, 64, 64)
    with Image.open(folder / "depth/lite0/sheet.png") as sheet:
        assert sheet.width > 2 * sheet.height
    again = evaluate(folder, "depth", "output_dir=depth", "pictures=2")
    assert "epoch" not in again.stdout  # scored again for the pictures, and not trained
    assert "RMSE" in again.stdout
    assert np.load(folder / "depth/lite0/bilinear/predictions.npy").shape == (2, 64, 64)


def test_presets_are_the_protocol(folder: Path) -> None:
    command = [sys.executable, "-m", "evaluation.run", "+experiment=nyu_normals", "dataset.root=.", "--cfg", "job"]
    run = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=True)
    config = from_dict(Config, yaml.safe_load(run.stdout))
    assert config.probe == ProbeConfig(
        class_token=True, augment=True, learning_rate=5e-4, weight_decay=0.01, schedule="warmup_cosine", epochs=10,
        batch_size=8, flip=False, warmup_epochs=1.5,
    )  # fmt: skip
    assert (config.task, config.dataset.kind, config.dataset.size) == ("normals", "nyu", (224, 224))
    (encoder,) = config.encoders.values()
    assert (encoder.name, encoder.norm) == ("vit_small_patch14_dinov2.lvd142m", False)


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        ("normals", ["dataset.size=60"], r"dataset\.size=\(60, 60\) .*\b8 pixels"),
        ("depth", ["probe.class_token=true"], "efficientnet_lite0 .*class_token"),
    ],
)
def test_what_is_impossible_is_one_sentence(folder: Path, task: str, words: list[str], message: str) -> None:
    run = evaluate(folder, task, *words, status=2)
    assert re.search(message, run.stderr)
    assert run.stderr.count("error:") == 1
    assert "Traceback" not in run.stderr


def test_scenes_of_unknown_depth_end_before_a_table(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "nyuv2_geonet").mkdir()
    shutil.copytree(folder / "nyuv2", tmp_path / "nyuv2")
    image, depth, normals = scene(0)
    content = dict(img=image - 2 * np.array(nyu.MEAN), depth=np.zeros_like(depth), norm=normals)
    scipy.io.savemat(tmp_path / "nyuv2_geonet/room_0.mat", content)
    run = evaluate(tmp_path, "depth", status=2)
    assert run.stdout == ""
    assert "dataset.train" in run.stderr
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "probe", "message"),
    [
        (dict(), dict(flip=True), r"probe\.flip=True .*depth"),
        (dict(dataset=dict(kind="folder", root=".")), {}, r"dataset\.kind='folder' .*nyu"),
        (dict(), dict(repeats=2), r"probe\.repeats=2 .*depth"),
        (dict(), dict(head="dpt"), r"encoders=.*\b2\b.*probe\.head=dpt .*\b4\b"),
        (dict(cache="kept"), {}, "cache='kept' .*depth"),
        (dict(task="segmentation"), {}, r"dataset\.kind='nyu' .*segmentation"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict, probe: dict, message: str) -> None:
    values = dict(
        task="depth",
        encoders=dict(lite0=dict(name="efficientnet_lite0", layer=[2, 2])),
        dataset=dict(kind="nyu", root="."),
        probe=dict(flip=False) | probe,
    )
    with pytest.raises(ValueError, match=message):
        from_dict(Config, values | changes)


class Encoder:
    """Mean colours of cells of 8 x 8 pixels and their squares, as two layers; the class token is their mean."""

    name, stride, channels, widths = "means", 8, 6, (3, 3)

    def normalize(self, image):
        return image

    def __call__(self, image):
        batch, height, width, _ = image.shape
        cells = image.reshape(batch, height // 8, 8, width // 8, 8, 3).mean((2, 4))
        features = jnp.concatenate([cells, cells**2], -1)
        return features, features.mean((1, 2))


def test_normals_are_learned(folder: Path, tmp_path: Path) -> None:
    config = Config(
        task="normals",
        encoders=dict(mine=EncoderConfig(name="efficientnet_lite0")),
        dataset=DatasetConfig(kind="nyu", root=str(folder), size=(64, 64)),
        probe=ProbeConfig(
            class_token=True, flip=False, augment=True, epochs=30, batch_size=2, learning_rate=0.02,
            schedule="warmup_cosine", warmup_epochs=3.0,
        ),
    )  # fmt: skip
    probe, head = depth_normals.Probe.create(Encoder(), Interpolation("bilinear", "bilinear"), config)
    head = depth_normals.train(probe, head, open_nyu(config.dataset, "train"), ProbeFile(tmp_path / "p", {}))
    actual, predictions = depth_normals.score(probe, head, open_nyu(config.dataset, "val"), shown=[1])
    assert actual["rmse"] < 25  # the walls are 37 to 61 degrees apart
    assert actual["22.5"] > 0.8
    assert predictions.shape == (1, 64, 64, 3)
    np.testing.assert_allclose(np.linalg.norm(predictions, axis=-1), 1, atol=1e-5)
    assert np.array_equal(sheet.paint_normals(WALLS[:, None])[:, 0], [[127, 127, 255], [204, 127, 229], [127, 25, 204]])
    assert (sheet.paint_normals(np.zeros((2, 2, 3), np.float32)) == 255).all()


@pytest.mark.parametrize("head", ["linear", "dpt"])
def test_every_layer_gets_its_own_class_token(folder: Path, head: str) -> None:
    config = Config(
        task="normals",
        encoders=dict(mine=EncoderConfig(name="efficientnet_lite0", layer=(1, 2, 3, 4))),
        dataset=DatasetConfig(kind="nyu", root=str(folder), size=(32, 32)),
        probe=ProbeConfig(head=head, class_token=True, flip=False),
    )
    encoder = Encoder()
    if head == "dpt":
        encoder.widths = (1, 2, 1, 2)
    probe, parameters = depth_normals.Probe.create(encoder, Interpolation("bilinear", "bilinear"), config)
    scenes = open_nyu(config.dataset, "val")
    batch = probe.read(scenes, [1, 0])
    raw = jax.jit(probe.raw)(parameters, batch)
    assert raw.shape == (2, 32, 32, 4)
    if head == "linear":
        dense = Interpolation("bilinear", "bilinear")(None, batch["features"], (32, 32))
        token = jnp.broadcast_to(batch["token"][:, None, None], dense.shape)
        joined = jnp.concatenate([dense[..., :3], token[..., :3], dense[..., 3:], token[..., 3:]], -1)
        kernel, bias = parameters["conv"]["kernel"], parameters["conv"]["bias"]
        expected = jax.lax.conv_general_dilated(
            joined, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        np.testing.assert_allclose(raw, expected + bias, atol=1e-5)
    else:
        changed = batch | dict(token=batch["token"] + 1)
        assert np.abs(jax.jit(probe.raw)(parameters, changed) - raw).max() > 1e-3
    gradient = jax.jit(jax.grad(probe.loss))(parameters, batch)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_a_part_of_a_scene_is_cut_from_all_of_it(folder: Path) -> None:
    scenes = open_nyu(DatasetConfig(kind="nyu", root=str(folder), size=(100, 100)), "val")
    whole = open_nyu(DatasetConfig(kind="nyu", root=str(folder), size=(480, 480)), "val").read(0)
    part = scenes.read(0, (30, 50, 400))
    rows, cols = 30 + 4 * np.arange(100) + 2, 50 + 4 * np.arange(100) + 2
    assert np.array_equal(part.depth, whole.depth[rows[:, None], cols])
    assert np.array_equal(part.normals, whole.normals[rows[:, None], cols])
    assert np.abs(part.image.astype(int) - whole.image[rows[:, None], cols]).mean() < 12


def test_parts_and_colours_are_drawn_as_often_as_they_should() -> None:
    rng = np.random.default_rng(0)
    parts = [nyu.draw_part(rng) for _ in range(1000)]
    drawn = np.array([part for part in parts if part is not None])
    assert 430 < len(drawn) < 570
    top, left, side = drawn.T
    assert 0.49 < (side / 480).min() ** 2 < 0.52
    assert (side / 480).max() ** 2 > 0.98
    assert min(top.min(), left.min()) == 0
    assert max((top + side).max(), (left + side).max()) <= 480
    image = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    same = sum(np.array_equal(nyu.jitter(image, rng), image) for _ in range(300))
    assert 35 < same < 90
    grey = np.full((4, 4, 3), 120, np.uint8)
    levels = np.array([nyu.jitter(grey, rng)[0, 0] for _ in range(200)])
    assert (np.ptp(levels, axis=1) <= 2).all()  # neither hue nor saturation has an effect on grey
    assert levels.min() < 105
    assert levels.max() > 135
