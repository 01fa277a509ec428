"""Runs of the other upsamplers: their objectives, resuming, what they leave, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import anyup_jax
from anyup_core.upsamplers import sources
from anyup_jax import upsamplers
from tests.training import configured, losses, same
from train import loop, models, optim, others
from train import featup as parts
from train.config import OptimizerConfig

SMALL = (
    "dtype=float32", "encoders.lite0.layer=[2]", "encoders.lite0.pretrained=false", "log.every=1",
    "log.pictures_every=0", "log.tensorboard=false", "batch_size=2", "dataset.crop_size=64", "dataset.img_size=32",
    "checkpoint.every=2", "checkpoint.keep=9", "optimizer.learning_rate=3e-3",
)  # fmt: skip
"""Stride 8 of a random EfficientNet-Lite0 on 64 pixels."""
MODELS = {
    "jafar": ("model.qk_dim=16", "model.num_heads=2"),
    "naf": ("model.dim=32", "model.kernel_size=3", "model.rope_heads=2"),
    "featup": ("optimizer.clip_norm=null", "optimizer.clip_steps=null"),
}


def run(folder: Path, name: str, *words: str) -> Path:
    config = configured(f"model={name}", *MODELS[name], *SMALL, f"output_dir={folder}", *words)
    assert loop.run(config) == 0
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Six steps of each without interruption."""
    return {name: run(tmp_path_factory.mktemp(name) / "run", name, "max_steps=6") for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_falls_and_the_run_is_the_model(name: str, runs: dict[str, Path]) -> None:
    values = losses(runs[name])
    assert np.mean(values[-2:]) < np.mean(values[:2])
    model = upsamplers.from_pretrained(name, runs[name])
    width = 40 if name != "naf" else None
    assert model.channels == width
    config = configured(f"model={name}", *MODELS[name], *SMALL)
    if name == "jafar":
        assert model.config.num_heads == 2
    assert models.settings(config) == model.config
    output = model(jnp.zeros((1, 32, 32, 3)), jnp.ones((1, 4, 4, 40)), (16, 16))
    assert np.isfinite(output).all()
    with pytest.raises(ValueError, match=name):
        anyup_jax.from_pretrained(runs[name])
    other = "naf" if name == "jafar" else "jafar"
    with pytest.raises(ValueError, match=name):
        upsamplers.from_pretrained(other, runs[name])


@pytest.mark.parametrize("name", MODELS)
def test_it_resumes_bit_for_bit(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    run(tmp_path / "run", name, "max_steps=2")
    run(tmp_path / "run", name, "max_steps=4")
    assert losses(tmp_path / "run") == losses(runs[name])[:4]
    there, here = (sources.read(name, folder / "checkpoints" / "4") for folder in (runs[name], tmp_path / "run"))
    assert same(there.tensors, here.tensors)
