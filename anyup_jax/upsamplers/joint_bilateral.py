"""Joint bilateral upsampling (Kopf et al., 2007), which needs no training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from anyup_core.geometry import AxisWindow
from anyup_core.upsamplers.joint_bilateral import JointBilateralConfig
from anyup_jax.row_shards import Size
from anyup_jax.upsamplers.protocol import ConfiguredUpsampler


class JointBilateral(ConfiguredUpsampler):
    """A position averages the cells around it, by their distance and by how much its colour differs from theirs.

    A chunk size has nothing to bound: one cell of every window is worked on at a time.

    Args:
        config: the settings; the default ones if None.
        rngs: ignored, as there are no parameters.
        dtype: ignored; the type of the features is that of the computation.
        fields: fields of `JointBilateralConfig` that differ from these.
    """

    settings = JointBilateralConfig

    def __init__(
        self,
        config: JointBilateralConfig | None = None,
        *,
        rngs: nnx.Rngs | None = None,
        dtype: DTypeLike = jnp.float32,
        **fields: Any,
    ):
        super().__init__(config, dtype, **fields)

    def upsample(
        self, image: Float[Array, "B H W 3"], features: Float[Array, "B h w C"], size: Size, q_chunk_size: int | None
    ) -> Float[Array, "B Ho Wo C"]:
        std = jnp.asarray(self.normalisation[1], jnp.float32)
        features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        return joint_bilateral(
            self.config, image.astype(jnp.float32) * std, features, size
        )  # differences of colours in [0, 1]


def joint_bilateral(
    config: JointBilateralConfig, image: Float[Array, "B H W 3"], values: Float[Array, "B h w E"], size: Size
) -> Float[Array, "B Ho Wo E"]:
    """Upsample values by the colours of an image in [0, 1], or with a constant added to it."""
    cells = values.shape[1], values.shape[2]
    shapes = ((image.shape[0], *side, 3) for side in (size, cells))
    guide, coarse = (jax.image.resize(image, shape, "bilinear", antialias=True) for shape in shapes)
    rows, cols = ((np.arange(n) + 0.5) * m / n - 0.5 for n, m in zip(size, cells))

    def weigh(i, j):
        distance = jnp.square(rows - i)[:, None] + jnp.square(cols - j)[None]
        colour = jnp.square(guide - coarse[:, i][:, :, j]).sum(-1)
        return jnp.exp(-0.5 * (distance / config.spatial**2 + colour / config.range**2))

    return average(values, config.windows(cells, size), weigh, least=1e-30)


def average(
    values: Float[Array, "B h w E"],
    windows: tuple[AxisWindow, AxisWindow],
    weigh: Callable[[Int[Array, " Ho"], Int[Array, " Wo"]], Float[Array, "B Ho Wo"]],
    least: float = 0.0,
) -> Float[Array, "B Ho Wo E"]:
    """Average the cells of every position's window.

    Args:
        values: of the cells.
        windows: of rows and columns.
        weigh: takes a row of cells for each row of positions and a column of cells for each column of positions;
            returns the weights of the cells where they meet.
        least: added to the sum of the weights, where that can be 0.
    """
    tall, wide = windows
    span = wide.count.shape[1]

    def add(sums, offset):  # one cell of every window at a time: memory for one map of values
        row, col = offset // span, offset % span
        i, j = jnp.asarray(tall.start) + row, jnp.asarray(wide.start) + col
        seen = jnp.asarray(tall.count)[:, row, None] * jnp.asarray(wide.count)[:, col]
        weight = seen * weigh(i, j)  # beyond the last cell it is that of the last, seen 0 times
        total, weights = sums
        return (total + weight[..., None] * values[:, i][:, :, j], weights + weight), None

    total = jnp.zeros((values.shape[0], len(tall.start), len(wide.start), values.shape[-1]), values.dtype)
    sums = total, jnp.full(total.shape[:3], least)
    (total, weights), _ = jax.lax.scan(add, sums, jnp.arange(tall.count.shape[1] * span))
    return total / weights[..., None]
