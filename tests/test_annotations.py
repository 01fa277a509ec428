"""The shapes in the annotations are true: both models run with every annotation checked."""

from __future__ import annotations

import subprocess
import sys

import pytest

HOOK = """
from jaxtyping import install_import_hook
with install_import_hook(["anyup_jax", "anyup_torch"], "beartype.beartype"):
    import anyup_jax.model, anyup_torch.model, anyup_core.visualize, anyup_jax.bands, anyup_torch.bands
    import anyup_jax.encoders.creation, anyup_torch.encoders
    from anyup_jax.encoders import convnext, dinov3, efficientnet, resnet, vit
import numpy as np
random = np.random.default_rng(0)
image, features = (random.standard_normal(s, dtype=np.float32) for s in ((2, 20, 30, 3), (2, 4, 5, 7)))
values = random.standard_normal((2, 4, 5, 3), dtype=np.float32)
"""
JAX = """
from flax import nnx
for backend in "dense", "tiled":
    config = anyup_jax.AnyUpConfig(qk_dim=16, lfu_dim=24, kernel_size=3, backend=backend)
    model = anyup_jax.AnyUp(config, rngs=nnx.Rngs(0))
    for size in None, (9, 40):
        for values_ in None, values:
            print(nnx.eval_shape(lambda model: model(image, features, size, values=values_), model).shape)
print(model(image, features, size, values=values, check=True).shape)
for band in anyup_jax.upsample_bands(model, image, features, (9, 40), values=values, rows=6):
    print(band.shape)
"""
TORCH = """
import torch
image, features, values = (torch.from_numpy(a).permute(0, 3, 1, 2) for a in (image, features, values))
for backend in "dense", "tiled":
    model = anyup_torch.AnyUp(anyup_torch.AnyUpConfig(qk_dim=16, lfu_dim=24, kernel_size=3, backend=backend))
    for grad in False, True:
        for size in None, (9, 40):
            with torch.set_grad_enabled(grad):
                print(tuple(model(image, features, size, values=values, check=True).shape))
for band in anyup_torch.upsample_bands(model, image, features, (9, 40), values=values, rows=6):
    print(tuple(band.shape))
"""
ENCODERS = """
import dataclasses
import jax
import jax.numpy as jnp
from anyup_core.encoders import catalogue
from anyup_jax.encoders import creation
from anyup_jax.encoders.encoder import Encoder
shorter = {"depth": 2, "depths": (2, 2, 2, 2)}
for name in ("vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224",
             "vit_tiny_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3", "resnet50", "convnext_tiny",
             "tf_efficientnet_lite0"):
    published = catalogue.find(name)
    fields = {f.name for f in dataclasses.fields(published.config)} & set(shorter)
    config = dataclasses.replace(published.config, **{field: shorter[field] for field in fields})
    published = dataclasses.replace(published, config=config)


    def features(image):
        backbone = creation.backbone(config, jnp.float32, False, 0)
        encoder = Encoder(backbone, published, layer=1, class_token=bool(config.class_tokens))
        return encoder(encoder.normalize(image))

    print(name, jax.eval_shape(features, jnp.ones((1, 40, 56, 3))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [JAX, TORCH, ENCODERS], ids=["jax", "torch", "encoders"])
def test_annotations_hold(program: str) -> None:
    run = subprocess.run([sys.executable, "-c", HOOK + program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.stdout.splitlines()) == {JAX: 11, TORCH: 10, ENCODERS: 8}[program]


@pytest.mark.slow
def test_the_check_can_fail() -> None:
    wrong = "anyup_jax.row_shards.adaptive_average_pool(image[0], (2, 2))"
    run = subprocess.run([sys.executable, "-c", HOOK + wrong], capture_output=True, text=True, check=False)
    assert "TypeCheckError" in run.stderr
