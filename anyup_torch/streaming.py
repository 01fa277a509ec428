"""The same model for eager inference, in a fraction of the memory: blocks of rows through whole residual blocks.

A GroupNorm needs the statistics of a whole image, but once they are known it is a scale and a shift per channel. So each
layer is one pass over the pixels, block by block in the processor's cache: normalise, SiLU, matrix product, written in
place, with the next norm's statistics gathered on the way. Three D-channel images are held at the peak; the queries
after their last convolution, and the attention weights, exist only for one row of tiles at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from anyup_torch.attention.tiled import TileAttention
from anyup_torch.config import NORM_GROUPS
from anyup_torch.geometry import AxisWindow, plan_tiles
from anyup_torch.layers import Encoder, ResBlock, RoPE

BLOCK = 1 << 14  # pixels a block: what stays in a core's cache at 128 channels
BLOCK_PARALLEL = 1 << 18  # the same on accelerators, which want few large operations


def empty(*shape: int, like: Tensor) -> Tensor:
    """Allocate without initialising. On the CPU through numpy, which asks Linux for huge pages."""
    if like.device.type == "cpu" and like.dtype == torch.float32:
        return torch.from_numpy(np.empty(shape, np.float32))
    return like.new_empty(shape)


@dataclasses.dataclass
class Pixels:
    """An image's channels, row by row, with the sums that the next GroupNorm needs.

    Attributes:
        data: (H W, D), contiguous.
        total, square: (D,) float64, sums over the pixels of x and of x squared.
    """

    data: Tensor
    total: Tensor
    square: Tensor

    @classmethod
    def around(cls, data: Tensor) -> Pixels:
        return cls(data, *(torch.zeros(data.shape[1], dtype=torch.float64, device=data.device) for _ in range(2)))

    def count(self, block: Tensor, scratch: Tensor) -> None:
        """Add a block of freshly written pixels to the sums."""
        self.total += block.sum(0, dtype=torch.float32)
        self.square += torch.mul(block, block, out=scratch[: len(block)]).sum(0, dtype=torch.float32)

    def affine(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """Return scale and shift per channel that apply `norm` to these pixels."""
        moments = torch.stack([self.total, self.square]) / len(self.data)
        mean, square = moments.reshape(2, NORM_GROUPS, -1).mean(-1).repeat_interleave(len(norm.weight) // NORM_GROUPS, 1)
        scale = norm.weight * (square - mean.square() + norm.eps).rsqrt()
        return scale.to(self.data.dtype), (norm.bias - mean * scale).to(self.data.dtype)


def blocks(pixels: int, like: Tensor) -> Iterator[slice]:
    step = BLOCK if like.device.type == "cpu" else BLOCK_PARALLEL
    return (slice(start, start + step) for start in range(0, pixels, step))


def activate(block: Tensor, affine: tuple[Tensor, Tensor], scratch: Tensor) -> Tensor:
    """SiLU(GN(block)) in `scratch`."""
    scale, shift = affine
    return F.silu(torch.addcmul(shift, block, scale, out=scratch[: len(block)]), inplace=True)


class Stream:
    """Applies encoders to the pixels of one image, with one hidden buffer and one scratch block."""

    def __init__(self, hidden: Float[Tensor, "pixels D"]):
        self.hidden = hidden
        self.scratch = empty(min(len(hidden), BLOCK if hidden.device.type == "cpu" else BLOCK_PARALLEL), hidden.shape[1], like=hidden)

    def widen(self, block: ResBlock, x: Pixels) -> Pixels:
        """Return the block's first convolution of SiLU(GN(x))."""
        affine, weight, hidden = x.affine(block.block[0]), matrix(block.block[2]), Pixels.around(self.hidden)
        for rows in blocks(len(x.data), x.data):
            torch.mm(activate(x.data[rows], affine, self.scratch), weight, out=hidden.data[rows])
            hidden.count(hidden.data[rows], self.scratch)
        return hidden

    def apply(self, block: ResBlock, x: Pixels) -> Pixels:
        """Apply a ResBlock of equal widths in place and return its output."""
        hidden = self.widen(block, x)
        affine, weight, output = hidden.affine(block.block[3]), matrix(block.block[5]), Pixels.around(x.data)
        for rows in blocks(len(x.data), x.data):
            output.data[rows].addmm_(activate(hidden.data[rows], affine, self.scratch), weight)
            output.count(output.data[rows], self.scratch)
        return output

    def pool(self, block: ResBlock, x: Pixels, shape: tuple[int, int], size: tuple[int, int]) -> Float[Tensor, "n D"]:
        """Apply a ResBlock and average over `size` bins: its last convolution is linear, so the averages come first."""
        hidden = self.widen(block, x)
        affine = hidden.affine(block.block[3])
        for rows in blocks(len(x.data), x.data):
            hidden.data[rows] = activate(hidden.data[rows], affine, self.scratch)
        x, hidden = (pool_pixels(pixels.data, shape, size) for pixels in (x, hidden))
        return torch.addmm(x, hidden, matrix(block.block[5]))


