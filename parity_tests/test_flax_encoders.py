"""The Flax encoders against timm, one contract for every family: features, gradients, key tables, the catalogue."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from flax import nnx
from timm.layers import GELUTanh, GluMlp, QuickGELU
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from torch import nn

from anyup_core.checkpoints.encoder_checkpoint import EncoderCheckpoint, present
from anyup_core.encoders import catalogue
from anyup_core.encoders import vit as sizes
from anyup_core.encoders.dinov3 import DINOv3
from anyup_core.encoders.vit import ViT
from anyup_jax.encoders import creation, layers, vit
from anyup_jax.encoders.dinov3 import rotations
from anyup_jax.encoders.encoder import Encoder
from anyup_torch.encoders import Encoder as TorchEncoder
from parity_tests import tolerances
from tests.encoder_weights import random_state

FAMILIES = [  # one model of each; and the number of blocks, where it is not the model's own
    ("vit_small_patch14_reg4_dinov2", 2),
    ("vit_small_plus_patch16_dinov3_qkvb", 2),
    ("resnet50", None),
    ("convnext_tiny", None),
    ("tf_efficientnet_lite0", None),
]
NATIVE = [("vit_tiny_patch16_224", 12), ("vit_tiny_patch16_dinov3_qkvb", 12), *FAMILIES[2:]]
MODELS = [
    *FAMILIES,
    ("vit_tiny_patch16_224", 40),  # as deep as the deepest of the family
    ("vit_small_patch14_dinov2", 2),
    ("vit_giant_patch14_reg4_dinov2", 1),
    ("deit3_small_patch16_384", 2),
    ("vit_base_patch16_clip_224", 2),
    ("vit_base_patch16_clip_quickgelu_224", 2),
    ("vit_base_patch16_siglip_224", 2),
    ("vit_so400m_patch14_siglip_384", 1),  # 384 is no multiple of 14
    ("vit_so400m_patch16_siglip_gap_256", 1),
    ("vit_tiny_patch16_dinov3_qkvb", 32),  # as deep as the deepest of the family
    ("vit_small_patch16_dinov3", 3),
    ("vit_base_patch16_dinov3_qkvb", 2),
    ("vit_large_patch16_dinov3", 2),
    ("vit_huge_plus_patch16_dinov3_qkvb", 2),
    ("tf_efficientnet_lite2", None),
]
NAMES = sorted({name for name, _ in MODELS})
TRANSFORMERS = catalogue.VIT | catalogue.DINOV3


def random_model(name: str, depth: int | None) -> torch.nn.Module:
    """timm's model; none of its weights are 0 or 1, all its layers matter, and its attention is far from uniform."""
    options = dict(dynamic_img_size=True) if name in catalogue.VIT else {}
    model = timm.create_model(name, **options, **({"depth": depth} if depth else {})).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for key, weight in model.state_dict().items():
        if weight.ndim > 1:
            gain = 2 if "qkv" in key else 1.2 if name in catalogue.EFFICIENTNET else 1
            fan_in = 1 if key in ("cls_token", "reg_token", "pos_embed") else weight[0].numel()
            weight.normal_(0, gain / fan_in**0.5, generator=generator)
        elif "gamma" in key:
            weight.normal_(0.3, 0.2, generator=generator)
        elif key.endswith(("weight", "running_var")):
            weight.uniform_(*((0.5, 1.1) if name in TRANSFORMERS else (0.7, 1.5)), generator=generator)
        elif key.endswith(("bias", "running_mean")):
            weight.normal_(0, 0.2 if name in TRANSFORMERS else 0.3, generator=generator)
        else:
            weight.fill_(1234)
    return model


def with_depth(name: str, depth: int | None) -> contextlib.AbstractContextManager:
    """Give the catalogue's architecture of this name `depth` blocks, within the context."""
    entry = catalogue.ARCHITECTURES[name]
    config = dataclasses.replace(entry.config, depth=depth) if depth else entry.config
    return mock.patch.dict(catalogue.ARCHITECTURES, {name: dataclasses.replace(entry, config=config)})


def numpy_state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in model.state_dict().items()}


