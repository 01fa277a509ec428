"""The published `AnyUp` class, with its arguments, as a model of anyup_torch."""

from __future__ import annotations

import warnings
from typing import Any

import anyup_torch


class AnyUp(anyup_torch.AnyUp):
    """Upsamples the features of any vision encoder to any resolution, guided by the image.

    Args:
        input_dim, qk_dim, kernel_size, kernel_size_lfu, window_ratio, num_heads, init_gaussian_derivatives, lfu_dim:
            as in `anyup_torch.AnyUpConfig`.
        use_natten: take the windows of the published NATTEN variant; NATTEN is not needed for it.
        unknown: further arguments, which the published class ignores; a warning names them.
    """

    def __init__(
        self,
        input_dim: int = 3,
        qk_dim: int = 128,
        kernel_size: int = 1,
        kernel_size_lfu: int = 5,
        window_ratio: float = 0.1,
        num_heads: int = 4,
        init_gaussian_derivatives: bool = False,
        use_natten: bool = False,
        lfu_dim: int | None = None,
        **unknown: Any,
    ):
        if unknown:
            warnings.warn(f"AnyUp ignores {', '.join(unknown)}.", stacklevel=2)
        config = anyup_torch.AnyUpConfig(
            input_dim=input_dim,
            qk_dim=qk_dim,
            kernel_size=kernel_size,
            kernel_size_lfu=kernel_size_lfu,
            window_ratio=window_ratio,
            num_heads=num_heads,
            init_gaussian_derivatives=init_gaussian_derivatives,
            window="natten" if use_natten else "paper",
            lfu_dim=lfu_dim,
        )
        super().__init__(config)
