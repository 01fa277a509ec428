"""Attention tile by tile: exact, linear in the number of queries, plain XLA, differentiable.

The windows of a tile of neighbouring queries overlap, so one slice of keys and values serves the whole tile. What a
query does not see of that slice is masked.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from anyup_jax.geometry import AxisWindow, plan_tiles


def tiled(
    query: Float[Array, "B Ho Wo D"],
    key: Float[Array, "B h w D"],
    values: Float[Array, "B h w E"],
    rows: AxisWindow,
    cols: AxisWindow,
    *,
    num_heads: int,
    q_chunk_size: int | None = None,
) -> Float[Array, "B Ho Wo E"]:
    """Compute `window_attention` one tile of queries after the other; a tile has at most `q_chunk_size` of them."""
    batch, height, width, dim = query.shape
    channels, head_dim = values.shape[-1], dim // num_heads
    tall, wide = plan_tiles(rows, cols, q_chunk_size)
    size, span = (tall.size, wide.size), (tall.span, wide.span)
    highest = "highest" if query.dtype == jnp.float32 else "default"
    with np.errstate(divide="ignore"):
        row_bias, col_bias = (jnp.asarray(np.log(tiles.count), jnp.float32) for tiles in (tall, wide))
    first_row, first_col, start_row, start_col = map(jnp.asarray, (tall.first, wide.first, tall.start, wide.start))

    @jax.checkpoint
    def attend(query, key, values, b, i, j):
        queries = lax.dynamic_slice(query, (b, first_row[i], first_col[j], 0), (1, *size, dim))
        keys = lax.dynamic_slice(key, (b, start_row[i], start_col[j], 0), (1, *span, dim))
        seen = lax.dynamic_slice(values, (b, start_row[i], start_col[j], 0), (1, *span, channels))
        queries, keys = queries.reshape(-1, num_heads, head_dim), keys.reshape(-1, num_heads, head_dim)
        bias = row_bias[i][:, None, :, None] + col_bias[j][None, :, None, :]
        scores = jnp.einsum("qnk,pnk->nqp", queries, keys, precision=highest, preferred_element_type=jnp.float32)
        scores = scores * head_dim**-0.5 + bias.reshape(size[0] * size[1], -1)
        weights = jax.nn.softmax(scores, axis=-1).mean(0).astype(values.dtype)
        return jnp.matmul(weights, seen.reshape(-1, channels), precision=highest).reshape(1, *size, channels)

    def step(t, output):
        b, i, j = t // (tall.runs * wide.runs), t // wide.runs % tall.runs, t % wide.runs
        tile = attend(query, key, values, b, i, j)
        return lax.dynamic_update_slice(output, tile, (b, first_row[i], first_col[j], 0))

    output = jnp.zeros((batch, height, width, channels), values.dtype)
    return lax.fori_loop(0, batch * tall.runs * wide.runs, step, output)
