"""Attention in programs that `torch.export` writes: many tiles in one operation, and no loop over the batch.

A traced loop is unrolled, so that the tiles of the backend `tiled` would become thousands of operations, and it fixes
the number of images.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from anyup_core.geometry import AxisTiles, AxisWindow, plan_tiles
from anyup_torch.attention.dense import dense

PAIRS = 1 << 23  # query-key pairs of an image scored at once


def exported(
    query: Float[Tensor, "B Ho Wo D"],
    key: Float[Tensor, "B h w D"],
    values: Float[Tensor, "B h w E"],
    rows: AxisWindow,
    cols: AxisWindow,
    *,
    num_heads: int,
    q_chunk_size: int | None = None,
) -> Float[Tensor, "B Ho Wo E"]:
    """Compute `window_attention` on tiles of at most `q_chunk_size` queries, some rows of tiles at a time.

    Scores of about `PAIRS` pairs are held for every image and head, and the keys and values that these tiles see.
    """
    tall, wide = plan_tiles(rows, cols, q_chunk_size)
    if (tall.span, wide.span) == (rows.keys, cols.keys):
        chunk = min(q_chunk_size or PAIRS, max(1, PAIRS // (tall.span * wide.span)))
        return dense(query, key, values, rows, cols, num_heads=num_heads, q_chunk_size=chunk)
    step = max(1, PAIRS // (tall.size * tall.span * wide.size * wide.span * wide.runs))
    groups = [slice(begin, min(begin + step, tall.runs)) for begin in range(0, tall.runs, step)]
    strips = [_attend(query, key, values, tall, wide, group, num_heads) for group in groups]
    return _take(torch.cat(strips, 1), _last_word(tall), _last_word(wide))


def _attend(
    query: Tensor, key: Tensor, values: Tensor, tall: AxisTiles, wide: AxisTiles, group: slice, heads: int
) -> Float[Tensor, "B _ _ E"]:
    """Return the outputs of some rows of tiles side by side, those of queries that two tiles hold twice."""
    down, across = tall.first[group, None] + np.arange(tall.size), wide.first[:, None] + np.arange(wide.size)
    below, beside = tall.start[group, None] + np.arange(tall.span), wide.start[:, None] + np.arange(wide.span)
    queries, keys = _tiles(query, down, across), _tiles(key, below, beside)
    queries, keys = (x.unflatten(-1, (heads, -1)) for x in (queries, keys))
    # images, rows of tiles, tiles, heads, positions, channels of a head
    queries = queries.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)
    keys = keys.permute(0, 1, 3, 5, 6, 2, 4).flatten(5, 6)
    seen = _tiles(values, below, beside).permute(0, 1, 3, 2, 4, 5).flatten(3, 4)
    row_bias, col_bias = (torch.from_numpy(bias).to(query.device) for bias in (tall.bias()[group], wide.bias()))
    bias = row_bias[:, None, :, None, :, None] + col_bias[:, None, :, None]
    scores = (queries @ (keys * queries.shape[-1] ** -0.5)).float() + bias.flatten(4, 5).flatten(2, 3)[:, :, None]
    outputs = scores.softmax(-1).mean(3).to(seen.dtype) @ seen
    return outputs.unflatten(3, (tall.size, wide.size)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _tiles(
    x: Float[Tensor, "B _ _ C"], rows: Int[np.ndarray, "R T"], cols: Int[np.ndarray, "W U"]
) -> Float[Tensor, "B R T W U C"]:
    """Return the positions of tiles, given their rows and their columns."""
    return _take(x, rows.ravel(), cols.ravel()).unflatten(2, cols.shape).unflatten(1, rows.shape)


def _take(
    x: Float[Tensor, "B _ _ C"], rows: Int[np.ndarray, " Y"], cols: Int[np.ndarray, " X"]
) -> Float[Tensor, "B Y X C"]:
    for axis, index in ((1, rows), (2, cols)):
        if (np.diff(index) == 1).all():
            x = x.narrow(axis, int(index[0]), len(index))
        else:
            x = x.index_select(axis, torch.from_numpy(index.astype(np.int64)).to(x.device))
    return x


def _last_word(tiles: AxisTiles) -> Int[np.ndarray, " queries"]:
    """Return where each query is among the runs side by side; the last run begins within the one before it."""
    places, end = np.arange(tiles.runs * tiles.size), tiles.first[-1] + tiles.size
    return np.delete(places, slice((tiles.runs - 1) * tiles.size, (tiles.runs - 1) * tiles.size + len(places) - end))
