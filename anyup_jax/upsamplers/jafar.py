"""JAFAR (arXiv 2506.11136) in Flax nnx: global attention to cells whose keys the features modulate."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from anyup_core.geometry import axis_window
from anyup_core.upsamplers.jafar import JAFARConfig
from anyup_jax.blocked import map_rows
from anyup_jax.image_code import encode_image
from anyup_jax.layers import Conv, ConvEncoder, Linear, RMSNorm, RoPE, Unused, group_affine
from anyup_jax.model import CrossAttention, grid_of
from anyup_jax.row_shards import ALL_ROWS, Size
from anyup_jax.upsamplers.protocol import ConfiguredUpsampler


class Modulation(nnx.Module):
    """Scales and shifts the image's keys, normalised, as the features' description says."""

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.gamma = Conv(dim, dim, dtype=dtype, rngs=rngs)
        self.beta = Conv(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, key: Float[Array, "B h w D"], described: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        return self.gamma(described) * normed(key) + self.beta(described)


class Attention(CrossAttention):
    """AnyUp's, with the published weights that never reach the output in the widths of JAFAR."""

    def __init__(self, config: JAFARConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.norm_v = RMSNorm(config.channels, Unused)
        self.value = Linear(config.channels, config.qk_dim, dtype=dtype, rngs=rngs, variable=Unused)


class JAFAR(ConfiguredUpsampler):
    """JAFAR: every output position attends to all cells, and averages the raw features.

    Args:
        config: the settings; the default ones if None.
        rngs: random streams for the initial parameters.
        dtype: type of the computation, float32 or bfloat16; parameters are float32 either way.
        fields: fields of `JAFARConfig` that differ from these.

    Raises:
        TypeError: for fields that do not exist.
        ValueError: for settings no model can have.
    """

    settings = JAFARConfig
    one_by_one = True

    def __init__(
        self, config: JAFARConfig | None = None, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, **fields: Any
    ):
        super().__init__(config, dtype, **fields)
        settings = self.config
        dim, options = settings.qk_dim, dict[str, Any](dtype=dtype, rngs=rngs)
        self.image_encoder = ConvEncoder(3, dim, settings.kernel_size, **options)
        self.key_encoder = ConvEncoder(dim, dim, **options)
        self.query_encoder = ConvEncoder(dim, dim, **options)
        self.key_features_encoder = ConvEncoder(settings.channels, dim, **options)
        self.cross_decode = Attention(settings, **options)
        self.modulation = Modulation(dim, **options)
        self.rope = RoPE(dim)

    def upsample(
        self, image: Float[Array, "B H W 3"], features: Float[Array, "B h w C"], size: Size, q_chunk_size: int | None
    ) -> Float[Array, "B Ho Wo C"]:
        grid = grid_of(features)
        code = encode_image(self, image, [grid], [size], ALL_ROWS)
        square = jnp.square(features).sum(-1, keepdims=True)
        norm = jnp.sqrt(jnp.where(square > 0, square, 1))  # a zero vector stays zero, and its gradient finite
        described = self.key_features_encoder(features / jnp.maximum(norm, 1e-12))
        key, query = self.modulation(code.key(grid), described), normed(code.query(size))
        windows = [(axis_window(size[0], grid[0], 0), axis_window(size[1], grid[1], 0))]
        return self.cross_decode(query, [(key, features)], windows, backend="auto", q_chunk_size=q_chunk_size)[0]


def normed(x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
    """GroupNorm without scale and shift."""
    scale, shift = group_affine(x)
    return map_rows(lambda x: (x * scale + shift).astype(x.dtype), x)
