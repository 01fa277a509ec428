"""Runs small enough for tests: their settings, the command line, and what they write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize
from omegaconf import OmegaConf

import convert
from anyup_core.settings import from_dict
from train import presets
from train.config import Config

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "model.qk_dim=16", "model.num_heads=2", "model.backend=tiled", "dataset.crop_size=64", "dataset.img_size=32",
    "dataset.num_local_crops=2", "dtype=float32", "encoders.lite0.layer=[2]", "log.every=1", "log.pictures_every=0",
    "log.tensorboard=false", "batch_size=2",
)  # fmt: skip
"""Stride 8 of EfficientNet-Lite0 on 64 pixels."""


def tiny(*words: str) -> list[str]:
    """Return settings, and those of TINY that they do not set."""
    given = {word.partition("=")[0] for word in words}
    return [*words, *(x for x in TINY if x.partition("=")[0] not in given)]


def configured(*words: str) -> Config:
    """Return the configuration of a command line."""
    presets.register()
    with initialize(version_base="1.3", config_path=None):
        return from_dict(Config, OmegaConf.to_container(compose(presets.NAME, list(words)), resolve=True))


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "train.run", *tiny(*words)]


CACHE = tempfile.TemporaryDirectory(prefix="compiled-", ignore_cleanup_errors=True)


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a process that shares compiled programs with the processes before it."""
    cache = dict(JAX_COMPILATION_CACHE_DIR=CACHE.name, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.3")
    quiet = dict(TPU_SKIP_MDS_QUERY="1", TPU_LOG_DIR="disabled", JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    return os.environ | cache | quiet | changes


def train(folder: Path, *words: str, status: int = 0, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder until it ends, and check its exit status."""
    options = dict(capture_output=True, text=True, check=False, cwd=folder, env=environment(**changes))
    run = subprocess.run(command(*words), **options)
    assert run.returncode == status, run.stdout[-1500:] + run.stderr[-3000:]
    return run


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def weights(run: Path) -> dict[str, np.ndarray]:
    return convert.read(run).tensors


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    """Return whether the weights are equal bit for bit."""
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)
