"""The key table of the vision transformers that timm calls `VisionTransformer`.

Queries, keys and values are one matrix in both; so are the two halves of a SwiGLU's first layer.
"""

from __future__ import annotations

from collections.abc import Iterator

from anyup_jax.encoders.configs import ViT
from convert.encoder import Row
from convert.layout import OIHW_TO_HWIO, TRANSPOSE


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
