"""The architectures of the encoders, as data. No framework is imported here.

Every configuration tells, per layer that can be asked for: `strides` (pixels per cell along either axis) and `widths`
(channels); and `prefix_tokens`, the class and register tokens that stand before the cells of a transformer.
"""

from __future__ import annotations

import dataclasses
import math

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


@dataclasses.dataclass(frozen=True)
class ResNet:
    """A ResNet with bottleneck blocks. The layers are the stem and the four stages.

    Attributes:
        depths: blocks of each stage.
        image_size: side of the square image that timm takes by default; any size will do.
    """

    depths: tuple[int, ...]
    image_size: int = 224

    stem_width = 64
    prefix_tokens = class_tokens = 0

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(2 << i for i in range(len(self.depths) + 1))

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.stem_width, *(4 * self.stem_width << i for i in range(len(self.depths))))


@dataclasses.dataclass(frozen=True)
class ConvNeXt:
    """A ConvNeXt. The layers are the four stages.

    Attributes:
        depths, widths: blocks of each stage, and its channels.
        image_size: side of the square image that timm takes by default; any size will do.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    image_size: int = 224

    prefix_tokens = class_tokens = 0

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(4 << i for i in range(len(self.depths)))


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of residual blocks of one width; the first of them has the stride and the others none.

    Attributes:
        blocks, width: how many, and the channels they give.
        kernel_size, stride: of the depthwise convolution.
        expansion: channels of the depthwise convolution, in units of the block's inputs.
    """

    blocks: int
    width: int
    kernel_size: int
    stride: int
    expansion: int = 6


@dataclasses.dataclass(frozen=True)
class EfficientNet:
    """EfficientNet-Lite: no squeeze-and-excitation, ReLU6; the stem, the first and the last stage keep their depth.

    Attributes:
        width_factor, depth_factor: scale the channels and the blocks of Lite0.
        image_size: side of the square image it was trained for; any size will do.
    """

    width_factor: float
    depth_factor: float
    image_size: int

    stem_width = 32
    head_width = 1280
    prefix_tokens = class_tokens = 0

    @property
    def stages(self) -> tuple[Stage, ...]:
        sizes = (
            (1, 16, 3, 1),
            (2, 24, 3, 2),
            (2, 40, 5, 2),
            (3, 80, 3, 2),
            (3, 112, 5, 1),
            (4, 192, 5, 2),
            (1, 320, 3, 1),
        )
        return tuple(
            Stage(
                blocks if blocks == 1 else math.ceil(blocks * self.depth_factor),
                _multiple_of_8(width * self.width_factor),
                kernel_size,
                stride,
                expansion=6 if i else 1,
            )
            for i, (blocks, width, kernel_size, stride) in enumerate(sizes)
        )

    @property
    def taps(self) -> tuple[int, ...]:
        """Index of the stage that gives each layer: the last one of each stride."""
        stages = self.stages
        return tuple(i for i in range(len(stages)) if i + 1 == len(stages) or stages[i + 1].stride > 1)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(2 ** (i + 1) for i in range(len(self.taps)))

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.stages[i].width for i in self.taps)


def _multiple_of_8(channels: float) -> int:
    """Return the nearest multiple of 8 that is not less than 90 % of it."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


Config = ViT | DINOv3 | ResNet | ConvNeXt | EfficientNet
