"""Attention on a TPU: one Pallas kernel forward, two backward, fused over a tile of queries in VMEM.

The windows of a tile of neighbouring queries lie in one slab of keys and values, which the pipeline fetches by its
first row and column. Per query row of the tile the scores of all heads are one matrix product: the heads are stacked
along the rows, each with the other heads' channels set to zero, because a contraction shorter than 128 lanes costs as
much as one over 128. What a query does not see of the slab has a bias of minus infinity. The weights are averaged over
the heads before they meet the values, one block of channels after the other.

With p_n the weights of head n of N, w = mean(p_n), out = w V and g the gradient of out, the backward kernels recompute
p_n and use dw = g V^T, ds_n = p_n (dw - sum(p_n dw)) / N, dq_n = ds_n k_n, dk_n = ds_n^T q_n and dV = w^T g. The
gradients of keys and values are summed in device memory: the steps of a TPU grid run one after the other, so each reads
the slab of sums of its tile, adds and writes it back. In a `shard_map` it needs `check_vma=False`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from anyup_core.geometry import AxisTiles, AxisWindow, tile_axis
from anyup_jax.attention.tiled import TileTables
from anyup_jax.promotion import standard_promotion

LANES, SUBLANES = 128, 8  # a TPU register; slabs start at multiples of SUBLANES columns
VMEM_LIMIT = 60 << 20  # bytes the compiler may use
VMEM_BUDGET = 36 << 20  # bytes a tile may take by `_tile_bytes`, which leaves out what the compiler adds
MAX_TILE = 2048  # queries a tile
STEP_COST = 50_000_000  # multiplications that take as long as starting a tile
HEAD_COST = 512  # multiplications that take as long as scoring a query-key pair in one head


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KernelTables:
    """The tiles of both axes and their slabs of keys, as arrays, so that they may differ from device to device.

    Attributes:
        rows, cols: where the slabs begin, and what the queries of a tile see of them. Queries past the end of an axis
            repeat the last one. Columns start at multiples of 8, and their size and span are such multiples too.
        width: key columns after padding, such that every slab lies inside.
        channels: channels of the values worked on at once, a multiple of 128.
    """

    rows: TileTables
    cols: TileTables
    width: int = dataclasses.field(metadata=dict(static=True))
    channels: int = dataclasses.field(metadata=dict(static=True))


def pallas_tpu(
    query: Float[Array, "B Ho Wo D"],
    key: Float[Array, "B h w D"],
    values: Float[Array, "B h w E"],
    rows: AxisWindow,
    cols: AxisWindow,
    *,
    num_heads: int,
    q_chunk_size: int | None = None,
    strip: Int[Array, ""] | int = 0,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B Ho Wo E"]:
    """Compute `window_attention` with Pallas kernels for TPU; differentiable in queries, keys and values.

    A tile has at most `q_chunk_size` queries, but never fewer than a register has rows (8, or 16 in bfloat16).
    `interpret` runs the kernels on any platform, slowly, for tests.

    Raises:
        ValueError: if the keys that the queries of the smallest tile see do not fit in VMEM.
    """
    tables = kernel_tables(query, key, values, rows, cols, num_heads, q_chunk_size, strip)
    if tables is None:
        raise ValueError(
            f"The TPU kernel keeps all keys that a tile of queries sees in VMEM; {rows.keys} x {cols.keys} keys with "
            f"windows of {rows.span} x {cols.span} need more than its {VMEM_BUDGET >> 20} MiB: use "
            'backend="tiled", a smaller window_ratio or bfloat16.'
        )
    return attend(query, key, values, tables, num_heads, interpret)


def kernel_tables(
    query: Float[Array | jax.ShapeDtypeStruct, "B Ho Wo D"],
    key: Float[Array | jax.ShapeDtypeStruct, "B h w D"],
    values: Float[Array | jax.ShapeDtypeStruct, "B h w E"],
    rows: AxisWindow,
    cols: AxisWindow,
    num_heads: int,
    q_chunk_size: int | None = None,
    strip: Int[Array, ""] | int = 0,
) -> KernelTables | None:
    """Choose a tile and a block of channels, and return the tables of all tiles of the rows of queries that are here.

    Of the arrays only shapes and types are read. The result is None if the keys of no tile fit in the VMEM of a core.
    """
    strips = rows.queries // query.shape[1]
    itemsize = max(x.dtype.itemsize for x in (query, key, values))
    plan = _plan(rows, cols, query.shape[-1], values.shape[-1], num_heads, itemsize, q_chunk_size, strips)
    if plan is None:
        return None
    tall, wide, block, width = plan
    return KernelTables(TileTables.of(tall).strip(strip, strips), TileTables.of(wide), width, block)


@functools.lru_cache(maxsize=256)
def _plan(rows, cols, dim, channels, num_heads, itemsize, queries, strips):
    """Return the tiles of both axes, the block of channels and the padded width; None if no tile fits."""
    unit = 32 // itemsize
    limit = max(unit, MAX_TILE if queries is None else queries)
    height = rows.queries // strips
    best = None
    for across in sorted({unit * n for n in (1, 2, 4, 6, 7, 8, 10, 12, 14, 16, 32)}):
        if across > limit or (across > unit and across >= cols.queries + unit):
            continue
        wide = _align(_cut(cols, across, 1))
        for down in sorted({1, 2, 4, 7, 8, 14, 16, 32}):
            if down * across > limit or (down > 1 and down > height):
                continue
            tall = _cut(rows, down, strips)
            block = LANES * math.ceil(channels / LANES)
            keys = tall.span * wide.span
            size = functools.partial(_tile_bytes, down, across, keys, dim, num_heads, itemsize)
            while size(block) > VMEM_BUDGET and block > LANES:
                block = LANES * math.ceil(block / LANES / 2)
            if size(block) > VMEM_BUDGET:
                continue
            padded = LANES * math.ceil(keys / LANES)
            work = down * across * padded * (num_heads * HEAD_COST + channels)
            cost = tall.runs * wide.runs * (work + STEP_COST * math.ceil(channels / block))
            if best is None or cost < best[0]:
                width = max(SUBLANES * math.ceil(cols.keys / SUBLANES), int(wide.start.max()) + wide.span)
                best = cost, (tall, wide, block, width)
    return None if best is None else best[1]


def _tile_bytes(down: int, across: int, keys: int, dim: int, heads: int, itemsize: int, block: int) -> int:
    """VMEM that the larger kernel takes: blocks twice, for the pipeline, and what lies between the products."""
    dim, keys = (LANES * math.ceil(x / LANES) for x in (dim, keys))
    queries = down * across
    blocks = queries * (dim + block) * itemsize + queries * dim * 4 + keys * (dim + block) * itemsize
    blocks += (max(down, SUBLANES) + across) * keys * 4
    sums = 2 * keys * max(dim, block) * 4
    scores = queries * keys * 4 + 3 * heads * across * keys * 4
    return 2 * blocks + sums + scores


def _cut(window: AxisWindow, size: int, strips: int) -> AxisTiles:
    """Cut each of the strips into runs of `size`; the last run of a strip repeats the strip's last query."""
    length = window.queries // strips
    index = np.minimum(np.arange(size * math.ceil(length / size)), length - 1)
    index = (np.arange(strips)[:, None] * length + index).ravel()
    return tile_axis(AxisWindow(window.keys, window.start[index], window.count[index]), size)


