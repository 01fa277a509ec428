"""timm models between JAX arrays: the same features as in PyTorch, and memory shared where possible."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from anyup_jax.encoders import timm_bridge
from anyup_torch import encoders


@pytest.fixture(scope="module")
def encoder() -> encoders.Encoder:
    torch.manual_seed(0)
    return encoders.create("resnet18", pretrained=False, layer=(2, -3))


@pytest.fixture
def bridge(encoder) -> timm_bridge.Bridge:
    return timm_bridge.Bridge(encoder, torch, jax.devices("cpu")[0])


def test_features_are_those_of_torch(encoder, bridge):
    picture = np.random.default_rng(0).random((47, 64, 3), np.float32)
    features = bridge(bridge.normalize(jnp.asarray(picture)[None]))
    assert isinstance(features, jax.Array)
    assert features.devices() == {jax.devices()[0]}
    np.testing.assert_allclose(features[0], encoder.encode_array(picture), atol=1e-5)
    assert (bridge.name, bridge.layers) == ("timm:resnet18", (2, 2))
    assert bridge.widths == (128, 128)
    for attribute in ("stride", "channels", "widths", "mean", "std"):
        assert getattr(bridge, attribute) == getattr(encoder, attribute)


def test_class_tokens_are_those_of_torch():
    torch.manual_seed(0)
    encoder = encoders.create("vit_tiny_patch16_224", pretrained=False, layer=(0, 1), class_token=True)
    bridge = timm_bridge.Bridge(encoder, torch, jax.devices("cpu")[0])
    image = np.random.default_rng(0).standard_normal((2, 224, 224, 3), np.float32)
    features, token = bridge(jnp.asarray(image))
    expected = encoder(torch.from_numpy(image).permute(0, 3, 1, 2))
    assert (features.shape, token.shape, bridge.widths) == ((2, 14, 14, 384), (2, 384), (192, 192))
    np.testing.assert_allclose(features, expected[0].permute(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(token, expected[1], atol=1e-5)


def test_memory_is_shared(monkeypatch, encoder, bridge):
    maps = torch.arange(2 * 16 * 4 * 4.0).reshape(2, 4, 4, 16)
    images = []
    monkeypatch.setattr(encoder, "forward", lambda image: images.append(image) or maps.permute(0, 3, 1, 2))
    image = jax.random.normal(jax.random.key(0), (2, 64, 64, 3))
    features = bridge(image)
    assert images[0].shape == (2, 3, 64, 64)
    assert images[0].data_ptr() == image.unsafe_buffer_pointer()
    assert features.unsafe_buffer_pointer() == maps.data_ptr()
    np.testing.assert_array_equal(features, maps.numpy())


def test_create_takes_the_options_of_torch():
    bridge = timm_bridge.create("resnet18", pretrained=False, layer=1)
    assert (bridge.stride, bridge.channels) == (4, 64)
    with pytest.raises(ValueError, match=r"resnet5.*resnet50"):
        timm_bridge.create("resnet5")


def test_wrong_images_are_refused(bridge):
    with pytest.raises(ValueError, match=r"\(3, 64, 64\)"):
        bridge(jnp.zeros((3, 64, 64)))
    with pytest.raises(ValueError, match="4 x 64"):
        bridge(jnp.zeros((1, 4, 64, 3)))
    with pytest.raises(TypeError, match="int32"):
        bridge.normalize(jnp.zeros((1, 64, 64, 3), jnp.int32))
