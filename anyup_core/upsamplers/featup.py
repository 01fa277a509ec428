"""FeatUp's stack of joint bilateral upsamplers (arXiv 2403.10516): sizes, key table and published weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from anyup_core import geometry
from anyup_core.encoders.rows import Row, conv, norm
from anyup_core.resample import axis_weights
from anyup_core.settings import require
from anyup_core.upsamplers.config import Published, UpsamplerConfig, require_positive, size_of

ADDRESS = "https://marhamilresearch4.blob.core.windows.net/feature-upsampling-public/pretrained"
NAMES = {"dinov2": 384, "dino16": 384, "vit": 384, "clip": 512, "maskclip": 512, "resnet50": 2048}
"""Published name -> channels of the encoder's features."""

STAGES, SCALE, RADIUS, KEY_DIM = 4, 16, 3, 32
FIXUP = 0.1  # weight of the corrections, of the kernels and of the output
TAPS = (2 * RADIUS + 1) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatUpConfig(UpsamplerConfig):
    """Settings of one FeatUp.

    Attributes:
        channels: of the features C.
        channel_norm: whether a LayerNorm over the channels comes first; the output is in the scale of its output.

    Raises:
        ValueError: if a field has a value no model can have.
    """

    decided: ClassVar[tuple[str, ...]] = ("channels", "channel_norm")
    entries: ClassVar[tuple[str, ...]] = ("state_dict",)

    channels: int = 384
    channel_norm: bool = True

    def __post_init__(self) -> None:
        require_positive(self, "channels")
        require(isinstance(self.channel_norm, bool), "channel_norm", self.channel_norm, "it is True or False")

    @property
    def width(self) -> int:
        return self.channels

    def native_size(self, image: tuple[int, int], cells: tuple[int, int]) -> tuple[int, int]:
        return SCALE * cells[0], SCALE * cells[1]

    def check(self, image: tuple[int, int], cells: tuple[int, int], size: tuple[int, int]) -> None:
        if min(cells) < 2:
            raise ValueError(
                f"features of {cells[0]} x {cells[1]} cells are too few for FeatUp, which reflects {RADIUS} positions "
                "at the borders; give at least 2 x 2."
            )

    def rows(self) -> Iterator[Row]:
        if self.channel_norm:
            yield from norm("model.1.norm", self.channels, "norm")
        for s in range(1, STAGES + 1):
            torch, flax = f"upsampler.up{s}", f"up{s}"
            yield Row(f"{torch}.range_temp", (), f"{flax}.range_temp")
            yield Row(f"{torch}.sigma_spatial", (), f"{flax}.sigma_spatial")
            yield from conv(f"{torch}.range_proj.0", (KEY_DIM, 3, 1, 1), f"{flax}.range_proj.conv1")
            yield from conv(f"{torch}.range_proj.3", (KEY_DIM, KEY_DIM, 1, 1), f"{flax}.range_proj.conv2")
            yield from conv(f"{torch}.fixup_proj.0", (TAPS, TAPS + 3, 1, 1), f"{flax}.fixup_proj.conv1")
            yield from conv(f"{torch}.fixup_proj.3", (TAPS, TAPS, 1, 1), f"{flax}.fixup_proj.conv2")
        yield from conv("upsampler.fixup_proj.1", (self.channels, self.channels, 1, 1), "fixup_proj")

    @classmethod
    def select(cls, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the stack and the channel norm, of a published checkpoint without the encoder, or of a bare stack."""
        if any(key.startswith("up1.") for key in tensors):
            tensors = {f"upsampler.{key}": tensor for key, tensor in tensors.items()}
        whole = any(key.startswith("upsampler.up1.") for key in tensors)
        if not whole:
            return dict(tensors)
        return {key: x for key, x in tensors.items() if key.startswith(("upsampler.", "model.1.norm."))}

    @classmethod
    def shapes_tell(cls, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
        channels = size_of(tensors, "upsampler.fixup_proj.1.weight", 0, cls.channels)
        return {"channels": channels, "channel_norm": any(key.startswith("model.1.norm.") for key in tensors)}

    @classmethod
    def published(cls, name: str, use_norm: bool = True) -> Published | None:
        if name not in NAMES:
            return None
        if name == "maskclip" and use_norm:
            raise ValueError("maskclip is published without the channel norm only; give use_norm=False.")
        folder = "" if use_norm else "no_norm/"
        address = f"{ADDRESS}/{folder}{name}_jbu_stack_cocostuff.ckpt"
        return Published(address, NAMES[name], {"channel_norm": use_norm})

    @classmethod
    def published_names(cls) -> tuple[str, ...]:
        return tuple(NAMES)


def doubled(size: int) -> Float[np.ndarray, "positions cells"]:
    """Return the weights of the cells in their bicubic interpolation to twice the size, with a reflected border."""
    return axis_weights("bicubic", size, 2 * size)[geometry.reflection(2 * size, RADIUS)]


def slabs(
    table: Float[np.ndarray, "positions cells"], size: int, tile: int, side: int
) -> tuple[Int[np.ndarray, " tiles"], Float[np.ndarray, "tiles slab span"]]:
    """Cut an axis of `size` positions into tiles; return each one's first cell and the cells' weights in its slab.

    The slab of a tile is what its kernels see of an interpolated axis. What lies beyond the edge repeats it.

    Args:
        table: weights of all cells in the interpolated positions, with a border of `side` - 1 more.
        size: positions without the border.
        tile: positions of a tile.
        side: of the kernels.
    """
    first = np.arange(0, size, tile)
    seen = np.minimum(first[:, None] + np.arange(tile + side - 1), len(table) - 1)
    used: np.ndarray = (table[seen] != 0).any(axis=1)
    low, high = used.argmax(1), used.shape[1] - used[:, ::-1].argmax(1)
    span = int((high - low).max())
    begin = np.minimum(low, table.shape[1] - span)
    columns = begin[:, None, None] + np.arange(span)
    return begin.astype(np.int32), np.take_along_axis(table[seen], np.broadcast_to(columns, (*seen.shape, span)), 2)


@functools.lru_cache(maxsize=64)
def doubled_slabs(cells: int, tile: int) -> tuple[Int[np.ndarray, " tiles"], Float[np.ndarray, "tiles slab span"]]:
    """Return the slabs of a stage, which doubles an axis of so many cells."""
    return slabs(doubled(cells), 2 * cells, tile, 2 * RADIUS + 1)
