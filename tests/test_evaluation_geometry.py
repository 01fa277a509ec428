"""Heads, losses and schedules of the probes for depth and normals, against the same written in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

from anyup_jax.upsamplers.interpolation import resize
from evaluation.config import ProbeConfig
from evaluation.fitting import schedule
from evaluation.heads import BINS, DPT, Conv, Linear, depth_loss, depth_of, normal_loss, normals_of

CHANNELS = 6
Head = TypeVar("Head", Linear, DPT)


def maps(count: int, channels: int = CHANNELS) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.standard_normal((2, 3, 4, channels), np.float32) for _ in range(count)]


def nchw(x) -> torch.Tensor:
    return torch.from_numpy(np.array(x)).movedim(-1, 1)


def close(actual, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    actual, expected = np.asarray(actual), expected.detach().movedim(1, -1).numpy()
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def conv(x: torch.Tensor, layer: Conv) -> torch.Tensor:
    kernel = torch.from_numpy(np.array(layer.kernel[...])).permute(3, 2, 0, 1)
    return F.conv2d(x, kernel, torch.from_numpy(np.array(layer.bias[...])), padding="same")


def dpt(head: DPT, features: list[torch.Tensor], factors: tuple[int, int, int]) -> torch.Tensor:
    def block(x, layer):
        return x + conv(conv(x, layer.conv1).relu(), layer.conv2).relu()

    def larger(x, factor):
        return F.interpolate(x, scale_factor=factor, mode="nearest")

    levels = [larger(conv(x, layer), factors[0]) for x, layer in zip(features, head.project)]
    x = block(levels[3], head.fuse[3].block2)
    for level in 2, 1, 0:
        x = block(block(levels[level], head.fuse[level].block1) + x, head.fuse[level].block2)
    x = conv(larger(x, factors[1]), head.conv1).relu()
    return larger(conv(x, head.conv2), factors[2])


def filled(create: Callable[[nnx.Rngs], Head]) -> Head:
    """Return a head with weights that numpy draws, which compiles nothing."""
    graph, state = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
    random = np.random.default_rng(1)
    return nnx.merge(graph, jax.tree.map(lambda x: 0.2 * random.standard_normal(x.shape, np.float32), state))


@nnx.jit(static_argnums=2)
def apply(head, features, size):
    return head(features, size)


@pytest.fixture(scope="module")
def dpt_head() -> DPT:
    return filled(lambda rngs: DPT([CHANNELS], 5, hidden=4, rngs=rngs))


@pytest.mark.parametrize(("count", "size"), [(2, (12, 16)), (2, (3, 4)), (1, (7, 10))])
def test_linear_head(count, size):
    features = maps(count, CHANNELS // count)
    head = filled(lambda rngs: Linear([CHANNELS // count] * count, 5, rngs=rngs))
    actual = apply(head, features, size)
    joined = torch.cat([nchw(x) for x in features], 1)
    close(actual, conv(F.interpolate(joined, size, mode="bilinear"), head.conv))


@pytest.mark.parametrize(
    ("count", "size", "factors"),
    [(4, (48, 64), (2, 4, 2)), (1, (48, 64), (2, 4, 2)), (4, (6, 8), (2, 1, 1))],
)
def test_dpt_head(dpt_head, count, size, factors):
    features = maps(count)
    actual = apply(dpt_head, features, size)
    close(actual, dpt(dpt_head, [nchw(x) for x in features * (4 // count)], factors))


def test_dpt_head_takes_levels_of_their_own_channels_and_one_or_four_of_them(dpt_head):
    head = nnx.eval_shape(lambda: DPT((2, 3, 4, 5), 7, rngs=nnx.Rngs(0)))
    levels = [jax.ShapeDtypeStruct((1, 2, 2, channels), jnp.float32) for channels in (2, 3, 4, 5)]
    assert nnx.eval_shape(lambda head, x: head(x, (5, 9)), head, levels).shape == (1, 5, 9, 7)
    assert head.conv1.kernel.shape == (3, 3, 512, 512)
    with pytest.raises(ValueError, match=r"\b4\b.*\b3\b"):
        dpt_head([jnp.asarray(x) for x in maps(3)], (48, 64))


@pytest.mark.parametrize("kind", [Linear, DPT])
def test_heads_in_bfloat16_return_float32_and_have_float32_gradients(kind):
    head = nnx.eval_shape(lambda: kind([CHANNELS], 5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    loss = nnx.value_and_grad(lambda head, x: head([x], (12, 16)).sum())
    actual, gradients = nnx.eval_shape(loss, head, jnp.asarray(maps(1)[0]))
    assert {x.dtype for x in jax.tree.leaves((actual, gradients))} == {jnp.dtype("float32")}


def test_linear_head_and_its_gradient_in_bfloat16():
    features, options = jnp.asarray(maps(1)[0]), dict(channels=[CHANNELS], outputs=5)
    heads = [
        filled(lambda rngs, dtype=dtype: Linear(**options, dtype=dtype, rngs=rngs)) for dtype in ("f4", "bfloat16")
    ]
    gradient = nnx.jit(nnx.grad(lambda head: jnp.square(head([features], (12, 16))).sum()))
    exact, rough = map(gradient, heads)
    for one, another in zip(jax.tree.leaves(exact), jax.tree.leaves(rough)):
        np.testing.assert_allclose(one, another, atol=0.06 * float(np.abs(one).max()))


def test_heads_begin_like_those_of_torch():
    fresh = jax.jit(lambda: nnx.state(Linear([10], BINS, rngs=nnx.Rngs(0))))().conv
    bound = 1 / math.sqrt(10 * 9)
    for values in np.asarray(fresh.kernel[...]), np.asarray(fresh.bias[...]):
        assert 0.95 * bound < np.abs(values).max() <= bound
        assert abs(values.std() / (bound / math.sqrt(3)) - 1) < 0.1


@pytest.mark.parametrize("size", [(12, 16), (7, 9), (2, 3)])
@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
def test_resize(kernel, size):
    x = jnp.asarray(maps(1)[0])
    close(resize(x, size, kernel), F.interpolate(nchw(np.array(x)), size, mode=kernel))
    assert resize(x, x.shape[1:3], kernel) is x


def test_depth_of_bins_by_hand():
    chosen = np.full((1, 1, 3, BINS), -7.0, np.float32)
    chosen[0, 0, 1, 255] = 1e9
    chosen[0, 0, 2, :2] = 0.1, 0.3  # weights 0.2, 0.4 and 254 times 0.1
    bins = np.linspace(0.001, 10, BINS)
    expected = bins.mean(), 10, (0.1 * bins.sum() + 0.1 * bins[0] + 0.3 * bins[1]) / 26
    np.testing.assert_allclose(jax.jit(depth_of)(chosen)[0, 0], expected, rtol=1e-5)


def test_depth_of_bins_is_resized_after_it_is_averaged():
    logits = 3 * maps(1, BINS)[0]
    weights, bins = nchw(logits).relu() + 0.1, torch.linspace(0.001, 10, BINS)
    depth = torch.einsum("bkhw,k->bhw", weights, bins)[:, None] / weights.sum(1, keepdim=True)
    actual = jax.jit(depth_of, static_argnums=1)(logits, (7, 11))
    close(actual[..., None], F.interpolate(depth, (7, 11), mode="bilinear"))


def test_normals_and_kappa_are_resized_before_they_are_scaled():
    (raw,) = maps(1, 4)
    normals, kappa = jax.jit(normals_of, static_argnums=1)(raw, (7, 11))
    larger = F.interpolate(nchw(raw), (7, 11), mode="bicubic")
    close(normals, F.normalize(larger[:, :3]), 1e-4)
    close(np.asarray(kappa)[..., None], F.elu(larger[:, 3:]) + 1.01)


def test_normals_by_hand():
    raw = np.array([[[[0, 0, 0, 0], [0, -2, 0, -1e9], [1e-30, 0, 0, 2]]]], np.float32)
    normals, kappa = jax.jit(normals_of)(raw)
    np.testing.assert_allclose(normals[0, 0], [[0, 0, 0], [0, -1, 0], [0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(kappa[0, 0], [1.01, 0.01, 3.01], rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda raw: sum(x.sum() for x in normals_of(raw))))(raw)
    assert np.isfinite(gradient).all()


# Every loss is compiled once, for images of this shape; 13 pixels are what the coarsest gradient needs.
SHAPE = (3, 15, 14)
depth_value_and_gradient = jax.jit(jax.value_and_grad(depth_loss))
normal_value_and_gradients = jax.jit(jax.value_and_grad(normal_loss, (0, 1)))


@jax.jit
@jax.value_and_grad
def raw_normal_value_and_gradient(raw, target, valid):
    return normal_loss(*normals_of(raw), target, valid)


def depths() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    prediction, target = random.uniform(0.5, 9, (2, *SHAPE)).astype(np.float32)
    return prediction, target, random.random(SHAPE) < 0.8


def torch_depth_loss(prediction: torch.Tensor, target: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """By definition, one comparison at a time."""
    g = torch.log(prediction + 0.001) - torch.log(target + 0.001)
    inside = g[valid]
    loss = 10 * torch.sqrt((inside**2).mean() - 0.85 * inside.mean() ** 2)
    for stride in 1, 2, 4, 6:
        pairs = []
        for image, mask in zip(g[:, ::stride, ::stride].unbind(), valid[:, ::stride, ::stride].numpy()):
            for i, j in zip(*mask.nonzero()):
                for k, m in (i + 2, j), (i, j + 2):
                    if k < mask.shape[0] and m < mask.shape[1] and mask[k, m]:
                        pairs.append((image[i, j] - image[k, m]).abs())
        assert pairs
        loss = loss + 0.5 * torch.stack(pairs).sum() / valid[:, ::stride, ::stride].sum()
    return loss


def test_depth_loss_and_its_gradient():
    prediction, target, valid = depths()
    value, gradient = depth_value_and_gradient(prediction, target, valid)
    free = torch.from_numpy(prediction).double().requires_grad_()
    expected = torch_depth_loss(free, torch.from_numpy(target).double(), torch.from_numpy(valid))
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(gradient, free.grad, rtol=1e-3, atol=1e-6)


def test_depth_loss_by_hand():
    target = np.full(SHAPE, 2, np.float32)
    valid = np.zeros(SHAPE, bool)
    valid[0, :3, :3] = True
    everywhere = math.e * (target + 0.001) - 0.001
    actual, _ = depth_value_and_gradient(everywhere, target, valid)
    assert float(actual) == pytest.approx(10 * math.sqrt(0.15), rel=1e-5)

    corner = target.copy()
    corner[0, 0, 0] = everywhere[0, 0, 0]
    # g is 1 in the corner; it is compared with one pixel below and one to the right, at the first scale only
    actual, _ = depth_value_and_gradient(corner, target, valid)
    assert float(actual) == pytest.approx(10 * math.sqrt(1 / 9 - 0.85 / 81) + 0.5 * 2 / 9, rel=1e-5)


def test_depth_loss_compares_no_images_with_each_other():
    target, g = np.ones(SHAPE, np.float32), np.array([0, 1, 5], np.float32)[:, None, None]
    actual, _ = depth_value_and_gradient(np.exp(g) * (target + 0.001) - 0.001, target, np.ones(SHAPE, bool))
    assert float(actual) == pytest.approx(10 * math.sqrt(26 / 3 - 0.85 * 4), rel=1e-5)


def test_depth_loss_of_a_perfect_prediction_is_0_and_so_is_its_gradient():
    _, target, valid = depths()
    value, gradient = depth_value_and_gradient(target, target, valid)
    assert value == 0
    assert not gradient.any()


def normals() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    raw, target = (random.standard_normal((*SHAPE, n), np.float32) for n in (4, 3))
    raw[0, 0, :2, :3] = target[0, 0, :2] * [[2], [-3]]  # the truth and its opposite
    target[0, 0, 2] = 0
    valid = random.random(SHAPE) < 0.8
    valid[0, 0, :3] = True
    return raw, target, valid


def torch_normal_loss(raw: torch.Tensor, target: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    limit = 1 - 1e-4
    angle = torch.acos(torch.cosine_similarity(raw[..., :3], target, dim=-1).clamp(-limit, limit))
    kappa = F.elu(raw[..., 3]) + 1.01
    terms = torch.log(1 + torch.exp(-math.pi * kappa)) - torch.log(kappa**2 + 1) + kappa * angle
    return terms[valid].mean()


def test_normal_loss_and_its_gradient():
    raw, target, valid = normals()
    value, gradient = raw_normal_value_and_gradient(raw, target, valid)
    free = torch.from_numpy(raw).double().requires_grad_()
    expected = torch_normal_loss(free, torch.from_numpy(target).double(), torch.from_numpy(valid))
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(gradient, free.grad, rtol=1e-3, atol=1e-6)
    assert not gradient[0, 0, :3, :3].any()  # flat where right, where opposite and where the truth is no direction


def test_normal_loss_by_hand():
    prediction, target = np.zeros((2, *SHAPE, 3), np.float32)
    prediction[..., 1], target[..., 2] = 1, 5
    kappa, valid = np.full(SHAPE, 2, np.float32), np.zeros(SHAPE, bool)
    valid[1, 2, 3] = True
    actual, _ = normal_value_and_gradients(prediction, kappa, target, valid)
    assert float(actual) == pytest.approx(math.log(1 + math.exp(-2 * math.pi)) - math.log(5) + math.pi, rel=1e-6)


@pytest.mark.parametrize("other", [np.nan, np.inf, -5, 0])
def test_losses_ignore_what_is_not_valid(other):
    raw, target, valid = normals()
    length = np.linalg.norm(raw[..., :3], axis=-1, keepdims=True)
    unit, kappa = raw[..., :3] / length, length[..., 0]
    for loss, *arguments in (
        (depth_value_and_gradient, *depths()[:2]),
        (normal_value_and_gradients, unit, kappa, target),
    ):
        expected = jax.tree.leaves(loss(*arguments, valid))
        spoiled = [np.where(valid.reshape(SHAPE + (1,) * (x.ndim - 3)), x, np.float32(other)) for x in arguments]
        for one, another in zip(jax.tree.leaves(loss(*spoiled, valid)), expected):
            np.testing.assert_array_equal(one, another)
            assert np.isfinite(one).all()
        for actual in jax.tree.leaves(loss(*spoiled, np.zeros_like(valid))):
            assert not np.asarray(actual).any()


EPOCHS, STEPS = 6, 5


def torch_rates(name: str) -> list[float]:
    """What PyTorch's schedulers set the rate to, for every iteration."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=5e-4)
    cosine, warmup, total = torch.optim.lr_scheduler.CosineAnnealingLR, 1.5 * STEPS, EPOCHS * STEPS

    def factor(step: int) -> float:
        if step <= warmup:
            return 0.99 * step / warmup + 0.01
        return 0.99 * math.cos(math.pi / 2 * (step - warmup) / (total - warmup)) + 0.01

    scheduler, every = {
        "cosine_per_epoch": lambda: (cosine(optimizer, EPOCHS), STEPS),
        "cosine_per_iteration": lambda: (cosine(optimizer, total), 1),
        "warmup_cosine": lambda: (torch.optim.lr_scheduler.LambdaLR(optimizer, factor), 1),
        "constant": lambda: (torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), 1),
        "per_iteration_bug": lambda: (cosine(optimizer, EPOCHS), 1),
    }[name]()
    rates = []
    for iteration in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (iteration + 1) % every == 0:
            scheduler.step()
    return rates


