"""Images of several bands: their files, statistics and views, a run on them from end to end, and what is refused."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tifffile
import torch
import yaml
from flax import nnx
from PIL import Image
from torchvision.transforms.v2 import functional as F

import anyup_jax
from anyup_core.checkpoints import model_card
from anyup_core.config import AnyUpConfig
from anyup_core.settings import from_dict, to_dict
from evaluation import config as evaluation
from evaluation import methods
from tests.training import configured, losses, same, tiny, train, weights
from train import augment, band_statistics, loop, pictures, program, sharding, size_index
from train.config import Config, DatasetConfig, EncoderConfig, LogConfig
from train.data import Batches, open_source
from train.data.bands import OtherBands, band_size, read_band_crop, read_bands
from train.data.images import Region, TooSmall, read_crop
from train.output_dir import check_output
from train.step import encoder_pixels, guidance

BANDS = 13
CONTIG = dict(photometric="minisblack", planarconfig="contig")
SEPARATE = dict(photometric="minisblack", planarconfig="separate")
ONE_PAGE_A_BAND: dict[str, Any] = dict(photometric="minisblack")


def scene(height: int = 40, width: int = 50, seed: int = 0, dtype: type = np.uint16) -> np.ndarray:
    """Smooth values around a level and of a spread that differ from band to band; the last band is 0."""
    random = np.random.default_rng(seed)
    levels = random.normal(0, 1, (5, 6, BANDS)) * np.linspace(2, 9, BANDS) + np.linspace(40, 90, BANDS)
    levels[..., -1] = 0
    planes = [
        np.asarray(Image.fromarray(np.float32(levels[..., band])).resize((width, height), 2)) for band in range(13)
    ]
    return np.stack(planes, -1).clip(0, 255).astype(dtype)


def tiff(pixels: np.ndarray, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    file.seek(0)
    return file


def array(pixels: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    np.save(file, pixels)
    file.seek(0)
    return file


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_every_layout_gives_the_same_values(dtype: type, tmp_path: Path) -> None:
    pixels = scene(dtype=dtype)
    first = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    files = dict(
        samples=tiff(pixels, **CONTIG),
        compressed=tiff(pixels, **CONTIG, compression="zlib", tile=(16, 16)),
        planes=tiff(first, **SEPARATE),
        pages=tiff(first, **ONE_PAGE_A_BAND),
        plain_pages=tiff(first, **ONE_PAGE_A_BAND, metadata=None),
        a_page_for_each_row=tiff(pixels),  # which tifffile makes of (H, W, 13) unless it is told more
        channels=tiff(first, **ONE_PAGE_A_BAND, ome=True, metadata=dict(axes="CYX")),
    )
    for name, file in files.items():
        (tmp_path / f"{name}.TIF").write_bytes(file.getvalue())
    for name, values in dict(last=pixels, first=first, fortran=np.asfortranarray(pixels)).items():
        np.save(tmp_path / f"{name}.npy", values)
    for path in tmp_path.iterdir():
        for file in (path, io.BytesIO(path.read_bytes())):
            read = read_bands(file, path.name, BANDS)
            assert read.dtype == np.float32
            np.testing.assert_array_equal(read, pixels.astype(np.float32), path.name)
        assert band_size(str(path), BANDS) == (40, 50)


def test_npy_headers_are_not_parsed_with_ast(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Python 3.11 that fails at random where several threads do it."""
    file = array(scene())
    monkeypatch.setattr(ast, "literal_eval", pytest.fail)
    np.testing.assert_array_equal(read_bands(file, "a.npy", BANDS), scene())


