"""Runs of the other upsamplers: their objectives, resuming, what they leave, and what is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import skimage.data
import torch
from flax import nnx

import anyup_jax
from anyup_core.settings import from_dict, to_dict
from anyup_core.upsamplers import sources
from anyup_jax import upsamplers
from convert.training_state import TrainingState
from tests.training import configured, losses, same
from train import featup, loop, models, optim, others
from train.config import Config, EncoderConfig, OptimizerConfig
from train.encoders import check_sizes, step_sizes
from train.upsamplers import FeatUpModel, JAFARModel, NAFModel

SMALL = (
    "dtype=float32", "encoders.lite0.layer=[2]", "log.every=1",
    "log.pictures_every=0", "log.tensorboard=false", "batch_size=2", "dataset.crop_size=32", "dataset.img_size=16",
    "checkpoint.every=2", "optimizer.learning_rate=3e-3",
)  # fmt: skip
"""Stride 8 of EfficientNet-Lite0 on 32 pixels, or 64 for NAF."""
MODELS = {
    "jafar": ("model.qk_dim=16", "model.num_heads=2"),
    "naf": ("model.dim=32", "model.kernel_size=3", "model.rope_heads=2", "dataset.crop_size=64"),
    "featup": ("optimizer.clip_steps=2",),
}
CHANNELS = 40


def small(name: str, *words: str) -> Config:
    return configured(f"model={name}", *SMALL, *MODELS[name], *words)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Six steps of each: of JAFAR and FeatUp without interruption."""
    folders = {name: tmp_path_factory.mktemp(name) / "run" for name in MODELS}
    for name, folder in folders.items():
        assert loop.run(small(name, f"output_dir={folder}", "max_steps=6")) == 0
    return folders


@pytest.mark.parametrize("name", MODELS)
def test_the_losses_are_finite(name: str, runs: dict[str, Path]) -> None:
    values = losses(runs[name])
    assert np.isfinite(values).all()
    if name == "featup":  # what six steps on several photographs gain is less than these differ by, for the others
        assert np.mean(values[3:]) < np.mean(values[:3])


