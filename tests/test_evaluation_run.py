"""`python -m evaluation.run` as a user types it, and the probe by itself."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file

import anyup_jax
import convert
from anyup_core.checkpoints import formats
from anyup_core.settings import from_dict
from anyup_jax import upsamplers
from anyup_jax.encoders.settings import EncoderConfig
from evaluation import fidelity, fitting, results, segmentation, sheet, tasks
from evaluation.config import Config, DatasetConfig, ProbeConfig
from evaluation.data import Examples, open_segmentation
from evaluation.data.split import Files
from evaluation.fitting import ProbeFile, prefetch
from evaluation.frozen import Live, keep, read_view
from evaluation.methods import Interpolation, JointBilateral
from evaluation.published import figures
from evaluation.results import Result
from tests.training import environment

OPTIONS = (
    "encoders.lite0.layer=[2]", "dataset.root=data", "dataset.size=64", "dataset.classes=3", "probe.epochs=3",
    "probe.learning_rate=0.02", "anyup.weights=weights.safetensors",
)  # fmt: skip
OFFICIAL = "vit_small_patch14_dinov2.lvd142m"
COLOURS = np.array([[40, 90, 60], [220, 60, 40], [60, 80, 230]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of coloured rectangles, the colour being the class, and a small AnyUp."""
    folder, random = tmp_path_factory.mktemp("evaluate"), np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for kind in ("images", "labels"):
            (folder / "data" / split / kind).mkdir(parents=True)
        for number in range(count):
            label = np.zeros((64, 64), np.uint8)
            for which in (1, 2):
                top, left = random.integers(0, 40, 2)
                label[top : top + 24, left : left + 24] = which
            image = np.array([[40, 90, 60], [220, 60, 40], [60, 80, 230]])[label] + random.integers(
                -20, 20, (64, 64, 3)
            )
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"data/{split}/images/{number}.png")
            Image.fromarray(label).save(folder / f"data/{split}/labels/{number}.png")
    net = anyup_jax.AnyUp(anyup_jax.AnyUpConfig(qk_dim=16, num_heads=2), rngs=nnx.Rngs(0))
    arrays = {".".join(map(str, path)): np.asarray(x[...]) for path, x in nnx.to_flat_state(nnx.state(net))}
    convert.write(folder / "weights.safetensors", convert.Checkpoint.from_flax(arrays, dict(qk_dim=16, num_heads=2)))
    return folder


def evaluate(folder: Path, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "evaluation.run", *OPTIONS, *words]
    run = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert run.returncode == status, run.stdout[-1500:] + run.stderr[-3000:]
    return run


def scores(folder: Path) -> dict[str, dict[str, float]]:
    return {row["method"]: row["scores"] for row in json.loads((folder / "results.json").read_text())}


