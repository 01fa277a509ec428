"""What every Flax encoder does, whatever its backbone, next to the PyTorch wrapper, on a small transformer."""

from __future__ import annotations

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

from anyup_core.checkpoints.encoder_checkpoint import EncoderCheckpoint
from anyup_core.encoders import catalogue
from anyup_jax.encoders import creation
from anyup_jax.encoders.encoder import Encoder
from anyup_torch.encoders import Encoder as TorchEncoder

NAME, WIDTH, PREFIX = "vit_tiny_patch16_dinov3_qkvb", 192, 5
TOLERANCE = 2e-5  # of the largest feature
LAYERS = [-1, 0, -2, (2,), (-1, 0), (1, 1, 0)]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    model = timm.create_model(NAME, depth=3).requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for key, weight in model.named_parameters():
        spread = 0.2 if weight.ndim == 1 else 1 if "token" in key else weight[0].numel() ** -0.5
        weight.normal_(0.5 if "gamma" in key or "norm" in key else 0, spread, generator=generator)
    return model


@pytest.fixture(scope="module")
def checkpoint(model) -> EncoderCheckpoint:
    entry = catalogue.ARCHITECTURES[NAME]
    entry = dataclasses.replace(entry, config=dataclasses.replace(entry.config, depth=3))
    with mock.patch.dict(catalogue.ARCHITECTURES, {NAME: entry}):
        return EncoderCheckpoint(NAME, {key: value.numpy() for key, value in model.state_dict().items()})


@pytest.fixture(scope="module")
def ours(checkpoint) -> Encoder:
    return creation.build(checkpoint)


@pytest.fixture(scope="module")
def theirs(model) -> TorchEncoder:
    return TorchEncoder(model, name=NAME)


@dataclasses.dataclass(frozen=True)
class PoolsConfig:
    strides: tuple[int, ...] = (4, 8, 8)
    widths: tuple[int, ...] = (3, 6, 9)
    prefix_tokens: int = 0
    class_tokens: int = 0


