"""The two Triton kernels behind the backend `triton`, and the block sizes they run with.

A program works on one tile of queries. The keys that the tile sees form a slab, which is read in blocks of BLOCK_N:
the weights of all of a slab's keys do not fit in shared memory. So there are two passes. `log_sum_exp` goes over the
keys with a running maximum and sum and writes one number per query and head; `average` goes over them again, adds up
exp(score - log-sum-exp) over the heads and multiplies with a block of value channels. The scores are computed again for
every block of channels, the log-sum-exp is not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# products of bfloat16 are exact in float32, where the interpreter, which has no bfloat16, takes them
UPCAST = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b):
    """Matrix product summed in float32, exact for float32."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _tile(first_row, first_col, wide_runs, tall_size, wide_size, width, BLOCK_M: tl.constexpr):
    """Tile numbers, places inside the tile, flat query positions, which are in the tile and which no other writes."""
    tile_row = tl.program_id(0) // wide_runs
    tile_col = tl.program_id(0) % wide_runs
    place = tl.arange(0, BLOCK_M)
    inside = place < tall_size * wide_size
    place = tl.where(inside, place, 0)
    row = tl.load(first_row + tile_row) + place // wide_size
    col = tl.load(first_col + tile_col) + place % wide_size
    own = inside & (row >= tile_row * tall_size) & (col >= tile_col * wide_size)
    return tile_row, tile_col, place // wide_size, place % wide_size, row.to(tl.int64) * width + col, inside, own


@triton.jit
def _block(begin, tile_row, tile_col, in_row, in_col, start_row, start_col, row_bias, col_bias,
           tall_size, wide_size, tall_span, wide_span, key_width, BLOCK_N: tl.constexpr):  # fmt: skip
    """Flat key positions of a block of the slab, which of them exist, and the log counts (BLOCK_M, BLOCK_N)."""
    slot = begin + tl.arange(0, BLOCK_N)
    exists = slot < tall_span * wide_span
    slot = tl.where(exists, slot, 0)
    row, col = slot // wide_span, slot % wide_span
    keys = (tl.load(start_row + tile_row) + row).to(tl.int64) * key_width + tl.load(start_col + tile_col) + col
    rows = row_bias + (tile_row * tall_size + in_row).to(tl.int64)[:, None] * tall_span + row[None, :]
    cols = col_bias + (tile_col * wide_size + in_col).to(tl.int64)[:, None] * wide_span + col[None, :]
    bias = tl.where(exists[None, :], tl.load(rows) + tl.load(cols), float("-inf"))
    return keys, exists, bias


@triton.jit
def _scores(query, key, positions, inside, keys, exists, bias, head, scale,
            HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Logits of one head, (BLOCK_M, BLOCK_N) float32."""
    channel = tl.arange(0, BLOCK_K)
    real = channel < HEAD_DIM
    dim: tl.constexpr = HEADS * HEAD_DIM
    at = positions[:, None] * dim + head * HEAD_DIM + channel[None, :]
    q = tl.load(query + at, mask=inside[:, None] & real[None, :], other=0.0)
    at = keys[None, :] * dim + head * HEAD_DIM + channel[:, None]
    k = tl.load(key + at, mask=exists[None, :] & real[:, None], other=0.0)
    return _dot(q, k) * scale + bias


@triton.jit
def log_sum_exp(query, key, sums, first_row, first_col, start_row, start_col, row_bias, col_bias,
                tall_size, wide_size, tall_span, wide_span, wide_runs, height, width, key_height, key_width, scale,
                HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Write the log-sum-exp of every query and head, (B, HEADS, Ho Wo) float32. Grid: tiles, heads, images."""
    tile_row, tile_col, in_row, in_col, positions, inside, own = _tile(
        first_row, first_col, wide_runs, tall_size, wide_size, width, BLOCK_M
    )
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query += image * height * width * HEADS * HEAD_DIM
    key += image * key_height * key_width * HEADS * HEAD_DIM
    top = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite: a block may hold no key that a query sees
    total = tl.zeros((BLOCK_M,), tl.float32)
    for begin in range(0, tall_span * wide_span, BLOCK_N):
        keys, exists, bias = _block(begin, tile_row, tile_col, in_row, in_col, start_row, start_col, row_bias, col_bias,
                                    tall_size, wide_size, tall_span, wide_span, key_width, BLOCK_N)  # fmt: skip
        scores = _scores(query, key, positions, inside, keys, exists, bias, head, scale, HEADS, HEAD_DIM, BLOCK_K)
        higher = tl.maximum(top, tl.max(scores, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(scores - higher[:, None]), 1)
        top = higher
    at = (image * HEADS + head) * height * width + positions
    tl.store(sums + at, top + tl.log(total), mask=own)


@triton.jit
def average(query, key, values, sums, out, first_row, first_col, start_row, start_col, row_bias, col_bias,
            tall_size, wide_size, tall_span, wide_span, wide_runs, height, width, key_height, key_width, channels,
            scale, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    """Write the averaged values, (B, Ho Wo, E). Grid: tiles, blocks of channels, images."""
    tile_row, tile_col, in_row, in_col, positions, inside, own = _tile(
        first_row, first_col, wide_runs, tall_size, wide_size, width, BLOCK_M
    )
    image = tl.program_id(2).to(tl.int64)
    query += image * height * width * HEADS * HEAD_DIM
    key += image * key_height * key_width * HEADS * HEAD_DIM
    values += image * key_height * key_width * channels
    out += image * height * width * channels
    channel = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    real = channel < channels
    result = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for begin in range(0, tall_span * wide_span, BLOCK_N):
        keys, exists, bias = _block(begin, tile_row, tile_col, in_row, in_col, start_row, start_col, row_bias, col_bias,
                                    tall_size, wide_size, tall_span, wide_span, key_width, BLOCK_N)  # fmt: skip
        weights = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for head in range(HEADS):
            scores = _scores(query, key, positions, inside, keys, exists, bias, head, scale, HEADS, HEAD_DIM, BLOCK_K)
            lse = tl.load(sums + (image * HEADS + head) * height * width + positions)
            weights += tl.exp(scores - lse[:, None])
        at = keys[:, None] * channels + channel[None, :]
        v = tl.load(values + at, mask=exists[:, None] & real[None, :], other=0.0)
        result += _dot((weights / HEADS).to(v.dtype), v)
    at = positions[:, None] * channels + channel[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=own[:, None] & real[None, :])


INTERPRETED = not isinstance(average, triton.JITFunction)  # decided by TRITON_INTERPRET when this module is imported
WARPS = {"log_sum_exp": 4, "average": 8}  # `average` spills with 4


def blocks(queries: int, head_dim: int, channels: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes for tiles of `queries` queries: powers of two of at least 16, as `tl.dot` needs."""
    widest = 64 if dtype == torch.float32 else 128
    return {
        "BLOCK_K": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_M": max(16, triton.next_power_of_2(queries)),
        "BLOCK_N": 32 if dtype == torch.float32 else 64,
        "BLOCK_E": min(widest, max(16, triton.next_power_of_2(channels))),
    }
