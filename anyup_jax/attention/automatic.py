"""The backend `auto`: the fused kernels in programs for a TPU, tiles of plain operations in all others."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jax import lax
from jaxtyping import Array, Float, Int

from anyup_core.geometry import AxisWindow
from anyup_jax.attention.pallas_tpu import attend, kernel_tables
from anyup_jax.attention.tiled import attend_tiles, tile_tables
from anyup_jax.promotion import standard_promotion


def automatic(
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
    """Compute `window_attention` with `pallas_tpu` where the program is lowered for a TPU and the keys fit, or `tiled`.

    The platform is that of the program, not of the host that traces it: a program compiled on a CPU host for a TPU has
    the kernels. A program has one of the two, never both.
    """
    tiles = tile_tables(query, rows, cols, q_chunk_size, strip)
    kernels = kernel_tables(query, key, values, rows, cols, num_heads, q_chunk_size, strip)
    if kernels is None:
        return attend_tiles(query, key, values, tiles, num_heads)
    return _automatic(query, key, values, tiles, kernels, num_heads)


def _by_platform(function: Callable, num_heads: int, tiles, kernels, *operands):
    """Call `function(attend, *operands)` with the attention of the program's platform."""

    def on_tpu(tiles, kernels, *operands):
        return function(lambda q, k, v: attend(q, k, v, kernels, num_heads), *operands)

    def elsewhere(tiles, kernels, *operands):
        return function(lambda q, k, v: attend_tiles(q, k, v, tiles, num_heads), *operands)

    return lax.platform_dependent(tiles, kernels, *operands, tpu=on_tpu, default=elsewhere)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _automatic(query, key, values, tiles, kernels, num_heads):
    return _by_platform(lambda attend, *x: attend(*x), num_heads, tiles, kernels, query, key, values)


def _forward(*arguments):
    return _automatic(*arguments), arguments[:-1]


@standard_promotion()
def _backward(num_heads, saved, cotangent):
    def gradients(attend, cotangent, *inputs):
        return jax.vjp(attend, *inputs)[1](cotangent)

    query, key, values, tiles, kernels = saved
    return *_by_platform(gradients, num_heads, tiles, kernels, cotangent, query, key, values), None, None


_automatic.defvjp(_forward, _backward)
