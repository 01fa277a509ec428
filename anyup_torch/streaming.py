"""The same model for eager inference, in a fraction of the memory: blocks of rows through whole residual blocks.

A GroupNorm needs the statistics of a whole image, but once they are known it is a scale and a shift per channel. So
each layer is one pass over the pixels, block by block in a core's cache: normalise, SiLU, matrix product, written in
place, with the next norm's statistics gathered on the way. Three D-channel images are held at the peak, in the memory
of the output where they fit; projected queries and attention weights exist only for a strip of rows on each thread.
Blocks and strips go to threads of their own, see `threads`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from anyup_core.config import NORM_GROUPS
from anyup_core.geometry import plan_tiles
from anyup_torch import threads
from anyup_torch.attention import resolve
from anyup_torch.attention.tiled import TileAttention
from anyup_torch.image_code import ImageCode, Map, Size
from anyup_torch.layers import GROUP_NORM_EPS, ReflectConv2d, ResBlock, RoPE, transformed
from anyup_torch.upsamplers.blocks import ResidualBlock

BLOCK = 1 << 12  # pixels a block: what stays in a core's cache at 128 channels
BLOCK_PARALLEL = 1 << 18  # the same on accelerators, which want few large operations

Affine = tuple[Float[Tensor, " D"], Float[Tensor, " D"]]  # scale and shift per channel


@dataclasses.dataclass
class Pixels:
    """An image's channels, row by row, with the sums that the next GroupNorm needs.

    Attributes:
        data: (H W, D), contiguous.
        step: pixels of a block; the last one may have fewer.
        sums: (blocks, 2, D) float32 or wider, over the pixels of each block, of x and of x squared.
    """

    data: Tensor
    step: int
    sums: Tensor

    @classmethod
    def around(cls, data: Tensor, step: int | None = None) -> Pixels:
        """Take the memory of `data`; `step` is `block_size` by default."""
        step = block_size(data) if step is None else step
        dtype = torch.promote_types(data.dtype, torch.float32)
        return cls(data, step, data.new_empty(-(-len(data) // step), 2, data.shape[1], dtype=dtype))

    def block(self, index: int) -> Tensor:
        return self.data[index * self.step : (index + 1) * self.step]

    def count(self, index: int, scratch: Tensor) -> None:
        """Sum up a block that has been written."""
        block, sums = self.block(index), self.sums[index]
        if block.dtype != sums.dtype:
            block = block.to(sums.dtype)
            scratch = torch.empty_like(block)
        torch.sum(block, 0, out=sums[0])
        torch.sum(torch.mul(block, block, out=scratch[: len(block)]), 0, out=sums[1])

    def affine(self, norm: nn.GroupNorm) -> Affine:
        """Return scale and shift per channel that apply `norm` to these pixels."""
        return affine(norm, self.sums.sum(0) / len(self.data), self.data)


class Scratch:
    """Memory for one block, of `pixels` at most, on each thread."""

    def __init__(self, like: Float[Tensor, "_ D"], pixels: int):
        self.free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        for _ in range(threads.count(like.device)):
            self.free.put(like.new_empty(pixels, like.shape[1]))

    @contextlib.contextmanager
    def taken(self) -> Iterator[Tensor]:
        memory = self.free.get()
        try:
            yield memory
        finally:
            self.free.put(memory)


def affine(norm: nn.GroupNorm, moments: Float[Tensor, "2 D"], like: Tensor) -> Affine:
    """Return scale and shift that apply a norm to pixels `like` these, given each channel's mean and mean square."""
    mean, square = moments.reshape(2, NORM_GROUPS, -1).mean(-1).repeat_interleave(moments.shape[1] // NORM_GROUPS, 1)
    scale = ((square - mean.square()).clamp(min=0) + norm.eps).rsqrt()
    if not norm.affine:
        return scale.to(like), (-mean * scale).to(like)
    scale = norm.weight.to(moments) * scale
    return scale.to(like), (norm.bias.to(moments) - mean * scale).to(like)


def group_norm(x: Float[Tensor, "1 D H W"]) -> Affine:
    """Return scale and shift that apply a GroupNorm without weights to an image whose memory is channels last."""
    pixels = Pixels.around(x.permute(0, 2, 3, 1).flatten(0, 2))
    scratch = Scratch(pixels.data, min(len(pixels.data), pixels.step))

    def count(index: int) -> None:
        with scratch.taken() as memory:
            pixels.count(index, memory)

    threads.each(count, len(pixels.sums))
    return pixels.affine(nn.GroupNorm(NORM_GROUPS, x.shape[1], GROUP_NORM_EPS, affine=False))


def workspace(
    pixels: int, dim: int, like: Tensor, output: Float[Tensor, "Ho Wo E"] | None, strip: int
) -> tuple[Float[Tensor, "pixels D"], ...]:
    """Return three uninitialised buffers: in the memory of `output`, the last one at its end, as far as they fit.

    The last one is for the queries. Strips of `strip` rows of the output overwrite it from the front, and this fits if
    every strip ends before the queries that the next one needs begin.
    """
    size, total = pixels * dim, 0 if output is None else output.numel()
    if total < 2 * size or output.dtype != like.dtype:
        return tuple(like.new_empty(pixels, dim) for _ in range(3))
    flat, (height, width, channels) = output.view(-1), output.shape
    ends = np.arange(strip, height, strip)
    fits = (ends * width * channels <= total - size + (ends - 1) * width * dim).all()
    if total >= 3 * size and pixels == height * width and fits:
        last = flat[total - size :].view(pixels, dim)
    else:
        last = like.new_empty(pixels, dim)
    return *flat[: 2 * size].view(2, pixels, dim), last


def block_size(pixels: Tensor) -> int:
    return BLOCK if pixels.device.type == "cpu" else BLOCK_PARALLEL


def activate(block: Tensor, affine: Affine, out: Tensor) -> Tensor:
    """Write SiLU(GN(block)) to the beginning of `out`, which may be the block itself."""
    scale, shift = affine
    return F.silu(torch.addcmul(shift, block, scale, out=out[: len(block)]), inplace=True)


class Stream:
    """Applies encoders to the pixels of one image, with one hidden buffer and scratch memory for blocks."""

    def __init__(self, hidden: Float[Tensor, "pixels D"]):
        self.hidden = hidden
        self.scratch = Scratch(hidden, min(len(hidden), block_size(hidden)))

    def widen(self, block: ResBlock | ResidualBlock, x: Pixels) -> Pixels:
        """Return the block's first convolution of SiLU(GN(x))."""
        affine, weight, hidden = x.affine(block.norm1), matrix(block.conv1), Pixels.around(self.hidden)
        source = Pixels.around(x.data)

        def step(index: int) -> None:
            with self.scratch.taken() as scratch:
                torch.mm(activate(source.block(index), affine, scratch), weight, out=hidden.block(index))
                hidden.count(index, scratch)

        threads.each(step, len(hidden.sums))
        return hidden

    def apply(self, block: ResBlock | ResidualBlock, x: Pixels) -> Pixels:
        """Apply a ResBlock of equal widths in place and return its output."""
        hidden = self.widen(block, x)
        affine, weight, output = hidden.affine(block.norm2), matrix(block.conv2), Pixels.around(x.data)

        def step(index: int) -> None:
            with self.scratch.taken() as scratch:
                output.block(index).addmm_(activate(hidden.block(index), affine, scratch), weight)
                output.count(index, scratch)

        threads.each(step, len(output.sums))
        return output

    def pool(
        self, block: ResBlock | ResidualBlock, x: Pixels, shape: Size, sizes: Sequence[Size]
    ) -> dict[Size, Float[Tensor, "1 D _ _"]]:
        """Apply a ResBlock and average over each size, before its last convolution, which is linear.

        The memory of `x` is overwritten, and is the result where a size is the image's own.
        """
        hidden, weight = self.widen(block, x), matrix(block.conv2)
        affine = hidden.affine(block.norm2)
        averages = {size: pool_pixels(x.data, shape, size) for size in sizes if size != shape}
        output = Pixels.around(x.data)

        def step(index: int) -> None:
            pixels = hidden.block(index)
            activate(pixels, affine, pixels)
            if shape in sizes:
                output.block(index).addmm_(pixels, weight)

        threads.each(step, len(hidden.sums))
        for size, average in averages.items():
            averages[size] = torch.addmm(average, pool_pixels(hidden.data, shape, size), weight)
        averages[shape] = x.data
        return {size: averages[size].view(1, *size, -1).permute(0, 3, 1, 2) for size in sizes}


def matrix(conv: nn.Conv2d) -> Float[Tensor, "inputs outputs"]:
    """The matrix of a 1 x 1 convolution."""
    return conv.weight.flatten(1).t()


def pool_pixels(data: Float[Tensor, "HW D"], shape: Size, size: Size) -> Float[Tensor, "hw D"]:
    image = data.reshape(1, *shape, -1).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(image, size).permute(0, 2, 3, 1).reshape(size[0] * size[1], -1)


def project_image(conv: ReflectConv2d, image: Float[Tensor, "input_dim H W"], out: Float[Tensor, "HW D"]) -> Pixels:
    """Write the image encoder's first convolution to `out`."""
    half, rows = conv.kernel_size[0] // 2, max(1, block_size(out) // image.shape[2])
    pixels = Pixels.around(out, rows * image.shape[2])
    padded = conv.pad(image[None])

    def step(index: int) -> None:
        strip = padded[:, :, index * rows : (index + 1) * rows + 2 * half]
        convolved = F.conv2d(strip, conv.weight, conv.bias)[0].permute(1, 2, 0).flatten(0, 1)
        pixels.block(index).copy_(convolved)
        pixels.count(index, convolved)

    threads.each(step, len(pixels.sums))
    return pixels


def rotate_and_project(
    guide: Float[Tensor, "HW D"],
    shape: Size,
    rope: RoPE,
    convs: tuple[nn.Conv2d, ...],
    outputs: tuple[Float[Tensor, "HW D"], ...],
) -> tuple[Pixels, ...]:
    """Rotate the guide and write 1 x 1 convolutions of it; one of the outputs may be the guide itself."""
    turns = [(angle.cos(), angle.sin()) for angle in rope.angles(*shape)]
    rows = max(1, block_size(guide) // shape[1])
    source, *projected = (Pixels.around(pixels, rows * shape[1]) for pixels in (guide, *outputs))
    scratch = Scratch(guide, min(len(guide), source.step))

    def step(index: int) -> None:
        turned = turn(source.block(index), turns, index * rows)
        with scratch.taken() as memory:
            for conv, pixels in zip(convs, projected):
                torch.mm(turned, matrix(conv), out=pixels.block(index))
                pixels.count(index, memory)

    threads.each(step, len(source.sums))
    return tuple(projected)


def turn(
    pixels: Float[Tensor, "pixels D"], turns: list[tuple[Float[Tensor, "_ D"], Float[Tensor, "_ D"]]], first: int
) -> Float[Tensor, "pixels D"]:
    """Rotate rows of an image from `first` on, given cosines and sines of the angles of all its rows and columns."""
    (row_cos, row_sin), (col_cos, col_sin) = turns
    block = pixels.view(-1, *col_cos.shape).float()
    above = slice(first, first + len(block))
    down_cos, down_sin, half = row_cos[above, None], row_sin[above, None], block.shape[2] // 2
    # cosine and sine of a sum: no sine is taken of every pixel's angle
    turned = (down_cos * col_cos).addcmul_(down_sin, col_sin, value=-1).mul_(block)
    sin = (down_sin * col_cos).addcmul_(down_cos, col_sin)
    turned[..., :half].addcmul_(block[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(block[..., :half], sin[..., half:])
    return turned.flatten(0, 1).to(pixels.dtype)


def possible(model: nn.Module, *tensors: Tensor) -> bool:
    """Whether the model can be streamed: in eager inference, in one type throughout, with the tiled attention.

    Streaming calls none of the submodules, so they must be the model's own, and nothing may be hooked to them.
    """
    return (
        resolve(getattr(model.config, "backend", "auto"), tensors[0].device) == "tiled"
        and tensors[0].device.type != "meta"
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed(*tensors))
        and not torch.is_autocast_enabled(tensors[0].device.type)
        and all(tensor.dtype == model.dtype for tensor in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *model.parameters())))
        and not model.changed
    )


@threads.on_own_threads
@torch.no_grad()
def upsample(
    model: nn.Module,
    image: Float[Tensor, "B input_dim H W"],
    features: Sequence[Float[Tensor, "B _ _ _"]],
    values: Sequence[Float[Tensor, "B _ _ _"]],
    size: Size,
    q_chunk_size: int | None,
) -> list[Float[Tensor, "B _ Ho Wo"]]:
    """Return the model's output for each feature map, one image after the other."""
    outputs = [maps.new_empty(len(image), *size, maps.shape[1]) for maps in values]
    grids = [tuple(maps.shape[2:]) for maps in features]
    tiles = plan(model, grids, size, q_chunk_size, image.device)
    largest, strip = max(outputs, key=torch.numel), max(attention.tall.size for attention in tiles)
    for index in range(len(image)):
        one = slice(index, index + 1)
        code = encode(model, image[index], grids, [size], largest[index], strip)
        maps = [(model.describe(code, x[one]), y[one]) for x, y in zip(features, values)]
        attend(model.cross_decode, code, maps, size, tiles, [output[one] for output in outputs])
    return [output.permute(0, 3, 1, 2) for output in outputs]


@threads.on_own_threads
@torch.no_grad()
def encode_image(
    model: nn.Module, image: Float[Tensor, "B input_dim H W"], grids: Sequence[Size], sizes: Sequence[Size]
) -> ImageCode:
    """Compute `AnyUp.encode_image`, one image after the other."""
    codes = [encode(model, guidance, grids, sizes) for guidance in image]
    if len(codes) == 1:
        return codes[0]
    keys = {grid: torch.cat([code.keys[grid] for code in codes]) for grid in grids}
    return ImageCode(keys, {size: torch.cat([code.queries[size] for code in codes]) for size in sizes})


@threads.on_own_threads
@torch.no_grad()
def decode(
    model: nn.Module, code: ImageCode, maps: Sequence[Map], size: Size, q_chunk_size: int | None
) -> list[Float[Tensor, "B _ Ho Wo"]]:
    """Compute `AnyUp.decode`."""
    outputs = [values.new_empty(len(values), *size, values.shape[1]) for _, values in maps]
    grids = [tuple(key.shape[2:]) for key, _ in maps]
    tiles = plan(model, grids, size, q_chunk_size, outputs[0].device)
    attend(model.cross_decode, code, maps, size, tiles, outputs)
    return [output.permute(0, 3, 1, 2) for output in outputs]


def plan(
    model: nn.Module, grids: Sequence[Size], size: Size, q_chunk_size: int | None, device: torch.device
) -> list[TileAttention]:
    """Plan the attention over each grid of cells."""
    plans = (plan_tiles(*model.cross_decode.windows(size, grid), q_chunk_size) for grid in grids)
    return [TileAttention(*tiles, model.config.num_heads, q_chunk_size, device) for tiles in plans]


def encode(
    model: nn.Module,
    image: Float[Tensor, "input_dim H W"],
    grids: Sequence[Size],
    sizes: Sequence[Size],
    buffer: Float[Tensor, "Ho Wo E"] | None = None,
    strip: int = 0,
) -> ImageCode:
    """Encode one image in the memory of `buffer`, where keys and queries of the image's own size stay.

    `buffer` and `strip` are as for `workspace`.
    """
    shape = tuple(image.shape[1:])
    hidden, keys, guide = workspace(shape[0] * shape[1], model.config.qk_dim, image, buffer, strip)
    stream = Stream(hidden)
    x = project_image(model.image_encoder[0], image, guide)
    x = stream.apply(model.image_encoder[2], stream.apply(model.image_encoder[1], x))
    first_layers = (model.key_encoder[0], model.query_encoder[0])
    key, query = rotate_and_project(x.data, shape, model.rope, first_layers, (keys, guide))
    keys, queries = (
        stream.pool(encoder[2], stream.apply(encoder[1], x), shape, wanted)
        for encoder, x, wanted in ((model.key_encoder, key, grids), (model.query_encoder, query, sizes))
    )
    return ImageCode(keys, queries)


def attend(
    decode: nn.Module,
    code: ImageCode,
    maps: Sequence[Map],
    size: Size,
    tiles: Sequence[TileAttention],
    outputs: Sequence[Float[Tensor, "B Ho Wo _"]],
) -> None:
    """Write the attention's outputs of all maps, one strip of queries after the other.

    The queries may lie at the end of one of the outputs (see `workspace`): a strip is written once those before it
    have read theirs. Rows of tiles are computed once all their queries are projected; what a later strip needs of an
    earlier one's is projected again, or, where that is more than a strip's worth in all, kept, strip after strip.
    """
    keys = [decode.project_key(key) for key, _ in maps]
    values = [values.permute(0, 2, 3, 1) for _, values in maps]
    step = max(attention.tall.size for attention in tiles)
    begins = range(0, size[0], step)
    tops = [min(attention.needed_from(begin) for attention in tiles) for begin in begins]

    def project(first: int, end: int) -> Float[Tensor, "B rows Wo D"]:
        return decode.project_rows(code.query_rows(size, first, end - first))

    def write(begin: int, end: int, query: Float[Tensor, "B rows Wo D"]) -> None:
        for attention, *tensors in zip(tiles, keys, values, outputs):
            for index, (key, seen, output) in enumerate(zip(*tensors)):
                attention.write(begin, end, query[index], key, seen, output[end - query.shape[1] : end])

    if sum(begin - top for begin, top in zip(begins, tops)) > step:
        kept = None
        for begin, needed in zip(begins, [*tops[1:], size[0]]):
            end = min(begin + step, size[0])
            query = project(begin, end) if kept is None else torch.cat([kept, project(begin, end)], 1)
            write(begin, end, query)
            kept = query[:, needed - end :].clone() if needed < end else None
        return
    have_read = [threading.Event() for _ in begins]

    def strip(index: int) -> None:
        end = min(begins[index] + step, size[0])
        try:
            query = project(tops[index], end)
        finally:
            have_read[index].set()
        for earlier in have_read[:index]:
            earlier.wait()
        write(begins[index], end, query)

    threads.each(strip, len(begins))
