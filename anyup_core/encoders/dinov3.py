"""DINOv3's transformers (in timm: `Eva` with `rope_type="dinov3"`): their sizes and their key table.

Not in a state dict, though buffers of the PyTorch model: the rotary periods, and the bias of the keys, which is zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from anyup_core.encoders.rows import Row
from anyup_core.layouts import OIHW_TO_HWIO, TRANSPOSE


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
    def class_tokens(self) -> int:
        return 1

    @property
    def prefix_tokens(self) -> int:
        return self.class_tokens + self.registers


def rows(config: DINOv3) -> Iterator[Row]:
    """Yield timm's keys in the order of its state dict."""
    width, hidden, patch, depth = config.width, config.mlp_width, config.patch_size, config.depth
    yield Row("cls_token", (1, 1, width), "class_token")
    yield Row("reg_token", (1, config.registers, width), "registers")
    yield Row("patch_embed.proj.weight", (width, 3, patch, patch), "patch.kernel", OIHW_TO_HWIO)
    yield Row("patch_embed.proj.bias", (width,), "patch.bias")
    yield Row("blocks.{i}.gamma_1", (width,), "blocks.scale1", stack=depth)
    yield Row("blocks.{i}.gamma_2", (width,), "blocks.scale2", stack=depth)
    yield Row("blocks.{i}.norm1.weight", (width,), "blocks.norm1.scale", stack=depth)
    yield Row("blocks.{i}.norm1.bias", (width,), "blocks.norm1.bias", stack=depth)
    if config.qkv_bias:
        yield Row("blocks.{i}.attn.q_bias", (width,), "blocks.attention.query_bias", stack=depth)
        yield Row("blocks.{i}.attn.v_bias", (width,), "blocks.attention.value_bias", stack=depth)
    yield Row("blocks.{i}.attn.qkv.weight", (3 * width, width), "blocks.attention.qkv.kernel", TRANSPOSE, stack=depth)
    yield from linear("blocks.{i}.attn.proj", width, width, "blocks.attention.project", depth)
    yield Row("blocks.{i}.norm2.weight", (width,), "blocks.norm2.scale", stack=depth)
    yield Row("blocks.{i}.norm2.bias", (width,), "blocks.norm2.bias", stack=depth)
    if config.gated_mlp:
        yield from linear("blocks.{i}.mlp.fc1_g", width, hidden, "blocks.mlp.gate", depth)
        yield from linear("blocks.{i}.mlp.fc1_x", width, hidden, "blocks.mlp.widen", depth)
    else:
        yield from linear("blocks.{i}.mlp.fc1", width, hidden, "blocks.mlp.widen", depth)
    yield from linear("blocks.{i}.mlp.fc2", hidden, width, "blocks.mlp.narrow", depth)
    yield Row("norm.weight", (width,), "norm.scale")
    yield Row("norm.bias", (width,), "norm.bias")
    yield Row("head.weight", (None, width), "head.kernel", TRANSPOSE, carried=True, optional="head")
    yield Row("head.bias", (None,), "head.bias", carried=True, optional="head")


def linear(torch: str, inputs: int, outputs: int, flax: str, depth: int) -> Iterator[Row]:
    yield Row(f"{torch}.weight", (outputs, inputs), f"{flax}.kernel", TRANSPOSE, stack=depth)
    yield Row(f"{torch}.bias", (outputs,), f"{flax}.bias", stack=depth)