class Pools(nnx.Module):
    """Average pools as a backbone without tokens; the calls it gets are remembered."""

    calls: list[tuple] = []

    def __init__(self):
        self.config = PoolsConfig()
        self.gain = nnx.Param(jnp.ones(()))

    def intermediates(self, image, layers, norm):
        self.calls.append((layers, norm, image.shape, image.dtype))
        found = []
        for layer in layers:
            stride, batch = self.config.strides[layer], image.shape[0]
            cells = image.reshape(batch, image.shape[1] // stride, stride, -1, stride, 3).mean((2, 4))
            found.append((self.gain[...] * jnp.tile(cells, self.config.widths[layer] // 3), None))
        return found


def pools(**options) -> Encoder:
    published = catalogue.Published("pools", "pools", "none", PoolsConfig(), (0.5,) * 3, (0.25,) * 3)
    return Encoder(Pools(), published, **options)


def random_image(height: int, width: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(height + width).standard_normal((batch, height, width, 3), dtype=np.float32)


def in_torch(encoder: TorchEncoder, image: np.ndarray) -> np.ndarray:
    return encoder(nchw(image)).permute(0, 2, 3, 1).numpy()


def nchw(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))


def close(one, other) -> None:
    one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
    assert one.shape == other.shape
    assert np.abs(one - other).max() <= TOLERANCE * np.abs(other).max()


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layers_as_in_torch(model, checkpoint, layer):
    norm = layer != (-1, 0)
    ours = creation.build(checkpoint, layer=layer, norm=norm)
    theirs = TorchEncoder(model, name=NAME, layer=layer, norm=norm)
    for attribute in "name", "layers", "stride", "patch_size", "channels", "prefix_tokens", "mean", "std", "norm":
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    image = random_image(32, 48)
    features = ours(image)
    assert features.shape == (2, 2, 3, ours.channels)
    assert features.dtype == jnp.float32
    close(features, in_torch(theirs, image))


def test_norm_of_one_layer_alone(model, checkpoint):
    image = random_image(32, 48)
    raw = creation.build(checkpoint, layer=1, norm=False)(image)
    close(raw, in_torch(TorchEncoder(model, name=NAME, layer=1, norm=False), image))
    close(creation.build(checkpoint, layer=1)(image), model.norm(torch.from_numpy(np.array(raw))))


def test_the_order_asked_for():
    image = random_image(16, 16)
    single = {i: pools(layer=i)(image) for i in (1, 2)}
    for layer in (1, 2), (2, 1), (-1, 1, 2):
        expected = np.concatenate([single[i % 3] for i in layer], -1)
        np.testing.assert_array_equal(pools(layer=layer)(image), expected)
        assert pools(layer=layer).channels == expected.shape[-1]


def test_the_backbone_is_asked_once_for_sorted_layers():
    Pools.calls.clear()
    pools(layer=(2, 1, -1), norm=False)(random_image(17, 24))
    assert Pools.calls == [((1, 2), False, (2, 24, 24, 3), jnp.float32)]


@pytest.mark.parametrize("layer", [3, -4, (0, 7), ()], ids=str)
def test_missing_layers_are_refused_as_in_torch(model, checkpoint, layer):
    with pytest.raises(ValueError, match="has 3 layers") as expected:
        TorchEncoder(model, name=NAME, layer=layer)
    with pytest.raises(ValueError, match="has 3 layers") as error:
        creation.build(checkpoint, layer=layer)
    assert str(error.value) == str(expected.value)


def test_layers_of_different_strides_are_refused():
    with pytest.raises(ValueError, match=r"pools have different strides \(layer 0: 4, layer 2: 8\)"):
        pools(layer=(0, -1))


@pytest.mark.parametrize("size", [(16, 16), (33, 63), (47, 17), (40, 64)], ids=str)
def test_any_size_as_in_torch(ours, theirs, size):
    image = random_image(*size)
    features = ours(image)
    assert ours.covered(*size) == theirs.covered(*size) == (features.shape[1] * 16, features.shape[2] * 16)
    close(features, in_torch(theirs, image))


def test_the_border_is_zeros_and_cropped_again(ours):
    image = random_image(33, 47)
    padded = np.pad(image, ((0, 0), (0, 15), (0, 1), (0, 0)))
    close(ours(image), ours(padded)[:, :2, :2])


@pytest.mark.parametrize(("layer", "norm"), [(-1, True), ((0, -1), True), ((-1, 0), False)], ids=str)
def test_class_token(model, checkpoint, layer, norm):
    encoder = creation.build(checkpoint, layer=layer, norm=norm, class_token=True)
    image = random_image(33, 48)
    features, token = encoder(image)
    theirs = TorchEncoder(model, name=NAME, layer=layer, norm=norm)
    assert token.shape == (2, encoder.channels)
    assert features.shape == (2, 2, 3, encoder.channels)
    padded = F.pad(nchw(image), (0, 0, 0, 15))
    options = dict(indices=[0, 2], norm=norm, return_prefix_tokens=True, intermediates_only=True)
    tokens = dict(zip((0, 2), (prefix[:, 0] for _, prefix in model.forward_intermediates(padded, **options))))
    close(token, torch.cat([tokens[i] for i in theirs.layers], -1))
    close(features, in_torch(theirs, image))


def test_a_model_without_class_token_refuses():
    with pytest.raises(ValueError, match="pools has no class token; leave class_token out"):
        pools(class_token=True)


WRONG = {
    "bytes": (np.zeros((1, 32, 32, 3), np.uint8), TypeError, "has type uint8; give floating point"),
    "integers": (np.zeros((1, 32, 32, 3), np.int32), TypeError, "has type int32; give floating point"),
    "channels first": (np.zeros((1, 3, 32, 48), np.float32), ValueError, r"\(1, 3, 32, 48\) has its channels first"),
    "no batch": (np.zeros((32, 32, 3), np.float32), ValueError, r"shape \(32, 32, 3\); give \(B, H, W, 3\)"),
    "alpha": (np.zeros((1, 32, 32, 4), np.float32), ValueError, r"shape \(1, 32, 32, 4\); give \(B, H, W, 3\)"),
    "low": (
        np.zeros((1, 15, 32, 3), np.float32),
        ValueError,
        f"15 x 32 pixels, smaller than one 16 x 16 cell of {NAME}",
    ),
    "narrow": (np.zeros((1, 32, 1, 3), np.float32), ValueError, "32 x 1 pixels, smaller than"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("traced", [False, True])
def test_wrong_images_are_refused(ours, wrong, traced):
    image, kind, match = WRONG[wrong]
    with pytest.raises(kind, match=match):
        (jax.jit(ours) if traced else ours)(jnp.asarray(image))


@pytest.mark.parametrize("size", [(15, 32), (32, 1)], ids=str)
def test_small_images_are_refused_in_the_words_of_torch(ours, theirs, size):
    image = random_image(*size)
    with pytest.raises(ValueError, match="smaller than") as expected:
        theirs(nchw(image))
    with pytest.raises(ValueError, match="smaller than") as error:
        ours(image)
    assert str(error.value) == str(expected.value)


def test_normalize_as_in_torch(ours, theirs):
    image = np.random.default_rng(0).random((2, 9, 7, 3), dtype=np.float32)
    expected = theirs.normalize(nchw(image)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(ours.normalize(jnp.asarray(image)), expected, rtol=1e-6, atol=1e-6)
    assert ours.normalize(jnp.asarray(image, jnp.bfloat16)).dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.normalize(image.astype(np.float64)), expected, rtol=1e-6, atol=1e-6)


def test_normalize_refuses_integers_as_in_torch(ours, theirs):
    pixels = np.zeros((1, 16, 16, 3), np.uint8)
    for normalize, image in ((ours.normalize, pixels), (theirs.normalize, nchw(pixels))):
        with pytest.raises(TypeError, match="uint8; give floating point, scaled to"):
            normalize(image)


@pytest.mark.parametrize("class_token", [False, True])
def test_encode_array_as_in_torch(checkpoint, theirs, class_token):
    picture = np.random.default_rng(1).random((40, 56, 3), dtype=np.float32)
    features = creation.build(checkpoint, class_token=class_token).encode_array(picture)
    assert type(features) is np.ndarray
    assert features.dtype == np.float32
    close(features, theirs.encode_array(picture))


def test_no_gradient_passes(checkpoint):
    encoder = creation.build(checkpoint, class_token=True)
    image = jnp.asarray(random_image(32, 32))

    def total(encoder, image):
        features, token = encoder(image)
        return jnp.square(features).sum() + jnp.square(token).sum()

    weights, pixels = nnx.jit(nnx.grad(total, argnums=(0, 1)))(encoder, image)
    leaves = jax.tree.leaves(weights)
    assert len(leaves) == len(jax.tree.leaves(nnx.state(encoder)))
    assert all(not leaf.any() for leaf in [*leaves, pixels])
    through = jax.jit(jax.grad(lambda x: encoder.backbone.intermediates(x, (2,), True)[0][0][0].sum()))(image)
    assert through[0].any()  # the backbone itself lets it pass


def test_inside_jit_and_vmap(ours):
    image = jnp.asarray(random_image(32, 48, batch=4))
    expected = np.asarray(ours(image))
    close(jax.jit(ours)(image), expected)
    close(jax.jit(lambda encoder, x: encoder(x))(ours, image), expected)
    close(nnx.jit(lambda encoder, x: encoder(x))(ours, image), expected)
    pairs = jax.vmap(ours)(image.reshape(2, 2, 32, 48, 3))
    close(pairs.reshape(expected.shape), expected)
    assert jax.eval_shape(ours, image).shape == expected.shape


def test_one_compilation_serves_all_calls_of_a_size():
    encoder, image = pools(), random_image(16, 24)
    first = encoder(image)
    Pools.calls.clear()
    np.testing.assert_array_equal(encoder(2 * image), 2 * first)
    np.testing.assert_array_equal(pools()(image), first)
    assert Pools.calls == []
    encoder(random_image(24, 24))
    assert len(Pools.calls) == 1


def test_remat_changes_nothing(ours, checkpoint):
    image = random_image(32, 48)
    close(creation.build(checkpoint, remat=True)(image), ours(image))


def test_bfloat16_is_close_to_float32(ours, checkpoint):
    encoder = creation.build(checkpoint, dtype=jnp.bfloat16, class_token=True)
    exact = creation.build(checkpoint, class_token=True)
    image = random_image(48, 64)
    for rounded, reference in zip(encoder(image), exact(image)):
        assert rounded.dtype == jnp.bfloat16
        error = np.asarray(rounded, np.float32) - np.asarray(reference)
        assert 0 < np.sqrt(np.square(error).mean()) <= 0.02 * np.sqrt(np.square(reference).mean())
        assert np.abs(error).max() <= 0.05 * np.abs(reference).max()
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(encoder))} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_the_type_of_the_features_is_the_encoders(ours, dtype):
    image = jnp.asarray(random_image(32, 32), dtype)
    assert ours(image).dtype == jnp.float32
    np.testing.assert_array_equal(ours(image), ours(image.astype(jnp.float32)))


def test_build_takes_the_weights_exactly(checkpoint):
    encoder = creation.build(checkpoint)
    held = {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in flat_state(encoder.backbone)}
    expected = checkpoint.flax(carried=False)
    assert held.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(held[path], array, err_msg=path)
    assert held["blocks.scale1"].shape == (3, WIDTH)
    assert encoder.prefix_tokens == PREFIX


def flat_state(module: nnx.Module):
    return nnx.to_flat_state(nnx.state(module))