def test_what_is_kept_scores_as_what_is_computed_anew(folder: Path) -> None:
    methods = "methods=[bilinear,anyup,label_guided]"
    evaluate(folder, "output_dir=live", methods)
    run = evaluate(folder, "output_dir=kept", "cache=cache", methods)
    assert "anyup: 12 of 12 views of lite0 computed" in run.stdout
    live, kept = scores(folder / "live"), scores(folder / "kept")
    assert live.keys() == kept.keys() == {"bilinear", "anyup", "label_guided"}
    for method, values in live.items():
        for name in ("mIoU", "band_mIoU", "accuracy"):
            assert kept[method][name] == pytest.approx(values[name], abs=0.01), (method, name)
    assert live["bilinear"]["mIoU"] > 0.3  # the colours are learned
    for name in ("mIoU", "band_mIoU"):  # who knows the edges is best at them
        assert live["label_guided"][name] > max(live[method][name] for method in ("bilinear", "anyup"))
    assert {"mIoU_bilinear_probe", "band_bilinear_probe"} <= set(live["anyup"])
    rows = list(csv.DictReader((folder / "live/results.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == ["bilinear", "anyup", "label_guided"]
    assert (folder / "live/results.md").read_text().startswith("| encoder | stride | method | mIoU |")
    rows = list(csv.DictReader((folder / "live/classes.csv").read_text().splitlines()))
    assert [(row["method"], row["class"]) for row in rows[:4]] == [
        ("bilinear", "class 0"), ("bilinear", "class 1"), ("bilinear", "class 2"), ("anyup", "class 0"),
    ]  # fmt: skip
    assert np.mean([float(row["IoU"]) for row in rows[:3]]) == pytest.approx(live["bilinear"]["mIoU"], abs=1e-4)
    shown = [np.load(folder / output / "lite0/anyup/predictions.npy") for output in ("live", "kept")]
    assert shown[0].shape == (3, 64, 64)
    assert np.mean(shown[0] == shown[1]) > 0.98  # the tiles are put back in their places
    with Image.open(folder / "live/lite0/sheet.png") as picture:
        assert abs(picture.width / picture.height - 4 / 3) < 0.3
    again = evaluate(folder, "output_dir=live", methods)
    assert "epoch" not in again.stdout  # nothing is left to do
    assert "lite0" in again.stdout
    other = evaluate(folder, "output_dir=live", "probe.epochs=4", status=2)
    assert re.search(r"result\.json .*probe\.epochs: 3 -> 4", other.stderr)
    details = json.loads((folder / "live/lite0/anyup/result.json").read_text(), parse_constant=pytest.fail)["details"]
    assert len(details["iou"]) == len(details["class_names"]) == 3


def test_other_upsamplers_have_weights_for_each_encoder(folder: Path) -> None:
    settings = {"jafar": dict(channels=40, qk_dim=16), "naf": dict(dim=32, kernel_size=3, rope_heads=2)}
    for name, fields in settings.items():
        model = getattr(upsamplers, name.upper())(rngs=nnx.Rngs(0), **fields)
        formats.write(folder / f"{name}.safetensors", upsamplers.checkpoint(model), overwrite=True)
    methods = "methods=[bilinear,jafar,naf]", "probe.epochs=1", "output_dir=others"
    weights = "+upsamplers.jafar.weights.lite0=jafar.safetensors", "+upsamplers.naf.weights.all=naf.safetensors"
    run = evaluate(folder, *methods, *weights, "cache=kept_others", "probe.pixel_stride=2")
    assert "jafar: 12 of 12 views of lite0 computed" in run.stdout  # of the validation split nothing is kept
    assert "jafar: 3 of 3 views" not in run.stdout
    actual = scores(folder / "others")
    evaluate(folder, *methods[:2], *weights, "output_dir=others_live", "probe.pixel_stride=2")
    for method, values in scores(folder / "others_live").items():
        for name in ("mIoU", "band_mIoU", "accuracy"):
            assert actual[method][name] == pytest.approx(values[name], abs=0.01), (method, name)
    assert actual.keys() == {"bilinear", "jafar", "naf"}
    assert "mIoU_bilinear_probe" in actual["naf"]
    refused = evaluate(folder, *methods, weights[0], status=2)
    assert "upsamplers.naf.weights" in refused.stderr
    refused = evaluate(folder, *methods, *weights, "encoders.lite0.layer=[-1]", "output_dir=wide", status=2)
    assert all(text in refused.stderr for text in ("jafar", "40", "320", "lite0"))


def test_repeated_probes_are_those_of_their_seeds(folder: Path, tmp_path: Path) -> None:
    evaluate(folder, "output_dir=repeated", "probe.repeats=2", "methods=[bilinear]")
    path = folder / "repeated/lite0/bilinear"
    actual, state = json.loads((path / "result.json").read_text()), load_file(path / "probe.safetensors")
    both = {name: jnp.asarray(state[f"['head']['{name}']"]) for name in ("weight", "bias")}

    data, settings = DatasetConfig(root=str(folder / "data"), classes=3, size=(64, 64)), actual["settings"]
    train, val = (open_segmentation(data, part, mirrored=part == "train") for part in ("train", "val"))
    chosen = from_dict(EncoderConfig, settings["encoder"])
    encoder = chosen.load()
    views = [Live(split, encoder, Interpolation("bilinear", "bilinear")) for split in (train, val)]
    alone = []
    for number in range(2):
        head = {name: value[number : number + 1] for name, value in both.items()}
        alone.append(segmentation.score(views[1], val, dict(one=head))[0]["one"])
    for name in ("mIoU", "band_mIoU"):
        values = [scores.means[name] for scores in alone]
        assert actual["scores"][name] == pytest.approx(np.mean(values), abs=1e-6)
        assert actual["scores"][f"{name}_std"] == pytest.approx(abs(values[0] - values[1]) / 2, abs=1e-6)
        assert [scores.deviations[name] for scores in alone] == [0, 0]
    assert np.mean([scores.classes["iou"] for scores in alone], 0) == pytest.approx(np.array(actual["details"]["iou"]))

    probe = ProbeConfig(**(settings["probe"] | dict(repeats=1)))
    config = Config(encoders=dict(lite0=chosen), dataset=data, probe=probe)
    lines: list[str] = []
    file = ProbeFile(tmp_path / "probe.safetensors", {}, lines.append)
    single = segmentation.train(views[0], train, encoder.channels, config, file)
    assert [line.partition(",")[0] for line in lines] == ["epoch 1", "epoch 2", "epoch 3"]
    for name, value in both.items():
        assert np.abs(value[0] - single[name][0]).max() < 1e-4 < np.abs(value[1] - value[0]).max()


def test_published_figures_stand_beside_the_same_data_and_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    dataset = DatasetConfig(kind="voc", root="VOC")
    encoders = dict(mine=EncoderConfig(name=OFFICIAL), other=EncoderConfig(name="resnet50"))
    config = Config(encoders=encoders, dataset=dataset)
    actual = [Result(key, "bilinear", 14, dict(mIoU=0.8, accuracy=0.9, seconds=3.0), {}, {}) for key in encoders]
    results.show(actual, config)
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert [row[2] for row in rows] == [
        "bilinear", *["bilinear", "FeatUp", "LoftUp", "JAFAR", "AnyUp"] * 2, "bilinear",
    ]  # fmt: skip
    assert rows[5] == ["(AnyUp, tab. 2)", "", "AnyUp", "0.8400", "0.9619", "-"]
    for change in (dict(size=(224, 224)), dict(kind="folder")):
        other = dataclasses.replace(config, dataset=dataclasses.replace(dataset, **change))
        assert not figures(other, config.encoders["mine"])
    nyu = DatasetConfig(kind="nyu", root="NYU", size=(224, 224))
    options = dict(encoders=encoders, dataset=nyu, probe=ProbeConfig(flip=False))
    raw = dataclasses.replace(encoders["mine"], norm=False)
    published = {task: figures(Config(task=task, **options), raw) for task in ("depth", "normals")}
    assert not figures(Config(task="depth", **options), encoders["mine"])
    assert not figures(dataclasses.replace(config, limit=5), encoders["mine"])
    assert published["depth"][4].scores == dict(rmse=0.4755, d1=0.8216, aligned_rmse=0.3378, aligned_d1=0.9233)
    assert published["normals"][0].scores == {"rmse": 32.7, "11.25": 0.26, "22.5": 0.53, "30": 0.66}


def test_images_shown_are_spread_evenly() -> None:
    assert sheet.shown(80, 4) == (10, 30, 50, 70)
    assert sheet.shown(3, 6) == (0, 1, 2)
    assert sheet.shown(5, 0) == ()
    paint = sheet.paint_classes(255)
    picture = paint(np.array([[0, 1, 2, 255]], np.uint8))[0]
    assert picture[[0, 3]].tolist() == [[0, 0, 0], [255, 255, 255]]
    assert len({tuple(colour) for colour in picture.tolist()}) == 4


def test_fidelity(folder: Path) -> None:
    evaluate(folder, "task=fidelity", "output_dir=fidelity", "methods=[nearest,bilinear,anyup]", "limit=2")
    actual = scores(folder / "fidelity")
    assert actual.keys() == {"nearest", "bilinear", "anyup"}
    assert actual["nearest"]["cosine_down"] == pytest.approx(1, abs=1e-5)  # averages of what was copied
    assert actual["bilinear"]["cosine_high"] > actual["nearest"]["cosine_high"]


class Means:
    """An encoder whose features are the mean colours of cells of 4 x 4 pixels, less a constant."""

    name, stride, channels, widths = "means", 4, 3, (3,)

    def normalize(self, image):
        return image

    def __call__(self, image):
        batch, height, width, _ = image.shape
        return image.reshape(batch, height // 4, 4, width // 4, 4, 3).mean((2, 4)) - 0.3


def test_fidelity_by_its_definition() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3)).astype(np.uint8)
    actual = fidelity.scores(Means(), Interpolation("nearest", "nearest"), [image], 2)
    large = jax.image.resize(jnp.asarray(image[None], jnp.float32) / 255, (1, 32, 48, 3), "bilinear")
    high, low = np.asarray(Means()(large))[0], np.asarray(Means()(jnp.asarray(image[None], jnp.float32) / 255))[0]
    copied = low.repeat(2, 0).repeat(2, 1)
    cosine = (copied * high).sum(-1) / np.linalg.norm(copied, axis=-1) / np.linalg.norm(high, axis=-1)
    assert actual["cosine_high"] == pytest.approx(cosine.mean(), abs=1e-5)
    assert actual["cosine_down"] == pytest.approx(1, abs=1e-5)


def test_a_probe_goes_on_where_it_was_and_not_with_other_settings(tmp_path: Path) -> None:
    state, path = dict(head=dict(weight=jnp.ones((2, 3)), bias=jnp.zeros(3))), tmp_path / "probe.safetensors"
    file = ProbeFile(path, dict(x=1))
    assert file.restore(state) == (0, state)
    file.save(5, dict(head=dict(weight=jnp.full((2, 3), 7.0), bias=jnp.ones(3))))
    epoch, restored = file.restore(state)
    assert (epoch, float(restored["head"]["weight"][1, 2]), float(restored["head"]["bias"][0])) == (5, 7, 1)
    assert float(file.load(state["head"], 5)["bias"][2]) == 1
    with pytest.raises(FileNotFoundError, match=r"probe\.safetensors .* 6 epochs"):
        file.load(state["head"], 6)
    with pytest.raises(ValueError, match=r"probe\.safetensors .* other settings"):
        ProbeFile(path, dict(x=2)).restore(state)
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"probe\.safetensors is .* damaged"):
        file.restore(state)


def test_prefetch_keeps_the_order_and_stops() -> None:
    done = []

    def work(number: int) -> int:
        done.append(number)
        return 10 // (3 - number)

    iterator = prefetch(work, range(100))
    assert [next(iterator) for _ in range(3)] == [3, 5, 10]
    with pytest.raises(ZeroDivisionError):
        next(iterator)
    assert max(done) <= 4
    assert list(prefetch(work, [])) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["methods=[bilinear,magic]"], r"methods=\['bilinear', 'magic'\] .*joint_bilateral"),
        (["dataset.root=nowhere"], r"dataset\.root=nowhere "),
        (["dataset.size=60"], r"dataset\.size=\(60, 60\) .*\b8 pixels\b.*\blite0\b"),
    ],
)
def test_what_is_impossible_is_one_sentence(folder: Path, words: list[str], message: str) -> None:
    run = evaluate(folder, *words, status=2)
    assert re.search(message, run.stderr)
    assert run.stderr.count("error:") == 1
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("split", ["train", "val"])
def test_labels_that_are_all_ignored_end_before_a_table(folder: Path, tmp_path: Path, split: str) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "data" / split / "labels").iterdir():
        Image.fromarray(np.full((64, 64), 255, np.uint8)).save(path)
    run = evaluate(tmp_path, "output_dir=nothing", status=2)
    assert run.stdout == ""
    assert f"dataset.{split}" in run.stderr
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "nothing/results.json").exists()