@functools.lru_cache(maxsize=3)
def pair(name: str, depth: int | None) -> tuple[torch.nn.Module, EncoderCheckpoint, nnx.Module]:
    """timm's model; its weights; the Flax backbone with them."""
    theirs = random_model(name, depth)
    with with_depth(name, depth):
        checkpoint = EncoderCheckpoint(name, numpy_state(theirs))
    return theirs, checkpoint, creation.build(checkpoint).backbone


def random_array(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def nchw(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rearrange(image, "B H W C -> B C H W").copy())


def nhwc(maps: torch.Tensor) -> np.ndarray:
    return maps.permute(0, 2, 3, 1).numpy()


def check(ours, theirs, allowed: float = tolerances.BACKBONE) -> None:
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= allowed * np.abs(theirs).max()


def check_features(model: tuple[str, int | None], size: tuple[int, int], layer, norm: bool) -> None:
    """Features, class token and attributes are those of the PyTorch encoder."""
    theirs, checkpoint, backbone = pair(*model)
    published = checkpoint.published
    options = dict(layer=layer, norm=norm, class_token=bool(published.config.class_tokens))
    ours = Encoder(backbone, published, **options)
    theirs = TorchEncoder(theirs, name=published.name, **options)
    for field in "name", "layers", "stride", "patch_size", "channels", "prefix_tokens", "mean", "std", "norm":
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.covered(*size) == theirs.covered(*size)
    image = random_array(2, *size, 3)
    outputs, expected = ours(image), theirs(nchw(image))
    features, *tokens = outputs if ours.class_token else (outputs,)
    maps, *expected_tokens = expected if ours.class_token else (expected,)
    assert features.dtype == jnp.float32
    pairs = [(features, nhwc(maps)), *zip(tokens, expected_tokens, strict=True)]
    for one, other in pairs:
        for start, width in zip(np.cumsum((0, *ours.widths)), ours.widths):  # every layer in its own units
            check(one[..., start : start + width], other[..., start : start + width])


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_two_layers_without_norm(model):
    count = len(catalogue.ARCHITECTURES[model[0]].config.strides)
    check_features(model, (96, 208), (-1, 0) if model[0] in TRANSFORMERS else (-2, count - 2), norm=False)


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_an_early_layer_of_a_size_that_is_padded(model):
    check_features(model, (83, 50), 0 if model[1] == 1 else 1, norm=True)


@pytest.mark.parametrize("model", NATIVE, ids=str)
def test_the_last_layer_at_the_native_size(model):
    side = catalogue.ARCHITECTURES[model[0]].config.image_size
    check_features(model, (side, side), -1, norm=True)


@pytest.mark.parametrize("model", FAMILIES, ids=str)
def test_arrays_are_normalised_on_the_way(model):
    theirs, checkpoint, backbone = pair(*model)
    picture = np.random.default_rng(1).random((40, 66, 3), dtype=np.float32)
    ours = Encoder(backbone, checkpoint.published, class_token=bool(checkpoint.published.config.class_tokens))
    features = ours.encode_array(picture)
    assert type(features) is np.ndarray
    check(features, TorchEncoder(theirs, name=ours.name).encode_array(picture))


@pytest.mark.parametrize("name", ["resnet50", "convnext_tiny", "tf_efficientnet_lite0"])
def test_every_stage_of_a_convolutional_network(name):
    theirs, _, backbone = pair(name, None)
    image = 3 * random_array(2, 67, 98, 3)  # reaches both ends of ReLU6; odd and even sides meet strides of 2
    indices = list(range(len(backbone.config.strides)))
    ours = jax.jit(lambda x: backbone.intermediates(x, tuple(indices), True))(image)
    expected = theirs.forward_intermediates(nchw(image), indices=indices, norm=True, intermediates_only=True)
    for (features, prefix), maps in zip(ours, expected, strict=True):
        check(features, nhwc(maps))
        assert prefix is None
    if name in catalogue.EFFICIENTNET:
        stem = theirs.bn1(theirs.conv_stem(nchw(image)))
        assert (stem.min(), stem.max()) == (0, 6)
        check(jax.jit(backbone.logits)(image), theirs(nchw(image)))


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("model", FAMILIES, ids=str)
def test_gradient_of_the_image(model, remat):
    theirs, checkpoint, _ = pair(*model)
    backbone = creation.build(checkpoint, remat=remat).backbone
    layer = 1 if model[1] else backbone.config.strides.index(8)
    image = random_array(2, 56, 112, 3) if checkpoint.published.config.strides[0] == 14 else random_array(2, 32, 64, 3)
    pixels = nchw(image).requires_grad_(True)
    maps = theirs.forward_intermediates(pixels, indices=[layer], norm=True, intermediates_only=True)[0]
    weight = random_array(*nhwc(maps.detach()).shape)
    (maps * nchw(weight)).sum().backward()

    def features(x):
        return backbone.intermediates(x, (layer,), True)[0][0]

    (gradient,) = jax.jit(lambda x: jax.vjp(features, x)[1](weight))(image)
    check(gradient, nhwc(pixels.grad), tolerances.GRADIENT)


@pytest.mark.parametrize("model", [*FAMILIES, ("vit_base_patch16_clip_quickgelu_224", 2)], ids=str)
def test_bfloat16_is_close(model):
    _, checkpoint, backbone = pair(*model)
    image = random_array(1, 56, 112, 3)
    options = dict(layer=1, class_token=bool(checkpoint.published.config.class_tokens))
    rounded = creation.build(checkpoint, dtype=jnp.bfloat16, **options)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(rounded))} <= {jnp.dtype(jnp.float32)}
    exact = Encoder(backbone, checkpoint.published, **options)(image)
    for one, other in zip(jax.tree.leaves(rounded(image)), jax.tree.leaves(exact), strict=True):
        assert one.dtype == jnp.bfloat16
        error = np.asarray(one, np.float32) - np.asarray(other)
        assert 0 < np.sqrt(np.square(error).mean()) <= 0.02 * np.sqrt(np.square(other).mean())
        assert np.abs(error).max() <= 0.05 * np.abs(other).max()