def test_the_axis_of_the_bands() -> None:
    square = np.arange(13 * 20 * 13, dtype=np.uint16).reshape(13, 20, 13)
    np.testing.assert_array_equal(read_bands(tiff(square, **CONTIG), "a.tif", 13), square)
    np.testing.assert_array_equal(read_bands(tiff(square, **SEPARATE), "a.tif", 13), square.transpose(1, 2, 0))
    np.testing.assert_array_equal(read_bands(array(square), "a.npy", 13), square)  # .npy is (H, W, bands)
    with pytest.raises(OtherBands, match=r"^a\.tif .*13 x 20 x 13 .*which axis"):
        read_bands(tiff(square, **ONE_PAGE_A_BAND), "a.tif", 13)
    gray = scene()[..., 0]
    for name, file in {"a.tif": tiff(gray), "a.npy": array(gray)}.items():
        np.testing.assert_array_equal(read_bands(file, name, 1), gray[..., None])
    for file in (tiff(scene()[..., :12], **CONTIG), tiff(gray), tiff(scene()[None].repeat(2, 0), **CONTIG)):
        with pytest.raises(OtherBands, match=r"^a\.tif .*model\.input_dim=13"):
            read_bands(file, "a.tif", 13)


def test_what_cannot_be_used(tmp_path: Path) -> None:
    pixels = scene(dtype=np.float32)
    whole = tiff(pixels, **CONTIG, compression="zlib").getvalue()
    for name, data in {"a.tif": whole, "a.npy": array(pixels).getvalue()}.items():
        for damaged in (data[: len(data) // 2], data[:9], b"no image", b""):
            (tmp_path / name).write_bytes(damaged)
            for file in (tmp_path / name, io.BytesIO(damaged)):
                with pytest.raises(OSError, match=rf"^{re.escape(name)} "):
                    read_bands(file, name, BANDS)
    assert band_size(str(tmp_path / "a.npy"), BANDS) == band_size(str(tmp_path), BANDS) == (-1, -1)
    for value, fault in ((np.nan, "NaN"), (np.inf, "infinite")):
        with pytest.raises(ValueError, match=rf"^a\.npy .*{fault}"):
            read_bands(array(np.where(pixels > 70, np.float32(value), pixels)), "a.npy", BANDS)
    with pytest.raises(ValueError, match=r"^a\.npy .*complex"):
        read_bands(array(pixels.astype(np.complex64)), "a.npy", BANDS)
    with pytest.raises(TooSmall, match=r"40x50.*dataset\.crop_size=64x64"):
        read_band_crop(tiff(pixels, **CONTIG), "a.tif", (64, 64), bands=BANDS)


@pytest.mark.skipif(bool(importlib.util.find_spec("imagecodecs")), reason="imagecodecs is installed")
def test_a_compression_that_needs_imagecodecs_is_named() -> None:
    file = io.BytesIO()
    Image.fromarray(scene(dtype=np.uint8)[..., :3]).save(file, "TIFF", compression="tiff_lzw")
    file.seek(0)
    with pytest.raises(OSError, match=r"^a\.tif .*pip install imagecodecs"):
        read_bands(file, "a.tif", 3)


@pytest.mark.parametrize("region", [None, Region(0.2, 0.9, 0.7, 0.3)])
def test_a_crop_of_bands_is_that_of_a_photograph(region: Region | None) -> None:
    pixels, photograph = scene(61, 90, dtype=np.uint8)[..., :3], io.BytesIO()
    Image.fromarray(pixels).save(photograph, "PNG")
    crop = read_band_crop(array(pixels), "a.npy", (24, 32), region, bands=3)
    assert crop.shape == (24, 32, 3)
    assert (
        np.abs(crop - read_crop(photograph, "a.png", (24, 32), region)).max() < 1
    )  # which is rounded along either axis


def settings(root: Path | str = "root", log: LogConfig | None = None, **dataset: Any) -> Config:
    views = dict(kind="folder", root=str(root), crop_size=(32, 32), img_size=(16, 16), encoder_bands=(3, 2, 1))
    data = DatasetConfig(**views | dataset)
    encoders = {"any": EncoderConfig(name="efficientnet_lite0", layer=(2,))}
    return Config(
        model=AnyUpConfig(input_dim=BANDS), encoders=encoders, dataset=data, log=log or LogConfig(), batch_size=2
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five images of different sizes, kinds and layouts."""
    return write(tmp_path / "root")


def write(root: Path) -> Path:
    for number in range(5):
        path = root / "ab"[number % 2] / str(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = scene(70 + number, 66, seed=number)
        if number == 0:
            np.save(path.with_suffix(".npy"), pixels)
        else:
            path.with_suffix(".tif").write_bytes(tiff(pixels, **CONTIG).getvalue())
    return root


def silent(_line: str) -> None:
    """Print nothing."""


def test_statistics_are_those_of_all_pixels(root: Path) -> None:
    messages: list[str] = []
    source = open_source(settings(root).dataset, silent, BANDS)
    config = band_statistics.with_statistics(settings(root), source, messages.append)
    every = np.concatenate([scene(70 + number, 66, seed=number).reshape(-1, BANDS) for number in range(5)])
    np.testing.assert_allclose(config.dataset.mean, every.mean(0, np.longdouble), rtol=1e-14)
    np.testing.assert_allclose(config.dataset.std[:-1], every.std(0, np.longdouble)[:-1], rtol=1e-14)
    assert config.dataset.std[-1] == 1  # of a band that is the same everywhere
    assert "[12]" in messages[-1]
    assert from_dict(Config, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config
    assert band_statistics.with_statistics(config, source, pytest.fail) is config


def test_statistics_in_processes_and_of_damaged_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, messages = open_source(settings(root).dataset, silent, BANDS), []
    alone = band_statistics.measure(source, BANDS, 0, silent)
    monkeypatch.setattr(size_index, "CHUNK", 2)
    np.testing.assert_array_equal(band_statistics.measure(source, BANDS, 2, silent), alone)
    (root / "a/0.npy").write_bytes(b"no image")
    band_statistics.measure(source, BANDS, 0, messages.append)
    assert messages[0].startswith("1 of 5 images")
    assert str(root / "a/0.npy") in messages[0]
    with pytest.raises(ValueError, match=r"None of the 5 images .*model\.input_dim=12"):
        band_statistics.measure(source, 12, 0, silent)


def test_the_index_of_bands_is_beside_that_of_photographs(root: Path) -> None:
    photograph = Image.fromarray(np.zeros((40, 40, 3), np.uint8))
    photograph.save(root / "a" / "photograph.png")
    plain = DatasetConfig(kind="folder", root=str(root), crop_size=(32, 32), img_size=(16, 16))
    assert "a/photograph.png" in open_source(plain, silent).paths
    assert open_source(settings(root).dataset, silent, BANDS).paths == [
        "a/0.npy",
        "a/2.tif",
        "a/4.tif",
        "b/1.tif",
        "b/3.tif",
    ]
    assert {path.name for path in root.glob("*.tsv")} == {"size_index.tsv", "size_index_13_bands.tsv"}
    assert size_index.main([str(root), "--bands", "13", "--out", str(root / "mine.tsv")]) == 0
    assert (root / "mine.tsv").read_text() == (root / "size_index_13_bands.tsv").read_text()
    np.save(root / "b" / "other.npy", scene()[..., :12])
    with pytest.raises(OtherBands, match=r"b/other\.npy .*model\.input_dim=13"):
        size_index.build(root, None, 1, silent, 13)


MEAN = tuple(float(x) for x in range(40, 40 + BANDS))
STD = tuple(float(x) for x in range(1, 1 + BANDS))


def test_what_the_encoder_and_the_model_see() -> None:
    image = scene(16, 16, dtype=np.float32)[None]
    stretched = settings(mean=MEAN, std=STD).dataset
    seen = encoder_pixels(jnp.asarray(image), stretched)
    mean, std = (np.array(x)[[3, 2, 1]] for x in (MEAN, STD))
    np.testing.assert_allclose(seen, np.clip((image[..., [3, 2, 1]] - mean) / (4 * std) + 0.5, 0, 1), atol=1e-5)
    ranged = dataclasses.replace(stretched, encoder_range=(20, 80))
    seen = encoder_pixels(jnp.asarray(image), ranged)
    np.testing.assert_allclose(seen, np.clip((image[..., [3, 2, 1]] - 20) / 60, 0, 1), atol=1e-6)
    np.testing.assert_array_equal(augment.encoder_photograph(image[0], ranged), np.rint(np.asarray(seen[0]) * 255))
    np.testing.assert_allclose(
        guidance(jnp.asarray(image), (16, 16), ranged), (image - MEAN) / STD, rtol=1e-4, atol=1e-5
    )
    photograph = jnp.asarray(image[..., :3], jnp.uint8)
    np.testing.assert_array_equal(encoder_pixels(photograph, DatasetConfig()), photograph / jnp.float32(255))


def test_augmentation() -> None:
    image = scene(48, 64, dtype=np.float32)
    data = settings(mean=MEAN, std=STD, encoder_range=(0, 100)).dataset
    before, results = image.copy(), []
    for seed in range(20):
        first, second = (augment.augment_bands(image, data, np.random.default_rng(seed)) for _ in range(2))
        np.testing.assert_array_equal(first, second)
        assert first.shape == image.shape
        assert first.dtype == np.float32
        assert np.isfinite(first).all()
        results.append(first)
    np.testing.assert_array_equal(image, before)
    changed = [np.abs(result - image).max((0, 1)) > 0.01 for result in results]
    assert 12 <= sum(bands[0] for bands in changed) <= 20  # 1 - 0.5 * 0.65 * 0.8 * 0.4 of them
    none = dataclasses.replace(data, augmentation_strength=0.0)
    assert augment.augment_bands(image, none, np.random.default_rng(0)) is image


def test_the_encoder_bands_are_augmented_as_a_photograph() -> None:
    """At so little strength nothing but JPEG happens, and values beyond white stay beyond it."""
    image = scene(48, 64, dtype=np.float32)
    image[:8, :8] = 300
    data = settings(mean=MEAN, std=STD, encoder_range=(0, 100), augmentation_strength=1e-3).dataset
    result = augment.augment_bands(image, data, np.random.default_rng(0))
    others = [0, *range(4, BANDS)]
    np.testing.assert_allclose(result[..., others], image[..., others], rtol=1e-5, atol=1e-4)
    photograph = augment.encoder_photograph(image, data)
    levels = augment.augment(photograph, 1e-3, np.random.default_rng(0)).astype(int) - photograph
    np.testing.assert_allclose(result[..., [3, 2, 1]], image[..., [3, 2, 1]] + levels / 2.55, atol=1e-3)
    assert result[:4, :4, 1:4].min() > 200


def test_blur_is_torchvisions() -> None:
    levels = np.random.default_rng(0).random((20, 30, 4), np.float32)
    kernel = np.exp(-0.5 * (np.arange(-2, 3) / 0.8) ** 2)
    expected = F.gaussian_blur(torch.from_numpy(levels).permute(2, 0, 1), [5, 5], [0.8, 0.8]).permute(1, 2, 0)
    np.testing.assert_allclose(augment._smooth(levels, kernel / kernel.sum()), expected, atol=1e-6)


def test_batches_and_pasted_regions(root: Path) -> None:
    config = settings(root, mean=MEAN, std=STD, pasted_regions=2, flip=True, random_region=0.5, augmentation_strength=0)
    source = open_source(config.dataset, silent, BANDS)
    batches, again = Batches(source, config), Batches(source, config)
    for _ in range(3):
        batch, same_batch = next(batches), next(again)
        shapes = {name: (x.shape, x.dtype) for name, x in program.batch_shapes(config).items()}
        assert {name: (batch[name].shape, batch[name].dtype) for name in shapes} == shapes
        assert all(np.array_equal(batch[name], same_batch[name]) for name in shapes)
        assert set(np.unique(batch["regions"])) <= {0, 1, 2}
        assert not batch["skipped"]
    batches.close()
    again.close()


def test_pictures_show_what_the_encoder_sees(root: Path) -> None:
    config = settings(root, LogConfig(pictures_root=str(root), pictures=1), mean=MEAN, std=STD, crop_size=(64, 64))
    held_out = pictures.held_out(config)
    assert [name for name, _ in held_out] == ["a/0.npy"]
    encoder = config.encoders["any"].load()
    model = anyup_jax.AnyUp(AnyUpConfig(input_dim=BANDS, qk_dim=16), rngs=nnx.Rngs(0))
    _, crop = held_out[0]
    low, upsampled, target = pictures._features(model, encoder, crop, config.dataset)
    seen = np.asarray(encoder_pixels(jnp.asarray(crop), config.dataset))
    np.testing.assert_allclose(target, encoder.encode_array(seen), atol=1e-5)
    assert low.shape == (2, 2, 40)
    assert upsampled.shape == target.shape == (8, 8, 40)
    drawn = pictures.draw(root / "drawn.png", model, encoder, held_out, config.dataset, step=1)
    assert drawn.shape[-1] == 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps without interruption."""
    folder = tmp_path_factory.mktemp("bands")
    write(folder / "root")
    train(folder, "output_dir=whole", "max_steps=4", *RUN)
    return folder


RUN = (
    "model.input_dim=13", "dataset=folder", "dataset.root=root", "dataset.encoder_bands=[3,2,1]", "model.kernel_size=1",
    "dataset.pasted_regions=1", "loss.outlines=0.1", "optimizer.learning_rate=1e-3", "checkpoint.every=1",
)  # fmt: skip


def test_a_run_learns_and_says_what_it_measured(whole: Path) -> None:
    run = whole / "whole"
    assert np.isfinite(losses(run)).all()
    data = yaml.safe_load((run / "config.yaml").read_text())["dataset"]
    every = np.concatenate([scene(70 + number, 66, seed=number).reshape(-1, BANDS) for number in range(5)])
    np.testing.assert_allclose(data["mean"], every.mean(0), rtol=1e-14)
    recorded = json.loads((run / "checkpoints/4/config/metadata").read_text())["dataset"]
    assert (recorded["mean"], recorded["std"]) == (data["mean"], data["std"])
    assert (run / "skipped.tsv").read_text() == ""
    model = anyup_jax.from_pretrained(run)
    assert model.config.input_dim == BANDS
    card = model_card.text(to_dict(model.config), name="mine", run=run)
    assert json.dumps(data["std"]) in card


def test_resumed_it_ends_as_if_nothing_had_happened(whole: Path) -> None:
    """The statistics are those of the run, not of the files as they are now."""
    shutil.copytree(whole / "whole", whole / "parts")
    for step in (3, 4):
        shutil.rmtree(whole / "parts/checkpoints" / str(step))
    assert not same(weights(whole / "parts"), weights(whole / "whole"))
    before = (whole / "parts/config.yaml").read_text()
    resumed = train(whole, "output_dir=parts", "max_steps=4", "dataset.workers=1", *RUN)
    assert "resuming after step 2" in resumed.stdout
    assert "measuring" not in resumed.stdout
    assert same(weights(whole / "parts"), weights(whole / "whole"))
    assert losses(whole / "parts") == losses(whole / "whole")
    mean, std = (yaml.safe_load(before)["dataset"][name] for name in ("mean", "std"))
    words = tiny("output_dir=parts", "max_steps=4", *RUN)
    assert check_output(whole / "parts", configured(*words)).dataset.mean == tuple(mean)
    check_output(whole / "parts", configured(*words, f"dataset.mean={mean}", f"dataset.std={std}"))
    for change in (f"dataset.mean={[1.0, *mean[1:]]}", "dataset.encoder_range=[0,90]", "dataset.encoder_bands=[4,2,1]"):
        given = [change, f"dataset.std={std}"] if "mean" in change else [change]
        with pytest.raises(ValueError, match=rf"\({re.escape(change.partition('=')[0])}: "):
            check_output(
                whole / "parts", configured(*(x for x in words if "bands" not in x or x not in change), *given)
            )


def test_a_step_is_lowered_before_anything_is_measured() -> None:
    config = configured(*tiny(*RUN))
    shapes = jax.tree.leaves(program.lower(config, sharding.make_mesh(config.mesh), "lite0").args_info)
    assert [x.dtype for x in shapes if x.shape == (2, 64, 64, BANDS)] == [np.float32] * 2


FOLDER = ("model.input_dim=13", "dataset=folder", "dataset.root=root")
CHOSEN = (*FOLDER, "dataset.encoder_bands=[3,2,1]")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("model.input_dim=13",), "model.input_dim=13 .*dataset.encoder_bands"),
        (("model.input_dim=13", "dataset.encoder_bands=[3,2,1]"), "dataset.kind='skimage' .*dataset.root"),
        ((*FOLDER, "dataset.encoder_bands=[13,2,1]"), r"dataset.encoder_bands=\(13, 2, 1\) .*0 to 12"),
        ((*FOLDER, "dataset.encoder_bands=[-1,2,1]"), r"dataset.encoder_bands=\(-1, 2, 1\) .*0 to 12"),
        ((*FOLDER, "dataset.encoder_bands=[2,1]"), r"dataset.encoder_bands=\(2, 1\) .*three"),
        ((*CHOSEN, "dataset.mean=[1]", "dataset.std=[1]"), "dataset.mean=.*input_dim=13"),
        ((*CHOSEN, "dataset.mean=[1]"), "dataset.std=None"),
        ((*CHOSEN, "dataset.mean=[1]", "dataset.std=[0]"), "dataset.std=.*positive"),
        ((*CHOSEN, "dataset.encoder_range=[9,9]"), r"dataset.encoder_range=\(9.0, 9.0\)"),
        (("dataset.mean=[1,1,1]", "dataset.std=[1,1,1]"), "dataset.mean=.*dataset.encoder_bands"),
        (("dataset.encoder_range=[0,3000]",), "dataset.encoder_range=.*dataset.encoder_bands"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(words: tuple[str, ...], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        configured(*words)


def test_other_images_are_refused_before_anything_is_done(root: Path, tmp_path: Path) -> None:
    np.save(root / "b" / "other.npy", scene()[..., :12])
    run = train(tmp_path, "output_dir=run", *RUN, status=2)
    assert run.stderr.startswith(f"error: {Path('root') / 'b/other.npy'} has the shape 40 x 50 x 12; ")
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_weights_of_another_guidance_are_refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint\.init_from='anyup_efficientnet_lite' .*model\.input_dim=13"):
        loop.run(configured(*tiny(*RUN, "checkpoint.init_from=anyup_efficientnet_lite")))
    anyup_jax.AnyUp(AnyUpConfig(input_dim=BANDS, qk_dim=16), rngs=nnx.Rngs(0)).save_pretrained(tmp_path / "model")
    settings = evaluation.Config(
        encoders={"any": EncoderConfig(name="any")},
        dataset=evaluation.DatasetConfig(root="nowhere"),
        anyup=evaluation.UpsamplerConfig(weights=str(tmp_path / "model")),
    )
    with pytest.raises(ValueError, match=r"anyup\.weights=.*13 channels"):
        methods.create("anyup", settings)


@pytest.mark.parametrize("value", [0, 1])
def test_one_band_may_be_all_colours(value: int) -> None:
    data = DatasetConfig(kind="folder", root="root", encoder_bands=(0, 0, 0), mean=(1.0,), std=(2.0,))
    pixels = encoder_pixels(jnp.full((1, 2, 2, 1), float(value)), data)
    np.testing.assert_allclose(jax.device_get(pixels), np.full((1, 2, 2, 3), (value - 1) / 8 + 0.5))