def _align(tiles: AxisTiles) -> AxisTiles:
    """Let slabs start and end at multiples of the sublanes; added keys are never seen."""
    start = tiles.start // SUBLANES * SUBLANES
    shift = tiles.start - start
    span = SUBLANES * math.ceil(int(shift.max() + tiles.span) / SUBLANES)
    count = np.zeros((tiles.runs, tiles.size, span), np.int32)
    np.put_along_axis(count, (shift[:, None] + np.arange(tiles.span))[:, None], tiles.count, 2)
    return AxisTiles(tiles.first, start.astype(np.int32), count)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Static sizes of one call: queries, keys, a tile, its slab, channels and blocks of them.

    The block specifications say which part of its operands a step of the grid (batch, tile row, tile column, block of
    channels) works on.
    """

    batch: int
    queries: tuple[int, int]
    tile: tuple[int, int]
    slab: tuple[int, int]
    grid: tuple[int, int]
    dim: int
    channels: int
    block: int
    heads: int
    interpret: bool | pltpu.InterpretParams

    @property
    def keys(self) -> int:
        return self.slab[0] * self.slab[1]

    @property
    def blocks(self) -> int:
        return math.ceil(self.channels / self.block)

    def query_spec(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, *self.tile, self.dim), lambda b, i, j, c, rows, cols: (b, i, j, 0))

    def output_spec(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, *self.tile, self.block), lambda b, i, j, c, rows, cols: (b, i, j, c))

    def key_spec(self) -> pl.BlockSpec:
        shape = tuple(map(pl.Element, (1, *self.slab, self.dim)))
        return pl.BlockSpec(shape, lambda b, i, j, c, rows, cols: (b, rows[i], pl.multiple_of(cols[j], SUBLANES), 0))

    def values_spec(self) -> pl.BlockSpec:
        def place(b, i, j, c, rows, cols):
            return b, rows[i], pl.multiple_of(cols[j], SUBLANES), pl.multiple_of(c * self.block, LANES)

        return pl.BlockSpec(tuple(map(pl.Element, (1, *self.slab, self.block))), place)


def attend(
    query: Float[Array, "B Ho Wo D"],
    key: Float[Array, "B h w D"],
    values: Float[Array, "B h w E"],
    tables: KernelTables,
    num_heads: int,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B Ho Wo E"]:
    """Compute the attention of the tiles that the tables describe; they may be known only when the program runs."""
    dtype = jnp.promote_types(query.dtype, key.dtype)
    batch, height, width, dim = query.shape
    rows, cols, channels = tables.rows, tables.cols, values.shape[-1]
    grid, tile, slab = zip(rows.bias.shape, cols.bias.shape)
    sizes = _Sizes(batch, (height, width), tile, slab, grid, dim, channels, tables.channels, num_heads, interpret)
    columns = (0, tables.width - key.shape[2])
    key = jnp.pad(key, ((0, 0), (0, 0), columns, (0, 0)))
    values = jnp.pad(values, ((0, 0), (0, 0), columns, (0, sizes.blocks * sizes.block - channels)))
    biases = jnp.repeat(rows.bias, slab[1], axis=2), jnp.tile(cols.bias, (1, 1, slab[0]))
    return _attend(query.astype(dtype), key.astype(dtype), values, (rows.start, cols.start, *biases), sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, key, values, places, sizes):
    (output,) = _call(
        _forward_kernel,
        sizes,
        places,
        [(query, sizes.query_spec()), (key, sizes.key_spec()), (values, sizes.values_spec())],
        [((sizes.batch, *sizes.queries, sizes.channels), values.dtype, sizes.output_spec())],
        [pltpu.VMEM((math.prod(sizes.tile), sizes.keys), values.dtype)],
    )
    return output


def _attend_forward(query, key, values, places, sizes):
    return _attend(query, key, values, places, sizes), (query, key, values, places)


@standard_promotion()
def _attend_backward(sizes, saved, gradient):
    # one after the other under `vmap`: a batched operand in device memory has no lowering for TPU
    gradients = jax.custom_batching.sequential_vmap(functools.partial(_gradients, sizes))(*saved, gradient)
    return *gradients, None


def _gradients(sizes, query, key, values, places, gradient):
    tile, (high, wide) = math.prod(sizes.tile), sizes.slab
    lanes = LANES * math.ceil(sizes.dim / LANES)
    scored = [(query, sizes.query_spec()), (key, sizes.key_spec())]
    d_output = (gradient, sizes.output_spec())
    d_query, d_key = _call(
        _query_key_kernel,
        sizes,
        places,
        [*scored, (values, sizes.values_spec()), d_output],
        [(query.shape, query.dtype, sizes.query_spec()), ((*key.shape[:3], lanes), jnp.float32, None)],
        [
            pltpu.VMEM((tile, sizes.keys), jnp.float32),
            pltpu.VMEM((sizes.keys, lanes), jnp.float32),
            pltpu.VMEM((high, wide, lanes), jnp.float32),
        ],
    )
    (d_values,) = _call(
        _values_kernel,
        sizes,
        places,
        [*scored, d_output],
        [(values.shape, jnp.float32, None)],
        [
            pltpu.VMEM((tile, sizes.keys), values.dtype),
            pltpu.VMEM((high, wide, sizes.block), jnp.float32),
        ],
    )
    return d_query, d_key[..., : sizes.dim].astype(key.dtype), d_values.astype(values.dtype)


_attend.defvjp(_attend_forward, _attend_backward)


def _call(kernel, sizes, places, operands, results, scratch):
    """Run a kernel over all tiles; results without a block lie in device memory, begin at zero and are summed there."""
    row_spec = pl.BlockSpec((None, sizes.tile[0], sizes.keys), lambda b, i, j, c, rows, cols: (i, 0, 0))
    col_spec = pl.BlockSpec((None, sizes.tile[1], sizes.keys), lambda b, i, j, c, rows, cols: (j, 0, 0))
    *starts, row_bias, col_bias = places
    operands = [*operands, (row_bias, row_spec), (col_bias, col_spec)]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    aliases = {}
    for index, (shape, dtype, spec) in enumerate(results):
        if spec is None:
            aliases[len(starts) + len(operands)] = index
            operands.append((jnp.zeros(shape, dtype), anywhere))
    return pl.pallas_call(
        functools.partial(kernel, sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(sizes.batch, *sizes.grid, sizes.blocks),
            in_specs=[spec for _, spec in operands],
            out_specs=[anywhere if spec is None else spec for _, _, spec in results],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in results],
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 4, vmem_limit_bytes=VMEM_LIMIT),
        interpret=sizes.interpret,
    )(*starts, *(array for array, _ in operands))


def _dot(a, b, contract: tuple[int, int]):
    """Matrix product in float32 over one axis of each: exact passes for float32, one pass for bfloat16."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def _place() -> tuple[Int[Array, ""], ...]:
    """Batch, tile row, tile column and block of channels; read before any loop, where the interpreter has no grid."""
    return tuple(pl.program_id(axis) for axis in range(4))


