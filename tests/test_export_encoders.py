"""EfficientNet-Lite as an ONNX file, run by ONNX Runtime, against timm's model in PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as runtime
import pytest
import safetensors.torch
import timm
import torch

import anyup_core
import anyup_torch
from anyup_core.export.encoders import METADATA, build_encoder
from anyup_core.preprocessing import IMAGENET
from anyup_torch import encoders

SIZES = [(64, 96), (112, 80), (101, 75)]  # whole cells of both strides, of the finer one only, of none


@pytest.fixture(scope="module")
def session() -> runtime.InferenceSession:
    return session_of("efficientnet_lite0")


def session_of(name: str, half: bool = False) -> runtime.InferenceSession:
    file = build_encoder(name, half=half).SerializeToString()
    return runtime.InferenceSession(file, providers=["CPUExecutionProvider"])


def image(*size: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (batch, 3, *size)).astype(np.float32)


def difference(session: runtime.InferenceSession, name: str, pixels: np.ndarray) -> float:
    """Return the largest difference from timm's model over both strides, in units of the largest value."""
    worst = 0.0
    for stride, found in zip((16, 32), session.run(["stride16", "stride32"], {"image": pixels})):
        encoder = encoders.create(name, layer={16: -2, 32: -1}[stride])
        expected = encoder(torch.from_numpy(pixels)).numpy()
        assert found.shape == expected.shape
        worst = max(worst, abs(found - expected).max() / abs(expected).max())
    return worst


@pytest.mark.parametrize("size", SIZES)
def test_the_maps_are_those_of_the_encoder(size: tuple[int, int], session: runtime.InferenceSession) -> None:
    assert difference(session, "efficientnet_lite0", image(*size)) < 1e-5


@pytest.mark.parametrize("name", ["efficientnet_lite1", "efficientnet_lite2"])
def test_the_larger_ones(name: str) -> None:
    assert difference(session_of(name), name, image(64, 48, batch=1)) < 1e-5


def test_half_the_bytes(session: runtime.InferenceSession) -> None:
    whole, half = (len(build_encoder("efficientnet_lite0", half=half).SerializeToString()) for half in (False, True))
    assert half < 0.55 * whole
    assert difference(session_of("efficientnet_lite0", half=True), "efficientnet_lite0", image(64, 64)) < 0.02


def test_the_metadata_holds_the_normalisation(session: runtime.InferenceSession) -> None:
    settings = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    encoder = encoders.create("efficientnet_lite0", pretrained=False)
    assert (tuple(settings["mean"]), tuple(settings["std"])) == (encoder.mean, encoder.std)
    assert settings["strides"] == [16, 32]


def test_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match="resnet50"):
        build_encoder("resnet50", {})


VITS = {
    "class token, resized positions": dict(patch_size=8, image_size=32, width=24, depth=2, num_heads=3),
    "registers without positions, layer scale, SwiGLU": dict(
        patch_size=7,
        image_size=35,
        width=32,
        depth=1,
        num_heads=2,
        activation="swiglu",
        layer_scale=True,
        registers=4,
        embed_prefix=False,
    ),
    "pre-norm, quick GELU": dict(
        patch_size=8, image_size=16, width=16, depth=1, num_heads=1, activation="quick_gelu", pre_norm=True
    ),
    "no class token, tanh": dict(
        patch_size=8, image_size=16, width=16, depth=2, num_heads=2, activation="gelu_tanh", class_tokens=0
    ),
}


@pytest.mark.parametrize("case", VITS)
def test_a_vision_transformer(case: str) -> None:
    """Against the Flax model of the same weights, which the parity tests hold to timm's."""
    import jax.numpy as jnp
    from flax import nnx

    from anyup_core.checkpoints.checkpoint import to_torch
    from anyup_core.encoders.vit import ViT
    from anyup_core.export.vit import ViTWriter
    from anyup_jax.encoders.vit import ViT as Backbone

    config = ViT(**VITS[case])
    model = Backbone(config, dtype=jnp.float32, remat=False, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    arrays = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        array = 0.2 * random.standard_normal(leaf[...].shape).astype(np.float32)
        arrays[".".join(map(str, path))] = array
        leaf.set_value(jnp.asarray(array))
    tensors = to_torch("ViT", [row for row in config.rows() if not row.unused], arrays)
    file = ViTWriter(config, tensors, half=False).model({})
    session = runtime.InferenceSession(file.SerializeToString())
    patch = config.patch_size
    for cells in ((4, 4), (3, 6)):
        pixels = image(*(n * patch for n in cells))
        (found,) = session.run(None, {"image": pixels})
        ((expected, _),) = model.intermediates(jnp.asarray(pixels.transpose(0, 2, 3, 1)), (config.depth - 1,), True)
        np.testing.assert_allclose(found.transpose(0, 2, 3, 1), expected, rtol=0, atol=2e-5)
    (beyond,) = session.run(None, {"image": image(2 * patch + 3, 3 * patch)})
    assert beyond.shape == (2, config.width, 2, 3)


def test_a_vision_transformer_of_timm_and_anyup_in_one_file(tmp_path: Path) -> None:
    name = "vit_small_patch16_224"
    torch.manual_seed(0)
    timm_model = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    weights = tmp_path / "vit.safetensors"
    safetensors.torch.save_file(timm_model.state_dict(), weights)
    model = anyup_torch.from_pretrained("anyup_efficientnet_lite")
    path = anyup_torch.export_onnx(model, tmp_path / "both.onnx", encoder=name, encoder_weights=weights)
    pixels = image(64, 96, batch=1)  # in ImageNet's normalisation; the encoder's is (1/2, 1/2)
    mean, std = (torch.tensor(x)[:, None, None] for x in IMAGENET)
    with torch.inference_mode():
        given = torch.from_numpy(pixels)
        features = timm_model.get_intermediate_layers((given * std + mean - 0.5) / 0.5, n=1, reshape=True, norm=True)[0]
        expected = model(given, features).numpy()
    session = runtime.InferenceSession(str(path))
    (found,) = session.run(None, anyup_core.onnx_inputs(path, pixels))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * max(1, abs(expected).max()))
