"""FeatUp's stack of four joint bilateral upsamplers (arXiv 2403.10516), each of which doubles the size.

A filter of 7 x 7 taps of its own at every pixel, shared by all channels, is a matrix product on tiles: the filters of
8 x 8 pixels are the rows of a (64, 196) matrix, zero but for 49 entries a row, and the 14 x 14 pixels that they see are
a (196, C) matrix. In the stack these pixels are bicubic averages of 11 x 11 pixels of half the resolution, by weights
that are the same everywhere; so the averages are taken of the filters, not of the C channels: (64, 121) and (121, C).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anyup_core.upsamplers.featup import FIXUP, KEY_DIM, RADIUS, STAGES, TAPS, FeatUpConfig, doubled_slabs
from anyup_torch.image_code import Size
from anyup_torch.model import grid_of
from anyup_torch.upsamplers.interpolation import resize
from anyup_torch.upsamplers.protocol import ConfiguredUpsampler, differentiated

TILE = 8  # side of a tile of pixels
GROUP = 32  # tiles worked on at once
GROUP_PARALLEL = 4096  # the same on accelerators, which want few large operations


class Tiles:
    """Tiles of the pixels of a map, some neighbours in a row of tiles at a time.

    Args:
        size: height and width of the map.
        kernel: side of the filters.
        q_chunk_size: most pixels worked on at once; None for what suits the device.
        device: where the tensors are.
    """

    def __init__(self, size: Size, kernel: int, q_chunk_size: int | None, device: torch.device):
        limit = TILE if q_chunk_size is None else min(TILE, 1 << int(math.log2(math.isqrt(q_chunk_size))))
        self.sides = math.gcd(size[0], limit), math.gcd(size[1], limit)
        self.seen, self.kernel = tuple(side + kernel - 1 for side in self.sides), kernel
        self.runs = size[0] // self.sides[0], size[1] // self.sides[1]
        default = GROUP if device.type == "cpu" else GROUP_PARALLEL
        self.group = default if q_chunk_size is None else max(1, q_chunk_size // math.prod(self.sides))

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Yield groups of tiles, row by row: which row of tiles, and which tiles of it."""
        for row in range(self.runs[0]):
            for col in range(0, self.runs[1], self.group):
                yield slice(row, row + 1), slice(col, min(col + self.group, self.runs[1]))

    def pixels(self, x: Float[Tensor, "B Y X C"], group: tuple[slice, slice]) -> Float[Tensor, "G P C"]:
        """Return the pixels of tiles, tile by tile."""
        (height, width), (rows, cols) = self.sides, group
        x = x[:, rows.start * height : rows.stop * height, cols.start * width : cols.stop * width]
        x = x.unflatten(2, (-1, width)).unflatten(1, (-1, height)).transpose(2, 3)
        return x.flatten(3, 4).flatten(0, 2)

    def place(self, x: Float[Tensor, "G P C"], batch: int, group: tuple[slice, slice]) -> Float[Tensor, "B Y X C"]:
        """Put the pixels of tiles side by side."""
        (height, width), (rows, cols) = self.sides, group
        x = x.reshape(batch, rows.stop - rows.start, cols.stop - cols.start, height, width, x.shape[-1])
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def surroundings(self, padded: Float[Tensor, "B Yp Xp C"], group: tuple[slice, slice]) -> Float[Tensor, "G S C"]:
        """Return all that the filters of tiles see, of a map with a border."""
        (height, width), (rows, cols) = self.sides, group
        ends = (rows.stop - 1) * height + self.seen[0], (cols.stop - 1) * width + self.seen[1]
        part = padded[:, rows.start * height : ends[0], cols.start * width : ends[1]]
        part = part.unfold(1, self.seen[0], height).unfold(2, self.seen[1], width)
        return part.permute(0, 1, 2, 4, 5, 3).flatten(3, 4).flatten(0, 2)

    def taps(self, matrix: Float[Tensor, "G P S"]) -> Float[Tensor, "G y x k k"]:
        """Return the view of a matrix that holds what each pixel's filter sees."""
        (height, width), across = self.sides, self.seen[1]
        row, tap = width * matrix.shape[2], (across, 1)
        strides = (matrix.stride(0), row + across, matrix.shape[2] + 1, *tap)
        return matrix.as_strided((len(matrix), height, width, self.kernel, self.kernel), strides)

    def matrix(self, filters: Float[Tensor, "G P K"]) -> Float[Tensor, "G P S"]:
        """Return the filters of tiles as matrices that are to be multiplied with the surroundings."""
        matrix = filters.new_zeros(*filters.shape[:2], math.prod(self.seen))
        self.taps(matrix).copy_(filters.view(-1, *self.sides, self.kernel, self.kernel))
        return matrix


