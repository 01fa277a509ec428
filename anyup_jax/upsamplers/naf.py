"""NAF in Flax nnx: neighbourhood attention of pixels to cells, by the image alone; any encoder's features."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from anyup_core.geometry import kernel_window
from anyup_core.upsamplers.naf import NAFConfig, centres, periods
from anyup_jax.attention import window_attention
from anyup_jax.blocked import map_rows
from anyup_jax.layers import Conv, GroupNorm, normed_silu
from anyup_jax.model import grid_of
from anyup_jax.pooling import adaptive_average_pool
from anyup_jax.row_shards import Size
from anyup_jax.upsamplers.interpolation import resize
from anyup_jax.upsamplers.protocol import ConfiguredUpsampler


class Buffer(nnx.Variable):
    """A table that belongs to the weights and is not trained."""


class Block(nnx.Module):
    """`conv(SiLU(GN(conv(SiLU(GN(x))))))`, without a shortcut."""

    def __init__(self, dim: int, kernel_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1, self.norm2 = GroupNorm(dim), GroupNorm(dim)
        self.conv1 = Conv(dim, dim, kernel_size, use_bias=True, dtype=dtype, rngs=rngs)
        self.conv2 = Conv(dim, dim, kernel_size, use_bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        for norm, conv in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            affine = norm.affine(x)
            if conv.kernel.shape[0] == 1:
                x = map_rows(lambda x, affine=affine, conv=conv: conv(normed_silu(x, affine)), x)
            else:
                x = conv(map_rows(lambda x, affine=affine: normed_silu(x, affine), x))
        return x


class Encoder(nnx.Module):
    """A k x k convolution and two blocks, all with reflected borders."""

    def __init__(self, dim: int, kernel_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = Conv(3, dim, kernel_size, use_bias=True, dtype=dtype, rngs=rngs)
        self.block1 = Block(dim, kernel_size, dtype=dtype, rngs=rngs)
        self.block2 = Block(dim, kernel_size, dtype=dtype, rngs=rngs)

    def __call__(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B H W D"]:
        return self.block2(self.block1(self.conv(image)))


class RoPE(nnx.Module):
    """Rotates pairs of channels, in each of several heads, by angles that grow with the row or with the column."""

    def __init__(self, dim: int, heads: int):
        self.periods = Buffer(jnp.asarray(periods(dim // heads)))

    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        table = self.periods[...]
        row, col = (2 * math.pi * jnp.asarray(centres(n))[:, None] / table for n in x.shape[1:3])
        shape = (*x.shape[1:3], len(table))
        angles = jnp.concatenate([jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(col[None], shape)], -1)
        cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
        pairs = x.reshape(*x.shape[:3], -1, 2, 2 * len(table))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], -2)
        return turned.reshape(x.shape).astype(x.dtype)


class NAF(ConfiguredUpsampler):
    """NAF: queries and keys are of the image alone; each head averages its own share of the raw features' channels.

    Args:
        config: the settings; the default ones if None.
        rngs: random streams for the initial parameters.
        dtype: type of the computation, float32 or bfloat16; parameters are float32 either way.
        fields: fields of `NAFConfig` that differ from these.

    Raises:
        TypeError: for fields that do not exist.
        ValueError: for settings no model can have.
    """

    settings = NAFConfig
    one_by_one = True

    def __init__(
        self, config: NAFConfig | None = None, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, **fields: Any
    ):
        super().__init__(config, dtype, **fields)
        settings = self.config
        self.encoder = Encoder(settings.dim // 2, 1, dtype=dtype, rngs=rngs)
        self.sem_encoder = Encoder(settings.dim // 2, 3, dtype=dtype, rngs=rngs)
        self.rope = RoPE(settings.dim, settings.rope_heads)

    def upsample(
        self, image: Float[Array, "B H W 3"], features: Float[Array, "B h w C"], size: Size, q_chunk_size: int | None
    ) -> Float[Array, "B Ho Wo C"]:
        grid = grid_of(features)
        image = resize(image, self.config.reduced(grid_of(image), size), "bilinear").astype(self.dtype)
        halves = [adaptive_average_pool(encode(image), size) for encode in (self.encoder, self.sem_encoder)]
        query = self.rope(jnp.concatenate(halves, -1))
        key = adaptive_average_pool(query, grid)
        windows = [kernel_window(n, m, self.config.kernel_size) for n, m in zip(size, grid)]
        options: dict[str, Any] = dict(num_heads=self.config.num_heads, q_chunk_size=q_chunk_size)
        return window_attention(query, key, features, *windows, values_per_head=True, **options)
