"""Each operation of the guidance augmentation does what torchvision or its formula says, as often as it should."""

from __future__ import annotations

import colorsys
import io
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from train import augment as module
from train.augment import OPERATIONS, augment

COLOURS, GRAYSCALE, BLUR, COMPRESS, AUTOCONTRAST, EQUALIZE, SHARPEN, POSTERIZE, SOLARIZE, INVERT = range(10)

pytestmark = pytest.mark.usefixtures("unchecked")  # stand-ins for a Generator draw what a test names


class Chosen:
    """A generator whose `uniform` and `choice` are given."""

    def __init__(self, value: Any):
        self.value = value

    def uniform(self, low: float, high: float) -> float:
        assert low <= self.value <= high
        return self.value

    def choice(self, values: Any, p: Any) -> Any:
        assert self.value in values
        assert sum(p) == pytest.approx(1)
        return self.value


@pytest.fixture
def image() -> np.ndarray:
    """Smooth colours, some of them gray, black, white or saturated; not square."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (9, 13, 3), np.uint8)
    coarse[0, :5] = [[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 255], [90, 90, 90]]
    return np.asarray(Image.fromarray(coarse).resize((130, 90), Image.Resampling.BICUBIC))


def apply(index: int, image: np.ndarray, rng: Any = None) -> np.ndarray:
    return np.asarray(OPERATIONS[index][1](Image.fromarray(image), rng))


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.tensor(image).permute(2, 0, 1)


def apart(left: np.ndarray, right: np.ndarray | torch.Tensor) -> int:
    if isinstance(right, torch.Tensor):
        right = right.permute(1, 2, 0).numpy()
    assert left.dtype == right.dtype == np.uint8
    assert left.shape == right.shape
    return int(np.abs(left.astype(int) - right.astype(int)).max())


@pytest.mark.parametrize("shape", [(64, 64, 3), (37, 90, 3), (300, 200, 3), (5, 9, 3)])
def test_shape_type_and_determinism(shape: tuple[int, int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    before, results = image.copy(), []
    for seed in range(20):
        first, second = (augment(image, 1.0, np.random.default_rng(seed)) for _ in range(2))
        assert first.shape == shape
        assert first.dtype == np.uint8
        assert np.array_equal(first, second)
        results.append(first.tobytes())
    assert len(set(results)) >= 18
    assert np.array_equal(image, before)


def test_strength_zero_is_the_image_itself(image: np.ndarray) -> None:
    assert augment(image, 0.0, np.random.default_rng(0)) is image


@pytest.mark.parametrize(
    ("index", "expected", "tolerance"),
    [
        (GRAYSCALE, lambda x: F.rgb_to_grayscale(x, 3), 1),
        (AUTOCONTRAST, F.autocontrast, 1),
        (EQUALIZE, F.equalize, 1),
        (SHARPEN, lambda x: F.adjust_sharpness(x, 1.5), 1),
        (POSTERIZE, lambda x: F.posterize(x, 5), 0),
        (SOLARIZE, lambda x: F.solarize(x, 0.9 * 255), 0),
        (INVERT, F.invert, 0),
    ],
)  # fmt: skip
def test_operations_against_torchvision(index: int, expected: Any, tolerance: int, image: np.ndarray) -> None:
    assert apart(apply(index, image), expected(tensor(image))) <= tolerance


@pytest.mark.parametrize("sigma", [0.3, 0.5, 0.9, 1.5])
@pytest.mark.parametrize("shape", [(90, 130), (3, 3), (200, 300)])
def test_blur(sigma: float, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(2).integers(0, 256, (*shape, 3), np.uint8)
    assert apart(apply(BLUR, image, Chosen(sigma)), F.gaussian_blur(tensor(image), [5, 5], [sigma, sigma])) <= 2


@pytest.mark.parametrize("quality", [95, 80, 60, 40])
def test_compression(quality: int, image: np.ndarray) -> None:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    assert apart(apply(COMPRESS, image, Chosen(quality)), np.asarray(Image.open(file))) == 0


@pytest.mark.parametrize("turns", [-0.05, -0.031, 0.0, 0.01, 0.05])
def test_hue_against_its_definition(turns: float, image: np.ndarray) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (50, 20, 3), np.uint8)
    pixels = np.concatenate([image.reshape(-1, 3)[::11], noise.reshape(-1, 3)])
    expected = []
    for pixel in pixels / 255:
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected.append(colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value))
    result = np.asarray(module._shift_hue(Image.fromarray(pixels[None]), turns))[0]
    assert np.abs(result - 255 * np.array(expected)).max() < 1.6


class Jitter(Chosen):
    """Draws that do one part of the colour jitter, and one of the distortion, or none."""

    def __init__(self, order: list[int], factors: list[float], happens: list[bool], contrast_first: bool):
        self.order, self.factors, self.happens, self.first = order, factors, happens, contrast_first

    def permutation(self, count: int) -> list[int]:
        return self.order if count == 4 else [2, 0, 1]

    def uniform(self, low: float, high: float) -> float:
        factor = self.factors.pop(0)
        assert low <= factor <= high
        return factor

    def random(self, count: int | None = None) -> Any:
        return np.where(self.happens, 0.4, 0.6) if count else 0.4 if self.first else 0.6


PARTS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


@pytest.mark.parametrize("place", range(8))
def test_each_part_of_the_colours_against_torchvision(place: int, image: np.ndarray) -> None:
    factors = [1.0, 1.0, 1.0, 0.0] * 2
    factors[place] = (1.15, 0.85, 1.25, -0.04, 1.1, 1.4, 0.6, 0.03)[place]
    happens = [place == 4 + part for part in range(4)]
    drawn = factors[:4] + [factor for factor, happen in zip(factors[4:], happens) if happen]
    result = apply(COLOURS, image, Jitter([0, 1, 2, 3], drawn, [*happens, False], True))
    assert apart(result, PARTS[place % 4](tensor(image), factors[place])) <= 3


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
@pytest.mark.parametrize("first", [True, False])
def test_colours_against_torchvision(order: list[int], first: bool, image: np.ndarray) -> None:
    image = image // 2 + 50  # nothing is cut off, which would depend on rounding
    amounts = {0: 1.15, 1: 0.9, 2: 1.25, 3: -0.04}
    distortion = [(0, 1.1), (1, 1.3), (2, 0.7), (3, 0.03)] if first else [(0, 1.1), (2, 0.7), (3, 0.03), (1, 1.3)]
    expected = tensor(image)
    for part, amount in [*((part, amounts[part]) for part in order), *distortion]:
        expected = PARTS[part](expected, amount)
    factors = [*(amounts[part] for part in order), *(amount for _, amount in distortion)]
    result = apply(COLOURS, image, Jitter(order, factors, [True] * 5, first))
    assert apart(result, expected[[2, 0, 1]]) <= 12  # eight roundings, which contrast and saturation enlarge
    assert np.abs(result.astype(int) - expected[[2, 0, 1]].permute(1, 2, 0).numpy()).mean() < 2
    still = apply(COLOURS, image, Jitter([0, 1, 2, 3], [1.0, 1.0, 1.0, 0.0], [False] * 5, first))
    assert np.array_equal(still, image)


def test_noise() -> None:
    image = np.full((200, 300, 3), 128, np.uint8)
    noise = module._noise(image, np.random.default_rng(4)).astype(float) - 128
    assert abs(noise.mean()) < 0.1
    assert noise.std() == pytest.approx(255 * 0.03, rel=0.02)
    assert ((noise / noise.std()) ** 4).mean() == pytest.approx(3, abs=0.1)  # a Gaussian's
    for shifted in (np.roll(noise, 1, axis=axis) for axis in range(3)):
        assert abs((noise * shifted).mean()) < 0.01 * noise.var() + 0.5
    for level in (0, 255):
        cut = module._noise(np.full_like(image, level), np.random.default_rng(5)).astype(int)
        assert (cut == level).mean() == pytest.approx(0.53, abs=0.02)
        assert np.abs(cut - level).max() < 40  # nothing wraps around


@pytest.mark.parametrize("strength", [1.0, 0.5, 2.0])
def test_how_often_each_operation_happens(strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[int] = Counter()

    def counting(index: int) -> module.Operation:
        return lambda picture, rng: counts.update([index]) or picture

    stated = (0.5, 0.1, 0.35, 1, 0.2, 0.15, 0.2, 0.1, 0.05, 0.02, 0.6)  # the recipe's, and the noise's
    operations = tuple((probability, counting(index)) for index, (probability, _) in enumerate(OPERATIONS))
    monkeypatch.setattr(module, "OPERATIONS", operations)
    pixels, total, rng = np.zeros((1, 1, 3), np.uint8), 4000, np.random.default_rng(6)
    for _ in range(total):
        augment(pixels, strength, rng)
    for index, probability in enumerate(stated):
        expected = probability ** (1 / strength)
        spread = (expected * (1 - expected) / total) ** 0.5
        assert abs(counts[index] / total - expected) <= 4 * spread, index


def test_how_often_each_quality_and_part_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    total, rng, qualities = 2000, np.random.default_rng(7), Counter()
    picture = Image.new("RGB", (1, 1))
    save = Image.Image.save
    monkeypatch.setattr(
        Image.Image, "save", lambda *args, quality: qualities.update([quality]) or save(*args, quality=quality)
    )
    for _ in range(total):
        OPERATIONS[COMPRESS][1](picture, rng)
    for quality, weight in {95: 0.25, 80: 0.35, 60: 0.25, 40: 0.15}.items():
        assert abs(qualities[quality] / total - weight) <= 4 * (weight * (1 - weight) / total) ** 0.5

    hues: list[float] = []
    monkeypatch.setattr(module, "_shift_hue", lambda image, turns: hues.append(turns) or image)
    for _ in range(total):
        OPERATIONS[COLOURS][1](picture, rng)
    assert abs(len(hues) / total - 1.5) <= 4 * (0.25 / total) ** 0.5
    assert -0.05 <= min(hues) < -0.049
    assert 0.049 < max(hues) <= 0.05
