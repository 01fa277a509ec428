"""The vision transformers that timm calls `VisionTransformer`: their sizes and their key table.

Queries, keys and values are one matrix in both frameworks; so are the two halves of a SwiGLU's first layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from anyup_core.encoders.rows import Row
from anyup_core.layouts import OIHW_TO_HWIO, TRANSPOSE

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "swiglu")


@dataclasses.dataclass(frozen=True)
class ViT:
    """A vision transformer with learned position embeddings.

    Attributes:
        patch_size: pixels per cell.
        image_size: side of the square image that the position embeddings were trained for.
        width, depth, num_heads: channels, blocks and attention heads.
        mlp_ratio: channels within the MLP, in units of the width.
        activation: within the MLP: gelu (exact), gelu_tanh, quick_gelu, or swiglu, which is gated.
        layer_scale: each block scales its two additions per channel.
        class_tokens: 1, or 0 for a model without class token.
        registers: tokens between the class token and the cells.
        embed_prefix: these tokens have position embeddings too.
        pre_norm: a norm stands before the first block, and the patches have no bias.
        epsilon: of every norm.
        attention_pool: the published weights may hold an attention pool, which comes after the features.
    """

    patch_size: int
    image_size: int
    width: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    layer_scale: bool = False
    class_tokens: int = 1
    registers: int = 0
    embed_prefix: bool = True
    pre_norm: bool = False
    epsilon: float = 1e-6
    attention_pool: bool = False

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} must be a multiple of num_heads={self.num_heads}.")
        if self.class_tokens not in (0, 1):
            raise ValueError(f"class_tokens={self.class_tokens} must be 0 or 1; other tokens are registers.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} must be one of {', '.join(ACTIVATIONS)}.")

    @property
    def grid_size(self) -> int:
        """Cells along either axis that the position embeddings are for."""
        return self.image_size // self.patch_size

    @property
    def mlp_width(self) -> int:
        return round(self.mlp_ratio * self.width)

    @property
    def strides(self) -> tuple[int, ...]:
        return (self.patch_size,) * self.depth

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.width,) * self.depth

    @property
    def prefix_tokens(self) -> int:
        return self.class_tokens + self.registers

    @property
    def embedded_prefix(self) -> int:
        """Prefix tokens that have position embeddings."""
        return self.prefix_tokens if self.embed_prefix else 0


def rows(config: ViT) -> Iterator[Row]:
    """Yield timm's keys in the order of its state dict."""
    width, hidden, patch, depth = config.width, config.mlp_width, config.patch_size, config.depth
    if config.class_tokens:
        yield Row("cls_token", (1, 1, width), "class_token")
    if config.registers:
        yield Row("reg_token", (1, config.registers, width), "registers")
    yield Row("pos_embed", (1, config.grid_size**2 + config.embedded_prefix, width), "position")
    yield Row("patch_embed.proj.weight", (width, 3, patch, patch), "patch.kernel", OIHW_TO_HWIO)
    if config.pre_norm:
        yield from norm("norm_pre", width, "pre_norm")
    else:
        yield Row("patch_embed.proj.bias", (width,), "patch.bias")
    block = dict(stack=depth)
    yield from norm("blocks.{i}.norm1", width, "blocks.norm1", **block)
    yield from linear("blocks.{i}.attn.qkv", width, 3 * width, "blocks.attention.qkv", **block)
    yield from linear("blocks.{i}.attn.proj", width, width, "blocks.attention.project", **block)
    yield from norm("blocks.{i}.norm2", width, "blocks.norm2", **block)
    widened = 2 * hidden if config.activation == "swiglu" else hidden
    yield from linear("blocks.{i}.mlp.fc1", width, widened, "blocks.mlp.widen", **block)
    yield from linear("blocks.{i}.mlp.fc2", hidden, width, "blocks.mlp.narrow", **block)
    if config.layer_scale:
        yield Row("blocks.{i}.ls1.gamma", (width,), "blocks.scale1", **block)
        yield Row("blocks.{i}.ls2.gamma", (width,), "blocks.scale2", **block)
    yield from norm("norm", width, "norm")
    if config.attention_pool:
        yield from attention_pool(width, hidden)
    yield from linear("head", width, None, "head", carried=True, optional="head")


def attention_pool(width: int, hidden: int) -> Iterator[Row]:
    """Yield the rows of the pool that makes SigLIP's image embedding of the features; timm also has models without."""
    carried = dict(carried=True, optional="attention pool")
    yield Row("attn_pool.latent", (1, 1, width), "attention_pool.latent", **carried)
    yield from linear("attn_pool.q", width, width, "attention_pool.query", **carried)
    yield from linear("attn_pool.kv", width, 2 * width, "attention_pool.key_value", **carried)
    yield from linear("attn_pool.proj", width, width, "attention_pool.project", **carried)
    yield from norm("attn_pool.norm", width, "attention_pool.norm", **carried)
    yield from linear("attn_pool.mlp.fc1", width, hidden, "attention_pool.mlp.widen", **carried)
    yield from linear("attn_pool.mlp.fc2", hidden, width, "attention_pool.mlp.narrow", **carried)


def linear(torch: str, inputs: int, outputs: int | None, flax: str, **options) -> Iterator[Row]:
    yield Row(f"{torch}.weight", (outputs, inputs), f"{flax}.kernel", TRANSPOSE, **options)
    yield Row(f"{torch}.bias", (outputs,), f"{flax}.bias", **options)


def norm(torch: str, width: int, flax: str, **options) -> Iterator[Row]:
    yield Row(f"{torch}.weight", (width,), f"{flax}.scale", **options)
    yield Row(f"{torch}.bias", (width,), f"{flax}.bias", **options)
