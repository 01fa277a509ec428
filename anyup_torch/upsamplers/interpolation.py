"""Interpolation with the conventions of PyTorch's `interpolate`, and the upsamplers that do nothing else."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from anyup_core.upsamplers.interpolation import InterpolationConfig
from anyup_torch.image_code import Size
from anyup_torch.upsamplers.protocol import ConfiguredUpsampler


def resize(x: Float[Tensor, "B C h w"], size: Size, kernel: str = "bilinear") -> Float[Tensor, "B C Ho Wo"]:
    """Interpolate without aligned corners and antialiasing; the map itself where the size is its own.

    Args:
        x: the map.
        size: height and width of the result.
        kernel: "nearest" (nearest-exact), "bilinear" or "bicubic" (a = -0.75).
    """
    if tuple(x.shape[2:]) == size:
        return x
    if kernel == "nearest":
        return F.interpolate(x, size, mode="nearest-exact")
    return F.interpolate(x, size, mode=kernel, align_corners=False)


class Interpolation(ConfiguredUpsampler):
    """Interpolation of the features alone; of the image, only the size counts, and a chunk size has nothing to bound.

    Args:
        config: the settings; the default ones if None.
        fields: fields of `InterpolationConfig` that differ from these.
    """

    settings = InterpolationConfig

    def upsample(
        self, image: Float[Tensor, "B 3 H W"], features: Float[Tensor, "B C h w"], size: Size, q_chunk_size: int | None
    ) -> Float[Tensor, "B C Ho Wo"]:
        return resize(features, size, self.config.kernel)
