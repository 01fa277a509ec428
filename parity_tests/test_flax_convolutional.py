"""ResNet and ConvNeXt in Flax against timm: blocks, maps, gradients, key tables, catalogue."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
from flax import nnx

from anyup_core.checkpoints.encoder_checkpoint import EncoderCheckpoint, present, table
from anyup_core.encoders import catalogue
from anyup_jax.encoders import creation, encoder
from anyup_jax.encoders.layers import run
from anyup_torch import encoders as torch_encoders
from parity_tests import tolerances

FAMILIES = catalogue.RESNET | catalogue.CONVNEXT
NAMES = ("resnet50", "convnext_tiny")


def random_model(name: str, **options) -> torch.nn.Module:
    """timm's model; nothing in it is 0 or 1, and the maps keep their size from block to block."""
    model = timm.create_model(name, **options).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for key, weight in model.state_dict().items():
        if weight.ndim > 1:
            weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
        elif key.endswith("gamma"):
            weight.uniform_(-0.5, 0.5, generator=generator)
        elif key.endswith(("weight", "running_var")):
            weight.uniform_(0.7, 1.5, generator=generator)
        elif key.endswith(("bias", "running_mean")):
            weight.normal_(0, 0.3, generator=generator)
        else:
            weight.fill_(1234)
    return model


def numpy_state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in model.state_dict().items()}


def nchw(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    return tensor.permute(0, 2, 3, 1).numpy()


def check(ours, theirs, allowed: float = tolerances.BACKBONE) -> None:
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= allowed * np.abs(theirs).max()


def random_map(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


@functools.cache
def pair(name: str) -> tuple[torch.nn.Module, encoder.Encoder]:
    """The same weights in timm and in Flax."""
    theirs = random_model(name)
    return theirs, creation.build(EncoderCheckpoint(name, numpy_state(theirs)))


def test_blocks_of_resnet():
    theirs, ours = pair("resnet50")
    image = random_map(2, 37, 26, 3)
    check(jax.nn.relu(ours.backbone.stem(image)), nhwc(theirs.act1(theirs.bn1(theirs.conv1(nchw(image))))))
    for i, stage in enumerate(ours.backbone.stages):
        blocks = getattr(theirs, f"layer{i + 1}")
        cells = random_map(2, 9, 6, blocks[0].conv1.in_channels)
        check(jax.jit(stage.first)(cells, stage.shortcut(cells)), nhwc(blocks[0](nchw(cells))))
        cells = random_map(2, 9, 6, ours.backbone.config.widths[i + 1])
        for j in range(1, len(blocks)):
            check(run(stage.others, cells, j - 1, j), nhwc(blocks[j](nchw(cells))))


def test_blocks_of_convnext():
    theirs, ours = pair("convnext_tiny")
    image = random_map(2, 36, 28, 3)
    check(ours.backbone.stem_norm(ours.backbone.stem(image)), nhwc(theirs.stem(nchw(image))))
    for i, stage in enumerate(ours.backbone.stages):
        if i:
            cells = random_map(2, 8, 6, ours.backbone.config.widths[i - 1])
            check(stage.reduce(stage.norm(cells)), nhwc(theirs.stages[i].downsample(nchw(cells))))
        cells = random_map(2, 9, 6, ours.backbone.config.widths[i])
        for j, block in enumerate(theirs.stages[i].blocks):
            check(run(stage.blocks, cells, j, j + 1), nhwc(block(nchw(cells))))


@pytest.mark.parametrize(
    ("size", "chosen", "norm"),
    [
        ((224, 224), -1, True),
        ((96, 160), -1, True),
        ((96, 64), (-2, 2), False),
        ((83, 50), 1, True),
        ((40, 33), 0, True),
    ],
    ids=["native", "non-square", "two-layers-without-norm", "padded", "first-layer"],
)
@pytest.mark.parametrize("name", NAMES)
def test_maps(name, size, chosen, norm):
    if chosen == (-2, 2) and name == "resnet50":
        chosen = (-2, 3)  # it has five layers
    theirs, ours = pair(name)
    image = random_map(2, *size, 3)
    theirs = torch_encoders.Encoder(theirs, name=name, layer=chosen, norm=norm)
    ours = encoder.Encoder(ours.backbone, catalogue.find(name), layer=chosen, norm=norm)
    assert (ours.stride, ours.channels, ours.layers) == (theirs.stride, theirs.channels, theirs.layers)
    assert (ours.mean, ours.std, ours.prefix_tokens) == (theirs.mean, theirs.std, theirs.prefix_tokens)
    check(ours(jnp.asarray(image)), nhwc(theirs(nchw(image))))


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_the_image(name, remat):
    theirs, _ = pair(name)
    backbone = creation.build(EncoderCheckpoint(name, numpy_state(theirs)), remat=remat).backbone
    image, layer = random_map(2, 32, 64, 3), len(backbone.config.strides) - 3  # stride 8
    weight = random_map(2, 4, 8, backbone.config.widths[layer])
    pixels = nchw(image).requires_grad_(True)
    features = theirs.forward_intermediates(pixels, indices=[layer], intermediates_only=True, stop_early=True)[0]
    (features * nchw(weight)).sum().backward()
    apply = lambda x: backbone.intermediates(x, (layer,), True)[0][0]  # noqa: E731
    (gradient,) = jax.jit(lambda x: jax.vjp(apply, x)[1](weight))(image)
    check(gradient, nhwc(pixels.grad), tolerances.GRADIENT)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name):
    theirs, _ = pair(name)
    narrow = creation.build(EncoderCheckpoint(name, numpy_state(theirs)), dtype=jnp.bfloat16, layer=1)
    image = random_map(2, 64, 64, 3)
    features = narrow(jnp.asarray(image))
    assert features.dtype == jnp.bfloat16
    expected = theirs.forward_intermediates(nchw(image), indices=[1], intermediates_only=True, stop_early=True)[0]
    check(features, nhwc(expected), 0.05)


@pytest.mark.parametrize("classes", [0, 7])
@pytest.mark.parametrize("name", FAMILIES)
def test_table_is_total(name, classes):
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=classes).state_dict()
    rows = present(table(FAMILIES[name].config), state)
    expected = {key: row for row in rows for key in row.keys}
    assert set(expected) == set(state)
    assert len(expected) == sum(len(row.keys) for row in rows)
    for key, row in expected.items():
        assert tuple(classes if size is None else size for size in row.shape) == tuple(state[key].shape), key
        assert state[key].is_floating_point() != row.integer