# Parts of the transformers.


@pytest.mark.parametrize("grid", [(37, 37), (16, 16), (9, 20), (61, 5), (1, 3)], ids=str)
@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_position_embeddings_of_a_grid(name, grid):
    theirs, _, backbone = pair(name, 2)
    cells = np.zeros((1, *grid, 384), np.float32)
    ours = np.asarray(jax.jit(backbone.embed)(cells))
    expected = theirs._pos_embed(torch.from_numpy(cells)).numpy()
    assert np.abs(ours - expected).max() <= 1e-6 * np.abs(expected).max()
    if grid == (37, 37):
        np.testing.assert_array_equal(ours, expected)  # the trained grid stays as it is


@pytest.mark.parametrize("head_size", [64, 32])
@pytest.mark.parametrize("grid", [(16, 16), (6, 13), (1, 1), (1, 9), (40, 31)], ids=str)
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


@pytest.mark.parametrize(
    ("name", "theirs"), [("gelu", nn.GELU()), ("gelu_tanh", nn.GELU("tanh")), ("quick_gelu", QuickGELU())]
)
def test_activations(name, theirs):
    x = np.linspace(-12, 12, 100_001, dtype=np.float32)
    error = np.abs(np.asarray(jax.jit(vit.ACTIVATIONS[name])(x)) - theirs(torch.from_numpy(x)).numpy())
    assert (error <= 4e-7 * np.abs(x)).all()  # as large as the rounding of erf and tanh in PyTorch
    assert set(vit.ACTIVATIONS) == set(sizes.ACTIVATIONS)


