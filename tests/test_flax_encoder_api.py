"""The interface of every Flax encoder, whatever its backbone: average pools in its place, and a small transformer."""

from __future__ import annotations

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from anyup_core.checkpoints.encoder_checkpoint import EncoderCheckpoint
from anyup_core.encoders import catalogue
from anyup_core.encoders.convnext import ConvNeXt
from anyup_jax.encoders import creation
from anyup_jax.encoders.encoder import Encoder
from tests.encoder_weights import random_state

NAME = "vit_tiny_patch16_dinov3_qkvb"
TOLERANCE = 2e-5  # of the largest feature


@pytest.fixture(scope="module")
def checkpoint() -> EncoderCheckpoint:
    entry = catalogue.ARCHITECTURES[NAME]
    entry = dataclasses.replace(entry, config=dataclasses.replace(entry.config, depth=3))
    with mock.patch.dict(catalogue.ARCHITECTURES, {NAME: entry}):
        return EncoderCheckpoint(NAME, random_state(NAME))


@pytest.fixture(scope="module")
def encoder(checkpoint) -> Encoder:
    return creation.build(checkpoint, class_token=True)


class PoolsConfig(ConvNeXt):
    strides = (4, 8, 8)


POOLS = PoolsConfig(depths=(1, 1, 1), widths=(3, 6, 9))


