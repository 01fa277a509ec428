"""Vision transformers in Flax against timm: position embeddings, blocks, maps, class tokens, key tables, catalogue."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from flax import nnx
from timm.layers import GELUTanh, GluMlp, QuickGELU, resample_abs_pos_embed
from torch import nn

from anyup_core.checkpoints.encoder_checkpoint import EncoderCheckpoint, present, table
from anyup_core.encoders import catalogue
from anyup_core.encoders import vit as sizes
from anyup_core.encoders.vit import ViT
from anyup_jax.encoders import creation, encoder, layers, position, vit
from anyup_torch.encoders import Encoder
from parity_tests import tolerances

MODELS = [  # and the number of blocks, where it is not the model's own
    ("vit_tiny_patch16_224", None),
    ("vit_tiny_patch16_224", 40),  # as deep as the deepest of the family
    ("vit_small_patch14_dinov2", 4),
    ("vit_small_patch14_reg4_dinov2", 2),
    ("vit_giant_patch14_reg4_dinov2", 1),
    ("deit3_small_patch16_384", 3),
    ("vit_base_patch16_clip_224", 2),
    ("vit_base_patch16_clip_quickgelu_224", 2),
    ("vit_base_patch16_siglip_224", 2),
    ("vit_so400m_patch14_siglip_384", 1),  # 384 is no multiple of 14
    ("vit_so400m_patch16_siglip_gap_256", 1),
]


def random_model(name: str, depth: int | None, **options) -> torch.nn.Module:
    """timm's model; nothing in it is 0 or 1, its layers matter, and its attention is far from uniform."""
    options = dict(dynamic_img_size=True) | options | ({"depth": depth} if depth else {})
    model = timm.create_model(name, **options).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for key, weight in model.named_parameters():
        if weight.ndim == 1:
            mean = 0.3 if "gamma" in key else 0.8 if "norm" in key else 0
            weight.normal_(mean, 0.2, generator=generator)
        else:
            gain = 2 if "qkv" in key else 1
            fan_in = 1 if key in ("cls_token", "reg_token", "pos_embed") else weight[0].numel()
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

    def run(self, function: Callable, *inputs) -> jax.Array:
        """Compile a function of the Flax backbone, the weights being no constants of the program."""
        graph, state = nnx.split(self.backbone)
        return jax.jit(lambda state, *inputs: function(nnx.merge(graph, state), *inputs))(state, *inputs)


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: "-".join(str(part) for part in model if part))
def pair(request) -> Pair:
    name, depth = request.param
    theirs = random_model(name, depth)
    with with_depth(name, depth):
        checkpoint = EncoderCheckpoint(name, numpy_state(theirs))
    return Pair(checkpoint.published, theirs, creation.build(checkpoint).backbone)


def random_image(batch: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height + width).standard_normal((batch, height, width, 3), dtype=np.float32)


def nchw(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize("size", [1, 2, 14, 16, 27, 37])
def test_resampling_weights(size):
    for new_size in {*range(1, 65), 91, 128}:
        cells = torch.eye(size)[None, :, None]
        theirs = F.interpolate(cells, (1, new_size), mode="bicubic", antialias=True)[0, :, 0].T
        ours = position.weights(size, new_size)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6, err_msg=str(new_size))
        np.testing.assert_allclose(ours.sum(1), 1, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(position.weights(size, size), np.eye(size))


@pytest.mark.parametrize(
    ("old", "new"),
    [((37, 37), (16, 16)), ((37, 37), (9, 20)), ((14, 14), (32, 14)), ((14, 14), (61, 5)), ((9, 23), (20, 7))],
)
def test_resampled_embeddings(old, new):
    table = np.random.default_rng(0).standard_normal((*old, 32), dtype=np.float32)
    flat = torch.from_numpy(table.reshape(1, -1, 32))
    theirs = resample_abs_pos_embed(flat, new_size=list(new), old_size=list(old), num_prefix_tokens=0)
    ours = np.asarray(position.resample(jnp.asarray(table), *new))
    assert np.abs(ours.reshape(1, -1, 32) - theirs.numpy()).max() <= 1e-6 * np.abs(table).max()


def test_embeddings_of_the_native_grid_stay():
    table = jnp.asarray(np.random.default_rng(0).standard_normal((14, 14, 8), dtype=np.float32))
    assert position.resample(table, 14, 14) is table


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("gelu", nn.GELU()), ("gelu_tanh", nn.GELU("tanh")), ("quick_gelu", QuickGELU())],
)
def test_activations(name, theirs):
    x = np.linspace(-12, 12, 100_001, dtype=np.float32)
    ours = np.asarray(jax.jit(vit.ACTIVATIONS[name])(x))
    error = np.abs(ours - theirs(torch.from_numpy(x)).numpy())
    assert (error <= 4e-7 * np.abs(x)).all()  # what the rounding of erf and tanh makes of it in PyTorch too


