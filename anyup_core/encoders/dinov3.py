"""DINOv3's transformers (in timm: `Eva` with `rope_type="dinov3"`): their sizes and their key table.

The rotary periods and the bias of the keys, which is zero, are buffers of the PyTorch model and not in its state dict.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from anyup_core.encoders.rows import Row, linear
from anyup_core.encoders.vit import ViT
from anyup_core.layouts import TRANSPOSE


@dataclasses.dataclass(frozen=True)
class DINOv3(ViT):
    """A vision transformer with rotary position embeddings, registers and layer scale.

    Attributes:
        image_size: side of the square image that timm takes by default; the position embeddings suit any.
        qkv_bias: queries and values have a bias; keys never do.
        gated_mlp: the MLP is a SwiGLU.

    The others are those of `ViT`.
    """

    layer_scale: bool = True
    registers: int = 4
    embed_prefix: bool = False
    epsilon: float = 1e-5
    qkv_bias: bool = False
    gated_mlp: bool = False

    layer_scale_keys = ("gamma_1", "gamma_2")

    @property
    def grid_size(self) -> int:
        """None: there is no table of position embeddings."""
        return 0

    def __post_init__(self):
        if self.width % (4 * self.num_heads):
            raise ValueError(
                f"width={self.width} does not give {self.num_heads} heads channels for sine and cosine along two axes; "
                f"make it a multiple of 4 * num_heads = {4 * self.num_heads}."
            )

    def qkv_rows(self) -> Iterator[Row]:
        block: dict[str, Any] = dict(stack=self.depth)
        shape = 3 * self.width, self.width
        if self.qkv_bias:
            yield Row("blocks.{i}.attn.q_bias", shape[1:], "blocks.attention.query_bias", **block)
            yield Row("blocks.{i}.attn.v_bias", shape[1:], "blocks.attention.value_bias", **block)
        yield Row("blocks.{i}.attn.qkv.weight", shape, "blocks.attention.qkv.kernel", TRANSPOSE, **block)

    def widening_rows(self) -> Iterator[Row]:
        parts = {"fc1_g": "gate", "fc1_x": "widen"} if self.gated_mlp else {"fc1": "widen"}
        for torch, flax in parts.items():
            sizes = self.width, self.mlp_width
            yield from linear(f"blocks.{{i}}.mlp.{torch}", *sizes, f"blocks.mlp.{flax}", stack=self.depth)