class Pools(nnx.Module):
    """Average pools as a backbone without tokens, which records its calls."""

    calls: list[tuple] = []

    def __init__(self):
        self.config = POOLS
        self.gain = nnx.Param(jnp.ones(()))

    def intermediates(self, image, layers, norm):
        self.calls.append((layers, norm, image.shape, image.dtype))
        maps = []
        for layer in layers:
            stride, batch = self.config.strides[layer], image.shape[0]
            cells = image.reshape(batch, image.shape[1] // stride, stride, -1, stride, 3).mean((2, 4))
            maps.append((self.gain[...] * jnp.tile(cells, self.config.widths[layer] // 3), None))
        return maps


def pools(**options) -> Encoder:
    published = catalogue.Published("pools", "pools", "none", POOLS, (0.5, 0.4, 0.3), (0.25, 0.2, 0.1))
    return Encoder(Pools(), published, **options)


def random_image(height: int, width: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(height + width).standard_normal((batch, height, width, 3), dtype=np.float32)


def close(one, other) -> None:
    assert one.shape == other.shape
    assert np.abs(np.asarray(one) - np.asarray(other)).max() <= TOLERANCE * np.abs(other).max()


@pytest.mark.parametrize("layer", [(1, 2), (2, 1), (-1, 1, 2)], ids=str)
def test_layers_are_concatenated_in_the_given_order(layer):
    image = random_image(16, 16)
    expected = np.concatenate([pools(layer=i)(image) for i in layer], -1)
    np.testing.assert_array_equal(pools(layer=layer)(image), expected)
    assert pools(layer=layer).layers == tuple(i % 3 for i in layer)
    assert sum(pools(layer=layer).widths) == pools(layer=layer).channels == expected.shape[-1]


def test_the_backbone_is_called_once_with_sorted_layers_and_a_padded_image():
    Pools.calls.clear()
    pools(layer=(2, 1, -1), norm=False)(random_image(17, 24))
    assert Pools.calls == [((1, 2), False, (2, 24, 24, 3), jnp.float32)]


@pytest.mark.parametrize(("size", "covered"), [((16, 16), (16, 16)), ((17, 31), (16, 24)), ((8, 9), (8, 8))], ids=str)
def test_the_border_is_zeros_and_cropped_again(size, covered):
    height, width = covered
    image = random_image(*size)
    assert pools().covered(*size) == covered
    np.testing.assert_allclose(pools()(image), pools()(image[:, :height, :width]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", [3, -4, (0, 7), ()], ids=str)
def test_missing_layers_are_refused(layer):
    with pytest.raises(ValueError, match="layer=") as error:
        pools(layer=layer)
    assert all(part in str(error.value) for part in (repr(layer), "-3", "2"))


def test_options_that_the_backbone_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"pools.*layer 0: 4, layer 2: 8"):
        pools(layer=(0, -1))
    with pytest.raises(ValueError, match=r"pools.*class_token"):
        pools(class_token=True)


WRONG = {
    "bytes": (np.zeros((1, 32, 32, 3), np.uint8), TypeError, ("uint8",)),
    "integers": (np.zeros((1, 32, 32, 3), np.int32), TypeError, ("int32",)),
    "channels first": (np.zeros((1, 3, 32, 48), np.float32), ValueError, ("(1, 3, 32, 48)", "(0, 2, 3, 1)")),
    "no batch": (np.zeros((32, 32, 3), np.float32), ValueError, ("(32, 32, 3)",)),
    "alpha": (np.zeros((1, 32, 32, 4), np.float32), ValueError, ("(1, 32, 32, 4)",)),
    "low": (np.zeros((1, 15, 32, 3), np.float32), ValueError, ("15 x 32", "16 x 16", NAME)),
    "narrow": (np.zeros((1, 32, 1, 3), np.float32), ValueError, ("32 x 1", "16 x 16", NAME)),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("traced", [False, True])
def test_wrong_images_are_refused(encoder, wrong, traced):
    image, kind, named = WRONG[wrong]
    with pytest.raises(kind, match="image") as error:
        (jax.jit(encoder) if traced else encoder)(jnp.asarray(image))
    assert all(part in str(error.value) for part in named)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_normalize(dtype):
    image = np.random.default_rng(0).random((2, 9, 7, 3)).astype(dtype)
    normalized = pools().normalize(image)
    expected = (image.astype(np.float64) - (0.5, 0.4, 0.3)) / (0.25, 0.2, 0.1)
    assert normalized.dtype == jnp.asarray(image).dtype
    np.testing.assert_allclose(normalized.astype(jnp.float32), expected, atol=0.1 if dtype == jnp.bfloat16 else 1e-5)


def test_integers_are_not_normalised():
    with pytest.raises(TypeError, match="uint8"):
        pools().normalize(np.zeros((1, 16, 16, 3), np.uint8))


def test_no_gradient_passes(encoder):
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


def test_inside_jit_and_vmap(checkpoint):
    encoder = creation.build(checkpoint)
    image = jnp.asarray(random_image(32, 48, batch=4))
    expected = np.asarray(encoder(image))
    close(jax.jit(encoder)(image), expected)
    close(jax.jit(lambda encoder, x: encoder(x))(encoder, image), expected)
    close(nnx.jit(lambda encoder, x: encoder(x))(encoder, image), expected)
    pairs = jax.vmap(encoder)(image.reshape(2, 2, 32, 48, 3))
    close(pairs.reshape(expected.shape), expected)
    assert jax.eval_shape(encoder, image).shape == expected.shape


def test_one_compilation_serves_all_calls_of_a_size(checkpoint):
    encoder, image = pools(), random_image(16, 24)
    first = encoder(image)
    Pools.calls.clear()
    np.testing.assert_array_equal(encoder(2 * image), 2 * first)
    np.testing.assert_array_equal(pools()(image), first)
    assert Pools.calls == []
    encoder(random_image(24, 24))
    assert len(Pools.calls) == 1
    graphs = [nnx.split(creation.build(checkpoint))[0] for _ in range(2)]
    assert graphs[0] == graphs[1]
    assert hash(graphs[0]) == hash(graphs[1])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_the_type_of_the_features_is_the_encoders(encoder, dtype):
    image = jnp.asarray(random_image(32, 32), dtype)
    for ours, expected in zip(encoder(image), encoder(image.astype(jnp.float32)), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours, expected)


def test_build_takes_the_weights_exactly(encoder, checkpoint):
    state = nnx.to_flat_state(nnx.state(encoder.backbone))
    held = {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in state}
    expected = checkpoint.flax(unused=False)
    assert held.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(held[path], array, err_msg=path)
    assert held["blocks.scale1"].shape == (3, 192)
    assert (encoder.prefix_tokens, encoder.patch_size) == (5, 16)