def adaptive_conv(
    padded: Float[Tensor, "B C _ _"], filters: Float[Tensor, "B Y X k k"], q_chunk_size: int | None = None
) -> Float[Tensor, "B C Y X"]:
    """Correlate a map with a filter of its own at every pixel, shared by all channels.

    out[b, c, y, x] is the sum over i, j of filters[b, y, x, i, j] padded[b, c, y + i, x + j]. Filters are not flipped.

    The gradients are the true ones. Those of FeatUp's compiled op for CUDA are not: it computes the number of a tap as
    a square, so that of the 49 only taps 0, 1, 4, 9, 16, 25 and 36 of the filters get any.

    Args:
        padded: the map with a border, of Y + k - 1 by X + k - 1 pixels.
        filters: k x k taps for each pixel of the output.
        q_chunk_size: pixels worked on at once; bounds memory, never changes the result.

    Raises:
        ValueError: if the sizes do not fit.
    """
    (batch, height, width, kernel, across), size = filters.shape, tuple(padded.shape[2:])
    if len(padded) != batch or across != kernel or size != (height + kernel - 1, width + kernel - 1):
        raise ValueError(
            f"a map of shape {tuple(padded.shape)} does not fit filters of shape {tuple(filters.shape)}; give "
            f"{batch} maps of {height + kernel - 1} x {width + kernel - 1} pixels, k - 1 more than there are filters."
        )
    below, right = -height % TILE, -width % TILE  # whole tiles
    padded = F.pad(padded, (0, right, 0, below)).permute(0, 2, 3, 1)
    filters = F.pad(filters.flatten(3), (0, 0, 0, right, 0, below))
    tiles = Tiles((height + below, width + right), kernel, q_chunk_size, padded.device)

    def convolve(group: tuple[slice, slice]) -> Float[Tensor, "B _ _ C"]:
        output = tiles.matrix(tiles.pixels(filters, group)) @ tiles.surroundings(padded, group)
        return tiles.place(output, batch, group)

    needed = torch.is_grad_enabled() and (padded.requires_grad or filters.requires_grad)
    output = assemble(tiles, convolve, differentiable=needed)
    return output[:, :height, :width].permute(0, 3, 1, 2)


def assemble(
    tiles: Tiles, compute: Callable[[tuple[slice, slice]], Tensor], *, differentiable: bool
) -> Float[Tensor, "B Y X C"]:
    """Return the map that is computed group by group; for a gradient each group is computed again."""
    rows, output = {}, None
    for group in tiles:
        if differentiable:
            rows.setdefault(group[0].start, []).append(checkpoint(compute, group, use_reentrant=False))
            continue
        part = compute(group)
        if output is None:
            size = tuple(run * side for run, side in zip(tiles.runs, tiles.sides))
            output = part.new_empty(len(part), *size, part.shape[3])
        where = (slice(g.start * side, g.stop * side) for g, side in zip(group, tiles.sides))
        output[:, next(where), next(where)] = part
    return torch.cat([torch.cat(row, 2) for row in rows.values()], 1) if output is None else output


class Doubled:
    """A map of twice the size, bicubic and with reflected borders, that is filtered without being made.

    Args:
        source: the map.
        tiles: those of the map of twice the size.
    """

    def __init__(self, source: Float[Tensor, "B C h w"], tiles: Tiles):
        self.pixels, self.width = source.permute(0, 2, 3, 1).flatten(1, 2), int(source.shape[3])
        axes = [doubled_slabs(n, side) for n, side in zip(grid_of(source), tiles.sides)]
        (self.tops, rows), (self.lefts, cols) = ((first, by_tap(weights)) for first, weights in axes)
        self.rows, self.cols = (torch.from_numpy(weights).to(source) for weights in (rows, cols))
        self.changes = 1 + np.flatnonzero((cols[1:] != cols[:-1]).any((1, 2, 3)))  # only the borders' tiles differ

    def filter(self, filters: Float[Tensor, "G P K"], group: tuple[slice, slice]) -> Float[Tensor, "G P C"]:
        """Return what filters make of the tiles of a row of tiles."""
        row, (begin, end) = group[0].start, (group[1].start, group[1].stop)
        by_image = filters.unflatten(0, (len(self.pixels), -1))
        bounds = [begin, *self.changes[(self.changes > begin) & (self.changes < end)].tolist(), end]
        parts = [self._filter(by_image[:, a - begin : b - begin], row, a, b) for a, b in itertools.pairwise(bounds)]
        return (torch.cat(parts, 1) if len(parts) > 1 else parts[0]).flatten(0, 1)

    def _filter(self, filters: Float[Tensor, "B G P K"], row: int, begin: int, end: int) -> Float[Tensor, "B G P C"]:
        rows, cols = self.rows[row], self.cols[begin]
        averages = torch.einsum("ril,cjm->rcijlm", rows, cols).flatten(4, 5).flatten(2, 3).flatten(0, 1)  # P, K, S
        averaged = (filters.flatten(0, 1).transpose(0, 1) @ averages).transpose(0, 1)
        down, across = (np.arange(weights.shape[-1]) for weights in (rows, cols))
        places = (self.tops[row] + down)[:, None] * self.width + (self.lefts[begin:end, None] + across)[:, None]
        index = torch.from_numpy(places.reshape(-1)).to(self.pixels.device)
        seen = self.pixels.index_select(1, index).view(len(averaged), averages.shape[-1], -1)
        return (averaged @ seen).unflatten(0, filters.shape[:2])


