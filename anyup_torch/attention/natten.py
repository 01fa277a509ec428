"""Attention by the package NATTEN, for `window="natten"` only: what the published variant calls.

NATTEN wants keys and values at the size of the queries, and values for each head. So they are gathered at every query
position, which `tiled` and `triton` do without; this backend is for comparing with them. On a CUDA device it is one
dilated call. Otherwise, and where `q_chunk_size` bounds the work, the phases of the dilation are taken one by one:
each is a small attention of its own without dilation, and so is any block of its rows and columns with their borders.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from anyup_torch.attention.recomputed import Recomputed
from anyup_torch.geometry import AxisWindow, Neighbourhood

BLOCK = 4096  # queries of a phase worked on at once where nobody says how many


def installed() -> bool:
    """Whether the package NATTEN is there."""
    return importlib.util.find_spec("natten") is not None


def natten(
    query: Float[Tensor, "B Ho Wo D"],
    key: Float[Tensor, "B h w D"],
    values: Float[Tensor, "B h w E"],
    rows: AxisWindow,
    cols: AxisWindow,
    *,
    num_heads: int,
    q_chunk_size: int | None = None,
) -> Float[Tensor, "B Ho Wo E"]:
    """Compute `window_attention` with `natten.na2d`, blocks of at most `q_chunk_size` queries and their borders.

    Gradients are those of `tiled`, computed anew in the backward pass.

    Raises:
        ImportError: if NATTEN is not installed.
        ValueError: if the windows are not those of `window="natten"` over a whole output.
    """
    require()
    if rows.neighbourhood is None or cols.neighbourhood is None:
        raise ValueError(
            'backend="natten" computes window="natten" over a whole output only; use window="natten", or '
            'backend="tiled", which computes every window.'
        )
    return Recomputed.apply(_forward, query, key, values, rows, cols, num_heads, q_chunk_size)


def require() -> None:
    """Raise ImportError with the way out if NATTEN is not installed."""
    if not installed():
        raise ImportError(
            'backend="natten" needs the package natten: pip install --no-build-isolation natten, after PyTorch; or use '
            'backend="auto", which computes the same windows without it.'
        )


def _forward(
    query: Tensor, key: Tensor, values: Tensor, rows: AxisWindow, cols: AxisWindow, heads: int, chunk: int | None
) -> Float[Tensor, "B Ho Wo E"]:
    tall, wide = rows.neighbourhood, cols.neighbourhood
    fits = all(axis.kernel > 1 and axis.kernel * axis.dilation <= len(axis.source) for axis in (tall, wide))
    if query.is_cuda and chunk is None and fits:
        upsampled = (x[:, _index(tall, x)][:, :, _index(wide, x)] for x in (key, values))
        return _attend(query, *upsampled, (tall.kernel, wide.kernel), (tall.dilation, wide.dilation), heads)
    output = values.new_empty(*query.shape[:3], values.shape[-1])
    limit = chunk or BLOCK
    for cols_block in _blocks(wide, limit):
        for rows_block in _blocks(tall, max(1, limit // len(range(*cols_block[0].indices(len(wide.source)))))):
            (above, seen_rows, top, high), (across, seen_cols, left, broad) = rows_block, cols_block
            halo = [x[:, index] for x, index in ((query, seen_rows[0]), (key, seen_rows[1]), (values, seen_rows[1]))]
            halo = [x[:, :, index] for x, index in zip(halo, (seen_cols[0], seen_cols[1], seen_cols[1]))]
            result = _attend(*halo, (high, broad), (1, 1), heads)
            size = output[:, above, across].shape
            output[:, above, across] = result[:, top : top + size[1], left : left + size[2]]
    return output


def _index(axis: Neighbourhood, like: Tensor) -> Tensor:
    return torch.from_numpy(axis.source).to(like.device)


def _blocks(axis: Neighbourhood, limit: int) -> Iterator[tuple[slice, tuple[Tensor, Tensor], int, int]]:
    """Cut every phase of an axis into blocks of at most `limit` queries.

    Yields the queries as a slice of the axis; for the block with all that its windows hold, the places in the queries
    and in the keys; where the block begins in there; and the kernel. The windows come out as they are in the whole
    phase: they begin as far from the block's ends as from the phase's, or are clamped at the same end. NATTEN takes no
    axis of a single position: it is doubled, which changes no average.
    """
    queries = len(axis.source)
    for phase in range(axis.dilation):
        places = torch.arange(phase, queries, axis.dilation)
        first, size = axis.first(len(places)), min(axis.kernel, len(places))
        for begin in range(0, len(places), limit):
            end = min(begin + limit, len(places))
            low = int(first[begin])
            seen = places[low : int(first[end - 1]) + size]
            if len(seen) == 1:
                seen = seen.repeat(2)
            block = slice(int(places[begin]), int(places[end - 1]) + 1, axis.dilation)
            yield block, (seen, torch.from_numpy(axis.source)[seen]), begin - low, max(2, size)


def _attend(
    query: Float[Tensor, "B X Y D"],
    key: Float[Tensor, "B X Y D"],
    values: Float[Tensor, "B X Y E"],
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    heads: int,
) -> Float[Tensor, "B X Y E"]:
    """Call NATTEN with the same values for every head, and average the heads' outputs."""
    from natten import na2d

    channels, dim = values.shape[-1], query.shape[-1] // heads
    query, key = (x.unflatten(-1, (heads, dim)) for x in (query, key))
    scale = dim**-0.5
    attend = functools.partial(na2d, kernel_size=kernel, dilation=dilation, scale=scale)
    if query.is_cuda:
        query, key = (_pad(x, 8 * math.ceil(dim / 8)) for x in (query, key))
        width = 8 * math.ceil(channels / 8)
    else:  # flex attention: sizes of queries and values are equal, and a power of two
        width = max(8, 1 << (dim - 1).bit_length())
        query, key = (_pad(x, width) for x in (query, key))
        attend = functools.partial(attend, backend="flex-fna")
    parts = []
    for part in values.split(width, -1):
        part = _pad(part, width)[:, :, :, None].expand(-1, -1, -1, heads, -1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without", UserWarning)
            warnings.filterwarnings("ignore", "return_lse is deprecated", FutureWarning)
            parts.append(attend(query.contiguous(), key.contiguous(), part).mean(3))
    return torch.cat(parts, -1)[..., :channels]


def _pad(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1]))
