"""JAFAR (arXiv 2506.11136): global attention to cells whose keys the features modulate."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from anyup_core.config import NORM_GROUPS
from anyup_core.geometry import AxisWindow
from anyup_core.upsamplers.jafar import JAFARConfig
from anyup_torch import streaming, threads
from anyup_torch.anatomy import anatomy
from anyup_torch.image_code import ImageCode, Size
from anyup_torch.layers import GROUP_NORM_EPS, ReflectConv2d, RMSNorm, RoPE
from anyup_torch.model import attention, grid_of, host_window
from anyup_torch.upsamplers.blocks import ResidualBlock
from anyup_torch.upsamplers.protocol import ConfiguredUpsampler


class Encoder(nn.Sequential):
    """A k x k convolution with reflected borders and two residual blocks."""

    def __init__(self, inputs: int, dim: int, kernel_size: int = 1):
        super().__init__(ReflectConv2d(inputs, dim, kernel_size), ResidualBlock(dim), ResidualBlock(dim))


class Modulation(nn.Module):
    """Scales and shifts the image's keys, normalised, as the features' description says."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Conv2d(dim, dim, 1, bias=False)
        self.beta = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, key: Float[Tensor, "B D h w"], described: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        return self.gamma(described) * normed(key) + self.beta(described)


def normed(x: Float[Tensor, "B D _ _"]) -> Float[Tensor, "B D _ _"]:
    """Apply a GroupNorm without weights."""
    return F.group_norm(x, NORM_GROUPS, eps=GROUP_NORM_EPS)


class Projections(nn.Module):
    """Norms and projections of queries and keys; has the published attention module's parameters.

    Its values and its output projection never reach the output, which is an average of the raw features.
    """

    def __init__(self, config: JAFARConfig):
        super().__init__()
        self.norm_q = RMSNorm(config.qk_dim)
        self.norm_k = RMSNorm(config.qk_dim)
        self.norm_v = RMSNorm(config.channels)
        self.attention = nn.MultiheadAttention(config.qk_dim, config.num_heads, vdim=config.channels, batch_first=True)
        for unused in (self.norm_v, self.attention.out_proj):
            unused.requires_grad_(False)
        if not config.fused:
            self.attention.v_proj_weight.requires_grad_(False)

    def query(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return F.linear(self.norm_q(x), self._weight(0), self.attention.in_proj_bias.chunk(3)[0])

    def key(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return F.linear(self.norm_k(x), self._weight(1), self.attention.in_proj_bias.chunk(3)[1])

    def _weight(self, index: int) -> Tensor:
        if self.attention.in_proj_weight is not None:
            return self.attention.in_proj_weight.chunk(3)[index]
        return (self.attention.q_proj_weight, self.attention.k_proj_weight)[index]


class CrossAttention(nn.Module):
    """Every query averages the raw values of all cells."""

    def __init__(self, config: JAFARConfig):
        super().__init__()
        self.cross_attn = Projections(config)
        self.conv2d = nn.Conv2d(config.qk_dim, config.qk_dim, 3, padding=1, bias=False)

    def forward(
        self,
        query: Float[Tensor, "B D Ho Wo"],
        key: Float[Tensor, "B D h w"],
        values: Float[Tensor, "B E h w"],
        q_chunk_size: int | None,
    ) -> Float[Tensor, "B E Ho Wo"]:
        windows = self.windows(grid_of(query), grid_of(key))
        query = self.cross_attn.query(self.conv2d(query).permute(0, 2, 3, 1))
        options = dict(num_heads=self.cross_attn.attention.num_heads, q_chunk_size=q_chunk_size)
        output = attention(query, self.project_key(key), values.permute(0, 2, 3, 1), *windows, **options)
        return output.permute(0, 3, 1, 2)

    def windows(self, size: Size, grid: Size) -> tuple[AxisWindow, AxisWindow]:
        return host_window(size[0], grid[0], 0.0), host_window(size[1], grid[1], 0.0)

    def project_key(self, key: Float[Tensor, "B D h w"]) -> Float[Tensor, "B h w D"]:
        return self.cross_attn.key(key.permute(0, 2, 3, 1))

    def project_rows(self, query: Float[Tensor, "B _ Wo D"]) -> Float[Tensor, "B _ Wo D"]:
        """Project rows of queries, given with one more row at either end."""
        query = F.conv2d(query.permute(0, 3, 1, 2), self.conv2d.weight, padding=(0, 1))
        return self.cross_attn.query(query.permute(0, 2, 3, 1))


class JAFAR(ConfiguredUpsampler):
    """JAFAR: every output position attends to all cells, and averages the raw features.

    In eager inference of unchanged submodules the same is computed with a fraction of the memory.

    Args:
        config: the settings; the default ones if None.
        fields: fields of `JAFARConfig` that differ from these.

    Raises:
        TypeError: for fields that do not exist.
        ValueError: for settings no model can have.
    """

    settings = JAFARConfig

    def __init__(self, config: JAFARConfig | None = None, **fields: Any):
        super().__init__(config, **fields)
        dim = self.config.qk_dim
        self.image_encoder = Encoder(3, dim, self.config.kernel_size)
        self.key_encoder = Encoder(dim, dim)
        self.query_encoder = Encoder(dim, dim)
        self.key_features_encoder = Encoder(self.config.channels, dim)
        self.cross_decode = CrossAttention(self.config)
        self.sft_key = Modulation(dim)
        self.rope = RoPE(dim)
        self.made_of = anatomy(self)

    def upsample(
        self, image: Float[Tensor, "B 3 H W"], features: Float[Tensor, "B C h w"], size: Size, q_chunk_size: int | None
    ) -> Float[Tensor, "B C Ho Wo"]:
        if streaming.possible(self, image, features):
            return self._stream(image, features, size, q_chunk_size)
        guide = self.rope(self.image_encoder(image))
        query = normed(F.adaptive_avg_pool2d(self.query_encoder(guide), size))
        key = F.adaptive_avg_pool2d(self.key_encoder(guide), grid_of(features))
        return self.cross_decode(query, self.modulate(key, features), features, q_chunk_size)

    def modulate(self, key: Float[Tensor, "B D h w"], features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        """Return the keys of the cells, given the image's."""
        return self.sft_key(key, self.key_features_encoder(F.normalize(features, dim=1, eps=1e-12)))

    @threads.on_own_threads
    @torch.no_grad()
    def _stream(self, image: Tensor, features: Tensor, size: Size, q_chunk_size: int | None) -> Tensor:
        """Compute `upsample` one image after the other, in strips of rows."""
        grid, output = grid_of(features), features.new_empty(len(image), *size, features.shape[1])
        tiles = streaming.plan(self, [grid], size, q_chunk_size, image.device)
        strip = max(attention.tall.size for attention in tiles)
        for index in range(len(image)):
            one = slice(index, index + 1)
            code = streaming.encode(self, image[index], [grid], [size], output[index], strip)
            code = ImageCode(code.keys, code.queries, streaming.group_norm(code.query(size)))
            maps = [(self.modulate(code.key(grid), features[one]), features[one])]
            streaming.attend(self.cross_decode, code, maps, size, tiles, [output[one]])
        return output.permute(0, 3, 1, 2)
