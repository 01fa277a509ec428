"""The frozen encoders of a run: what can be said of them before anything is fetched, how they are loaded and chosen."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anyup_jax.encoders.settings import check_cells
from train.config import Config
from train.step import Geometry


def check_sizes(name: str, patch: int, config: Config) -> None:
    """Raise ValueError unless photographs and views of these sizes are whole cells of an encoder."""
    for field in ("crop_size", "img_size"):
        check_cells(f"dataset.{field}", getattr(config.dataset, field), name, patch)


def choose(seed: int, step: int, patches: dict[str, int]) -> str:
    """Return the encoder of a step: a patch size, every one as likely, then one of the encoders that have it."""
    random = np.random.default_rng((seed, step, 0))
    patch = random.choice(sorted(set(patches.values())))
    return str(random.choice([name for name, size in patches.items() if size == patch]))


def geometry(config: Config, patch: int, step: int) -> Geometry:
    """Return the sizes of a step: what the configuration leaves to chance is drawn anew for each."""
    data, whole = config.dataset, config.dataset.img_size
    if data.global_view_random_resize is not None:
        scale = np.random.default_rng((config.seed, step, 1)).uniform(*data.global_view_random_resize)
        whole = tuple(max(2, round(side * scale / patch)) * patch for side in data.crop_size)
    share = float(np.random.default_rng((config.seed, step, 2)).choice(config.features.shares))
    return Geometry(
        patch, data.crop_size, data.img_size, whole, data.guidance_size or whole, config.consistency_size, share
    )


def bridge_features(encoder: Any, batch: dict[str, np.ndarray], sizes: Geometry) -> dict[str, np.ndarray]:
    """Return a timm model's features of this process's photographs and their crops, as "lr" and "hr"."""
    views, crops = _bridge_views(dataclasses.replace(sizes, share=1.0))(batch["image"], batch["crops"])
    lr = encoder(encoder.normalize(views))
    hr = encoder(encoder.normalize(crops.reshape(-1, *crops.shape[2:])))
    return dict(lr=np.asarray(lr), hr=np.asarray(hr).reshape(*crops.shape[:2], *hr.shape[1:]))


@functools.cache
def _bridge_views(sizes: Geometry):
    from train.loss import cut_crops
    from train.step import lr_view

    def views(image, uniform):
        crops = cut_crops(jnp.asarray(image), sizes.corners(uniform) * sizes.patch, sizes.view)
        return lr_view(image, sizes.whole), crops.astype(jnp.float32) / 255

    return jax.jit(views)