@pytest.mark.parametrize("name", FAMILIES)
def test_table_fills_the_module(name):
    config = FAMILIES[name].config
    state = nnx.state(nnx.eval_shape(lambda: creation.backbone(config, jnp.float32, False, 0)))
    held = {".".join(map(str, path)): variable.get_value().shape for path, variable in nnx.to_flat_state(state)}
    assert {row.flax: row.flax_shape for row in table(config) if not row.carried} == held


@pytest.mark.parametrize("name", NAMES)
def test_conversion_loses_nothing(name):
    tensors = numpy_state(random_model(name, num_classes=7))
    back = EncoderCheckpoint.from_flax(name, EncoderCheckpoint(name, tensors).flax()).tensors
    assert set(back) == set(tensors)
    for key, tensor in tensors.items():
        assert (back[key].dtype, back[key].shape) == (tensor.dtype, tensor.shape)
        assert back[key].tobytes() == tensor.tobytes(), key


@pytest.mark.parametrize("name", FAMILIES)
def test_catalogue_is_timms(name):
    entry = FAMILIES[name]
    assert {f"{name}.{tag}" for tag in entry.tags} == set(timm.list_pretrained(f"{name}.*"))
    assert next(iter(entry.tags)) == timm.get_pretrained_cfg(name).tag
    for tag, preprocessing in entry.tags.items():
        published = timm.get_pretrained_cfg(f"{name}.{tag}")
        assert preprocessing == (published.mean, published.std)
    assert timm.get_pretrained_cfg(name).input_size == (3, entry.config.image_size, entry.config.image_size)


@pytest.mark.parametrize("name", FAMILIES)
def test_configuration_is_timms(name):
    config = FAMILIES[name].config
    with torch.device("meta"):
        model = timm.create_model(name)
    assert config.strides == tuple(info["reduction"] for info in model.feature_info)
    assert config.widths == tuple(info["num_chs"] for info in model.feature_info)
    assert (config.prefix_tokens, config.class_tokens) == (0, 0)


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        catalogue.RESNET["resnet50"].config.depths = (1, 1, 1, 1)
