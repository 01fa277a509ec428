"""Every method through one interface, linear in the values, and kept as tiles without a difference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import anyup_jax
from anyup_core.upsamplers.joint_bilateral import JointBilateralConfig
from anyup_jax import upsamplers
from evaluation.kept_weights import Plan, apply, extract
from evaluation.methods import Interpolation, JointBilateral, LabelGuided, Trained, Upsampler

RANDOM = np.random.default_rng(0)
IMAGE = jnp.asarray(RANDOM.random((2, 48, 64, 3), np.float32))
FEATURES = jnp.asarray(RANDOM.standard_normal((2, 7, 6, 12), np.float32))


def upsampler(window: str) -> Upsampler:
    config = anyup_jax.AnyUpConfig(qk_dim=16, num_heads=2, window=window, backend="tiled")
    return Upsampler(anyup_jax.AnyUp(config, rngs=nnx.Rngs(0)))


METHODS = {
    "paper": upsampler("paper"), "natten": upsampler("natten"), "joint_bilateral": JointBilateral(),
    "nearest": Interpolation("nearest", "nearest"), "bilinear": Interpolation("bilinear", "bilinear"),
    "bicubic": Interpolation("bicubic", "bicubic"),
}  # fmt: skip


def far(a, b) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


@pytest.mark.parametrize("name", METHODS)
def test_a_head_may_be_applied_before_or_after(name: str) -> None:
    head = jnp.asarray(RANDOM.standard_normal((12, 5), np.float32))
    method = METHODS[name]
    before = method(IMAGE, FEATURES, (48, 64), FEATURES @ head)
    assert before.shape == (2, 48, 64, 5)
    assert far(before, method(IMAGE, FEATURES, (48, 64)) @ head) < 1e-5
    ones = method(IMAGE, FEATURES, (48, 64), jnp.ones((2, 7, 6, 1)))
    assert far(ones, 1) < 1e-5  # so a bias may be added before or after, too


@pytest.mark.parametrize("kernel", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(31, 50), (7, 6), (3, 4)])
def test_interpolation_is_that_of_pytorch(kernel: str, size: tuple[int, int]) -> None:
    maps = torch.from_numpy(np.array(FEATURES)).permute(0, 3, 1, 2)
    mode = "nearest-exact" if kernel == "nearest" else kernel
    expected = torch.nn.functional.interpolate(maps, size, mode=mode).permute(0, 2, 3, 1)
    assert far(Interpolation(kernel, kernel)(None, FEATURES, size), expected.numpy()) < 2e-5


def test_joint_bilateral_by_its_definition() -> None:
    method = JointBilateral(JointBilateralConfig(radius=1, spatial=0.8, range=0.2))
    image, (row, col) = IMAGE[:, :42, :60], (20, 33)
    output = method(image, FEATURES, (42, 60))  # cells of 6 x 10 pixels
    small = np.asarray(jax.image.resize(image, (2, 7, 6, 3), "bilinear", antialias=True))
    y, x = (row + 0.5) / 6 - 0.5, (col + 0.5) / 10 - 0.5
    total, weights = 0.0, 0.0
    for i in range(row // 6 - 1, row // 6 + 2):
        for j in range(col // 10 - 1, col // 10 + 2):
            colour = ((np.asarray(image)[0, row, col] - small[0, i, j]) ** 2).sum()
            weight = np.exp(-0.5 * (((y - i) ** 2 + (x - j) ** 2) / 0.64 + colour / 0.04))
            total, weights = total + weight * np.asarray(FEATURES)[0, i, j], weights + weight
    assert far(output[0, row, col], total / weights) < 1e-5


LABELS = jnp.asarray(RANDOM.integers(0, 3, (2, 45, 37, 1)))


def test_label_guided_by_its_definition() -> None:
    method, labels, low = LabelGuided(window_ratio=0.25), np.asarray(LABELS)[..., 0], np.asarray(FEATURES)
    output = method(LABELS, FEATURES, (45, 37))
    assert output.shape == (2, 45, 37, 12)
    owner_row, owner_col = np.arange(45) * 7 // 45, np.arange(37) * 6 // 37
    for image, row, col in ((0, 20, 33), (1, 0, 0), (1, 44, 36), (0, 3, 18)):
        (top, bottom), (left, right) = (
            (int(np.floor(max(y - 0.25, 0) * n)), int(np.ceil(min(y + 0.25, 1) * n)))
            for y, n in (((row + 0.5) / 45, 7), ((col + 0.5) / 37, 6))
        )
        total, weights = 0.0, 0
        for i in range(top, bottom):
            for j in range(left, right):
                cell = labels[image][np.ix_(owner_row == i, owner_col == j)]
                count = (cell == labels[image, row, col]).sum()
                total, weights = total + count * low[image, i, j], weights + count
        assert far(output[image, row, col], total / weights) < 1e-5
    with pytest.raises(ValueError, match=r"Labels of \(45, 37\) cannot guide an output of \(48, 64\)"):
        method(LABELS, FEATURES, (48, 64))


def test_label_guided_is_linear_and_kept_as_tiles() -> None:
    method, head = LabelGuided(), jnp.asarray(RANDOM.standard_normal((12, 5), np.float32))
    before = method(LABELS, FEATURES, (45, 37), FEATURES @ head)
    assert far(before, method(LABELS, FEATURES, (45, 37)) @ head) < 1e-5
    plan = Plan.of(method, FEATURES.shape[1:3], (45, 37))
    tiles = extract(method, {"x": plan}, LABELS, {"x": FEATURES}, (45, 37))["x"]
    assert far(plan.untile(apply(plan, tiles, FEATURES @ head), (45, 37)), before) < 1e-5


@pytest.mark.parametrize("name", ["paper", "natten", "joint_bilateral"])
@pytest.mark.parametrize("size", [(48, 64), (45, 37)])
def test_tiles_do_what_the_method_does(name: str, size: tuple[int, int]) -> None:
    method = METHODS[name]
    plan = Plan.of(method, FEATURES.shape[1:3], size)
    tiles = extract(method, {"x": plan}, IMAGE, {"x": FEATURES}, size)["x"]
    rows, cols = plan.rows, plan.cols
    assert tiles.shape == (2, rows.runs * cols.runs, rows.size * cols.size, rows.span * cols.span)
    values = FEATURES[..., :5]
    assert far(plan.untile(apply(plan, tiles, values), size), method(IMAGE, FEATURES, size, values)) < 1e-5


def test_tiles_are_small() -> None:
    plan = Plan.of(METHODS["paper"], (14, 28), (448, 448))
    assert (plan.rows.size, plan.rows.span, plan.cols.span) == (16, 4, 7)
    assert Plan.of(METHODS["bilinear"], (7, 6), (48, 64)) is None


def test_several_encoders_share_the_guide() -> None:
    grids = dict(a=(7, 6, 20), b=(12, 16, 8), c=(7, 6, 3))
    maps = {
        name: tuple(jnp.asarray(RANDOM.standard_normal((1, h, w, n), np.float32)) for n in (channels, 4))
        for name, (h, w, channels) in grids.items()
    }
    method = METHODS["paper"]
    outputs = method.upsample_many(IMAGE[:1], maps, (48, 64))
    for name, (features, values) in maps.items():
        assert far(outputs[name], method(IMAGE[:1], features, (48, 64), values)) < 1e-5


def test_one_naf_upsamples_several_encoders_together() -> None:
    models = [
        upsamplers.NAF(rngs=nnx.Rngs(seed), dim=32, kernel_size=3, num_heads=2, rope_heads=2) for seed in range(2)
    ]
    maps = dict(a=FEATURES, b=FEATURES[..., 2:10], c=FEATURES[:, 1:])
    for names, numbers in (("ab", (0, 0)), ("ab", (0, 1)), ("ac", (0, 0))):
        method = Trained("naf", {name: models[number] for name, number in zip(names, numbers)})
        chosen = {name: (maps[name], None) for name in names}
        outputs = method.upsample_many(IMAGE, chosen, (24, 32))
        for name in names:
            assert far(outputs[name], method.of(name)(IMAGE, maps[name], (24, 32))) < 1e-5