def test_attention():
    query, key, value = random_array(3, 2, 17, 3, 64) * np.float32([8, 1, 1])[:, None, None, None, None]
    heads_first = (torch.from_numpy(x).transpose(1, 2) for x in (query, key, value))
    ours = layers.attend(*map(jnp.asarray, (query, key, value)))
    check(ours, F.scaled_dot_product_attention(*heads_first).transpose(1, 2))
    check(ours, jax.nn.dot_product_attention(*map(jnp.asarray, (query, key, value))))
    large = jnp.full((1, 2, 1, 4), 1e4)
    np.testing.assert_array_equal(layers.attend(large, large, jnp.ones((1, 2, 1, 4))), 1)


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_attention_some_rows_at_once(rows: int, monkeypatch: pytest.MonkeyPatch):
    query, key, value = map(jnp.asarray, random_array(3, 2, 17, 3, 64))
    monkeypatch.setattr(layers, "SCORES", rows * 3 * 17 + 1)
    check(layers.attend_on_cpu(query, key, value), layers.attend_at_once(query, key, value))


def test_attention_of_a_large_image_holds_a_part_of_the_scores():
    """Of 2048 x 2048 pixels in patches of 14 all scores of 6 heads would be 11 GB. XLA does not tell of its buffers."""
    tokens = jax.ShapeDtypeStruct((1, 1 + (2048 // 14) ** 2, 6, 64), jnp.float32)
    program = jax.jit(layers.attend_on_cpu).lower(tokens, tokens, tokens).as_text()
    arrays = re.findall(r"tensor<((?:\d+x)+)f32>", program)
    assert max(math.prod(map(int, array[:-1].split("x"))) for array in arrays) <= layers.SCORES


# Key tables and the catalogue.


@functools.lru_cache(maxsize=2)
def without_weights(name: str) -> torch.nn.Module:
    options = dict(dynamic_img_size=True) if name in catalogue.VIT else {}
    with torch.device("meta"):
        return timm.create_model(name, num_classes=7, **options)


@pytest.mark.parametrize("name", catalogue.ARCHITECTURES)
def test_catalogue_is_timms(name):
    entry, default = catalogue.ARCHITECTURES[name], timm.get_pretrained_cfg(name)
    assert {f"{name}.{tag}" for tag in entry.tags} == set(timm.list_pretrained(f"{name}.*"))
    assert next(iter(entry.tags)) == default.tag
    for tag, preprocessing in entry.tags.items():
        published = timm.get_pretrained_cfg(f"{name}.{tag}")
        assert preprocessing == (published.mean, published.std)
        if name in TRANSFORMERS or tag == default.tag:  # convolutions take images of any size
            assert published.input_size == (3, entry.config.image_size, entry.config.image_size)
        if name in catalogue.VIT:
            assert published.hf_hub_id == catalogue.find(f"{name}.{tag}").repository


def test_catalogue_has_all_of_a_family():
    assert catalogue.DINOV3.keys() == {name for name in timm.list_models("vit_*_dinov3*") if "_7b_" not in name}
    assert list(catalogue.EFFICIENTNET) == timm.list_models("tf_efficientnet_lite*")


@pytest.mark.parametrize("name", catalogue.ARCHITECTURES)
def test_sizes_and_key_table_are_timms(name):
    model, config = without_weights(name), catalogue.ARCHITECTURES[name].config
    count = len(model.feature_info)
    assert len(config.strides) == len(config.widths) == count
    for layer in range(count) if count < 6 else (0, count - 1):
        theirs = TorchEncoder(model, name=name, layer=layer)
        assert (config.strides[layer], config.widths[layer]) == (theirs.stride, theirs.channels)
    class_tokens = int(getattr(model, "has_class_token", name in catalogue.DINOV3))
    assert (config.prefix_tokens, config.class_tokens) == (theirs.prefix_tokens, class_tokens)
    if name in TRANSFORMERS:
        assert config.num_heads == model.blocks[0].attn.num_heads
    if name in catalogue.VIT:
        mlp = model.blocks[0].mlp
        assert model.patch_embed.grid_size == (config.grid_size, config.grid_size)
        assert {layer.eps for layer in model.modules() if isinstance(layer, nn.LayerNorm)} == {config.epsilon}
        activation = {nn.GELU: "gelu", GELUTanh: "gelu_tanh", QuickGELU: "quick_gelu", nn.SiLU: "swiglu"}
        assert config.activation == activation[type(mlp.act)]
        assert (type(mlp) is GluMlp) == (config.activation == "swiglu")
    with_head = model.state_dict()
    classifier = model.pretrained_cfg["classifier"]
    without_head = {key: x for key, x in with_head.items() if not key.startswith(f"{classifier}.")}
    for state in with_head, without_head:
        rows = present(config.rows(), state)
        expected = {key: row for row in rows for key in row.keys}
        assert expected.keys() == state.keys()
        assert len(expected) == sum(len(row.keys) for row in rows)
        for key, row in expected.items():
            assert tuple(7 if size is None else size for size in row.shape) == tuple(state[key].shape), key
            assert state[key].is_floating_point() != row.integer
    if name in catalogue.EFFICIENTNET:
        assert [key for row in config.rows() for key in row.keys] == list(with_head)  # the packages rely on the order


@pytest.mark.parametrize("name", sorted({*NAMES} | catalogue.ARCHITECTURES.keys() - catalogue.VIT.keys()))
def test_key_table_fills_the_module(name):
    config = catalogue.ARCHITECTURES[name].config
    state = nnx.state(nnx.eval_shape(lambda: creation.backbone(config, jnp.float32, False, 0)))
    held = {".".join(map(str, path)): variable.get_value().shape for path, variable in nnx.to_flat_state(state)}
    shapes = {row.flax: row.flax_shape for row in config.rows() if not row.unused}
    assert {path: tuple(1000 if n is None else n for n in shape) for path, shape in shapes.items()} == held


@pytest.mark.parametrize(
    ("name", "optional"), [*((name, True) for name in NAMES), *((name, False) for name, _ in FAMILIES)]
)
def test_conversion_loses_nothing(name, optional):
    with with_depth(name, 2 if name in TRANSFORMERS else None):
        tensors = random_state(name, optional=optional)
        back = EncoderCheckpoint.from_flax(name, EncoderCheckpoint(name, tensors).flax()).tensors
    assert list(back) == list(tensors)
    for key, tensor in tensors.items():
        assert (back[key].dtype, back[key].shape) == (tensor.dtype, tensor.shape)
        assert back[key].tobytes() == tensor.tobytes(), key


def test_without_classifier_and_counters():
    theirs, _, _ = pair("tf_efficientnet_lite0", None)
    tensors = {k: v for k, v in numpy_state(theirs).items() if "classifier" not in k and "batches" not in k}
    bare = creation.build(EncoderCheckpoint("tf_efficientnet_lite0", tensors), layer=1)
    assert bare.backbone.classifier is None
    image = random_array(2, 32, 32, 3)
    check(bare(image), nhwc(TorchEncoder(theirs, name="bare", layer=1)(nchw(image))))


@pytest.mark.parametrize(
    ("name", "part", "key"),
    [
        ("vit_base_patch16_siglip_224", "attn_pool.latent", "attn_pool.latent"),
        ("vit_tiny_patch16_dinov3_qkvb", "_bias", "blocks.0.attn.v_bias"),
    ],
)
def test_weights_that_lack_a_part_are_refused(name, part, key):
    with with_depth(name, 1):
        tensors = random_state(name)
        without_pool = {k: x for k, x in tensors.items() if not k.startswith("attn_pool.")}
        assert EncoderCheckpoint(name, without_pool).tensors.keys() == without_pool.keys()
        with pytest.raises(ValueError, match="missing") as error:
            EncoderCheckpoint(name, {k: x for k, x in tensors.items() if part not in k})
    assert key in str(error.value)


@pytest.mark.parametrize(
    ("config", "fields", "named"),
    [
        (ViT, dict(num_heads=5), ("width=384", "num_heads=5")),
        (ViT, dict(class_tokens=2), ("class_tokens=2",)),
        (ViT, dict(activation="relu"), ("activation='relu'", *sizes.ACTIVATIONS)),
        (DINOv3, dict(width=30, num_heads=3), ("width=30", "num_heads = 12")),
    ],
)
def test_impossible_configurations_are_refused(config, fields, named):
    valid = dict(patch_size=16, image_size=224, width=384, depth=12, num_heads=6)
    with pytest.raises(ValueError, match=named[0]) as error:
        config(**valid | fields)
    assert all(part in str(error.value) for part in named)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config(**valid).width = 12
