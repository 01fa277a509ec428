"""Joint bilateral upsampling (Kopf et al., 2007), which needs no training."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from anyup_core.upsamplers.joint_bilateral import JointBilateralConfig
from anyup_torch.image_code import Size
from anyup_torch.upsamplers.protocol import ConfiguredUpsampler

CHUNK = 1 << 14  # positions worked on at once where nobody says how many


class JointBilateral(ConfiguredUpsampler):
    """A position averages the cells around it, by their distance and by how much its colour differs from theirs.

    Args:
        config: the settings; the default ones if None.
        fields: fields of `JointBilateralConfig` that differ from these.
    """

    settings = JointBilateralConfig

    def upsample(
        self, image: Float[Tensor, "B 3 H W"], features: Float[Tensor, "B C h w"], size: Size, q_chunk_size: int | None
    ) -> Float[Tensor, "B C Ho Wo"]:
        std = image.new_tensor(self.normalisation[1])[:, None, None]
        # of colours in [0, 1] only the differences count
        return joint_bilateral(self.config, image * std, features, size, q_chunk_size)


def joint_bilateral(
    config: JointBilateralConfig,
    image: Float[Tensor, "B 3 H W"],
    values: Float[Tensor, "B E h w"],
    size: Size,
    q_chunk_size: int | None = None,
) -> Float[Tensor, "B E Ho Wo"]:
    """Upsample values by the colours of an image in [0, 1], or with a constant added to it."""
    cells = (int(values.shape[2]), int(values.shape[3]))
    guide, coarse = (
        F.interpolate(image, side, mode="bilinear", align_corners=False, antialias=True).permute(0, 2, 3, 1)
        for side in (size, cells)
    )
    tall, wide = config.windows(cells, size)
    seen = values.permute(0, 2, 3, 1).contiguous()
    centres = [(np.arange(n) + 0.5) * m / n - 0.5 for n, m in zip(size, cells)]

    def average(rows: slice, cols: slice) -> Float[Tensor, "B _ _ E"]:
        colour = guide[:, rows, cols]
        total, weights = colour.new_zeros(()), colour.new_tensor(1e-30)
        for a in range(tall.span):
            for b in range(wide.span):
                i, j = tall.start[rows] + a, wide.start[cols] + b
                distance = np.square(centres[0][rows] - i)[:, None] + np.square(centres[1][cols] - j)
                down, across = (torch.from_numpy(index).to(values.device) for index in (i, j))
                difference = (colour - coarse[:, down][:, :, across]).square().sum(-1)
                far = torch.from_numpy(distance / config.spatial**2).to(difference)
                weight = (-0.5 * (far + difference / config.range**2)).exp()
                total = total + weight[..., None] * seen[:, down][:, :, across]
                weights = weights + weight
        return total / weights[..., None]

    chunk = q_chunk_size or (math.prod(size) if torch.compiler.is_exporting() else CHUNK)  # loops are unrolled there
    width = min(chunk, size[1])
    height = max(1, chunk // width)
    strips = [
        torch.cat([average(slice(y, y + height), slice(x, x + width)) for x in range(0, size[1], width)], 2)
        for y in range(0, size[0], height)
    ]
    return torch.cat(strips, 1).permute(0, 3, 1, 2)
