"""DINOv3's vision transformer: rotary position embeddings over the cells, register tokens and layer scale.

"DINOv3" (Siméoni et al., 2025, arXiv 2508.10104); as timm computes it. The order of the tokens: class token, registers,
cells row by row.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from anyup_core.encoders.dinov3 import DINOv3 as Config
from anyup_jax.encoders.layers import Conv, LayerNorm, Linear, gelu, normal, run, stack

EPSILON = 1e-5  # of every norm
TEMPERATURE = 100.0  # base of the rotary periods
LAYER_SCALE = 1e-5  # initial
Table = Float[np.ndarray | Array, "T k"]  # per token: sines or cosines, computed on the host


class DINOv3(nnx.Module):
    """The backbone of `anyup_core.encoders.dinov3.DINOv3`."""

    def __init__(self, config: Config, *, dtype: DTypeLike, remat: bool, rngs: nnx.Rngs):
        self.config = config
        self.remat = remat
        size = config.patch_size
        self.patch = Conv(3, config.width, size, stride=size, dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(normal(rngs, (1, 1, config.width)))
        self.registers = nnx.Param(normal(rngs, (1, config.registers, config.width)))
        self.blocks = stack(lambda rngs: Block(config, dtype=dtype, rngs=rngs), config.depth, rngs)
        self.norm = LayerNorm(config.width, epsilon=EPSILON)

    def intermediates(
        self, image: Float[Array, "B H W 3"], layers: tuple[int, ...], norm: bool
    ) -> list[tuple[Float[Array, "B h w C"], Float[Array, "B P C"]]]:
        """Return the cells and the P class and register tokens after each of these blocks, in rising order."""
        cells = self.patch(image)
        batch, height, width, channels = cells.shape
        prefix = jnp.concatenate([self.class_token[...], self.registers[...]], 1).astype(cells.dtype)
        count = prefix.shape[1]
        prefix = jnp.broadcast_to(prefix, (batch, count, channels))
        tokens = jnp.concatenate([prefix, cells.reshape(batch, height * width, channels)], 1)
        rotation = rotations(height, width, channels // self.config.num_heads, count)
        found, start = [], 0
        for layer in layers:
            tokens = run(self.blocks, tokens, start, layer + 1, remat=self.remat, context=rotation)
            start = layer + 1
            final = self.norm(tokens) if norm else tokens
            found.append((final[:, count:].reshape(batch, height, width, channels), final[:, :count]))
        return found


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and added to its input after a learned scale per channel."""

    def __init__(self, config: Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(config.width, epsilon=EPSILON)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.scale1 = nnx.Param(jnp.full(config.width, LAYER_SCALE))
        self.norm2 = LayerNorm(config.width, epsilon=EPSILON)
        self.mlp = (GatedMLP if config.gated_mlp else MLP)(config, dtype=dtype, rngs=rngs)
        self.scale2 = nnx.Param(jnp.full(config.width, LAYER_SCALE))

    def __call__(self, x: Float[Array, "B T C"], cos: Table, sin: Table) -> Float[Array, "B T C"]:
        x = x + self.scale1[...].astype(x.dtype) * self.attention(self.norm1(x), cos, sin)
        return x + self.scale2[...].astype(x.dtype) * self.mlp(self.norm2(x))


class Attention(nnx.Module):
    """Self-attention with rotated queries and keys; queries and values may have a bias, keys have none."""

    def __init__(self, config: Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        self.qkv = Linear(config.width, 3 * config.width, bias=False, dtype=dtype, rngs=rngs)
        self.query_bias = nnx.Param(jnp.zeros(config.width)) if config.qkv_bias else None
        self.value_bias = nnx.Param(jnp.zeros(config.width)) if config.qkv_bias else None
        self.project = Linear(config.width, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T C"], cos: Table, sin: Table) -> Float[Array, "B T C"]:
        query, key, value = jnp.split(self.qkv(x), 3, -1)
        if self.query_bias is not None:
            query = query + self.query_bias[...].astype(query.dtype)
            value = value + self.value_bias[...].astype(value.dtype)
        query, key, value = (part.reshape(*x.shape[:2], self.num_heads, -1) for part in (query, key, value))
        mixed = jax.nn.dot_product_attention(rotate(query, cos, sin), rotate(key, cos, sin), value)
        return self.project(mixed.reshape(x.shape))


class MLP(nnx.Module):
    """Two layers with a GELU between them."""

    def __init__(self, config: Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.widen = Linear(config.width, config.mlp_width, dtype=dtype, rngs=rngs)
        self.narrow = Linear(config.mlp_width, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        return self.narrow(gelu(self.widen(x)))


class GatedMLP(nnx.Module):
    """SwiGLU: one of two layers' outputs is scaled by the SiLU of the other's (Shazeer, 2020, arXiv 2002.05202)."""

    def __init__(self, config: Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.gate = Linear(config.width, config.mlp_width, dtype=dtype, rngs=rngs)
        self.widen = Linear(config.width, config.mlp_width, dtype=dtype, rngs=rngs)
        self.narrow = Linear(config.mlp_width, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        return self.narrow(jax.nn.silu(self.gate(x)) * self.widen(x))


def rotate(x: Float[Array, "B T N K"], cos: Table, sin: Table) -> Float[Array, "B T N K"]:
    """Turn the pairs (x[i], x[k + i]), k = K / 2, of every head by the token's angles; in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


@functools.lru_cache(maxsize=32)
def rotations(height: int, width: int, head_size: int, prefix: int) -> tuple[Table, Table]:
    """Return cos and sin of the angles of every token, k = head_size / 2; the `prefix` tokens are not turned.

    The angles are 2 pi y / period and then 2 pi x / period, where y and x, between -1 and 1, are the centre of the cell
    in an image whose sides are 2, whatever its shape, and the periods are 100^(2 j / k) for j = 0 ... k / 2 - 1.
    Everything is float32, in timm's order of operations.
    """
    exponents = np.float32(2) * np.arange(head_size // 4, dtype=np.float32) / np.float32(head_size // 2)
    periods = np.float32(TEMPERATURE) ** exponents
    centres = (2 * (np.arange(0.5, side, dtype=np.float32) / np.float32(side)) - 1 for side in (height, width))
    by_row, by_column = (np.float32(2 * math.pi) * centre[:, None] / periods for centre in centres)
    angles = np.concatenate([np.repeat(by_row, width, 0), np.tile(by_column, (height, 1))], 1)
    still = np.zeros((prefix, head_size // 2), np.float32)
    angles = np.concatenate([still, angles])
    return np.cos(angles), np.sin(angles)