@pytest.mark.parametrize(
    "name", ["cosine_per_epoch", "cosine_per_iteration", "warmup_cosine", "constant", "per_iteration_bug"]
)
def test_schedules(name):
    rate, expected = schedule(ProbeConfig(schedule=name, epochs=EPOCHS), STEPS), torch_rates(name)
    actual = jax.jit(jax.vmap(rate))(jnp.arange(EPOCHS * STEPS))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-10)
    assert float(rate(7)) == pytest.approx(expected[7], rel=1e-5)


def test_a_schedule_drives_optax():
    rate = schedule(ProbeConfig(schedule="warmup_cosine", epochs=EPOCHS), STEPS)
    optimizer = optax.sgd(rate)
    state = optimizer.init(jnp.ones(2))
    for step in range(2):
        update, state = jax.jit(optimizer.update)(jnp.ones(2), state)
        np.testing.assert_allclose(update, -rate(step), rtol=1e-6)


def test_schedules_after_the_end_and_far_out():
    names = "cosine_per_epoch", "cosine_per_iteration", "warmup_cosine", "per_iteration_bug"
    rates = [schedule(ProbeConfig(schedule=name, epochs=10), 1000) for name in names]
    np.testing.assert_allclose([rate(12_000) for rate in rates], [0, 0, 5e-6, 5e-4], rtol=1e-5, atol=1e-10)
    assert float(rates[-1](20 * 49_999 + 5)) == pytest.approx(2.5e-4)  # a quarter of a period


def test_a_schedule_without_a_warm_up_begins_at_the_peak_and_one_that_only_warms_up_is_refused():
    config = ProbeConfig(schedule="warmup_cosine", warmup_epochs=0.0, epochs=2)
    assert float(schedule(config, 10)(0)) == pytest.approx(5e-4)
    with pytest.raises(ValueError, match=r"probe\.warmup_epochs=2\.0"):
        schedule(ProbeConfig(schedule="warmup_cosine", warmup_epochs=2.0, epochs=2), 10)
    with pytest.raises(ValueError, match="steps_per_epoch=0"):
        schedule(config, 0)
