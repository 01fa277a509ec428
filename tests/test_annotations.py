"""The shapes in the annotations are true: both models run with every annotation checked."""

from __future__ import annotations

import subprocess
import sys

import pytest

HOOK = """
from jaxtyping import install_import_hook
with install_import_hook(["anyup_jax", "anyup_torch"], "beartype.beartype"):
    import anyup_jax.model, anyup_torch.model, anyup_jax.visualize
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
        print(model(image, features, size, values=values, check=True).shape)
        print(anyup_jax.upsample(model, image, features, size).shape)
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
"""


@pytest.mark.parametrize("program", [JAX, TORCH], ids=["jax", "torch"])
def test_annotations_hold(program: str) -> None:
    run = subprocess.run([sys.executable, "-c", HOOK + program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.stdout.splitlines()) == 8


def test_the_check_can_fail() -> None:
    wrong = "anyup_jax.layers.adaptive_average_pool(image[0], (2, 2))"
    run = subprocess.run([sys.executable, "-c", HOOK + wrong], capture_output=True, text=True, check=False)
    assert "TypeCheckError" in run.stderr
