"""Attention by fused Triton kernels, for CUDA devices: exact like `tiled`, without weights in global memory.

It is checked in Triton's interpreter and compiled for sm_80 and sm_90; it has not been timed, nor run, on a GPU.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from jaxtyping import Float
from torch import Tensor

from anyup_core.geometry import AxisTiles, AxisWindow, plan_tiles
from anyup_torch.attention.recomputed import Recomputed

MAX_QUERIES = 64  # queries a program
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available(device: torch.device) -> bool:
    """Whether `auto` can take this backend: a CUDA device (not ROCm's) and Triton installed."""
    return device.type == "cuda" and torch.version.hip is None and importlib.util.find_spec("triton") is not None


def triton(
    query: Float[Tensor, "B Ho Wo D"],
    key: Float[Tensor, "B h w D"],
    values: Float[Tensor, "B h w E"],
    rows: AxisWindow,
    cols: AxisWindow,
    *,
    num_heads: int,
    q_chunk_size: int | None = None,
) -> Float[Tensor, "B Ho Wo E"]:
    """Compute `window_attention` in Triton, at most min(64, `q_chunk_size`) queries a program.

    Sums are float32 whatever the inputs are. Gradients are those of `tiled`, computed anew in the backward pass.

    Raises:
        ImportError: if Triton is not installed.
        ValueError: for tensors that are not on a CUDA device (unless Triton interprets), or of another dtype than
            float32, bfloat16 and float16, or of different dtypes for queries and keys.
    """
    if importlib.util.find_spec("triton") is None:
        raise ImportError('backend="triton" needs the package triton: pip install triton (Linux only).')
    from anyup_torch.attention.triton_kernels import INTERPRETED

    if query.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f'backend="triton" runs on CUDA devices, the queries are on {query.device}; move model and inputs to '
            'a CUDA device, or use backend="tiled".'
        )
    if query.dtype != key.dtype or query.dtype not in DTYPES or values.dtype not in DTYPES:
        raise ValueError(
            f'backend="triton" takes float32, bfloat16 and float16, the same for queries and keys; got '
            f'{query.dtype}, {key.dtype} and values of {values.dtype}. Convert them, or use backend="tiled".'
        )
    return Recomputed.apply(_forward, query, key, values, rows, cols, num_heads, q_chunk_size)


def _forward(
    query: Tensor, key: Tensor, values: Tensor, rows: AxisWindow, cols: AxisWindow, num_heads: int, chunk: int | None
) -> Tensor:
    from anyup_torch.attention.triton_kernels import WARPS, average, blocks, log_sum_exp

    query, key, values = query.contiguous(), key.contiguous(), values.contiguous()
    batch, height, width, dim = query.shape
    channels = values.shape[-1]
    out = values.new_empty(batch, height, width, channels)
    if out.numel() == 0:
        return out
    tall, wide = plan_tiles(rows, cols, min(MAX_QUERIES, chunk or MAX_QUERIES))
    tables = [x for pair in zip(_tables(tall, query.device), _tables(wide, query.device), strict=True) for x in pair]
    sizes = (tall.size, wide.size, tall.span, wide.span, wide.runs, height, width, *key.shape[1:3])
    head_dim = dim // num_heads
    shape = blocks(tall.size * wide.size, head_dim, channels, torch.promote_types(query.dtype, values.dtype))
    block_e = shape.pop("BLOCK_E")
    shape |= {"HEADS": num_heads, "HEAD_DIM": head_dim}
    sums = query.new_empty(batch, num_heads, height * width, dtype=torch.float32)
    tiles, scale = tall.runs * wide.runs, head_dim**-0.5
    with torch.cuda.device_of(query):
        grid, options = (tiles, num_heads, batch), dict(num_warps=WARPS["log_sum_exp"])
        log_sum_exp[grid](query, key, sums, *tables, *sizes, scale, **shape, **options)
        grid, options = (tiles, -(-channels // block_e), batch), dict(BLOCK_E=block_e, num_warps=WARPS["average"])
        average[grid](query, key, values, sums, out, *tables, *sizes, channels, scale, **shape, **options)
    return out


@functools.lru_cache(maxsize=64)
def _tables(tiles: AxisTiles, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """First queries, first keys and log counts of the tiles of one axis."""
    first, start, bias = (torch.from_numpy(x.copy()).to(device) for x in (tiles.first, tiles.start, tiles.bias()))
    return first, start, bias
