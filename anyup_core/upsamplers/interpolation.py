"""Upsamplers without weights: interpolation, and joint bilateral upsampling."""

from __future__ import annotations

import dataclasses

from anyup_core.settings import require
from anyup_core.upsamplers.config import UpsamplerConfig

KERNELS = ("bilinear", "bicubic", "nearest")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterpolationConfig(UpsamplerConfig):
    """Settings of interpolation as PyTorch's `interpolate` does it, without aligned corners and antialiasing.

    Attributes:
        kernel: "nearest" (nearest-exact), "bilinear" or "bicubic" (a = -0.75).

    Raises:
        ValueError: for another kernel.
    """

    kernel: str = "bilinear"

    def __post_init__(self) -> None:
        require(self.kernel in KERNELS, "kernel", self.kernel, f"choose one of {', '.join(KERNELS)}")
