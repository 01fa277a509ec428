"""How a photograph becomes a view: regions at random, mirroring, and guidance of a size of its own."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from anyup_jax.encoders.settings import EncoderConfig
from train import encoders
from train.config import Config, DatasetConfig
from train.data.images import Region, read_crop
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
        return encoders.geometry(Config(encoders={"any": EncoderConfig(name="any")}, dataset=data), 14, 0)

    assert (sizes().whole, sizes().guidance) == ((224, 224), (224, 224))
    assert (sizes(guidance_size=(112, 96)).whole, sizes(guidance_size=(112, 96)).guidance) == ((224, 224), (112, 96))
    for field, value in dict(guidance_size=(0, 4), random_region=0.0).items():
        with pytest.raises(ValueError, match=f"dataset.{field}="):
            DatasetConfig(**{field: value})
