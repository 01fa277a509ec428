"""The vision transformers that timm calls `VisionTransformer`: their sizes and their key table.

Queries, keys and values are one matrix in both frameworks; so are the two halves of a SwiGLU's first layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from anyup_core.encoders.rows import Row, conv, linear, norm

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
        class_tokens: 1, or 0 for a model without a class token.
        registers: tokens between the class token and the cells.
        embed_prefix: these tokens have position embeddings too.
        pre_norm: a norm stands before the first block, and the patches have no bias.
        epsilon: of every norm.
        attention_pool: the published weights may hold an attention pool, on which the features do not depend.
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

    layer_scale_keys = ("ls1.gamma", "ls2.gamma")

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
    def embedded_prefix(self) -> int:
        """Prefix tokens that have position embeddings."""
        return self.prefix_tokens if self.embed_prefix else 0

    @property
    def strides(self) -> tuple[int, ...]:
        return (self.patch_size,) * self.depth

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.width,) * self.depth

    @property
    def prefix_tokens(self) -> int:
        return self.class_tokens + self.registers

    def rows(self) -> Iterator[Row]:
        """Yield timm's keys; the blocks are stacked."""
        width, hidden, patch = self.width, self.mlp_width, self.patch_size
        block: dict[str, Any] = dict(stack=self.depth)
        if self.class_tokens:
            yield Row("cls_token", (1, 1, width), "class_token")
        if self.registers:
            yield Row("reg_token", (1, self.registers, width), "registers")
        if self.grid_size:
            yield Row("pos_embed", (1, self.grid_size**2 + self.embedded_prefix, width), "position")
        yield from conv("patch_embed.proj", (width, 3, patch, patch), "patch", bias=not self.pre_norm)
        if self.pre_norm:
            yield from norm("norm_pre", width, "pre_norm")
        yield from norm("blocks.{i}.norm1", width, "blocks.norm1", **block)
        yield from self.qkv_rows()
        yield from linear("blocks.{i}.attn.proj", width, width, "blocks.attention.project", **block)
        yield from norm("blocks.{i}.norm2", width, "blocks.norm2", **block)
        yield from self.widening_rows()
        yield from linear("blocks.{i}.mlp.fc2", hidden, width, "blocks.mlp.narrow", **block)
        if self.layer_scale:
            for number, key in enumerate(self.layer_scale_keys, start=1):
                yield Row(f"blocks.{{i}}.{key}", (width,), f"blocks.scale{number}", **block)
        yield from norm("norm", width, "norm")
        if self.attention_pool:
            yield from _attention_pool(width, hidden)
        yield from linear("head", width, None, "head", unused=True, optional="head")

    def qkv_rows(self) -> Iterator[Row]:
        """Yield the rows of queries, keys and values."""
        yield from linear("blocks.{i}.attn.qkv", self.width, 3 * self.width, "blocks.attention.qkv", stack=self.depth)

    def widening_rows(self) -> Iterator[Row]:
        """Yield the rows of what stands before the activation of the MLP."""
        outputs = 2 * self.mlp_width if self.activation == "swiglu" else self.mlp_width
        yield from linear("blocks.{i}.mlp.fc1", self.width, outputs, "blocks.mlp.widen", stack=self.depth)


def _attention_pool(width: int, hidden: int) -> Iterator[Row]:
    """Yield the rows of the pool that SigLIP's image embedding is made with; timm also has models without it."""
    unused: dict[str, Any] = dict(unused=True, optional="attention pool")
    yield Row("attn_pool.latent", (1, 1, width), "attention_pool.latent", **unused)
    yield from linear("attn_pool.q", width, width, "attention_pool.query", **unused)
    yield from linear("attn_pool.kv", width, 2 * width, "attention_pool.key_value", **unused)
    yield from linear("attn_pool.proj", width, width, "attention_pool.project", **unused)
    yield from norm("attn_pool.norm", width, "attention_pool.norm", **unused)
    yield from linear("attn_pool.mlp.fc1", width, hidden, "attention_pool.mlp.widen", **unused)
    yield from linear("attn_pool.mlp.fc2", hidden, width, "attention_pool.mlp.narrow", **unused)
