"""The published `AnyUp` class, with its arguments in their order, as a model of anyup_torch."""

from __future__ import annotations

from typing import Any

import anyup_torch

ARGUMENTS = (
    "input_dim", "qk_dim", "kernel_size", "kernel_size_lfu", "window_ratio", "num_heads", "init_gaussian_derivatives",
    "use_natten", "lfu_dim",
)  # fmt: skip


class AnyUp(anyup_torch.AnyUp):
    """Upsamples the features of any vision encoder to any resolution, guided by the image.

    Its arguments are the published ones, by name or in their order, and fields of `anyup_torch.AnyUpConfig`.

    Raises:
        TypeError: for other arguments, which the published class ignores.
    """

    def __init__(self, *arguments: Any, **fields: Any):
        if len(arguments) > len(ARGUMENTS):
            raise TypeError(f"AnyUp takes {len(ARGUMENTS)} arguments, {', '.join(ARGUMENTS)}; got {len(arguments)}.")
        super().__init__(**dict(zip(ARGUMENTS, arguments)), **fields)
