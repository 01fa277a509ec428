"""Attention tile by tile: exact, linear in the number of queries, plain XLA, differentiable.

The windows of a tile of neighbouring queries overlap, so one slice of keys and values serves the whole tile. What a
query does not see of that slice is masked.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from anyup_jax.geometry import AxisTiles, AxisWindow, plan_tiles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileTables:
    """Where the tiles along one axis and their slices of keys begin, and what the queries see: `AxisTiles` as arrays.

    Attributes:
        first: (runs,) first query of each run.
        start: (runs,) first key of each run's slice.
        bias: (runs, size, span) float32, the logarithm of how often a query sees a key; minus infinity for never.
    """

    first: Int[Array, " runs"]
    start: Int[Array, " runs"]
    bias: Float[Array, "runs size span"]

    @classmethod
    def of(cls, tiles: AxisTiles) -> TileTables:
        with np.errstate(divide="ignore"):
            bias = np.log(tiles.count.astype(np.float32))
        return cls(jnp.asarray(tiles.first), jnp.asarray(tiles.start), jnp.asarray(bias))

    def strip(self, index: Int[Array, ""] | int, strips: int) -> TileTables:
        """The runs of one of several equal strips of queries, which no run may cross; `first` counts within it."""
        runs = len(self.first) // strips
        start, bias = (lax.dynamic_slice_in_dim(x, index * runs, runs) for x in (self.start, self.bias))
        return TileTables(self.first[:runs], start, bias)


def tiled(
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
    """Compute `window_attention` one tile of queries after the other; a tile has at most `q_chunk_size` of them."""
    strips = rows.queries // query.shape[1]
    tall, wide = map(TileTables.of, plan_tiles(rows, cols, q_chunk_size, strips))
    return attend_tiles(
        query, key, values, tall.strip(strip, strips) if strips > 1 else tall, wide, num_heads=num_heads
    )


def attend_tiles(
    query: Float[Array, "B Ho Wo D"],
    key: Float[Array, "B h w D"],
    values: Float[Array, "B h w E"],
    rows: TileTables,
    cols: TileTables,
    *,
    num_heads: int,
) -> Float[Array, "B Ho Wo E"]:
    """Compute the attention of the tiles that the tables describe; they may be known only when the program runs."""
    batch, height, width, dim = query.shape
    channels, head_dim = values.shape[-1], dim // num_heads
    (down, *size_rows), (across, *size_cols) = rows.bias.shape, cols.bias.shape
    size, span = zip(size_rows, size_cols)
    highest = "highest" if query.dtype == jnp.float32 else "default"

    @jax.checkpoint
    def attend(query, key, values, b, i, j):
        queries = lax.dynamic_slice(query, (b, rows.first[i], cols.first[j], 0), (1, *size, dim))
        keys = lax.dynamic_slice(key, (b, rows.start[i], cols.start[j], 0), (1, *span, dim))
        seen = lax.dynamic_slice(values, (b, rows.start[i], cols.start[j], 0), (1, *span, channels))
        queries, keys = queries.reshape(-1, num_heads, head_dim), keys.reshape(-1, num_heads, head_dim)
        bias = rows.bias[i][:, None, :, None] + cols.bias[j][None, :, None, :]
        scores = jnp.einsum("qnk,pnk->nqp", queries, keys, precision=highest, preferred_element_type=jnp.float32)
        scores = scores * head_dim**-0.5 + bias.reshape(size[0] * size[1], -1)
        weights = jax.nn.softmax(scores, axis=-1).mean(0).astype(values.dtype)
        return jnp.matmul(weights, seen.reshape(-1, channels), precision=highest).reshape(1, *size, channels)

    def step(t, output):
        b, i, j = t // (down * across), t // across % down, t % across
        tile = attend(query, key, values, b, i, j)
        return lax.dynamic_update_slice(output, tile, (b, rows.first[i], cols.first[j], 0))

    output = jnp.zeros((batch, height, width, channels), values.dtype)
    return lax.fori_loop(0, batch * down * across, step, output)
