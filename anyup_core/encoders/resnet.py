"""ResNet, as timm names it: sizes and key table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from anyup_core.encoders.rows import Row, conv_norm, linear


@dataclasses.dataclass(frozen=True)
class ResNet:
    """A ResNet with bottleneck blocks; its layers are the stem and the four stages.

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

    def rows(self) -> Iterator[Row]:
        """Yield timm's keys; the first block of a stage stands by itself, the others are stacked."""
        inputs = self.stem_width
        yield from conv_norm("conv1", "bn1", (inputs, 3, 7, 7), "stem")
        for i, depth in enumerate(self.depths):
            width = self.stem_width << i
            torch, flax = f"layer{i + 1}", f"stages.{i}"
            yield from _block(f"{torch}.0", inputs, width, f"{flax}.first")
            shape = (4 * width, inputs, 1, 1)
            yield from conv_norm(f"{torch}.0.downsample.0", f"{torch}.0.downsample.1", shape, f"{flax}.shortcut")
            yield from _block(f"{torch}.{{i}}", 4 * width, width, f"{flax}.others", stack=depth - 1, first=1)
            inputs = 4 * width
        yield from linear("fc", inputs, None, "fc", unused=True, optional="fc")


def _block(torch: str, inputs: int, width: int, flax: str, **options) -> Iterator[Row]:
    shapes = {"narrow": (width, inputs, 1, 1), "filter": (width, width, 3, 3), "widen": (4 * width, width, 1, 1)}
    for number, (name, shape) in enumerate(shapes.items(), start=1):
        yield from conv_norm(f"{torch}.conv{number}", f"{torch}.bn{number}", shape, f"{flax}.{name}", **options)
