"""Attention of every query with every key under a mask: the definition, for small sizes and for checking the others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float, Int

from anyup_core.geometry import AxisWindow


def dense(
    query: Float[Array, "B Ho Wo D"],
    key: Float[Array, "B h w D"],
    values: Float[Array, "B h w E"],
    rows: AxisWindow,
    cols: AxisWindow,
    *,
    num_heads: int,
    q_chunk_size: int | None = None,
    strip: Int[Array, ""] | int = 0,
) -> Float[Array, "B Ho Wo E"]:
    """Compute `window_attention` with all Ho Wo x h w scores, in chunks of `q_chunk_size` queries if given."""
    batch, height, width, dim = query.shape
    queries = height * width
    step = min(q_chunk_size or queries, queries)
    heads = rearrange(query, "b i j (n k) -> b (i j) n k", n=num_heads)
    keys = rearrange(key, "b h w (n k) -> b (h w) n k", n=num_heads)
    flat = rearrange(values, "b h w e -> b (h w) e")
    row_count, col_count = jnp.asarray(rows.dense(), jnp.float32), jnp.asarray(cols.dense(), jnp.float32)
    row_count = lax.dynamic_slice_in_dim(row_count, strip * height, height)

    @jax.checkpoint
    def attend(start):
        index = start + jnp.arange(step)
        count = row_count[index // width][:, :, None] * col_count[index % width][:, None]
        chunk = lax.dynamic_slice_in_dim(heads, start, step, 1)
        scores = jnp.einsum("bqnk,bpnk->bnqp", chunk, keys, precision="highest", preferred_element_type=jnp.float32)
        scores = scores * (dim // num_heads) ** -0.5 + jnp.log(count).reshape(step, -1)
        weights = jax.nn.softmax(scores, axis=-1).mean(1).astype(flat.dtype)
        return jnp.einsum("bqp,bpe->bqe", weights, flat, precision="highest")

    if step == queries:
        return attend(0).reshape(batch, height, width, -1)
    starts = jnp.minimum(jnp.arange(0, queries, step), queries - step)  # the last chunk overlaps the one before
    chunks = lax.map(attend, starts)
    tail = queries - step * (len(starts) - 1)
    whole = chunks[:-1].swapaxes(0, 1).reshape(batch, queries - tail, -1)
    return jnp.concatenate([whole, chunks[-1][:, step - tail :]], 1).reshape(batch, height, width, -1)
