"""The key table of EfficientNet-Lite, as timm names its `tf_efficientnet_lite` models."""

from __future__ import annotations

from collections.abc import Iterator

from anyup_jax.encoders.configs import EfficientNet
from convert.encoder import Row
from convert.layout import OIHW_TO_HWIO, TRANSPOSE


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
