"""LoftUp (arXiv 2504.14032): a transformer over the pixels, with Fourier features of their places and colours."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anyup_core.upsamplers import loftup as core
from anyup_core.upsamplers.loftup import CELL_FREQUENCIES, HEADS, IMAGE_CODE, IMAGE_FREQUENCIES, LAYERS, LoftUpConfig
from anyup_torch.image_code import Size
from anyup_torch.model import grid_of
from anyup_torch.upsamplers.featup import ChannelNorm, linear
from anyup_torch.upsamplers.interpolation import resize
from anyup_torch.upsamplers.protocol import ConfiguredUpsampler, differentiated

STRIP = 1 << 13  # pixels worked on at once
STRIP_PARALLEL = 1 << 17  # the same on accelerators, which want few large operations
OUTPUT_EPS = 1e-6  # of the last norm


class Fourier(nn.Module):
    """Sines and cosines of rows, columns and colours at many frequencies, with trained phases.

    Frequencies reach 22026: a phase off by one float32 rounding changes the model's output by 1e-3. So phases are
    float32 whatever the model's type, and made as in the published code, from tables of the host.
    """

    def __init__(self, channels: int, frequencies: int):
        super().__init__()
        self.biases = nn.Parameter(torch.randn(2, channels, frequencies))

    def forward(
        self, size: Size, rows: slice, colours: Float[Tensor, "B R W K"] | None = None
    ) -> Float[Tensor, "*B R W M"]:
        """Return the features of some rows of a map of this size, with or without colours of the pixels.

        The channels are all sines, then all cosines, each by frequency and then by row, column and colours.
        """
        (height, width), (biases, frequencies) = size, self.tables()
        axes = (torch.from_numpy(core.coordinates(n)).to(frequencies) for n in (height, width))
        down, across = (axis[:, None, None] for axis in axes)
        phases = [down[rows], across] if colours is None else [down[rows], across, colours.float()[..., None, :]]
        scaled = [phase * frequencies[:, None] for phase in phases]  # rounded before the biases are added
        shape = torch.broadcast_shapes(*(part.shape[:-2] for part in (scaled[0][:, None], scaled[1], *scaled[2:])))
        parts = []
        for wave, bias in zip((torch.sin, torch.cos), biases):
            split = bias.split([1, 1, *([] if colours is None else [colours.shape[-1]])], 1)
            waves = [wave(part + offset) for part, offset in zip(scaled, split)]
            waves[0] = waves[0][:, None]
            parts.append(torch.cat([x.expand(*shape, *x.shape[-2:]) for x in waves], -1).flatten(-2))
        return torch.cat(parts, -1)

    def tables(self) -> tuple[Float[Tensor, "2 F K"], Float[Tensor, " F"]]:
        """Return phases by frequency and channel, and frequencies; float32.

        The published code reads the table of phases, (channels, frequencies), as if it were the other way round.
        """
        _, channels, number = self.biases.shape
        frequencies = torch.from_numpy(core.frequencies(number)).to(self.biases.device)
        return self.biases.float().reshape(2, number, channels), frequencies


def scale_colours(image: Float[Tensor, "B 3 H W"], per_image: bool) -> Float[Tensor, "B 3 H W"]:
    """Return the colours by the range of each channel, from -1/2 to 1/2; float32."""
    image, axes = image.float(), (2, 3) if per_image else (0, 2, 3)
    low, high = (bound(axes, keepdim=True) for bound in (image.amin, image.amax))
    return (image - low) / (high - low).clamp(min=1e-4) - 0.5


class Attention(nn.Module):
    """Attention of pixels to cells."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm_q = nn.LayerNorm(dim)
        self.norm_kv = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, HEADS, batch_first=True)

    def cells(self, cells: Float[Tensor, "B h w D"]) -> tuple[Float[Tensor, "B h w D"], Float[Tensor, "B h w D"]]:
        """Return keys and values."""
        weight, bias = self.attention.in_proj_weight, self.attention.in_proj_bias
        dim = weight.shape[1]
        key, values = F.linear(self.norm_kv(cells), weight[dim:], bias[dim:]).chunk(2, -1)
        return key, values

    def forward(
        self, x: Float[Tensor, "B R W D"], key: Float[Tensor, "B h w D"], values: Float[Tensor, "B h w D"]
    ) -> Float[Tensor, "B R W D"]:
        weight, bias = self.attention.in_proj_weight, self.attention.in_proj_bias
        dim, heads = weight.shape[1], self.attention.num_heads
        query = F.linear(self.norm_q(x), weight[:dim], bias[:dim])
        query, key, values = (y.flatten(1, 2).unflatten(2, (heads, -1)).transpose(1, 2) for y in (query, key, values))
        attended = F.scaled_dot_product_attention(query, key, values).transpose(1, 2).flatten(2)
        return self.attention.out_proj(attended.view(x.shape))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        # the gaps in the published numbering are dropouts of rate 0
        layers = (nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, dim))
        self.net = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return self.net(x)


class Transformer(nn.Module):
    """Layers of attention to the cells and a feed-forward network each."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.layers: Any = nn.ModuleList(
            nn.ModuleList([Attention(dim), FeedForward(dim, hidden)]) for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(dim)

    def cells(self, cells: Float[Tensor, "B h w D"]) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values for each layer."""
        return [attend.cells(cells) for attend, _ in self.layers]

    def forward(self, x: Float[Tensor, "B R W D"], cells: list[tuple[Tensor, Tensor]]) -> Float[Tensor, "B R W D"]:
        for (attend, feed), (key, values) in zip(self.layers, cells):
            x = x + attend(x, key, values)
            x = x + feed(x)
        return self.norm(x)