def matrix(conv: nn.Conv2d) -> Float[Tensor, "inputs outputs"]:
    """The matrix of a 1 x 1 convolution."""
    return conv.weight.flatten(1).t()


def pool_pixels(data: Float[Tensor, "HW D"], shape: tuple[int, int], size: tuple[int, int]) -> Float[Tensor, "hw D"]:
    image = data.reshape(1, *shape, -1).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(image, size).permute(0, 2, 3, 1).reshape(size[0] * size[1], -1)


def project_image(encoder: Encoder, image: Float[Tensor, "3 H W"], out: Tensor) -> Pixels:
    """Write the image encoder's first convolution to `out`."""
    conv, pixels = encoder[0], Pixels.around(out)
    half, rows_a_block = conv.kernel_size[0] // 2, max(1, BLOCK // image.shape[2])
    padded = F.pad(image[None], (half,) * 4, mode="reflect") if half else image[None]
    for start in range(0, image.shape[1], rows_a_block):
        strip = padded[:, :, start : start + rows_a_block + 2 * half]
        block = F.conv2d(strip, conv.weight)[0].permute(1, 2, 0).flatten(0, 1)
        rows = slice(start * image.shape[2], start * image.shape[2] + len(block))
        out[rows] = block
        pixels.count(out[rows], block)
    return pixels


def encode(encoder: Encoder, x: Pixels, stream: Stream) -> Pixels:
    return stream.apply(encoder[2], stream.apply(encoder[1], x))


def rotate_and_project(
    guide: Float[Tensor, "HW D"], shape: tuple[int, int], rope: RoPE, encoders: tuple[Encoder, ...], outputs: tuple[Tensor, ...]
) -> tuple[Pixels, ...]:
    """Rotate the guide and write the encoders' first convolutions of it; an output may be the guide itself."""
    row_angle, col_angle = rope.angles(*shape)
    pixels = tuple(Pixels.around(out) for out in outputs)
    rows_a_block = max(1, BLOCK // shape[1])
    for start in range(0, shape[0], rows_a_block):
        angle = (row_angle[start : start + rows_a_block, None] + col_angle).flatten(0, 1)
        rows = slice(start * shape[1], start * shape[1] + len(angle))
        block = guide[rows].float()
        first, second = block.chunk(2, 1)
        turned = torch.cat([-second, first], 1).mul_(angle.sin())
        turned = turned.addcmul_(block, angle.cos_()).to(guide.dtype)
        for encoder, out, scratch in zip(encoders, pixels, (angle, angle)):
            torch.mm(turned, matrix(encoder[0]), out=out.data[rows])
            out.count(out.data[rows], scratch.to(guide.dtype))
    return pixels


def upsample_image(model, image: Float[Tensor, "3 H W"], features: Float[Tensor, "1 C h w"], values: Float[Tensor, "h w E"], rows: AxisWindow, cols: AxisWindow, q_chunk_size: int | None, output: Float[Tensor, "Ho Wo E"]) -> None:
    """Write the upsampled `values` of one image to `output`."""
    shape, size, cells, dim = tuple(image.shape[1:]), (rows.queries, cols.queries), (rows.keys, cols.keys), model.config.qk_dim
    # queries carry one row of zeros above and below: the borders of the 3 x 3 convolution
    bordered = empty((shape[0] + 2) * shape[1], dim, like=image)
    bordered[: shape[1]], bordered[-shape[1] :] = 0, 0
    guide, stream = bordered[shape[1] : -shape[1]], Stream(empty(shape[0] * shape[1], dim, like=image))

    encode(model.image_encoder, project_image(model.image_encoder, image, guide), stream)
    keys = empty(shape[0] * shape[1], dim, like=image)
    encoders = (model.key_encoder, model.query_encoder)
    key, query = rotate_and_project(guide, shape, model.rope, encoders, (keys, guide))

    key = stream.pool(model.key_encoder[2], stream.apply(model.key_encoder[1], key), shape, cells)
    del keys
    key = model.decode_keys(key.reshape(1, *cells, dim).permute(0, 3, 1, 2), features)[0]

    query = stream.apply(model.query_encoder[1], query)
    if size == shape:
        stream.apply(model.query_encoder[2], query)
    else:
        pooled = stream.pool(model.query_encoder[2], query, shape, size)
        bordered = F.pad(pooled.reshape(*size, dim), (0, 0, 0, 0, 1, 1))
    del stream, guide, query
    bordered = bordered.reshape(size[0] + 2, size[1], dim)

    attention, conv = model.cross_decode.cross_attn, model.cross_decode.conv2d
    tall, wide = plan_tiles(rows, cols, q_chunk_size)
    attend = TileAttention(tall, wide, model.config.num_heads, q_chunk_size, image.device)
    for row, first in enumerate(tall.first.tolist()):
        strip = bordered[first : first + tall.size + 2].permute(2, 0, 1)[None]
        strip = F.conv2d(strip, conv.weight, padding=(0, 1))[0].permute(1, 2, 0)
        tiles = attend(row, attention.project_query(strip), key, values)
        for start, tile in zip(wide.first.tolist(), tiles):
            output[first : first + tall.size, start : start + wide.size] = tile
