"""Joint bilateral upsampling (Kopf et al., 2007): settings and windows."""

from __future__ import annotations

import dataclasses

import numpy as np

from anyup_core.geometry import AxisWindow
from anyup_core.settings import require
from anyup_core.upsamplers.config import UpsamplerConfig, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointBilateralConfig(UpsamplerConfig):
    """Settings of joint bilateral upsampling.

    Attributes:
        radius: cells on either side.
        spatial: standard deviation of the distance, in cells.
        range: standard deviation of the difference of colours in [0, 1].

    Raises:
        ValueError: if a field has a value that makes no sense.
    """

    radius: int = 2
    spatial: float = 1.0
    range: float = 0.1

    def __post_init__(self) -> None:
        require_positive(self, "radius")
        for name in ("spatial", "range"):
            value = getattr(self, name)
            positive = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
            require(positive, name, value, "it must be a positive number")

    def windows(self, cells: tuple[int, int], size: tuple[int, int]) -> tuple[AxisWindow, AxisWindow]:
        """Return the cells within the radius of each output position, moved inwards at the edges."""

        def axis(n: int, m: int) -> AxisWindow:
            span = min(2 * self.radius + 1, m)
            nearest = np.floor((np.arange(n) + 0.5) * m / n).astype(np.int32)
            return AxisWindow(m, (nearest - self.radius).clip(0, m - span), np.ones((n, span), np.int32))

        return axis(size[0], cells[0]), axis(size[1], cells[1])
