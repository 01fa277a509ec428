"""The vision transformer with learned position embeddings, in the forms of DINO, DINOv2, DeiT, CLIP, SigLIP and MAE.

"An Image is Worth 16x16 Words" (Dosovitskiy et al., 2021, arXiv 2010.11929); as timm computes it. The order of the
tokens: class token, registers, cells row by row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from anyup_core.encoders.vit import ViT as Config
from anyup_jax.encoders.layers import Conv, LayerNorm, Linear, attend, gelu, normal, run, stack
from anyup_jax.encoders.position import resample

LAYER_SCALE = 1e-5  # initial


class ViT(nnx.Module):
    """The backbone of `anyup_core.encoders.vit.ViT`."""

    def __init__(self, config: Config, *, dtype: DTypeLike, remat: bool, rngs: nnx.Rngs):
        self.config = config
        self.remat = remat
        width, patch, embedded = config.width, config.patch_size, config.grid_size**2 + config.embedded_prefix
        self.patch = Conv(3, width, patch, stride=patch, bias=not config.pre_norm, dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(normal(rngs, (1, 1, width))) if config.class_tokens else None
        self.registers = nnx.Param(normal(rngs, (1, config.registers, width))) if config.registers else None
        self.position = nnx.Param(normal(rngs, (1, embedded, width)))
        self.pre_norm = LayerNorm(width, epsilon=config.epsilon) if config.pre_norm else None
        self.blocks = stack(lambda rngs: Block(config, dtype=dtype, rngs=rngs), config.depth, rngs)
        self.norm = LayerNorm(width, epsilon=config.epsilon)

    def intermediates(
        self, image: Float[Array, "B H W 3"], layers: tuple[int, ...], norm: bool
    ) -> list[tuple[Float[Array, "B h w C"], Float[Array, "B P C"] | None]]:
        """Return the cells and the P class and register tokens after each of these blocks, in rising order."""
        cells = self.patch(image)
        batch, height, width, channels = cells.shape
        tokens = self.embed(cells)
        count = self.config.prefix_tokens
        found, start = [], 0
        for layer in layers:
            tokens = run(self.blocks, tokens, start, layer + 1, remat=self.remat)
            start = layer + 1
            final = self.norm(tokens) if norm else tokens
            grid = final[:, count:].reshape(batch, height, width, channels)
            found.append((grid, final[:, :count] if count else None))
        return found

    def embed(self, cells: Float[Array, "B h w C"]) -> Float[Array, "B T C"]:
        """Return what enters the first block: the tokens with their position embeddings, normed in a pre-norm model."""
        batch, height, width, channels = cells.shape
        side, count = self.config.grid_size, self.config.embedded_prefix
        position = self.position[...][0]
        grid = resample(position[count:].reshape(side, side, channels), height, width)
        tokens = [(cells + grid.astype(cells.dtype)).reshape(batch, height * width, channels)]
        if self.config.prefix_tokens:
            prefix = [token[...] for token in (self.class_token, self.registers) if token is not None]
            prefix = jnp.concatenate(prefix, 1)
            prefix = prefix + position[:count] if count else prefix
            tokens.insert(0, jnp.broadcast_to(prefix.astype(cells.dtype), (batch, *prefix.shape[1:])))
        tokens = jnp.concatenate(tokens, 1)
        return tokens if self.pre_norm is None else self.pre_norm(tokens)


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and added to its input, with layer scale after a scale per channel."""

    def __init__(self, config: Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width = config.width
        self.norm1 = LayerNorm(width, epsilon=config.epsilon)
        self.attention = Attention(width, config.num_heads, dtype=dtype, rngs=rngs)
        self.scale1 = nnx.Param(jnp.full(width, LAYER_SCALE)) if config.layer_scale else None
        self.norm2 = LayerNorm(width, epsilon=config.epsilon)
        self.mlp = MLP(width, config.mlp_width, config.activation, dtype=dtype, rngs=rngs)
        self.scale2 = nnx.Param(jnp.full(width, LAYER_SCALE)) if config.layer_scale else None

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        x = x + scaled(self.attention(self.norm1(x)), self.scale1)
        return x + scaled(self.mlp(self.norm2(x)), self.scale2)


class Attention(nnx.Module):
    """Self-attention of all tokens."""

    def __init__(self, width: int, num_heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.project = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        qkv = (part.reshape(*x.shape[:2], self.num_heads, -1) for part in jnp.split(self.qkv(x), 3, -1))
        return self.project(attend(*qkv).reshape(x.shape))


class MLP(nnx.Module):
    """Two layers with an activation in float32 between them; SwiGLU halves the number of channels."""

    def __init__(self, width: int, hidden: int, activation: str, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.activation = activation
        self.widen = Linear(width, 2 * hidden if activation == "swiglu" else hidden, dtype=dtype, rngs=rngs)
        self.narrow = Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        hidden = self.widen(x)
        active = ACTIVATIONS[self.activation](hidden.astype(jnp.float32))
        return self.narrow(active.astype(hidden.dtype))


def scaled(x: Float[Array, "B T C"], scale: nnx.Param | None) -> Float[Array, "B T C"]:
    return x if scale is None else scale[...].astype(x.dtype) * x


def quick_gelu(x: Float[Array, ...]) -> Float[Array, ...]:
    """OpenAI's approximation in CLIP: x sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def swiglu(x: Float[Array, "... 2*C"]) -> Float[Array, "... C"]:
    """The second half of the channels times the SiLU of the first (Shazeer, 2020, arXiv 2002.05202)."""
    gate, value = jnp.split(x, 2, -1)
    return jax.nn.silu(gate) * value


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": jax.nn.gelu, "quick_gelu": quick_gelu, "swiglu": swiglu}
