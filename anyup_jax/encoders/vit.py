"""The vision transformer with learned position embeddings, in the forms of DINO, DINOv2, DeiT, CLIP, SigLIP and MAE.

"An Image is Worth 16x16 Words" (Dosovitskiy et al., 2021, arXiv 2010.11929); as timm computes it. The order of the
tokens: class token, registers, cells row by row.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from einops import pack, rearrange, repeat, unpack
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from anyup_core.encoders.vit import ViT as Config
from anyup_jax.encoders.layers import Conv, LayerNorm, Linear, attend, gelu, normal, run, stack

LAYER_SCALE = 1e-5  # initial


class ViT(nnx.Module):
    """The backbone of `anyup_core.encoders.vit.ViT`."""

    def __init__(self, config: Config, *, dtype: DTypeLike, remat: bool, rngs: nnx.Rngs):
        self.config = config
        self.remat = remat
        width, patch, epsilon = config.width, config.patch_size, config.epsilon
        embedded = config.grid_size**2 + config.embedded_prefix
        self.patch = Conv(3, width, patch, stride=patch, use_bias=not config.pre_norm, dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(normal(rngs.params(), (1, 1, width))) if config.class_tokens else None
        self.registers = nnx.Param(normal(rngs.params(), (1, config.registers, width))) if config.registers else None
        self.position = nnx.Param(normal(rngs.params(), (1, embedded, width))) if embedded else None
        self.pre_norm = LayerNorm(width, epsilon=epsilon, rngs=rngs) if config.pre_norm else None
        self.blocks = stack(lambda rngs: self.block(config, dtype, rngs), config.depth, rngs)
        self.norm = LayerNorm(width, epsilon=epsilon, rngs=rngs)

    def block(self, config: Config, dtype: DTypeLike, rngs: nnx.Rngs) -> Block:
        attention, mlp = (part(config, dtype=dtype, rngs=rngs) for part in (Attention, MLP))
        return Block(config, attention, mlp, rngs)

    def intermediates(
        self, image: Float[Array, "B H W 3"], layers: tuple[int, ...], norm: bool
    ) -> list[tuple[Float[Array, "B h w C"], Float[Array, "B P C"]]]:
        """Return the cells and the P class and register tokens after each of these blocks, in rising order."""
        cells = self.patch(image)
        grid = cells.shape[1:3]
        tokens, context = self.embed(cells), self.context(*grid)
        outputs, start = [], 0
        for layer in layers:
            tokens = run(self.blocks, tokens, start, layer + 1, remat=self.remat, context=context)
            start = layer + 1
            final = self.norm(tokens) if norm else tokens
            prefix, cells = unpack(final, [(self.config.prefix_tokens,), grid], "B * C")
            outputs.append((cells, prefix))
        return outputs

    def embed(self, cells: Float[Array, "B h w C"]) -> Float[Array, "B T C"]:
        """Return the input of the first block: all tokens with their position embeddings, normed in a pre-norm model.

        The table of embeddings is resized to the grid of the cells, as timm does it with `dynamic_img_size`.
        """
        count, side = self.config.embedded_prefix, self.config.grid_size
        of_prefix, of_cells = unpack(self.position[0], [(count,), (side, side)], "* C")
        of_cells = jax.image.resize(of_cells, cells.shape[1:], "cubic", antialias=True)
        prefix = self.prefix()
        tokens = joined(prefix + of_prefix if count else prefix, cells + of_cells.astype(cells.dtype))
        return tokens if self.pre_norm is None else self.pre_norm(tokens)

    def prefix(self) -> Float[Array, "P C"]:
        """Return the class token and the registers, without position embeddings."""
        tokens = [token[0] for token in (self.class_token, self.registers) if token is not None]
        return jnp.concatenate(tokens) if tokens else jnp.zeros((0, self.config.width), jnp.float32)

    def context(self, height: int, width: int) -> tuple[Any, ...]:
        """Return what each block receives beside the tokens of an image of height x width cells."""
        return ()


def joined(prefix: Float[Array, "P C"], cells: Float[Array, "B h w C"]) -> Float[Array, "B T C"]:
    """Return the tokens of every image, the prefix before the cells."""
    prefix = repeat(prefix.astype(cells.dtype), "P C -> B P C", B=cells.shape[0])
    return pack([prefix, cells], "B * C")[0]


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and added to its input, with layer scale after a scale per channel.

    Args:
        config: its width, the epsilon of both norms, and whether the two outputs are scaled.
        attention: called with the normed tokens and then what the block receives beside them.
        mlp: called with the normed tokens.
        rngs: of the norms.
    """

    def __init__(self, config: Config, attention: nnx.Module, mlp: nnx.Module, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (LayerNorm(config.width, epsilon=config.epsilon, rngs=rngs) for _ in range(2))
        self.attention, self.mlp = attention, mlp
        scales = [
            nnx.Param(jnp.full(config.width, LAYER_SCALE, jnp.float32)) if config.layer_scale else None
            for _ in range(2)
        ]
        self.scale1, self.scale2 = scales

    def __call__(self, x: Float[Array, "B T C"], *context: Any) -> Float[Array, "B T C"]:
        x = x + scaled(self.attention(self.norm1(x), *context), self.scale1)
        return x + scaled(self.mlp(self.norm2(x)), self.scale2)


class Attention(nnx.Module):
    """Self-attention of all tokens."""

    def __init__(self, config: Config, *, use_bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        self.qkv = Linear(config.width, 3 * config.width, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.project = Linear(config.width, config.width, dtype=dtype, rngs=rngs)

    def projections(self, x: Float[Array, "B T C"]) -> Float[Array, "3 B T N K"]:
        """Return queries, keys and values."""
        return rearrange(self.qkv(x), "B T (three N K) -> three B T N K", three=3, N=self.num_heads)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        return self.project(rearrange(attend(*self.projections(x)), "B T N K -> B T (N K)"))


class MLP(nnx.Module):
    """Two layers with an activation in float32 between them; SwiGLU halves the number of channels."""

    def __init__(self, config: Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.activation = config.activation
        halves = 2 if config.activation == "swiglu" else 1
        self.widen = Linear(config.width, halves * config.mlp_width, dtype=dtype, rngs=rngs)
        self.narrow = Linear(config.mlp_width, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        hidden = self.widen(x)
        active = ACTIVATIONS[self.activation](hidden.astype(jnp.float32))
        return self.narrow(active.astype(hidden.dtype))


def scaled(x: Float[Array, "B T C"], scale: nnx.Param | None) -> Float[Array, "B T C"]:
    return x if scale is None else scale[...].astype(x.dtype) * x


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """OpenAI's approximation in CLIP: x sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def swiglu(x: Float[Array, "... D"]) -> Float[Array, "... D//2"]:
    """The second half of the channels times the SiLU of the first (Shazeer, 2020, arXiv 2002.05202)."""
    gate, value = jnp.split(x, 2, -1)
    return jax.nn.silu(gate) * value


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": jax.nn.gelu, "quick_gelu": quick_gelu, "swiglu": swiglu}
