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
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from anyup_core.encoders.dinov3 import DINOv3 as Config
from anyup_jax.encoders import vit
from anyup_jax.encoders.layers import Linear, attend
from anyup_jax.encoders.vit import MLP, Block, ViT, joined

TEMPERATURE = 100.0  # base of the rotary periods
Table = Float[np.ndarray | Array, "T k"]  # per token: sines or cosines, computed on the host


class DINOv3(ViT):
    """The backbone of `anyup_core.encoders.dinov3.DINOv3`."""

    def block(self, config: Config, dtype: DTypeLike, rngs: nnx.Rngs) -> Block:
        parts = (Attention, GatedMLP if config.gated_mlp else MLP)
        attention, mlp = (part(config, dtype=dtype, rngs=rngs) for part in parts)
        return Block(config, attention, mlp, rngs)

    def embed(self, cells: Float[Array, "B h w C"]) -> Float[Array, "B T C"]:
        """Return the input of the first block: the tokens as they are, as positions are rotations in the blocks."""
        return joined(self.prefix(), cells)

    def context(self, height: int, width: int) -> tuple[Table, Table]:
        """Return cosines and sines of the angles of every token, which the attention of each block turns by."""
        return rotations(height, width, self.config.width // self.config.num_heads, self.config.prefix_tokens)


class Attention(vit.Attention):
    """Self-attention with rotated queries and keys; queries and values may have a bias, keys have none."""

    def __init__(self, config: Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(config, use_bias=False, dtype=dtype, rngs=rngs)
        self.query_bias = nnx.Param(jnp.zeros(config.width, jnp.float32)) if config.qkv_bias else None
        self.value_bias = nnx.Param(jnp.zeros(config.width, jnp.float32)) if config.qkv_bias else None

    def __call__(self, x: Float[Array, "B T C"], cos: Table, sin: Table) -> Float[Array, "B T C"]:
        query, key, value = self.projections(x)
        if self.query_bias is not None:
            heads = query.shape[-2:]
            query = query + self.query_bias[...].astype(query.dtype).reshape(heads)
            value = value + self.value_bias[...].astype(value.dtype).reshape(heads)
        averages = attend(rotate(query, cos, sin), rotate(key, cos, sin), value)
        return self.project(rearrange(averages, "B T N K -> B T (N K)"))


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