def test_a_single_pixel_is_a_target(tmp_path: Path) -> None:
    for part, values in (("images", np.zeros((4, 4, 3), np.uint8)), ("labels", np.full((4, 4), 255, np.uint8))):
        (tmp_path / "val" / part).mkdir(parents=True)
        for name in "ab":
            Image.fromarray(values).save(tmp_path / "val" / part / f"{name}.png")
    data = DatasetConfig(root=str(tmp_path), size=(4, 4), classes=2)
    with pytest.raises(ValueError, match=r"None of the 2 images .*dataset\.val"):
        tasks.check_targets(dict(val=open_segmentation(data, "val")), Examples.targets)
    values[1, 2] = 1
    Image.fromarray(values).save(tmp_path / "val/labels/b.png")
    tasks.check_targets(dict(val=open_segmentation(data, "val", mirrored=True)), Examples.targets)
    with pytest.raises(ValueError, match="None of the 1 images"):
        tasks.check_targets(dict(val=open_segmentation(data, "val", limit=1)), Examples.targets)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(task="fidelity", methods=["label_guided"]), "methods=.*label_guided.*fidelity"),
        (dict(task="height"), "task='height' .*segmentation, depth, normals, fidelity"),
        (dict(dataset=dict(root="data", classes=300)), r"dataset\.classes=300 .*256"),
        (dict(dataset=dict(root="data", size=10**20)), r"dataset\.size="),
        (dict(probe=dict(batch_size=10**30)), r"probe\.batch_size="),
        (dict(probe=dict(repeats=2 * 10**9)), r"probe\.repeats="),
    ],
)
def test_impossible_configurations_are_refused(changes: dict, message: str) -> None:
    values = dict(encoders=dict(lite0=dict(name="efficientnet_lite0")), dataset=dict(root="data"))
    with pytest.raises(ValueError, match=message):
        from_dict(Config, values | changes)


