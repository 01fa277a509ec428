"""DINOv3's transformers (in timm: `Eva` with `rope_type="dinov3"`): their sizes and their key table.

The rotary periods and the bias of the keys, which is zero, are buffers of the PyTorch model and not in its state dict.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from anyup_core.encoders.rows import Row, conv, linear, norm
from anyup_core.layouts import TRANSPOSE


@dataclasses.dataclass(frozen=True)
class DINOv3:
    """A vision transformer with rotary position embeddings, registers and layer scale.

    Attributes:
        width, depth, num_heads: channels, blocks and attention heads.
        qkv_bias: queries and values have a bias; keys never do.
        gated_mlp: the MLP is a SwiGLU.
        patch_size: pixels per cell.
        registers: tokens between the class token and the cells.
        image_size: side of the square image that timm takes by default; the position embeddings suit any.
    """

    width: int
    depth: int
    num_heads: int
    qkv_bias: bool = False
    gated_mlp: bool = False
    patch_size: int = 16
    registers: int = 4
    image_size: int = 256

    class_tokens = 1

    def __post_init__(self):
        if self.width % (4 * self.num_heads):
            raise ValueError(
                f"width={self.width} does not give {self.num_heads} heads channels for sine and cosine along two axes; "
                f"make it a multiple of 4 * num_heads = {4 * self.num_heads}."
            )

    @property
    def mlp_width(self) -> int:
        return 4 * self.width

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
        """Yield timm's keys in the order of its state dict."""
        width, hidden, patch, block = self.width, self.mlp_width, self.patch_size, dict(stack=self.depth)
        yield Row("cls_token", (1, 1, width), "class_token")
        yield Row("reg_token", (1, self.registers, width), "registers")
        yield from conv("patch_embed.proj", (width, 3, patch, patch), "patch")
        yield Row("blocks.{i}.gamma_1", (width,), "blocks.scale1", **block)
        yield Row("blocks.{i}.gamma_2", (width,), "blocks.scale2", **block)
        yield from norm("blocks.{i}.norm1", width, "blocks.norm1", **block)
        if self.qkv_bias:
            yield Row("blocks.{i}.attn.q_bias", (width,), "blocks.attention.query_bias", **block)
            yield Row("blocks.{i}.attn.v_bias", (width,), "blocks.attention.value_bias", **block)
        yield Row("blocks.{i}.attn.qkv.weight", (3 * width, width), "blocks.attention.qkv.kernel", TRANSPOSE, **block)
        yield from linear("blocks.{i}.attn.proj", width, width, "blocks.attention.project", **block)
        yield from norm("blocks.{i}.norm2", width, "blocks.norm2", **block)
        if self.gated_mlp:
            yield from linear("blocks.{i}.mlp.fc1_g", width, hidden, "blocks.mlp.gate", **block)
            yield from linear("blocks.{i}.mlp.fc1_x", width, hidden, "blocks.mlp.widen", **block)
        else:
            yield from linear("blocks.{i}.mlp.fc1", width, hidden, "blocks.mlp.widen", **block)
        yield from linear("blocks.{i}.mlp.fc2", hidden, width, "blocks.mlp.narrow", **block)
        yield from norm("norm", width, "norm")
        yield from linear("head", width, None, "head", unused=True, optional="head")
