"""Pasted regions: their pixels and outlines, batches that have them, and the term that learns from them."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from anyup_core.config import AnyUpConfig
from anyup_jax.layers import adaptive_average_pool
from anyup_jax.model import AnyUp
from tests.training import metrics, train
from train import program
from train.config import Config, DatasetConfig, EncoderConfig, LossConfig
from train.data import Batches
from train.data.sources import Files
from train.loss import Views, objective, outlines
from train.pasted_regions import RADIUS, blob, paste_regions

COUNT = 3


def test_regions_are_irregular_and_anywhere() -> None:
    size = (60, 80)
    rng = np.random.default_rng(0)
    shapes = [blob(size, rng) for _ in range(200)]
    assert all(shape.shape == size and shape.dtype == bool for shape in shapes)
    areas = np.array([shape.sum() for shape in shapes])
    assert np.median(areas) > np.pi * (RADIUS[0] * 60) ** 2 / 2
    assert (areas == 0).mean() < 0.02  # hidden beyond an edge now and then
    assert len(np.unique(areas)) > 150
    assert min(np.argwhere(np.any(shapes, 0)).min(0)) == 0  # every place is reached
    assert tuple(np.argwhere(np.any(shapes, 0)).max(0)) == (59, 79)


def test_what_is_pasted_keeps_its_place() -> None:
    image = np.full((40, 50, 3), 9, np.uint8)
    others = [np.full((40, 50, 3), 10 * number, np.uint8) for number in (1, 2, 3)]
    pasted, regions = paste_regions(image, others, np.random.default_rng(1))
    assert (image == 9).all()
    assert regions.dtype == np.uint8
    assert set(np.unique(regions)) == {0, 1, 2, 3}
    for number, source in enumerate([image, *others]):
        assert np.array_equal(pasted[regions == number], source[regions == number])


@pytest.fixture
def files(tmp_path: Path) -> Files:
    for number in range(6):
        pixels = np.full((40, 50, 3), 40 * number, np.uint8)
        path = tmp_path / "photographs" / "all" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return Files(tmp_path / "photographs", [f"all/{number}.png" for number in range(6)])


def config(pasted: int = COUNT, **changes: int) -> Config:
    views = dict(crop_size=(32, 32), img_size=(16, 16), num_local_crops=2, pasted_regions=pasted)
    return Config(encoders={"none": EncoderConfig(name="none")}, dataset=DatasetConfig(**views | changes))


def first(files: Files, config: Config) -> dict:
    batches = Batches(files, config)
    try:
        return next(batches)
    finally:
        batches.close()


def test_batches_have_the_regions_of_their_pictures(files: Files) -> None:
    batch = first(files, config(augmentation_strength=0))
    assert batch["regions"].shape == (4, 32, 32)
    assert batch["regions"].dtype == np.uint8
    assert np.array_equal(batch["image"], batch["augmented"])  # the guidance has the same regions
    for name, image, regions in zip(batch["name"], batch["image"], batch["regions"]):
        colours = [np.unique(image[regions == number]) for number in np.unique(regions)]
        assert all(len(colour) == 1 for colour in colours)
        assert colours[0] == 40 * int(Path(name).stem)
    assert len(np.unique(batch["regions"])) > 2
    arrays = {name: (x.shape, x.dtype) for name, x in batch.items() if isinstance(x, np.ndarray)}
    assert {name: (x.shape, x.dtype) for name, x in program.batch_shapes(config()).items()} == arrays
    again = first(files, config(augmentation_strength=0, threads=1))
    assert all(np.array_equal(batch[name], again[name]) for name in ("image", "regions", "crops"))


def test_without_regions_nothing_changes(files: Files) -> None:
    plain, pasted = first(files, config(0)), first(files, config())
    assert "regions" not in plain
    assert plain["name"] == pasted["name"]
    assert np.array_equal(plain["crops"], pasted["crops"])
    untouched = pasted["regions"] == 0
    assert np.array_equal(plain["image"][untouched], pasted["image"][untouched])


def test_a_bad_file_is_pasted_from_the_next(files: Files) -> None:
    (files.root / "all" / "2.png").write_bytes(b"no image")
    plain, pasted = (first(files, config(count))["skipped"] for count in (0, 15))
    assert len(pasted) > len(plain)
    assert {name for name, _ in pasted} == {"all/2.png"}


def halves(width: int) -> jax.Array:
    """Regions of a picture of 8 x `width` pixels, whose left half is the first and right half the second."""
    right = (jnp.arange(width) >= width / 2).astype(jnp.float32)
    return jnp.broadcast_to(jnp.stack([1 - right, right], -1), (1, 8, width, 2))


def test_outlines_of_known_attentions() -> None:
    regions = halves(12)  # 3 cells of 4 pixels, of which the middle one has a half of both
    cells, size = (2, 3), (8, 12)
    shares = adaptive_average_pool(regions, cells)
    assert np.allclose(shares[0, 0, :, 0], [1, 0.5, 0])

    def copied(shares):  # every pixel takes its own cell
        return jnp.repeat(jnp.repeat(shares, 4, 1), 4, 2)

    assert float(outlines(copied, regions, cells, size)) == pytest.approx(np.log(2) / 3, rel=1e-5)
    assert float(outlines(lambda _: regions, regions, cells, size)) == pytest.approx(0, abs=1e-6)
    wrong = float(outlines(lambda _: 1 - regions, regions, cells, size))
    assert wrong == pytest.approx(-np.log(1e-3), rel=1e-5)  # bounded


def test_within_a_region_every_attention_is_right() -> None:
    whole = jnp.concatenate([jnp.ones((1, 8, 12, 1)), jnp.zeros((1, 8, 12, 1))], -1)

    def weighed(shares):
        weights = jax.nn.softmax(jax.random.normal(jax.random.key(0), (8 * 12, 6)))
        return (weights @ shares.reshape(6, 2)).reshape(1, 8, 12, 2)

    assert float(outlines(weighed, whole, (2, 3), (8, 12))) == pytest.approx(0, abs=1e-6)


def test_what_cannot_be_is_refused() -> None:
    encoders = {"none": EncoderConfig(name="none")}
    with pytest.raises(ValueError, match=r"loss\.outlines=1\.0 .*dataset\.pasted_regions"):
        Config(encoders=encoders, loss=LossConfig(outlines=1.0))
    with pytest.raises(ValueError, match=r"loss=.*-1\.0"):
        LossConfig(outlines=-1.0)
    for count in (-1, 16):
        with pytest.raises(ValueError, match=f"dataset.pasted_regions={count}"):
            DatasetConfig(pasted_regions=count)


def test_the_term_is_that_of_upsampled_regions() -> None:
    model = AnyUp(AnyUpConfig(qk_dim=16, num_heads=2, backend="tiled"), rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    shapes = (1, 8, 12, 3), (1, 2, 3, 5), (1, 1, 2, 2, 5)
    image, lr, hr = (jnp.asarray(random.standard_normal(shape, np.float32)) for shape in shapes)
    regions, corner = jnp.repeat(halves(24), 2, 1), jnp.zeros((1, 1, 2), jnp.int32)
    views = Views(image, image, lr, hr, corner, regions)
    terms, plain = (
        {name: float(term) for name, term in objective(model, views, (4, 6), (8, 12), weights).items()}
        for weights in (LossConfig(outlines=2.0), LossConfig())
    )
    assert plain.pop("outlines") == 0
    assert all(terms[name] == pytest.approx(plain[name], rel=1e-6, abs=1e-8) for name in plain)

    def upsampled(shares):
        return model(image, lr, (8, 12), values=shares)

    expected = 2 * outlines(upsampled, regions, (2, 3), (8, 12))
    assert terms["outlines"] == pytest.approx(float(expected), rel=1e-5)


def test_a_run_that_learns_outlines(tmp_path: Path) -> None:
    words = "dataset.pasted_regions=2", "loss.outlines=1", "loss.consistency=0", "max_steps=2", "output_dir=run"
    train(tmp_path, *words)
    assert len(metrics(tmp_path / "run")) == 2
    for line in metrics(tmp_path / "run"):
        assert line["outlines"] > 0
        total = sum(line[name] for name in ("outlines", "reconstruction", "input", "consistency"))
        assert line["loss"] == pytest.approx(total, rel=1e-5)