def settings_of(folder: Path, output: Path, **changes) -> Config:
    return Config(
        encoders=dict(lite0=EncoderConfig(name="efficientnet_lite0", layer=(2,))),
        methods=("bilinear", "nearest"),
        dataset=DatasetConfig(root=str(folder / "data"), classes=3, size=(64, 64)),
        probe=ProbeConfig(epochs=1),
        pictures=0,
        limit=2,
        output_dir=str(output),
        **changes,
    )


def test_results_depend_on_the_contents_of_the_data_and_not_on_their_place(folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    first = tasks.run(settings_of(folder, tmp_path / "out"), lines.append)
    assert first[0].settings["contents"]["encoder"] == tasks.digest(
        EncoderConfig(name="efficientnet_lite0", layer=(2,)).load()
    )
    shutil.copytree(folder / "data", tmp_path / "data")
    moved, lines = settings_of(tmp_path, tmp_path / "out"), []
    assert [result.scores for result in tasks.run(moved, lines.append)] == [result.scores for result in first]
    assert lines == []
    probe = tmp_path / "out/lite0/bilinear/probe.safetensors"
    trained = probe.read_bytes()
    (tmp_path / "out/lite0/nearest/result.json").unlink()
    probe.unlink()
    with pytest.raises(FileNotFoundError, match=r"bilinear/probe\.safetensors"):
        tasks.run(moved, lines.append)
    probe.write_bytes(trained)
    again = tasks.run(moved, lines.append)
    assert again[1].scores["mIoU_bilinear_probe"] == first[1].scores["mIoU_bilinear_probe"]

    (tmp_path / "out/lite0/nearest/result.json").write_text("junk")
    with pytest.raises(ValueError, match=r"nearest/result\.json"):
        tasks.run(moved)
    Image.fromarray(np.ones((64, 64), np.uint8)).save(tmp_path / "data/val/labels/0.png")
    with pytest.raises(ValueError, match=r"contents\.val"):
        tasks.run(moved)


def test_a_digest_of_weights() -> None:
    digests = {tasks.digest(nnx.Linear(2, 3, rngs=nnx.Rngs(seed))) for seed in (0, 0, 1)}
    assert len(digests) == 2


def test_kept_views_are_whole_or_computed_again(folder: Path, tmp_path: Path) -> None:
    data = DatasetConfig(root=str(folder / "data"), classes=3, size=(32, 32))
    split, method, lines = open_segmentation(data, "val"), JointBilateral(), []
    (kept,) = keep(split, dict(a=Means()), method, tmp_path, dict(a=1), lines.append).values()
    assert lines == ["joint_bilateral: 3 of 3 views of a computed"]
    files = sorted(kept.folder.iterdir())
    contents = [file.read_bytes() for file in files]
    assert len(files) == 3
    outputs = []
    for views in (kept, Live(split, Means(), method)):
        upsample = jax.jit(lambda data, views=views: views.upsample(data, data["features"]))
        outputs.append(np.asarray(upsample(views.batch([1], False)[0])))
    assert np.abs(kept.arrange(outputs[0]) - outputs[1]).max() < 1e-3

    files[0].write_bytes(contents[0][:-5])  # cut off
    files[1].write_bytes(contents[2])  # another view
    files[2].unlink()
    for number, error in enumerate((ValueError, ValueError, FileNotFoundError)):
        with pytest.raises(error, match=re.escape(str(files[number]))):
            read_view(kept.path(number))
    lines.clear()
    keep(split, dict(a=Means()), method, tmp_path, dict(a=1), lines.append)
    assert [file.read_bytes() for file in files] == contents
    assert [str(file) in line for file, line in zip(files, lines[:2])] == [True, True]
    lines.clear()
    keep(split, dict(a=Means()), method, tmp_path, dict(a=1), lines.append)
    assert lines == []
    keep(split, dict(a=Means()), method, tmp_path, dict(a=2), lines.append)
    assert len(list(tmp_path.iterdir())) == 2


def test_names_with_brackets_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    encoders = dict(mine=EncoderConfig(name="resnet50"))
    config = Config(encoders=encoders, dataset=DatasetConfig(root="x", name="[/best] [red]"))
    results.show([Result("mine", "bilinear", 32, dict(mIoU=0.5), {}, {})], config)
    assert "segmentation on [/best] [red]" in capsys.readouterr().out


def test_cross_entropy_is_that_of_pytorch() -> None:
    random = np.random.default_rng(0)
    logits, labels = random.standard_normal((2, 5, 6, 4), np.float32), random.integers(0, 4, (2, 5, 6)).astype(np.uint8)
    labels[0, :2] = 255
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).permute(0, 3, 1, 2), torch.from_numpy(labels).long(), ignore_index=255
    )
    ours = segmentation.cross_entropy(jnp.asarray(logits), jnp.asarray(labels), 255)
    assert float(ours) == pytest.approx(float(expected), rel=1e-6)
    assert float(segmentation.cross_entropy(jnp.asarray(logits), jnp.full((2, 5, 6), 255, jnp.uint8), 255)) == 0


