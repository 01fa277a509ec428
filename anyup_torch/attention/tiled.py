"""Attention tile by tile: exact, linear in the number of queries, plain PyTorch operations, differentiable.

The windows of a tile of neighbouring queries overlap, so one slice of keys and values serves the whole tile. What a
query does not see of that slice is masked. Neighbouring tiles of a row of tiles are worked on together.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anyup_core.geometry import AxisTiles, AxisWindow, plan_tiles
from anyup_torch.layers import transformed

GROUP_PAIRS = 1 << 17  # query-key pairs scored at once: what a core's cache holds
GROUP_PAIRS_PARALLEL = 1 << 22  # the same for accelerators, which want few large operations


def tiled(
    query: Float[Tensor, "B Ho Wo D"],
    key: Float[Tensor, "B h w D"],
    values: Float[Tensor, "B h w E"],
    rows: AxisWindow,
    cols: AxisWindow,
    *,
    num_heads: int,
    q_chunk_size: int | None = None,
) -> Float[Tensor, "B Ho Wo E"]:
    """Compute `window_attention` on tiles of queries, at most `q_chunk_size` queries at a time."""
    tall, wide = plan_tiles(rows, cols, q_chunk_size)
    attend = TileAttention(tall, wide, num_heads, q_chunk_size, query.device)

    def upsample(query: Tensor, key: Tensor, values: Tensor) -> Float[Tensor, "Ho Wo E"]:
        strips = []
        for row, first in enumerate(tall.first.tolist()):
            tiles = list(attend(row, query[first : first + tall.size], key, values))
            strips.append(torch.cat(_without_overlap(tiles, wide, axis=1), 1))
        return torch.cat(_without_overlap(strips, tall, axis=0))

    if torch.is_grad_enabled() or torch.jit.is_tracing() or transformed(query, key, values):
        return torch.stack([upsample(*image) for image in zip(query, key, values)])
    output = values.new_empty(*query.shape[:3], values.shape[3])
    for image in zip(query, key, values, output):
        attend.write(0, len(image[0]), *image)
    return output


class TileAttention:
    """Attention of one row of tiles after the other, for one image.

    Args:
        tall, wide: the tiles along the rows and along the columns.
        num_heads: number of heads.
        q_chunk_size: most query positions worked on at once; None for what suits the device.
        device: where the tensors are.
    """

    def __init__(
        self, tall: AxisTiles, wide: AxisTiles, num_heads: int, q_chunk_size: int | None, device: torch.device
    ):
        self.tall, self.wide, self.num_heads = tall, wide, num_heads
        queries, pairs = tall.size * wide.size, GROUP_PAIRS if device.type == "cpu" else GROUP_PAIRS_PARALLEL
        group = (q_chunk_size or pairs // (tall.span * wide.span)) // queries
        self.group = max(1, min(group, wide.runs))
        self.row_bias, self.col_bias = (torch.from_numpy(tiles.bias()).to(device) for tiles in (tall, wide))
        self.query_cols = torch.from_numpy(wide.first[:, None] + np.arange(wide.size)).to(device)
        self.key_cols = torch.from_numpy(wide.start[:, None] + np.arange(wide.span)).to(device)
        self.unmasked = bool((tall.count == 1).all() and (wide.count == 1).all())
        self.block = max(1, pairs // (tall.span * wide.span))

    def __call__(
        self, row: int, query: Float[Tensor, "T Wo D"], key: Float[Tensor, "h w D"], values: Float[Tensor, "h w E"]
    ) -> Iterator[Float[Tensor, "T U E"]]:
        """Yield the outputs of the tiles of tile row `row`, from left to right; `query` holds that row's queries."""
        start = int(self.tall.start[row])
        key, values = key[start : start + self.tall.span], values[start : start + self.tall.span]
        attend = self._attend_all if self.unmasked and key.shape[1] == self.wide.span else self._attend
        step = 1 if attend == self._attend_all else self.group
        for begin in range(0, self.wide.runs, step):
            tiles = slice(begin, min(begin + step, self.wide.runs))
            differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, values))
            if differentiable and not transformed(query, key, values):
                yield from checkpoint(attend, row, tiles, query, key, values, use_reentrant=False)
            else:
                yield from attend(row, tiles, query, key, values)

    def write(
        self,
        begin: int,
        end: int,
        query: Float[Tensor, "rows Wo D"],
        key: Float[Tensor, "h w D"],
        values: Float[Tensor, "h w E"],
        output: Float[Tensor, "rows Wo E"],
    ) -> None:
        """Compute the tile rows that end after row `begin` and no later than row `end`.

        `query` and `output` hold the same rows, up to `end`; the output may be on another device and of another type.
        """
        top = end - len(query)
        for row, first in enumerate(self.tall.first.tolist()):
            if begin < first + self.tall.size <= end:
                rows = slice(first - top, first - top + self.tall.size)
                for start, tile in zip(self.wide.first.tolist(), self(row, query[rows], key, values)):
                    output[rows, start : start + self.wide.size] = tile

    def needed_from(self, end: int) -> int:
        """Return the first row before `end` that a tile row ending after `end` holds; `end` if there is none."""
        later = self.tall.first[self.tall.first + self.tall.size > end]
        return min([end, *later.tolist()])

    def _attend(self, row: int, tiles: slice, query: Tensor, key: Tensor, values: Tensor) -> Float[Tensor, "G T U E"]:
        heads, head_dim = self.num_heads, query.shape[-1] // self.num_heads
        height, width = self.tall.size, self.wide.size
        first, group = self.wide.first[tiles], tiles.stop - tiles.start
        if first[-1] - first[0] == (group - 1) * width:  # side by side: no copy
            queries = query[:, first[0] : first[-1] + width]
        else:
            queries = query[:, self.query_cols[tiles].flatten()]
        key_cols = self.key_cols[tiles]

        # rows, tiles, columns, heads, channels of a head -> tiles and heads, positions, channels
        queries = queries.unflatten(1, (group, -1)).unflatten(3, (heads, -1)).permute(1, 3, 0, 2, 4)
        queries = queries.flatten(0, 1).flatten(1, 2)
        keys = key[:, key_cols.flatten()].unflatten(1, (group, -1)).unflatten(3, (heads, -1)).permute(1, 3, 4, 0, 2)
        keys = keys.flatten(0, 1).flatten(2, 3)
        seen = values[:, key_cols.flatten()].unflatten(1, (group, -1)).transpose(0, 1).flatten(1, 2)

        bias = self.row_bias[row][:, None, :, None] + self.col_bias[tiles][:, None, :, None]
        scores = (queries @ (keys * head_dim**-0.5)).float().unflatten(0, (group, heads))
        weights = scores.add_(bias.reshape(group, 1, height * width, -1)).softmax(-1).mean(1)
        return (weights.to(values.dtype) @ seen).unflatten(1, (height, width))

    def _attend_all(
        self, row: int, tiles: slice, query: Tensor, key: Tensor, values: Tensor
    ) -> Float[Tensor, "1 T U E"]:
        """Compute `_attend` for one tile whose queries see every key once: nothing is gathered and nothing masked."""
        first, heads = int(self.wide.first[tiles.start]), self.num_heads
        query = query[:, first : first + self.wide.size].flatten(0, 1)
        keys, seen = key.flatten(0, 1).unflatten(1, (heads, -1)).permute(1, 2, 0), values.flatten(0, 1)
        scale, blocks = keys.shape[1] ** -0.5, []
        for block in query.split(self.block):
            weights = ((block * scale).unflatten(1, (heads, -1)).transpose(0, 1) @ keys).float().softmax(-1)
            blocks.append(_mean(weights).to(values.dtype) @ seen)
        return torch.cat(blocks).unflatten(0, (1, self.tall.size, self.wide.size))


def _mean(weights: Float[Tensor, "N T K"]) -> Float[Tensor, "T K"]:
    """Return the mean over the heads; without gradients in the memory of the weights, as it is faster."""
    if torch.is_grad_enabled() or torch.jit.is_tracing() or transformed(weights):
        return weights.mean(0)
    total, *others = weights
    for other in others:
        total += other
    return total.div_(len(weights)) if others else total


def _without_overlap(pieces: list[Tensor], tiles: AxisTiles, axis: int) -> list[Tensor]:
    """Cut from the last piece what the one before it covers already."""
    overlap = 0 if tiles.runs == 1 else int(tiles.first[-2] + tiles.size - tiles.first[-1])
    return [*pieces[:-1], pieces[-1].narrow(axis, overlap, tiles.size - overlap)]