def by_tap(weights: Float[np.ndarray, "runs slab span"]) -> Float[np.ndarray, "runs side taps span"]:
    """Return the weights of slabs for each pixel of a run and each tap of its filter."""
    side = weights.shape[1] - 2 * RADIUS
    return weights[:, np.arange(side)[:, None] + np.arange(2 * RADIUS + 1)]


def pointwise(inputs: int, hidden: int, dropout: float = 0.1) -> nn.Sequential:
    """Two 1 x 1 convolutions."""
    return nn.Sequential(nn.Conv2d(inputs, hidden, 1), nn.GELU(), nn.Dropout2d(dropout), nn.Conv2d(hidden, hidden, 1))


def linear(conv: Any, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
    """Apply a 1 x 1 convolution to pixels whose channels come last."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


class JointBilateral(nn.Module):
    """Doubles the size of a map: bicubic, then filtered by the similarity of learned codes of the pixels' colours."""

    def __init__(self):
        super().__init__()
        self.range_temp = nn.Parameter(torch.tensor(0.0))
        self.sigma_spatial = nn.Parameter(torch.tensor(1.0))
        self.range_proj = pointwise(3, KEY_DIM)
        self.fixup_proj = pointwise(TAPS + 3, TAPS)

    def forward(
        self,
        source: Float[Tensor, "B C h w"],
        guidance: Float[Tensor, "B 3 Y X"],
        q_chunk_size: int | None,
    ) -> Float[Tensor, "B C Y X"]:
        """Return the filtered map; its memory is channels last."""
        code = self.range_proj(guidance).permute(0, 2, 3, 1)
        bordered = F.pad(code.permute(0, 3, 1, 2), (RADIUS,) * 4, mode="reflect").permute(0, 2, 3, 1)
        size, colours = grid_of(guidance), guidance.permute(0, 2, 3, 1)
        spatial, temperature = self.spatial(), self.range_temp.exp().clamp(1e-4, 1e4)
        if torch.compiler.is_exporting():
            return self._exported(source, code, bordered, colours, spatial, temperature)
        tiles = Tiles(size, 2 * RADIUS + 1, q_chunk_size, source.device)
        doubled = Doubled(source, tiles)
        kept = self.fixup_proj[2](code.new_ones(len(code), TAPS, 1, 1)).flatten(1) if self.training else None

        def upsample(group: tuple[slice, slice]) -> Float[Tensor, "B _ _ C"]:
            scores = tiles.pixels(code, group) @ tiles.surroundings(bordered, group).transpose(1, 2)
            similarity = (tiles.taps(scores).flatten(3).flatten(1, 2) * temperature).softmax(-1)
            filters = similarity * spatial
            filters = filters / filters.sum(-1, keepdim=True).clamp(min=1e-7)
            filters = torch.add(filters, self.correct(filters, tiles.pixels(colours, group), kept), alpha=FIXUP)
            return tiles.place(doubled.filter(filters, group), len(source), group)

        output = assemble(tiles, upsample, differentiable=differentiated(self, source, guidance))
        return output.permute(0, 3, 1, 2)

    def _exported(
        self,
        source: Float[Tensor, "B C h w"],
        code: Float[Tensor, "B Y X D"],
        bordered: Float[Tensor, "B Yp Xp D"],
        colours: Float[Tensor, "B Y X 3"],
        spatial: Float[Tensor, "49"],
        temperature: Float[Tensor, ""],
    ) -> Float[Tensor, "B C Y X"]:
        """Compute `forward` tap by tap on whole maps: a program of few operations, which holds three such maps."""
        (height, width), side, border = code.shape[1:3], 2 * RADIUS + 1, (RADIUS,) * 4
        rows = [bordered[:, i : i + height].unfold(2, side, 1) for i in range(side)]
        scores = torch.cat([(code[..., None] * row).sum(3) for row in rows], -1)
        filters = (scores * temperature).softmax(-1) * spatial
        filters = filters / filters.sum(-1, keepdim=True).clamp(min=1e-7)
        filters = torch.add(filters, self.correct(filters, colours, None), alpha=FIXUP)
        doubled = F.pad(resize(source, (height, width), "bicubic"), border, mode="reflect")
        maps = [
            row.narrow(3, j, width) for row in (doubled.narrow(2, i, height) for i in range(side)) for j in range(side)
        ]
        output = torch.zeros_like(maps[0])
        for weights, seen in zip(filters[:, None].unbind(-1), maps):
            output = torch.addcmul(output, weights, seen)
        return output

    def spatial(self) -> Float[Tensor, "49"]:
        """Return the weights of the taps by their distance, a Gaussian."""
        axis = torch.linspace(-1, 1, 2 * RADIUS + 1, device=self.sigma_spatial.device, dtype=self.sigma_spatial.dtype)
        squares = axis.square()[:, None] + axis.square()
        return (-squares / (2 * self.sigma_spatial.square())).exp().flatten()

    def correct(
        self, filters: Float[Tensor, "*G P 49"], colours: Float[Tensor, "*G P 3"], kept: Float[Tensor, "B 49"] | None
    ) -> Float[Tensor, "*G P 49"]:
        first, activation, _, last = self.fixup_proj
        hidden = activation(linear(first, torch.cat([filters, colours], -1)))
        if kept is not None:  # one draw for the whole of an image
            hidden = hidden * kept.repeat_interleave(len(hidden) // len(kept), 0)[:, None]
        return linear(last, hidden)


class Stack(nn.Module):
    """The four upsamplers and a correction of their result."""

    def __init__(self, channels: int):
        super().__init__()
        for stage in range(1, STAGES + 1):
            self.add_module(f"up{stage}", JointBilateral())
        self.fixup_proj = nn.Sequential(nn.Dropout2d(0.2), nn.Conv2d(channels, channels, 1))

    def forward(
        self, image: Float[Tensor, "B 3 H W"], features: Float[Tensor, "B C h w"], q_chunk_size: int | None
    ) -> Float[Tensor, "B C _ _"]:
        """Return the upsampled map without the last bias, which is to be added to the output."""
        dropout, last = cast("list[Any]", list(self.fixup_proj))
        # the published one ends with x + 0.1 (W x + b). A stage treats all channels alike, so that W may go before it
        seen = features * dropout(features.new_ones(*features.shape[:2], 1, 1)) if self.training else features
        features = features + FIXUP * F.conv2d(seen, last.weight)
        for stage in range(1, STAGES + 1):
            guidance = F.adaptive_avg_pool2d(image, (2 * features.shape[2], 2 * features.shape[3]))
            features = self.get_submodule(f"up{stage}")(features, guidance, q_chunk_size)
        return features

    def shift(self) -> Float[Tensor, "C 1 1"]:
        """Return what is to be added to every pixel of the output."""
        return FIXUP * cast(Any, self.fixup_proj[1]).bias[:, None, None]


class ChannelNorm(nn.Module):
    """A LayerNorm over the channels of every position."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FeatUp(ConfiguredUpsampler):
    """FeatUp's upsampler: an output of 16 times the features' size, which another size is interpolated from.

    Args:
        config: the settings; the default ones if None.
        fields: fields of `FeatUpConfig` that differ from these.

    Raises:
        TypeError: for fields that do not exist.
        ValueError: for settings no model can have.
    """

    settings = FeatUpConfig

    def __init__(self, config: FeatUpConfig | None = None, **fields: Any):
        super().__init__(config, **fields)
        channels = self.config.channels
        if self.config.channel_norm:
            self.model = nn.ModuleDict(
                {"1": ChannelNorm(channels)}
            )  # what comes after the encoder in the published one
        self.upsampler = Stack(channels)

    def upsample(
        self, image: Float[Tensor, "B 3 H W"], features: Float[Tensor, "B C h w"], size: Size, q_chunk_size: int | None
    ) -> Float[Tensor, "B C Ho Wo"]:
        if self.config.channel_norm:
            features = self.model["1"](features)
        output, shift = resize(self.upsampler(image, features, q_chunk_size), size), self.upsampler.shift()
        return output + shift if differentiated(self, image, features) else output.add_(shift)
