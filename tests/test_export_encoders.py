"""EfficientNet-Lite as an ONNX file, run by ONNX Runtime, against timm's model in PyTorch."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from anyup_core.export.encoders import METADATA, build_encoder
from anyup_torch import encoders

runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

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
