"""The frozen encoders of a run: which sizes they take, which of them a step uses, and their features."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from anyup_core.encoders.frozen import FrozenEncoder
from anyup_jax.encoders.encoder import Encoder
from anyup_jax.encoders.settings import check_cells
from anyup_jax.encoders.timm_bridge import Bridge
from train import sharding
from train.config import Config, DatasetConfig
from train.step import StepSizes, encoder_views, features_of

_encoder_views = jax.jit(encoder_views, static_argnames=("sizes", "data"))


def check_sizes(name: str, patch: int, config: Config) -> None:
    """Raise ValueError unless the sides of photographs and views are multiples of the encoder's patch."""
    for field in ("crop_size", "img_size"):
        check_cells(f"dataset.{field}", getattr(config.dataset, field), name, patch)


def split(encoder: FrozenEncoder, kind: str, mesh: Mesh) -> tuple[nnx.GraphDef | None, Any, Any]:
    """Return a Flax encoder's structure, its parameters and their PartitionSpecs; None, () and () for PyTorch.

    `kind` is `mesh.encoders`.
    """
    if not isinstance(encoder, Encoder):
        return None, (), ()
    graph, state = nnx.split(encoder)
    return graph, state, sharding.specs(state, kind, mesh)


def choose(seed: int, step: int, patches: dict[str, int]) -> str:
    """Return the encoder of a step: a random patch size, then a random encoder of that patch size, both uniform."""
    random = np.random.default_rng((seed, step, 0))
    patch = random.choice(sorted(set(patches.values())))
    return str(random.choice([name for name, size in patches.items() if size == patch]))


def step_sizes(config: Config, patch: int, step: int) -> StepSizes:
    """Return the sizes of a step; those that the configuration leaves to chance are drawn for each step."""
    data, whole = config.dataset, config.dataset.img_size
    consistency = config.loss.consistency_size or data.img_size
    if data.global_view_random_resize is not None:
        scale = np.random.default_rng((config.seed, step, 1)).uniform(*data.global_view_random_resize)
        whole = tuple(max(2, round(side * scale / patch)) * patch for side in data.crop_size)
    share = float(np.random.default_rng((config.seed, step, 2)).choice(config.features.shares))
    return StepSizes(patch, data.crop_size, data.img_size, whole, data.guidance_size or whole, consistency, share)


def bridge_features(
    encoder: Bridge, batch: dict[str, np.ndarray], sizes: StepSizes, data: DatasetConfig
) -> dict[str, np.ndarray]:
    """Return a timm model's features of this process's photographs and of their crops, as "lr" and "hr"."""
    images = {name: batch[name] for name in ("image", "crops")}
    views = _encoder_views(images, sizes=dataclasses.replace(sizes, share=1.0), data=data)  # one program for all shares
    return dict(zip(("lr", "hr"), map(np.asarray, features_of(encoder, views))))