def test_every_activation_is_known_to_the_configuration():
    assert set(vit.ACTIVATIONS) == set(sizes.ACTIVATIONS)


def test_attention():
    query, key, value = np.random.default_rng(0).standard_normal((3, 2, 17, 3, 64), dtype=np.float32)
    query *= 8  # far from uniform
    heads_first = (torch.from_numpy(x).transpose(1, 2) for x in (query, key, value))
    theirs = F.scaled_dot_product_attention(*heads_first).transpose(1, 2).numpy()
    assert np.abs(layers.attend(query, key, value) - theirs).max() <= tolerances.BACKBONE * np.abs(theirs).max()
    standard = jax.nn.dot_product_attention(*map(jnp.asarray, (query, key, value)))
    assert np.abs(layers.attend(query, key, value) - standard).max() <= tolerances.BACKBONE * np.abs(theirs).max()


def test_attention_of_large_scores_is_finite():
    large = jnp.full((1, 2, 1, 4), 1e4)
    np.testing.assert_array_equal(layers.attend(large, large, jnp.ones((1, 2, 1, 4))), 1)


def test_what_enters_the_blocks(pair):
    patch = pair.published.config.patch_size
    image = random_image(2, 5 * patch, 9 * patch)
    ours = pair.run(lambda backbone, image: backbone.embed(backbone.patch(image)), image)
    cells = pair.theirs.patch_embed(nchw(image))
    pair.check(ours, pair.theirs.norm_pre(pair.theirs._pos_embed(cells)))


def test_block(pair):
    width, i = pair.published.config.width, pair.published.config.depth - 1
    tokens = np.random.default_rng(0).standard_normal((2, 80, width), dtype=np.float32)
    ours = pair.run(lambda backbone, x: layers.run(backbone.blocks, x, i, i + 1), tokens)
    pair.check(ours, pair.theirs.blocks[i](torch.from_numpy(tokens)))


@pytest.mark.parametrize(
    ("size", "chosen", "norm"),
    [("native", (-1,), True), ((2, 96, 208), (-1, 0), False), ((2, 83, 50), (0,), True)],
    ids=["native", "two-layers-without-norm", "padded-early"],
)
def test_maps_and_class_token(pair, size, chosen, norm):
    config = pair.published.config
    image = random_image(1, config.image_size, config.image_size) if size == "native" else random_image(*size)
    options = dict(layer=chosen, norm=norm, class_token=bool(config.class_tokens))
    ours = encoder.Encoder(pair.backbone, pair.published, **options)(jnp.asarray(image))
    expected = Encoder(pair.theirs, name=pair.published.name, **options)(nchw(image))
    features, tokens = (ours, ()) if config.class_tokens == 0 else (ours[0], [(ours[1], expected[1])])
    expected = (expected if config.class_tokens == 0 else expected[0]).permute(0, 2, 3, 1)
    for ours, theirs in [(features, expected), *tokens]:
        assert ours.shape == theirs.shape
        for i in range(len(chosen)):
            part = slice(i * config.width, (i + 1) * config.width)
            pair.check(ours[..., part], theirs[..., part])


@pytest.mark.parametrize("remat", [False, True])
def test_gradient_of_the_image(remat):
    name = "vit_small_patch14_reg4_dinov2"
    theirs = random_model(name, 2)
    with with_depth(name, 2):
        backbone = creation.build(EncoderCheckpoint(name, numpy_state(theirs)), remat=remat).backbone
    image = random_image(2, 28, 42)
    weight = np.random.default_rng(1).standard_normal((2, 2, 3, 384), dtype=np.float32)
    pixels = nchw(image).requires_grad_(True)
    features = theirs.forward_intermediates(pixels, indices=[1], norm=True, intermediates_only=True)[0]
    (features * nchw(weight)).sum().backward()
    (ours,) = jax.jit(lambda x: jax.vjp(lambda x: backbone.intermediates(x, (1,), True)[0][0], x)[1](weight))(image)
    expected = pixels.grad.permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - expected).max() <= tolerances.GRADIENT * np.abs(expected).max()


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_base_patch16_clip_quickgelu_224"])
def test_bfloat16_is_near(name):
    with with_depth(name, 3):
        checkpoint = EncoderCheckpoint(name, numpy_state(random_model(name, 3)))
    image = jnp.asarray(random_image(1, 56, 112))
    exact = np.asarray(creation.build(checkpoint)(image))
    rough = creation.build(checkpoint, dtype=jnp.bfloat16)(image)
    assert rough.dtype == jnp.bfloat16
    assert np.sqrt(np.square(rough.astype(jnp.float32) - exact).mean() / np.square(exact).mean()) <= 2e-2


