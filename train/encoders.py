"""The frozen encoders of a run: which sizes they take, which of them a step uses, and their features."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from anyup_core.config import AnyUpConfig
from anyup_core.encoders.frozen import FrozenEncoder
from anyup_core.settings import require
from anyup_core.upsamplers.config import UpsamplerConfig
from anyup_jax.encoders.encoder import Encoder
from anyup_jax.encoders.settings import check_cells
from anyup_jax.encoders.timm_bridge import Bridge
from train import sharding
from train.config import Config, DatasetConfig
from train.featup import BORDER
from train.step import StepSizes, encoder_views, features_of
from train.upsamplers import FeatUpModel, OtherModel

_encoder_views = jax.jit(encoder_views, static_argnames=("sizes", "data"))


def check_sizes(name: str, patch: int, config: Config, settings: AnyUpConfig | UpsamplerConfig) -> None:
    """Raise ValueError unless photographs and views have whole cells of the encoder, as many as the model needs.

    `settings` are those of the model.
    """
    for field in ("crop_size", "img_size"):
        check_cells(f"dataset.{field}", getattr(config.dataset, field), name, patch)
    if isinstance(settings, UpsamplerConfig):
        check_upsampler(name, patch, config, settings)


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
    if isinstance(config.model, OtherModel):
        return other_sizes(config, config.model, patch, np.random.default_rng((config.seed, step, 1)).random())
    consistency = config.loss.consistency_size or data.img_size
    if data.global_view_random_resize is not None:
        scale = np.random.default_rng((config.seed, step, 1)).uniform(*data.global_view_random_resize)
        whole = tuple(max(2, round(side * scale / patch)) * patch for side in data.crop_size)
    share = float(np.random.default_rng((config.seed, step, 2)).choice(config.features.shares))
    return StepSizes(patch, data.crop_size, data.img_size, whole, data.guidance_size or whole, consistency, share)


def other_sizes(config: Config, model: OtherModel, patch: int, draw: float) -> StepSizes:
    """Return the sizes of a step of another upsampler; `draw`, from 0 to 1, stands for the scales of the input."""
    data, whole = config.dataset, config.dataset.crop_size
    if (scales := data.global_view_random_resize or model.scales) is not None:
        scale = scales[0] + draw * (scales[1] - scales[0])
        whole = tuple(max(1, round(side * scale / patch)) * patch for side in whole)
    guidance = data.guidance_size or tuple(max(1, round(side * model.guidance)) for side in data.crop_size)
    return StepSizes(patch, data.crop_size, data.crop_size, whole, guidance, guidance, antialias=False)


def check_upsampler(name: str, patch: int, config: Config, settings: UpsamplerConfig) -> None:
    """Raise ValueError for sizes, of the steps or of the pictures, that another upsampler than AnyUp cannot handle."""
    if not isinstance(config.model, OtherModel):
        return
    for draw in (0.0, 1.0):
        sizes = other_sizes(config, config.model, patch, draw)
        low = sizes.whole[0] // patch, sizes.whole[1] // patch
        views = [(sizes.guidance, low)]
        if config.log.pictures_every:
            view = config.dataset.img_size
            views.append((view, (view[0] // patch, view[1] // patch)))
        for guidance, cells in views:
            try:
                settings.check(guidance, cells, sizes.cells)
            except ValueError as error:
                where = f"dataset.crop_size={sizes.crop} and dataset.img_size={config.dataset.img_size}"
                raise ValueError(f"{where} do not fit the encoder {name}: {error}") from error
    if isinstance(config.model, FeatUpModel):
        least = BORDER + 1
        require(min(config.dataset.crop_size) >= least, "dataset.crop_size", config.dataset.crop_size,
                f"featup reflects {BORDER} pixels at the borders; give at least {least} x {least}")  # fmt: skip


def bridge_features(
    encoder: Bridge, batch: dict[str, np.ndarray], sizes: StepSizes, data: DatasetConfig
) -> dict[str, np.ndarray]:
    """Return a timm model's features of this process's photographs and of their crops, as "lr" and "hr"."""
    images = {name: batch[name] for name in ("image", "crops")}
    views = _encoder_views(images, sizes=dataclasses.replace(sizes, share=1.0), data=data)  # one program for all shares
    return dict(zip(("lr", "hr"), map(np.asarray, features_of(encoder, views))))
