"""Attention tile by tile: exact, linear in the number of queries, plain XLA, differentiable.

The windows of a tile of neighbouring queries overlap, so one slice of keys and values serves the whole tile. What a
query does not see of that slice is masked.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from anyup_core.geometry import AxisTiles, AxisWindow, plan_tiles
from anyup_jax.promotion import standard_promotion


class TileTables(NamedTuple):
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
        return cls(*map(jnp.asarray, (tiles.first, tiles.start, tiles.bias())))

    def last_word(self, run: Int[Array, ""]) -> Bool[Array, " size"]:
        """Which queries of a run the next run does not compute again."""
        following = jnp.append(self.first[1:], self.first[-1] + self.bias.shape[1])[run]
        return self.first[run] + jnp.arange(self.bias.shape[1]) < following

    def strip(self, index: Int[Array, ""] | int, strips: int) -> TileTables:
        """The runs of one of several equal strips of queries, which no run may cross; `first` counts within it."""
        if strips == 1:
            return self
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
    return attend_tiles(query, key, values, tile_tables(query, rows, cols, q_chunk_size, strip), num_heads)


def tile_tables(
    query: Float[Array, "B Ho Wo D"],
    rows: AxisWindow,
    cols: AxisWindow,
    q_chunk_size: int | None,
    strip: Int[Array, ""] | int,
) -> tuple[TileTables, TileTables]:
    """Return the tables of both axes, for the rows of queries that are here."""
    strips = rows.queries // query.shape[1]
    tall, wide = map(TileTables.of, plan_tiles(rows, cols, q_chunk_size, strips))
    return tall.strip(strip, strips), wide


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_tiles(
    query: Float[Array, "B Ho Wo D"],
    key: Float[Array, "B h w D"],
    values: Float[Array, "B h w E"],
    tables: tuple[TileTables, TileTables],
    num_heads: int,
) -> Float[Array, "B Ho Wo E"]:
    """Compute the attention of the tiles that the tables describe; they may be known only when the program runs.

    No weights are kept for the gradient: it goes through the tiles once more.
    """

    def step(t, output):
        _, place, _, inputs, biases = tile_of(t, query, key, values, tables)
        return lax.dynamic_update_slice(output, attend_tile(*inputs, *biases, num_heads=num_heads), place)

    output = jnp.zeros((*query.shape[:3], values.shape[-1]), values.dtype)
    return lax.fori_loop(0, tiles_of(query, tables), step, output)


def _forward(query, key, values, tables, num_heads):
    return attend_tiles(query, key, values, tables, num_heads), (query, key, values, tables)


@standard_promotion()
def _backward(num_heads, saved, cotangent):
    query, key, values, tables = saved

    def step(t, gradients):
        (i, j), place, slab, inputs, biases = tile_of(t, query, key, values, tables)
        output, pull = jax.vjp(lambda *x: attend_tile(*x, *biases, num_heads=num_heads), *inputs)
        tile = lax.dynamic_slice(cotangent, place, output.shape)
        # where the last tile covers what the one before it computed, only the last one counts
        kept = tables[0].last_word(i)[:, None, None] & tables[1].last_word(j)[:, None]
        changes = pull(jnp.where(kept, tile, 0))
        return tuple(add_slice(total, change, at) for total, change, at in zip(gradients, changes, (place, slab, slab)))

    wide = jnp.promote_types(key.dtype, jnp.float32)  # keys and values sum over many tiles
    zeros = jnp.zeros_like(query), jnp.zeros(key.shape, wide), jnp.zeros(values.shape, wide)
    to_query, to_key, to_values = lax.fori_loop(0, tiles_of(query, tables), step, zeros)
    return to_query, to_key.astype(key.dtype), to_values.astype(values.dtype), None


attend_tiles.defvjp(_forward, _backward)


def tiles_of(query: Float[Array, "B Ho Wo D"], tables: tuple[TileTables, TileTables]) -> int:
    return query.shape[0] * len(tables[0].first) * len(tables[1].first)


def tile_of(t: Int[Array, ""], query, key, values, tables: tuple[TileTables, TileTables]) -> tuple:
    """Return row and column of tile number t, where it and its slab begin, queries, keys and values, and biases."""
    rows, cols = tables
    down, across = len(rows.first), len(cols.first)
    t = t.astype(jnp.int32)  # with JAX_ENABLE_X64 it is int64, and indices must be of one type
    b, i, j, channel = t // (down * across), t // across % down, t % across, jnp.int32(0)
    place, slab = (b, rows.first[i], cols.first[j], channel), (b, rows.start[i], cols.start[j], channel)
    tile_size, slab_size = zip(rows.bias.shape[1:], cols.bias.shape[1:])
    inputs = [
        lax.dynamic_slice(array, at, (1, *size, array.shape[-1]))
        for array, at, size in ((query, place, tile_size), (key, slab, slab_size), (values, slab, slab_size))
    ]
    return (i, j), place, slab, inputs, (rows.bias[i], cols.bias[j])


def add_slice(total: Float[Array, "B _ _ E"], change: Float[Array, "1 _ _ E"], place: tuple) -> Float[Array, "B _ _ E"]:
    sums = lax.dynamic_slice(total, place, change.shape) + change.astype(total.dtype)
    return lax.dynamic_update_slice(total, sums, place)


def attend_tile(
    query: Float[Array, "1 T U D"],
    key: Float[Array, "1 t u D"],
    values: Float[Array, "1 t u E"],
    row_bias: Float[Array, "T t"],
    col_bias: Float[Array, "U u"],
    num_heads: int,
) -> Float[Array, "1 T U E"]:
    """Attention of one tile of queries to one slab of keys."""
    shape, head_dim = query.shape[:3], query.shape[-1] // num_heads
    highest = "highest" if query.dtype == jnp.float32 else "default"
    query, key = query.reshape(-1, num_heads, head_dim), key.reshape(-1, num_heads, head_dim)
    bias = row_bias[:, None, :, None] + col_bias[None, :, None, :]
    scores = jnp.einsum("qnk,pnk->nqp", query, key, precision=highest, preferred_element_type=jnp.float32)
    scores = scores * head_dim**-0.5 + bias.reshape(len(query), -1)
    weights = jax.nn.softmax(scores, axis=-1).mean(0).astype(values.dtype)
    return jnp.matmul(weights, values.reshape(-1, values.shape[-1]), precision=highest).reshape(*shape, -1)
