"""Attention by the package NATTEN, for `window="natten"` only: what the published variant calls.

NATTEN wants keys and values at the size of the queries, and values for each head. So they are gathered at every query
position, which `tiled` and `triton` do without; this backend is for comparing with them. On a CUDA device it is one
dilated call. Otherwise, and where `q_chunk_size` bounds the work, the phases of the dilation are taken one by one:
each is a small attention of its own without dilation, and so is any block of its rows and columns with their borders.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from anyup_core.geometry import AxisWindow, Neighbourhood
from anyup_torch.attention.recomputed import Recomputed

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
        row_source, col_source = (torch.from_numpy(axis.source).to(query.device) for axis in (tall, wide))
        upsampled = (x[:, row_source][:, :, col_source] for x in (key, values))
        return _attend(query, *upsampled, (tall.kernel, wide.kernel), (tall.dilation, wide.dilation), heads)
    output = values.new_empty(*query.shape[:3], values.shape[-1])
    for across in _blocks(wide, chunk or BLOCK):
        for down in _blocks(tall, max(1, (chunk or BLOCK) // across.count)):
            near = query[:, down.places][:, :, across.places]
            seen = (x[:, down.keys][:, :, across.keys] for x in (key, values))
            result = _attend(near, *seen, (down.kernel, across.kernel), (1, 1), heads)
            output[:, down.queries, across.queries] = result[:, down.inside, across.inside]
    return output


@dataclasses.dataclass(frozen=True)
class _Block:
    """Some queries of one phase of an axis, with all that their windows hold.

    Attributes:
        queries: where they are on the axis; `count` of them.
        places, keys: the positions that their windows span, on the axis and in the keys before upsampling.
        inside: where the queries are among the places.
        kernel: positions a query sees.
    """

    queries: slice
    count: int
    places: Tensor
    keys: Tensor
    inside: slice
    kernel: int


def _blocks(axis: Neighbourhood, limit: int) -> Iterator[_Block]:
    """Cut every phase of an axis into blocks of at most `limit` queries.

    The windows come out as they are in the whole phase: they begin as far from the block's ends as from the phase's,
    or are clamped at the same end. NATTEN takes no axis of a single position: it is doubled, which changes no average.
    """
    source = torch.from_numpy(axis.source)
    for phase in range(axis.dilation):
        places = torch.arange(phase, len(source), axis.dilation)
        first, size = axis.first(len(places)).tolist(), min(axis.kernel, len(places))
        for begin in range(0, len(places), limit):
            end = min(begin + limit, len(places))
            low = first[begin]
            span = places[low : first[end - 1] + size]
            if len(span) == 1:
                span = span.repeat(2)
            queries = slice(int(places[begin]), int(places[end - 1]) + 1, axis.dilation)
            yield _Block(queries, end - begin, span, source[span], slice(begin - low, end - low), max(2, size))


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

    channels, dim, dtype = values.shape[-1], query.shape[-1] // heads, torch.promote_types(query.dtype, values.dtype)
    options = dict(kernel_size=kernel, dilation=dilation, scale=dim**-0.5)
    if query.is_cuda:
        depth, width = 8 * math.ceil(dim / 8), 8 * math.ceil(channels / 8)
    else:  # flex attention: sizes of queries and values are equal, and a power of two
        depth = width = max(8, 1 << (dim - 1).bit_length())
        options["backend"] = "flex-fna"
    query, key = (_pad(x.to(dtype).unflatten(-1, (heads, dim)), depth).contiguous() for x in (query, key))
    parts = []
    for part in values.to(dtype).split(width, -1):
        part = _pad(part, width)[:, :, :, None].expand(-1, -1, -1, heads, -1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without", UserWarning)
            warnings.filterwarnings("ignore", "return_lse is deprecated", FutureWarning)
            parts.append(na2d(query, key, part, **options).mean(3))
    return torch.cat(parts, -1)[..., :channels].to(values.dtype)


def _pad(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1]))