@functools.cache
def without_weights(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=7, dynamic_img_size=True)


@pytest.mark.parametrize("classes", [0, 7])
@pytest.mark.parametrize("name", catalogue.VIT)
def test_table_is_total(name, classes):
    state = without_weights(name).state_dict()
    state = {key: x for key, x in state.items() if classes or not key.startswith("head.")}
    rows = present(table(catalogue.VIT[name].config), state)
    expected = {key: row.shape for row in rows for key in row.keys}
    assert expected.keys() == state.keys()
    assert len(expected) == sum(len(row.keys) for row in rows)
    for key, shape in expected.items():
        assert tuple(classes if size is None else size for size in shape) == tuple(state[key].shape), key
        assert state[key].is_floating_point()


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in MODELS))
def test_table_fills_the_module(name):
    config = catalogue.VIT[name].config
    state = nnx.state(nnx.eval_shape(lambda: creation.backbone(config, jnp.float32, False, 0)))
    held = {".".join(map(str, path)): variable.get_value().shape for path, variable in nnx.to_flat_state(state)}
    assert {row.flax: row.flax_shape for row in table(config) if not row.carried} == held


@pytest.mark.parametrize("classes", [0, 7])
@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in MODELS))
def test_conversion_loses_nothing(name, classes):
    tensors = numpy_state(random_model(name, 1, num_classes=classes))
    with with_depth(name, 1):
        back = EncoderCheckpoint.from_flax(name, EncoderCheckpoint(name, tensors).flax()).tensors
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert back[key].dtype == tensor.dtype
        assert back[key].shape == tensor.shape
        assert back[key].tobytes() == tensor.tobytes(), key


def test_the_attention_pool_is_carried_whole_or_not_at_all():
    name = "vit_base_patch16_siglip_224"
    tensors = numpy_state(random_model(name, 1))
    pool = {key for key in tensors if key.startswith("attn_pool.")}
    with with_depth(name, 1):
        without = EncoderCheckpoint(name, {key: x for key, x in tensors.items() if key not in pool})
        assert tensors.keys() - without.tensors.keys() == pool
        with pytest.raises(ValueError, match=r"missing: attn_pool\.latent \(1, 1, 768\)"):
            EncoderCheckpoint(name, {key: x for key, x in tensors.items() if key != "attn_pool.latent"})


@pytest.mark.parametrize("name", catalogue.VIT)
def test_catalogue_is_timms(name):
    entry = catalogue.VIT[name]
    assert {f"{name}.{tag}" for tag in entry.tags} == set(timm.list_pretrained(f"{name}.*"))
    assert next(iter(entry.tags)) == timm.get_pretrained_cfg(name).tag
    for tag, preprocessing in entry.tags.items():
        published = timm.get_pretrained_cfg(f"{name}.{tag}")
        assert preprocessing == (published.mean, published.std)
        assert published.input_size == (3, entry.config.image_size, entry.config.image_size)
        assert published.hf_hub_id == catalogue.find(f"{name}.{tag}").repository


@pytest.mark.parametrize("name", catalogue.VIT)
def test_configuration_is_timms(name):
    config = catalogue.VIT[name].config
    model = without_weights(name)
    theirs = Encoder(model, name=name)
    block = model.blocks[0]
    assert config.strides == (theirs.stride,) * len(model.blocks)
    assert config.widths == (theirs.channels,) * len(model.blocks)
    assert (config.prefix_tokens, config.class_tokens) == (theirs.prefix_tokens, int(model.has_class_token))
    assert config.num_heads == block.attn.num_heads
    assert model.patch_embed.grid_size == (config.grid_size, config.grid_size)
    assert {layer.eps for layer in model.modules() if isinstance(layer, nn.LayerNorm)} == {config.epsilon}
    activation = {nn.GELU: "gelu", GELUTanh: "gelu_tanh", QuickGELU: "quick_gelu", nn.SiLU: "swiglu"}
    assert config.activation == activation[type(block.mlp.act)]
    assert (type(block.mlp) is GluMlp) == (config.activation == "swiglu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_heads=5), "width=384 must be a multiple of num_heads=5"),
        (dict(class_tokens=2), "class_tokens=2 must be 0 or 1"),
        (dict(activation="relu"), "activation='relu' must be one of gelu, gelu_tanh, quick_gelu, swiglu"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ViT(**dict(patch_size=16, image_size=224, width=384, depth=12, num_heads=6) | fields)
