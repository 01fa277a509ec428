"""ConvNeXt, as timm names it: sizes and key table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from anyup_core.encoders.rows import Row
from anyup_core.layouts import OIHW_TO_HWIO, TRANSPOSE


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


def rows(config: ConvNeXt) -> Iterator[Row]:
    """Yield timm's keys; the blocks of a stage are stacked."""
    width = config.widths[0]
    yield from conv("stem.0", (width, 3, 4, 4), "stem")
    yield from norm("stem.1", width, "stem_norm")
    for i, (width, depth) in enumerate(zip(config.widths, config.depths)):
        if i > 0:
            inputs = config.widths[i - 1]
            yield from norm(f"stages.{i}.downsample.0", inputs, f"stages.{i}.norm")
            yield from conv(f"stages.{i}.downsample.1", (width, inputs, 2, 2), f"stages.{i}.reduce")
        torch, flax = f"stages.{i}.blocks.{{i}}", f"stages.{i}.blocks"
        yield Row(f"{torch}.gamma", (width,), f"{flax}.layer_scale", stack=depth)
        yield from conv(f"{torch}.conv_dw", (width, 1, 7, 7), f"{flax}.depthwise", depth)
        yield from norm(f"{torch}.norm", width, f"{flax}.norm", depth)
        yield from linear(f"{torch}.mlp.fc1", (4 * width, width), f"{flax}.widen", stack=depth)
        yield from linear(f"{torch}.mlp.fc2", (width, 4 * width), f"{flax}.narrow", stack=depth)
    head = dict(carried=True, optional="head.norm")
    yield Row("head.norm.weight", (width,), "head.norm.scale", **head)
    yield Row("head.norm.bias", (width,), "head.norm.bias", **head)
    yield from linear("head.fc", (None, width), "head.fc", carried=True, optional="head.fc")


def conv(torch: str, shape: tuple[int, int, int, int], flax: str, stack: int = 0) -> Iterator[Row]:
    yield Row(f"{torch}.weight", shape, f"{flax}.kernel", OIHW_TO_HWIO, stack=stack)
    yield Row(f"{torch}.bias", shape[:1], f"{flax}.bias", stack=stack)


def norm(torch: str, width: int, flax: str, stack: int = 0) -> Iterator[Row]:
    yield Row(f"{torch}.weight", (width,), f"{flax}.scale", stack=stack)
    yield Row(f"{torch}.bias", (width,), f"{flax}.bias", stack=stack)


def linear(torch: str, shape: tuple[int | None, int], flax: str, **options) -> Iterator[Row]:
    yield Row(f"{torch}.weight", shape, f"{flax}.kernel", TRANSPOSE, **options)
    yield Row(f"{torch}.bias", shape[:1], f"{flax}.bias", **options)
