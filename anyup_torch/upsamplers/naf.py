"""NAF: neighbourhood attention with queries and keys made from the image alone, for features of any encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from anyup_core.geometry import kernel_window, reflection
from anyup_core.upsamplers.naf import NAFConfig, centres, periods
from anyup_torch import streaming, threads
from anyup_torch.anatomy import anatomy
from anyup_torch.image_code import Size
from anyup_torch.layers import ReflectConv2d
from anyup_torch.model import attention, grid_of
from anyup_torch.upsamplers.blocks import Block
from anyup_torch.upsamplers.interpolation import resize
from anyup_torch.upsamplers.protocol import ConfiguredUpsampler, differentiated

STRIP = 1 << 13  # pixels rotated at once
host_window: Any = torch.compiler.disable(kernel_window)  # made by numpy, not traced


class Encoder(nn.Sequential):
    """A convolution and two blocks, all of one kernel size, with biases and reflected borders."""

    def __init__(self, dim: int, kernel_size: int):
        blocks = (Block(dim, kernel_size, bias=True) for _ in range(2))
        super().__init__(ReflectConv2d(3, dim, kernel_size, bias=True), *blocks)


def encode(
    encoder: Encoder, image: Float[Tensor, "3 H W"], buffers: Float[Tensor, "2 HW D"], out: Float[Tensor, "HW D"]
) -> None:
    """Write the code of an image to `out`: normalise, SiLU and convolve, block by block, from buffer to buffer."""
    first, *blocks = cast("list[Any]", list(encoder))
    x, shape = streaming.project_image(first, image, buffers[0]), image.shape[1:]
    layers = [pair for block in blocks for pair in ((block.norm1, block.conv1), (block.norm2, block.conv2))]
    for index, (norm, conv) in enumerate(layers, 1):
        x = convolve(x, norm, conv, shape, out if index == len(layers) else buffers[index % 2])


def convolve(
    x: streaming.Pixels, norm: nn.GroupNorm, conv: ReflectConv2d, shape: Sequence[int], out: Float[Tensor, "HW D"]
) -> streaming.Pixels:
    """Write a convolution, over reflected borders, of SiLU(GN(x))."""
    (height, width), half = shape, conv.kernel_size[0] // 2
    step = max(1, streaming.block_size(out) // width)
    affine, output = x.affine(norm), streaming.Pixels.around(out, step * width)
    rows, cols = (torch.from_numpy(reflection(n, half)).to(out.device) for n in shape)
    scratch = streaming.Scratch(out, (step + 4 * half) * width)
    weight = conv.weight.contiguous(memory_format=torch.channels_last)

    def strip(index: int) -> None:
        begin, end = index * step, min((index + 1) * step, height)
        seen = rows[begin : end + 2 * half]
        top, bottom = int(seen.min()), int(seen.max()) + 1
        with scratch.taken() as memory:
            active = streaming.activate(x.data[top * width : bottom * width], affine, memory)
            if half:
                bordered = active.unflatten(0, (-1, width))[seen - top].index_select(1, cols).permute(2, 0, 1)
                convolved = F.conv2d(bordered[None], weight, conv.bias)[0].permute(1, 2, 0).flatten(0, 1)
                output.block(index).copy_(convolved)
            else:
                torch.addmm(cast(Tensor, conv.bias), active, streaming.matrix(conv), out=output.block(index))
            output.count(index, memory)

    threads.each(strip, len(output.sums))
    return output


class Rotation(nn.Module):
    """Rotates the pairs of a head's channels by angles that are linear in the row or in the column.

    While training, the coordinates are multiplied by a factor between 1/2 and 2, drawn at every call. (The published
    layer keeps the coordinates of a size, and so the first factor drawn for it, in evaluation as well.)
    """

    periods: Tensor

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.quarter = heads, dim // heads // 4
        self.register_buffer("periods", torch.from_numpy(periods(dim // heads)))

    def forward(self, x: Float[Tensor, "B H W D"], overwrite: bool = False) -> Float[Tensor, "B H W D"]:
        """Return the rotated map, in its own memory if asked to."""
        turns = [(angle.cos(), angle.sin()) for angle in cast(Any, self.angles)(*x.shape[1:3])]
        if not overwrite:
            return self._turn(x, turns)
        step = max(1, STRIP // x.shape[2])
        for first, strip in enumerate(x.split(step, 1)):
            above = [table[first * step : (first + 1) * step] for table in turns[0]]
            strip.copy_(self._turn(strip, [above, turns[1]]))
        return x

    def _turn(self, x: Tensor, turns: Any) -> Tensor:
        rows, cols = x.float().unflatten(3, (self.heads, 2, 2, self.quarter)).unbind(5)
        (row_cos, row_sin), (col_cos, col_sin) = turns
        row_cos, row_sin = row_cos[:, None, None, None], row_sin[:, None, None, None]
        col_cos, col_sin = col_cos[:, None, None], col_sin[:, None, None]
        turned = [
            y * cos + torch.stack([-y[..., 1, :], y[..., 0, :]], -2) * sin
            for y, cos, sin in ((rows, row_cos, row_sin), (cols, col_cos, col_sin))
        ]
        return torch.stack(turned, 5).flatten(3).to(x.dtype)

    @torch.compiler.disable  # coordinates are made by numpy, not traced
    def angles(self, height: int, width: int) -> list[Float[Tensor, "_ T"]]:
        """Return the angles of the rows and of the columns, float32."""
        table, factor = self.periods.float(), 1.0
        if self.training:
            factor = table.new_empty(()).uniform_(-math.log(2), math.log(2)).exp()
        axes = (torch.from_numpy(centres(n)).to(table)[:, None] for n in (height, width))
        return [2 * math.pi * factor * axis / table for axis in axes]


class ImageEncoder(nn.Module):
    """Two encoders of the image, of pixels and of their surroundings, side by side; and a rotation."""

    def __init__(self, config: NAFConfig):
        super().__init__()
        self.dim = config.dim
        self.encoder = Encoder(config.dim // 2, 1)
        self.sem_encoder = Encoder(config.dim // 2, 3)
        self.rope = Rotation(config.dim, config.rope_heads)

    def forward(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D H W"]:
        return torch.cat([self.encoder(image), self.sem_encoder(image)], 1)

    @threads.on_own_threads
    @torch.no_grad()
    def stream(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D H W"]:
        """Compute `forward` for one image after the other, in blocks of rows; the memory is channels last."""
        batch, _, height, width = image.shape
        dim = self.dim // 2
        output = image.new_empty(batch, height, width, 2 * dim)
        buffers = image.new_empty(2, height * width, dim)
        for guidance, out in zip(image, output.flatten(1, 2)):
            encode(self.encoder, guidance, buffers, out[:, :dim])
            encode(self.sem_encoder, guidance, buffers, out[:, dim:])
        return output.permute(0, 3, 1, 2)


class NAF(ConfiguredUpsampler):
    """NAF: a position attends to the cells around it, each head averages its own share of the raw feature channels.

    Args:
        config: the settings; the default ones if None.
        fields: fields of `NAFConfig` that differ from these.

    Raises:
        TypeError: for fields that do not exist.
        ValueError: for settings no model can have.
    """

    settings = NAFConfig

    def __init__(self, config: NAFConfig | None = None, **fields: Any):
        super().__init__(config, **fields)
        self.image_encoder = ImageEncoder(self.config)
        self.made_of = anatomy(self)

    def upsample(
        self, image: Float[Tensor, "B 3 H W"], features: Float[Tensor, "B C h w"], size: Size, q_chunk_size: int | None
    ) -> Float[Tensor, "B C Ho Wo"]:
        image, cells = resize(image, self.config.reduced(grid_of(image), size)), grid_of(features)
        encoder = self.image_encoder
        code = encoder.stream(image) if streaming.possible(self, image) else encoder(image)
        if grid_of(code) != size:
            code = F.adaptive_avg_pool2d(code, size)
        overwrite = not (differentiated(self, image) or torch.compiler.is_exporting())
        query = encoder.rope(code.permute(0, 2, 3, 1), overwrite=overwrite)
        key = F.adaptive_avg_pool2d(query.permute(0, 3, 1, 2), cells).permute(0, 2, 3, 1)
        windows = (host_window(n, m, self.config.kernel_size) for n, m in zip(size, cells))
        options = dict(num_heads=self.config.num_heads, q_chunk_size=q_chunk_size, values_per_head=True)
        return attention(query, key, features.permute(0, 2, 3, 1), *windows, **options).permute(0, 3, 1, 2)
