"""ConvNeXt, as timm names it: sizes and key table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from anyup_core.encoders.rows import Row, conv, linear, norm


@dataclasses.dataclass(frozen=True)
class ConvNeXt:
    """A ConvNeXt; its layers are the four stages.

    Attributes:
        depths: blocks of each stage.
        widths: channels of each stage.
        image_size: side of the square image that timm takes by default; any size will do.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    image_size: int = 224

    prefix_tokens = class_tokens = 0

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(4 << i for i in range(len(self.depths)))

    def rows(self) -> Iterator[Row]:
        """Yield timm's keys; the blocks of a stage are stacked."""
        width = self.widths[0]
        yield from conv("stem.0", (width, 3, 4, 4), "stem")
        yield from norm("stem.1", width, "stem_norm")
        for i, (width, depth) in enumerate(zip(self.widths, self.depths)):
            if i > 0:
                inputs = self.widths[i - 1]
                yield from norm(f"stages.{i}.downsample.0", inputs, f"stages.{i}.norm")
                yield from conv(f"stages.{i}.downsample.1", (width, inputs, 2, 2), f"stages.{i}.reduce")
            torch, flax = f"stages.{i}.blocks.{{i}}", f"stages.{i}.blocks"
            yield Row(f"{torch}.gamma", (width,), f"{flax}.layer_scale", stack=depth)
            yield from conv(f"{torch}.conv_dw", (width, 1, 7, 7), f"{flax}.depthwise", stack=depth)
            yield from norm(f"{torch}.norm", width, f"{flax}.norm", stack=depth)
            yield from linear(f"{torch}.mlp.fc1", width, 4 * width, f"{flax}.widen", stack=depth)
            yield from linear(f"{torch}.mlp.fc2", 4 * width, width, f"{flax}.narrow", stack=depth)
        yield from norm("head.norm", width, "head.norm", unused=True, optional="head.norm")
        yield from linear("head.fc", width, None, "head.fc", unused=True, optional="head.fc")
