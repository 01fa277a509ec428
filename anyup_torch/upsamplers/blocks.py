"""The convolutional encoders of JAFAR and NAF, whose names differ from AnyUp's."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from anyup_core.config import NORM_GROUPS
from anyup_torch.layers import GROUP_NORM_EPS, ReflectConv2d


class Block(nn.Module):
    """`conv(SiLU(GN(conv(SiLU(GN(x))))))`, over reflected borders."""

    def __init__(self, dim: int, kernel_size: int = 1, bias: bool = False):
        super().__init__()
        self.norm1 = nn.GroupNorm(NORM_GROUPS, dim, GROUP_NORM_EPS)
        self.conv1 = ReflectConv2d(dim, dim, kernel_size, bias)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, dim, GROUP_NORM_EPS)
        self.conv2 = ReflectConv2d(dim, dim, kernel_size, bias)

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
        x = self.conv1(F.silu(self.norm1(x), inplace=True))
        return self.conv2(F.silu(self.norm2(x), inplace=True))


class ResidualBlock(Block):
    """A block and its input."""

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
        return x + super().forward(x)