def _inside(sizes: _Sizes, place, x, row):
    """Set to zero what row `row` of the tile reads past the ends of the axes of queries."""
    if sizes.queries[0] % sizes.tile[0] == 0 and sizes.queries[1] % sizes.tile[1] == 0:
        return x
    column = place[2] * sizes.tile[1] + lax.broadcasted_iota(jnp.int32, x.shape, 0)
    inside = (column < sizes.queries[1]) & (place[1] * sizes.tile[0] + row < sizes.queries[0])
    return jnp.where(inside, x, jnp.zeros_like(x))


def _gradient(sizes: _Sizes, place, ref, row):
    """Row `row` of the tile's incoming gradient, zero past the ends of the queries and of the channels."""
    x = _inside(sizes, place, ref[row], row)
    if sizes.channels % sizes.block == 0:
        return x
    channel = place[3] * sizes.block + lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(channel < sizes.channels, x, jnp.zeros_like(x))


def _heads(sizes: _Sizes, shape: tuple[int, int]) -> Int[Array, "_ D"]:
    """Number of the head that each channel belongs to; `//` on arrays asks for a TPU where the program is lowered."""
    return lax.div(lax.broadcasted_iota(jnp.int32, shape, 1), jnp.int32(sizes.dim // sizes.heads))


def _stack(sizes: _Sizes, query):
    """Stack the heads of (tile columns, D) queries along the rows, each with the other heads' channels zero."""
    head = _heads(sizes, query.shape)
    return jnp.concatenate([jnp.where(head == n, query, jnp.zeros_like(query)) for n in range(sizes.heads)], 0)


def _weights(sizes: _Sizes, stacked, keys, row_ref, col_ref, row):
    """Numerators (heads, tile columns, keys) and denominators of the softmax, for row `row` of the tile."""
    scores = _dot(stacked, keys, (1, 1)) * (sizes.dim // sizes.heads) ** -0.5
    bias = col_ref[...] + row_ref[pl.ds(row, 1), :]
    scores = scores.reshape(sizes.heads, sizes.tile[1], sizes.keys) + bias[None]
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return weights, weights.sum(-1, keepdims=True)


def _mean_weights(sizes: _Sizes, place, query_ref, key_ref, row_ref, col_ref, weight_ref):
    """Write the weights of all queries of the tile, averaged over the heads, before its first block of channels."""

    @pl.when(place[3] == 0)
    def _():
        keys = key_ref[0].reshape(sizes.keys, sizes.dim)

        def step(row, carry):
            stacked = _stack(sizes, _inside(sizes, place, query_ref[row], row))
            weights, total = _weights(sizes, stacked, keys, row_ref, col_ref, row)
            mean = (weights * (1 / (sizes.heads * total))).sum(0)
            index = pl.ds(pl.multiple_of(row * sizes.tile[1], SUBLANES), sizes.tile[1])
            weight_ref[index] = mean.astype(weight_ref.dtype)
            return carry

        lax.fori_loop(0, sizes.tile[0], step, 0)


def _forward_kernel(sizes, rows, cols, query, key, values, row_bias, col_bias, output, weights):
    place = _place()
    _mean_weights(sizes, place, query, key, row_bias, col_bias, weights)
    product = _dot(weights[...], values[0].reshape(sizes.keys, sizes.block), (1, 0))
    output[...] = product.reshape(*sizes.tile, sizes.block).astype(output.dtype)


def _query_key_kernel(
    sizes, rows, cols, query, key, values, gradient, row_bias, col_bias, _, d_query, d_key, d_weights, part, sums
):
    block = values[0].reshape(sizes.keys, sizes.block)
    keys = key[0].reshape(sizes.keys, sizes.dim)
    place = _place()
    first = place[3] == 0
    scale = (sizes.dim // sizes.heads) ** -0.5 / sizes.heads
    wide = sizes.tile[1]

    def outer(row, carry):
        index = pl.ds(pl.multiple_of(row * wide, SUBLANES), wide)
        product = _dot(_gradient(sizes, place, gradient, row), block, (1, 1))
        d_weights[index] = jnp.where(first, product, d_weights[index] + product)
        return carry

    lax.fori_loop(0, sizes.tile[0], outer, 0)

    def inner(row, carry):
        stacked = _stack(sizes, _inside(sizes, place, query[row], row))
        weights, total = _weights(sizes, stacked, keys, row_bias, col_bias, row)
        weights = weights / total
        outer = d_weights[pl.ds(pl.multiple_of(row * wide, SUBLANES), wide)][None]
        d_scores = weights * (outer - (weights * outer).sum(-1, keepdims=True)) * scale
        d_scores = d_scores.reshape(sizes.heads * wide, sizes.keys).astype(keys.dtype)
        heads = _dot(d_scores, keys, (1, 0))
        head = _heads(sizes, (wide, sizes.dim))
        own = (jnp.where(head == n, heads[n * wide : (n + 1) * wide], 0.0) for n in range(sizes.heads))
        d_query[row] = functools.reduce(jnp.add, own).astype(d_query.dtype)
        part[:, : sizes.dim] += _dot(d_scores, stacked, (0, 0))
        return carry

    @pl.when(place[3] == sizes.blocks - 1)
    def _():
        part[...] = jnp.zeros_like(part)
        lax.fori_loop(0, sizes.tile[0], inner, 0)
        _add(sizes, place, rows, cols, d_key, slice(None), part[...], sums)


def _values_kernel(sizes, rows, cols, query, key, gradient, row_bias, col_bias, _, d_values, weights, sums):
    place = _place()
    _mean_weights(sizes, place, query, key, row_bias, col_bias, weights)

    def step(row, part):
        index = pl.ds(pl.multiple_of(row * sizes.tile[1], SUBLANES), sizes.tile[1])
        return part + _dot(weights[index], _gradient(sizes, place, gradient, row), (0, 0))

    part = lax.fori_loop(0, sizes.tile[0], step, jnp.zeros((sizes.keys, sizes.block), jnp.float32))
    channels = pl.ds(pl.multiple_of(place[3] * sizes.block, LANES), sizes.block)
    _add(sizes, place, rows, cols, d_values, channels, part, sums)


def _add(sizes, place, rows, cols, target, channels, part, sums):
    """Add (keys, channels) to the tile's slab of `target` in device memory, by way of `sums` in VMEM."""
    (b, i, j, _), (height, width) = place, sizes.slab
    slab = b, pl.ds(rows[i], height), pl.ds(pl.multiple_of(cols[j], SUBLANES), width), channels
    pltpu.sync_copy(target.at[slab], sums)
    sums[...] += part.reshape(sums.shape)
    pltpu.sync_copy(sums, target.at[slab])
