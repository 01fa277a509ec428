"""EfficientNet-Lite, as timm names its `tf_efficientnet_lite` models: sizes and key table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from anyup_core.encoders.rows import Row, batch_norm, conv, conv_norm, linear


@dataclasses.dataclass(frozen=True)
class Stage:
    """Consecutive residual blocks of one width; only the first has the stride.

    Attributes:
        blocks: their number.
        width: their output channels.
        kernel_size, stride: of the depthwise convolution.
        expansion: channels of the depthwise convolution, in units of the block's inputs.
    """

    blocks: int
    width: int
    kernel_size: int
    stride: int
    expansion: int = 6


LITE0 = (
    *(Stage(1, 16, 3, 1, expansion=1), Stage(2, 24, 3, 2), Stage(2, 40, 5, 2), Stage(3, 80, 3, 2)),
    *(Stage(3, 112, 5, 1), Stage(4, 192, 5, 2), Stage(1, 320, 3, 1)),
)


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
        return tuple(
            dataclasses.replace(
                stage,
                blocks=stage.blocks if stage.blocks == 1 else math.ceil(stage.blocks * self.depth_factor),
                width=_multiple_of_8(stage.width * self.width_factor),
            )
            for stage in LITE0
        )

    @property
    def taps(self) -> tuple[int, ...]:
        """Index of the stage whose output is each layer: the last one of each stride."""
        stages = self.stages
        return tuple(i for i in range(len(stages)) if i + 1 == len(stages) or stages[i + 1].stride > 1)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(2 ** (i + 1) for i in range(len(self.taps)))

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.stages[i].width for i in self.taps)

    def rows(self) -> Iterator[Row]:
        """Yield timm's keys in the order of its state dict."""
        yield from conv_norm("conv_stem", "bn1", (self.stem_width, 3, 3, 3), "stem")
        width = self.stem_width
        for i, stage in enumerate(self.stages):
            # timm names a block without expansion after its two convolutions: conv_dw, bn1, conv_pw, bn2
            project, norms = ("conv_pw", ("bn1", "bn2")) if stage.expansion == 1 else ("conv_pwl", ("bn2", "bn3"))
            for j in range(stage.blocks):
                torch, flax, size = f"blocks.{i}.{j}", f"stages.{i}.{j}", stage.kernel_size
                hidden = stage.expansion * width
                if stage.expansion > 1:
                    yield from conv_norm(f"{torch}.conv_pw", f"{torch}.bn1", (hidden, width, 1, 1), f"{flax}.expand")
                yield from conv(f"{torch}.conv_dw", (hidden, 1, size, size), f"{flax}.depthwise", bias=False)
                yield from batch_norm(f"{torch}.{norms[0]}", hidden, f"{flax}.depthwise_norm")
                shape = (stage.width, hidden, 1, 1)
                yield from conv_norm(f"{torch}.{project}", f"{torch}.{norms[1]}", shape, f"{flax}.project")
                width = stage.width
        yield from conv_norm("conv_head", "bn2", (self.head_width, width, 1, 1), "head")
        yield from linear("classifier", self.head_width, None, "classifier", optional="classifier")


def _multiple_of_8(channels: float) -> int:
    """Return the nearest multiple of 8 that is at least 90 % of `channels`."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8
