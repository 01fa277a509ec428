"""JAFAR (arXiv 2506.11136): sizes, key table and published weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from anyup_core.config import NORM_GROUPS
from anyup_core.encoders.rows import Row, conv, linear, norm
from anyup_core.layouts import SAME, TRANSPOSE
from anyup_core.preprocessing import CLIP, HALF, IMAGENET, Preprocessing
from anyup_core.settings import require
from anyup_core.upsamplers.config import Published, UpsamplerConfig, require_normalisation, require_positive, size_of

ADDRESS = "https://github.com/PaulCouairon/JAFAR/releases/download/Weights"
NAMES: dict[str, tuple[int, Preprocessing]] = {
    "vit_base_patch16_224": (768, HALF),
    "vit_base_patch16_224.dino": (768, IMAGENET),
    "vit_base_patch14_dinov2.lvd142m": (768, IMAGENET),
    "vit_base_patch16_clip_384": (768, CLIP),
    "vit_base_patch16_siglip_512.v2_webli": (768, HALF),
    "vit_small_patch14_dinov2.lvd142m": (384, IMAGENET),
    "vit_small_patch14_reg4_dinov2": (384, IMAGENET),
}
"""Published name, which is timm's of the encoder -> channels of its features and its normalisation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JAFARConfig(UpsamplerConfig):
    """Settings of one JAFAR.

    Attributes:
        channels: of the features C.
        qk_dim: width D of guide, queries and keys; a multiple of 8 and of `num_heads`.
        kernel_size: odd side of the image encoder's first convolution.
        num_heads: attention heads N.
        normalisation: mean and standard deviation of the image: the encoder's own, as it is the encoder's input.

    Raises:
        ValueError: if a field has a value no model can have.
    """

    decided: ClassVar[tuple[str, ...]] = ("channels", "qk_dim", "kernel_size")
    entries: ClassVar[tuple[str, ...]] = ("jafar",)

    channels: int = 384
    qk_dim: int = 128
    kernel_size: int = 1
    num_heads: int = 4
    normalisation: Sequence[Sequence[float]] = IMAGENET

    def __post_init__(self) -> None:
        require_positive(self, "channels", "qk_dim", "kernel_size", "num_heads")
        object.__setattr__(self, "normalisation", require_normalisation(self.normalisation))
        require(self.kernel_size % 2, "kernel_size", self.kernel_size, "it must be odd")
        groups = f"it must be a multiple of the {NORM_GROUPS} norm groups and of num_heads={self.num_heads}"
        fits = self.qk_dim % NORM_GROUPS == 0 and self.qk_dim % self.num_heads == 0
        require(fits, "qk_dim", self.qk_dim, groups)

    @property
    def width(self) -> int:
        return self.channels

    @property
    def fused(self) -> bool:
        """Whether the three projections are one published tensor, as PyTorch has it for equal widths."""
        return self.channels == self.qk_dim

    def rows(self) -> Iterator[Row]:
        dim, channels, attention = self.qk_dim, self.channels, "cross_decode.cross_attn.attention"
        yield from _encoder("image_encoder", 3, dim, self.kernel_size)
        yield from _encoder("key_encoder", dim, dim)
        yield from _encoder("query_encoder", dim, dim)
        yield from _encoder("key_features_encoder", channels, dim)
        for name, width, unused in (("norm_q", dim, False), ("norm_k", dim, False), ("norm_v", channels, True)):
            yield Row(f"cross_decode.cross_attn.{name}.weight", (width,), f"cross_decode.{name}.scale", unused=unused)
        for i, name in enumerate(("query", "key", "value")):
            path, unused = f"cross_decode.{name}", name == "value"
            if self.fused:
                key, shape = f"{attention}.in_proj_weight", (3 * dim, dim)
                yield Row(key, shape, f"{path}.kernel", TRANSPOSE, part=(i, 3), unused=unused)
            else:
                shape = (dim, channels if unused else dim)
                yield Row(f"{attention}.{name[0]}_proj_weight", shape, f"{path}.kernel", TRANSPOSE, unused=unused)
        for i, name in enumerate(("query", "key", "value")):
            bias = f"cross_decode.{name}.bias"
            yield Row(f"{attention}.in_proj_bias", (3 * dim,), bias, SAME, part=(i, 3), unused=name == "value")
        yield from linear(f"{attention}.out_proj", dim, dim, "cross_decode.out", unused=True)
        yield from conv("cross_decode.conv2d", (dim, dim, 3, 3), "cross_decode.conv", bias=False)
        for name in ("gamma", "beta"):
            yield from conv(f"sft_key.{name}", (dim, dim, 1, 1), f"modulation.{name}", bias=False)
        yield Row("rope.freqs", (2, dim), "rope.freqs")

    @classmethod
    def shapes_tell(cls, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {
            "channels": size_of(tensors, "key_features_encoder.0.weight", 1, cls.channels),
            "qk_dim": size_of(tensors, "image_encoder.0.weight", 0, cls.qk_dim),
            "kernel_size": size_of(tensors, "image_encoder.0.weight", -1, cls.kernel_size),
        }

    @classmethod
    def published(cls, name: str) -> Published | None:
        if name not in NAMES:
            return None
        channels, normalisation = NAMES[name]
        return Published(f"{ADDRESS}/{name}.pth", channels, {"normalisation": normalisation})

    @classmethod
    def published_names(cls) -> tuple[str, ...]:
        return tuple(NAMES)


def _encoder(name: str, inputs: int, dim: int, kernel: int = 1) -> Iterator[Row]:
    yield from conv(f"{name}.0", (dim, inputs, kernel, kernel), f"{name}.conv", bias=False)
    for i in (1, 2):
        for j in (1, 2):
            yield from norm(f"{name}.{i}.norm{j}", dim, f"{name}.block{i}.norm{j}")
            yield from conv(f"{name}.{i}.conv{j}", (dim, dim, 1, 1), f"{name}.block{i}.conv{j}", bias=False)
