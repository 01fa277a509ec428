"""DINOv3 in Flax against timm: rotary angles, blocks, maps, class tokens, gradients, key tables, catalogue."""

from __future__ import annotations

import contextlib
import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from flax import nnx
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3

from anyup_core.checkpoints.encoder_checkpoint import EncoderCheckpoint, present, table
from anyup_core.encoders import catalogue
from anyup_core.encoders.dinov3 import DINOv3
from anyup_jax.encoders import creation, encoder, layers
from anyup_jax.encoders.dinov3 import rotations
from anyup_torch.encoders import Encoder
from parity_tests import tolerances

MODELS = [  # and the number of blocks, where it is not the model's own
    ("vit_tiny_patch16_dinov3_qkvb", None),
    ("vit_small_patch16_dinov3", 3),
    ("vit_small_plus_patch16_dinov3", None),
    ("vit_base_patch16_dinov3_qkvb", 2),
    ("vit_large_patch16_dinov3", 2),
    ("vit_huge_plus_patch16_dinov3_qkvb", 2),
    ("vit_tiny_patch16_dinov3_qkvb", 32),  # as deep as the deepest of the family
]


def random_model(name: str, depth: int | None, **options) -> torch.nn.Module:
    """timm's model; nothing in it is 0 or 1, its layers matter, and its attention is far from uniform."""
    model = timm.create_model(name, **options, **({"depth": depth} if depth else {})).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for key, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.normal_(0.3 if "gamma" in key else 0.8 if "norm" in key else 0, 0.2, generator=generator)
        else:
            gain = 2 if "qkv" in key else 1
            fan_in = 1 if "token" in key else weight[0].numel()
            weight.normal_(0, gain / fan_in**0.5, generator=generator)
    return model


def with_depth(name: str, depth: int | None) -> contextlib.AbstractContextManager:
    """Within it, the architecture of this name has so many blocks."""
    entry = catalogue.ARCHITECTURES[name]
    config = dataclasses.replace(entry.config, depth=depth or entry.config.depth)
    return mock.patch.dict(catalogue.ARCHITECTURES, {name: dataclasses.replace(entry, config=config)})


