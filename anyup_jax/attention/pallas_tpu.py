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
        row_start, col_start: first key row and column of the slabs; columns are multiples of 8.
        row_bias: (runs, size, span) float32, the logarithm of how often a query row of a tile sees a key row of its
            slab, minus infinity for never. Queries past the end of the axis repeat the last one.
        col_bias: the same along the columns; size and span are multiples of 8.
        width: key columns after padding, such that every slab lies inside.
        channels: channels of the values worked on at once, a multiple of 128.
    """

    row_start: Int[Array, " down"]
    row_bias: Float[Array, "down rows row_span"]
    col_start: Int[Array, " across"]
    col_bias: Float[Array, "across cols col_span"]
    width: int = dataclasses.field(metadata=dict(static=True))
    channels: int = dataclasses.field(metadata=dict(static=True))

    def strip(self, index: Int[Array, ""] | int, strips: int) -> KernelTables:
        """The tables of one of several equal strips of query rows."""
        if strips == 1:
            return self
        runs = len(self.row_start) // strips
        start, bias = (lax.dynamic_slice_in_dim(x, index * runs, runs) for x in (self.row_start, self.row_bias))
        return dataclasses.replace(self, row_start=start, row_bias=bias)


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
    interpret: bool = False,
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
    return attend(query, key, values, tables, num_heads=num_heads, interpret=interpret)


def kernel_tables(
    query: Float[Array, "B Ho Wo D"],
    key: Float[Array, "B h w D"],
    values: Float[Array, "B h w E"],
    rows: AxisWindow,
    cols: AxisWindow,
    num_heads: int,
    q_chunk_size: int | None,
    strip: Int[Array, ""] | int,
) -> KernelTables | None:
    """Return the tables for the rows of queries that are here; None if the keys of no tile fit in VMEM."""
    strips = rows.queries // query.shape[1]
    itemsize = max(x.dtype.itemsize for x in (query, key, values))
    tables = plan_tables(rows, cols, query.shape[-1], values.shape[-1], num_heads, itemsize, q_chunk_size, strips)
    return None if tables is None else tables.strip(strip, strips)


def plan_tables(
    rows: AxisWindow,
    cols: AxisWindow,
    dim: int,
    channels: int,
    num_heads: int,
    itemsize: int,
    queries: int | None = None,
    strips: int = 1,
) -> KernelTables | None:
    """Choose a tile of at most `queries` queries and a block of channels, and make the tables of all tiles.

    Args:
        rows, cols: the windows.
        dim, channels: channels of queries and keys, and of the values.
        num_heads: number of heads.
        itemsize: bytes of an element of the widest operand.
        queries: most queries a tile may have; None for what is fastest.
        strips: no tile crosses the border between two of so many equal strips of query rows.

    Returns:
        None if even the smallest tile needs more than the VMEM of a TPU core.
    """
    plan = _plan(rows, cols, dim, channels, num_heads, itemsize, queries, strips)
    if plan is None:
        return None
    tall, wide, block, width = plan
    with np.errstate(divide="ignore"):
        row_bias, col_bias = (np.log(x.count.astype(np.float32)) for x in (tall, wide))
    arrays = map(jnp.asarray, (tall.start, row_bias, wide.start, col_bias))
    return KernelTables(*arrays, width=width, channels=block)


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
            while True:
                size = _tile_bytes(down, across, keys, dim, block, num_heads, itemsize)
                if size <= VMEM_BUDGET or block == LANES:
                    break
                block = LANES * math.ceil(block / LANES / 2)
            if size > VMEM_BUDGET:
                continue
            padded = LANES * math.ceil(keys / LANES)
            work = down * across * padded * (num_heads * HEAD_COST + channels)
            cost = tall.runs * wide.runs * (work + STEP_COST * math.ceil(channels / block))
            if best is None or cost < best[0]:
                width = max(SUBLANES * math.ceil(cols.keys / SUBLANES), int(wide.start.max()) + wide.span)
                best = cost, (tall, wide, block, width)
    return None if best is None else best[1]


def _tile_bytes(down: int, across: int, keys: int, dim: int, block: int, heads: int, itemsize: int) -> int:
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
    """Static sizes of one call: queries, keys, a tile, its slab, channels and blocks of them."""

    batch: int
    queries: tuple[int, int]
    tile: tuple[int, int]
    slab: tuple[int, int]
    grid: tuple[int, int]
    dim: int
    channels: int
    block: int
    heads: int
    interpret: bool

    @property
    def keys(self) -> int:
        return self.slab[0] * self.slab[1]

    @property
    def blocks(self) -> int:
        return math.ceil(self.channels / self.block)


def attend(
    query: Float[Array, "B Ho Wo D"],
    key: Float[Array, "B h w D"],
    values: Float[Array, "B h w E"],
    tables: KernelTables,
    *,
    num_heads: int,
    interpret: bool = False,
) -> Float[Array, "B Ho Wo E"]:
    """Compute the attention of the tiles that the tables describe; they may be known only when the program runs."""
    dtype = jnp.promote_types(query.dtype, key.dtype)
    batch, height, width, dim = query.shape
    (down, *size_rows), (across, *size_cols) = tables.row_bias.shape, tables.col_bias.shape
    (tile, slab), channels = zip(size_rows, size_cols), values.shape[-1]
    grid = down, across
    sizes = _Sizes(
        batch, (height, width), tile, slab, grid, dim, channels, tables.channels, num_heads, interpret
    )  # fmt: skip
    columns = (0, tables.width - key.shape[2])
    key = jnp.pad(key, ((0, 0), (0, 0), columns, (0, 0)))
    values = jnp.pad(values, ((0, 0), (0, 0), columns, (0, sizes.blocks * sizes.block - channels)))
    row_bias = jnp.repeat(tables.row_bias, slab[1], axis=2)
    col_bias = jnp.tile(tables.col_bias, (1, 1, slab[0]))
    arrays = (query.astype(dtype), key.astype(dtype), values)
    places = (tables.row_start, tables.col_start, row_bias, col_bias)
    return _attend(*arrays, *places, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attend(query, key, values, row_start, col_start, row_bias, col_bias, sizes):
    places = row_start, col_start
    specs = _Specs(sizes)
    (output,) = _call(
        functools.partial(_forward_kernel, sizes),
        sizes,
        places,
        [(query, specs.tile(sizes.dim)), (key, specs.slab(sizes.dim)), (values, specs.slab_block())],
        (row_bias, col_bias),
        [((sizes.batch, *sizes.queries, sizes.channels), values.dtype, specs.tile_block())],
        [pltpu.VMEM((math.prod(sizes.tile), sizes.keys), values.dtype)],
    )
    return output


def _attend_forward(query, key, values, row_start, col_start, row_bias, col_bias, sizes):
    saved = query, key, values, row_start, col_start, row_bias, col_bias
    return _attend(*saved, sizes), saved


def _attend_backward(sizes, saved, gradient):
    # one after the other under `vmap`: a batched operand in device memory has no lowering for TPU
    gradients = jax.custom_batching.sequential_vmap(functools.partial(_gradients, sizes))(*saved, gradient)
    return *gradients, None, None, None, None


def _gradients(sizes, query, key, values, row_start, col_start, row_bias, col_bias, gradient):
    specs, places, biases = _Specs(sizes), (row_start, col_start), (row_bias, col_bias)
    tile, (high, wide) = math.prod(sizes.tile), sizes.slab
    lanes = LANES * math.ceil(sizes.dim / LANES)
    operands = [
        (query, specs.tile(sizes.dim)),
        (key, specs.slab(sizes.dim)),
        (values, specs.slab_block()),
        (gradient, specs.tile_block()),
    ]
    d_query, d_key = _call(
        functools.partial(_query_key_kernel, sizes),
        sizes,
        places,
        operands,
        biases,
        [(query.shape, query.dtype, specs.tile(sizes.dim)), ((*key.shape[:3], lanes), jnp.float32, None)],
        [
            pltpu.VMEM((tile, sizes.keys), jnp.float32),
            pltpu.VMEM((sizes.keys, lanes), jnp.float32),
            pltpu.VMEM((high, wide, lanes), jnp.float32),
            pltpu.SemaphoreType.DMA,
        ],
    )
    (d_values,) = _call(
        functools.partial(_values_kernel, sizes),
        sizes,
        places,
        [operands[0], operands[1], operands[3]],
        biases,
        [(values.shape, jnp.float32, None)],
        [
            pltpu.VMEM((tile, sizes.keys), values.dtype),
            pltpu.VMEM((high, wide, sizes.block), jnp.float32),
            pltpu.SemaphoreType.DMA,
        ],
    )
    d_key = d_key[..., : sizes.dim].astype(key.dtype)
    return d_query, d_key, d_values.astype(values.dtype)


_attend.defvjp(_attend_forward, _attend_backward)


@dataclasses.dataclass(frozen=True)
class _Specs:
    """Which block of its operands a step of the grid (batch, tile row, tile column, block of channels) works on."""

    sizes: _Sizes

    def tile(self, channels: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *self.sizes.tile, channels), lambda b, i, j, c, rows, cols: (b, i, j, 0))

    def tile_block(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, *self.sizes.tile, self.sizes.block), lambda b, i, j, c, rows, cols: (b, i, j, c))

    def slab(self, channels: int) -> pl.BlockSpec:
        shape = map(pl.Element, (1, *self.sizes.slab, channels))
        return pl.BlockSpec(
            tuple(shape), lambda b, i, j, c, rows, cols: (b, rows[i], pl.multiple_of(cols[j], SUBLANES), 0)
        )

    def slab_block(self) -> pl.BlockSpec:
        shape, block = map(pl.Element, (1, *self.sizes.slab, self.sizes.block)), self.sizes.block
        return pl.BlockSpec(
            tuple(shape),
            lambda b, i, j, c, rows, cols: (
                b, rows[i], pl.multiple_of(cols[j], SUBLANES), pl.multiple_of(c * block, LANES)
            ),
        )  # fmt: skip


def _call(kernel, sizes, places, operands, biases, results, scratch):
    """Run a kernel over all tiles; results without a block lie in device memory, begin at zero and are summed there."""
    row_spec = pl.BlockSpec((None, sizes.tile[0], sizes.keys), lambda b, i, j, c, rows, cols: (i, 0, 0))
    col_spec = pl.BlockSpec((None, sizes.tile[1], sizes.keys), lambda b, i, j, c, rows, cols: (j, 0, 0))
    operands = [*operands, (biases[0], row_spec), (biases[1], col_spec)]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    aliases = {}
    for index, (shape, dtype, spec) in enumerate(results):
        if spec is None:
            aliases[len(places) + len(operands)] = index
            operands.append((jnp.zeros(shape, dtype), anywhere))
    return pl.pallas_call(
        kernel,
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
    )(*places, *(array for array, _ in operands))


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


def _stack(sizes: _Sizes, query):
    """Stack the heads of (tile columns, D) queries along the rows, each with the other heads' channels zero."""
    head = lax.broadcasted_iota(jnp.int32, query.shape, 1) // (sizes.dim // sizes.heads)
    parts = [jnp.where(head == n, query, jnp.zeros_like(query)) for n in range(sizes.heads)]
    return jnp.concatenate(parts, 0)


