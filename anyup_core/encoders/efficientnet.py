"""EfficientNet-Lite, as timm names its `tf_efficientnet_lite` models: sizes and key table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from anyup_core.encoders.rows import Row
from anyup_core.layouts import OIHW_TO_HWIO, TRANSPOSE


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


def rows(config: EfficientNet) -> Iterator[Row]:
    """Yield timm's keys in the order of its state dict."""
    yield from conv("conv_stem", (config.stem_width, 3, 3, 3), "stem.conv")
    yield from norm("bn1", config.stem_width, "stem.norm")
    width = config.stem_width
    for i, stage in enumerate(config.stages):
        for j in range(stage.blocks):
            torch, flax, size = f"blocks.{i}.{j}", f"stages.{i}.{j}", stage.kernel_size
            hidden = stage.expansion * width
            separable = stage.expansion == 1  # depthwise separable: timm numbers the norms from the depthwise one
            if not separable:
                yield from conv(f"{torch}.conv_pw", (hidden, width, 1, 1), f"{flax}.expand.conv")
                yield from norm(f"{torch}.bn1", hidden, f"{flax}.expand.norm")
            yield from conv(f"{torch}.conv_dw", (hidden, 1, size, size), f"{flax}.depthwise")
            yield from norm(f"{torch}.bn{1 if separable else 2}", hidden, f"{flax}.depthwise_norm")
            yield from conv(
                f"{torch}.conv_{'pw' if separable else 'pwl'}", (stage.width, hidden, 1, 1), f"{flax}.project.conv"
            )
            yield from norm(f"{torch}.bn{2 if separable else 3}", stage.width, f"{flax}.project.norm")
            width = stage.width
    yield from conv("conv_head", (config.head_width, width, 1, 1), "head.conv")
    yield from norm("bn2", config.head_width, "head.norm")
    yield Row("classifier.weight", (None, config.head_width), "classifier.kernel", TRANSPOSE, optional="classifier")
    yield Row("classifier.bias", (None,), "classifier.bias", optional="classifier")


def conv(torch: str, shape: tuple[int, int, int, int], flax: str) -> Iterator[Row]:
    yield Row(f"{torch}.weight", shape, f"{flax}.kernel", OIHW_TO_HWIO)


def norm(torch: str, width: int, flax: str) -> Iterator[Row]:
    yield Row(f"{torch}.weight", (width,), f"{flax}.scale")
    yield Row(f"{torch}.bias", (width,), f"{flax}.bias")
    yield Row(f"{torch}.running_mean", (width,), f"{flax}.mean")
    yield Row(f"{torch}.running_var", (width,), f"{flax}.var")
    counter = dict(carried=True, optional="counters", integer=True)
    yield Row(f"{torch}.num_batches_tracked", (), f"{flax}.batches", **counter)