def numpy_state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in model.state_dict().items()}


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same weights in timm and in Flax."""

    published: catalogue.Published
    theirs: torch.nn.Module
    backbone: nnx.Module

    def check(self, ours, theirs) -> None:
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= tolerances.BACKBONE * np.abs(theirs).max()


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: "-".join(str(part) for part in model if part))
def pair(request) -> Pair:
    name, depth = request.param
    theirs = random_model(name, depth)
    with with_depth(name, depth):
        checkpoint = EncoderCheckpoint(name, numpy_state(theirs))
    return Pair(checkpoint.published, theirs, creation.build(checkpoint).backbone)


def random_image(*size: int) -> np.ndarray:
    return np.random.default_rng(sum(size)).standard_normal((2, *size, 3), dtype=np.float32)


def nchw(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize("head_size", [64, 32])
@pytest.mark.parametrize("grid", [(16, 16), (6, 13), (1, 1), (1, 9), (40, 31)])
def test_rotations(grid, head_size):
    cos, sin = rotations(*grid, head_size, prefix=5)
    assert cos.shape == sin.shape == (5 + grid[0] * grid[1], head_size // 2)
    assert cos.dtype == sin.dtype == np.float32
    assert (cos[:5] == 1).all()
    assert (sin[:5] == 0).all()
    embedded = RotaryEmbeddingDinoV3(head_size, temperature=100).get_embed(grid).numpy()
    for ours, theirs in (sin, embedded[:, :head_size]), (cos, embedded[:, head_size:]):
        np.testing.assert_array_equal(theirs[:, : head_size // 2], theirs[:, head_size // 2 :])
        assert np.abs(ours[5:] - theirs[:, : head_size // 2]).max() <= 1e-6  # angles up to 2 pi, float32


def test_block(pair):
    grid = (6, 13)
    width = pair.theirs.embed_dim
    tokens = np.random.default_rng(0).standard_normal((2, 5 + grid[0] * grid[1], width), dtype=np.float32)
    rotation = rotations(*grid, width // pair.published.config.num_heads, prefix=5)
    i = pair.published.config.depth - 1
    ours = jax.jit(lambda x: layers.run(pair.backbone.blocks, x, i, i + 1, context=rotation))(tokens)
    pair.check(ours, pair.theirs.blocks[i](torch.from_numpy(tokens), rope=pair.theirs.rope.get_embed(grid)))


@pytest.mark.parametrize(
    ("size", "chosen", "norm"),
    [((256, 256), (-1,), True), ((96, 208), (-1, 0), False), ((83, 50), (1,), True)],
    ids=["native", "two-layers-without-norm", "padded-early"],
)
def test_maps_and_class_token(pair, size, chosen, norm):
    image = random_image(*size)
    theirs = Encoder(pair.theirs, name=pair.published.name, layer=chosen, norm=norm)
    ours = encoder.Encoder(pair.backbone, pair.published, layer=chosen, norm=norm, class_token=True)
    features, class_token = ours(jnp.asarray(image))
    expected = theirs(nchw(image)).permute(0, 2, 3, 1)
    padded = F.pad(nchw(image), (0, -size[1] % 16, 0, -size[0] % 16))
    options = dict(indices=sorted(theirs.layers), norm=norm, return_prefix_tokens=True, intermediates_only=True)
    prefix = dict(zip(options["indices"], pair.theirs.forward_intermediates(padded, **options)))
    width = pair.theirs.embed_dim
    for i, layer in enumerate(theirs.layers):
        part = slice(i * width, (i + 1) * width)
        pair.check(features[..., part], expected[..., part])
        pair.check(class_token[:, part], prefix[layer][1][:, 0])
    assert features.shape == expected.shape
    assert class_token.shape == (2, len(chosen) * width)


@pytest.mark.parametrize("remat", [False, True])
def test_gradient_of_the_image(remat):
    name = "vit_small_plus_patch16_dinov3_qkvb"
    theirs = random_model(name, 2)
    with with_depth(name, 2):
        backbone = creation.build(EncoderCheckpoint(name, numpy_state(theirs)), remat=remat).backbone
    image = random_image(32, 48)
    weight = np.random.default_rng(1).standard_normal((2, 2, 3, 384), dtype=np.float32)
    pixels = nchw(image).requires_grad_(True)
    features = theirs.forward_intermediates(pixels, indices=1, norm=True, intermediates_only=True)[0]
    (features * nchw(weight)).sum().backward()
    (ours,) = jax.jit(lambda x: jax.vjp(lambda x: backbone.intermediates(x, (1,), True)[0][0], x)[1](weight))(image)
    expected = pixels.grad.permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - expected).max() <= tolerances.GRADIENT * np.abs(expected).max()


@pytest.mark.parametrize("classes", [0, 7])
@pytest.mark.parametrize("name", catalogue.DINOV3)
def test_table_is_total(name, classes):
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=classes).state_dict()
    rows = present(table(catalogue.DINOV3[name].config), state)
    expected = {key: row.shape for row in rows for key in row.keys}
    assert expected.keys() == state.keys()
    assert len(expected) == sum(len(row.keys) for row in rows)
    for key, shape in expected.items():
        assert tuple(classes if size is None else size for size in shape) == tuple(state[key].shape), key
        assert state[key].is_floating_point()


@pytest.mark.parametrize("name", catalogue.DINOV3)
def test_table_fills_the_module(name):
    config = catalogue.DINOV3[name].config
    state = nnx.state(nnx.eval_shape(lambda: creation.backbone(config, jnp.float32, False, 0)))
    held = {".".join(map(str, path)): variable.get_value().shape for path, variable in nnx.to_flat_state(state)}
    filled = {}
    for row in table(config):
        if not row.carried:
            shape = row.op.to_flax(np.broadcast_to(np.float32(0), row.shape)).shape
            filled[row.flax] = (row.stack, *shape) if row.stack else shape
    assert filled == held


@pytest.mark.parametrize(
    ("name", "classes"), [*((name, 7) for name in catalogue.DINOV3), ("vit_small_patch16_dinov3", 0)]
)
def test_conversion_loses_nothing(name, classes):
    tensors = numpy_state(random_model(name, 2, num_classes=classes))
    with with_depth(name, 2):
        back = EncoderCheckpoint.from_flax(name, EncoderCheckpoint(name, tensors).flax()).tensors
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert back[key].dtype == tensor.dtype
        assert back[key].shape == tensor.shape
        assert back[key].tobytes() == tensor.tobytes(), key


def test_biases_of_the_other_form_are_refused():
    tensors = numpy_state(random_model("vit_tiny_patch16_dinov3_qkvb", 1))
    with with_depth("vit_tiny_patch16_dinov3_qkvb", 1), pytest.raises(ValueError, match="attn\\.q_bias") as error:
        EncoderCheckpoint("vit_tiny_patch16_dinov3_qkvb", {k: v for k, v in tensors.items() if "_bias" not in k})
    assert "missing: blocks.0.attn.v_bias (192)" in str(error.value)


def test_catalogue_is_timms():
    smaller = {name for name in timm.list_models("vit_*_dinov3*") if "_7b_" not in name}
    assert catalogue.DINOV3.keys() == smaller
    for name, entry in catalogue.DINOV3.items():
        assert {f"{name}.{tag}" for tag in entry.tags} == set(timm.list_pretrained(f"{name}.*"))
        assert next(iter(entry.tags)) == timm.get_pretrained_cfg(name).tag
        for tag, preprocessing in entry.tags.items():
            published = timm.get_pretrained_cfg(f"{name}.{tag}")
            assert preprocessing == (published.mean, published.std)
            assert published.input_size == (3, entry.config.image_size, entry.config.image_size)


@pytest.mark.parametrize("name", catalogue.DINOV3)
def test_configuration_is_timms(name):
    config = catalogue.DINOV3[name].config
    with torch.device("meta"):
        model = timm.create_model(name)
    theirs = Encoder(model, name=name)
    assert config.strides == (theirs.stride,) * len(model.blocks)
    assert config.widths == (theirs.channels,) * len(model.blocks)
    assert (config.prefix_tokens, config.class_tokens) == (theirs.prefix_tokens, 1)
    assert config.num_heads == model.blocks[0].attn.num_heads


def test_heads_that_cannot_rotate_are_refused():
    with pytest.raises(ValueError, match="multiple of 4 \\* num_heads = 12"):
        DINOv3(width=30, depth=1, num_heads=3)
