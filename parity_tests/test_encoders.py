"""AnyUp on the features of encoders, in JAX and in PyTorch: many widths, strides, ranges of values, photographs."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

import anyup_jax
import anyup_torch
from anyup_core.checkpoints.encoder_checkpoint import EncoderCheckpoint
from anyup_jax import pretrained as jax_pretrained
from anyup_jax.encoders import creation
from anyup_torch import encoders
from anyup_torch import pretrained as torch_pretrained
from convert import Checkpoint
from parity_tests import tolerances
from parity_tests.golden import DATA, needs_photos
from tests.weights import random_weights

SIZES = {"D": 128, "M": 128, "I": 3, "k": 1, "u": 5}
RANDOM = {  # randomly initialised, with timm's architecture: image height and width
    "vit_small_patch14_dinov2": (112, 140),
    "vit_small_patch14_reg4_dinov2": (126, 112),
    "vit_base_patch16_clip_224": (112, 144),
    "vit_base_patch16_siglip_224": (128, 112),
    "vit_base_patch16_224": (112, 128),
    "resnet50": (128, 160),
    "convnext_tiny": (160, 128),
}
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])  # of AnyUp's guidance


@functools.cache
def models() -> tuple[anyup_jax.AnyUp, anyup_torch.AnyUp]:
    checkpoint = Checkpoint(random_weights(SIZES, seed=3))
    return jax_pretrained.build(checkpoint, num_heads=4), torch_pretrained.build(checkpoint, num_heads=4)


def photograph(source, height: int, width: int) -> np.ndarray:
    """Return an RGB photograph, (height, width, 3) with values in [0, 1]."""
    image = Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(source)
    with image:
        return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255


def check(encoder: encoders.Encoder, picture: np.ndarray) -> None:
    """AnyUp in JAX and in PyTorch, on the features of the encoder in PyTorch and in Flax: all four outputs agree.

    Both models upsample the raw features to a third of the image's size.
    """
    state = {key: value.numpy() for key, value in encoder.model.state_dict().items()}
    in_flax = creation.build(EncoderCheckpoint(encoder.name, state), layer=encoder.layers, norm=encoder.norm)
    features = encoder.encode_array(picture)[None]
    features_of_flax = in_flax.encode_array(picture)[None]
    assert features_of_flax.shape == features.shape
    size = (picture.shape[0] // 3, picture.shape[1] // 3)
    ours, theirs = upsample(picture, features, size)
    assert ours.shape == (1, *size, encoder.channels)
    assert np.ptp(theirs, (0, 1, 2)).max() > 1e-3 * np.abs(features).max()  # something was upsampled
    for output in ours, *upsample(picture, features_of_flax, size):
        assert np.abs(output - theirs).max() <= tolerances.ENCODER * tolerances.largest(features)


def upsample(picture: np.ndarray, features: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the output of the JAX model and that of the PyTorch model."""
    image = ((picture - MEAN) / STD)[None]
    in_jax, in_torch = models()
    ours = np.asarray(anyup_jax.upsample(in_jax, image, features, size))
    with torch.no_grad():
        image, maps = (torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))) for x in (image, features))
        return ours, in_torch(image, maps, size).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(("name", "size"), RANDOM.items(), ids=RANDOM)
def test_architectures(name, size):
    torch.manual_seed(0)
    check(encoders.create(name, pretrained=False), photograph(data.coffee(), *size))


@pytest.mark.parametrize("layer", [-1, -2])
def test_trained_weights(layer):
    check(encoders.create("efficientnet_lite0", layer=layer), photograph(data.coffee(), 168, 160))


@needs_photos
@pytest.mark.parametrize("index", [0, 1])
def test_trained_weights_on_photographs(index):
    path = sorted((DATA / "photos" / "val" / "photo").iterdir())[index]
    check(encoders.create("efficientnet_lite0", layer=-2), photograph(path, 160, 168))
