"""How a photograph becomes a view: regions at random, mirroring, and guidance of a size of its own."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anyup_jax.encoders.settings import EncoderConfig
from train import encoders
from train.config import Config, DatasetConfig
from train.data import open_source
from train.data.images import Region, TooSmall, read_crop
from train.data.pipeline import Prepare

SIZE = (40, 60)


def photograph(height: int = 120, width: int = 200) -> tuple[io.BytesIO, np.ndarray]:
    """A file whose red and green are row and column."""
    rows, cols = np.mgrid[:height, :width]
    pixels = np.stack([rows, cols, np.zeros_like(rows)], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    file.seek(0)
    return file, pixels


def extent(crop: np.ndarray) -> tuple[int, int, int, int]:
    """First and last row and column of a crop in the photograph."""
    return (*(int(crop[i, 0, 0]) for i in (0, -1)), *(int(crop[0, i, 1]) for i in (0, -1)))


def region(*place: float, size: float = 1.0, least: float = 0.1) -> Region:
    return Region(*place, size, least)


def test_the_largest_region_in_the_centre_is_what_is_taken_otherwise() -> None:
    file, _ = photograph()
    assert np.array_equal(read_crop(file, "x", SIZE, region(0.5, 0.5, size=0.0)), read_crop(file, "x", SIZE))


@pytest.mark.parametrize("place", [0.0, 0.999])
def test_the_least_region_lies_anywhere_and_has_its_area(place: float) -> None:
    top, bottom, left, right = extent(read_crop(photograph()[0], "x", SIZE, region(place, place, least=0.2)))
    assert (bottom - top + 3) * (right - left + 3) == pytest.approx(0.2 * 120 * 200, rel=0.08)
    assert (
        (top, left) == pytest.approx((0, 0), abs=2)
        if place == 0
        else (bottom, right) == pytest.approx((119, 199), abs=2)
    )


def test_no_region_is_enlarged() -> None:
    file, pixels = photograph()
    crop = read_crop(file, "x", SIZE, region(0.0, 0.0, least=0.001))
    assert np.array_equal(crop, pixels[:40, :60])


def test_photographs_are_enlarged_as_far_as_is_allowed() -> None:
    file, pixels = photograph()  # 120 x 200
    enlarged = read_crop(file, "x", (240, 300), max_enlargement=2.0)
    expected = np.asarray(Image.fromarray(pixels).resize((400, 240), Image.Resampling.BILINEAR))[:, 50:350]
    assert np.abs(enlarged.astype(int) - expected).max() <= 1
    for factor in (1.0, 1.9):
        with pytest.raises(TooSmall, match=r"^x .*120x200.* dataset.crop_size=240x300"):
            read_crop(photograph()[0], "x", (240, 300), max_enlargement=factor)
    with pytest.raises(TooSmall, match=r"dataset\.max_enlargement=1\.9"):
        read_crop(photograph()[0], "x", (240, 300), max_enlargement=1.9)


def test_the_least_region_is_enlarged_as_far_as_is_allowed() -> None:
    corner = read_crop(photograph()[0], "x", SIZE, region(0.0, 0.0, least=0.001), 2.0)
    expected = np.asarray(
        Image.fromarray(photograph()[1][: SIZE[0] // 2, : SIZE[1] // 2]).resize(SIZE[::-1], Image.Resampling.BILINEAR)
    )
    assert np.abs(corner.astype(int) - expected)[:-2, :-2].max() <= 1  # at the far edge the photograph goes on
    largest = read_crop(photograph()[0], "x", SIZE, region(0.5, 0.5, size=0.0), 2.0)
    assert np.array_equal(largest, read_crop(photograph()[0], "x", SIZE))


def test_small_photographs_are_used_where_they_may_be_enlarged(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number, side in enumerate((20, 30, 40)):
        Image.fromarray(photograph()[1][:side, :side]).save(tmp_path / "a" / f"{number}.png")
    settings = dict(kind="folder", root=str(tmp_path), crop_size=(40, 40), img_size=(40, 40), augmentation_strength=0)
    for factor, count in ((1.0, 1), (1.4, 2), (2.0, 3)):
        config = DatasetConfig(**settings, max_enlargement=factor)
        source = open_source(config, lambda line: None)
        assert len(source) == count
        assert Prepare(source, config, seed=0).map_with_index(0, 0)["image"].shape == (40, 40, 3)


class Source:
    digest = "x"

    def __len__(self) -> int:
        return 1

    def name(self, index: int) -> str:
        return "x"

    def open(self, index: int) -> io.BytesIO:
        return photograph()[0]


def test_half_of_the_photographs_are_mirrored_and_regions_differ_by_position() -> None:
    config = DatasetConfig(crop_size=SIZE, img_size=SIZE, flip=True, random_region=0.2, augmentation_strength=0)
    prepare = Prepare(Source(), config, seed=1)
    crops = [prepare.map_with_index(position, 0)["image"] for position in range(60)]
    mirrored = [int(crop[0, 0, 1]) > int(crop[0, -1, 1]) for crop in crops]
    assert 18 <= sum(mirrored) <= 42
    assert len({extent(crop) for crop in crops}) > 50
    again = Prepare(Source(), config, seed=1).map_with_index(7, 0)["image"]
    assert np.array_equal(again, crops[7])


def test_guidance_of_its_own_size() -> None:
    def sizes(**changes):
        data = DatasetConfig(**changes)
        return encoders.step_sizes(Config(encoders={"any": EncoderConfig(name="any")}, dataset=data), 14, 0)

    assert (sizes().whole, sizes().guidance) == ((224, 224), (224, 224))
    assert (sizes(guidance_size=(112, 96)).whole, sizes(guidance_size=(112, 96)).guidance) == ((224, 224), (112, 96))
    for field, value in dict(guidance_size=(0, 4), random_region=0.0, max_enlargement=0.5).items():
        with pytest.raises(ValueError, match=f"dataset.{field}="):
            DatasetConfig(**{field: value})