def test_order_is_a_permutation_of_the_seed_and_flips_whole_batches() -> None:
    probe = ProbeConfig(batch_size=4)
    epochs = [list(fitting.epoch_order(10, probe, 0, epoch)) for epoch in range(40)]
    assert [len(batch) for batch, _ in epochs[0]] == [4, 4, 2]
    assert sorted(np.concatenate([batch for batch, _ in epochs[3]])) == list(range(10))
    flips = [flip for epoch in epochs for _, flip in epoch]
    assert 40 < sum(flips) < 80
    assert not any(flip for _, flip in fitting.epoch_order(10, ProbeConfig(flip=False), 0, 0))


def test_one_pixel_of_every_block_counts() -> None:
    class Labels(Examples):
        def read(self, index: int, mirror: bool = False):
            return np.zeros((9, 12, 3), np.uint8), np.ones((9, 12), np.uint8)

    split = Labels(
        source=Files(Path(), []), classes=("a", "b"), ignore=255, table=np.zeros(256, np.int16), size=(9, 12),
        mirrored=True, pixel_stride=3, seed=1,
    )  # fmt: skip
    chosen = [split.chosen(0, mirror) for mirror in (False, True)]
    assert all((mask.reshape(3, 3, 4, 3).sum((1, 3)) == 1).all() for mask in chosen)
    assert (chosen[0] != chosen[1]).any()
    label = split.thinned(split.read(0)[1], 0, False)
    assert np.array_equal(label == 1, chosen[0])
    assert set(label[~chosen[0]]) == {255}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(dataset=dict(root="data", size=10**6)), r"dataset\.size=.* takes 12,000 GB"),
        (dict(methods=["high_resolution"], high_resolution=2 * 10**9), "high_resolution=2000000000 .* takes"),
    ],
)
def test_what_is_larger_than_the_memory_is_refused_at_once(options: dict, named: str) -> None:
    values = dict(encoders=dict(e=dict(name="resnet50")), dataset=dict(root="data")) | options
    with pytest.raises(ValueError, match=named):
        tasks.run(from_dict(Config, values))