@pytest.mark.parametrize("name", ["jafar", "naf"])
def test_the_loss_of_a_batch_falls(name: str) -> None:
    """Steps on the same photograph, whose features are colours: how well these are placed is up to the queries."""
    settings = models.settings(small(name), {"lite0": models.describe(small(name).encoders["lite0"])})
    model = upsamplers.pretrained.model_class(name)(settings, rngs=nnx.Rngs(0))
    image = jnp.asarray(skimage.data.astronaut()[None, :256:4, 128:384:4] / np.float32(255))
    colours = jnp.tile(2 * image - 1, CHANNELS // 3 + 1)[..., :CHANNELS]
    target, low = (colours.reshape(1, n, 64 // n, n, 64 // n, CHANNELS).mean((2, 4)) for n in (16, 8))
    keys = jax.random.split(jax.random.key(0), 1)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    step = optax.adam(3e-3)

    def loss(params):
        model = nnx.merge(graph, params, rest)
        key = keys if name == "jafar" else keys[0]
        return sum(getattr(others, name)(model, image, (32, 32), low, target, key).values())

    @jax.jit
    def advance(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        change, state = step.update(gradient, state)
        return optax.apply_updates(params, change), state, value

    state, values = step.init(params), []
    for _ in range(25):
        params, state, value = advance(params, state)
        values.append(float(value))
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_run_is_loaded_by_its_own_name(name: str, runs: dict[str, Path]) -> None:
    model = upsamplers.from_pretrained(name, runs[name])
    assert model.channels == (None if name == "naf" else CHANNELS)
    assert models.settings(small(name)) == model.config
    random = np.random.default_rng(0)
    image, features = (random.standard_normal((1, *shape), np.float32) for shape in ((32, 32, 3), (4, 4, CHANNELS)))
    assert np.isfinite(model(image, features, (8, 8))).all()


@pytest.mark.parametrize("name", MODELS)
def test_a_run_is_refused_by_another_name(name: str, runs: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=name):
        anyup_jax.from_pretrained(runs[name])
    with pytest.raises(ValueError, match=name):
        upsamplers.from_pretrained("loftup", runs[name])
    with pytest.raises(ValueError, match=f"--upsampler {name}"):
        TrainingState.from_run(runs[name])


def test_it_resumes_bit_for_bit(runs: dict[str, Path], tmp_path: Path) -> None:
    """FeatUp, which has most to restore: the downsampler and the scales."""
    again = tmp_path / "run"
    shutil.copytree(runs["featup"], again)
    shutil.rmtree(again / "checkpoints" / "6")
    assert loop.run(small("featup", f"output_dir={again}", "max_steps=6")) == 0
    assert losses(again) == losses(runs["featup"])
    there, here = (sources.read("featup", run) for run in (runs["featup"], again))
    assert same(there.tensors, here.tensors)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("model=loftup",), "model='loftup'"),
        (("model=jafar", "loss.outlines=1"), "loss.outlines=1.0"),
        (("model=naf", "dataset.pasted_regions=2"), "dataset.pasted_regions=2"),
        (("model=jafar", "features.shares=[0.5]"), "features.shares=(0.5,)"),
        (("model=naf", "dataset.num_local_crops=2"), "dataset.num_local_crops=2"),
        (("model=naf", "remat=true"), "remat=True"),
        (("model=featup", "dataset.global_view_random_resize=[0.5,1]"), "dataset.global_view_random_resize=(0.5, 1.0)"),
        (("model=jafar", "model.qk_dim=12"), "qk_dim=12"),
        (("model=jafar", "+model.window_ratio=1"), "model.window_ratio"),
    ],
)
def test_what_a_recipe_does_not_have_is_refused_by_name(words: tuple[str, ...], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        configured(*words)


def test_encoders_that_do_not_fit_are_refused_by_name() -> None:
    two = {"a": EncoderConfig(name="efficientnet_lite0"), "b": EncoderConfig(name="vit_small_patch16_224")}
    for model in (JAFARModel(), FeatUpModel()):
        with pytest.raises(ValueError, match=r"a and b differ in their width"):
            models.settings(Config(model=model, encoders=two))
    assert models.settings(Config(model=NAFModel(), encoders=two)).dim == 256
    timm = {"a": EncoderConfig(name="timm:resnet18")}
    with pytest.raises(ValueError, match=r"timm:resnet18"):
        models.settings(Config(model=FeatUpModel(), encoders=timm))
    one = {"a": two["a"]}
    with pytest.raises(ValueError, match=r"model\.channels=7"):
        models.settings(Config(model=JAFARModel(channels=7), encoders=one))
    config = configured("model=naf", "dataset.crop_size=128", "dataset.img_size=64")
    with pytest.raises(ValueError, match="kernel_size"):
        check_sizes("lite0", 16, config, models.settings(config))


@pytest.mark.parametrize("name", MODELS)
def test_the_model_group_alone_is_a_run(name: str) -> None:
    for config in (configured(f"model={name}"), configured(f"+experiment={name}")):
        assert from_dict(Config, to_dict(config)) == config
        assert config.model.upsampler == name
        if config.encoders.keys() == {"lite0"}:
            check_sizes("lite0", 16, config, models.settings(config))
    assert config.optimizer.kind == ("nadam" if name == "featup" else "adamw")


def test_sizes_of_the_recipes() -> None:
    jafar = configured("+experiment=jafar")
    sizes = [step_sizes(jafar, 14, step) for step in range(40)]
    assert {x.guidance for x in sizes} == {(224, 224)}
    assert {x.whole[0] // 14 for x in sizes} <= set(range(8, 17))
    assert len({x.whole for x in sizes}) > 4
    naf, featup_sizes = (step_sizes(configured(f"+experiment={name}"), 16, 0) for name in ("naf", "featup"))
    assert (naf.whole, naf.cells, naf.guidance) == ((256, 256), (32, 32), (128, 128))
    assert featup_sizes.guidance == (224, 224)


def test_nadam_is_that_of_pytorch() -> None:
    config = OptimizerConfig(kind="nadam", learning_rate=1e-2, weight_decay=0.0)
    start = np.linspace(-1, 1, 5, dtype=np.float32)
    weight = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.NAdam([weight], lr=1e-2)
    ours, state = jnp.asarray(start), optim.init(config, jnp.asarray(start))
    for step in range(12):
        gradient = np.cos(start * (step + 1)).astype(np.float32)
        weight.grad = torch.tensor(gradient)
        theirs.step()
        ours, state = optim.update(config, 1e-2, jnp.asarray(gradient), jnp.ones(()), state, ours)
    np.testing.assert_allclose(ours, weight.detach().numpy(), atol=2e-6)


def test_only_the_first_steps_are_clipped() -> None:
    config = OptimizerConfig(clip_norm=0.5, clip_steps=1)
    weight, gradient = jnp.zeros(1), jnp.ones(1)
    _, first = optim.update(config, 0.1, gradient, jnp.ones(()), optim.init(config, weight), weight)
    _, second = optim.update(config, 0.1, gradient, jnp.ones(()), first, weight)
    assert float(first.mu[0]) == pytest.approx(0.05)
    assert float(second.mu[0]) == pytest.approx(0.9 * 0.05 + 0.1)
    assert optax.tree.get(second, "count") == 2


def test_a_jitter_without_zoom_is_a_crop_of_the_reflected_image() -> None:
    keys = jax.random.split(jax.random.key(0), 16)
    jitter = featup.Jitter.draw(keys, (24, 24))
    image = np.random.default_rng(0).random((24, 24, 1), np.float32)
    padded = np.pad(image, [(20, 20), (20, 20), (0, 0)], mode="reflect")
    jittered = np.asarray(jitter(jnp.asarray(np.broadcast_to(image, (16, 24, 24, 1)))))
    crops = np.lib.stride_tricks.sliding_window_view(padded[..., 0], (24, 24))
    exact = 0
    for x in jittered[..., 0]:
        errors = [np.abs(crops - flipped).max((2, 3)).min() for flipped in (x, x[:, ::-1])]
        exact += min(errors) < 1e-5
    assert 3 <= exact <= 13
    np.testing.assert_allclose(jitter.rows.sum(-1), 1, rtol=1e-5)


def test_the_parts_of_featup() -> None:
    x = np.random.default_rng(0).random((2, 16, 16, 8), np.float32)
    blurred = featup.blur(jnp.asarray(x))
    kernel = np.exp(-0.5 * np.arange(-2, 3) ** 2)
    around = np.pad(x, [(0, 0), (2, 2), (2, 2), (0, 0)], mode="reflect")[:, 5:10, 7:12]
    expected = np.einsum("byxc,y,x->bc", around, kernel, kernel) / kernel.sum() ** 2
    np.testing.assert_allclose(blurred[:, 5, 7], expected, rtol=1e-5)
    keys = jax.random.split(jax.random.key(0), 2)
    np.testing.assert_allclose(jnp.square(featup.directions(keys, 8)).sum(1), 1, rtol=1e-5)
    assert float(featup.crf(jnp.asarray(x[..., :3]), jnp.ones((2, 16, 16, 4)), keys)) == pytest.approx(0, abs=1e-5)
    distances = np.square(x[0, 0, :, None] - x[0, 0, None]).sum(-1)
    np.testing.assert_allclose(featup.squares(jnp.asarray(x[0, 0])), distances, atol=1e-5)


def test_features_may_be_projected_before_they_are_downsampled() -> None:
    """What FeatUp's training compares: jittered, blurred, averaged by an attention to all channels, then projected."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((2, 24, 24, 8), np.float32))
    kept = jnp.asarray(random.random((2, 3, 3)) > 0.2, jnp.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    helpers, project = featup.Helpers(8, 8, rngs=nnx.Rngs(0)), featup.directions(keys, 8)
    jitter = featup.Jitter.draw(keys, (24, 24))
    patches = featup.blur(jitter(x)).reshape(2, 3, 8, 3, 8, 8).swapaxes(2, 3).reshape(2, 3, 3, 64, 8)
    logits = helpers.logit(patches.reshape(2, 9, 64, 8)).reshape(2, 3, 3, 64)
    attention = jax.nn.softmax(logits * kept[..., None] * helpers.weight[...].ravel() + helpers.bias[...].ravel())
    expected = others.directed(jnp.einsum("bhwp,bhwpc->bhwc", attention, patches), project)
    actual = helpers.downsample(jitter(others.directed(x, project)), jitter(helpers.logit(x)), kept)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_noise_is_of_each_photograph_and_clamped() -> None:
    keys = others.photograph_keys(jnp.asarray(np.random.default_rng(0).random((24, 1, 2), np.float32)), 0)
    guidance = jnp.asarray(np.random.default_rng(1).standard_normal((24, 8, 8, 3)).astype(np.float32))
    noisy = np.asarray(others.noised(guidance, keys))
    assert (noisy.min(), noisy.max()) >= (0, 0)
    assert noisy.max() <= 1
    alone = np.asarray(others.noised(guidance[3:4], keys[3:4]))
    np.testing.assert_array_equal(alone[0], noisy[3])
    unchanged = (np.abs(noisy - np.clip(guidance, 0, 1)).max((1, 2, 3)) == 0).sum()
    assert 2 <= unchanged <= 16