def _weights(sizes: _Sizes, stacked, keys, row_ref, col_ref, row):
    """Numerators (heads, tile columns, keys) and denominators of the softmax, for row `row` of the tile."""
    scores = _dot(stacked, keys, (1, 1)) * (sizes.dim // sizes.heads) ** -0.5
    bias = col_ref[...] + row_ref[pl.ds(row, 1), :]
    scores = scores.reshape(sizes.heads, sizes.tile[1], sizes.keys) + bias[None]
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return weights, weights.sum(-1, keepdims=True)


def _mean_weights(sizes: _Sizes, place, query_ref, key_ref, row_ref, col_ref, weight_ref):
    """Write the weights of all queries of the tile, averaged over the heads."""
    keys = key_ref[0].reshape(sizes.keys, sizes.dim)

    def step(row, carry):
        stacked = _stack(sizes, _inside(sizes, place, query_ref[row], row))
        weights, total = _weights(sizes, stacked, keys, row_ref, col_ref, row)
        mean = (weights * (1 / (sizes.heads * total))).sum(0)
        weight_ref[pl.ds(pl.multiple_of(row * sizes.tile[1], SUBLANES), sizes.tile[1])] = mean.astype(weight_ref.dtype)
        return carry

    lax.fori_loop(0, sizes.tile[0], step, 0)


def _forward_kernel(sizes, rows, cols, query, key, values, row_bias, col_bias, output, weights):
    place = _place()

    @pl.when(place[3] == 0)
    def _():
        _mean_weights(sizes, place, query, key, row_bias, col_bias, weights)

    product = _dot(weights[...], values[0].reshape(sizes.keys, sizes.block), (1, 0))
    output[...] = product.reshape(*sizes.tile, sizes.block).astype(output.dtype)


def _query_key_kernel(
    sizes, rows, cols, query, key, values, gradient, row_bias, col_bias, _, d_query, d_key, d_weights, part, sums, done
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
        head = lax.broadcasted_iota(jnp.int32, (wide, sizes.dim), 1) // (sizes.dim // sizes.heads)
        total = jnp.zeros((wide, sizes.dim), jnp.float32)
        for n in range(sizes.heads):
            total += jnp.where(head == n, heads[n * wide : (n + 1) * wide], 0.0)
        d_query[row] = total.astype(d_query.dtype)
        part[:, : sizes.dim] += _dot(d_scores, stacked, (0, 0))
        return carry

    @pl.when(place[3] == sizes.blocks - 1)
    def _():
        part[...] = jnp.zeros_like(part)
        lax.fori_loop(0, sizes.tile[0], inner, 0)
        _add(sizes, place, rows, cols, d_key, slice(None), part[...], sums, done)


def _values_kernel(sizes, rows, cols, query, key, gradient, row_bias, col_bias, _, d_values, weights, sums, done):
    place = _place()

    @pl.when(place[3] == 0)
    def _():
        _mean_weights(sizes, place, query, key, row_bias, col_bias, weights)

    def step(row, part):
        index = pl.ds(pl.multiple_of(row * sizes.tile[1], SUBLANES), sizes.tile[1])
        return part + _dot(weights[index], _gradient(sizes, place, gradient, row), (0, 0))

    part = lax.fori_loop(0, sizes.tile[0], step, jnp.zeros((sizes.keys, sizes.block), jnp.float32))
    channels = pl.ds(pl.multiple_of(place[3] * sizes.block, LANES), sizes.block)
    _add(sizes, place, rows, cols, d_values, channels, part, sums, done)


def _add(sizes, place, rows, cols, target, channels, part, sums, done):
    """Add (keys, channels) to the tile's slab of `target` in device memory, by way of `sums` in VMEM."""
    slab = (
        place[0],
        pl.ds(rows[place[1]], sizes.slab[0]),
        pl.ds(pl.multiple_of(cols[place[2]], SUBLANES), sizes.slab[1]),
        channels,
    )
    fetch = pltpu.make_async_copy(target.at[slab], sums, done)
    fetch.start()
    fetch.wait()
    sums[...] += part.reshape(sums.shape)
    store = pltpu.make_async_copy(sums, target.at[slab], done)
    store.start()
    store.wait()