class Network(nn.Module):
    """What comes after the channel norm."""

    def __init__(self, config: LoftUpConfig):
        super().__init__()
        dim, channels = config.dim, config.channels
        self.lr_pe = Fourier(2, CELL_FREQUENCIES)
        self.fourier_feat = nn.ModuleDict({"1": Fourier(5, IMAGE_FREQUENCIES)})
        self.first_conv = nn.Sequential(
            ChannelNorm(IMAGE_CODE),
            nn.Conv2d(IMAGE_CODE, dim, 3, padding=1),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
        )
        self.ca_transformer = Transformer(dim, channels)
        self.final_conv = nn.Sequential(nn.Conv2d(dim, channels, 1), nn.LayerNorm(channels, OUTPUT_EPS))

    def forward(
        self, colours: Float[Tensor, "B 3 H W"], features: Float[Tensor, "B C h w"], q_chunk_size: int | None
    ) -> Float[Tensor, "B C H W"]:
        """Return the output, given scaled colours (float32) and normed features."""
        height, width = grid_of(colours)
        code = self.lr_pe(grid_of(features), slice(None)).to(features.dtype).expand(features.shape[0], -1, -1, -1)
        cells = self.ca_transformer.cells(torch.cat([features.permute(0, 2, 3, 1), code], -1))
        last, norm = self.final_conv
        # statistics of a batch are of all pixels: only with running ones the convolutions can go strip by strip
        whole = self.first_conv(self.encode(colours, 0, height, features.dtype)) if self.training else None

        def strip(begin: int, end: int) -> Float[Tensor, "B R W C"]:
            x = self.queries(colours, begin, end, features.dtype) if whole is None else whole[:, :, begin:end]
            x = self.ca_transformer(x.permute(0, 2, 3, 1), cells)
            return norm(linear(last, x))

        exporting = torch.compiler.is_exporting()  # which unrolls the loop
        limit = STRIP if colours.device.type == "cpu" and not exporting else STRIP_PARALLEL
        step = max(1, (q_chunk_size or limit) // width)
        ends = [(begin, min(begin + step, height)) for begin in range(0, height, step)]
        if differentiated(self, colours, features):
            return torch.cat([checkpoint(strip, *each, use_reentrant=False) for each in ends], 1).permute(0, 3, 1, 2)
        if exporting:
            return torch.cat([strip(*each) for each in ends], 1).permute(0, 3, 1, 2)
        output = features.new_empty(len(features), height, width, features.shape[1])
        for begin, end in ends:
            output[:, begin:end] = strip(begin, end)
        return output.permute(0, 3, 1, 2)

    def encode(self, colours: Tensor, begin: int, end: int, dtype: torch.dtype) -> Float[Tensor, "B M R W"]:
        """Return Fourier features and colours of some rows."""
        seen, rows = colours[:, :, begin:end].permute(0, 2, 3, 1), slice(begin, end)
        waves = self.fourier_feat["1"](grid_of(colours), rows, seen)
        return torch.cat([waves, seen], -1).to(dtype).permute(0, 3, 1, 2)

    def queries(self, colours: Tensor, begin: int, end: int, dtype: torch.dtype) -> Float[Tensor, "B D R W"]:
        """Return the convolutions of the encoded image for some rows, in evaluation mode.

        They see two rows beyond; beyond the image there are zeros.
        """
        height = colours.shape[2]
        norm, *layers = cast("list[Any]", list(self.first_conv))
        tops, bottoms = zip(*((max(0, begin - halo), min(height, end + halo)) for halo in (2, 1, 0)))
        x = norm(self.encode(colours, tops[0], bottoms[0], dtype))
        for index, (conv, batch_norm) in enumerate(((layers[0], layers[1]), (layers[3], layers[4]))):
            above = tops[index] - tops[index + 1] + 1
            below = bottoms[index + 1] + 1 - bottoms[index]
            x = F.conv2d(F.pad(x, (0, 0, above, below)), conv.weight, conv.bias, padding=(0, 1))
            x = F.relu(batch_norm(x), inplace=True)
        return x


class LoftUp(ConfiguredUpsampler):
    """LoftUp: an output of the image's size; for another size the image is interpolated first.

    A new model is in evaluation mode; in training mode the BatchNorms use, and update, statistics of the batch.

    Args:
        config: the settings; the default ones if None.
        fields: fields of `LoftUpConfig` that differ from these.

    Raises:
        TypeError: for fields that do not exist.
        ValueError: for settings no model can have.
    """

    settings = LoftUpConfig
    image_dtype = torch.float32

    def __init__(self, config: LoftUpConfig | None = None, **fields: Any):
        super().__init__(config, **fields)
        self.channelnorm = ChannelNorm(self.config.channels)
        self.upsampler = Network(self.config)
        self.eval()

    def upsample(
        self, image: Float[Tensor, "B 3 H W"], features: Float[Tensor, "B C h w"], size: Size, q_chunk_size: int | None
    ) -> Float[Tensor, "B C Ho Wo"]:
        colours = scale_colours(resize(image, size), self.config.per_image)
        return self.upsampler(colours, self.channelnorm(features), q_chunk_size)
