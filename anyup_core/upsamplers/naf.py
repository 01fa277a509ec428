"""NAF: sizes, key table and published weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from anyup_core.config import NORM_GROUPS
from anyup_core.encoders.rows import Row, conv, norm
from anyup_core.settings import require
from anyup_core.upsamplers.config import Published, UpsamplerConfig, require_positive, size_of

NAMES = {"naf": "https://github.com/valeoai/NAF/releases/download/model/naf_release.pth"}
REDUCTION = 4  # an image may be so many times larger than the output; larger ones are resized first


@dataclasses.dataclass(frozen=True, kw_only=True)
class NAFConfig(UpsamplerConfig):
    """Settings of one NAF, which takes features of any width that `num_heads` divides.

    Attributes:
        dim: width D of queries and keys; its half is a multiple of 8.
        kernel_size: odd side of the neighbourhood, in cells.
        num_heads: heads of the attention; each averages its own share of the feature channels.
        rope_heads: heads of the rotation.

    Raises:
        ValueError: if a field has a value no model can have.
    """

    decided: ClassVar[tuple[str, ...]] = ("dim", "rope_heads")
    entries: ClassVar[tuple[str, ...]] = ("naf", "state_dict", "model")

    dim: int = 256
    kernel_size: int = 9
    num_heads: int = 4
    rope_heads: int = 4

    def __post_init__(self) -> None:
        require_positive(self, "dim", "kernel_size", "num_heads", "rope_heads")
        require(self.kernel_size % 2, "kernel_size", self.kernel_size, "it must be odd")
        fits = self.dim % (2 * NORM_GROUPS) == 0
        require(fits, "dim", self.dim, f"its half must be a multiple of the {NORM_GROUPS} norm groups")
        heads = f"it must be a multiple of num_heads={self.num_heads} and of four times rope_heads={self.rope_heads}"
        require(self.dim % self.num_heads == 0 and self.dim % (4 * self.rope_heads) == 0, "dim", self.dim, heads)

    @property
    def multiple(self) -> int:
        return self.num_heads

    def check(self, image: tuple[int, int], cells: tuple[int, int], size: tuple[int, int]) -> None:
        for side, n, m in zip(("height", "width"), cells, size):
            if m < n or self.kernel_size * (m // n) > m:
                raise ValueError(
                    f"NAF's neighbourhood of {self.kernel_size} cells does not fit a {side} of {n} features and {m} "
                    f"output positions; give features of at least {self.kernel_size} x {self.kernel_size} cells and an "
                    "output no smaller, or set kernel_size."
                )

    def reduced(self, image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
        """Return the size to which an image is resized first: its own unless it is much larger than the output."""
        return reduced(image, size)

    def rows(self) -> Iterator[Row]:
        half = self.dim // 2
        for name, kernel in (("encoder", 1), ("sem_encoder", 3)):
            torch = f"image_encoder.{name}"
            yield from conv(f"{torch}.0", (half, 3, kernel, kernel), f"{name}.conv")
            for i in (1, 2):
                for j in (1, 2):
                    yield from norm(f"{torch}.{i}.norm{j}", half, f"{name}.block{i}.norm{j}")
                    shape = (half, half, kernel, kernel)
                    yield from conv(f"{torch}.{i}.conv{j}", shape, f"{name}.block{i}.conv{j}")
        yield Row("image_encoder.rope.periods", (self.dim // self.rope_heads // 4,), "rope.periods")

    @classmethod
    def shapes_tell(cls, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
        dim = 2 * size_of(tensors, "image_encoder.encoder.0.weight", 0, cls.dim // 2)
        periods = size_of(tensors, "image_encoder.rope.periods", 0, cls.dim // cls.rope_heads // 4)
        return {"dim": dim, "rope_heads": max(1, dim // max(1, 4 * periods))}

    @classmethod
    def published(cls, name: str) -> Published | None:
        return Published(NAMES[name]) if name in NAMES else None

    @classmethod
    def published_names(cls) -> tuple[str, ...]:
        return tuple(NAMES)


def reduced(image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return the size to which an image is resized first: its own unless it is much larger than the output."""
    limit = REDUCTION * min(size)
    if image[0] > REDUCTION * size[0] or image[1] > REDUCTION * size[1]:
        return min(image[0], limit), min(image[1], limit)
    return image


def periods(width: int) -> Float[np.ndarray, " quarter"]:
    """Return the initial periods of the rotation of a head with so many channels, float32: from 1 to nearly 100."""
    return (100.0 ** (4 * np.arange(width // 4) / width)).astype(np.float32)


def centres(size: int) -> Float[np.ndarray, " size"]:
    """Return the coordinates of rows or columns, centres of pixels from -1 to 1, float32."""
    return ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
